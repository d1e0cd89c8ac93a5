"""Plots of docs/ and of the README, drawn from the committed results.

    python bench/plots.py

writes docs/fidelity.svg, docs/quality.svg, docs/perplexity.svg, and docs/study-MODEL.svg and docs/recovery-MODEL.svg
for each study. The same results give the same bytes.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl  # pyright: ignore[reportMissingImports]  # an extra
import numpy as np
import recover_plots
import study_tables
import tables
from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]
from matplotlib import ticker  # pyright: ignore[reportMissingImports]
from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

RESULTS, DOCS = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs"
MODELS = tables.MODELS

# Estimator -> colour and line style: one colour for each space of directions, dashes for central differences.
STYLES = {
    "weights, spsa": ("tab:red", "--"),
    "low-rank, spsa": ("tab:orange", "--"),
    "gates, spsa": ("tab:blue", "--"),
    "gates, jvp": ("tab:blue", "-"),
    "gates, jvp, a direction for every sequence": ("tab:green", "-"),
}

Rows = list[dict[str, Any]]


def results(name: str) -> dict[str, Any]:
    """A committed result, as JSON."""
    return json.loads((RESULTS / f"{name}.json").read_text())


# Estimator of the study -> program of bench/estimate.py with the cost of a direction.
PROGRAMS = {
    "weights, spsa": "pair, weights, gaussian",
    "weights, spsa, signs": "pair, weights, rademacher",
    "low-rank, spsa": "pair, low-rank",
    "gates, spsa": "pair, gates",
    "gates, jvp": "jvp, gates, 8",
    "gates, jvp, a direction for every sequence": "jvp, gates, 8",
}


def costs() -> dict[str, float]:
    """Cost of a direction in forward passes, for each estimator of the study; 8 directions share a pass of `jvp`."""
    times = {row["program"]: row["ratio"] for row in results("estimate")["rows"] if row["kind"] == "time"}
    return {name: times[program] for name, program in PROGRAMS.items()}


def mean_by_directions(rows: Rows, estimator: str, value: Any) -> tuple[list[int], list[float]]:
    """The numbers of directions of an estimator, and for each the mean of a value over seeds."""
    rows = [row for row in rows if row["estimator"] == estimator]
    counts = sorted({row["directions"] for row in rows})
    return counts, [float(np.mean([value(row) for row in rows if row["directions"] == n])) for n in counts]


def both_kinds(correlations: dict[str, float]) -> float:
    """The mean of the rank correlations of heads and of channels."""
    return float(np.nanmean([correlations["head"], correlations["channel"]]))


def cosines(axes: Any, rows: Rows, cost: dict[str, float]) -> None:
    """Cosine with the exact gradient against forward passes."""
    for estimator, (colour, line) in STYLES.items():
        counts, values = mean_by_directions(rows, estimator, lambda row: max(row["cosine"], 1e-4))
        axes.plot([n * cost[estimator] for n in counts], values, line, color=colour, marker=".", label=estimator)
    axes.set(xscale="log", yscale="log", ylabel="cosine with ∂L")


def removals(axes: Any, study: dict[str, Any], cost: dict[str, float]) -> None:
    """Rank correlation with the true change of the loss against forward passes.

    Horizontal lines show the criteria without an estimate, and those with the exact gradient.
    """
    rows = study["estimators"]
    for estimator, (colour, line) in STYLES.items():
        key = "gate-square" if "gates" in estimator else "fms"
        counts, values = mean_by_directions(rows, estimator, lambda row, key=key: both_kinds(row[key]))
        axes.plot([n * cost[estimator] for n in counts], values, line, color=colour, marker=".", label=estimator)
    levels = {row["criterion"]: [] for row in study["plain"]}
    for row in study["plain"]:
        levels[row["criterion"]].append(both_kinds(row["removal"]))
    levels |= {"fms, exact": [both_kinds(row["fms"]) for row in rows if row["estimator"] == "weights, exact"]}
    exact = [row for row in rows if row["estimator"] == "gates, exact"]
    levels |= {f"{key}, exact": [both_kinds(row[key]) for row in exact] for key in ("gate", "gate-square")}
    for place, (name, values) in enumerate(levels.items()):
        axes.axhline(np.mean(values), color=f"C{place}", linewidth=0.8, alpha=0.7)
        axes.annotate(name, (1, np.mean(values)), xycoords=("axes fraction", "data"), fontsize=6, va="center")
    axes.set(xscale="log", ylabel="rank correlation with removal")


def steps(axes: Any, rows: Rows) -> None:
    """Error of central differences against ε."""
    for space, colour in (("weights", "tab:red"), ("low-rank", "tab:orange"), ("gates", "tab:blue")):
        epsilons = sorted({row["epsilon"] for row in rows})
        errors = [[row["error"] for row in rows if (row["space"], row["epsilon"]) == (space, e)] for e in epsilons]
        axes.plot(epsilons, [np.mean(e) for e in errors], color=colour, marker=".", label=space)
    axes.set(xscale="log", yscale="log", ylabel="relative error of spsa")


def fidelity() -> None:
    """docs/fidelity.svg: a row of plots for each model."""
    cost = costs()
    figure, grid = plt.subplots(len(MODELS), 3, figsize=(12, 3 * len(MODELS)), layout="constrained")
    for model, axes in zip(MODELS, grid, strict=True):
        study = results(f"fidelity-{model}")
        cosines(axes[0], study["estimators"], cost)
        removals(axes[1], study, cost)
        steps(axes[2], study["epsilon"])
        axes[0].set_title(model)
    for axes, label in zip(grid[-1], ("forward passes", "forward passes", "ε"), strict=True):
        axes.set_xlabel(label)
    grid[0, 0].legend(fontsize=6)
    grid[0, 2].legend(fontsize=6)
    figure.savefig(DOCS / "fidelity.svg", metadata={"Date": None})


# Recipe -> colour and line style: dashes without a refit.
QUALITY = {
    "obs + least squares, measured": ("tab:green", "-"),
    "obs + least squares": ("tab:blue", "-"),
    "wanda + least squares": ("tab:orange", "-"),
    "noise + least squares": ("tab:gray", "-"),
    "wanda": ("tab:orange", "--"),
    "flap": ("tab:purple", "--"),
    "element-1, exact": ("tab:brown", "--"),
    "fms": ("tab:red", "--"),
    "noise": ("tab:gray", "--"),
    "random": ("black", ":"),
}


def quality() -> None:
    """docs/quality.svg: for each model, perplexity against the ratio of removed groups."""
    figure, grid = plt.subplots(1, len(MODELS), figsize=(14, 4), layout="constrained")
    for model, axes in zip(MODELS, grid, strict=True):
        table = tables.quality(model)
        for recipe, (colour, line) in QUALITY.items():
            ratios = table.get(recipe, {})
            means = [mean for mean, _, _ in ratios.values()]
            axes.plot([100 * r for r in ratios], means, line, color=colour, marker=".", label=recipe)
        axes.set(yscale="log", xlabel="% of heads and channels removed", title=model)
        multiples_on(axes)
    grid[0].set_ylabel("perplexity, × dense")
    grid[-1].legend(fontsize=7, loc="upper left")
    figure.savefig(DOCS / "quality.svg", metadata={"Date": None})


def multiples_on(axes: Any) -> None:
    """Label the logarithmic axis of multiples of the dense perplexity with plain numbers."""
    axes.yaxis.set_major_locator(ticker.FixedLocator([1, 1.2, 1.5, 2, 3, 5, 10, 20, 50]))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


# Colour and line style of the recipes of a study: ours, published methods and peers, and controls.
STUDIED = {
    "ours": ("tab:blue", "-"),
    "ours+allocation=equal": ("tab:green", "-"),
    "ours+allocation=uniform": ("tab:olive", "-"),
    "ours+allocation=measured": ("tab:cyan", "-"),
    "flap": ("tab:purple", "--"),
    "wanda-sp": ("tab:orange", "--"),
    "llm-pruner": ("tab:brown", "--"),
    "mini-llm": ("tab:red", "--"),
    "torch-pruning": ("tab:pink", "--"),
    "ours+criterion=noise": ("tab:gray", ":"),
    "ours+criterion=random": ("black", ":"),
    "ours+criterion=noise+refit=none": ("tab:gray", "-."),
    "ours+criterion=random+refit=none": ("black", "-."),
    "ours+criterion=magnitude+refit=none": ("tab:olive", "-."),
}


def study(model: str, results: Path = RESULTS, docs: Path = DOCS) -> None:
    """docs/study-MODEL.svg: for each text, perplexity as a multiple of the dense model's against the parameters.

    A point is the mean over seeds. Variants of our recipe that `STUDIED` does not name are not drawn; those of other
    recipes have the style of the recipe.
    """
    found = study_tables.load(model, results)
    if found is None:
        return
    dense, texts = study_tables.dense_row(found), list(found["settings"]["texts"])
    figure, grid = plt.subplots(1, len(texts), figsize=(6 * len(texts) + 2, 4.5), layout="constrained", squeeze=False)
    for text, axes in zip(texts, grid[0], strict=True):
        for recipe in dict.fromkeys(row["recipe"] for row in found["rows"]):
            name = recipe.partition("+")[0]
            colour, line = STUDIED.get(recipe if name == "ours" else name, ("", ""))
            if not colour:
                continue
            points = [(dense["parameters"] / 1e6, 1.0)]
            for recipes in study_tables.by_target(found).values():
                if recipe in recipes:
                    rows = recipes[recipe]
                    multiple = np.mean(study_tables.perplexities(rows, text)) / dense["perplexity"][text]
                    points.append((float(np.mean([row["parameters"] for row in rows])) / 1e6, float(multiple)))
            axes.plot(*zip(*points, strict=True), line, color=colour, marker=".", label=recipe)
        axes.set(yscale="log", ylim=(0.95, study_tables.MOST), xlabel="parameters, millions", title=text)
        multiples_on(axes)
        axes.invert_xaxis()
    grid[0, 0].set_ylabel("perplexity, × dense")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.savefig(docs / f"study-{model}.svg", metadata={"Date": None})
    plt.close(figure)


# Parameters of the dense stories260K. Its results hold the parameters of the pruned models only.
DENSE_PARAMETERS = 260_032

# Recipe -> label, colour on light paper, colour on dark paper, line width.
PERPLEXITY = {
    "obs + least squares, measured": ("minillm-jax (measured allocation)", "#1a7f37", "#3fb950", 2.4),
    "obs + least squares": ("minillm-jax (default)", "#0969da", "#58a6ff", 2.4),
    "wanda": ("Wanda-sp", "#bc4c00", "#f0883e", 1.5),
    "flap": ("FLAP", "#8250df", "#bc8cff", 1.5),
    "element-1, exact": ("LLM-Pruner", "#7d4e00", "#d4a72c", 1.5),
    "fms": ("MINI-LLM", "#cf222e", "#ff7b72", 1.5),
    "random": ("random", "#6e7781", "#9198a1", 1.5),
}

# Colours of the paper, text and grid on light paper, and on dark paper.
PAPER, TEXT, GRID = ("#ffffff", "#0d1117"), ("#1f2328", "#e6edf3"), ("#d1d9e0", "#30363d")

FONTS = "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


def perplexity(dark: bool = False) -> Figure:
    """Perplexity of stories260K against the share of kept parameters: the default and published methods.

    Each point is the mean over seeds of a recipe and ratio. The labels stand at the ends of the lines.
    """
    paper, text, grid = (pair[dark] for pair in (PAPER, TEXT, GRID))
    figure = Figure(figsize=(760 / 96, 400 / 96), facecolor=paper)
    axes = figure.add_axes((0.075, 0.13, 0.6, 0.77), facecolor=paper)
    lines = sorted(((recipe, points(recipe)) for recipe in PERPLEXITY), key=lambda line: line[1][-1][1])
    heights = spread([line[-1][1] for _, line in lines], 1.22)
    for (recipe, line), height in zip(lines, heights, strict=True):
        label, *colours, width = PERPLEXITY[recipe]
        axes.plot(*zip(*line, strict=True), color=colours[dark], linewidth=width, marker="o", markersize=2 + width)
        axes.annotate(
            label, (line[-1][0] - 0.8, height), color=colours[dark], va="center", fontsize=10, annotation_clip=False
        )
    axes.set(yscale="log", xlim=(101, 55.5), ylim=(0.95, 70))
    axes.set_xlabel("parameters kept (%)", color=text)
    axes.set_title(
        "Perplexity of pruned stories260K, multiple of the dense model's", color=text, fontsize=11, loc="left"
    )
    axes.xaxis.set_major_locator(ticker.MultipleLocator(10))
    axes.yaxis.set_major_locator(ticker.FixedLocator([1, 2, 5, 10, 20, 50]))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g} ×"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.tick_params(colors=text, length=0)
    axes.grid(axis="y", color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return figure


def points(recipe: str) -> list[tuple[float, float]]:
    """For the dense stories260K and each ratio: % of parameters kept, perplexity as a multiple of the dense model's."""
    rows = [row for row in results("quality-stories260K")["rows"] if row["recipe"] == recipe]
    means = [(100.0, 1.0)]
    for ratio in sorted({row["ratio"] for row in rows}):
        of_ratio = [row for row in rows if row["ratio"] == ratio]
        kept = np.mean([100 * row["parameters"] / DENSE_PARAMETERS for row in of_ratio])
        means.append((float(kept), float(np.mean([row["perplexity"] / row["dense"] for row in of_ratio]))))
    return means


def spread(heights: list[float], factor: float) -> list[float]:
    """Ascending heights, moved apart until neighbours differ by a factor; each pair keeps its centre."""
    logarithms = np.log(heights)
    for _ in range(100):
        gaps = np.log(factor) - np.diff(logarithms)
        shift = np.maximum(gaps, 0) / 2
        logarithms[:-1] -= shift
        logarithms[1:] += shift
    return np.exp(logarithms).tolist()


def with_dark_colours(svg: str) -> str:
    """A light SVG with a style sheet that replaces each light colour by the dark one where the reader prefers dark."""
    pairs = [PAPER, TEXT, GRID, *((light, dark) for _, light, dark, _ in PERPLEXITY.values())]
    rules = [
        f'[style*="{attribute}: {light}"] {{ {attribute}: {dark} !important }}'
        for light, dark in pairs
        for attribute in ("fill", "stroke")
    ]
    sheet = "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}\n"
    return svg.replace('<style type="text/css">', f'<style type="text/css">\n{sheet}', 1)


def readme() -> None:
    """docs/perplexity.svg, the plot of the README."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        perplexity().savefig(out, format="svg", metadata={"Date": None})
    svg = re.sub(r"font-family: [^;]*;", f"font-family: {FONTS};", out.getvalue())
    (DOCS / "perplexity.svg").write_text(with_dark_colours(svg))


def main() -> None:
    """Draw all plots."""
    mpl.rcParams["svg.hashsalt"] = "minillm-jax"
    fidelity()
    quality()
    for path in sorted(RESULTS.glob("study-*.json")):
        study(path.stem.removeprefix("study-"))
    for path in sorted(RESULTS.glob("recover-*.json")):
        if not path.stem.startswith("recover-speed"):
            recover_plots.recovery(path, DOCS)
    readme()


if __name__ == "__main__":
    main()
