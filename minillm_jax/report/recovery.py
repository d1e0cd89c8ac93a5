"""A finished recovery in numbers and plain words: JSON, table, page and model card."""

import json
from dataclasses import asdict
from math import exp
from typing import Any

from rich.table import Table
from rich.text import Text

from convert import multimodal
from minillm_jax.model import costs
from minillm_jax.report import html, plots
from minillm_jax.report.model_card import code, draft_section, loading, quoted
from minillm_jax.report.page import errors_section
from minillm_jax.report.summary import (
    FORMAT_WORDS,
    Tile,
    errors_json,
    groups_of,
    measured_with_error,
    perplexity_text,
    short,
    short_name,
    size,
    speed_tiles,
)
from minillm_jax.run import Result
from minillm_jax.run_recovery import ADAPTER, RecoveryResult

_PEFT = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

pruned = AutoModelForCausalLM.from_pretrained("path/to/the/pruned/model", trust_remote_code=True)
model = PeftModel.from_pretrained(pruned, "path/to/this/folder/adapter")
```
"""


def documents(result: RecoveryResult) -> dict[str, str]:
    """The documents that are written beside the weights, by file name."""
    found = summary(result)
    return {
        "report.json": json.dumps(found, indent=2) + "\n",
        "report.html": page(found),
        "README.md": card(found),
    }


def summary(result: RecoveryResult) -> dict[str, Any]:
    """A recovery as one JSON object."""
    record = result.model.record or {}
    outcome, measured = result.recovered.outcome, (result.teacher, result.before, result.after)
    teacher, before, after = (None if one is None else asdict(one) for one in measured)
    seconds = {stage: round(value, 3) for stage, value in result.seconds.items()}
    window = record.get("calibration", {}).get("length") or result.job.recipe.evaluation.window
    return {
        "model": result.job.model,
        "base_model": record.get("base_model", result.job.model),
        "output": result.job.output,
        "format": result.written.format,
        "auto_class": multimodal.auto_class(result.model.raw_config),
        "parameters": result.written.parameters,
        "parameters_dense": record.get("parameters_before"),
        "costs": {"window": window, "after": costs.all_costs(result.model.decoder, window)},
        "groups": groups_of(record) if record.get("kept") else None,
        "samples": list(result.texts),
        "layer_errors_before": errors_json(result.errors_before),
        "layer_errors_after": errors_json(result.errors_after),
        "adapter": None if result.recovered.adapter is None else ADAPTER,
        "trained_parameters": result.recovered.trained_parameters,
        "settings": record["recovery"]["settings"],
        "recipe": record["recovery"]["recipe"],
        "updates": outcome.update,
        "tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens_here / outcome.seconds if outcome.seconds else None,
        "peak_bytes": result.peak_bytes,
        "points": [point._asdict() for point in outcome.points],
        "evaluation": result.job.recipe.evaluation.text,
        "perplexity_teacher": teacher,
        "perplexity_before": before,
        "perplexity_after": after,
        "seconds": seconds,
        "versions": record["recovery"]["versions"],
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The measured rows of a recovery: name, before, after."""
    first, last = found["points"][0], _chosen(found)
    result = []
    if found["perplexity_before"] and found["perplexity_after"]:
        teacher = found["perplexity_teacher"]
        name = f"perplexity on {short_name(found['evaluation'])}"
        if teacher:
            name += f" (teacher {teacher['perplexity']:.3f})"
        result.append((name, *(perplexity_text(found[f"perplexity_{when}"]) for when in ("before", "after"))))
    evaluation = found["settings"].get("evaluation", {})
    names = {
        "validation": "perplexity of the validation sequences",
        "watched": f"perplexity on {short_name(evaluation.get('watch'))}, watched",
    }
    for key, name in names.items():
        if first[key] is not None and last[key] is not None:
            result.append((name, f"{exp(first[key]):.3f}", f"{exp(last[key]):.3f}"))
    return result


def _chosen(found: dict[str, Any]) -> dict[str, Any]:
    """The point of the state that was written."""
    return next(point for point in reversed(found["points"]) if point["update"] <= found["updates"])


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings and costs of a recovery: pairs of name and value, as plain text."""
    training = found["settings"]["training"]
    speed = found["tokens_per_second"]
    pairs = [
        ("recipe", short_name(found["recipe"])),
        ("method", training["method"]),
        ("trained parameters", f"{found['trained_parameters']:,} beside {found['parameters']:,}"),
        ("updates", f"{found['updates']:,}"),
        ("tokens that the loss counted", f"{found['tokens']:,}"),
    ]
    if speed:
        pairs.append(("counted tokens a second", f"{speed:,.0f}"))
    if found["peak_bytes"]:
        pairs.append(("peak memory", f"{found['peak_bytes'] / 1e9:.2f} GB"))
    return pairs


def table(result: RecoveryResult) -> Table:
    """A recovery as a table."""
    found = summary(result)
    shown = Table(title=Text(f"{short_name(found['model'])}, recovered"))
    for heading in ("", "before", "after"):
        shown.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for row in rows(found):
        shown.add_row(*row)
    shown.add_section()
    for name, value in facts(found):
        shown.add_row(name, "", value)
    adapter = f"; the adapter of PEFT is in {ADAPTER}/" if found["adapter"] else ""
    shown.caption = Text(f"written to {found['output']}: {FORMAT_WORDS[found['format']]}{adapter}")
    return shown


def three_rows(pruned: Result, result: RecoveryResult) -> Table:
    """Dense, pruned and recovered model, with parameters and perplexity."""
    found = [
        ("dense", pruned.costs_before["parameters"], pruned.before),
        ("pruned", pruned.costs_after["parameters"], pruned.after),
        ("recovered", pruned.costs_after["parameters"], result.after),
    ]
    shown = Table(title=Text(f"{short_name(pruned.job.model)}, pruned and recovered"))
    for heading in ("", "parameters", "perplexity"):
        shown.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for name, parameters, measured in found:
        shown.add_row(name, f"{parameters:,}", "" if measured is None else f"{measured.perplexity:.3f}")
    shown.caption = Text(f"written to {pruned.job.output} and {result.job.output}")
    return shown


def card(found: dict[str, Any]) -> str:
    """The model card of a recovered model, as Markdown."""
    name = short_name(found["base_model"])
    lines = ["| | before | after |", "| --- | ---: | ---: |", *(f"| {' | '.join(row)} |" for row in rows(found))]
    library = "gguf" if found["format"] == "gguf" else "transformers"
    parts = [
        f"---\nbase_model: {quoted(name)}\nlibrary_name: {library}\ntags:\n- pruned\n- recovered\n- minillm-jax\n---\n",
        f"# {code(short_name(found['model']))}, recovered\n",
        f"minillm-jax pruned {code(name)} and trained the pruned model. The model keeps the biases and weaknesses of "
        "the base model. The licence of the base model applies to these weights.\n",
        "## Recovery\n",
        "".join(f"- {label}: {code(value)}\n" for label, value in facts(found)),
        "## Results\n",
        "\n".join(lines) + "\n",
        "`report.html` shows the curves, `report.json` holds all numbers, and `recipe.toml` repeats the recovery.\n",
        "## Loading\n",
        f"Format {code(found['format'])}: {FORMAT_WORDS[found['format']]}.\n",
        loading(found),
    ]
    if found["adapter"]:
        parts += ["The adapter alone is in `adapter/`, for the pruned model:\n", _PEFT]
    return "\n".join([*parts, *draft_section(found["format"])])


def page(found: dict[str, Any]) -> str:
    """report.html of a recovery: results, kept groups, errors, curves, samples, tasks, settings."""
    plots_found = plots.draw(found)
    drawn = plots_found or {}
    curves = html.figures(None if plots_found is None else [drawn.get("curves")])
    parts = [
        html.section("Before and after", html.table(("", "before", "after"), rows(found))),
        html.section("Kept groups and allocation", html.figures([drawn.get("kept")])),
        html.section("Error of each layer", errors_section(found, drawn)),
        html.section("Curves", curves),
        html.section("Samples", html.samples(found)),
        html.section("Tasks", html.tasks(found, drawn.get("tasks"))),
        html.section("Recovery", html.definitions(facts(found))),
    ]
    footer = html.footer(found, [html.STANDARD_ERRORS if measured_with_error(found) else ""])
    title = f"{short_name(found['model'])}, recovered"
    return html.document(title, html.of_format(found["format"]), html.tiles(tiles(found)), parts, footer)


def tiles(found: dict[str, Any]) -> list[Tile]:
    """The boxes of a recovery: perplexity, parameters, memory and MACs of the model, and the speed if measured."""
    first, dense, shown = found["perplexity_before"], found.get("parameters_dense"), []
    if first and found["perplexity_after"]:
        last, teacher = found["perplexity_after"], found["perplexity_teacher"]
        detail = f"{perplexity_text(first)} → {perplexity_text(last)}"
        shown.append(Tile("perplexity", f"× {last['perplexity'] / first['perplexity']:.2f}", detail))
        if teacher:
            ratio = last["perplexity"] / teacher["perplexity"]
            shown.append(Tile("perplexity / teacher", f"{ratio:.2f}", f"teacher {perplexity_text(teacher)}"))
    count = found["parameters"]
    of_dense = f"{100 * count / dense:.1f} % of {dense:,}" if dense else ""
    shown.append(Tile("parameters", f"{count:,}", of_dense, count / dense if dense else None))
    costs = found.get("costs")
    if costs:
        words = f"with {costs['window']} tokens"
        shown.append(Tile("memory", size(costs["after"]["memory"]), words))
        shown.append(Tile("MACs", short(costs["after"]["macs"]), words))
    return shown + speed_tiles(found)
