"""A finished job in numbers and plain words: what table, page, model card and JSON are all made of.

`result_json` is the source of all of them; everything else here and in `pages`, `pictures` and `card` takes that
object.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any, NamedTuple

from minillm_jax.run import Result

Figures = Mapping[str, Any]

# What of the record are settings.
SETTINGS = ("preset", "structures", "budget", "scoring", "refit", "calibration")

# What a user should know of the format that was written.
FORMAT_WORDS = {
    "stock": "loads in stock transformers",
    "per-layer": "loads in transformers with trust_remote_code=True (or convert.modeling_pruned)",
    "padded": "loads in stock transformers; zero-padded, which saves less",
    "flax": "an Orbax checkpoint",
}

KIND_WORDS = {
    "head": "key/value heads a layer",
    "query": "query heads a layer",
    "channel": "MLP channels a layer",
    "hidden": "hidden size",
    "layer": "layers",
}

MEASURE_WORDS = {"parameters": "parameters", "macs": "MACs", "memory": "memory"}


class Row(NamedTuple):
    """One line of the table of figures."""

    name: str
    before: str
    after: str
    change: str


def result_json(result: Result) -> dict[str, Any]:
    """A pruning job as one JSON object."""
    record = result.pruned.record or {}
    costs = {"window": result.job.budget.window, "before": result.costs_before, "after": result.costs_after}
    return {
        "base_model": record["base_model"],
        "output": result.job.output,
        "format": result.written.format,
        "parameters_stored": result.written.parameters,
        "parameters_before": record["parameters_before"],
        "parameters_after": record["parameters_after"],
        "costs": costs,
        "evaluation": result.job.evaluation,
        "perplexity_before": None if result.before is None else asdict(result.before),
        "perplexity_after": None if result.after is None else asdict(result.after),
        "whole": {kind: {"before": row["before"], "after": len(row["kept"])} for kind, row in record["whole"].items()},
        "groups": _groups(record),
        "scores": record["scores"],
        "losses": record["losses"],
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        "settings": {key: record[key] for key in SETTINGS} | {"rounds": record["rounds"]},
        "step": (record["estimate"] or {}).get("step"),
        "versions": record["versions"],
    }


def _groups(record: Mapping[str, Any]) -> dict[str, dict[str, list[int]]]:
    return {
        kind: {
            "before": record["groups_before"][kind],
            "asked": record["groups_asked"][kind],
            "after": [len(indices) for indices in rows],
        }
        for kind, rows in record["kept"].items()
    }


def rows(figures: Figures) -> list[Row]:
    """The table of figures: costs, what was kept, perplexity."""
    return [*_cost_rows(figures), *_kept_rows(figures), *_perplexity_rows(figures)]


def _cost_rows(figures: Figures) -> list[Row]:
    window, before, after = (figures["costs"][key] for key in ("window", "before", "after"))
    found = [Row("parameters", *_change(before["parameters"], after["parameters"], "{:,}".format))]
    stored = figures["parameters_stored"]
    if stored != after["parameters"]:
        name = "parameters in the files, with padding"
        found.append(Row(name, *_change(before["parameters"], stored, "{:,}".format)))
    found.append(Row(f"MACs for {window} tokens", *_change(before["macs"], after["macs"], short)))
    return [*found, Row(f"memory with {window} tokens", *_change(before["memory"], after["memory"], size))]


def _change(before: int, after: int, write: Any) -> tuple[str, str, str]:
    return write(before), write(after), f"{after / before - 1:+.1%}".replace("-", "−")


def _kept_rows(figures: Figures) -> list[Row]:
    found = [Row(KIND_WORDS[kind], str(row["before"]), str(row["after"]), "") for kind, row in figures["whole"].items()]
    for kind, counts in figures["groups"].items():
        asked = f"asked {span(counts['asked'])}" if counts["after"] != counts["asked"] else ""
        found.append(Row(KIND_WORDS[kind], span(counts["before"]), span(counts["after"]), asked))
    return found


def _perplexity_rows(figures: Figures) -> list[Row]:
    if not figures["perplexity_before"] or not figures["perplexity_after"]:
        return []
    before, after = (figures[f"perplexity_{when}"]["perplexity"] for when in ("before", "after"))
    return [Row("perplexity", f"{before:.3f}", f"{after:.3f}", f"× {after / before:.2f}")]


def recipe(figures: Figures) -> list[tuple[str, str]]:
    """How it was pruned: names of settings and what they were, in plain text."""
    settings = figures["settings"]
    scoring, refit, drawn = settings["scoring"], settings["refit"], settings["calibration"]
    method = refit["method"]
    named = [] if method == "none" else [f"{k} {refit[k]:g}" for k in ("alpha", "ridge", "inner") if refit[k]]
    source = short_name(drawn["source"])
    found = [
        ("preset", settings["preset"] or "none"),
        ("criterion", scoring["criterion"]),
        ("pruned", ", ".join(settings["structures"])),
        ("budget", f"{amount(settings['budget'])}, {settings['budget']['allocation']} between the layers"),
        ("rounds", str(settings["rounds"])),
        ("refit", ", ".join([method, *named])),
        ("calibration", f"{drawn['samples']} windows of {drawn['length']} tokens of {source}, seed {drawn['seed']}"),
    ]
    after = figures["perplexity_after"]
    if after:
        measured = f"{after['windows']:,} windows of {after['window']} tokens of {short_name(figures['evaluation'])}"
        found.append(("perplexity on", measured))
    return found


def amount(budget: Mapping[str, Any]) -> str:
    """How much went, in words."""
    if budget["target"] is not None:
        measure, most = budget["target"]
        return f"to {most:,.0f} {measure}"
    words = {"groups": "", "blocks": " of the blocks' parameters", "model": " of all parameters"}
    return f"by {100 * budget['ratio']:g} %{words[budget['of']]}"


def advice(figures: Figures) -> str:
    """What is to be said of the estimate's step; empty where there is nothing."""
    return (figures["step"] or {}).get("advice") or ""


def span(counts: list[int]) -> str:
    """The numbers of all layers, in short."""
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def short(number: int | float) -> str:
    """Three or four figures and a decimal prefix: 864.0 G."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000 or prefix == "P":
            return f"{number:,.0f}" if not prefix else f"{number:,.1f} {prefix}"
        number /= 1000
    raise AssertionError("the last prefix takes all")


def size(count: int) -> str:
    """Bytes with a decimal prefix: 12.6 GB."""
    return f"{short(count)}B" if count >= 1000 else f"{count} B"


def short_name(name: str | None) -> str:
    """A Hub id as it is, of a path only the last part: where it lay says nothing to others, and may say too much."""
    text = printable(str(name))
    return text if re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+){0,2}(:[\w.-]+)?", text) else PurePath(text).name or text


def printable(text: str) -> str:
    """Text without control characters and halves of characters, which neither YAML nor UTF-8 can hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
