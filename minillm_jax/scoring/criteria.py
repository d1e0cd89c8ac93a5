"""Criteria: how a group gets one number.

A criterion is data: the factors of the importance of a single weight, the matrices that count, and the reductions over
the weights of a structure (one matrix's part in a group) and over the structures of a group.

    FMS(W_ij) = |W_ij| · ‖X_:i‖₂ · |ĝ_ij|        i: input feature

is a working definition. The paper (MINI-LLM, arXiv 2407.11681) names the three factors and the maximum over the
structures of a group; its literal equation was not available.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.data.windows import check_seed
from minillm_jax.errors import InputError, one_of
from minillm_jax.model import axis_table
from minillm_jax.settings import ACROSS, ACTIVATION_NORMS, FACTORS, WITHIN, Scoring
from minillm_jax.settings import CRITERIA as NAMES


@dataclass(frozen=True)
class Criterion:
    """How groups are scored.

    Attributes:
      factors: of the importance of a weight: `magnitude` W, `activation` (the norm of the input feature), `gradient` ĝ,
        `noise` (noise in the place of ĝ), and `curvature`, the second order (see `importance`). Or one of these alone:
        `gate`, |∂L/∂gate| of a factor on the whole group; `gate-square`, the sum of the squares of each sequence's part
        of it; `obs`, the error after the refit, which is known while pruning only (`pruning.removal_order`). Empty for
        random scores.
      within: reduction over the weights of a structure.
      across: reduction over the structures of a group, in the order of the forward pass.
      outputs_only: score only the output projections (attention.o, mlp.down), as Wanda-sp does.
      norm: of the input features.
      estimator: of the gradient, where the user names none.
    """

    factors: tuple[str, ...]
    within: str = "sum"
    across: str = "max"
    outputs_only: bool = False
    norm: str = "l2"
    estimator: str = "spsa"

    @property
    def takes_gradient(self) -> bool:
        """Whether it reads a gradient."""
        return self.by_gates or self.curved or "gradient" in self.factors

    @property
    def by_gates(self) -> bool:
        """Whether it reads the gradient by gates."""
        return bool({"gate", "gate-square"} & set(self.factors))

    @property
    def curved(self) -> bool:
        """Whether it reads the squared gradients of single sequences, which only the exact gradient has."""
        return "curvature" in self.factors

    @property
    def while_pruning(self) -> bool:
        """Whether it chooses groups while they are removed and gives no scores."""
        return "obs" in self.factors

    @property
    def draws(self) -> bool:
        """Whether its scores depend on random numbers of their own, apart from those of a gradient estimate."""
        return not self.factors or "noise" in self.factors

    @property
    def by_weights(self) -> bool:
        """Whether it scores single weights, which are then reduced to groups."""
        return bool(self.factors) and not (self.by_gates or self.while_pruning)

    @property
    def reads_text(self) -> bool:
        """Whether its scores depend on calibration text."""
        return self.takes_gradient or self.while_pruning or ("activation" in self.factors and self.norm != "none")


def _taylor(*factors: str, within: str = "sum") -> Criterion:
    """A criterion of LLM-Pruner (arXiv 2305.11627): the Taylor expansion of the loss, summed over a group."""
    return Criterion(("magnitude", *factors), within, across="sum", estimator="exact")


CRITERIA = {
    "obs": Criterion(("obs",)),
    "wanda": Criterion(("magnitude", "activation"), outputs_only=True),
    "flap": Criterion(("magnitude", "activation"), "standardised", outputs_only=True, norm="std"),
    "fms": Criterion(("magnitude", "activation", "gradient")),
    "magnitude": Criterion(("magnitude",), within="l2"),
    "magnitude-l1": Criterion(("magnitude",)),
    "vector": _taylor("gradient", within="vector"),
    "element-1": _taylor("gradient"),
    "element-2": _taylor("curvature"),
    "mixed": _taylor("gradient", "curvature"),
    "gate": Criterion(("gate",), estimator="jvp"),
    "gate-square": Criterion(("gate-square",), estimator="jvp"),
    "random": Criterion(()),
    "noise": Criterion(("magnitude", "activation", "noise")),
}
assert tuple(CRITERIA) == NAMES, "the command line names these criteria"


def resolve(scoring: Scoring, hidden: bool = False) -> Criterion:
    """The criterion of some settings, with the user's reductions, norm and factors in the place of its own.

    Reads no more of the settings than the criterion uses.

    Args:
      scoring: the settings.
      hidden: hidden dimensions are scored too.

    Raises:
      InputError: a name is unknown, or two settings do not suit each other.
    """
    one_of("criterion", scoring.criterion, CRITERIA)
    criterion = CRITERIA[scoring.criterion]
    if scoring.criterion == "fms":
        criterion = replace(criterion, factors=_factors(scoring.factors))
    if criterion.by_gates and "query" in scoring.kinds:
        raise InputError(f"the criterion {scoring.criterion} has gates for whole key/value heads, not for query heads")
    if criterion.draws:
        check_seed(scoring.seed)
    return _with_reductions(criterion, scoring, hidden) if criterion.by_weights else criterion


def check_idle(scoring: Scoring, criterion: Criterion) -> None:
    """Check that the criterion reads every reduction, norm and factor that the settings name.

    Args:
      scoring: the settings.
      criterion: what `resolve` makes of them.

    Raises:
      InputError: a setting would do nothing.
    """
    idle = [] if scoring.criterion == "fms" or scoring.factors is None else ["factors"]
    for key, read in (("activation_norm", "norm"), ("within", "within"), ("across", "across")):
        if getattr(scoring, key) not in (None, getattr(criterion, read)):
            idle.append(key)
    if idle:
        raise InputError(
            f"the criterion {scoring.criterion} does not read {' and '.join(idle)}, which would do nothing; leave "
            f"{'them' if len(idle) > 1 else 'it'} out" + (", or use the criterion fms" if "factors" in idle else "")
        )


def _factors(factors: tuple[str, ...] | None) -> tuple[str, ...]:
    if factors is None:
        return FACTORS
    if not factors or len(set(factors)) < len(factors):
        raise InputError("fms needs at least one factor, and each factor once")
    for factor in factors:
        one_of("factor", factor, FACTORS)
    return factors


def _with_reductions(criterion: Criterion, scoring: Scoring, hidden: bool) -> Criterion:
    changes = {"within": scoring.within or criterion.within}
    one_of("reduction within a structure", changes["within"], WITHIN)
    if "activation" in criterion.factors:
        changes["norm"] = scoring.activation_norm or criterion.norm
        one_of("activation norm", changes["norm"], ACTIVATION_NORMS)
    if hidden or not criterion.outputs_only:  # a group has one output projection, and nothing to reduce over
        changes["across"] = scoring.across or criterion.across
        one_of("reduction across structures", changes["across"], ACROSS)
    return replace(criterion, **changes)


def scored_matrices(criterion: Criterion, kind: str) -> dict[str, str]:
    """The matrices whose structures a criterion scores for a kind of group, and their axes."""
    matrices = axis_table.structures(kind)
    if criterion.outputs_only:
        return {name: axes for name, axes in matrices.items() if axes.endswith(" D")}
    return matrices


def importance(
    kernel: Float[Array, "..."],
    norm: Float[Array, "..."] | None = None,
    slope: Float[Array, "..."] | None = None,
    curvature: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """The importance of each weight, with its sign, float32: W times the norm of its input feature times ĝ.

    Factors that are None are left out. With the curvature F, the mean square of the gradients of single sequences
    (LLM-Pruner's stand-in for the diagonal of the Hessian): W F W alone, W ĝ − ½ W F W with a gradient.
    """
    weights = first = kernel.astype(jnp.float32)
    if norm is not None:
        outputs = (1,) * (first.ndim - norm.ndim)
        first = first * jnp.broadcast_to(norm.reshape(*norm.shape, *outputs), first.shape)
    first = first if slope is None else first * slope
    if curvature is None:
        return first
    second = weights * curvature * weights
    return second if slope is None else first - 0.5 * second


def gate_importance(slopes: Float[np.ndarray, "B groups"], criterion: Criterion) -> Float[np.ndarray, " groups"]:
    """From each sequence's part of ∂L/∂gate, float64.

    `gate` is the first-order change of the loss when the group is removed, as an absolute value. `gate-square` is the
    second-order change where the first order vanishes, with the empirical Fisher information as the curvature.
    """
    slopes = np.asarray(slopes, np.float64)
    return np.square(slopes).sum(axis=0) if "gate-square" in criterion.factors else np.abs(slopes.sum(axis=0))


def reduce_structure(
    values: Float[Array, "..."], axes: str, kind: str, count: int, within: str
) -> Float[Array, " count"]:
    """The importance of each group's part in one matrix, from the signed importance of its weights.

    `sum`, `mean`, `max` and `l2` are of absolute values; `vector` is the absolute value of the sum. `standardised` is
    FLAP's (arXiv 2312.11983): the sum of squares of each feature that the groups slice, in standard deviations from the
    mean of all such features of the matrix, and the mean of that over the features of a group.
    """
    parts = axis_table.split_groups(values, axes, kind, count)
    match within:
        case "sum":
            return jnp.sum(jnp.abs(parts), axis=1)
        case "mean":
            return jnp.mean(jnp.abs(parts), axis=1)
        case "max":
            return jnp.max(jnp.abs(parts), axis=1)
        case "l2":
            return jnp.sqrt(jnp.sum(jnp.square(parts), axis=1))
        case "vector":
            return jnp.abs(jnp.sum(parts, axis=1))
    return _standardised(values, axes, kind, count)


def _standardised(values: Float[Array, "..."], axes: str, kind: str, count: int) -> Float[Array, " count"]:
    """See `reduce_structure`."""
    (side,) = (side for side in axes.split() if set(side) & set(axis_table.GROUP_LETTERS[kind]))
    others = tuple(i for i, letter in enumerate(axis_table.letters(axes)) if letter not in side)
    features = jnp.sum(jnp.square(values), axis=others).ravel()
    spread = jnp.std(features, ddof=1)
    # Equal features have a spread of zero and standardised values of zero.
    standardised = (features - jnp.mean(features)) / jnp.where(spread > 0, spread, 1)
    return jnp.mean(standardised.reshape(count, -1), axis=1)


def reduce_group(structures: Float[np.ndarray, "structures *rest"], across: str) -> Float[np.ndarray, "*rest"]:
    """One number a group from the numbers of its structures, in float64 (a product of four leaves float32's range)."""
    values = np.asarray(structures, dtype=np.float64)
    match across:
        case "sum":
            return values.sum(axis=0)
        case "mean":
            return values.mean(axis=0)
        case "prod":
            return values.prod(axis=0)
        case "last":
            return values[-1]
    return values.max(axis=0)


# Each kind of group has random scores of its own.
_STREAMS = ("head", "channel", "query", "hidden")


def random_scores(key: jax.Array, layer: int, kind: str, count: int) -> Float[np.ndarray, " count"]:
    """Scores drawn at random, for the control; the same for a key, layer and kind whatever else is pruned."""
    key = jax.random.fold_in(jax.random.fold_in(key, layer), _STREAMS.index(kind))
    return np.asarray(jax.random.uniform(key, (count,)), dtype=np.float64)


def check_finite(scores: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Check that all scores are finite: NaN has no place in an order, and infinity is an overflow.

    Args:
      scores: kind -> one array of scores for each layer.

    Raises:
      InputError: a score is not finite.
    """
    for kind, rows in scores.items():
        for layer, values in enumerate(rows):
            broken = np.flatnonzero(~np.isfinite(values))
            if len(broken):
                of_layer = "" if kind == "hidden" else f" of layer {layer}"
                raise InputError(
                    f"the {kind} scores{of_layer} are not finite: {len(broken)} of {len(values)}, the first that of "
                    f"group {broken[0]}; the weights or activations overflow their type: use --dtype float32 "
                    "or another --criterion"
                )
