"""Perplexity after pruning a real model, criterion by criterion, restored and not, with the controls beside them.

    python bench/criteria.py [MODEL TEXT] [--output bench/results/criteria.json]

Without a model and a text, the bundled demo model on its held-out text.

The text's documents are separated by <|endoftext|>, or are the whole file; they are joined by blank lines. For every
seed other windows are drawn: the first 64 (`--samples`) calibrate, the next 96 (`--evaluation`) evaluate, and all
criteria see the same ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from rich.console import Console
from rich.table import Table
from texts import add_arguments, load

from minillm_jax import pipeline
from minillm_jax.calibration import Calibration, Tokens, sample
from minillm_jax.estimate.settings import Estimation
from minillm_jax.loss import perplexity
from minillm_jax.model import Model
from minillm_jax.scoring import Scoring, score
from minillm_jax.shrink.restore import Restoration

# Name -> criterion, and restoration.
RECIPES = {
    "random": ("random", "none"),
    "magnitude": ("magnitude", "none"),
    "noise": ("noise", "none"),
    "fms": ("fms", "none"),
    "wanda": ("wanda", "none"),
    "noise + least squares": ("noise", "least-squares"),
    "wanda + least squares": ("wanda", "least-squares"),
    "obs + least squares": ("obs", "least-squares"),
}


def measure(model: Model, tokens: Tokens, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each criterion and ratio, all on the windows of one seed."""
    windows = sample(tokens, arguments.samples + arguments.evaluation, arguments.length, seed)
    calibration = Calibration(windows[: arguments.samples], tokens.source, seed)
    held_out = windows[arguments.samples :]
    dense = perplexity(model.decoder, held_out).perplexity
    rows = []
    for recipe, (criterion, method) in RECIPES.items():
        estimation = Estimation(directions=arguments.directions, epsilon=arguments.epsilon, seed=seed)
        scores = score(model, calibration, Scoring(criterion, estimation, seed=seed))
        for ratio in arguments.ratios:
            restoration = Restoration(method)
            pruned = pipeline.prune(model, scores, ratio, restoration=restoration, calibration=calibration)
            found = perplexity(pruned.decoder, held_out).perplexity
            row = {"criterion": recipe, "ratio": ratio, "seed": seed, "dense": dense, "perplexity": found}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> Table:
    """Mean perplexity and its ratio to the dense model's, smallest to largest over seeds."""
    table = Table(title="perplexity, and times the dense model's on the same windows")
    for heading in ("criterion", "ratio", "perplexity", "× dense", "smallest", "largest"):
        table.add_column(heading, justify="right" if heading != "criterion" else "left")
    keys = dict.fromkeys((row["criterion"], row["ratio"]) for row in rows)
    for criterion, ratio in sorted(keys, key=lambda key: key[1]):
        chosen = [row for row in rows if (row["criterion"], row["ratio"]) == (criterion, ratio)]
        times = np.array([row["perplexity"] / row["dense"] for row in chosen])
        mean = np.mean([row["perplexity"] for row in chosen])
        figures = (f"{mean:.2f}", f"{times.mean():.2f}", f"{times.min():.2f}", f"{times.max():.2f}")
        table.add_row(criterion, f"{ratio:.0%}", *figures)
    return table


def main() -> None:
    """Measure all seeds, print a line each and a summary, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--evaluation", type=int, default=96)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2])
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--epsilon", type=float, default=1e-3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokens = load(parser, arguments)
    rows = [row for seed in range(arguments.seeds) for row in measure(model, tokens, seed, arguments)]
    Console().print(summary(rows))
    if arguments.output is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        settings |= {"model": model.folder.name, "text": tokens.source}
        result = {"environment": environment(), "settings": settings, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
