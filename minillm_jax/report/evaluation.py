"""A finished evaluation: perplexity on a text and accuracy on tasks, of several models side by side."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from minillm_jax.errors import InputError, cause
from minillm_jax.evaluation.perplexity import Perplexity
from minillm_jax.evaluation.tasks import GROUPS, TaskScores, TaskSettings, mean
from minillm_jax.report import page, plots, recovery
from minillm_jax.report.summary import short_name

REPORT = "report.json"


class Measured(NamedTuple):
    """What was measured of one model.

    Attributes:
      model: path or Hub id.
      perplexity: on the text; None without one.
      tasks: the metrics of the tasks; None without tasks.
    """

    model: str
    perplexity: Perplexity | None
    tasks: TaskScores | None


def result_json(found: Sequence[Measured], source: str | None, settings: TaskSettings | None) -> dict[str, Any]:
    """An evaluation as one JSON object; of one model on a text alone, the figures stand at the top.

    Args:
      found: of every model, the one that others are compared with first.
      source: the text.
      settings: of the tasks.
    """
    models = [_model_json(one, settings) for one in found]
    if settings is None:
        text = [{"model": one["model"], "text": source, **one["perplexity"]} for one in models]
        return text[0] if len(text) == 1 else {"text": source, "models": text}
    harness = next(one.tasks.harness for one in found if one.tasks is not None)
    return {"text": source, "tasks": asdict(settings), "lm_eval": harness, "models": models}


def _model_json(one: Measured, settings: TaskSettings | None) -> dict[str, Any]:
    written: dict[str, Any] = {
        "model": one.model,
        "perplexity": None if one.perplexity is None else asdict(one.perplexity),
    }
    if one.tasks is None or settings is None:
        return written
    means = {name: value for name in settings.tasks if (value := mean(one.tasks.scores, GROUPS.get(name, ())))}
    return written | {
        "scores": [score._asdict() for score in one.tasks.scores],
        "means": {name: {"value": value, "error": error} for name, (value, error) in means.items()},
        "versions": dict(one.tasks.versions),
    }


def check_report(model: str, others: Sequence[str], settings: TaskSettings | None) -> Path:
    """The folder whose report takes the figures of the tasks, before a model is read.

    Args:
      model: the model that is evaluated.
      others: the models that it is compared with, the dense one first.
      settings: of the tasks.

    Raises:
      InputError: there are no tasks, no dense model, or no report.
    """
    if settings is None or not others:
        raise InputError("--report needs --tasks, and the dense model as the first --against")
    folder = Path(model)
    if not (folder / REPORT).is_file():
        raise InputError(f"{model}: --report needs a folder that prune or recover has written, with its {REPORT}")
    try:
        json.loads((folder / REPORT).read_text(encoding="utf-8"))["base_model"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / REPORT}: not a report of prune or recover ({cause(error)})") from error
    return folder


def documents(folder: Path, found: Sequence[Measured]) -> dict[str, str]:
    """The report of a run with the tasks of its model and of the dense one, by file name.

    Args:
      folder: of the run.
      found: of its model, then of the dense model.
    """
    summary = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    after, before = ([] if one.tasks is None else one.tasks.scores for one in found[:2])
    summary["tasks"] = [
        {
            "task": one.task,
            "metric": one.metric,
            "before": other.value,
            "before_stderr": other.error,
            "after": one.value,
            "after_stderr": one.error,
        }
        for one, other in zip(after, before, strict=True)
    ]
    html = recovery.page(summary) if "points" in summary else page.page(summary, plots.draw(summary))
    return {REPORT: json.dumps(summary, indent=2) + "\n", "report.html": html}


def table(found: Sequence[Measured], source: str | None, settings: TaskSettings | None) -> Table:
    """An evaluation as a table with a column for every model; the arguments are those of `result_json`."""
    titles = [text for text in (source, None if settings is None else ", ".join(settings.tasks)) if text]
    table = Table(title=Text(" · ".join(titles)), caption=_caption(found))
    table.add_column("")
    for one in found:
        table.add_column(Text(short_name(one.model)), justify="right", overflow="fold")
    for name, *cells in rows(found, settings):
        table.add_row(Text(name), *cells)
    return table


def _caption(found: Sequence[Measured]) -> Text | None:
    version = next((one.tasks.harness for one in found if one.tasks is not None), None)
    return None if version is None else Text(f"percent ± standard error, lm-eval {version}")


def rows(found: Sequence[Measured], settings: TaskSettings | None) -> Iterator[list[str]]:
    """Name of a figure, and its text for every model."""
    if all(one.perplexity is not None for one in found):
        measured = [one.perplexity for one in found if one.perplexity is not None]
        yield ["perplexity", *(f"{one.perplexity:.3f}" for one in measured)]
        yield ["loss (nats)", *(f"{one.loss:.4f}" for one in measured)]
        yield ["predictions", *(f"{one.tokens:,}" for one in measured)]
        yield ["windows", *(f"{one.windows:,}" for one in measured)]
        yield ["window", *(f"{one.window:,}" for one in measured)]
    scored = [one.tasks for one in found if one.tasks is not None]
    if settings is None or len(scored) < len(found):
        return
    for score in scored[0].scores:
        same = [next(s for s in one.scores if s[:2] == score[:2]) for one in scored]
        yield [f"{score.task}, {score.metric}", *(_percent(one.value, one.error) for one in same)]
    for name in settings.tasks:
        means = [mean(one.scores, GROUPS.get(name, ())) for one in scored]
        if all(means):
            yield [f"mean of {name}", *(_percent(*value) for value in means if value is not None)]


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.2f}" if error is None else f"{100 * value:.2f} ± {100 * error:.2f}"
