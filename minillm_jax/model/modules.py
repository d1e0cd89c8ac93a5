"""The parts of a decoder: plain pytrees of arrays that know how to compute their part (letters: see `axis_table`)."""

from typing import Any

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.model import ops
from minillm_jax.model.config import DecoderConfig

# Cosine and sine of the rotary angles, or None where positions come in otherwise.
Angles = tuple[Float[Array, "T half"], Float[Array, "T half"]] | None


class LayerData(nnx.Variable):
    """What a layer knows besides its weights: its sliding window, its heads' ALiBi slopes."""


class Linear(nnx.Module):
    """x · kernel + bias, along the axes that the einsum equation names."""

    def __init__(self, kernel: Any, bias: Any = None):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product along the equation's axes, plus the bias along its last ones."""
        y = ops.einsum(equation, x, self.kernel[...])
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


class Norm(nnx.Module):
    """A norm over the last axis; which kind, the configuration says."""

    def __init__(self, scale: Any = None, bias: Any = None):
        self.scale = None if scale is None else nnx.Param(scale)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "..."], config: DecoderConfig) -> Float[Array, "..."]:
        """The norm over the last axis."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return ops.norm(x, scale, bias, config.norm, config.norm_epsilon)


class Attention(nnx.Module):
    """Projections of grouped-query attention; q and k norms act on each head; window and slopes are data."""

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
    ):
        self.q, self.k, self.v, self.o = q, k, v, o
        self.q_norm, self.k_norm = q_norm, k_norm
        self.window = None if window is None else LayerData(window)
        self.slopes = None if slopes is None else LayerData(slopes)


class MLP(nnx.Module):
    """Projections of the MLP: down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    def __init__(self, gate: Linear | None, up: Linear, down: Linear):
        self.gate, self.up, self.down = gate, up, down


class Block(nnx.Module):
    """One layer, or a run of equal layers when its arrays carry a leading axis L."""

    def __init__(
        self,
        attention_norm: Norm,
        attention: Attention,
        mlp_norm: Norm,
        mlp: MLP,
        attention_post_norm: Norm | None = None,
        mlp_post_norm: Norm | None = None,
    ):
        self.attention_norm, self.attention, self.attention_post_norm = attention_norm, attention, attention_post_norm
        self.mlp_norm, self.mlp, self.mlp_post_norm = mlp_norm, mlp, mlp_post_norm


def depth(run: Block) -> int:
    """Number of layers of a run."""
    return run.attention.q.kernel.shape[0]
