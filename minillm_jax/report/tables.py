"""Tables and JSON of the command line, and the documents of a written folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from minillm_jax.evaluation.perplexity import Perplexity
from minillm_jax.presets import COMMON, PRESETS
from minillm_jax.report import html, model_card, plots
from minillm_jax.report.summary import FORMAT_WORDS, advice, result_json, rows, title
from minillm_jax.run import Result


def documents(result: Result) -> dict[str, str]:
    """The documents that are written beside the weights, by file name: report.json, report.html and the model card."""
    summary = result_json(result)
    return {
        "report.json": json.dumps(summary, indent=2) + "\n",
        "report.html": html.page(summary, plots.draw(summary)),
        "README.md": model_card.card(summary),
    }


def result_table(result: Result) -> Table:
    """A pruning job as a table: costs, sizes and perplexity before and after, seconds, output folder."""
    summary = result_json(result)
    settings = summary["settings"]
    recipe = f"{settings['scoring']['criterion']}, refit {settings['refit']['method']}"
    table = Table(title=Text(f"{title(summary)} ({recipe})"))
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for row in rows(summary):
        table.add_row(*row)
    table.add_section()
    table.add_row("seconds", "", f"{sum(result.seconds.values()):.1f}", "")
    lines = [f"written to {result.job.output}: {FORMAT_WORDS[result.written.format]}", advice(summary)]
    table.caption = Text("\n".join(filter(None, lines)))
    return table


def perplexity_json(model: str, source: str, measured: Perplexity) -> dict[str, Any]:
    """An evaluation as one JSON object."""
    return {"model": model, "text": source, **asdict(measured)}


def perplexity_table(model: str, source: str, measured: Perplexity) -> Table:
    """An evaluation as a table."""
    table = Table(title=Text(f"{model} on {source}"))
    for heading in ("perplexity", "loss (nats)", "predictions", "windows", "window"):
        table.add_column(heading, justify="right")
    loss, perplexity = f"{measured.loss:.4f}", f"{measured.perplexity:.3f}"
    table.add_row(perplexity, loss, f"{measured.tokens:,}", f"{measured.windows:,}", str(measured.window))
    return table


def presets_json() -> dict[str, Any]:
    """All recipes as one JSON object."""
    return {name: {"words": preset.words, **preset.options} for name, preset in PRESETS.items()}


def presets_table() -> Table:
    """All recipes as a table: name, description, and the options that differ from the common ones."""
    table = Table(title="presets", show_lines=True)
    for heading in ("preset", "description", "options"):
        table.add_column(heading, overflow="fold")
    for name, preset in PRESETS.items():
        different = {option: value for option, value in preset.options.items() if COMMON.get(option) != value}
        table.add_row(name, preset.words, _options(different))
    common = (
        "Options of every preset that sets no other value. Options not listed depend on the model or the criterion."
    )
    table.add_row("all", common, _options(COMMON))
    return table


def _options(options: Mapping[str, Any]) -> str:
    return "\n".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None)
