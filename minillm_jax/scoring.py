"""Scores of all groups: where what the forward passes tell and the criteria meet."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax import groups
from minillm_jax.calibration import Calibration, check_seed
from minillm_jax.decoder import Decoder, depth, group_count, group_counts, kernels, layer_count
from minillm_jax.errors import InputError
from minillm_jax.estimate import directions, gradient
from minillm_jax.estimate.loop import Spsa, estimate
from minillm_jax.estimate.spaces import SPACES
from minillm_jax.estimate.statistics import ACTIVATION_NORMS, activation_norms
from minillm_jax.model import Model
from minillm_jax.modules import Block
from minillm_jax.progress import StageProgress, tell
from minillm_jax.select import criteria
from minillm_jax.select.criteria import CRITERIA, Criterion


@dataclass(frozen=True)
class Scoring:
    """How groups are scored; what is not said is the paper's.

    Attributes:
      criterion: fms, wanda, magnitude, gate, random, or noise (fms with ĝ replaced by noise: the control).
      spsa: the gradient estimate, used by fms and, in the space of gates, by gate.
      activation_norm: l2, rms, mean-abs or none.
      within: reduction inside a structure (sum, mean, max, l2); the criterion's own by default.
      across: reduction over the structures of a group (max, sum, mean, prod, last); the criterion's own by default.
      seed: of noise and random scores.
    """

    criterion: str = "fms"
    spsa: Spsa = field(default_factory=Spsa)
    activation_norm: str = "l2"
    within: str | None = None
    across: str | None = None
    seed: int = 0

    def directions(self) -> Spsa:
        """The gradient estimate in the space that the criterion takes, where none is said."""
        fitting = "gates" if self.criterion == "gate" else "weights"
        return replace(self.spsa, space=self.spsa.space or fitting)

    def resolve(self) -> Criterion:
        """The criterion with its reductions.

        Raises:
          InputError: a name is unknown or a number out of its range.
        """
        _one_of("criterion", self.criterion, CRITERIA)
        _one_of("activation norm", self.activation_norm, ACTIVATION_NORMS)
        _one_of("distribution", self.spsa.distribution, directions.DISTRIBUTIONS)
        space = self.directions().space
        _one_of("space of directions", str(space), SPACES)
        if self.criterion in ("gate", "fms") and (self.criterion == "gate") != (space == "gates"):
            fitting = "gates" if self.criterion == "gate" else "weights or low-rank"
            raise InputError(f"the criterion {self.criterion} takes directions in the space {fitting}")
        for number in (self.spsa.directions, self.spsa.at_once, self.spsa.rank):
            if number < 1:
                raise InputError(
                    f"the number of directions, of those at once, and their rank must be at least 1, found {number}"
                )
        if not 0 < np.float32(self.spsa.epsilon) < np.inf:
            raise InputError(f"epsilon must be a positive float32 number, found {self.spsa.epsilon:g}")
        for seed in (self.seed, self.spsa.seed):
            check_seed(seed)
        found = CRITERIA[self.criterion]
        within, across = self.within or found.within, self.across or found.across
        _one_of("reduction within a structure", within, criteria.WITHIN)
        _one_of("reduction across structures", across, criteria.ACROSS)
        return replace(found, within=within, across=across)


@dataclass(frozen=True)
class Scores:
    """One number for every group: kind -> layer -> [groups], higher stays.

    Attributes:
      groups: the scores.
      settings: what they were made with, for the record.
      calibration: what they were made on, for the record.
      projected_gradients: of each direction, when the criterion takes an estimated gradient.
    """

    groups: dict[str, list[np.ndarray]]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    projected_gradients: np.ndarray | None = None


def score(
    model: Model, calibration: Calibration, scoring: Scoring | None = None, progress: StageProgress | None = None
) -> Scores:
    """Score every head (with its key/value group) and every MLP channel of every layer.

    Raises:
      InputError: a setting is out of its range, or the estimate is not finite.
    """
    scoring = scoring or Scoring()
    criterion = scoring.resolve()
    scoring = replace(scoring, spsa=scoring.directions())
    decoder, projected = model.decoder, None
    settings = asdict(scoring) | asdict(criterion)
    if not criterion.factors:
        return Scores(_random_scores(decoder, scoring.seed), settings, calibration.record())
    norms = None
    if "activation" in criterion.factors and scoring.activation_norm != "none":
        norms = activation_norms(decoder, calibration.windows, scoring.activation_norm)
        tell(progress, "activations", 1, 1)
    if {"gradient", "gate"} & set(criterion.factors):
        projected = estimate(decoder, calibration.windows, scoring.spsa, partial(tell, progress, "directions"))
    if "gate" in criterion.factors:
        assert projected is not None, "estimated above"
        found = _gate_scores(decoder, projected, scoring.spsa)
        return Scores(found, settings, calibration.record(), projected)
    slopes = _slopes(criterion, scoring, projected)
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in groups.KINDS}
    first = 0
    for position, run in enumerate(decoder.runs):
        norms_of_run = None if norms is None else norms[position]
        for kind, values in _score_run(run, first, norms_of_run, slopes, criterion, scoring.spsa.make_space()).items():
            found[kind].extend(values)
        first += depth(run)
        tell(progress, "scores", first, layer_count(decoder))
    return Scores(found, settings, calibration.record(), projected)


def _gate_scores(decoder: Decoder, projected: np.ndarray, spsa: Spsa) -> dict[str, list[np.ndarray]]:
    """|∂L/∂gate| of every group, float64: to first order how much the loss changes when the group goes."""
    keys = directions.direction_keys(spsa.seed, 0, len(projected))
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in groups.KINDS}
    first = 0
    for run in decoder.runs:
        layers = jnp.arange(first, first + depth(run), dtype=jnp.int32)
        counts = tuple((kind, group_count(run, kind)) for kind in groups.KINDS)
        slopes = gradient.rebuild_gates(layers, keys, jnp.asarray(projected, jnp.float32), counts, spsa.make_space())
        for kind, rows in slopes.items():
            found[kind].extend(np.abs(np.asarray(rows, dtype=np.float64)))
        first += depth(run)
    return found


def _slopes(criterion: Criterion, scoring: Scoring, projected: np.ndarray | None) -> dict[str, Array]:
    """What ĝ is made from inside the scan: keys and projected gradients, or the key of the noise."""
    if projected is not None:
        keys = directions.direction_keys(scoring.spsa.seed, 0, len(projected))
        return {"keys": keys, "projected": jnp.asarray(projected, jnp.float32)}
    if "noise" in criterion.factors:
        return {"noise": directions.stream_key(scoring.seed, "noise")}
    return {}


def _score_run(
    run: Block, first: int, norms: dict[str, Array] | None, slopes: dict[str, Array], criterion: Criterion, space: Any
) -> dict[str, np.ndarray]:
    """The scores of one run of equal layers that begins at layer `first`: kind -> [L, groups]."""
    layers = jnp.arange(first, first + depth(run), dtype=jnp.int32)
    found = {}
    for kind in groups.KINDS:
        structures = [
            _score_structure(
                kernels(run)[name][...],
                None if norms is None else norms[name],
                layers,
                slopes,
                name=name,
                kind=kind,
                count=group_count(run, kind),
                within=criterion.within,
                space=space,
            )
            for name in criteria.scored_matrices(criterion, kind)
            if name in kernels(run)
        ]
        found[kind] = criteria.reduce_group(np.stack([np.asarray(part) for part in structures]), criterion.across)
    return found


@partial(jax.jit, static_argnames=("name", "kind", "count", "within", "space"))
def _score_structure(
    kernels: Float[Array, "L ..."],
    norms: Float[Array, "L ..."] | None,
    layers: Int[Array, " L"],
    slopes: dict[str, Array],
    *,
    name: str,
    kind: str,
    count: int,
    within: str,
    space: Any,
) -> Float[Array, "L groups"]:
    """The score of each group's part in one matrix, for every layer of a run.

    One matrix of one layer at a time: ĝ is rebuilt, used and forgotten, so this takes the memory of the weights and a
    few times that of one matrix.
    """

    def one(layer_of: tuple[Array, Array | None, Array]) -> Array:
        kernel, norm, layer = layer_of
        slope = None
        if "keys" in slopes:
            slope = gradient.rebuild(name, kernel.shape, layer, slopes["keys"], slopes["projected"], space)
        elif "noise" in slopes:
            slope = directions.draw(slopes["noise"], layer, name, kernel.shape, "gaussian")
        values = criteria.importance(kernel, norm, slope)
        axes = groups.matrices()[name]
        return criteria.reduce_structure(values, axes, kind, count, within)

    return jax.lax.map(one, (kernels, norms, layers))


def _random_scores(decoder: Decoder, seed: int) -> dict[str, list[np.ndarray]]:
    key = directions.stream_key(seed, "random")
    return {
        kind: [criteria.random_scores(key, layer, kind, n) for layer, n in enumerate(group_counts(decoder, kind))]
        for kind in groups.KINDS
    }


def _one_of(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise InputError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")
