"""Plots of a finished job as inline SVG, drawn with matplotlib (the extra `report`).

Matplotlib draws placeholder colours, and `_plot` replaces them by CSS colours of the page, so that one plot suits light
and dark. Text remains text. The same summary gives the same bytes.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from minillm_jax.report.summary import KIND_WORDS, MEASURE_WORDS, Summary, short, size, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colours, and the CSS colours that replace them.
INK, MUTED, LINE, KEPT, REMOVED = "#010203", "#020304", "#030405", "#040506", "#050607"
_CSS = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", KEPT: "var(--kept)", REMOVED: "var(--removed)"}

# Inches. At this width a point of text is about a pixel on the screen of a phone.
_WIDTH, _PANEL, _BAR = 4.3, 1.7, 0.7

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


class _Drawing(NamedTuple):
    """A plot as a figure of matplotlib, before it becomes SVG."""

    title: str
    description: str
    figure: "Figure"


def draw(summary: Summary) -> list[Plot] | None:
    """The plots of a summary (`summary.result_json`); None if matplotlib is not installed."""
    return _drawn(lambda: [_costs(summary), _perplexity(summary), _kept(summary), _scores(summary), _losses(summary)])


def _drawn(draw: "Callable[[], list[_Drawing | None]]") -> list[Plot] | None:
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]  # keys of a style file
        return [_plot(drawing, number) for number, drawing in enumerate(filter(None, draw()))]


def curves(points: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Plot] | None:
    """Losses of a training run against the tokens, each in a panel of its own; None if matplotlib is not installed.

    Args:
      points: the validations, with `tokens` and the losses, of which some may be None.
      names: key of a loss -> its name in words.
    """
    shown = {key: name for key, name in names.items() if any(point[key] is not None for point in points)}

    def panel(axes: "Axes", key: str) -> None:
        found = [(point["tokens"], point[key]) for point in points if point[key] is not None]
        axes.plot(*zip(*found, strict=True), color=KEPT, marker=".", linewidth=1.2)
        axes.set_ylabel("nats")

    def description(key: str, name: str) -> str:
        values = [point[key] for point in points if point[key] is not None]
        return f"{name}: {values[0]:.3f} at first, {values[-1]:.3f} at last"

    text = "; ".join(description(key, name) for key, name in shown.items())
    return _drawn(lambda: [_panels("Losses against counted tokens", text, shown, panel, "counted tokens")])


def lines(plots: Sequence[Lines]) -> list[Plot] | None:
    """Several plots of lines for one page; None if matplotlib is not installed."""
    return _drawn(lambda: [_lines(plot) for plot in plots])


def _lines(plot: Lines) -> _Drawing | None:
    """Series differ in colour and dashes; a legend names them where there are several."""
    styles = [(KEPT, "-"), (INK, "--"), (MUTED, ":"), (KEPT, "-."), (INK, "-"), (MUTED, "--")]

    def panel(axes: "Axes", name: str) -> None:
        for (series, points), (colour, dashes) in zip(plot.panels[name].items(), cycle(styles), strict=False):
            axes.plot(
                *zip(*points, strict=True), color=colour, linestyle=dashes, marker=".", linewidth=1.2, label=series
            )
        if plot.logarithmic:
            _logarithmic(axes, "x")

    drawing = _panels(plot.title, plot.description, {name: name for name in plot.panels}, panel, plot.label)
    if drawing is not None and len(next(iter(plot.panels.values()))) > 1:
        drawing.figure.legend(
            *drawing.figure.axes[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=9
        )
    return drawing


def _costs(summary: Summary) -> _Drawing:
    before, after = summary["costs"]["before"], summary["costs"]["after"]
    labels = [MEASURE_WORDS[measure] for measure in before]
    write = {"parameters": short, "macs": short, "memory": size}
    changes = [f"{write[m](before[m])} → {write[m](after[m])}" for m in before]
    shares = [100 * after[m] / before[m] for m in before]
    figure, axes = _bars(labels, [100.0] * len(labels), shares, changes)
    axes.set_xlabel("% of the dense model")
    parts = [f"{label} {change} ({share:.1f} %)" for label, change, share in zip(labels, changes, shares, strict=True)]
    return _Drawing("Costs before and after", "; ".join(parts), figure)


def _perplexity(summary: Summary) -> _Drawing | None:
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    if not before or not after:
        return None
    values = [before["perplexity"], after["perplexity"]]
    figure, axes = _bars(["before", "after"], [0.0, 0.0], values, [f"{value:.3f}" for value in values])
    axes.set_xlabel("perplexity (lower is better)")
    return _Drawing("Perplexity before and after", f"before {values[0]:.3f}, after {values[1]:.3f}", figure)


def _bars(
    labels: Sequence[str], behind: Sequence[float], front: Sequence[float], texts: Sequence[str]
) -> "tuple[Figure, Axes]":
    """Horizontal bars, with a label and a text above each."""
    figure = _figure(0.5 + _BAR * len(labels))
    axes = figure.subplots()
    places = range(len(labels))
    axes.barh(places, behind, height=0.45, color=REMOVED)
    axes.barh(places, front, height=0.45, color=KEPT)
    for place, label, text in zip(places, labels, texts, strict=True):
        axes.text(0, place - 0.3, f"{label}: {text}", va="bottom", ha="left")
    axes.set_yticks([])
    axes.set_ylim(len(labels) - 0.65, -0.7)
    axes.spines["left"].set_visible(False)
    return figure, axes


def _kept(summary: Summary) -> _Drawing | None:
    groups = summary["groups"]

    def panel(axes: "Axes", kind: str) -> None:
        layers = range(len(groups[kind]["before"]))
        axes.bar(layers, groups[kind]["before"], color=REMOVED)
        axes.bar(layers, groups[kind]["after"], color=KEPT)
        axes.locator_params(axis="y", integer=True)

    parts = [f"{KIND_WORDS[kind]}: {span(row['after'])} of {span(row['before'])}" for kind, row in groups.items()]
    return _panels("Kept groups in every layer", "; ".join(parts), {kind: KIND_WORDS[kind] for kind in groups}, panel)


def _scores(summary: Summary) -> _Drawing | None:
    """Boxes from quartile to quartile, whiskers from the smallest to the largest score."""
    scores = summary["scores"] or {}

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
            _logarithmic(axes)

    medians = [f"{KIND_WORDS[kind]}: medians {_range([f[2] for f in rows if f])}" for kind, rows in scores.items()]
    description = f"Smallest score, quartiles, largest score. {'; '.join(medians)}"
    return _panels("Scores in every layer before pruning", description, _titles(scores, "scores of "), panel)


def _logarithmic(axes: "Axes", which: str = "y") -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if which == "y" else (1.0,), numticks=7))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _losses(summary: Summary) -> _Drawing | None:
    """One line for every layer, from pale (first) to strong (last)."""
    losses = summary["losses"] or {}

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
) -> _Drawing | None:
    """One panel above the other for every kind of group; None without a kind."""
    if not titles:
        return None
    figure = _figure(0.3 + _PANEL * len(titles))
    column = figure.subplots(len(titles), sharex=True, squeeze=False)[:, 0]
    for axes, (kind, name) in zip(column, titles.items(), strict=True):
        axes.set_title(name)
        axes.grid(axis="y", linewidth=0.6)
        panel(axes, kind)
    column[-1].set_xlabel(label)
    if column[-1].get_xscale() == "linear":
        column[-1].locator_params(axis="x", integer=True)
    return _Drawing(title, description, figure)


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _plot(drawing: _Drawing, number: int) -> Plot:
    """The `svg` element without prolog, namespaces and size.

    The ids in it begin with the number of the plot, so that the ids of a page are unique.
    """
    out = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawing.figure.savefig(out, format="svg", transparent=True, metadata=no_metadata)
    head, body = out.getvalue().split("<svg", 1)[1].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib writes a viewBox"
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>p{number}-", body)
    for placeholder, css in _CSS.items():
        body = body.replace(placeholder, css)
    names = f'<title id="p{number}-title">{escape(drawing.title)}</title>'
    names += f'<desc id="p{number}-description">{escape(drawing.description)}</desc>'
    svg = f'<svg {box[0]} role="img" aria-labelledby="p{number}-title p{number}-description">{names}{body.strip()}'
    return Plot(drawing.title, drawing.description, svg)
