"""Scores of all groups: where what the forward passes tell and the criteria meet."""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.windows import Calibration, check_seed
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError, one_of
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.modules import Block, depth
from minillm_jax.model.tree import group_count, group_counts, hidden_size, kernels, layer_count, run_letters
from minillm_jax.progress import StageProgress, tell
from minillm_jax.scoring import criteria
from minillm_jax.scoring.activations import ACTIVATION_NORMS, RunStatistics, activation_norms
from minillm_jax.scoring.criteria import CRITERIA, Criterion
from minillm_jax.scoring.gradient import directions
from minillm_jax.scoring.gradient.estimate import Estimate, estimate, gate_slopes
from minillm_jax.scoring.gradient.exact import RunGradients
from minillm_jax.scoring.gradient.rebuild import rebuild
from minillm_jax.scoring.gradient.settings import Estimation


@dataclass(frozen=True)
class Scoring:
    """How groups are scored; what is not said is the paper's.

    Attributes:
      criterion: one of `select.criteria.CRITERIA`: fms, wanda, flap, magnitude, magnitude-l1; vector, element-1,
        element-2, mixed (LLM-Pruner); gate, gate-square; obs (structured OBS, which chooses while it prunes); random,
        or noise (fms with ĝ replaced by noise: the control).
      estimation: of the gradient, used by fms and LLM-Pruner's criteria and, in the space of gates, by gate.
      activation_norm: l2, rms, mean-abs, std or none; the criterion's own by default.
      within: reduction inside a structure (sum, mean, max, l2); the criterion's own by default.
      across: reduction over the structures of a group (max, sum, mean, prod, last); the criterion's own by default.
      seed: of noise and random scores.
      factors: those of fms that are multiplied, of magnitude, activation and gradient; all by default.
      kinds: of groups that are scored: `head` (key/value heads with their query heads) or `query` (query heads), and
        `channel`.
    """

    criterion: str = "fms"
    estimation: Estimation = field(default_factory=Estimation)
    activation_norm: str | None = None
    within: str | None = None
    across: str | None = None
    seed: int = 0
    factors: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = axis_table.KINDS

    def resolve(self) -> tuple[Criterion, Estimation]:
        """The criterion with its reductions, and the estimate in the space that it takes.

        Raises:
          InputError: a name is unknown, a number out of its range, or two settings do not go together.
        """
        one_of("criterion", self.criterion, CRITERIA)
        check_seed(self.seed)
        own = CRITERIA[self.criterion]
        asked = {"within": self.within, "across": self.across, "norm": self.activation_norm, "factors": self.factors}
        found = replace(own, **{name: value for name, value in asked.items() if value is not None})
        one_of("activation norm", found.norm, ACTIVATION_NORMS)
        one_of("reduction within a structure", found.within, criteria.WITHIN)
        one_of("reduction across structures", found.across, criteria.ACROSS)
        if self.factors is not None:
            self._check_factors(self.factors)
        if found.by_gates and "query" in self.kinds:
            raise InputError(f"the criterion {self.criterion} has gates for whole key/value heads, not for query heads")
        return found, self._estimation(found)

    def _check_factors(self, factors: tuple[str, ...]) -> None:
        if self.criterion != "fms":
            raise InputError(f"only the criterion fms is a product whose factors can be chosen, not {self.criterion}")
        if not factors or len(set(factors)) < len(factors):
            raise InputError("fms needs at least one factor, and each of them once")
        for factor in factors:
            one_of("factor", factor, criteria.FMS_FACTORS)

    def _estimation(self, criterion: Criterion) -> Estimation:
        by_gates = criterion.by_gates
        space, difference = "gates" if by_gates else "weights", criterion.difference
        asked = self.estimation
        resolved = replace(asked, space=asked.space or space, difference=asked.difference or difference).resolve()
        if criterion.estimates and by_gates != (resolved.space == "gates"):
            known = "gates" if by_gates else "weights or low-rank"
            raise InputError(f"the criterion {self.criterion} takes directions in the space {known}")
        if criterion.curved and resolved.difference != "exact":
            raise InputError(
                f"the criterion {self.criterion} takes the squared gradients of single windows, which only the exact "
                "gradient has; use --difference exact, or element-1"
            )
        return replace(resolved, curvature=criterion.curved)


@dataclass(frozen=True)
class Scores:
    """One number for every group: kind -> layer -> [groups], higher stays.

    Attributes:
      groups: the scores.
      settings: what they were made with, for the record.
      calibration: what they were made on, for the record.
      estimate: of the gradient, when the criterion takes one.
    """

    groups: dict[str, list[np.ndarray]]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    estimate: Estimate | None = None

    @property
    def on_the_way(self) -> bool:
        """Whether the groups are chosen while they are removed: there are no scores then."""
        return self.settings.get("criterion") == "obs"


# The least score, the quartiles and the largest.
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def summaries(scores: Scores) -> dict[str, list[list[float]]] | None:
    """Five numbers for the scores of every layer, by kind: `QUANTILES`. None where there are no scores."""
    if scores.on_the_way:
        return None
    return {
        kind: [np.quantile(np.asarray(values, np.float64), QUANTILES).tolist() for values in rows]
        for kind, rows in scores.groups.items()
    }


def score(
    model: Model,
    calibration: Calibration,
    scoring: Scoring | None = None,
    progress: StageProgress | None = None,
    checkpoint: str | Path | None = None,
) -> Scores:
    """Score every head (with its key/value group) and every MLP channel of every layer.

    Args:
      model: the dense model.
      calibration: windows to run it on.
      scoring: the criterion and its settings.
      progress: told how far each stage is.
      checkpoint: folder from which an interrupted estimate of the gradient goes on (see `estimate.loop`).

    Raises:
      InputError: a setting is out of its range, or the estimate is not finite.
    """
    scoring = scoring or Scoring()
    criterion, estimation = scoring.resolve()
    found = None
    if criterion.estimates:
        told = partial(tell, progress, "directions")
        found = estimate(model.decoder, calibration.batches, estimation, told, checkpoint)
    return scores_from(model, calibration, scoring, found, progress)


def scores_from(
    model: Model,
    calibration: Calibration,
    scoring: Scoring,
    found: Estimate | None,
    progress: StageProgress | None = None,
) -> Scores:
    """The scores that follow from an estimate of the gradient, None for criteria that take none.

    Raises:
      InputError: a setting is out of its range.
    """
    criterion, estimation = scoring.resolve()
    decoder = model.decoder
    used = estimation if found is None else found.settings
    settings = asdict(replace(scoring, estimation=used)) | asdict(criterion)
    if not criterion.factors:
        return Scores(_random_scores(decoder, scoring), settings, calibration.record())
    if "obs" in criterion.factors:  # the groups are chosen while they are removed, layer after layer
        flat = {kind: [np.zeros(count) for count in group_counts(decoder, kind)] for kind in scoring.kinds}
        return Scores(flat, settings, calibration.record())
    if found is not None and criterion.by_gates:
        return Scores(_gate_scores(decoder, found, criterion, scoring.kinds), settings, calibration.record(), found)
    norms = _norms(decoder, calibration, criterion, progress)
    slopes = _slopes(decoder, criterion, scoring, found)
    scores = _score_matrices(decoder, norms, slopes, criterion, scoring.kinds, progress)
    return Scores(scores, settings, calibration.record(), found)


def hidden_scores(
    model: Model, calibration: Calibration, scoring: Scoring, progress: StageProgress | None = None
) -> Float[np.ndarray, " D"]:
    """One number for every hidden dimension, from all matrices of all layers that touch the residual stream.

    Raises:
      InputError: a setting is out of its range, or the criterion has no scores for hidden dimensions.
    """
    criterion, estimation = scoring.resolve()
    check_hidden(scoring)
    decoder = model.decoder
    if not criterion.factors:
        return criteria.random_scores(directions.stream_key(scoring.seed, "random"), 0, "hidden", hidden_size(decoder))
    told = partial(tell, progress, "directions")
    found = estimate(decoder, calibration.batches, estimation, told) if criterion.estimates else None
    norms = _norms(decoder, calibration, criterion, progress)
    slopes = _slopes(decoder, criterion, scoring, found)
    (rows,) = _score_matrices(decoder, norms, slopes, criterion, ("hidden",), progress).values()
    return criteria.reduce_group(np.stack(rows), criterion.across)


def check_hidden(scoring: Scoring) -> None:
    """Whether a criterion has scores for hidden dimensions.

    Raises:
      InputError: it has not.
    """
    criterion, _ = scoring.resolve()
    if "obs" in criterion.factors or criterion.by_gates or criterion.within == "standardised":
        raise InputError(
            f"the criterion {scoring.criterion} has no scores for hidden dimensions; use wanda, magnitude, fms or "
            "element-1, for example"
        )


def _norms(
    decoder: Decoder, calibration: Calibration, criterion: Criterion, progress: StageProgress | None
) -> RunStatistics | None:
    """The norms of the input features, for criteria that take them."""
    if "activation" not in criterion.factors or criterion.norm == "none":
        return None
    found = activation_norms(decoder, calibration.batches, criterion.norm)
    tell(progress, "activations", 1, 1)
    return found


def _gate_scores(
    decoder: Decoder, found: Estimate, criterion: Criterion, kinds: tuple[str, ...]
) -> dict[str, list[np.ndarray]]:
    runs = gate_slopes(decoder, found)
    return {
        kind: [criteria.gate_importance(layer, criterion) for run in runs for layer in sharding.gather(run[kind])]
        for kind in kinds
    }


@dataclass(frozen=True)
class _Slopes:
    """What ĝ of a matrix is made from: keys and projected gradients, the key of the noise, or the exact gradient.

    Beside it the mean square of single windows' exact gradients, where the criterion takes it.
    """

    traced: dict[str, Any] = field(default_factory=dict)
    exact: RunGradients | None = None
    curvature: RunGradients | None = None
    space: Any = None


def _slopes(decoder: Decoder, criterion: Criterion, scoring: Scoring, found: Estimate | None) -> _Slopes:
    if "noise" in criterion.factors:
        return _Slopes({"noise": directions.stream_key(scoring.seed, "noise")})
    if found is None:
        return _Slopes()
    if found.projected is None:
        return _Slopes(exact=found.exact if "gradient" in criterion.factors else None, curvature=found.curvature)
    drawn = found.settings.draw(decoder, 0, len(found.projected))
    projected = jnp.asarray(found.projected.sum(axis=1), jnp.float32)
    return _Slopes({"directions": drawn, "projected": projected}, space=found.settings.make_space())


def _score_matrices(
    decoder: Decoder,
    norms: RunStatistics | None,
    slopes: _Slopes,
    criterion: Criterion,
    kinds: tuple[str, ...],
    progress: StageProgress | None,
) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    first = 0
    for position, run in enumerate(decoder.runs):
        own = [None if of is None else of[position] for of in (norms, slopes.exact, slopes.curvature)]
        for kind, values in _score_run(run, first, own, slopes, criterion, kinds).items():
            found[kind].extend(values)
        first += depth(run)
        tell(progress, "scores", first, layer_count(decoder))
    return found


def _score_run(
    run: Block,
    first: int,
    own: list[dict[str, Array] | None],
    slopes: _Slopes,
    criterion: Criterion,
    kinds: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """The scores of one run of equal layers that begins at layer `first`: kind -> [L, groups]."""
    layers = jnp.arange(first, first + depth(run), dtype=jnp.int32)
    found = {}
    for kind in kinds:
        structures = [
            _score_structure(
                kernels(run)[name][...],
                *(None if values is None else values[name] for values in own),
                layers,
                slopes.traced,
                name=name,
                kind=kind,
                count=run_letters(run)["D"] if kind == "hidden" else group_count(run, kind),
                criterion=criterion,
                space=slopes.space,
            )
            for name in criteria.scored_matrices(criterion, kind)
            if name in kernels(run)
        ]
        found[kind] = criteria.reduce_group(np.stack([sharding.gather(part) for part in structures]), criterion.across)
    return found


@partial(jax.jit, static_argnames=("name", "kind", "count", "criterion", "space"))
def _score_structure(
    kernels: Float[Array, "L ..."],
    norms: Float[Array, "L ..."] | None,
    exact: Float[Array, "L ..."] | None,
    curvature: Float[Array, "L ..."] | None,
    layers: Int[Array, " L"],
    slopes: dict[str, Any],
    *,
    name: str,
    kind: str,
    count: int,
    criterion: Criterion,
    space: Any,
) -> Float[Array, "L groups"]:
    """The score of each group's part in one matrix, for every layer of a run.

    One matrix of one layer at a time: ĝ is rebuilt, used and forgotten, so this takes the memory of the weights and a
    few times that of one matrix.
    """
    axes = axis_table.matrices()[name]

    def one(layer_of: tuple[Array, Array | None, Array | None, Array | None, Array]) -> Array:
        kernel, norm, slope, squares, layer = layer_of
        if "directions" in slopes:
            slope = rebuild(name, kernel.shape, layer, slopes["directions"], slopes["projected"], space)
        elif "noise" in slopes:
            slope = directions.draw(slopes["noise"], layer, name, kernel.shape, "gaussian")
        weights = kernel if "magnitude" in criterion.factors else jnp.ones_like(kernel)
        values = criteria.importance(weights, norm, slope, squares)
        return criteria.reduce_structure(values, axes, kind, count, criterion.within)

    return jax.lax.map(one, (kernels, norms, exact, curvature, layers))


def _random_scores(decoder: Decoder, scoring: Scoring) -> dict[str, list[np.ndarray]]:
    key = directions.stream_key(scoring.seed, "random")
    return {
        kind: [criteria.random_scores(key, layer, kind, n) for layer, n in enumerate(group_counts(decoder, kind))]
        for kind in scoring.kinds
    }
