"""report.html of a pruning."""

from collections.abc import Mapping

from minillm_jax.report import html
from minillm_jax.report.plots import Plot
from minillm_jax.report.summary import (
    Summary,
    advice,
    errors_in_words,
    measured_with_error,
    recipe,
    rows,
    short_name,
    tiles,
    title,
)

NO_SCORES = "The criterion obs chooses the groups while it removes them, so there is no plot of scores."


def page(summary: Summary, plots: Mapping[str, Plot] | None) -> str:
    """The page of a finished job.

    Args:
      summary: the result of `summary.result_json`.
      plots: the result of `plots.draw`; None without matplotlib.
    """
    drawn = plots or {}
    kept = html.figures(None if plots is None else map(drawn.get, ("kept", "losses", "scores")))
    parts = [
        html.section("Before and after", html.table(("", "before", "after", "change"), rows(summary))),
        html.section("Kept groups and allocation", kept + _note(summary)),
        html.section("Error of each layer", errors_section(summary, drawn)),
        html.section("Samples", html.samples(summary)),
        html.section("Tasks", html.tasks(summary, drawn.get("tasks"))),
        html.section("Recipe", _recipe(summary)),
    ]
    return html.document(
        title(summary), html.of_format(summary["format"]), html.tiles(tiles(summary)), parts, _footer(summary)
    )


def errors_section(summary: Summary, drawn: Mapping[str, Plot]) -> str:
    """The error of each layer as plots with their explanation; in words alone without plots."""
    return html.paragraphs(errors_in_words(summary)) + html.figures(map(drawn.get, ("errors", "updates")))


def _note(summary: Summary) -> str:
    without_scores = summary["groups"] and summary["settings"]["scoring"]["criterion"] == "obs"
    return html.paragraphs([NO_SCORES] if without_scores else [])


def _recipe(summary: Summary) -> str:
    pairs = [("base model", short_name(summary["base_model"])), *recipe(summary)]
    return html.definitions(pairs) + html.paragraphs([f"{summary['few_tokens']}." if summary["few_tokens"] else ""])


def _footer(summary: Summary) -> str:
    """Advice on the gradient estimate, seconds of each stage, versions, and definitions."""
    lines = [
        html.STANDARD_ERRORS if measured_with_error(summary) else "",
        "MACs are the multiply-accumulates of one forward pass. Memory is that of weights, keys and values.",
        "report.json holds all numbers of this page. pruning.json lists the kept groups.",
    ]
    return html.paragraphs([advice(summary)]) + html.footer(summary, lines)
