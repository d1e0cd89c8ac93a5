"""What an estimate of the gradient is asked for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minillm_jax.data.windows import check_seed
from minillm_jax.errors import InputError, one_of
from minillm_jax.model.decoder import Decoder
from minillm_jax.scoring.gradient import spaces
from minillm_jax.scoring.gradient.directions import (
    DISTRIBUTIONS,
    IMPLEMENTATION,
    IMPLEMENTATIONS,
    Directions,
    direction_keys,
    has_implementation,
)
from minillm_jax.scoring.gradient.slopes import DIFFERENCES


@dataclass(frozen=True)
class Estimation:
    """Settings of an estimate; what is not said is the paper's.

    Attributes:
      difference: `spsa` (two opposite steps), `jvp` (the exact directional derivative, forward mode) or `exact`
        (reverse mode: no directions, but the memory of back-propagation); None leaves it to the criterion, and is
        `spsa` where there is none.
      space: what a direction moves: `weights` (all block matrices), `low-rank` or `gates`; None leaves it to the
        criterion, and is `weights` where there is none.
      directions: number n of random directions.
      epsilon: length ε of the step of `spsa`; None to choose it by comparison with the exact directional derivative.
      seed: decides the directions, bit for bit.
      distribution: `gaussian`, `rademacher` (signs) or `sphere` (Gaussian, scaled to length √d).
      rank: of low-rank directions.
      per_sequence: a direction of its own for every sequence (gates only).
      per_step: directions vmapped into one pass; None to choose it by `memory`. It changes speed and memory, not the
        directions.
      memory: bytes that may be used besides the model; None for what the device has left (1 GiB on a CPU).
      rng: how random bits are made, `threefry2x32` or `threefry4x32` (faster on CPUs); they are other directions.
      curvature: also the mean square of the gradients of single sequences (only `exact`, by weights).
    """

    difference: str | None = None
    space: str | None = None
    directions: int = 16
    epsilon: float | None = 1e-3
    seed: int = 0
    distribution: str = "gaussian"
    rank: int = 1
    per_sequence: bool = False
    per_step: int | None = None
    memory: int | None = None
    rng: str = IMPLEMENTATION
    curvature: bool = False

    def resolve(self) -> "Estimation":
        """The settings with difference and space filled in.

        Raises:
          InputError: a name is unknown, a number out of its range, or two settings do not go together.
        """
        resolved = replace(self, difference=self.difference or "spsa", space=self.space or "weights")
        _check_names(resolved)
        _check_numbers(resolved)
        _check_together(resolved)
        return resolved

    def make_space(self) -> Any:
        """The space of the directions."""
        return spaces.make(self.space or "weights", self.distribution, self.rank, self.per_sequence)

    def step(self) -> float:
        """ε, once it is known."""
        assert self.epsilon is not None, "ε is chosen before it is used"
        return self.epsilon

    def draw(self, decoder: Decoder, first: int, last: int) -> Directions:
        """Directions first, ..., last - 1."""
        keys = direction_keys(self.seed, first, last, self.rng)
        if self.distribution == "sphere":
            return Directions(keys, spaces.lengths(decoder, keys, self.make_space()))
        return Directions.plain(keys)


def _check_names(settings: Estimation) -> None:
    one_of("difference", str(settings.difference), DIFFERENCES)
    one_of("space of directions", str(settings.space), spaces.SPACES)
    one_of("distribution", settings.distribution, DISTRIBUTIONS)
    one_of("way to make random numbers", settings.rng, IMPLEMENTATIONS)
    if not has_implementation(settings.rng):
        raise InputError(f"--rng {settings.rng}: this version of JAX does not have it; leave the option out")


def _check_numbers(settings: Estimation) -> None:
    check_seed(settings.seed)
    for what, number in _counts(settings):
        if number < 1:
            raise InputError(f"{what} must be at least 1, found {number}")
    if settings.epsilon is not None and not 0 < np.float32(settings.epsilon) < np.inf:
        raise InputError(f"epsilon must be a positive float32 number, found {settings.epsilon:g}")


def _counts(settings: Estimation) -> Iterable[tuple[str, int]]:
    yield "the number of directions", settings.directions
    yield "the rank of directions", settings.rank
    if settings.per_step is not None:
        yield "the number of directions per step", settings.per_step
    if settings.memory is not None:
        yield "the memory for the estimate", settings.memory


def _check_together(settings: Estimation) -> None:
    if settings.difference == "exact" and settings.space == "low-rank":
        raise InputError("the exact gradient has no directions of low rank; use the space weights or gates")
    if settings.curvature and (settings.difference, settings.space) != ("exact", "weights"):
        raise InputError("squared gradients of single sequences come with the exact gradient by weights only")
    if settings.per_sequence and settings.space != "gates":
        raise InputError("a direction for every sequence needs the space gates: a weight is shared by all of them")
    if settings.per_sequence and settings.distribution == "sphere":
        raise InputError("a direction for every sequence cannot be on the sphere; use gaussian or rademacher")
