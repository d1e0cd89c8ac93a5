"""One page about several runs: tables that sort without a script, and plots of size against quality."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from minillm_jax.report import html, plots
from minillm_jax.report.runs import Group, Run
from minillm_jax.report.style import NARROW
from minillm_jax.report.summary import short_name, size, with_error


class _Column(NamedTuple):
    """A column of the table, by which the rows can be sorted.

    Attributes:
      name: the heading.
      key: sorts; None sorts last.
      cell: the text.
    """

    name: str
    key: Callable[[Run], Any]
    cell: Callable[[Run], str]


_NONE = "–"


def _written(write: Callable[[Any], str], value: Any) -> str:
    return _NONE if value is None else write(value)


COLUMNS = {
    "name": _Column("run", lambda run: run.name.lower(), lambda run: run.name),
    "parameters": _Column("parameters", lambda run: run.parameters, lambda run: f"{run.parameters:,}"),
    "memory": _Column("memory", lambda run: run.memory, lambda run: _written(size, run.memory)),
    "perplexity": _Column(
        "perplexity",
        lambda run: run.perplexity,
        lambda run: _written(lambda x: with_error(x, run.stderr), run.perplexity),
    ),
    "ratio": _Column("perplexity / dense", lambda run: run.ratio, lambda run: _written("{:.3f}".format, run.ratio)),
    "seconds": _Column("seconds", lambda run: run.seconds, lambda run: _written("{:,.1f}".format, run.seconds)),
}

_SORTED = "".join(
    f".runs:has(.by-{key}:checked) tbody tr {{ order: var(--{key}); }}\n"
    f".runs:has(.by-{key}:checked):has(.down:checked) tbody tr {{ order: var(--{key}-down); }}\n"
    f".runs:has(.by-{key}:checked) .c-{key} {{ font-weight: 600; color: var(--ink); }}\n"
    for key in COLUMNS
)

_CSS = f"""
.sort {{ border: 0; margin: .75rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }}
.sort legend {{ float: left; margin-right: 1rem; padding: 0; color: var(--muted); }}
.sort label {{ white-space: nowrap; }}
.sort input {{ accent-color: var(--kept); margin: 0 .35rem 0 0; }}
.sorted, .sorted thead {{ display: block; }}
.sorted tbody {{ display: flex; flex-direction: column; }}
.sorted tr {{ display: grid; min-width: 54rem; grid-template-columns:
  2.5rem minmax(9rem, 2fr) 6rem minmax(7rem, 1fr) 6rem minmax(9rem, 1.2fr) minmax(10.5rem, 1fr) 6rem; }}
.sorted tr > :nth-child(-n+3) {{ text-align: left; padding-left: 0; }}
.sorted tbody th {{ white-space: normal; font-weight: 400; overflow-wrap: anywhere; }}
{_SORTED}
@media (max-width: {NARROW}) {{ .sorted thead {{ display: none; }}
  .sorted tbody {{ gap: .5rem; }}
  .sorted tr {{ min-width: 0; grid-template-columns: minmax(0, 1fr); border: 1px solid var(--line);
    border-radius: .5rem; background: var(--box); padding: .4rem .75rem; }}
  .sorted tr > * {{ border: 0; padding: .1rem 0; display: flex; justify-content: space-between; gap: 1rem;
    font-size: .875rem; overflow-wrap: anywhere; }}
  .sorted tr > ::before {{ content: attr(data-label); color: var(--muted); font-weight: 400; white-space: nowrap; }} }}
"""

# Kind of a run -> its mark in the plots, for matplotlib and in words.
_MARKS = {
    "dense": ("o", "ring dense"),
    "pruned": ("o", "disc pruned"),
    "recovered": ("D", "diamond recovered"),
    "compared": ("s", "square compared"),
}

_EXPLAINED = (
    "A number in a plot is the number of a run in the table; 0 is the dense model. Perplexity / dense is the "
    "perplexity over that of the dense model on the same windows."
)
_APART = (
    "The runs are in {} groups, because perplexities on different texts, windows or base models cannot be compared."
)


def page(groups: Sequence[Group]) -> str:
    """The page of some groups of runs."""
    numbers, total = count(1), sum(run.kind != "dense" for group in groups for run in group.runs)
    parts = []
    for place, (group, heading) in enumerate(zip(groups, headings(groups), strict=True)):
        numbered = [(0 if run.kind == "dense" else next(numbers), run) for run in group.runs]
        body = f"{_facts(group)}{_sorting(place, group)}{_table(numbered)}{_plots(place, numbered)}"
        parts.append(f'<section class="runs">{html.section(heading, body)}</section>')
    errors = any(run.stderr is not None for group in groups for run in group.runs)
    words = [_EXPLAINED, html.STANDARD_ERRORS if errors else "", "Memory is that of weights, keys and values."]
    apart = html.paragraphs([_APART.format(len(groups)) if len(groups) > 1 else ""])
    subtitle = "Perplexity, size and time of each run, measured by minillm-jax."
    return html.document(
        f"{total} runs" if total > 1 else "1 run", subtitle, apart, parts, html.paragraphs(words), _CSS
    )


def headings(groups: Sequence[Group]) -> list[str]:
    """The heading of each group: base model, text and window; equal ones are numbered."""
    found = [_heading(group.runs[-1]) for group in groups]
    seen = [found[: place + 1].count(heading) for place, heading in enumerate(found)]
    return [f"{heading} ({n})" if found.count(heading) > 1 else heading for heading, n in zip(found, seen, strict=True)]


def _heading(run: Run) -> str:
    name = short_name(run.base_model)
    if run.perplexity is None:
        return f"{name}, no perplexity measured"
    return f"{name} on {short_name(run.text)}, windows of {run.window} tokens"


def _facts(group: Group) -> str:
    """The dense model of a group, in words."""
    dense = next((run for run in group.runs if run.kind == "dense"), None)
    if dense is None:
        return html.paragraphs(["The reports do not hold the size of the dense model."])
    measured = "" if dense.perplexity is None else f", perplexity {dense.perplexity:.3f}"
    return f'<p class="muted">Dense model: {html.text(f"{dense.parameters:,} parameters{measured}")}.</p>'


def _sorting(place: int, group: Group) -> str:
    """The choices of the order, as radio buttons that the style sheet reads."""
    chosen = "ratio" if any(run.ratio is not None for run in group.runs) else "name"
    each = "".join(
        f'<label><input type="radio" name="sort{place}" class="by-{key}"{" checked" if key == chosen else ""}>'
        f"{html.text(column.name)}</label>"
        for key, column in COLUMNS.items()
    )
    down = '<label><input type="checkbox" class="down">largest first</label>'
    return f'<fieldset class="sort"><legend>Sort by</legend>{each}{down}</fieldset>'


def _table(numbered: Sequence[tuple[int, Run]]) -> str:
    """The table, whose rows the style sheet orders by the custom properties of each row."""
    runs = [run for _, run in numbered]
    places = {key: _places([column.key(run) for run in runs]) for key, column in COLUMNS.items()}
    rows = ""
    for row, (number, run) in enumerate(numbered):
        style = "".join(
            f"--{key}:{up[row]};--{key}-down:{down[row]};" for key, (up, down) in places.items()
        )  # integers alone
        rows += f'<tr role="row" style="{style}">{_cells(number, run)}</tr>\n'
    names = [("", "no."), ("name", COLUMNS["name"].name), ("", "model")]
    names += [(key, column.name) for key, column in COLUMNS.items() if key != "name"]
    head = "".join(f'<th role="columnheader" scope="col"{_class(key)}>{html.text(name)}</th>' for key, name in names)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table of the runs">'
        f'<table class="sorted" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{rows}</tbody></table></div>'
    )


def _cells(number: int, run: Run) -> str:
    name, *others = COLUMNS.items()

    def cell(label: str, value: object, key: str = "") -> str:
        return f'<td role="cell" data-label="{html.text(label)}"{_class(key)}>{html.text(value)}</td>'

    heading = f'<th role="rowheader" scope="row" data-label="run"{_class("name")}>{html.text(name[1].cell(run))}</th>'
    return (
        cell("no.", number)
        + heading
        + cell("model", run.kind)
        + "".join(cell(column.name, column.cell(run), key) for key, column in others)
    )


def _class(key: str) -> str:
    return f' class="c-{key}"' if key else ""


def _places(keys: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The place of every row in ascending and in descending order; rows without a value come last in both."""

    def ranked(down: bool) -> list[int]:
        known = sorted((row for row, key in enumerate(keys) if key is not None), key=keys.__getitem__, reverse=down)
        order = [*known, *(row for row, key in enumerate(keys) if key is None)]
        return [order.index(row) for row in range(len(keys))]

    return ranked(False), ranked(True)


# -------------------------------------------------------------------------------------------------------------- plots


def _plots(place: int, numbered: Sequence[tuple[int, Run]]) -> str:
    """Plots of the ratio of perplexity against parameters and memory; nothing where no ratio is known."""
    shown = [(number, run) for number, run in numbered if run.ratio is not None]
    if not any(run.kind != "dense" for _, run in shown):
        return ""
    windows = {run.memory_window for _, run in shown if run.memory is not None}
    sizes: dict[str, Callable[[Run], int | None]] = {"parameters": lambda run: run.parameters}
    if len(windows) == 1:  # keys and values of different windows are not comparable
        sizes[f"memory with {windows.pop()} tokens"] = lambda run: run.memory
    drawn = plots.drawn(
        lambda: {name: _scatter(name, [(n, run, of(run)) for n, run in shown]) for name, of in sizes.items()},
        f"g{place}p",
    )
    return html.figures(None if drawn is None else drawn.values())


def _scatter(name: str, found: Sequence[tuple[int, Run, int | None]]) -> plots.Drawing | None:
    """One numbered point a run."""
    points = [(n, run.kind, x, run.ratio) for n, run, x in found if x is not None and run.ratio is not None]
    if not points:
        return None
    from matplotlib.ticker import EngFormatter

    figure = plots.figure_of(3.2)
    axes = figure.subplots()
    for number, kind, x, ratio in points:
        face = "none" if kind == "dense" else plots.KEPT
        axes.plot([x], [ratio], _MARKS[kind][0], markersize=6, markerfacecolor=face, markeredgecolor=plots.KEPT)
        axes.annotate(str(number), (x, ratio), (6, 4), textcoords="offset points")
    axes.xaxis.set_major_formatter(EngFormatter("B" if name.startswith("memory") else ""))
    axes.locator_params(axis="x", nbins=4)
    axes.margins(0.12)
    axes.grid(linewidth=0.6)
    axes.set_xlabel(name)
    axes.set_ylabel("perplexity / dense")
    ratios = [ratio for *_, ratio in points]
    if max(ratios) > 4 * min(ratios):
        plots.logarithmic(axes)
    marks = [mark for kind, (_, mark) in _MARKS.items() if any(kind == one for _, one, *_ in points)]
    words = f"Perplexity / dense {min(ratios):.3f} to {max(ratios):.3f}. Marks: {', '.join(marks)}"
    return plots.Drawing(f"Quality against {name.split(' ')[0]}", words, figure)


# -------------------------------------------------------------------------------------------------- the command line


def as_json(groups: Sequence[Group], output: str) -> dict[str, Any]:
    """The runs by group, with the ratio of perplexity, and the page that was written."""
    shown = [
        {"heading": heading, "runs": [asdict(run) | {"ratio": run.ratio} for run in group.runs]}
        for heading, group in zip(headings(groups), groups, strict=True)
    ]
    return {"output": output, "groups": shown}


def table(groups: Sequence[Group], output: str) -> Table:
    """The runs as tables, one below the other for each group."""
    whole = Table.grid()
    for group, heading in zip(groups, headings(groups), strict=True):
        shown = Table(title=Text(heading))
        for key, column in COLUMNS.items():
            shown.add_column(column.name, justify="left" if key == "name" else "right", overflow="fold")
        for run in group.runs:
            shown.add_row(*(Text(column.cell(run)) for column in COLUMNS.values()))
        whole.add_row(shown)
    whole.add_row(Text(f"written to {output}"))
    return whole
