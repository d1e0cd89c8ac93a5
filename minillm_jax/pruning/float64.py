"""Sums and products of float64 inside programs of float32 arrays.

A float64 array between two functions is a `Pair`: a float32 array, and what its rounding lost, 48 bits together. CPUs
and GPUs have float64. For a TPU, XLA cuts the operands of a float64 product into slices of bfloat16, whose products are
exact (Ozaki et al., Error-free transformations of matrix multiplication, Numerical Algorithms 59, 2012).

    I    rows of a matrix        i    those of this device        D    columns of a right-hand side
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.devices.sharding import gather
from minillm_jax.pruning.blocked import ALL, Rows, block_of

# Most rows and columns of a tile of a product: for a TPU, the slices of both operands are 24 times as large.
TILE = 1024

P = ParamSpec("P")
R = TypeVar("R")


class Pair(NamedTuple):
    """A float64 array as the sum of two float32 arrays.

    Attributes:
      high: the array, rounded.
      low: the rest, rounded.
    """

    high: Float[Array, "..."]
    low: Float[Array, "..."]


def in_float64(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose arrays may be float64 while it is traced. Its arguments and results are float32."""

    @wraps(function)
    def wide(*arguments: P.args, **settings: P.kwargs) -> R:
        with jax.enable_x64(True):
            return function(*arguments, **settings)

    return wide


def double(array: Array | Pair) -> Float[Array, "..."]:
    """An array or a pair in float64; for functions of `in_float64`."""
    return double(array.high) + double(array.low) if isinstance(array, Pair) else array.astype(jnp.float64)


def pair(array: Float[Array, "..."]) -> Pair:
    """A float64 array as a pair; for functions of `in_float64`."""
    high = array.astype(jnp.float32)
    return Pair(high, (array - high.astype(jnp.float64)).astype(jnp.float32))


def number(value: float) -> Pair:
    """A number as a pair, for a program's argument."""
    high = np.float32(value)
    return Pair(jnp.float32(high), jnp.float32(value - float(high)))


def as_float64(found: Pair) -> Float[np.ndarray, "..."]:
    """A pair on the host. With several processes, every one must call this."""
    return gather(found.high).astype(np.float64) + gather(found.low)


@in_float64
def plus(left: Pair, right: Array | Pair) -> Pair:
    """The sum of two arrays."""
    return pair(double(left) + double(right))


def product(matrix: Float[Array, "i I"], right: Pair, rows: Rows = ALL) -> Pair:
    """Matrix · right, [I, D], tile by tile.

    The last tiles overlap those before, so that all have one shape: a float64 product takes a TPU's compiler 15 s.

    Args:
      matrix: this device's rows.
      right: [I, D], this device's columns.
      rows: how the rows lie on the devices.
    """
    inputs = matrix.shape[1]
    width, height = min(TILE, inputs), min(TILE, inputs) if rows.axis is None else block_of(len(matrix))

    def row(number: Array, found: Pair) -> Pair:
        first = jnp.minimum(number * height, inputs - height)
        part = rows.take(matrix, first, height)

        def column(number: Array, total: Pair) -> Pair:
            start = jnp.minimum(number * width, inputs - width)
            new = start + jnp.arange(width) >= number * width
            values = (jnp.where(new[:, None], lax.dynamic_slice_in_dim(array, start, width, 0), 0) for array in right)
            return _plus_product(total, lax.dynamic_slice_in_dim(part, start, width, 1), Pair(*values))

        nothing = jnp.zeros((height, right.high.shape[1]))
        total = lax.fori_loop(0, -(-inputs // width), column, Pair(nothing, nothing))
        write = partial(lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        return Pair(*(write(array, new) for array, new in zip(found, total, strict=True)))

    nothing = jnp.zeros_like(right.high)
    return lax.fori_loop(0, -(-inputs // height), row, Pair(nothing, nothing))


@in_float64
def _plus_product(total: Pair, left: Float[Array, "I J"], right: Pair) -> Pair:
    return pair(double(total) + jnp.matmul(double(left), double(right), precision=lax.Precision.HIGHEST))
