"""Criteria: a group gets one number.

A criterion is data: which factors make the importance of a single weight, which matrices count, and how the
importances of a structure (one matrix's part in a group) and the structures of a group are reduced.

    FMS(W_ij) = |W_ij| · ‖X_:i‖₂ · |ĝ_ij|        i: input feature

is a working definition. The paper (MINI-LLM, arXiv 2407.11681) names the three factors and the maximum over the
structures of a group; its literal equation was not at hand.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.model import axis_table

WITHIN = ("sum", "mean", "max", "l2", "vector", "standardised")
ACROSS = ("max", "sum", "mean", "prod", "last")


@dataclass(frozen=True)
class Criterion:
    """How groups are scored.

    Attributes:
      factors: of `magnitude` W, `activation` (the norm of the input feature), `gradient` ĝ, `noise`, which puts fresh
        noise in the place of ĝ, and `curvature`, the second order (see `importance`); or alone, from the derivative by
        a factor on the whole group (its matrices are not looked at), `gate`, |∂L/∂gate|, or `gate-square`, the sum of
        the squares of each sequence's part of it; or `obs`, the error that is left when the other groups take over as
        well as they can, which is found while pruning (`shrink.obs`); empty for scores drawn at random.
      within: reduction over the weights of a structure.
      across: reduction over the structures of a group, in the order of the forward pass.
      outputs_only: score only the output projections (attention.o, mlp.down), as Wanda-sp does.
      norm: of the input features, where nothing else is asked for.
      difference: how the gradient is found, where nothing else is asked for.
    """

    factors: tuple[str, ...]
    within: str = "sum"
    across: str = "max"
    outputs_only: bool = False
    norm: str = "l2"
    difference: str = "spsa"

    @property
    def estimates(self) -> bool:
        """Whether it takes a gradient."""
        return self.by_gates or self.curved or "gradient" in self.factors

    @property
    def by_gates(self) -> bool:
        """Whether it takes the gradient by gates."""
        return bool({"gate", "gate-square"} & set(self.factors))

    @property
    def curved(self) -> bool:
        """Whether it takes the squared gradients of single sequences, which only the exact gradient has."""
        return "curvature" in self.factors


def _taylor(*factors: str, within: str = "sum") -> Criterion:
    """A criterion of LLM-Pruner (arXiv 2305.11627): the change of the loss, expanded, summed over a group."""
    return Criterion(("magnitude", *factors), within, across="sum", difference="exact")


CRITERIA = {
    "fms": Criterion(("magnitude", "activation", "gradient")),
    "noise": Criterion(("magnitude", "activation", "noise")),
    "wanda": Criterion(("magnitude", "activation"), outputs_only=True),
    "flap": Criterion(("magnitude", "activation"), "standardised", outputs_only=True, norm="std"),
    "magnitude": Criterion(("magnitude",), within="l2"),
    "magnitude-l1": Criterion(("magnitude",)),
    "vector": _taylor("gradient", within="vector"),
    "element-1": _taylor("gradient"),
    "element-2": _taylor("curvature"),
    "mixed": _taylor("gradient", "curvature"),
    "gate": Criterion(("gate",), difference="jvp"),
    "gate-square": Criterion(("gate-square",), difference="jvp"),
    "obs": Criterion(("obs",)),
    "random": Criterion(()),
}

# The factors of fms, which it can also be asked to leave out.
FMS_FACTORS = CRITERIA["fms"].factors


def scored_matrices(criterion: Criterion, kind: str) -> dict[str, str]:
    """The matrices whose structures a criterion scores for a kind of group, and their axes."""
    found = axis_table.structures(kind)
    if criterion.outputs_only:
        return {name: axes for name, axes in found.items() if axes.endswith(" D")}
    return found


def importance(
    kernel: Float[Array, "..."],
    norm: Float[Array, "..."] | None = None,
    slope: Float[Array, "..."] | None = None,
    curvature: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """What each weight counts for, with its sign, float32: W times the norm of its input feature times ĝ.

    Each factor only where it is given. With the curvature F, the mean square of the gradients of single sequences
    (LLM-Pruner's stand-in for the diagonal of the Hessian): W F W alone, W ĝ − ½ W F W with a gradient.
    """
    weights = found = kernel.astype(jnp.float32)
    if norm is not None:
        outputs = (1,) * (found.ndim - norm.ndim)
        found = found * jnp.broadcast_to(norm.reshape(*norm.shape, *outputs), found.shape)
    found = found if slope is None else found * slope
    if curvature is None:
        return found
    second = weights * curvature * weights
    return second if slope is None else found - 0.5 * second


def gate_importance(slopes: Float[np.ndarray, "B groups"], criterion: Criterion) -> Float[np.ndarray, " groups"]:
    """From each sequence's part of ∂L/∂gate, float64.

    `gate`: to first order, how much the loss changes when the group goes, in either direction. `gate-square`: to second
    order where the first vanishes, with the empirical Fisher information for the curvature.
    """
    slopes = np.asarray(slopes, np.float64)
    return np.square(slopes).sum(axis=0) if "gate-square" in criterion.factors else np.abs(slopes.sum(axis=0))


def reduce_structure(
    values: Float[Array, "..."], axes: str, kind: str, count: int, within: str
) -> Float[Array, " count"]:
    """The importance of each group's part in one matrix, from what its weights count for, with their signs.

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
    # Features that are all alike are no better or worse than each other.
    found = (features - jnp.mean(features)) / jnp.where(spread > 0, spread, 1)
    return jnp.mean(found.reshape(count, -1), axis=1)


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
