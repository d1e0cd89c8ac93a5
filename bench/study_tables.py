"""Tables of the studies of bench/study.py, as Markdown. `python bench/page.py` puts them into docs/quality.md."""

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path(__file__).parent / "results"
DENSE, DEFAULT = "dense", "ours"
# The recipes of our own in the table of the README: the default, and layers of equal size.
OURS = (DEFAULT, "ours+allocation=equal")
# The largest multiple of the dense perplexity in the plot of a study.
MOST = 50

Row = dict[str, Any]
Study = dict[str, Any]


def load(model: str, results: Path = RESULTS) -> Study | None:
    """The study of a model; None where there is none."""
    path = results / f"study-{model}.json"
    return json.loads(path.read_text()) if path.exists() else None


def dense_row(study: Study) -> Row:
    """The row of the dense model."""
    return next(row for row in study["rows"] if row["recipe"] == DENSE)


def by_target(study: Study) -> dict[int, dict[str, list[Row]]]:
    """Target -> recipe -> its rows, one for each seed; the largest target first, the best recipe on the texts first."""
    groups: dict[int, dict[str, list[Row]]] = {}
    for row in study["rows"]:
        if row["recipe"] != DENSE:
            groups.setdefault(row["target"], {}).setdefault(row["recipe"], []).append(row)
    first = next(iter(study["settings"]["texts"]))
    return {
        target: dict(sorted(groups[target].items(), key=lambda item: mean(perplexities(item[1], first))))
        for target in sorted(groups, reverse=True)
    }


def perplexities(rows: Iterable[Row], text: str) -> list[float]:
    """The perplexities of some rows on one text."""
    return [row["perplexity"][text] for row in rows]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def grid(corner: str, columns: Sequence[str], lines: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A table of lines by name, each with its cells by column; a missing cell is empty."""
    return table(
        [corner, *columns], [[name, *(cells.get(one, "") for one in columns)] for name, cells in lines.items()]
    )


def perplexity_table(study: Study) -> list[str]:
    """A row for the dense model, then for each target one for each recipe: parameters, perplexities, time, memory."""
    texts = list(study["settings"]["texts"])
    rows = [_cells([dense_row(study)], texts)]
    for recipes in by_target(study).values():
        rows += [_cells(of, texts) for of in recipes.values()]
    return table(["recipe", "parameters", *texts, "seconds", "CPU seconds", "peak memory"], rows)


def _cells(rows: list[Row], texts: Iterable[str]) -> list[str]:
    times = [f"{median(row[key] for row in rows):,.0f}" for key in ("seconds", "cpu_seconds")]
    peak = f"{max(row['peak_bytes'] for row in rows) / 1e6:,.0f} MB"
    parameters = f"{mean(row['parameters'] for row in rows) / 1e6:.2f}M"
    measured = [spread(perplexities(rows, text)) for text in texts]
    return [f"`{rows[0]['recipe']}`", parameters, *measured, *times, peak]


def spread(values: list[float]) -> str:
    """The mean; with several values, the smallest and the largest too."""
    average = number(mean(values))
    return average if len(values) == 1 else f"{average} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    """A perplexity: two decimals up to 100, none above."""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def better_table(study: Study, default: str = DEFAULT) -> list[str]:
    """A row for each recipe that is better than the default at some target, in perplexity, and for peers in cost too.

    Variants of the default are compared by perplexity alone.
    """
    measures: dict[str, tuple[Callable[[list[Row]], float], Callable[[float], str]]] = {
        f"perplexity, {text}": (lambda rows, text=text: mean(perplexities(rows, text)), number)
        for text in study["settings"]["texts"]
    }
    measures["CPU seconds"] = (lambda rows: median(row["cpu_seconds"] for row in rows), "{:,.0f}".format)
    measures["peak memory, MB"] = (lambda rows: max(row["peak_bytes"] for row in rows) / 1e6, "{:,.0f}".format)
    lines = []
    for target, recipes in by_target(study).items():
        if default not in recipes:
            continue
        for name, (measure, written) in measures.items():
            ours = measure(recipes[default])
            lines += [
                (f"{target / 1e6:.2f}M", name, f"`{recipe}`", written(measure(rows)), written(ours))
                for recipe, rows in recipes.items()
                if measure(rows) < ours and (written is number or recipe.partition("+")[0] != default)
            ]
    return table(["at most", "measure", "recipe", "its value", f"`{default}`"], lines) if lines else []


def peers_table(model: str, results: Path = RESULTS) -> list[str]:
    """The table of the README: dense, ours and the published methods, without controls; nothing without a study.

    A row holds all targets of a recipe: perplexities, seconds of the process and its peak memory, the largest of all.
    """
    study = load(model, results)
    if study is None:
        return []
    texts, targets, dense = list(study["settings"]["texts"]), by_target(study), dense_row(study)
    shown = [name for recipes in targets.values() for name in recipes if name in OURS or not name.startswith(DEFAULT)]
    heads = [f"{target / 1e6:.2f}M: {text}" for target in targets for text in texts]
    rows = [[f"`{DENSE}`", *[number(dense["perplexity"][text]) for _ in targets for text in texts], *_costs([dense])]]
    for name in dict.fromkeys(shown):
        found = {target: recipes.get(name, []) for target, recipes in targets.items()}
        cells = [spread(perplexities(of, text)) if of else "" for of in found.values() for text in texts]
        rows.append([f"`{name}`", *cells, *_costs([row for of in found.values() for row in of])])
    return table(["recipe", *heads, "seconds", "peak memory"], rows)


def _costs(rows: list[Row]) -> tuple[str, str]:
    """Seconds and peak memory of the processes, the largest of several."""
    seconds, peak = (max(row[key] for row in rows) for key in ("seconds", "peak_bytes"))
    return f"{seconds:,.0f}", f"{peak / 1e9:.1f} GB"


def calibration_table(study: Study) -> list[str]:
    """A row for each recipe: the calibration tokens, and those for each channel of the widest MLP."""
    rows: dict[str, Row] = {}
    for row in study["rows"]:
        rows.setdefault(row["recipe"], row)
    cells = [
        [f"`{name}`", f"{row['calibration_tokens']:,}", f"{row['tokens_per_channel']:.1f}"]
        for name, row in rows.items()
        if name != DENSE
    ]
    return table(["recipe", "calibration tokens", "for each channel"], cells)


def _exceeds(study: Study) -> bool:
    """Whether a row lies above the plot."""
    dense = dense_row(study)["perplexity"]
    return any(value > MOST * dense[text] for row in study["rows"] for text, value in row["perplexity"].items())


def section(model: str, results: Path = RESULTS) -> list[str]:
    """What docs/quality.md says of a model without its heading; nothing where it has no study."""
    study = load(model, results)
    if study is None:
        return []
    settings, seeds = study["settings"], 1 + max(row["seed"] for row in study["rows"])
    texts = " and ".join(f"{name} (`{file}`)" for name, file in settings["texts"].items())
    targets = " and ".join(f"{target:,}" for target in by_target(study))
    place = study["environment"]
    paragraph = (
        f"Every recipe keeps at most {targets} of the {dense_row(study)['parameters']:,} parameters; "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds, mean (smallest to largest)'}. Perplexity is "
        f"measured on {settings['windows']} windows of {settings['length']} tokens, evenly spaced over each text: "
        f"{texts}. The calibration text is `{settings['calibration']}`. All weights are {settings['dtype']}. Seconds "
        "(median over the seeds) and peak resident memory (highest) are those of the whole process: start of Python, "
        "compilation, loading, pruning and evaluation. CPU seconds are those of all threads; unlike the seconds they "
        "hardly depend on other work, which ran on the machine at times. The machine has "
        f"{place['cores']} cores ({place['device']}). Made by `python bench/study.py`."
    )
    lines = [
        *textwrap.wrap(paragraph, 128, break_long_words=False, break_on_hyphens=False),
        "",
        *perplexity_table(study),
        "",
        f"![perplexity of {model} against its parameters](study-{model}.svg)",
    ]
    if _exceeds(study):
        lines += ["", f"The plot ends at {MOST} times the dense perplexity; some lines leave it."]
    notes = [
        f"- `{row['recipe']}`, at most {row['target'] / 1e6:.2f}M: {row['note']}."
        for row in study["rows"]
        if "note" in row
    ]
    if notes:
        lines += ["", "Peers:", "", *notes]
    better = better_table(study)
    if better:
        lines += ["", f"Where another recipe is better than `{DEFAULT}`:", "", *better]
    return [*lines, "", "The calibration text of each recipe:", "", *calibration_table(study)]
