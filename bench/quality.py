"""The quality study: every preset and criterion, refitted and not, on real models, before any tuning.

    python bench/quality.py [MODEL TEXT] [--output bench/results/quality-NAME.json]

Without a model and a text, the bundled demo model on its held-out text.

For every seed other windows are drawn: the first 64 (`--samples`) calibrate, the next 96 (`--evaluation`) evaluate, and
all recipes see the same ones. A row says the perplexity of the pruned model on the evaluation windows and that of the
dense one on the same windows, the parameters that are left, the seconds (scoring, budget, refit, slicing; a first
row of a shape compiles too), and the highest resident memory of the process since the recipe began (the model, the text
and what was compiled before are part of it). Ratios count groups; unequal budgets keep at most as many parameters as
the same ratio leaves uniformly. Presets take the windows of the study in the place of their own numbers of samples, and
prune all layers: models of a few layers have none to spare.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from environment import environment, peak_bytes, restart_peak
from texts import add_arguments, load

from minillm_jax import api
from minillm_jax.budget.budget import Budget
from minillm_jax.data.text import Tokens
from minillm_jax.data.windows import Calibration, sample
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import parameter_count
from minillm_jax.pruning.refit import Refit, can_compensate
from minillm_jax.scoring.gradient.settings import Estimation
from minillm_jax.scoring.score import Scoring, score

# What scores groups without a gradient, with an estimated one, and with the exact one.
CRITERIA = ("random", "noise", "magnitude", "magnitude-l1", "wanda", "flap", "fms", "gate", "gate-square")
EXACT = ("fms", "gate", "gate-square", "vector", "element-1", "element-2", "mixed")


@dataclass(frozen=True)
class Recipe:
    """A criterion with its budget, and how what stays takes over.

    Attributes:
      scoring: the criterion.
      refit: the method.
      allocation: of the budget.
      preset: the preset that it is, if it is one.
    """

    scoring: Scoring
    refit: Refit
    allocation: str = "uniform"
    preset: str | None = None


def recipes(model: Model, seed: int, quick: bool) -> dict[str, Recipe]:
    """All of them by name; criterion by criterion without and with least squares."""
    none, squares = Refit("none"), Refit()
    scorings = {name: Scoring(name, Estimation(seed=seed), seed=seed) for name in CRITERIA}
    scorings |= {f"{name}, exact": Scoring(name, Estimation("exact", seed=seed), seed=seed) for name in EXACT}
    presets = {"fms": "mini-llm", "wanda": "wanda-sp", "element-1, exact": "llm-pruner"}
    found = {}
    for name, scoring in scorings.items():
        found[name] = Recipe(scoring, none, preset=presets.get(name))
        if not quick:
            found[f"{name} + least squares"] = Recipe(scoring, squares)
    bias = Refit("bias") if can_compensate(model.decoder.config) else none
    found["flap, global" + (" + bias" if bias.method == "bias" else "")] = Recipe(
        scorings["flap"], bias, "global", "flap"
    )
    obs = Scoring("obs")
    found["obs"] = Recipe(obs, none)
    found["obs + least squares, outputs only"] = Recipe(obs, replace(squares, inner=0.0))
    found["obs + least squares"] = Recipe(obs, squares, preset="ours")
    found["obs + least squares, measured"] = Recipe(obs, squares, "measured")
    return found


def measure(model: Model, tokens: Tokens, seed: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each recipe and ratio, all on the windows of one seed."""
    windows = sample(tokens, arguments.samples + arguments.evaluation, arguments.length, seed)
    calibration = Calibration(windows[: arguments.samples], tokens.source, seed)
    held_out = windows[arguments.samples :]
    dense = perplexity(model.decoder, held_out).perplexity
    for name, recipe in recipes(model, seed, arguments.quick).items():
        restart_peak()
        start = time.perf_counter()
        scores = score(model, calibration, recipe.scoring)
        scored = time.perf_counter() - start
        for ratio in arguments.ratios:
            start = time.perf_counter()
            budget = Budget(ratio, allocation=recipe.allocation)
            pruned = api.prune(model, scores, budget, recipe.refit, calibration)
            taken = scored + time.perf_counter() - start
            found = perplexity(pruned.decoder, held_out).perplexity
            yield {
                "recipe": name,
                "preset": recipe.preset,
                "ratio": ratio,
                "seed": seed,
                "dense": dense,
                "perplexity": found,
                "parameters": parameter_count(pruned.decoder),
                "seconds": round(taken, 3),
                "peak_bytes": peak_bytes(),
            }


def main() -> None:
    """Measure all seeds, print a line for each row, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--evaluation", type=int, default=96)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--quick", action="store_true", help="least squares with obs only")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokens = load(parser, arguments)
    rows = []
    for seed in range(arguments.seeds):
        for row in measure(model, tokens, seed, arguments):
            rows.append(row)
            print(json.dumps(row), flush=True)
        if arguments.output is not None:  # after every seed: an interrupted run keeps the whole ones
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
            settings |= {"model": model.folder.name, "text": tokens.source, "seeds": seed + 1}
            result = {"environment": environment(), "settings": settings, "rows": rows}
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
