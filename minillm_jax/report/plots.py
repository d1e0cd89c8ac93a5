"""Pictures of a finished job as inline SVG, made with matplotlib (the extra `report`).

Colours are stand-ins that become those of the page, so that one picture suits light and dark; text stays text. The same
figures give the same bytes.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from minillm_jax.report.summary import KIND_WORDS, MEASURE_WORDS, Figures, short, size, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins, and the CSS that takes their place.
INK, MUTED, LINE, KEPT, GONE = "#010203", "#020304", "#030405", "#040506", "#050607"
_CSS = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", KEPT: "var(--kept)", GONE: "var(--gone)"}

# Inches; a point of a picture is about a pixel of a telephone.
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
class Picture:
    """One picture: its title, what it shows in words (for those who do not see it), and an `svg` element."""

    title: str
    words: str
    svg: str


class _Drawn(NamedTuple):
    """A picture before it is written."""

    title: str
    words: str
    figure: "Figure"


def draw(figures: Figures) -> list[Picture] | None:
    """All pictures that the figures (`figures.result_json`) give; None where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]  # it takes what a style file may say
        made = [_costs(figures), _perplexity(figures), _kept(figures), _scores(figures), _losses(figures)]
        return [_picture(drawn, number) for number, drawn in enumerate(filter(None, made))]


def _costs(figures: Figures) -> _Drawn | None:
    before, after = figures["costs"]["before"], figures["costs"]["after"]
    labels = [MEASURE_WORDS[measure] for measure in before]
    write = {"parameters": short, "macs": short, "memory": size}
    words = [f"{write[m](before[m])} → {write[m](after[m])}" for m in before]
    shares = [100 * after[m] / before[m] for m in before]
    figure, axes = _bars(labels, [100.0] * len(labels), shares, words)
    axes.set_xlabel("per cent of the dense model")
    told = [f"{label} {word} ({share:.1f} %)" for label, word, share in zip(labels, words, shares, strict=True)]
    return _Drawn("Costs before and after", "; ".join(told), figure)


def _perplexity(figures: Figures) -> _Drawn | None:
    before, after = figures["perplexity_before"], figures["perplexity_after"]
    if not before or not after:
        return None
    values = [before["perplexity"], after["perplexity"]]
    figure, axes = _bars(["before", "after"], [0.0, 0.0], values, [f"{value:.3f}" for value in values])
    axes.set_xlabel("perplexity; less is better")
    return _Drawn("Perplexity before and after", f"before {values[0]:.3f}, after {values[1]:.3f}", figure)


def _bars(
    labels: Sequence[str], behind: Sequence[float], front: Sequence[float], words: Sequence[str]
) -> "tuple[Figure, Axes]":
    """Horizontal bars, with words above each."""
    figure = _figure(0.5 + _BAR * len(labels))
    axes = figure.subplots()
    places = range(len(labels))
    axes.barh(places, behind, height=0.45, color=GONE)
    axes.barh(places, front, height=0.45, color=KEPT)
    for place, label, word in zip(places, labels, words, strict=True):
        axes.text(0, place - 0.3, f"{label}: {word}", va="bottom", ha="left")
    axes.set_yticks([])
    axes.set_ylim(len(labels) - 0.65, -0.7)
    axes.spines["left"].set_visible(False)
    return figure, axes


def _kept(figures: Figures) -> _Drawn | None:
    groups = figures["groups"]

    def panel(axes: "Axes", kind: str) -> None:
        layers = range(len(groups[kind]["before"]))
        axes.bar(layers, groups[kind]["before"], color=GONE)
        axes.bar(layers, groups[kind]["after"], color=KEPT)
        axes.locator_params(axis="y", integer=True)

    told = [f"{KIND_WORDS[kind]} {span(row['after'])} of {span(row['before'])}" for kind, row in groups.items()]
    return _panels("Kept groups in every layer", "; ".join(told), {kind: KIND_WORDS[kind] for kind in groups}, panel)


def _scores(figures: Figures) -> _Drawn | None:
    """Boxes from the quartiles, whiskers from the least to the largest score."""
    scores = figures["scores"] or {}

    def panel(axes: "Axes", kind: str) -> None:
        names = ("whislo", "q1", "med", "q3", "whishi")
        boxes = [dict(zip(names, five, strict=True)) | {"fliers": []} for five in scores[kind]]
        line = {"color": KEPT}
        axes.bxp(
            boxes,
            positions=range(len(boxes)),
            widths=0.6,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": GONE, "edgecolor": KEPT},
            medianprops={"color": INK, "linewidth": 1.5},
            whiskerprops=line,
            capprops=line,
        )
        if all(five[0] > 0 for five in scores[kind]):
            _logarithmic(axes)

    words = "; ".join(f"{KIND_WORDS[kind]}: medians {_range([f[2] for f in rows])}" for kind, rows in scores.items())
    titles = {kind: f"scores of {KIND_WORDS[kind].removesuffix(' a layer')}" for kind in scores}
    return _panels("Scores in every layer before pruning", f"Least, quartiles, largest. {words}", titles, panel)


def _logarithmic(axes: "Axes") -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _losses(figures: Figures) -> _Drawn | None:
    """One line for every layer, from pale (first) to strong (last)."""
    losses = figures["losses"] or {}

    def panel(axes: "Axes", kind: str) -> None:
        for layer, pairs in enumerate(losses[kind]):
            gone = [100 * (1 - kept / pairs[0][0]) for kept, _ in pairs]
            strength = 0.25 + 0.75 * (layer + 1) / len(losses[kind])
            axes.plot(gone, [loss for _, loss in pairs], color=KEPT, alpha=strength, marker=".", linewidth=1.2)
        axes.set_ylabel("nats")

    largest = {kind: max(loss for pairs in rows for _, loss in pairs) for kind, rows in losses.items()}
    words = "; ".join(f"{KIND_WORDS[kind]}: at most {loss:.3f} nats" for kind, loss in largest.items())
    title, said = (
        "Loss against budget",
        "Change of the loss where that share of one layer goes; pale lines are early layers",
    )
    titles = {kind: KIND_WORDS[kind].removesuffix(" a layer") for kind in losses}
    return _panels(title, f"{said}. {words}", titles, panel, "per cent of a layer's groups that go")


def _panels(
    title: str, words: str, titles: Mapping[str, str], panel: Callable[["Axes", str], None], label: str = "layer"
) -> _Drawn | None:
    """One panel above the other for every kind; nothing where there is none."""
    if not titles:
        return None
    figure = _figure(0.3 + _PANEL * len(titles))
    found = figure.subplots(len(titles), sharex=True, squeeze=False)[:, 0]
    for axes, (kind, name) in zip(found, titles.items(), strict=True):
        axes.set_title(name)
        axes.grid(axis="y", linewidth=0.6)
        panel(axes, kind)
    found[-1].set_xlabel(label)
    found[-1].locator_params(axis="x", integer=True)
    return _Drawn(title, words, figure)


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _picture(drawn: _Drawn, number: int) -> Picture:
    """The `svg` element alone: no prolog, namespaces or size, and names that no other picture of the page has."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawn.figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    head, body = out.getvalue().split("<svg", 1)[1].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib says how large a picture is"
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>p{number}-", body)
    for stand_in, css in _CSS.items():
        body = body.replace(stand_in, css)
    names = f'<title id="p{number}-title">{escape(drawn.title)}</title>'
    names += f'<desc id="p{number}-words">{escape(drawn.words)}</desc>'
    svg = f'<svg {box[0]} role="img" aria-labelledby="p{number}-title p{number}-words">{names}{body.strip()}'
    return Picture(drawn.title, drawn.words, svg)
