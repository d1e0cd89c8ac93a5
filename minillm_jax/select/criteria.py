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

from minillm_jax import groups

WITHIN = ("sum", "mean", "max", "l2")
ACROSS = ("max", "sum", "mean", "prod", "last")


@dataclass(frozen=True)
class Criterion:
    """How groups are scored.

    Attributes:
      factors: of `magnitude` |W|, `activation` (the norm of the input feature), `gradient` |ĝ|, and `noise`, which puts
        fresh noise in the place of ĝ; or alone, from the derivative by a factor on the whole group (its matrices are
        not looked at), `gate`, |∂L/∂gate|, or `gate-square`, the sum of the squares of each sequence's part of it;
        or `obs`, the error that is left when the other groups take over as well as they can, which is found while
        pruning (`shrink.obs`); empty for scores drawn at random.
      within: reduction over the weights of a structure.
      across: reduction over the structures of a group, in the order of the forward pass.
      outputs_only: score only the output projections (attention.o, mlp.down), as Wanda-sp does.
    """

    factors: tuple[str, ...]
    within: str = "sum"
    across: str = "max"
    outputs_only: bool = False

    @property
    def estimates(self) -> bool:
        """Whether it takes a gradient."""
        return self.by_gates or "gradient" in self.factors

    @property
    def by_gates(self) -> bool:
        """Whether it takes the gradient by gates."""
        return bool({"gate", "gate-square"} & set(self.factors))


CRITERIA = {
    "fms": Criterion(("magnitude", "activation", "gradient")),
    "noise": Criterion(("magnitude", "activation", "noise")),
    "wanda": Criterion(("magnitude", "activation"), outputs_only=True),
    "magnitude": Criterion(("magnitude",), within="l2"),
    "gate": Criterion(("gate",)),
    "gate-square": Criterion(("gate-square",)),
    "obs": Criterion(("obs",)),
    "random": Criterion(()),
}


def scored_matrices(criterion: Criterion, kind: str) -> dict[str, str]:
    """The matrices whose structures a criterion scores for a kind of group, and their axes."""
    found = groups.structures(kind)
    if criterion.outputs_only:
        return {name: axes for name, axes in found.items() if axes.endswith(" D")}
    return found


def importance(
    kernel: Float[Array, "..."], norm: Float[Array, "..."] | None, slope: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """|W| times the norm of its input feature times |ĝ|, each factor only where given, float32."""
    found = jnp.abs(kernel.astype(jnp.float32))
    if norm is not None:
        outputs = (1,) * (found.ndim - norm.ndim)
        found = found * jnp.broadcast_to(norm.reshape(*norm.shape, *outputs), found.shape)
    return found if slope is None else found * jnp.abs(slope)


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
    """The importance of each group's part in one matrix."""
    parts = groups.split_groups(values, axes, kind, count)
    match within:
        case "mean":
            return jnp.mean(parts, axis=1)
        case "max":
            return jnp.max(parts, axis=1)
        case "l2":
            return jnp.sqrt(jnp.sum(jnp.square(parts), axis=1))
    return jnp.sum(parts, axis=1)


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


def random_scores(key: jax.Array, layer: int, kind: str, count: int) -> Float[np.ndarray, " count"]:
    """Scores drawn at random, for the control; the same for a key, layer and kind whatever else is pruned."""
    key = jax.random.fold_in(jax.random.fold_in(key, layer), groups.KINDS.index(kind))
    return np.asarray(jax.random.uniform(key, (count,)), dtype=np.float64)
