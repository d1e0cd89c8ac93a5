"""What the inner matrices of a half read is no longer what they were trained on: they are turned towards that.

On the pruned stream the queries, keys, values, gate and up projections of a layer read X where they read X' on the
dense one. The linear map that brings X half-way back, M, goes into them: W ← M W, with

    M = (G + λI)⁻¹ ((1 − β) G + β C + λI)        G = Xᵀ X, C = Xᵀ X', λ = ridge · mean diagonal of G

With a bias, the moments are taken about the means, and the bias makes up for these. One [D, D] system serves all
matrices of a half, and what they make, the pruned groups' part too, is what they made of the dense stream.
"""

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.devices.sharding import gather
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table, ops
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning import solve
from minillm_jax.pruning.walk import InputMoments

INNER = {
    "head": ("attention.q", "attention.k", "attention.v"),
    "channel": ("mlp.gate", "mlp.up"),
}


def align(
    kind: str, run: Block, moments: InputMoments, tokens: int, beta: float, ridge: float, solver: str = "host"
) -> Block:
    """A layer whose inner matrices of one half are turned towards what they read on the dense stream.

    Args:
      kind: `head` or `channel`: the half.
      run: the layer, a run of one.
      moments: of what the matrices read on both streams.
      tokens: how many tokens these are sums over.
      beta: how far, from 0 (not at all) to 1.
      ridge: λ as a share of the mean diagonal.
      solver: see `linear.solve`.

    Raises:
      InputError: the moments are not finite.
    """
    gram, inputs, cross, goals = (gather(moment).astype(np.float64) for moment in moments)
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        raise InputError(f"what {INNER[kind][-1]} reads is not finite: the model's weights are broken, or overflow")
    names = INNER[kind]
    biased = getattr(getattr(run, names[-1].split(".")[0]), names[-1].split(".")[1]).bias is not None
    mean, goal = inputs / tokens, goals / tokens
    if biased:
        gram, cross = gram - np.outer(mean, inputs), cross - np.outer(mean, goals)
    floor = ridge * (np.trace(gram) / len(gram) or 1.0)
    own = floor * np.eye(len(gram))
    turn = solve.solve(gram + own, (1 - beta) * gram + beta * cross + own, floor, solver)
    shift = (1 - beta) * mean + beta * goal - mean @ turn
    return _turned(run, names, jnp.asarray(turn, jnp.float32), jnp.asarray(shift, jnp.float32))


def _turned(run: Block, names: tuple[str, ...], turn: Float[Array, "D D"], shift: Float[Array, " D"]) -> Block:
    """W ← M W, and b ← b + shift · W with the old W, rounded to the types they have."""
    old = dict(named_arrays(run))

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = axis_table.array_path(path)
        matrix, _, part = name.rpartition(".")
        if matrix not in names:
            return array
        if part == "kernel":
            return ops.einsum("DE,LE...->LD...", turn, array.astype(jnp.float32)).astype(array.dtype)
        moved = ops.einsum("D,LD...->L...", shift, old[f"{matrix}.kernel"].astype(jnp.float32))
        return (array.astype(jnp.float32) + moved).astype(array.dtype)

    return jax.tree_util.tree_map_with_path(leaf, run)
