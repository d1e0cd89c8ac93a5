"""The host's loop around the compiled estimate: chunks of directions, batches of windows, progress."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float, Int

from minillm_jax.decoder import Decoder
from minillm_jax.errors import InputError
from minillm_jax.estimate import directions, gradient, spaces
from minillm_jax.loss import TOKENS_AT_ONCE, batches

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spsa:
    """Settings of the SPSA estimate.

    Attributes:
      directions: number n of random directions.
      epsilon: length ε of the step along each.
      seed: decides the directions, bit for bit.
      distribution: `gaussian` or `rademacher`.
      at_once: directions vmapped into one forward pass; changes speed and memory, not the directions.
      space: what a direction moves: `weights` (all block matrices, as the paper), `low-rank` or `gates`; None leaves
        it to the criterion, and is `weights` where there is none.
      rank: of low-rank directions.
    """

    directions: int = 16
    epsilon: float = 1e-3
    seed: int = 0
    distribution: str = "gaussian"
    at_once: int = 1
    space: str | None = None
    rank: int = 1

    def make_space(self) -> Any:
        """The space of the directions."""
        return spaces.make(self.space or "weights", self.distribution, self.rank)


def estimate(
    decoder: Decoder, windows: Int[np.ndarray, "B T"], settings: Spsa, progress: Progress | None = None
) -> Float[np.ndarray, " P"]:
    """The projected gradient of every direction, float64 [P], from 2 · P forward passes over the windows.

    Raises:
      InputError: a loss is not finite, or none changes.
    """
    found: list[np.ndarray] = []
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    for first in range(0, settings.directions, settings.at_once):
        last = min(first + settings.at_once, settings.directions)
        keys = directions.direction_keys(settings.seed, first, last)
        losses = [
            np.asarray(
                gradient.paired_losses(
                    decoder,
                    keys,
                    jnp.asarray(batch),
                    jnp.float32(settings.epsilon),
                    settings.make_space(),
                    settings.at_once,
                )
            )
            for batch in batches(windows, max(1, TOKENS_AT_ONCE // settings.at_once))
        ]
        found.append(gradient.projected_gradients(losses, predictions, settings.epsilon))
        if not np.isfinite(found[-1]).all():
            raise InputError(
                f"the loss at W ± εz is not finite for a direction among {first}..{last - 1}; "
                f"use a smaller --epsilon than {settings.epsilon:g}"
            )
        if progress is not None:
            progress(last, settings.directions)
    projected = np.concatenate(found)
    if not projected.any():
        raise InputError(
            f"no direction changes the loss at --epsilon {settings.epsilon:g}: the step is lost in rounding; "
            "use a larger one"
        )
    return projected
