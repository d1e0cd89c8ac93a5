"""The pictures of docs/, from the committed results.

python bench/plots.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS, DOCS = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs"
MODELS = ("stories260K", "opt-3m", "bloom-3m", "demo_model")

# Estimator -> colour, and line: one colour for each space, dashes for central differences.
STYLES = {
    "weights, spsa": ("tab:red", "--"),
    "weights, jvp": ("tab:red", "-"),
    "low-rank, spsa": ("tab:orange", "--"),
    "low-rank, jvp": ("tab:orange", "-"),
    "gates, spsa": ("tab:blue", "--"),
    "gates, jvp": ("tab:blue", "-"),
    "gates, jvp, a direction for every sequence": ("tab:green", "-"),
}

Rows = list[dict[str, Any]]


def results(name: str) -> dict[str, Any]:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def forwards(estimator: str) -> float:
    """Forward passes that one direction costs, as bench/estimate.py measured them."""
    return COSTS[estimator]


def costs() -> dict[str, float]:
    """Forward passes a direction, for each estimator of the study."""
    times = {(row["program"], row.get("per_step")): row["forwards"] for row in results("estimate")["rows"]}
    return {name: times[key] for name, key in PROGRAMS.items()}


def mean_by_directions(rows: Rows, estimator: str, value: Any) -> tuple[list[int], list[float]]:
    """Number of directions, and the mean over seeds of a value."""
    own = [row for row in rows if row["estimator"] == estimator]
    counts = sorted({row["directions"] for row in own})
    return counts, [float(np.mean([value(row) for row in own if row["directions"] == n])) for n in counts]


def both_kinds(of: dict[str, float]) -> float:
    """Heads and channels count the same."""
    return float(np.nanmean([of["head"], of["channel"]]))
