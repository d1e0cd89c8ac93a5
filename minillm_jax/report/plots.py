"""Plots of a finished job as inline SVG, drawn with matplotlib (the extra `report`).

Matplotlib draws placeholder colours, and `_plot` replaces them by CSS colours of the page, so that one plot suits light
and dark. Text remains text. The same summary gives the same bytes.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import cycle
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm_jax.report.summary import ERROR_KEYS, ERROR_WORDS, KIND_WORDS, Summary, printable, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colours, and the CSS colours that replace them.
INK, MUTED, LINE, KEPT, REMOVED = "#010203", "#020304", "#030405", "#040506", "#050607"
_CSS = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", KEPT: "var(--kept)", REMOVED: "var(--removed)"}

# Inches. At this width a point of text is about a pixel on the screen of a phone.
_WIDTH, _PANEL = 4.3, 1.7

_CURVES = {
    "cross_entropy": "cross entropy of the training sequences",
    "validation": "cross entropy of the validation sequences",
    "watched": "cross entropy of the second text",
}

# When the errors of a summary were measured, by their key.
_WHEN = dict(zip(ERROR_KEYS, ("", "before", "after"), strict=True))

_STYLE = {
    "svg.hashsalt": "minillm-jax",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": LINE,
    "hatch.color": LINE,
}


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
      title: the title.
      description: the plotted numbers in words, for screen readers and the caption.
      svg: an `svg` element.
    """

    title: str
    description: str
    svg: str


@dataclass(frozen=True)
class Lines:
    """Lines of several series, in one panel for each measure.

    Attributes:
      title: the title.
      description: the plotted numbers in words.
      label: of the horizontal axis.
      panels: title of a panel -> name of a series -> its points (x, y).
      logarithmic: whether the horizontal axis is logarithmic.
    """

    title: str
    description: str
    label: str
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
    logarithmic: bool = False


class Drawing(NamedTuple):
    """A plot as a figure of matplotlib, before it becomes SVG."""

    title: str
    description: str
    figure: "Figure"


def draw(summary: Summary) -> dict[str, Plot] | None:
    """The plots of a summary, by name; None if matplotlib is not installed.

    Args:
      summary: of a pruning (`summary.result_json`) or of a recovery (`recovery.summary`). A plot whose numbers it lacks
        is left out.
    """
    makers = {
        "kept": _kept,
        "losses": _losses,
        "scores": _scores,
        "errors": partial(_errors, title="Error of the residual stream", shown=("stream",)),
        "updates": partial(_errors, title="Error of the updates", shown=("attention", "mlp")),
        "tasks": _tasks,
        "curves": _curves,
    }
    return drawn(lambda: {name: make(summary) for name, make in makers.items()})


def drawn(draw: Callable[[], Mapping[str, Drawing | None]], first: str = "p") -> dict[str, Plot] | None:
    """Drawings as plots, by name; None if matplotlib is not installed.

    Args:
      draw: makes the drawings, in the style of the pages; None for a plot that is left out.
      first: the first letters of the ids in the plots, which must differ between the calls for one page.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]  # keys of a style file
        drawings = {name: drawing for name, drawing in draw().items() if drawing is not None}
        return {name: _plot(drawing, f"{first}{number}") for number, (name, drawing) in enumerate(drawings.items())}


def _curves(summary: Summary) -> Drawing | None:
    """Losses of a training run against the tokens, each in a panel of its own."""
    points = summary.get("points", ())
    shown = {key: name for key, name in _CURVES.items() if any(point.get(key) is not None for point in points)}

    def panel(axes: "Axes", key: str) -> None:
        found = [(point["tokens"], point[key]) for point in points if point.get(key) is not None]
        axes.plot(*zip(*found, strict=True), color=KEPT, marker=".", linewidth=1.2)
        axes.set_ylabel("nats")

    def description(key: str, name: str) -> str:
        values = [point[key] for point in points if point.get(key) is not None]
        return f"{name}: {values[0]:.3f} at first, {values[-1]:.3f} at last"

    text = "; ".join(description(key, name) for key, name in shown.items())
    return _panels("Losses against counted tokens", text, shown, panel, "counted tokens")


def lines(plots: Sequence[Lines]) -> list[Plot] | None:
    """Several plots of lines for one page; None if matplotlib is not installed."""
    found = drawn(lambda: {plot.title: _lines(plot) for plot in plots}, "l")
    return None if found is None else list(found.values())


def _lines(plot: Lines) -> Drawing | None:
    """Series differ in colour and dashes; a legend names them where there are several."""
    styles = [(KEPT, "-"), (INK, "--"), (MUTED, ":"), (KEPT, "-."), (INK, "-"), (MUTED, "--")]

    def panel(axes: "Axes", name: str) -> None:
        for (series, points), (colour, dashes) in zip(plot.panels[name].items(), cycle(styles), strict=False):
            axes.plot(
                *zip(*points, strict=True), color=colour, linestyle=dashes, marker=".", linewidth=1.2, label=series
            )
        if plot.logarithmic:
            logarithmic(axes, "x")

    drawing = _panels(plot.title, plot.description, {name: name for name in plot.panels}, panel, plot.label)
    if drawing is not None and len(next(iter(plot.panels.values()))) > 1:
        drawing.figure.legend(
            *drawing.figure.axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=9
        )
    return drawing


def _kept(summary: Summary) -> Drawing | None:
    """Bars of the kept share in front of bars of all groups; layers without groups have no bar."""
    groups = summary.get("groups") or {}

    def panel(axes: "Axes", kind: str) -> None:
        before, after = groups[kind]["before"], groups[kind]["after"]
        axes.bar(range(len(before)), [100 if total else 0 for total in before], color=REMOVED)
        axes.bar(range(len(before)), _shares(before, after), color=KEPT)
        axes.set_ylabel("% kept")
        axes.set_ylim(0, 100)

    def in_words(kind: str) -> str:
        before, after = groups[kind]["before"], groups[kind]["after"]
        lowest, highest = (f"{number:.0f}" for number in _ends(_shares(before, after)))
        share = lowest if lowest == highest else f"{lowest} to {highest}"
        return f"{KIND_WORDS[kind]}: {span(after)} of {span(before)}, {share} %"

    parts = "; ".join(map(in_words, groups))
    return _panels("Kept share of every layer", parts, {kind: KIND_WORDS[kind] for kind in groups}, panel)


def _shares(before: Sequence[int], after: Sequence[int]) -> list[float]:
    return [100 * left / total if total else 0.0 for total, left in zip(before, after, strict=True)]


def _errors(summary: Summary, title: str, shown: Sequence[str]) -> Drawing | None:
    """Some errors of each layer, with those before a recovery beside those after it."""
    found = {_WHEN[key]: summary[key] for key in ERROR_KEYS if summary.get(key)}
    if not found:
        return None

    def panel(axes: "Axes", what: str) -> None:
        width = 0.8 / len(found)
        for number, (when, errors) in enumerate(found.items()):
            heights = [nan if error is None else 100 * error for error in errors[what]]
            places = [layer + width * (number + 0.5) - 0.4 for layer in range(len(heights))]
            colour = KEPT if when in ("", "after") else REMOVED
            axes.bar(places, heights, width=width, color=colour, label=when)
        axes.set_ylabel("%")
        axes.set_ylim(bottom=0)

    def in_words(when: str, errors: Mapping[str, Any], what: str) -> str:
        values = [100 * error for error in errors[what] if error is not None]
        return f"{ERROR_WORDS[what]}{when and f' {when}'}: {_range(values)} %" if values else ""

    texts = [in_words(when, errors, what) for what in shown for when, errors in found.items()]
    return _panels(title, "; ".join(filter(None, texts)), {what: ERROR_WORDS[what] for what in shown}, panel)


def _tasks(summary: Summary) -> Drawing | None:
    """Every metric before and after with its standard errors, one panel for each kind of metric."""
    found = summary.get("tasks")
    if not found:
        return None
    metrics = list(dict.fromkeys(one["metric"] for one in found))
    rows = [[one for one in found if one["metric"] == metric] for metric in metrics]
    figure = figure_of(0.9 * len(rows) + 0.55 * len(found))
    column = figure.subplots(len(rows), squeeze=False, height_ratios=[1 + len(group) for group in rows])[:, 0]
    for axes, metric, group in zip(column, metrics, rows, strict=True):
        for when, colour, shift in (("before", MUTED, -0.12), ("after", KEPT, 0.12)):
            values, errors = [one[when] for one in group], [one.get(f"{when}_stderr") or 0.0 for one in group]
            places = [number + shift for number in range(len(group))]
            axes.errorbar(values, places, xerr=errors, color=colour, fmt="o", markersize=5, capsize=3, label=when)
        axes.set_title(printable(metric), parse_math=False)
        axes.set_yticks(range(len(group)), [printable(one["task"]) for one in group], parse_math=False)
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.grid(axis="x", linewidth=0.6)
    text = "The bars are standard errors; grey is before, blue is after"
    return Drawing("Tasks before and after", text, figure)


def _scores(summary: Summary) -> Drawing | None:
    """Boxes from quartile to quartile, whiskers from the smallest to the largest score."""
    scores = summary.get("scores") or {}

    def panel(axes: "Axes", kind: str) -> None:
        names = ("whislo", "q1", "med", "q3", "whishi")
        layers = [layer for layer, five in enumerate(scores[kind]) if five]
        boxes = [dict(zip(names, scores[kind][layer], strict=True)) | {"fliers": []} for layer in layers]
        line = {"color": KEPT}
        axes.bxp(
            boxes,
            positions=layers,
            widths=0.6,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": REMOVED, "edgecolor": KEPT},
            medianprops={"color": INK, "linewidth": 1.5},
            whiskerprops=line,
            capprops=line,
        )
        if all(scores[kind][layer][0] > 0 for layer in layers):
            logarithmic(axes)

    medians = [f"{KIND_WORDS[kind]}: medians {_range([f[2] for f in rows if f])}" for kind, rows in scores.items()]
    description = f"Smallest score, quartiles, largest score. {'; '.join(medians)}"
    return _panels("Scores in every layer before pruning", description, _titles(scores, "scores of "), panel)


def logarithmic(axes: "Axes", which: str = "y") -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if which == "y" else (1.0,), numticks=7))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _losses(summary: Summary) -> Drawing | None:
    """One line for every layer, from pale (first) to strong (last)."""
    losses = summary.get("losses") or {}

    def panel(axes: "Axes", kind: str) -> None:
        for layer, pairs in enumerate(losses[kind]):
            shares = [100 * (1 - kept / max(pairs[0][0], 1)) for kept, _ in pairs]
            strength = 0.25 + 0.75 * (layer + 1) / len(losses[kind])
            axes.plot(
                shares,
                [nan if loss is None else loss for _, loss in pairs],
                color=KEPT,
                alpha=strength,
                marker=".",
                linewidth=1.2,
            )
        axes.set_ylabel("nats")

    largest = {
        kind: max(loss for pairs in rows for _, loss in pairs if loss is not None) for kind, rows in losses.items()
    }
    parts = [f"{KIND_WORDS[kind]}: at most {loss:.3f} nats" for kind, loss in largest.items()]
    description = "KL from the dense model when one sublayer alone is pruned by that share; pale lines are early layers"
    label = "% of a layer's groups removed"
    return _panels("Divergence of every layer", f"{description}. {'; '.join(parts)}", _titles(losses), panel, label)


def _titles(kinds: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """The title of each kind's panel."""
    return {kind: prefix + KIND_WORDS[kind].removesuffix(" per layer") for kind in kinds}


def _panels(
    title: str, description: str, titles: Mapping[str, str], panel: Callable[["Axes", str], None], label: str = "layer"
) -> Drawing | None:
    """One panel above the other for every kind of group; None without a kind."""
    if not titles:
        return None
    figure = figure_of(0.3 + _PANEL * len(titles))
    column = figure.subplots(len(titles), sharex=True, squeeze=False)[:, 0]
    for axes, (kind, name) in zip(column, titles.items(), strict=True):
        axes.set_title(name)
        axes.grid(axis="y", linewidth=0.6)
        panel(axes, kind)
    column[-1].set_xlabel(label)
    if column[-1].get_xscale() == "linear":
        column[-1].locator_params(axis="x", integer=True)
    return Drawing(title, description, figure)


def figure_of(height: float) -> "Figure":
    """An empty figure as wide as a plot of the page.

    Args:
      height: inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _range(values: Sequence[float]) -> str:
    lowest, highest = (f"{number:.3g}" for number in _ends(values))
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _plot(drawing: Drawing, name: str) -> Plot:
    """The `svg` element without prolog, namespaces and size.

    The ids in it begin with the name of the plot, so that the ids of a page are unique.
    """
    out = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawing.figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    head, body = out.getvalue().split("<svg", 1)[1].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for placeholder, css in _CSS.items():
        body = body.replace(placeholder, css)
    names = f'<title id="{name}-title">{escape(drawing.title)}</title>'
    names += f'<desc id="{name}-description">{escape(drawing.description)}</desc>'
    svg = f'<svg {box[0]} role="img" aria-labelledby="{name}-title {name}-description">{names}{body.strip()}'
    return Plot(drawing.title, drawing.description, svg)
