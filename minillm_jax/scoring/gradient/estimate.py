"""Gradient estimates: the loop over directions and batches on the host, with progress and checkpoints."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import losses_of_windows
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.streamed import check_in_memory
from minillm_jax.scoring.gradient import passes, rebuild, spaces
from minillm_jax.scoring.gradient.checkpoint import SAVE_EVERY, Checkpoint, Stored, identity
from minillm_jax.scoring.gradient.exact import RunGradients, add_weight_gradients, gate_gradients, no_gradients
from minillm_jax.scoring.gradient.plan import Plan, shared_plan
from minillm_jax.scoring.gradient.settings import draw, resolve, space_of, step_of
from minillm_jax.scoring.gradient.step import StepReport, choose_epsilon
from minillm_jax.settings import Estimation

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """The gradient of the mean loss over calibration windows: an estimate along directions, or the exact gradient.

    Attributes:
      settings: settings of the estimate, with the chosen ε.
      projected: the share of each window in the projected gradient of the mean loss along each direction, float64
        [P, B]; None for the exact gradient.
      step: the report on the finite step; None for `jvp` and `exact`.
      exact: for each run, the exact gradient of the mean loss by the weights ([L, ...], float32), or the share of each
        window in the gradient by the gates ([L, B, groups], float32); None for an estimate along directions.
      curvature: for each run, the mean over the windows of the squared gradient of each window's mean loss, in the
        shapes of `exact` by weights; None without `Estimation.curvature`.
    """

    settings: Estimation
    projected: Float[np.ndarray, "P B"] | None = None
    step: StepReport | None = None
    exact: RunGradients | None = None
    curvature: RunGradients | None = None

    def record(self) -> dict[str, Any]:
        """The projected gradients and the report on the step, for JSON.

        The projected gradients are summed over the windows where all windows share a direction.
        """
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
    plan: Plan | None = None,
    save_every: float = SAVE_EVERY,
) -> Estimate:
    """The gradient of the mean next-token loss over calibration windows.

    For P directions, `spsa` runs 2 · P + 1 forward passes over the windows. `jvp` runs P forward passes with tangents,
    where the directions of one step share the pass itself. `exact` runs one forward and one backward pass.

    Args:
      decoder: the model.
      batches: calibration windows.
      settings: settings of the estimate.
      progress: called with the number of directions done (for `exact`: windows), and of all.
      checkpoint: folder where the estimate saves its measurements, and from which an interrupted estimate continues.
      plan: number of directions and tokens in a call; by memory and work if None. The plan of a checkpoint overrides
        it.
      save_every: least time between two saved checkpoints, seconds.

    Raises:
      InputError: a setting is out of its range, a loss is not finite, no direction changes the loss, or the checkpoint
        holds another estimate.
    """
    settings = resolve(settings or Estimation())
    if settings.estimator == "exact":
        if checkpoint is not None:
            raise InputError("the exact gradient is one pass and cannot be resumed; leave out --checkpoint")
        check_in_memory(decoder, "the exact gradient")
        return _exact(decoder, batches, settings, progress)
    if checkpoint is None:
        settings = _with_step(decoder, batches, settings, None)
        measured = _measure(decoder, batches, settings, plan, progress, None, None)
    else:
        with Checkpoint(checkpoint, identity(settings, batches, decoder), save_every) as opened:
            stored = opened.load()
            settings = _with_step(decoder, batches, settings, stored)
            measured = _measure(decoder, batches, settings, plan, progress, opened, stored)
    _check(measured, settings)
    predictions = batches.predictions
    if settings.estimator == "jvp":
        return Estimate(settings, measured / predictions)
    slopes = (measured[:, 0] - measured[:, 1]) / (2 * step_of(settings))
    dense = losses_of_windows(decoder, batches)  # the step is judged by the second-order change of the loss
    report = StepReport.of(measured.sum(-1) / predictions, float(dense.sum(dtype=np.float64)) / predictions)
    return Estimate(settings, slopes / predictions, report)


def _with_step(decoder: Decoder, batches: Batches, settings: Estimation, stored: Stored | None) -> Estimation:
    """The settings with ε: the stored one of an interrupted estimate, else the given one, else the chosen one."""
    if settings.estimator != "spsa" or settings.epsilon is not None:
        return settings
    if stored is not None and stored.epsilon is not None:
        return replace(settings, epsilon=stored.epsilon)
    chosen = choose_epsilon(decoder, batches, settings)
    return replace(settings, epsilon=float(hosts.of_first(lambda: {"epsilon": chosen})["epsilon"]))


def _check(measured: Float[np.ndarray, "P *sides B"], settings: Estimation) -> None:
    if settings.estimator == "jvp":
        if not np.isfinite(measured).all():
            raise InputError(
                "the derivative of the loss along a direction is not finite: the weights of the model are broken, or "
                "overflow their type; use --dtype float32"
            )
        if not measured.any():
            raise InputError("no direction changes the loss: the derivative is zero along every direction")
        return
    step = f"at --epsilon {step_of(settings):g}"
    if not np.isfinite(measured).all():
        raise InputError(f"the loss along a direction is not finite {step}; use a smaller one, or --estimator jvp")
    if not (measured[:, 0] - measured[:, 1]).any():
        raise InputError(
            f"no direction changes the loss {step}: the step is lost in rounding; use a larger one, or --estimator jvp"
        )


def _measure(
    decoder: Decoder,
    batches: Batches,
    settings: Estimation,
    plan: Plan | None,
    progress: Progress | None,
    checkpoint: Checkpoint | None,
    stored: Stored | None,
) -> Float[np.ndarray, "P *sides B"]:
    """The losses of every window at both ends of every direction, or its slopes along the directions, float64."""
    measured = None if stored is None else stored.measured
    if stored is not None:
        plan = stored.plan
    plan = plan or shared_plan(decoder, batches.length, settings, batches.tokens)
    for first in range(0 if measured is None else len(measured), settings.directions, plan.per_call):
        last = min(first + plan.per_call, settings.directions)
        part = measure_call(decoder, batches, settings, plan, first, last)
        measured = part if measured is None else np.concatenate([measured, part])
        if checkpoint is not None:
            checkpoint.save(Stored(plan, settings.epsilon, measured), last == settings.directions)
        if progress is not None:
            progress(last, settings.directions)
    assert measured is not None, "there is at least one direction"
    return measured


def measure_call(
    decoder: Decoder, batches: Batches, settings: Estimation, plan: Plan, first: int, last: int
) -> Float[np.ndarray, "P *sides B"]:
    """Losses or slopes along directions first, ..., last - 1, in one call of the compiled program for each batch.

    A streamed model is read once for a call.

    The last call of an estimate also measures directions that are not part of it. All calls then have the same shapes,
    and the program is compiled once.

    Args:
      decoder: the model.
      batches: calibration windows.
      settings: settings of the estimate, resolved.
      plan: number of directions and tokens in a call.
      first: number of the first direction.
      last: number after the last direction, at most `first + plan.per_call`.

    Returns:
      For `spsa` the losses of every window at both ends, [P, 2, B]; for `jvp` its slopes, [P, B]; float64, nats.
    """
    stacked = draw(settings, decoder, first, first + plan.per_call).stacked(plan.per_step)
    epsilon = step_of(settings) if settings.estimator == "spsa" else None
    measured = passes.measure(decoder, batches.resized(plan.tokens), stacked, space_of(settings), epsilon)
    return measured.reshape(plan.per_call, *measured.shape[2:])[: last - first]


def _exact(decoder: Decoder, batches: Batches, settings: Estimation, progress: Progress | None) -> Estimate:
    """The exact gradient: by weights summed over the batches, by gates for every window; float32."""
    by_gates, done = settings.space == "gates", 0
    gates: RunGradients | None = None
    sums = None if by_gates else no_gradients(decoder, settings.curvature)
    predictions, windows = jnp.float32(batches.predictions), jnp.float32(batches.count)
    # The curvature squares the gradient of every single window.
    for batch in batches.resized(1) if settings.curvature else batches:
        if sums is None:
            part = jax.tree.map(lambda leaf: leaf / predictions, gate_gradients(decoder, batch.tokens))
            gates = part if gates is None else jax.tree.map(_join, gates, part)
        else:
            sums = add_weight_gradients(sums, decoder, batch.tokens, predictions, windows)
        done += len(batch.numbers)
        if progress is not None:
            progress(done, batches.count)
    if sums is None:
        return Estimate(settings, exact=gates)
    return Estimate(settings, exact=sums.gradient, curvature=sums.squares)


def _join(left: Float[Array, "L B groups"], right: Float[Array, "L C groups"]) -> Float[Array, "L _ groups"]:
    return jnp.concatenate([left, right], axis=1)


def gate_slopes(decoder: Decoder, gradient: Estimate) -> list[dict[str, Float[Array, "L B groups"]]]:
    """For each run, the share of every window in ∂L/∂gate of every group: kind of group -> [L, B, groups].

    Args:
      decoder: the model.
      gradient: an estimate or the exact gradient, by gates.
    """
    if gradient.exact is not None:
        return gradient.exact
    assert gradient.projected is not None, "an estimate has projected gradients"
    directions = draw(gradient.settings, decoder, 0, len(gradient.projected))
    projected, space = jnp.asarray(gradient.projected, jnp.float32), space_of(gradient.settings)
    return [
        rebuild.rebuild_gates(layers, directions, projected, counts, space)
        for layers, counts in spaces.gate_counts(decoder)
    ]
