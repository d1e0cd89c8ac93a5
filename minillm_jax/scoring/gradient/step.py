"""The finite step ε of SPSA: a report on its rounding and second-order error, and the choice of ε."""

from dataclasses import dataclass

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder
from minillm_jax.scoring.gradient import passes
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.settings import draw, space_of
from minillm_jax.settings import Estimation

# Steps that `choose_epsilon` compares.
CANDIDATES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)

# Number of directions and number of windows in the comparison.
COMPARED = 4

# A difference of losses is nearly lost when it is smaller than this many roundings of a float32 loss.
LOST = 8


@dataclass(frozen=True)
class StepReport:
    """Sizes of the terms of the loss along a direction, in nats: root mean squares over all directions.

        L(W ± εz) = L ± first + second + ...

    Attributes:
      loss: the mean loss L of the unperturbed model.
      first: half the difference of the paired losses, from which the slope is computed.
      second: half of L₊ + L₋ - 2L. The central difference cancels it and leaves an error of third order.
      rounding: the rounding of a float32 loss.
    """

    loss: float
    first: float
    second: float
    rounding: float

    @classmethod
    def of(cls, pairs: Float[np.ndarray, "P 2"], loss: float) -> "StepReport":
        """The report on paired losses.

        Args:
          pairs: mean loss at +ε and at -ε along every direction, nats.
          loss: mean loss of the unperturbed model, nats.
        """
        first = np.sqrt(np.mean(np.square(pairs[:, 0] - pairs[:, 1]))) / 2
        second = np.sqrt(np.mean(np.square(pairs.sum(1) - 2 * loss))) / 2
        return cls(loss, float(first), float(second), float(np.finfo(np.float32).eps) * loss)

    def advice(self) -> str | None:
        """One sentence if the step is too large or too small, otherwise None."""
        if self.first < LOST * self.rounding:
            return (
                f"the step is nearly lost in rounding: the losses at its ends differ by {2 * self.first:.1e}, and are "
                f"rounded to {self.rounding:.1e}; use a larger --epsilon, or --estimator jvp"
            )
        if self.second > self.first:
            return (
                f"the step is too large: the second-order change of the loss, {self.second:.1e}, is more than the "
                f"first-order one, {self.first:.1e}; use a smaller --epsilon, or --estimator jvp"
            )
        return None


def choose_epsilon(decoder: Decoder, batches: Batches, settings: Estimation) -> float:
    """The step of `CANDIDATES` whose central differences are nearest to the exact directional derivatives.

    The comparison takes forward passes alone, along a few directions on a few windows.

    Args:
      decoder: the model.
      batches: calibration windows.
      settings: settings of the estimate, without ε.

    Returns:
      The step ε.

    Raises:
      InputError: the derivatives are not finite, or no candidate has finite losses.
    """
    compared, space = batches.first(COMPARED), space_of(settings)
    directions = draw(settings, decoder, 0, COMPARED)
    exact = passes.measure(decoder, compared, directions.stacked(1), space, None)
    if not np.isfinite(exact).all():
        raise InputError(
            "the derivative of the loss along a direction is not finite, so no step can be compared with it: the "
            "weights of the model are broken, or overflow their type; use --dtype float32"
        )
    # All steps in one pass, as directions of other lengths: a streamed model is read once.
    ends = passes.measure(decoder, compared, _at_all_steps(directions).stacked(1), space, 1.0)
    errors = []
    for epsilon, pair in zip(CANDIDATES, np.split(ends, len(CANDIDATES)), strict=True):
        # A step whose losses overflow is never the best: its error is infinite.
        finite = np.where(np.isfinite(pair).all(), pair, np.nan)
        differences = (finite[..., 0, :] - finite[..., 1, :]) / (2 * epsilon)
        errors.append(np.nan_to_num(np.linalg.norm((differences - exact).sum(-1)), nan=np.inf))
    if not np.isfinite(errors).any():
        raise InputError(
            f"the loss is not finite at any step --epsilon from {min(CANDIDATES):g} to {max(CANDIDATES):g}; "
            "use --estimator jvp"
        )
    return CANDIDATES[int(np.argmin(errors))]


def _at_all_steps(directions: Directions) -> Directions:
    """The directions once for every candidate, scaled by it: [P] -> [candidates · P]."""
    factors = jnp.outer(jnp.asarray(CANDIDATES, jnp.float32), directions.factors).ravel()
    return Directions(jnp.tile(directions.keys, len(CANDIDATES)), factors)
