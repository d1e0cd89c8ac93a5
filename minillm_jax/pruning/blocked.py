"""Cholesky factorisation and solution by blocks of a fixed size, for compilers that unroll a factorisation.

XLA for TPUs compiles a factorisation of 2,048 rows in 47 s, and one of 8,806 not in ten minutes. Here a loop factorises
one block of columns at a time, left-looking (Golub and Van Loan, Matrix Computations, section 4.2): the program has the
size of one step, whatever the number of rows. A step multiplies whole matrices, in which the columns that are not
factorised yet are zero. The products take six times the operations of a factorisation that skips them, at the speed of
matrix products.

    J blocks    w rows of a block
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.scipy.linalg
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.model import ops

# Rows of a block.
BLOCK = 128


class Factor(NamedTuple):
    """The Cholesky factor L of a matrix, padded with ones on the diagonal to whole blocks.

    Attributes:
      lower: L, with zeros above the diagonal.
      inverses: the inverse of every block on the diagonal of L.
    """

    lower: Float[Array, "I I"]
    inverses: Float[Array, "J w w"]


def factorise(matrix: Float[Array, "I I"], block: int = BLOCK) -> Factor:
    """The factor of a symmetric matrix; NaN where it is not positive definite.

    Args:
      matrix: float32.
      block: rows of a block.
    """
    count = len(matrix)
    blocks = -(-count // block)
    missing = blocks * block - count
    whole = jnp.pad(matrix, (0, missing)) + jnp.diag(jnp.arange(count + missing) >= count).astype(matrix.dtype)
    rows = jnp.arange(len(whole))[:, None]

    def step(number: Array, factor: Factor) -> Factor:
        first = number * block
        own = lax.dynamic_slice_in_dim(factor.lower, first, block, 0)
        columns = lax.dynamic_slice_in_dim(whole, first, block, 1) - ops.einsum("IK,JK->IJ", factor.lower, own)
        pivot = jnp.linalg.cholesky(lax.dynamic_slice_in_dim(columns, first, block, 0))
        inverse = lax.linalg.triangular_solve(pivot, jnp.eye(block, dtype=matrix.dtype), left_side=True, lower=True)
        below = jnp.where(rows >= first + block, ops.einsum("IK,JK->IJ", columns, inverse), 0)
        columns = lax.dynamic_update_slice_in_dim(below, jnp.tril(pivot), first, 0)
        return Factor(
            lax.dynamic_update_slice_in_dim(factor.lower, columns, first, 1), factor.inverses.at[number].set(inverse)
        )

    empty = Factor(jnp.zeros_like(whole), jnp.zeros((blocks, block, block), matrix.dtype))
    return lax.fori_loop(0, blocks, step, empty)


def forward(factor: Factor, right: Float[Array, "I D"]) -> Float[Array, "padded D"]:
    """The solution Y of L Y = right, padded with zeros to whole blocks."""
    blocks, block, _ = factor.inverses.shape
    padded = jnp.pad(right, ((0, blocks * block - len(right)), (0, 0)))

    def step(number: Array, y: Array) -> Array:
        own = lax.dynamic_slice_in_dim(factor.lower, number * block, block, 0)  # y is zero from this block on
        rest = lax.dynamic_slice_in_dim(padded, number * block, block, 0) - ops.einsum("IK,KD->ID", own, y)
        solved = ops.einsum("IK,KD->ID", factor.inverses[number], rest)
        return lax.dynamic_update_slice_in_dim(y, solved, number * block, 0)

    return lax.fori_loop(0, blocks, step, jnp.zeros_like(padded))


def solve(factor: Factor, right: Float[Array, "I D"]) -> Float[Array, "I D"]:
    """The solution X of L Lᵀ X = right."""
    blocks, block, _ = factor.inverses.shape
    y = forward(factor, right)

    def step(done: Array, x: Array) -> Array:
        number = blocks - 1 - done
        own = lax.dynamic_slice_in_dim(factor.lower, number * block, block, 1)  # x is zero up to this block
        rest = lax.dynamic_slice_in_dim(y, number * block, block, 0) - ops.einsum("KI,KD->ID", own, x)
        solved = ops.einsum("KI,KD->ID", factor.inverses[number], rest)
        return lax.dynamic_update_slice_in_dim(x, solved, number * block, 0)

    return lax.fori_loop(0, blocks, step, jnp.zeros_like(y))[: len(right)]


def inverse_factor(matrix: Float[Array, "I I"]) -> Float[Array, "I I"]:
    """L⁻¹ of a symmetric matrix L Lᵀ, float32; NaN where the matrix is not positive definite."""
    one = jnp.eye(len(matrix), dtype=matrix.dtype)

    def by_blocks() -> Array:
        return forward(factorise(matrix), one)[: len(matrix)]

    def whole() -> Array:
        return lax.linalg.triangular_solve(jnp.linalg.cholesky(matrix), one, left_side=True, lower=True)

    return lax.platform_dependent(tpu=by_blocks, default=whole)


def solve_on_device(matrix: Float[Array, "I I"], right: Float[Array, "I D"], refine: bool) -> Float[Array, "I D"]:
    """The solution X of matrix · X = right, float32; NaN where the matrix is not positive definite.

    TPUs factorise by blocks; other devices have a factorisation of their own.

    Args:
      matrix: symmetric.
      right: the right-hand sides.
      refine: whether one step of iterative refinement follows (Higham, Accuracy and Stability of Numerical Algorithms,
        chapter 12).
    """

    def refined(solution: Callable[[Array], Array]) -> Array:
        first = solution(right)
        return first + solution(right - ops.einsum("IJ,JD->ID", matrix, first)) if refine else first

    def by_blocks() -> Array:
        return refined(partial(solve, factorise(matrix)))

    def whole() -> Array:
        return refined(partial(jax.scipy.linalg.cho_solve, jax.scipy.linalg.cho_factor(matrix)))

    return lax.platform_dependent(tpu=by_blocks, default=whole)
