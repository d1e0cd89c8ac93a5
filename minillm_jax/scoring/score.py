"""Scores of all groups: activation norms and gradients from forward passes, put together by a criterion."""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.windows import Calibration
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.modules import Block, depth, run_letters
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import group_count, group_counts, hidden_size, kernels, layer_count
from minillm_jax.progress import StageProgress, tell
from minillm_jax.scoring import criteria
from minillm_jax.scoring.activations import RunStatistics, activation_norms
from minillm_jax.scoring.criteria import Criterion
from minillm_jax.scoring.gradient import directions
from minillm_jax.scoring.gradient import settings as gradient_settings
from minillm_jax.scoring.gradient.estimate import Estimate, estimate, gate_slopes
from minillm_jax.scoring.gradient.exact import RunGradients
from minillm_jax.scoring.gradient.rebuild import rebuild
from minillm_jax.scoring.gradient.settings import draw, space_of
from minillm_jax.settings import Estimation, Scoring


@dataclass(frozen=True)
class Scores:
    """One number for every group: kind -> layer -> [groups]. Groups with higher scores are kept.

    Attributes:
      groups: the scores.
      settings: the settings that made them, for the record.
      calibration: the windows that they were made on, for the record.
      estimate: of the gradient, for criteria that read one; without the arrays of an exact gradient.
    """

    groups: dict[str, list[np.ndarray]]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    estimate: Estimate | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups that have scores."""
        return tuple(self.groups)


@dataclass(frozen=True)
class ChosenWhilePruning:
    """In the place of scores, for structured OBS: the groups are chosen layer by layer while they are removed.

    Attributes:
      kinds: the kinds of groups that are removed.
      settings: as in `Scores`.
      calibration: as in `Scores`.
    """

    kinds: tuple[str, ...]
    settings: dict[str, Any]
    calibration: dict[str, Any]

    @property
    def estimate(self) -> None:
        """Structured OBS reads no gradient."""
        return


# The least score, the quartiles and the largest.
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def summaries(scores: Scores | ChosenWhilePruning) -> dict[str, list[list[float]]] | None:
    """Five numbers for the scores of every layer, by kind: `QUANTILES`; none for a layer without groups.

    None where there are no scores.
    """
    if isinstance(scores, ChosenWhilePruning):
        return None
    return {
        kind: [
            np.quantile(np.asarray(values, np.float64), QUANTILES).tolist() if len(values) else [] for values in rows
        ]
        for kind, rows in scores.groups.items()
    }


def resolve(scoring: Scoring, hidden: bool = False) -> tuple[Criterion, Estimation | None]:
    """The criterion of some settings, and the gradient estimate that it reads; None where it reads none.

    Raises:
      InputError: a name is unknown, a number out of its range, or two settings do not suit each other.
    """
    criterion = criteria.resolve(scoring, hidden)
    criteria.check_idle(scoring, criterion)
    return criterion, resolve_gradient(scoring.criterion, criterion, scoring.estimation)


def resolve_gradient(name: str, criterion: Criterion, estimation: Estimation) -> Estimation | None:
    """The gradient estimate that a criterion of that name reads; None where it reads none.

    Raises:
      InputError: see `gradient.settings.resolve`; or the criterion does not take such an estimate.
    """
    if not criterion.takes_gradient:
        return None
    space = "gates" if criterion.by_gates else "weights"
    resolved = gradient_settings.resolve(estimation, criterion.estimator, space)
    if criterion.by_gates != (resolved.space == "gates"):
        known = "gates" if criterion.by_gates else "weights or low-rank"
        raise InputError(f"the criterion {name} takes directions in the space {known}, not {resolved.space}")
    if criterion.curved and resolved.estimator != "exact":
        raise InputError(
            f"the criterion {name} takes the squared gradients of single windows, which only the exact gradient has; "
            "use --estimator exact, or the criterion element-1"
        )
    return replace(resolved, curvature=criterion.curved)


def score(
    model: Model,
    calibration: Calibration,
    scoring: Scoring | None = None,
    progress: StageProgress | None = None,
    checkpoint: str | Path | None = None,
) -> Scores | ChosenWhilePruning:
    """Score every group of every layer.

    Args:
      model: the dense model.
      calibration: windows to run it on.
      scoring: the criterion and its settings.
      progress: called with how far each stage is.
      checkpoint: folder from which an interrupted gradient estimate continues (see `gradient.estimate`).

    Raises:
      InputError: a setting is out of its range, or the estimate is not finite.
    """
    scoring = scoring or Scoring()
    _, estimation = resolve(scoring)
    gradient = None
    if estimation is not None:
        directions_done = partial(tell, progress, "directions")
        gradient = estimate(model.decoder, calibration.batches, estimation, directions_done, checkpoint)
    return scores_from(model, calibration, scoring, gradient, progress)


def scores_from(
    model: Model,
    calibration: Calibration,
    scoring: Scoring,
    gradient: Estimate | None,
    progress: StageProgress | None = None,
) -> Scores | ChosenWhilePruning:
    """The scores that follow from a gradient estimate; None for criteria that read no gradient.

    Raises:
      InputError: a setting is out of its range, or a score is not finite.
    """
    criterion, estimation = resolve(scoring)
    decoder, drawn_on = model.decoder, calibration.record()
    used = estimation or scoring.estimation if gradient is None else gradient.settings
    settings = asdict(replace(scoring, estimation=used)) | asdict(criterion)
    if criterion.while_pruning:
        return ChosenWhilePruning(scoring.kinds, settings, drawn_on)
    if not criterion.factors:
        return Scores(_random_scores(decoder, scoring), settings, drawn_on)
    if gradient is not None and criterion.by_gates:
        scores = _gate_scores(decoder, gradient, criterion, scoring.kinds)
    else:
        norms = _norms(decoder, calibration, criterion, progress)
        slopes = _slopes(decoder, criterion, scoring, gradient)
        scores = _score_matrices(decoder, norms, slopes, criterion, scoring.kinds, progress)
    criteria.check_finite(scores)
    # The arrays of an exact gradient have the size of the model, and are not kept while it is pruned.
    estimated = None if gradient is None else replace(gradient, exact=None, curvature=None)
    return Scores(scores, settings, drawn_on, estimated)


def hidden_scores(
    model: Model, calibration: Calibration, scoring: Scoring, progress: StageProgress | None = None
) -> Float[np.ndarray, " D"]:
    """One number for every hidden dimension, from all matrices of all layers that touch the residual stream.

    Raises:
      InputError: a setting is out of its range, or the criterion has no scores for hidden dimensions.
    """
    criterion, estimation = resolve(scoring, hidden=True)
    check_hidden(scoring.criterion, criterion)
    decoder = model.decoder
    if not criterion.factors:
        return criteria.random_scores(directions.stream_key(scoring.seed, "random"), 0, "hidden", hidden_size(decoder))
    directions_done = partial(tell, progress, "directions")
    gradient = None if estimation is None else estimate(decoder, calibration.batches, estimation, directions_done)
    norms = _norms(decoder, calibration, criterion, progress)
    slopes = _slopes(decoder, criterion, scoring, gradient)
    (rows,) = _score_matrices(decoder, norms, slopes, criterion, ("hidden",), progress).values()
    return criteria.reduce_group(np.stack(rows), criterion.across)


def check_hidden(name: str, criterion: Criterion) -> None:
    """Check that the criterion of that name has scores for hidden dimensions.

    Raises:
      InputError: it has none.
    """
    if criterion.while_pruning or criterion.by_gates or criterion.within == "standardised":
        raise InputError(
            f"the criterion {name} has no scores for hidden dimensions; use wanda, magnitude, fms or element-1, "
            "for example"
        )


def _norms(
    decoder: Decoder, calibration: Calibration, criterion: Criterion, progress: StageProgress | None
) -> RunStatistics | None:
    """The norms of the input features, for criteria that read them."""
    if "activation" not in criterion.factors or criterion.norm == "none":
        return None
    norms = activation_norms(decoder, calibration.batches, criterion.norm)
    tell(progress, "activations", 1, 1)
    return norms


def _gate_scores(
    decoder: Decoder, gradient: Estimate, criterion: Criterion, kinds: tuple[str, ...]
) -> dict[str, list[np.ndarray]]:
    runs = gate_slopes(decoder, gradient)
    return {
        kind: [criteria.gate_importance(layer, criterion) for run in runs for layer in sharding.gather(run[kind])]
        for kind in kinds
    }


@dataclass(frozen=True)
class _Slopes:
    """The source of ĝ of a matrix: keys and projected gradients, the key of the noise, or the exact gradient.

    `curvature` is the mean square of the exact gradients of single windows, for criteria that read it.
    """

    traced: dict[str, Any] = field(default_factory=dict)
    exact: RunGradients | None = None
    curvature: RunGradients | None = None
    space: Any = None


def _slopes(decoder: Decoder, criterion: Criterion, scoring: Scoring, gradient: Estimate | None) -> _Slopes:
    if "noise" in criterion.factors:
        return _Slopes({"noise": directions.stream_key(scoring.seed, "noise")})
    if gradient is None:
        return _Slopes()
    if gradient.projected is None:
        exact = gradient.exact if "gradient" in criterion.factors else None
        return _Slopes(exact=exact, curvature=gradient.curvature)
    drawn = draw(gradient.settings, decoder, 0, len(gradient.projected))
    projected = jnp.asarray(gradient.projected.sum(axis=1), jnp.float32)
    return _Slopes({"directions": drawn, "projected": projected}, space=space_of(gradient.settings))


def _score_matrices(
    decoder: Decoder,
    norms: RunStatistics | None,
    slopes: _Slopes,
    criterion: Criterion,
    kinds: tuple[str, ...],
    progress: StageProgress | None,
) -> dict[str, list[np.ndarray]]:
    scores: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    first, runs = 0, decoder.runs
    if isinstance(decoder, StreamedDecoder):  # each layer is a run
        runs = sharding.layers_of(decoder, sharding.mesh_of(decoder))
    for position, run in enumerate(runs):
        of_run = [None if of is None else of[position] for of in (norms, slopes.exact, slopes.curvature)]
        for kind, values in _score_run(run, first, of_run, slopes, criterion, kinds).items():
            scores[kind].extend(values)
        first += depth(run)
        tell(progress, "scores", first, layer_count(decoder))
    return scores


def _score_run(
    run: Block,
    first: int,
    of_run: list[dict[str, Array] | None],
    slopes: _Slopes,
    criterion: Criterion,
    kinds: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """The scores of one run of equal layers that begins at layer `first`: kind -> [L, groups]."""
    layers = jnp.arange(first, first + depth(run), dtype=jnp.int32)
    scores = {}
    for kind in kinds:
        structures = [
            score_structure(
                kernels(run)[name][...],
                *(None if values is None else values[name] for values in of_run),
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
        scores[kind] = criteria.reduce_group(np.stack([sharding.gather(part) for part in structures]), criterion.across)
    return scores


@partial(jax.jit, static_argnames=("name", "kind", "count", "criterion", "space"))
def score_structure(
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

    Matrices of single layers are scored one after the other, and ĝ is rebuilt for each: the memory is that of the
    weights and a few times that of one matrix.
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
