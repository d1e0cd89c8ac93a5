"""The host's loop around the compiled estimate: chunks of directions, batches of windows, progress."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from minillm_jax.data.batches import Batch, Batches
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import window_losses
from minillm_jax.model.decoder import Decoder
from minillm_jax.scoring.gradient import rebuild, slopes, spaces
from minillm_jax.scoring.gradient.checkpoint import Checkpoint, identity
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.exact import RunGradients, gate_gradients, weight_gradients
from minillm_jax.scoring.gradient.plan import Plan, shared_plan
from minillm_jax.scoring.gradient.settings import Estimation
from minillm_jax.scoring.gradient.step import StepReport, choose_epsilon

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """What the passes over the calibration windows tell of the gradient.

    Attributes:
      settings: what it was made with; ε as it was chosen.
      projected: the projected gradient of the mean loss along every direction, as the part of it that comes from each
        sequence, float64 [P, B]; None for the exact gradient.
      step: how the finite step fared; None where there was none.
      exact: the gradient of the mean loss by weights ([L, ...], float32) or gates ([L, B, groups], by each sequence's
        own), for each run; None for an estimate.
      curvature: where it was asked for, the mean over the sequences of the square of the gradient of each one's mean
        loss, like `exact` by weights.
    """

    settings: Estimation
    projected: Float[np.ndarray, "P B"] | None = None
    step: StepReport | None = None
    exact: RunGradients | None = None
    curvature: RunGradients | None = None

    def record(self) -> dict[str, Any]:
        """What a JSON file should say of it."""
        projected = None if self.projected is None else self.projected.tolist()
        if self.projected is not None and not self.settings.per_sequence:
            projected = self.projected.sum(axis=1).tolist()
        return {
            "projected_gradients": projected,
            "step": None if self.step is None else asdict(self.step) | {"advice": self.step.advice()},
        }


def estimate(
    decoder: Decoder,
    batches: Batches,
    settings: Estimation | None = None,
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
) -> Estimate:
    """The gradient of the mean next-token loss over calibration windows, as far as the settings ask for it.

    `spsa` takes 2 · P + 1 forward passes over the windows for P directions, `jvp` P with tangents (which share the pass
    itself), `exact` one forward and one backward.

    Args:
      decoder: the model.
      batches: calibration windows.
      settings: what is asked for.
      progress: told the number of directions (of windows, for `exact`) that are done, and of all.
      checkpoint: folder to save the estimate in while it is made, and to go on from if it was interrupted.

    Raises:
      InputError: a setting is out of its range, a loss is not finite, no direction changes it, or the checkpoint is of
        another estimate.
    """
    settings = (settings or Estimation()).resolve()
    if settings.difference == "exact":
        if checkpoint is not None:
            raise InputError("the exact gradient is one pass and cannot be resumed; leave out --checkpoint")
        return _exact(decoder, batches, settings, progress)
    if settings.difference == "spsa" and settings.epsilon is None:
        settings = replace(settings, epsilon=choose_epsilon(decoder, batches, settings))
    needed = settings.difference == "spsa" or checkpoint is not None
    dense = window_losses(decoder, batches) if needed else np.zeros(0, np.float32)
    if checkpoint is None:
        found = _measure(decoder, batches, settings, progress, None)
    else:
        with Checkpoint(checkpoint, identity(settings, batches.windows, dense)) as saved:
            found = _measure(decoder, batches, settings, progress, saved)
    _check(found, settings)
    predictions = batches.predictions
    if settings.difference == "jvp":
        return Estimate(settings, found / predictions)
    slopes = (found[:, 0] - found[:, 1]) / (2 * settings.step())
    report = StepReport.of(found.sum(-1) / predictions, float(dense.sum(dtype=np.float64)) / predictions)
    return Estimate(settings, slopes / predictions, report)


def _check(found: np.ndarray, settings: Estimation) -> None:
    step = "" if settings.difference == "jvp" else f" at --epsilon {settings.step():g}"
    if not np.isfinite(found).all():
        raise InputError(f"the loss along a direction is not finite{step}; use a smaller one, or --difference jvp")
    if not (found if settings.difference == "jvp" else found[:, 0] - found[:, 1]).any():
        raise InputError(f"no direction changes the loss{step}: is the step lost in rounding? use a larger one")


def _measure(
    decoder: Decoder,
    batches: Batches,
    settings: Estimation,
    progress: Progress | None,
    checkpoint: Checkpoint | None,
) -> Float[np.ndarray, "P *sides B"]:
    """Losses at both ends of every direction, or slopes along it, of every sequence, float64."""
    chunks, found = (None, None) if checkpoint is None else checkpoint.load()
    chunks = chunks or shared_plan(decoder, batches.length, settings)
    for first in range(0 if found is None else len(found), settings.directions, chunks.per_call):
        last = min(first + chunks.per_call, settings.directions)
        part = measure_call(decoder, batches, settings, chunks, first, last)
        found = part if found is None else np.concatenate([found, part])
        if checkpoint is not None:
            checkpoint.save(chunks, found, last == settings.directions)
        if progress is not None:
            progress(last, settings.directions)
    assert found is not None, "there is at least one direction"
    return found


def measure_call(
    decoder: Decoder, batches: Batches, settings: Estimation, chunks: Plan, first: int, last: int
) -> Float[np.ndarray, "P *sides B"]:
    """As `_measure`, for directions first, ..., last - 1, in one call of the compiled program for each batch.

    The last call of an estimate is filled up with directions that are thrown away, so that all calls have one shape and
    the program is compiled once.
    """
    stacked = settings.draw(decoder, first, first + chunks.per_call).stacked(chunks.per_step)

    def program(batch: Batch) -> Array:
        return _run(decoder, _spread(stacked, batch, batches.mesh), batch, settings)

    losses = batches.resized(chunks.tokens).collect(program).astype(np.float64)
    return losses.reshape(chunks.per_call, *losses.shape[2:])[: last - first]


def _spread(directions: Directions, batch: Batch, mesh: Mesh | None) -> Directions:
    """Directions spread over the devices of `data` where the batch's windows do not divide, [chunks, P]."""
    devices = sharding.data_size(mesh)
    if mesh is None or len(batch.numbers) % devices == 0:
        return directions
    where = NamedSharding(mesh, PartitionSpec(None, *sharding.over_data(directions.factors.shape[1], mesh).spec))
    data = sharding.place(np.asarray(jax.random.key_data(directions.keys)), where)
    keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(directions.keys))
    return Directions(keys, sharding.place(np.asarray(directions.factors), where))


def _run(decoder: Decoder, directions: Directions, batch: Batch, settings: Estimation) -> Array:
    space = settings.make_space()
    if settings.difference == "jvp":
        return slopes.directional_derivatives(decoder, directions, batch.tokens, batch.numbers, space)
    epsilon = jnp.float32(settings.step())
    return slopes.paired_losses(decoder, directions, batch.tokens, batch.numbers, epsilon, space)


def _exact(decoder: Decoder, batches: Batches, settings: Estimation, progress: Progress | None) -> Estimate:
    """By weights: summed over the batches, float32. By gates: the gradient of every sequence."""
    by_gates, done = settings.space == "gates", 0
    gradients: RunGradients | None = None
    squares: RunGradients | None = None
    # The gradient of every single window is squared.
    for batch in batches.resized(1) if settings.curvature else batches:
        part = (gate_gradients if by_gates else weight_gradients)(decoder, batch.tokens)
        part = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / batches.predictions, part)
        if settings.curvature:
            squares = _add_squares(squares, part, batches.count)
        gradients = part if gradients is None else jax.tree.map(_beside if by_gates else jnp.add, gradients, part)
        done += len(batch.numbers)
        if progress is not None:
            progress(done, batches.count)
    return Estimate(settings, exact=gradients, curvature=squares)


def _add_squares(total: RunGradients | None, part: RunGradients, count: int) -> RunGradients:
    """The part of a sequence's mean loss in the mean of `count` of them, made whole, squared and averaged."""
    squares = jax.tree.map(lambda leaf: count * jnp.square(leaf), part)
    return squares if total is None else jax.tree.map(jnp.add, total, squares)


def _beside(left: Float[Array, "L B groups"], right: Float[Array, "L C groups"]) -> Float[Array, "L _ groups"]:
    return jnp.concatenate([left, right], axis=1)


def gate_slopes(decoder: Decoder, found: Estimate) -> list[dict[str, Float[Array, "L B groups"]]]:
    """Each sequence's part of ∂L/∂gate of every group, estimated or exact, for each run: kind -> [L, B, groups]."""
    if found.exact is not None:
        return found.exact
    assert found.projected is not None, "an estimate has projected gradients"
    directions = found.settings.draw(decoder, 0, len(found.projected))
    slopes, space = jnp.asarray(found.projected, jnp.float32), found.settings.make_space()
    return [
        rebuild.rebuild_gates(layers, directions, slopes, counts, space)
        for layers, counts in spaces.gate_counts(decoder)
    ]
