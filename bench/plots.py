"""The pictures of docs/, from the committed results.

python bench/plots.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl  # pyright: ignore[reportMissingImports]  # an extra
import numpy as np
import tables
from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]
from matplotlib import ticker  # pyright: ignore[reportMissingImports]

RESULTS, DOCS = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs"
MODELS = tables.MODELS

# Estimator -> colour, and line: one colour for each space, dashes for central differences.
STYLES = {
    "weights, spsa": ("tab:red", "--"),
    "low-rank, spsa": ("tab:orange", "--"),
    "gates, spsa": ("tab:blue", "--"),
    "gates, jvp": ("tab:blue", "-"),
    "gates, jvp, a direction for every sequence": ("tab:green", "-"),
}

Rows = list[dict[str, Any]]


def results(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


# Estimator of the study -> program of bench/estimate.py that says what a direction costs.
PROGRAMS = {
    "weights, spsa": "pair, weights, gaussian",
    "weights, spsa, signs": "pair, weights, rademacher",
    "low-rank, spsa": "pair, low-rank",
    "gates, spsa": "pair, gates",
    "gates, jvp": "jvp, gates, 8",
    "gates, jvp, a direction for every sequence": "jvp, gates, 8",
}


def costs() -> dict[str, float]:
    """Forward passes that a direction costs, for each estimator of the study; eight share a pass of `jvp`."""
    times = {row["program"]: row["ratio"] for row in results("estimate")["rows"] if row["kind"] == "time"}
    return {name: times[program] for name, program in PROGRAMS.items()}


def mean_by_directions(rows: Rows, estimator: str, value: Any) -> tuple[list[int], list[float]]:
    """Number of directions, and the mean over seeds of a value."""
    own = [row for row in rows if row["estimator"] == estimator]
    counts = sorted({row["directions"] for row in own})
    return counts, [float(np.mean([value(row) for row in own if row["directions"] == n])) for n in counts]


def both_kinds(of: dict[str, float]) -> float:
    """Heads and channels count the same."""
    return float(np.nanmean([of["head"], of["channel"]]))


def cosines(axes: Any, rows: Rows, cost: dict[str, float]) -> None:
    """Cosine with the exact gradient against forward passes."""
    for estimator, (colour, line) in STYLES.items():
        counts, values = mean_by_directions(rows, estimator, lambda row: max(row["cosine"], 1e-4))
        axes.plot([n * cost[estimator] for n in counts], values, line, color=colour, marker=".", label=estimator)
    axes.set(xscale="log", yscale="log", ylabel="cosine with ∂L")


def removals(axes: Any, study: dict[str, Any], cost: dict[str, float]) -> None:
    """Rank correlation with the true change of the loss against forward passes; criteria without gradient as levels."""
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
    """One row of pictures a model."""
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


# Recipe -> colour, and line: dashes without refit.
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
    """One picture a model: perplexity against the share that goes."""
    figure, grid = plt.subplots(1, len(MODELS), figsize=(14, 4), layout="constrained")
    for model, axes in zip(MODELS, grid, strict=True):
        table = tables.quality(model)
        for recipe, (colour, line) in QUALITY.items():
            ratios = table.get(recipe, {})
            means = [mean for mean, _, _ in ratios.values()]
            axes.plot([100 * r for r in ratios], means, line, color=colour, marker=".", label=recipe)
        axes.set(yscale="log", xlabel="% of heads and channels removed", title=model)
        axes.yaxis.set_major_locator(ticker.FixedLocator([1, 1.2, 1.5, 2, 3, 5, 10, 20, 50]))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    grid[0].set_ylabel("perplexity, × dense")
    grid[-1].legend(fontsize=7, loc="upper left")
    figure.savefig(DOCS / "quality.svg", metadata={"Date": None})


def main() -> None:
    """Draw all of them."""
    mpl.rcParams["svg.hashsalt"] = "minillm-jax"  # the same bytes from the same results
    fidelity()
    quality()


if __name__ == "__main__":
    main()
