"""Input refit: the matrices that read the residual stream (q, k, v, gate, up), fitted to the inputs of the dense model.

These matrices were trained on the inputs X' of the dense model, but read the inputs X of the pruned model. The input
refit multiplies each of them from the left, W ← M W, where M is the linear map from X towards X':

    M = (G + λI)⁻¹ ((1 − β) G + β C + λI)        G = Xᵀ X, C = Xᵀ X', λ = ridge · mean diagonal of G

With biases, the moments are centred, and the biases take the difference of the means. One system of size [D, D] serves
all matrices of a sublayer.
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

# Kind of group -> the matrices of its sublayer that read the residual stream.
INPUT_MATRICES = {
    "head": ("attention.q", "attention.k", "attention.v"),
    "channel": ("mlp.gate", "mlp.up"),
}


def refit_sublayer_inputs(
    kind: str, run: Block, moments: InputMoments, tokens: int, beta: float, ridge: float, solver: str = "host"
) -> Block:
    """A layer whose matrices of one sublayer that read the residual stream are refitted.

    Args:
      kind: `head` for the attention sublayer, `channel` for the MLP sublayer.
      run: the layer, a run of one layer.
      moments: sums of the sublayer's inputs, as the walk collects them.
      tokens: number of tokens in these sums.
      beta: β, the strength of the input refit, from 0 (the matrices keep their values) to 1.
      ridge: λ as a share of the mean diagonal of G.
      solver: see `solve.solve`.

    Raises:
      InputError: the moments are not finite.
    """
    gram, inputs, cross, targets = (gather(moment).astype(np.float64) for moment in moments)
    names = INPUT_MATRICES[kind]
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        raise InputError(
            f"the input of {names[-1]} is not finite on the calibration windows: the model's weights are broken, or "
            "overflow their type"
        )
    mean, target = inputs / tokens, targets / tokens
    if f"{names[-1]}.bias" in dict(named_arrays(run)):
        gram, cross = gram - np.outer(mean, inputs), cross - np.outer(mean, targets)
    floor = ridge * (np.trace(gram) / len(gram) or 1.0)  # inputs of zeros have no diagonal: any ridge keeps M = I
    penalty = floor * np.eye(len(gram))
    linear_map = solve.solve(gram + penalty, (1 - beta) * gram + beta * cross + penalty, floor, solver)
    shift = (1 - beta) * mean + beta * target - mean @ linear_map
    return _mapped(run, names, jnp.asarray(linear_map, jnp.float32), jnp.asarray(shift, jnp.float32))


def _mapped(run: Block, names: tuple[str, ...], linear_map: Float[Array, "D D"], shift: Float[Array, " D"]) -> Block:
    """W ← M W, and b ← b + shift · W with the dense W, rounded to the types of the weights."""
    dense = dict(named_arrays(run))

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = axis_table.array_path(path)
        matrix, _, part = name.rpartition(".")
        if matrix not in names:
            return array
        if part == "kernel":
            return ops.einsum("DE,LE...->LD...", linear_map, array.astype(jnp.float32)).astype(array.dtype)
        change = ops.einsum("D,LD...->L...", shift, dense[f"{matrix}.kernel"].astype(jnp.float32))
        return (array.astype(jnp.float32) + change).astype(array.dtype)

    return jax.tree_util.tree_map_with_path(leaf, run)
