"""Tables and JSON of the command line, and the documents of a written folder."""

import json
from typing import Any

from rich.table import Table
from rich.text import Text

from minillm_jax.plan import Plan
from minillm_jax.recipes import recipe as recipes
from minillm_jax.report import model_card, page, plots
from minillm_jax.report.summary import (
    FORMAT_WORDS,
    advice,
    criterion,
    result_json,
    rows,
    short,
    short_name,
    size,
    title,
)
from minillm_jax.run import Result


def documents(result: Result) -> dict[str, str]:
    """The documents that are written beside the weights, by file name: report.json, report.html and the model card."""
    summary = result_json(result)
    return {
        "report.json": json.dumps(summary, indent=2) + "\n",
        "report.html": page.page(summary, plots.draw(summary)),
        "README.md": model_card.card(summary),
    }


def result_table(result: Result) -> Table:
    """A pruning job as a table: costs, sizes and perplexity before and after, seconds, output folder."""
    summary = result_json(result)
    settings = summary["settings"]
    recipe = f"{criterion(settings)}, refit {settings['refit']['method']}"
    table = Table(title=Text(f"{title(summary)} ({recipe})"))
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for row in rows(summary):
        table.add_row(*row)
    table.add_section()
    table.add_row("calibration tokens for each MLP channel", "", f"{summary['tokens_per_channel']:.2f}", "")
    table.add_row("seconds", "", f"{sum(result.seconds.values()):.1f}", "")
    written = f"written to {result.job.output}: {FORMAT_WORDS[result.written.format]}"
    lines = [written, summary["few_tokens"], advice(summary)]
    table.caption = Text("\n".join(filter(None, lines)))
    return table


def recipes_json(kind: type[recipes.Settings] = recipes.Recipe) -> dict[str, Any]:
    """All recipes of a command as one JSON object: name -> summary, and all settings by section."""
    loaded = {name: recipes.load_as(kind, name) for name in recipes.names(kind)}
    return {
        name: {"summary": recipe.summary, **recipes.as_table(recipe, recipes.all_keys(kind))}
        for name, recipe in loaded.items()
    }


def recipes_table(kind: type[recipes.Settings] = recipes.Recipe) -> Table:
    """All recipes of a command as a table: name, summary, and the settings that differ from the defaults."""
    table = Table(title="recipes", show_lines=True)
    for heading in ("recipe", "summary", "settings that differ from the defaults"):
        table.add_column(heading, overflow="fold")
    for name in recipes.names(kind):
        recipe = recipes.load_as(kind, name)
        settings = [
            f"{at}.{key} = {value}" for at, keys in recipes.as_table(recipe).items() for key, value in keys.items()
        ]
        table.add_row(name, recipe.summary, Text("\n".join(settings) or "none: the defaults"))
    return table


def plan_table(plan: Plan) -> Table:
    """The cost of a run before anything is loaded, as a table."""
    table = Table(title=Text(f"plan: {short_name(plan.model)}, recipe {short_name(plan.recipe)}, {plan.devices}"))
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    names = {"parameters": "parameters", "macs": "MACs of a window", "memory": "weights, keys and values"}
    write = {"parameters": "{:,}".format, "macs": short, "memory": size}
    for measure, before in plan.costs_before.items():
        after = "by scores or losses" if plan.costs_after is None else write[measure](plan.costs_after[measure])
        table.add_row(names[measure], write[measure](before), after)
    table.add_section()
    for name, value in _plan_rows(plan):
        table.add_row(name, "", value)
    if plan.few_tokens:
        table.caption = Text(f"{plan.few_tokens}.")
    return table


def _plan_rows(plan: Plan) -> list[tuple[str, str]]:
    memory = size(plan.device_bytes)
    if plan.fits is not None:
        memory += f" of {size(plan.device_memory or 0)}: {'fits' if plan.fits else 'does not fit'}"
    if plan.devices == "cpu":
        places = [("memory of the process at its peak", f"{size(plan.device_bytes + plan.host_bytes)}")]
    else:
        places = [("memory of one device at its peak", memory), ("memory of the host beside it", size(plan.host_bytes))]
    if plan.streamed_bytes is not None:
        beside = plan.host_bytes if plan.devices == "cpu" else 0
        places.append(("the same with --stream, one layer at a time", size(plan.streamed_bytes + beside)))
    shapes = f"{plan.format or 'per-layer'} folder, shapes by scores or losses"
    files = shapes if plan.files is None else f"{plan.format}, {size(plan.files)}"
    return [
        ("calibration tokens", f"{plan.tokens:,}"),
        ("calibration tokens for each MLP channel", f"{plan.tokens_per_channel:.2f}"),
        ("floating-point operations", short(plan.flops)),
        *places,
        ("output", files),
    ]
