"""The quality study: perplexity of every recipe and criterion, with and without a refit, on real models.

    python bench/quality.py [MODEL TEXT] [--only RECIPE ...] [--output bench/results/quality-NAME.json]

With `--only`, the rows of these recipes take the place of those in the output file, and its other rows stay. Without
MODEL and TEXT, the study takes the bundled demo model and its held-out text.

Every seed draws other windows: the first 64 (`--samples`) calibrate, the next 96 (`--evaluation`) evaluate. All recipes
use the same windows. A row holds

    perplexity, dense   the perplexity of the pruned and of the dense model on the evaluation windows
    parameters          the parameters of the pruned model
    seconds             the time of scoring, budget, refit and slicing; the first row of a shape also compiles
    peak_bytes          the peak resident memory of the process since the recipe began, with the model, the text and
                        earlier compiled programs
    commit              of the code that made the row

A ratio counts groups. Unequal allocations keep at most as many parameters as the uniform budget of the same ratio.
The recipes of the package use the windows of the study instead of their own number of samples, and prune all layers,
because the models have few layers.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from environment import commit, environment, peak_bytes, restart_peak
from texts import add_arguments, load

from minillm_jax.data.batches import Batches
from minillm_jax.data.text import Tokens
from minillm_jax.data.windows import Calibration, sample
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import parameter_count
from minillm_jax.pruning.refit import can_compensate
from minillm_jax.scoring.score import score
from minillm_jax.settings import Budget, Estimation, Refit, Scoring
from minillm_jax.stages import prune_groups

# Criteria without a gradient or with an estimated gradient, and criteria with the exact gradient.
CRITERIA = ("random", "noise", "magnitude", "magnitude-l1", "wanda", "flap", "fms", "gate", "gate-square")
EXACT = ("fms", "gate", "gate-square", "vector", "element-1", "element-2", "mixed")


@dataclass(frozen=True)
class Recipe:
    """A criterion with its refit and its budget.

    Attributes:
      scoring: the criterion and its settings.
      refit: the refit and its settings.
      allocation: the allocation of the budget.
      preset: the name of this recipe in the package; None if the package has no such recipe.
    """

    scoring: Scoring
    refit: Refit
    allocation: str = "uniform"
    preset: str | None = None


def recipes(model: Model, seed: int, quick: bool) -> dict[str, Recipe]:
    """All recipes by name: each criterion without and with least squares, then FLAP and structured OBS."""
    none, squares = Refit("none"), Refit(ridge=0.01)
    scorings = {name: Scoring(name, Estimation(seed=seed), seed=seed) for name in CRITERIA}
    scorings |= {f"{name}, exact": Scoring(name, Estimation("exact", seed=seed), seed=seed) for name in EXACT}
    presets = {"fms": "mini-llm", "wanda": "wanda-sp", "element-1, exact": "llm-pruner"}
    table = {}
    for name, scoring in scorings.items():
        table[name] = Recipe(scoring, none, preset=presets.get(name))
        if not quick:
            table[f"{name} + least squares"] = Recipe(scoring, squares)
    bias = Refit("bias") if can_compensate(model.decoder.config) else none
    table["flap, global" + (" + bias" if bias.method == "bias" else "")] = Recipe(
        scorings["flap"], bias, "global", "flap"
    )
    obs = Scoring("obs")
    table["obs"] = Recipe(obs, none)
    table["obs + least squares, outputs only"] = Recipe(obs, replace(squares, inputs=0.0))
    table["obs + least squares"] = Recipe(obs, squares)
    table["obs + least squares, measured"] = Recipe(obs, squares, "measured")
    table["ours"] = Recipe(obs, Refit(), "curves", preset="ours")
    for allocation in ("uniform", "equal", "search", "measured"):
        table[f"ours, {allocation}"] = Recipe(obs, Refit(), allocation)
    return table


def measure(model: Model, tokens: Tokens, seed: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each recipe and ratio, on the windows of one seed."""
    windows = sample(tokens, arguments.samples + arguments.evaluation, arguments.length, seed)
    calibration = Calibration(Batches(windows[: arguments.samples]), tokens.source, seed)
    held_out = Batches(windows[arguments.samples :])
    dense = perplexity(model.decoder, held_out).perplexity
    for name, recipe in recipes(model, seed, arguments.quick).items():
        if arguments.only and name not in arguments.only:
            continue
        restart_peak()
        start = time.perf_counter()
        scores = score(model, calibration, recipe.scoring)
        scoring_seconds = time.perf_counter() - start
        for ratio in arguments.ratios:
            start = time.perf_counter()
            budget = Budget(ratio, allocation=recipe.allocation)
            pruned = prune_groups(model, scores, budget, recipe.refit, calibration)
            seconds = scoring_seconds + time.perf_counter() - start
            yield {
                "recipe": name,
                "preset": recipe.preset,
                "ratio": ratio,
                "seed": seed,
                "dense": dense,
                "perplexity": perplexity(pruned.decoder, held_out).perplexity,
                "parameters": parameter_count(pruned.decoder),
                "seconds": round(seconds, 3),
                "peak_bytes": peak_bytes(),
                "commit": arguments.commit,
            }


def kept_rows(output: Path | None, names: list[str]) -> list[dict[str, Any]]:
    """The rows of the output file that a study of some recipes leaves, each with its commit; none without names."""
    if not names or output is None or not output.exists():
        return []
    stored = json.loads(output.read_text())
    return [{"commit": stored["environment"]["commit"]} | row for row in stored["rows"] if row["recipe"] not in names]


def main() -> None:
    """Print a line for each row of all seeds, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--evaluation", type=int, default=96)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--quick", action="store_true", help="least squares with obs only")
    parser.add_argument("--only", nargs="+", default=[], help="recipes whose rows are measured")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokens = load(parser, arguments)
    arguments.commit = commit()
    rows = kept_rows(arguments.output, arguments.only)
    for seed in range(arguments.seeds):
        for row in measure(model, tokens, seed, arguments):
            rows.append(row)
            print(json.dumps(row), flush=True)
        if arguments.output is not None:  # after every seed, so that an interrupted run keeps the finished seeds
            settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
            settings = {key: value for key, value in settings.items() if key not in ("commit", "only")}
            settings |= {"model": model.folder.name, "text": tokens.source, "seeds": seed + 1}
            result = {"environment": environment(), "settings": settings, "rows": rows}
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
