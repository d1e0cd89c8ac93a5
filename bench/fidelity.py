"""The fidelity study: estimated gradients against the exact gradient, and scores against the effect of a removal.

    python bench/fidelity.py [MODEL TEXT] [--output bench/results/fidelity-NAME.json]

Without MODEL and TEXT, the study takes the bundled demo model and its held-out text. It measures for every estimator
and number of directions

    cosine      the cosine with the exact gradient of the same windows, in the space of the directions
    removal     Spearman's rank correlation with the true change of the loss when each group alone is removed, within
                each layer and kind of group, averaged over layers: of the first-order prediction -∂L/∂gate, and of the
                scores of the criteria that use the estimate

and the removal correlation of the criteria without a gradient and of the control `noise`. Further tables give the error
of central differences by ε, and the cosine by number of windows. Over weights `jvp` equals `spsa` to three digits and
is left out. The removals cover all heads, and `--channels` random channels of every layer.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import environment
from jax import numpy as jnp
from scipy.stats import spearmanr
from texts import add_arguments, load

from minillm_jax.data.batches import Batches
from minillm_jax.data.text import Tokens
from minillm_jax.data.windows import Calibration, sample
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.modules import depth
from minillm_jax.model.tree import group_counts, kernels
from minillm_jax.scoring.criteria import CRITERIA
from minillm_jax.scoring.gradient.estimate import Estimate, estimate, gate_slopes
from minillm_jax.scoring.gradient.exact import RunGradients, gated_losses
from minillm_jax.scoring.gradient.rebuild import rebuild
from minillm_jax.scoring.gradient.settings import draw, space_of
from minillm_jax.scoring.score import Scores, score, scores_from
from minillm_jax.settings import Estimation, Scoring

Groups = dict[str, list[np.ndarray]]  # kind -> layer -> one number for each group

WEIGHTS = Estimation("spsa", "weights", epsilon=1e-3)
ESTIMATORS = {
    "weights, spsa": WEIGHTS,
    "weights, spsa, signs": replace(WEIGHTS, distribution="rademacher"),
    "low-rank, spsa": replace(WEIGHTS, space="low-rank"),
    "gates, spsa": replace(WEIGHTS, space="gates", epsilon=1e-2),
    "gates, jvp": replace(WEIGHTS, space="gates", estimator="jvp"),
    "gates, jvp, a direction for every sequence": Estimation("jvp", "gates", per_sequence=True),
}

# Criteria without a gradient, and the control.
PLAIN = ("random", "magnitude", "wanda", "noise")


# ---------------------------------------------------------------------------------------------- true changes


def removal_changes(
    decoder: Decoder, windows: np.ndarray, channels: int, seed: int
) -> tuple[dict[str, list[np.ndarray]], Groups]:
    """Kind -> layer -> indices of the groups that are removed one by one, and the change of the mean loss for each."""
    generator = np.random.default_rng(seed)
    chosen, changes = {}, {}
    for kind in axis_table.KINDS:
        counts = group_counts(decoder, kind)
        most = [n if kind == "head" else min(n, channels) for n in counts]
        chosen[kind] = [np.sort(generator.choice(n, m, replace=False)) for n, m in zip(counts, most, strict=True)]
        changes[kind] = [_removed(decoder, windows, kind, layer, indices) for layer, indices in enumerate(chosen[kind])]
    return chosen, changes


def _removed(decoder: Decoder, windows: np.ndarray, kind: str, layer: int, indices: np.ndarray) -> np.ndarray:
    predictions, at_once = windows.shape[0] * (windows.shape[1] - 1), 4
    dense = float(np.sum(np.asarray(sequence_losses(decoder, jnp.asarray(windows)), np.float64)))
    padded = np.resize(indices, -(-len(indices) // at_once) * at_once)
    tokens = jnp.asarray(np.tile(windows, (at_once, 1)))
    losses = [
        np.asarray(_without(decoder, tokens, kind, jnp.int32(layer), jnp.asarray(part)), np.float64)
        for part in padded.reshape(-1, at_once)
    ]
    return (np.concatenate(losses)[: len(indices)] - dense) / predictions


@jax.jit(static_argnames="kind")
def _without(decoder: Decoder, tokens: jax.Array, kind: str, layer: jax.Array, indices: jax.Array) -> jax.Array:
    """The summed loss of the windows without each of the groups `indices`; `tokens` repeats the windows for each."""
    windows, first, changes = tokens.shape[0] // len(indices), 0, []
    for run in decoder.runs:
        gates = {}
        for k in axis_table.KINDS:
            count = group_counts(decoder, k)[first]
            here = (jnp.arange(first, first + depth(run)) == layer)[:, None, None] & (k == kind)
            removed = jnp.repeat(indices, windows)[None, :, None] == jnp.arange(count)[None, None, :]
            gates[k] = -(here & removed).astype(jnp.float32)
        changes.append(gates)
        first += depth(run)
    return gated_losses(decoder, tokens, changes).reshape(len(indices), windows).sum(axis=1)


def removal_correlation(predicted: Groups, chosen: dict[str, list[np.ndarray]], changes: Groups) -> dict[str, float]:
    """Spearman's rank correlation within a layer, averaged over layers, for each kind."""
    correlations = {}
    for kind in axis_table.KINDS:
        layers = zip(predicted[kind], chosen[kind], changes[kind], strict=True)
        ranks = [_spearman(p[indices], true) for p, indices, true in layers if np.ptp(p[indices]) > 0]
        correlations[kind] = float(np.mean(ranks)) if ranks else float("nan")
    return correlations


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    result: Any = spearmanr(left, right)
    return float(result.statistic)


# ------------------------------------------------------------------------------------------- estimates


def flat_gates(runs: RunGradients) -> np.ndarray:
    """∂L/∂gate of all groups."""
    return np.concatenate([np.asarray(run[k], np.float64).sum(1).ravel() for run in runs for k in axis_table.KINDS])


def weight_estimate(decoder: Decoder, estimated: Estimate, first: int, last: int) -> list[np.ndarray]:
    """The sum over directions first, ..., last - 1 of projected gradient times direction, for each matrix."""
    assert estimated.projected is not None
    directions = jax.tree.map(lambda leaf: leaf[first:], draw(estimated.settings, decoder, 0, last))
    slopes = jnp.asarray(estimated.projected[first:last].sum(1), jnp.float32)
    space, start, sums = space_of(estimated.settings), 0, []
    for run in decoder.runs:
        layers = jnp.arange(start, start + depth(run), dtype=jnp.int32)
        for name, kernel in kernels(run).items():
            mean = _all_layers(name, kernel.shape[1:], layers, directions, slopes, space)
            sums.append(np.asarray(mean, np.float64) * (last - first))
        start += depth(run)
    return sums


@jax.jit(static_argnames=("name", "shape", "space"))
def _all_layers(
    name: str, shape: tuple[int, ...], layers: jax.Array, directions: Any, slopes: jax.Array, space: Any
) -> jax.Array:
    return jax.lax.map(lambda layer: rebuild(name, shape, layer, directions, slopes, space), layers)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """The cosine of the angle between two vectors."""
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def gate_predictions(decoder: Decoder, estimated: Estimate) -> Groups:
    """-∂L/∂gate of every group: the first-order change of the loss without the group."""
    runs = gate_slopes(decoder, estimated)
    return {k: [-np.asarray(layer).sum(0) for run in runs for layer in np.asarray(run[k])] for k in axis_table.KINDS}


def scores_of(model: Model, calibration: Calibration, scoring: Scoring, estimated: Estimate | None = None) -> Groups:
    """The scores of all groups, by the criterion of `scoring`."""
    if estimated is None:
        scores = score(model, calibration, scoring)
    else:
        scores = scores_from(model, calibration, scoring, estimated)
    assert isinstance(scores, Scores), "the study has no criterion that chooses groups while pruning"
    return scores.groups


def of_weights(
    model: Model, calibration: Calibration, estimated: Estimate, truth: Any, counts: list[int]
) -> Iterator[Any]:
    """A row for each number of directions: cosine with the exact gradient, removal correlation of fms."""
    exact, chosen, changes = truth
    assert exact["weights"].exact is not None
    names = axis_table.matrices()  # the order of `weight_estimate`; JAX sorts the keys of dictionaries
    true = np.concatenate(
        [np.asarray(run[name], np.float64).ravel() for run in exact["weights"].exact for name in names if name in run]
    )
    total, done = None, 0
    for count in counts:
        part = weight_estimate(model.decoder, estimated, done, count)
        total, done = part if total is None else [a + b for a, b in zip(total, part, strict=True)], count
        row: dict[str, Any] = {"directions": count, "cosine": cosine(np.concatenate([t.ravel() for t in total]), true)}
        assert estimated.projected is not None
        first_directions = replace(estimated, projected=estimated.projected[:count])
        scores = scores_of(model, calibration, Scoring("fms", estimated.settings), first_directions)
        yield row | {"fms": removal_correlation(scores, chosen, changes)}


def of_gates(
    model: Model, calibration: Calibration, estimated: Estimate, truth: Any, counts: list[int]
) -> Iterator[Any]:
    """A row for each number of directions: cosine, removal correlations of -∂L/∂gate and of the criteria by gates."""
    exact, chosen, changes = truth
    true = flat_gates(gate_slopes(model.decoder, exact["gates"]))
    for count in counts:
        first_directions = (
            estimated if estimated.projected is None else replace(estimated, projected=estimated.projected[:count])
        )
        row: dict[str, Any] = {
            "directions": count,
            "cosine": cosine(flat_gates(gate_slopes(model.decoder, first_directions)), true),
            "first order": removal_correlation(gate_predictions(model.decoder, first_directions), chosen, changes),
        }
        for criterion in ("gate", "gate-square"):
            scores = scores_of(model, calibration, Scoring(criterion, estimated.settings), first_directions)
            row[criterion] = removal_correlation(scores, chosen, changes)
        yield row


# --------------------------------------------------------------------------------------------------- study


def study(model: Model, tokens: Tokens, seed: int, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All rows of one seed, by table: estimators, criteria without a gradient, ε, number of windows."""
    windows = sample(tokens, arguments.samples, arguments.length, seed)
    batches = Batches(windows)
    calibration = Calibration(batches, tokens.source, seed)
    decoder, counts = model.decoder, sorted(arguments.counts)
    exact = {space: estimate(decoder, batches, Estimation("exact", space)) for space in ("weights", "gates")}
    chosen, changes = removal_changes(decoder, windows[: arguments.removal], arguments.channels, seed)
    truth = (exact, chosen, changes)
    rows = []
    for name, settings in ESTIMATORS.items():
        settings = replace(settings, directions=counts[-1], seed=seed)
        estimated = estimate(decoder, batches, settings)
        rows_of = of_gates if settings.space == "gates" else of_weights
        for row in rows_of(model, calibration, estimated, truth, counts):
            rows.append({"seed": seed, "estimator": name} | row)
            print(json.dumps(rows[-1]), flush=True)
    rows += [
        {"seed": seed, "estimator": "gates, exact"} | row
        for row in of_gates(model, calibration, exact["gates"], truth, [0])
    ]
    fms = scores_of(model, calibration, Scoring("fms", exact["weights"].settings), exact["weights"])
    rows.append(
        {
            "seed": seed,
            "estimator": "weights, exact",
            "directions": 0,
            "fms": removal_correlation(fms, chosen, changes),
        }
    )
    plain = []
    for criterion in PLAIN:
        scores = scores_of(model, calibration, Scoring(criterion, seed=seed))
        plain.append({"seed": seed, "criterion": criterion} | {"removal": removal_correlation(scores, chosen, changes)})
        print(json.dumps(plain[-1]), flush=True)
    steps = list(epsilons(decoder, batches, seed))
    return {
        "estimators": rows,
        "plain": plain,
        "epsilon": steps,
        "windows": list(sizes(decoder, tokens, seed, arguments)),
    }


def epsilons(decoder: Decoder, batches: Batches, seed: int) -> Iterator[dict[str, Any]]:
    """The relative error of the projected gradients by central differences, for every ε."""
    for space in ("weights", "low-rank", "gates"):
        settings = Estimation("jvp", space, 8, seed=seed)
        true = estimate(decoder, batches, settings).projected
        assert true is not None
        for epsilon in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5):
            estimated = estimate(decoder, batches, replace(settings, estimator="spsa", epsilon=epsilon))
            assert estimated.projected is not None
            assert estimated.step is not None
            error = np.linalg.norm((estimated.projected - true).sum(1)) / np.linalg.norm(true.sum(1))
            row = {"seed": seed, "space": space, "epsilon": epsilon, "error": float(error)}
            yield row | {
                "first": estimated.step.first,
                "second": estimated.step.second,
                "advice": estimated.step.advice(),
            }


def sizes(decoder: Decoder, tokens: Tokens, seed: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Cosine between the exact gate gradients of a number of windows and of many other windows."""
    most = arguments.windows[-1]
    windows = sample(tokens, 2 * most, arguments.length, seed)
    batches = Batches(windows[:most])
    settings = Estimation("exact", "gates")
    reference = flat_gates(gate_slopes(decoder, estimate(decoder, Batches(windows[most:]), settings)))
    for count in arguments.windows:
        gradient = flat_gates(gate_slopes(decoder, estimate(decoder, batches.first(count), settings)))
        yield {"seed": seed, "windows": count, "cosine": cosine(gradient, reference)}


def main() -> None:
    """Print a line for each row of all seeds, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--removal", type=int, default=8, help="number of windows on which groups are removed")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokens = load(parser, arguments)
    assert set(PLAIN) <= set(CRITERIA)
    tables: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for name, rows in study(model, tokens, seed, arguments).items():
            tables.setdefault(name, []).extend(rows)
    if arguments.output is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        settings |= {"model": model.folder.name, "text": tokens.source}
        result = {"environment": environment(), "settings": settings, **tables}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
