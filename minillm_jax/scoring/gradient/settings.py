"""The settings of a gradient estimate, completed and checked, and the directions that they name."""

from typing import Any

import numpy as np

from minillm_jax.data.windows import check_seed
from minillm_jax.errors import InputError, one_of
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.scoring.gradient import layerwise, spaces
from minillm_jax.scoring.gradient.directions import Directions, direction_keys, has_implementation
from minillm_jax.settings import DISTRIBUTIONS, ESTIMATORS, RNGS, SPACES, Estimation


def resolve(settings: Estimation, estimator: str = "spsa", space: str = "weights") -> Estimation:
    """The settings with estimator and space filled in, and with nothing else than what that estimator reads.

    Args:
      settings: as the user gives them.
      estimator: the criterion's own.
      space: the criterion's own.

    Raises:
      InputError: a name is unknown, a number out of its range, or two settings do not suit each other.
    """
    estimator, space = settings.estimator or estimator, settings.space or space
    one_of("estimator", estimator, ESTIMATORS)
    one_of("space of directions", space, SPACES)
    if settings.per_sequence and space != "gates":
        raise InputError("a direction for every sequence needs the space gates: all sequences share a weight")
    if settings.curvature and (estimator, space) != ("exact", "weights"):
        raise InputError("squared gradients of single sequences come with the exact gradient by weights only")
    if estimator == "exact":
        return _exact(settings, space)
    check_seed(settings.seed)
    return Estimation(
        estimator,
        space,
        directions=_positive("the number of directions", settings.directions),
        epsilon=_step(settings.epsilon) if estimator == "spsa" else Estimation.epsilon,
        distribution=_distribution(settings),
        rank=_positive("the rank of directions", settings.rank) if space == "low-rank" else 1,
        per_sequence=space == "gates" and settings.per_sequence,
        directions_per_step=_optional("the number of directions per step", settings.directions_per_step),
        memory=None if settings.directions_per_step else _optional("the memory for the estimate", settings.memory),
        rng=_rng(settings.rng),
        seed=settings.seed,
    )


def _exact(settings: Estimation, space: str) -> Estimation:
    if space == "low-rank":
        raise InputError("the exact gradient has no directions of low rank; use the space weights or gates")
    return Estimation("exact", space, seed=settings.seed, curvature=settings.curvature)


def _positive(what: str, number: int) -> int:
    if number < 1:
        raise InputError(f"{what} must be at least 1, found {number}")
    return number


def _optional(what: str, number: int | None) -> int | None:
    return None if number is None else _positive(what, number)


def _step(epsilon: float | None) -> float | None:
    if epsilon is not None and not 0 < np.float32(epsilon) < np.inf:
        raise InputError(f"epsilon must be a positive float32 number, found {epsilon:g}")
    return epsilon


def _distribution(settings: Estimation) -> str:
    one_of("distribution", settings.distribution, DISTRIBUTIONS)
    if settings.per_sequence and settings.distribution == "sphere":
        raise InputError("a direction for every sequence cannot be on the sphere; use gaussian or rademacher")
    return settings.distribution


def _rng(rng: str) -> str:
    one_of("random generator", rng, RNGS)
    if not has_implementation(rng):
        raise InputError(f"--rng {rng}: this version of JAX does not have it; leave the option out")
    return rng


def space_of(settings: Estimation) -> Any:
    """The space that the directions move in."""
    return spaces.make(settings.space or "weights", settings.distribution, settings.rank, settings.per_sequence)


def step_of(settings: Estimation) -> float:
    """The step ε, once it is chosen."""
    assert settings.epsilon is not None, "ε is chosen before it is used"
    return settings.epsilon


def draw(settings: Estimation, decoder: Decoder, first: int, last: int) -> Directions:
    """Directions first, ..., last - 1."""
    keys = direction_keys(settings.seed, first, last, settings.rng)
    if settings.distribution == "sphere":
        space = space_of(settings)
        streamed = isinstance(decoder, StreamedDecoder)
        lengths = layerwise.lengths(decoder, keys, space) if streamed else spaces.lengths(decoder, keys, space)
        return Directions(keys, lengths)
    return Directions.plain(keys)
