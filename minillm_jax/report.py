"""Tables for people and JSON for programs, from result objects."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from minillm_jax.loss import Perplexity
from minillm_jax.pipeline import Result
from minillm_jax.presets import COMMON, PRESETS

# What of the record are settings.
SETTINGS = ("preset", "structures", "budget", "scoring", "restoration", "calibration")

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


def result_json(result: Result) -> dict[str, Any]:
    """A pruning job as one JSON object."""
    record = result.pruned.record or {}
    return {
        "output": result.job.output,
        "format": result.written.format,
        "parameters_stored": result.written.parameters,
        "parameters_before": record["parameters_before"],
        "parameters_after": record["parameters_after"],
        "perplexity_before": None if result.before is None else asdict(result.before),
        "perplexity_after": None if result.after is None else asdict(result.after),
        "groups": _groups(record),
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        "settings": {key: record[key] for key in SETTINGS},
        "step": (record["estimate"] or {}).get("step"),
    }


def result_table(result: Result) -> Table:
    """A pruning job as a table: sizes and perplexity before and after, seconds, where the result lies."""
    record = result.pruned.record or {}
    how = f"{result.job.scoring.criterion}, restoration {result.job.restoration.method}"
    title = f"{Path(result.job.model).name} pruned {_amount(record)} with {how}"
    table = Table(title=Text(title))
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    before, after = record["parameters_before"], record["parameters_after"]
    table.add_row("parameters", f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
    stored = result.written.parameters
    if stored != after:
        table.add_row(
            "parameters in the files, with padding", f"{before:,}", f"{stored:,}", f"{stored / before - 1:+.1%}"
        )
    for kind, row in record["whole"].items():
        table.add_row(KIND_WORDS[kind], str(row["before"]), str(len(row["kept"])), "")
    for kind, counts in _groups(record).items():
        rounded = counts["after"] != counts["asked"]
        asked = f"asked {_span(counts['asked'])}" if rounded else ""
        table.add_row(KIND_WORDS[kind], _span(counts["before"]), _span(counts["after"]), asked)
    if result.before is not None and result.after is not None:
        ratio = result.after.perplexity / result.before.perplexity
        before_text, after_text = f"{result.before.perplexity:.3f}", f"{result.after.perplexity:.3f}"
        table.add_row("perplexity", before_text, after_text, f"× {ratio:.2f}")
    table.add_section()
    table.add_row("seconds", "", f"{sum(result.seconds.values()):.1f}", "")
    table.caption = Text(f"written to {result.job.output}: {FORMAT_WORDS[result.written.format]}{_advice(record)}")
    return table


def _amount(record: dict[str, Any]) -> str:
    budget = record["budget"]
    if budget["target"] is not None:
        measure, most = budget["target"]
        return f"to {most:,.0f} {measure}"
    words = {"groups": "", "blocks": " of the blocks' parameters", "model": " of all parameters"}
    return f"by {100 * budget['ratio']:g} %{words[budget['of']]}"


def _advice(record: dict[str, Any]) -> str:
    """What is to be said of the estimate's step, if anything is."""
    step = (record["estimate"] or {}).get("step") or {}
    return f"\n{step['advice']}" if step.get("advice") else ""


def perplexity_json(model: str, source: str, found: Perplexity) -> dict[str, Any]:
    """An evaluation as one JSON object."""
    return {"model": model, "text": source, **asdict(found)}


def perplexity_table(model: str, source: str, found: Perplexity) -> Table:
    """An evaluation as a table."""
    table = Table(title=Text(f"{model} on {source}"))
    for heading in ("perplexity", "loss (nats)", "predictions", "windows", "window"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{found.perplexity:.3f}", f"{found.loss:.4f}", f"{found.tokens:,}", f"{found.windows:,}", str(found.window)
    )
    return table


def presets_json() -> dict[str, Any]:
    """All recipes as one JSON object."""
    return {name: {"words": preset.words, **preset.options} for name, preset in PRESETS.items()}


def presets_table() -> Table:
    """All recipes as a table: what each is, and what it sets otherwise than the others."""
    table = Table(title="presets", show_lines=True)
    for heading in ("preset", "what it is", "options"):
        table.add_column(heading, overflow="fold")
    for name, preset in PRESETS.items():
        own = {option: value for option, value in preset.options.items() if COMMON.get(option) != value}
        table.add_row(name, preset.words, _options(own))
    table.add_row("all", "What no preset says otherwise; nothing here: by model or criterion.", _options(COMMON))
    return table


def _options(options: Mapping[str, Any]) -> str:
    return "\n".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None)


def _groups(record: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    return {
        kind: {
            "before": record["groups_before"][kind],
            "asked": record["groups_asked"][kind],
            "after": [len(indices) for indices in rows],
        }
        for kind, rows in record["kept"].items()
    }


def _span(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
