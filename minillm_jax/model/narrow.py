"""Layers of bfloat16 on a float32 residual stream: products in bfloat16, sums in float32.

A product runs in the promoted type of its operands, and a float32 stream would therefore make every product of a
bfloat16 layer a float32 product, which takes several times as long on accelerators and on CPUs with units for bfloat16.
"""

from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.model.modules import Block, Linear
from minillm_jax.model.tree import replace_linears


class NarrowLinear(Linear):
    """x · kernel + bias, with x rounded to the type of the kernel and the product accumulated in float32."""

    def __init__(self, linear: Linear):
        self.kernel, self.bias = linear.kernel, linear.bias

    def product(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """See `Linear`."""
        return super().product(equation, x.astype(self.kernel.dtype))


def is_narrow(block: Block) -> bool:
    """Whether a layer, or a run of layers, has matrices of bfloat16. float16 has too small a range for all streams."""
    return block.attention.q.kernel.dtype == jnp.bfloat16


def narrowed(block: Block) -> Block:
    """A layer whose products run in the type of its matrices; residual sums and norms keep the type of the stream."""
    return replace_linears(block, lambda name, linear: NarrowLinear(linear))
