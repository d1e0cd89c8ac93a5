"""The finite step of SPSA: how it fared, and which one to take."""

from dataclasses import dataclass
from functools import partial

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.data.batches import Batch, Batches
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder
from minillm_jax.scoring.gradient import slopes
from minillm_jax.scoring.gradient.settings import Estimation

# Steps that are compared when none is given.
CANDIDATES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)

# The comparison looks at so many directions and so many windows.
COMPARED = 4

# A difference of losses is lost when it is less than this many roundings of a float32 loss.
LOST = 8


@dataclass(frozen=True)
class StepReport:
    """How large the terms of the loss along a direction are, in nats, the root mean square over all directions.

        L(W ± εz) = L ± first + second + ...

    Attributes:
      loss: L, the mean loss of the model as it is.
      first: half the difference of the paired losses, what the estimate is made from.
      second: half of L₊ + L₋ - 2L, which the central difference cancels; the error it leaves is of third order.
      rounding: of a float32 loss.
    """

    loss: float
    first: float
    second: float
    rounding: float

    @classmethod
    def of(cls, pairs: Float[np.ndarray, "P 2"], loss: float) -> "StepReport":
        """From the mean losses at both ends of every direction, and of the model as it is."""
        first = np.sqrt(np.mean(np.square(pairs[:, 0] - pairs[:, 1]))) / 2
        second = np.sqrt(np.mean(np.square(pairs.sum(1) - 2 * loss))) / 2
        return cls(loss, float(first), float(second), float(np.finfo(np.float32).eps) * loss)

    def advice(self) -> str | None:
        """One sentence when the step was too large or too small, None when it was neither."""
        if self.first < LOST * self.rounding:
            return (
                f"the step is nearly lost in rounding: the losses at its ends differ by {2 * self.first:.1e}, and are "
                f"rounded to {self.rounding:.1e}; use a larger --epsilon, or --difference jvp"
            )
        if self.second > self.first:
            return (
                f"the step is too large: the second-order change of the loss, {self.second:.1e}, is more than the "
                f"first-order one, {self.first:.1e}; use a smaller --epsilon, or --difference jvp"
            )
        return None


def choose_epsilon(decoder: Decoder, batches: Batches, settings: Estimation) -> float:
    """The candidate whose central differences are nearest to the exact directional derivatives.

    Compared along a few directions on a few windows, by forward passes alone.

    Raises:
      InputError: no candidate has finite losses.
    """
    compared, space = batches.first(COMPARED), settings.make_space()
    directions = settings.draw(decoder, 0, COMPARED).stacked(1)

    def derivatives(batch: Batch) -> Array:
        return slopes.directional_derivatives(decoder, directions, batch.tokens, batch.numbers, space)

    def losses(batch: Batch, epsilon: float) -> Array:
        step = jnp.float32(epsilon)
        return slopes.paired_losses(decoder, directions, batch.tokens, batch.numbers, step, space)

    exact, errors = compared.collect(derivatives).astype(np.float64), []
    for epsilon in CANDIDATES:
        ends = compared.collect(partial(losses, epsilon=epsilon)).astype(np.float64)
        differences = (ends[..., 0, :] - ends[..., 1, :]) / (2 * epsilon)
        errors.append(np.linalg.norm((differences - exact).sum(-1)))
    if not np.isfinite(errors).any():
        raise InputError("the loss is not finite at any step that could be chosen; use --difference jvp")
    return CANDIDATES[int(np.nanargmin(errors))]
