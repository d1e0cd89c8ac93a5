"""Finished timings as JSON and table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from minillm_jax.evaluation.speed import Load
from minillm_jax.report.summary import short_name, size
from minillm_jax.timing import Timed


def result_json(found: Sequence[Timed], load: Load, rounds: int) -> dict[str, Any]:
    """Timings as one JSON object; `ratio` compares each with the first model in the same library."""
    return {
        "load": asdict(load),
        "rounds": rounds,
        "models": [asdict(one) | {"ratio": _ratios(one, first_of(found, one))} for one in found],
    }


def first_of(found: Sequence[Timed], one: Timed) -> Timed:
    """The figures of the first model in the same library."""
    return next(other for other in found if other.library == one.library)


def _ratios(one: Timed, first: Timed) -> dict[str, Any]:
    return {
        "first_token": first.speed.first_token / one.speed.first_token,
        "prefill": {batch: speed / first.speed.prefill[batch] for batch, speed in one.speed.prefill.items()},
        "decoding": {batch: speed / first.speed.decoding[batch] for batch, speed in one.speed.decoding.items()},
    }


# One figure of a model as a number, and as text.
Figure = tuple[Callable[[Timed], float], Callable[[float], str]]


def figures(load: Load) -> dict[str, Figure]:
    """Name of a row -> its figure."""
    largest = max(load.batches)
    rows: dict[str, Figure] = {
        "parameters": (lambda one: one.parameters, lambda value: f"{value:,.0f}"),
        "size on disk": (lambda one: one.disk, lambda value: size(round(value))),
        "load, s": (lambda one: one.load_seconds, "{:.2f}".format),
        "peak memory": (lambda one: one.peak_bytes, lambda value: size(round(value))),
        "first token, ms": (lambda one: 1000 * one.speed.first_token, "{:.1f}".format),
        f"prompts × {largest}, tokens/s": (lambda one: one.speed.prefill[largest], "{:,.0f}".format),
    }
    for batch in load.batches:
        rows[f"decoding × {batch}, tokens/s"] = (lambda one, batch=batch: one.speed.decoding[batch], "{:,.1f}".format)
    return rows


def rows(found: Sequence[Timed], load: Load) -> Iterator[list[str]]:
    """Name of a figure, and its text for every model, with the ratio to the first model of the same library."""
    for name, (value, write) in figures(load).items():
        cells = []
        for one in found:
            first = first_of(found, one)
            ratio = "" if one is first else f"  × {value(one) / value(first):.2f}"
            cells.append(f"{write(value(one))}{ratio}")
        yield [name, *cells]


def table(found: Sequence[Timed], load: Load) -> Table:
    """Timings as a table with a column for every model and library."""
    table = Table(title=Text(f"prompts of {load.prompt} tokens, {load.tokens} tokens behind each"))
    table.add_column("")
    for one in found:
        table.add_column(Text(f"{short_name(one.model)}\n{one.library}"), justify="right", overflow="fold")
    for name, *cells in rows(found, load):
        table.add_row(name, *cells)
    return table
