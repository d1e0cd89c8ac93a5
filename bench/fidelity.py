"""What the estimated gradients know: compared with the exact gradient, and with what removing a group really does.

    python bench/fidelity.py [MODEL TEXT] [--output bench/results/fidelity-NAME.json]

Two checks, for every estimator against its cost:

    cosine      with the exact gradient of the same windows, in the space of the directions
    removal     Spearman's rank correlation with the true change of the loss when each group alone is removed, within
                each layer and kind (that is how groups are chosen) and averaged; of the first-order prediction
                -∂L/∂gate, and of the scores of the criteria that use the estimate

beside them the criteria that use no gradient, and the control, in which noise takes the place of ĝ. Then how ε and the
number of windows matter. Over weights `jvp` gives the figures of `spsa` to three digits and is left out. All heads are
removed, and `--channels` channels of every layer, drawn at random.
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
from minillm_jax.scoring.gradient.settings import Estimation
from minillm_jax.scoring.score import Scoring, score, scores_from

Groups = dict[str, list[np.ndarray]]  # kind -> layer -> one number for each group

WEIGHTS = Estimation("spsa", "weights", epsilon=1e-3)
ESTIMATORS = {
    "weights, spsa": WEIGHTS,
    "weights, spsa, signs": replace(WEIGHTS, distribution="rademacher"),
    "low-rank, spsa": replace(WEIGHTS, space="low-rank"),
    "gates, spsa": replace(WEIGHTS, space="gates", epsilon=1e-2),
    "gates, jvp": replace(WEIGHTS, space="gates", difference="jvp"),
    "gates, jvp, a direction for every sequence": Estimation("jvp", "gates", per_sequence=True),
}

# Of its own: the ones that use no gradient, and the control.
PLAIN = ("random", "magnitude", "wanda", "noise")


# ---------------------------------------------------------------------------------------------- what is true


def removal_changes(
    decoder: Decoder, windows: np.ndarray, channels: int, seed: int
) -> tuple[dict[str, list[np.ndarray]], Groups]:
    """The groups that are removed one by one, kind -> layer -> indices, and the change of the mean loss for each."""
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
    found = [
        np.asarray(_without(decoder, tokens, kind, jnp.int32(layer), jnp.asarray(part)), np.float64)
        for part in padded.reshape(-1, at_once)
    ]
    return (np.concatenate(found)[: len(indices)] - dense) / predictions


@jax.jit(static_argnames="kind")
def _without(decoder: Decoder, tokens: jax.Array, kind: str, layer: jax.Array, indices: jax.Array) -> jax.Array:
    """The summed loss of the windows without each of some groups; the windows are repeated for each."""
    windows, first, changes = tokens.shape[0] // len(indices), 0, []
    for run in decoder.runs:
        own = {}
        for k in axis_table.KINDS:
            count = group_counts(decoder, k)[first]
            here = (jnp.arange(first, first + depth(run)) == layer)[:, None, None] & (k == kind)
            gone = jnp.repeat(indices, windows)[None, :, None] == jnp.arange(count)[None, None, :]
            own[k] = -(here & gone).astype(jnp.float32)
        changes.append(own)
        first += depth(run)
    return gated_losses(decoder, tokens, changes).reshape(len(indices), windows).sum(axis=1)


def removal_correlation(predicted: Groups, chosen: dict[str, list[np.ndarray]], changes: Groups) -> dict[str, float]:
    """Spearman's rank correlation within a layer, averaged over layers, for each kind."""
    found = {}
    for kind in axis_table.KINDS:
        layers = zip(predicted[kind], chosen[kind], changes[kind], strict=True)
        ranks = [_spearman(p[indices], true) for p, indices, true in layers if np.ptp(p[indices]) > 0]
        found[kind] = float(np.mean(ranks)) if ranks else float("nan")
    return found


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    found: Any = spearmanr(left, right)
    return float(found.statistic)


# ------------------------------------------------------------------------------------------- what is estimated


def flat_gates(runs: RunGradients) -> np.ndarray:
    """∂L/∂gate of all groups."""
    return np.concatenate([np.asarray(run[k], np.float64).sum(1).ravel() for run in runs for k in axis_table.KINDS])


def weight_estimate(decoder: Decoder, found: Estimate, first: int, last: int) -> list[np.ndarray]:
    """The sum over directions first, ..., last - 1 of projected gradient times direction, for each matrix."""
    assert found.projected is not None
    drawn = jax.tree.map(lambda leaf: leaf[first:], found.settings.draw(decoder, 0, last))
    slopes = jnp.asarray(found.projected[first:last].sum(1), jnp.float32)
    space, start, sums = found.settings.make_space(), 0, []
    for run in decoder.runs:
        layers = jnp.arange(start, start + depth(run), dtype=jnp.int32)
        for name, kernel in kernels(run).items():
            whole = _all_layers(name, kernel.shape[1:], layers, drawn, slopes, space)
            sums.append(np.asarray(whole, np.float64) * (last - first))
        start += depth(run)
    return sums


@jax.jit(static_argnames=("name", "shape", "space"))
def _all_layers(
    name: str, shape: tuple[int, ...], layers: jax.Array, drawn: Any, slopes: jax.Array, space: Any
) -> jax.Array:
    return jax.lax.map(lambda layer: rebuild(name, shape, layer, drawn, slopes, space), layers)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Of the angle between two vectors."""
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def gate_predictions(decoder: Decoder, found: Estimate) -> Groups:
    """-∂L/∂gate of every group: the change of the loss without it, to first order."""
    runs = gate_slopes(decoder, found)
    return {k: [-np.asarray(layer).sum(0) for run in runs for layer in np.asarray(run[k])] for k in axis_table.KINDS}


def of_weights(model: Model, calibration: Calibration, found: Estimate, truth: Any, counts: list[int]) -> Iterator[Any]:
    """A row for each number of directions: cosine with the exact gradient, and what fms makes of the estimate."""
    exact, chosen, changes = truth
    assert exact["weights"].exact is not None
    names = axis_table.matrices()  # JAX sorts the keys of dictionaries, the estimate goes by this order
    true = np.concatenate(
        [np.asarray(run[name], np.float64).ravel() for run in exact["weights"].exact for name in names if name in run]
    )
    total, done = None, 0
    for count in counts:
        part = weight_estimate(model.decoder, found, done, count)
        total, done = part if total is None else [a + b for a, b in zip(total, part, strict=True)], count
        row: dict[str, Any] = {"directions": count, "cosine": cosine(np.concatenate([t.ravel() for t in total]), true)}
        assert found.projected is not None
        some = replace(found, projected=found.projected[:count])
        scores = scores_from(model, calibration, Scoring("fms", found.settings), some)
        yield row | {"fms": removal_correlation(scores.groups, chosen, changes)}


def of_gates(model: Model, calibration: Calibration, found: Estimate, truth: Any, counts: list[int]) -> Iterator[Any]:
    """A row for each number of directions: cosine, the first-order prediction, and the criteria by gates."""
    exact, chosen, changes = truth
    true = flat_gates(gate_slopes(model.decoder, exact["gates"]))
    for count in counts:
        some = found if found.projected is None else replace(found, projected=found.projected[:count])
        row: dict[str, Any] = {
            "directions": count,
            "cosine": cosine(flat_gates(gate_slopes(model.decoder, some)), true),
            "first order": removal_correlation(gate_predictions(model.decoder, some), chosen, changes),
        }
        for criterion in ("gate", "gate-square"):
            scores = scores_from(model, calibration, Scoring(criterion, found.settings), some)
            row[criterion] = removal_correlation(scores.groups, chosen, changes)
        yield row


# --------------------------------------------------------------------------------------------------- the study


def study(model: Model, tokens: Tokens, seed: int, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All rows of one seed: estimators, plain criteria, ε, number of windows."""
    windows = sample(tokens, arguments.samples, arguments.length, seed)
    calibration = Calibration(windows, tokens.source, seed)
    decoder, counts = model.decoder, sorted(arguments.counts)
    exact = {space: estimate(decoder, windows, Estimation("exact", space)) for space in ("weights", "gates")}
    chosen, changes = removal_changes(decoder, windows[: arguments.removal], arguments.channels, seed)
    truth = (exact, chosen, changes)
    rows = []
    for name, settings in ESTIMATORS.items():
        settings = replace(settings, directions=counts[-1], seed=seed)
        found = estimate(decoder, windows, settings)
        of = of_gates if settings.space == "gates" else of_weights
        for row in of(model, calibration, found, truth, counts):
            rows.append({"seed": seed, "estimator": name} | row)
            print(json.dumps(rows[-1]), flush=True)
    rows += [
        {"seed": seed, "estimator": "gates, exact"} | row
        for row in of_gates(model, calibration, exact["gates"], truth, [0])
    ]
    fms = scores_from(model, calibration, Scoring("fms", exact["weights"].settings), exact["weights"])
    rows.append(
        {
            "seed": seed,
            "estimator": "weights, exact",
            "directions": 0,
            "fms": removal_correlation(fms.groups, chosen, changes),
        }
    )
    plain = []
    for criterion in PLAIN:
        scores = score(model, calibration, Scoring(criterion, seed=seed))
        plain.append(
            {"seed": seed, "criterion": criterion} | {"removal": removal_correlation(scores.groups, chosen, changes)}
        )
        print(json.dumps(plain[-1]), flush=True)
    steps = list(epsilons(decoder, windows, seed))
    return {
        "estimators": rows,
        "plain": plain,
        "epsilon": steps,
        "windows": list(sizes(decoder, tokens, seed, arguments)),
    }


def epsilons(decoder: Decoder, windows: np.ndarray, seed: int) -> Iterator[dict[str, Any]]:
    """The relative error of the projected gradients of central differences, for every ε."""
    for space in ("weights", "low-rank", "gates"):
        settings = Estimation("jvp", space, 8, seed=seed)
        true = estimate(decoder, windows, settings).projected
        assert true is not None
        for epsilon in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5):
            found = estimate(decoder, windows, replace(settings, difference="spsa", epsilon=epsilon))
            assert found.projected is not None
            assert found.step is not None
            error = np.linalg.norm((found.projected - true).sum(1)) / np.linalg.norm(true.sum(1))
            row = {"seed": seed, "space": space, "epsilon": epsilon, "error": float(error)}
            yield row | {"first": found.step.first, "second": found.step.second, "advice": found.step.advice()}


def sizes(decoder: Decoder, tokens: Tokens, seed: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Cosine of the exact gate gradient of some windows with that of other, many windows."""
    most = arguments.windows[-1]
    windows = sample(tokens, 2 * most, arguments.length, seed)
    settings = Estimation("exact", "gates")
    reference = flat_gates(gate_slopes(decoder, estimate(decoder, windows[most:], settings)))
    for count in arguments.windows:
        found = flat_gates(gate_slopes(decoder, estimate(decoder, windows[:count], settings)))
        yield {"seed": seed, "windows": count, "cosine": cosine(found, reference)}


def main() -> None:
    """Measure all seeds, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--removal", type=int, default=8, help="windows on which groups are removed, of the samples")
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
