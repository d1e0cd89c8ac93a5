"""The modules of a decoder: attention, MLP, experts, norms and linear maps (letters: see `axis_table`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from minillm_jax.model import ops
from minillm_jax.model.config import DecoderConfig

# Name of the outputs of linear maps, for the policies of `jax.checkpoint`.
PRODUCT = "product"

# Cosine and sine of the rotary angles; None for a model without rotary positions. In a model with two kinds of them, a
# first axis of size two comes before the batch, and the data of a layer choose one. In a model whose queries grow with
# their positions, that axis has the angles of the keys and those of the queries.
Angles = tuple[Float[Array, "*places half"], Float[Array, "*places half"]] | None


class Branches(NamedTuple):
    """Where the tokens of a sequence stand that holds a prefix and, one behind the other, several continuations of it.

    Attributes:
      positions: of the tokens; those of every continuation go on from the end of the prefix.
      numbers: 0 for the tokens of the prefix, and a number for those of each continuation.
    """

    positions: Int[Array | np.ndarray, "B T"]
    numbers: Int[Array | np.ndarray, "B T"]


class LayerCache(NamedTuple):
    """Keys and values of the earlier tokens of every sequence, for one layer of a run.

    Attributes:
      keys: of all layers of the run; key s of a sequence has position s.
      values: in the same places.
      layer: the layer in the run.
      positions: of the new tokens.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    layer: Int[Array, ""]
    positions: Int[Array, "B T"]

    def extended(self, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]) -> "LayerCache":
        """With the keys and values of the new tokens; those of positions beyond the cache are dropped."""
        rows = jnp.expand_dims(jnp.arange(keys.shape[0]), 1)
        place = (self.layer, rows, self.positions)
        return self._replace(
            keys=self.keys.at[place].set(keys.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[place].set(values.astype(self.values.dtype), mode="drop"),
        )


class LayerData(nnx.Variable):
    """Data of a layer that are not parameters: its sliding window, its rotary positions, the ALiBi slopes."""


class Linear(nnx.Module):
    """x · kernel + bias, along the axes of an einsum equation."""

    def __init__(self, kernel: Any, bias: Any = None):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product along the axes of the equation, plus the bias along the last axes."""
        y = checkpoint_name(self.product(equation, x), PRODUCT)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)

    def product(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product along the axes of the equation."""
        return ops.linear(equation, x, self.kernel[...])


class Norm(nnx.Module):
    """A norm over the last axis. The configuration holds its kind and its epsilon."""

    def __init__(self, scale: Any = None, bias: Any = None):
        self.scale = None if scale is None else nnx.Param(scale)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "..."], config: DecoderConfig) -> Float[Array, "..."]:
        """The norm of x over the last axis."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return ops.norm(x, scale, bias, config.norm, config.norm_epsilon)

    def of_heads(self, x: Float[Array, "B T N H"], config: DecoderConfig) -> Float[Array, "B T N H"]:
        """The norm over the features of all heads of a token; the scale has the axes N and H."""
        scale = None if self.scale is None else self.scale[...].reshape(-1)
        joined = ops.norm(ops.merge_last(x, 2), scale, None, config.norm, config.norm_epsilon)
        return joined.reshape(x.shape)


class Attention(nnx.Module):
    """Projections of grouped-query attention, norms of queries and keys, and data: window, slopes, rotary positions.

    The norms are of each head (`q_norm`, `k_norm`) or of all heads together (`q_joint_norm`, `k_joint_norm`).
    """

    def __init__(
        self,
        q: Linear,
        k: Linear,
        v: Linear,
        o: Linear,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        window: Any = None,
        slopes: Any = None,
        rope: Any = None,
        q_joint_norm: Norm | None = None,
        k_joint_norm: Norm | None = None,
        sinks: Any = None,
    ):
        self.q, self.k, self.v, self.o = q, k, v, o
        self.q_norm, self.k_norm = q_norm, k_norm
        self.q_joint_norm, self.k_joint_norm = q_joint_norm, k_joint_norm
        self.window = None if window is None else LayerData(window)
        self.slopes = None if slopes is None else LayerData(slopes)
        self.rope = None if rope is None else LayerData(rope)
        self.sinks = None if sinks is None else nnx.Param(sinks)


class MLP(nnx.Module):
    """Matrices of the MLP: down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    def __init__(self, gate: Linear | None, up: Linear, down: Linear):
        self.gate, self.up, self.down = gate, up, down


class Experts(nnx.Module):
    """The router and the experts of a mixture of experts, named as in `axis_table`; None for arrays that are missing.

    Experts are not `Linear`: their matrices share one axis X, along which a token chooses.
    """

    def __init__(self, arrays: Mapping[str, Any]):
        def array(name: str) -> nnx.Param | None:
            return nnx.Param(arrays[name]) if name in arrays else None

        self.router, self.gate, self.up, self.down = (
            nnx.Param(arrays[name]) for name in ("router", "gate", "up", "down")
        )
        self.router_bias, self.choice_bias = array("router_bias"), array("choice_bias")
        self.gate_bias, self.up_bias, self.down_bias = array("gate_bias"), array("up_bias"), array("down_bias")
        self.shared_gate = array("shared_gate")

    def low_rank(self) -> Mapping[str, Array]:
        """The factors that are added to the matrices: `gate_a` [X, D, R], `gate_b` [X, R, W], ...; none here."""
        return {}


class Block(nnx.Module):
    """One layer, or a run of equal layers, whose arrays have a leading axis L."""

    def __init__(
        self,
        attention_norm: Norm | None,
        attention: Attention,
        mlp_norm: Norm | None,
        mlp: MLP,
        attention_post_norm: Norm | None = None,
        mlp_post_norm: Norm | None = None,
        experts: Experts | None = None,
    ):
        self.attention_norm, self.attention, self.attention_post_norm = attention_norm, attention, attention_post_norm
        self.mlp_norm, self.mlp, self.mlp_post_norm = mlp_norm, mlp, mlp_post_norm
        self.experts = experts


def experts_of(block: Block) -> Experts:
    """The experts of a layer that has some."""
    assert block.experts is not None, "the layer has experts"
    return block.experts


def depth(run: Block) -> int:
    """Number of layers of a run."""
    return run.attention.q.kernel.shape[0]


def run_letters(run: Block) -> dict[str, int]:
    """The size of every axis letter of the layers of a run."""
    d, n, h = run.attention.q.kernel.shape[1:]
    x, w = (0, 0) if run.experts is None else run.experts.down.shape[1:3]
    letters = {"D": d, "N": n, "H": h, "K": run.attention.k.kernel.shape[2], "F": run.mlp.down.kernel.shape[1]}
    return letters | {"X": x, "W": w, "1": min(x, 1)}
