"""docs/recovery-MODEL.svg: perplexity during a recovery against the tokens that it has read, from bench/recover.py."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]  # an extra

Row = dict[str, Any]

COLOURS = {"distil": "tab:blue", "ce": "tab:orange", "full": "tab:green", "forward": "tab:red", "mezo": "tab:purple"}
# Measured loss of a point -> label of its panel.
PANELS = {"validation": "held-out sequences of the training text", "watched": "another kind of text"}


def curve(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """Tokens, and the mean over seeds of the perplexity as a multiple of that before the recovery."""
    losses = np.array([[point[key] - row["points"][0][key] for point in row["points"]] for row in rows])
    return [point["tokens"] for point in rows[0]["points"]], [math.exp(value) for value in losses.mean(axis=0)]


def recovery(path: Path, docs: Path) -> None:
    """The plot of one study: a row of panels for each target; nothing where no row has a curve."""
    rows = [row for row in json.loads(path.read_text())["rows"] if len(row["points"]) > 2]
    targets = sorted({row["target"] for row in rows})
    if not rows:
        return
    size = (6 * len(PANELS), 3.6 * len(targets))
    figure, grid = plt.subplots(len(targets), len(PANELS), figsize=size, layout="constrained", squeeze=False)
    for target, line in zip(targets, grid, strict=True):
        for axes, (key, label) in zip(line, PANELS.items(), strict=True):
            for method in dict.fromkeys(row["method"] for row in rows if row["target"] == target):
                chosen = [row for row in rows if (row["target"], row["method"]) == (target, method)]
                axes.plot(*curve(chosen, key), marker=".", label=method, color=COLOURS[method.partition(":")[2]])
            amount = f"{100 * target:.0f} %" if target < 1 else f"{target / 1e6:.1f}M parameters"
            axes.set(xlabel="tokens", title=f"{amount}: {label}")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("perplexity, × before the recovery")
        line[-1].legend(fontsize=8)
    figure.savefig(docs / f"{path.stem.replace('recover', 'recovery')}.svg", metadata={"Date": None})
    plt.close(figure)
