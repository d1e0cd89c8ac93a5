"""Tables for people, JSON for programs, and the documents beside the weights, from result objects."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from minillm_jax.evaluation.perplexity import Perplexity
from minillm_jax.presets import COMMON, PRESETS
from minillm_jax.report import html, model_card, plots
from minillm_jax.report.summary import FORMAT_WORDS, advice, amount, result_json, rows
from minillm_jax.run import Result


def documents(result: Result) -> dict[str, str]:
    """What is written beside the weights, by file name: the figures as JSON and as a page, and the model card."""
    figures = result_json(result)
    return {
        "report.json": json.dumps(figures, indent=2) + "\n",
        "report.html": html.page(figures, plots.draw(figures)),
        "README.md": model_card.card(figures),
    }


def result_table(result: Result) -> Table:
    """A pruning job as a table: costs, sizes and perplexity before and after, seconds, where the result lies."""
    figures = result_json(result)
    settings = figures["settings"]
    how = f"{settings['scoring']['criterion']}, refit {settings['refit']['method']}"
    table = Table(title=Text(f"{Path(result.job.model).name} pruned {amount(settings['budget'])} with {how}"))
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for row in rows(figures):
        table.add_row(*row)
    table.add_section()
    table.add_row("seconds", "", f"{sum(result.seconds.values()):.1f}", "")
    said = "\n".join(
        filter(None, [f"written to {result.job.output}: {FORMAT_WORDS[result.written.format]}", advice(figures)])
    )
    table.caption = Text(said)
    return table


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
