"""The inverse of a symmetric matrix, in the memory of the matrix, by blocks of a fixed size.

It is for compilers that unroll a Cholesky factorisation, and for matrices whose rows are shared between devices. XLA
for TPUs compiles a factorisation of 2,048 rows in 47 s, and one of 8,806 not in ten minutes. Here a loop sweeps one
block of rows at a time, so that the program has the size of one step, whatever the number of rows. Larger matrices of
one device are cut into tiles, which are swept by these functions (`tiled`).

The sweep operator (Goodnight, A Tutorial on the SWEEP Operator, 1979) is Gauss-Jordan elimination that keeps a matrix
symmetric. For the rows B of a block, with the pivot A_BB = R Rᵀ and the rows E = R⁻¹ A_B:, which have −R⁻¹ in the
columns B, it is

    A ← A₀ − Eᵀ E        A₀: A with zeros in the rows and columns B

When all blocks are swept, A is −A⁻¹, and the rows E up to the columns B are those of −L⁻¹, with A = L Lᵀ. All pivots of
a positive definite matrix are positive definite. An inverse takes 2 I³ operations, nearly all in matrix products.

Where the rows of a matrix are shared (`Rows`), each device sweeps its own rows. A step sends one block of rows to all
devices.

    I    rows of the matrix        i    those of this device
    J    rows of a block           D    columns of a right-hand side on this device
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from minillm_jax.model import ops

# Rows of a block.
BLOCK = 128
# Rows that are updated at a time: the updates of a step take this many rows of memory.
UPDATED = 1024

Carry = TypeVar("Carry")


class Rows(NamedTuple):
    """How the rows of square matrices lie on devices: all on each, or equally many neighbouring ones on each.

    Attributes:
      axis: the axis of the mesh that shares the rows, inside `jax.shard_map`; None for all rows on each device.
    """

    axis: str | None = None

    @property
    def shares(self) -> int:
        """Number of devices that share the rows."""
        return 1 if self.axis is None else lax.axis_size(self.axis)

    def own(self, array: Shaped[Array, "i ..."]) -> Int[Array, " i"]:
        """The indices of this device's rows."""
        first = 0 if self.axis is None else lax.axis_index(self.axis) * len(array)
        return first + jnp.arange(len(array))

    def mine(self, array: Shaped[Array, "I ..."]) -> Shaped[Array, "i ..."]:
        """This device's rows of an array that is whole on each."""
        if self.axis is None:
            return array
        count = len(array) // self.shares
        return lax.dynamic_slice_in_dim(array, lax.axis_index(self.axis) * count, count, 0)

    def take(self, array: Shaped[Array, "i ..."], first: int | Array, count: int) -> Shaped[Array, "count ..."]:
        """Rows on every device, from an array with this device's rows; they lie on one device."""
        if self.axis is None:
            return lax.dynamic_slice_in_dim(array, first, count, 0)
        place = first - lax.axis_index(self.axis) * len(array)
        found = lax.dynamic_slice_in_dim(array, jnp.clip(place, 0, len(array) - count), count, 0)
        return lax.psum(jnp.where((place >= 0) & (place < len(array)), found, 0), self.axis)

    def whole(self, array: Shaped[Array, "i ..."], axis: int = 0) -> Shaped[Array, "I ..."]:
        """The rows (or another axis) of all devices on each."""
        return array if self.axis is None else lax.all_gather(array, self.axis, axis=axis, tiled=True)

    def total(self, value: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The sum over the devices."""
        return value if self.axis is None else lax.psum(value, self.axis)


ALL = Rows()


def inverse(matrix: Float[Array, "i I"], block: int | None = None, rows: Rows = ALL) -> Float[Array, "i I"]:
    """The inverse of a symmetric matrix, float32; NaN where the matrix is not positive definite.

    Args:
      matrix: this device's rows.
      block: rows of a block; by default `BLOCK`, and `block_of` the rows of a device where the rows are shared.
      rows: how the rows lie on the devices.
    """
    block = block or (BLOCK if rows.axis is None else block_of(len(matrix)))

    def sweep(first: int | Array, width: int, array: Array) -> Array:
        pivot_rows, inside = _pivot_rows(array, first, width, rows)
        return _swept(array, pivot_rows, inside, rows)

    return -by_blocks(matrix.shape[1], block, sweep, matrix)


def inverse_factor(matrix: Float[Array, "I I"], block: int = BLOCK) -> Float[Array, "I I"]:
    """L⁻¹ of a symmetric matrix L Lᵀ, float32; NaN where the matrix is not positive definite."""

    def sweep(first: int | Array, width: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        array, factor = carry
        pivot_rows, inside = _pivot_rows(array, first, width, ALL)
        lower = jnp.where(jnp.arange(len(matrix))[None] < first + width, -pivot_rows, 0)
        factor = lax.dynamic_update_slice_in_dim(factor, lower, first, 0)
        return _swept(array, pivot_rows, inside, ALL), factor

    return by_blocks(len(matrix), block, sweep, (matrix, jnp.zeros_like(matrix)))[1]


def _pivot_rows(
    array: Float[Array, "i I"], first: int | Array, width: int, rows: Rows
) -> tuple[Float[Array, "J I"], Bool[Array, " I"]]:
    """The rows E of a block, and which columns are its own."""
    block = rows.take(array, first, width)
    one = ((first + jnp.arange(width))[:, None] == jnp.arange(array.shape[1])[None]).astype(array.dtype)
    # A product in the place of a slice of columns, for which a TPU would hold a transposed copy of the whole matrix.
    pivot = ops.einsum("JI,KI->JK", block, one)
    root = jnp.linalg.cholesky(pivot)
    whiten = lax.linalg.triangular_solve(root, jnp.eye(width, dtype=array.dtype), left_side=True, lower=True)
    inside = jnp.any(one != 0, axis=0)
    return ops.einsum("JK,KI->JI", whiten, jnp.where(inside[None], -one, block)), inside


def _swept(
    array: Float[Array, "i I"], pivot_rows: Float[Array, "J I"], inside: Bool[Array, " I"], rows: Rows
) -> Float[Array, "i I"]:
    """A₀ − Eᵀ E, some rows at a time."""
    own_inside, own = rows.mine(inside), rows.mine(pivot_rows.T)

    def update(first: int | Array, count: int, array: Array) -> Array:
        old, removed, left = (lax.dynamic_slice_in_dim(part, first, count, 0) for part in (array, own_inside, own))
        old = jnp.where(inside[None] | removed[:, None], 0, old)
        new = old - ops.einsum("IJ,JK->IK", left, pivot_rows)
        return lax.dynamic_update_slice_in_dim(array, new, first, 0)

    return by_blocks(len(array), UPDATED, update, array)


def by_blocks(count: int, width: int, body: Callable[[int | Array, int, Carry], Carry], carry: Carry) -> Carry:
    """`body(first row, number of rows, carry)` for one block of rows after the other; the last one may be smaller."""
    blocks, rest = divmod(count, width)
    if blocks:
        carry = lax.fori_loop(0, blocks, lambda number, carry: body(number * width, width, carry), carry)
    return body(blocks * width, rest, carry) if rest else carry


def product(matrix: Float[Array, "i I"], right: Float[Array, "I D"], rows: Rows = ALL) -> Float[Array, "I D"]:
    """Matrix · right. With shared rows, the blocks of the matrix pass all devices one at a time."""
    if rows.axis is None:
        return ops.einsum("IJ,JD->ID", matrix, right)
    block = block_of(len(matrix))

    def step(number: Array, found: Array) -> Array:
        part = ops.einsum("IJ,JD->ID", rows.take(matrix, number * block, block), right)
        return lax.dynamic_update_slice_in_dim(found, part, number * block, 0)

    return lax.fori_loop(0, len(right) // block, step, jnp.zeros_like(right))


def block_of(count: int) -> int:
    """Rows of a block that divide the rows of a device: the largest power of two up to `BLOCK`."""
    return min(BLOCK, count & -count)
