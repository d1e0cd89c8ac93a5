"""Input refit: the matrices that read the residual stream (q, k, v, gate, up), fitted to the inputs of the dense model.

These matrices were trained on the inputs X' of the dense model, but read the inputs X of the pruned model. The input
refit multiplies each of them from the left, W ← M W, where M is the linear map from X towards X':

    M = (G + λI)⁻¹ ((1 − β) G + β C + λI)        G = Xᵀ X, C = Xᵀ X', λ = ridge · mean diagonal of G

With biases, the moments are centred, and the biases take the difference of the means. One system of size [D, D] serves
all matrices of a sublayer.
"""

from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from minillm_jax.devices import sharding
from minillm_jax.model import axis_table, ops
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning.solver import Groups, Solver
from minillm_jax.pruning.walk import Collected, InputMoments

# Kind of group -> the matrices of its sublayer that read the residual stream.
INPUT_MATRICES = {
    "head": ("attention.q", "attention.k", "attention.v"),
    "channel": ("mlp.gate", "mlp.up"),
}


def refit_sublayer_inputs(
    kind: str,
    run: Block,
    moments: Collected[InputMoments],
    tokens: tuple[int, int],
    beta: float,
    ridge: float | None,
    solver: Solver | None = None,
    mesh: Mesh | None = None,
    where: str = "",
) -> Block:
    """A layer whose matrices of one sublayer that read the residual stream are refitted.

    Process 0 solves the system for all processes.

    Args:
      kind: `head` for the attention sublayer, `channel` for the MLP sublayer.
      run: the layer, a run of one layer.
      moments: sums of the sublayer's inputs, as the walk collects them.
      tokens: number of tokens in these sums, and in those over the held-out windows.
      beta: β, the strength of the input refit, from 0 (the matrices keep their values) to 1.
      ridge: λ as a share of the mean diagonal of G; None for the one that held-out windows choose.
      solver: solves the system; on the host by default.
      mesh: the devices of the layer.
      where: the layer, for messages.

    Raises:
      InputError: the moments are not finite, or the system has no solution.
    """
    names, chosen = INPUT_MATRICES[kind], solver or Solver()
    width = len(moments.total.inputs)
    problem = chosen.problem(
        moments,
        np.eye(width, dtype=np.float32),
        mesh,
        groups=Groups(width),
        tokens=tokens,
        towards=beta,
        ridge=ridge,
        biased=f"{names[-1]}.bias" in dict(named_arrays(run)),
        where=f"{names[-1]}{where}",
    )
    found = chosen.fit(problem).refit(np.ones(width, bool))
    shift = np.zeros(width) if found.shift is None else found.shift
    linear_map, shift = (sharding.replicated(_float32(part), mesh) for part in (found.kernel, shift))
    return mapped(run, linear_map, shift, names=names, mesh=mesh)


def _float32(array: np.ndarray | Array) -> np.ndarray | Array:
    return array.astype(np.float32)


@partial(jax.jit, static_argnames=("names", "mesh"))
def mapped(
    run: Block,
    linear_map: Float[Array, "D D"],
    shift: Float[Array, " D"],
    *,
    names: tuple[str, ...],
    mesh: Mesh | None,
) -> Block:
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

    return sharding.constrain_run(jax.tree_util.tree_map_with_path(leaf, run), mesh)
