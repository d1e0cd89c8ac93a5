"""Positive definite systems: in float64 on the host, or in float32 on the device.

The host solves for the kept rows alone. The device solves systems of full width, in which the identity stands in the
place of all other rows: one program serves every number of kept rows. A function that does not find a solution raises
LinAlgError. `system.Solver` decides what happens then.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import scipy.linalg
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from numpy.linalg import LinAlgError

from minillm_jax.model import ops
from minillm_jax.pruning.blocked import solve_on_device
from minillm_jax.settings import SOLVERS as SOLVERS

# Rows of a matrix on the host that are changed at a time.
BLOCK_ROWS = 1024

NOT_DEFINITE = "the matrix is not positive definite in {type}"


def solve(
    matrix: Float[np.ndarray, "I I"], right: Float[np.ndarray, "I D"], solver: str = "host"
) -> Float[np.ndarray, "I D"]:
    """The solution X of matrix · X = right, by a Cholesky factorisation.

    Args:
      matrix: a symmetric, positive definite matrix.
      right: the right-hand sides.
      solver: `host` (float64), or `device` (float32).

    Raises:
      LinAlgError: the matrix is not positive definite in the solver's type.
    """
    if solver == "device":
        solution = np.asarray(cholesky_solve(jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32)))
        return checked(solution, "float32").astype(np.float64)
    factor = scipy.linalg.cho_factor(matrix, check_finite=False)
    return checked(scipy.linalg.cho_solve(factor, right, check_finite=False), "float64")


def inverse(matrix: Float[np.ndarray, "I I"], solver: str = "host") -> Float[np.ndarray, "I I"]:
    """The inverse of a symmetric matrix, symmetric up to rounding; arguments and errors are those of `solve`."""
    if solver == "device":
        return solve(matrix, np.eye(len(matrix)), solver)
    factorise, invert = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
    factor, failed = factorise(matrix, lower=True, clean=True)
    if failed:
        raise LinAlgError(NOT_DEFINITE.format(type="float64"))
    lower, _ = invert(factor, lower=True, overwrite_c=True)
    for rows in row_blocks(len(lower)):  # dpotri writes the lower triangle only; the upper one holds zeros
        lower[rows, rows.stop :] = lower[rows.stop :, rows].T
        lower[rows, rows] += np.tril(lower[rows, rows], -1).T
    return checked(lower, "float64")


def row_blocks(count: int) -> Iterator[slice]:
    """The rows of a matrix in blocks. Work in blocks has no temporary array of the size of the matrix."""
    for first in range(0, count, BLOCK_ROWS):
        yield slice(first, min(first + BLOCK_ROWS, count))


def product(
    left: Float[np.ndarray, "I J"], right: Float[np.ndarray, "J K"], solver: str = "host"
) -> Float[np.ndarray, "I K"]:
    """The product left · right, in the type of the solver and on its device."""
    if solver == "device":
        return np.asarray(device_product(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)))
    return left @ right


def mask(rows: Int[np.ndarray, " kept"], count: int) -> Bool[np.ndarray, " I"]:
    """Whether each of `count` rows is among `rows`."""
    kept = np.zeros(count, bool)
    kept[rows] = True
    return kept


def checked(solution: np.ndarray, type_name: str) -> np.ndarray:
    """The solution.

    Raises:
      LinAlgError: it is not finite, because the matrix is not positive definite in this type.
    """
    if not np.isfinite(solution).all():
        raise LinAlgError(NOT_DEFINITE.format(type=type_name))
    return solution


@jax.jit
def rows_on_device(
    matrix: Float[Array, "I I"], right: Float[Array, "I D"], kept: Bool[Array, " I"], more: Float[Array, ""]
) -> Float[Array, "I D"]:
    """The solution for the kept rows with a larger ridge, float32, with one step of refinement; zeros elsewhere.

    Args:
      matrix: the matrix of the system at full width.
      right: the right-hand sides, those of the larger ridge.
      kept: whether a row is kept.
      more: what is added to the diagonal.
    """
    both, one = jnp.outer(kept, kept), jnp.eye(len(matrix), dtype=matrix.dtype)
    inside = jnp.where(both, matrix + more * one, one)
    right = jnp.where(kept[:, None], right, 0)
    with jax.default_matmul_precision("highest"):
        return solve_on_device(inside, right, refine=True)


class OnDevice(NamedTuple):
    """The arrays of a system in float32 on the device.

    Attributes:
      matrix: of the system.
      right: its right-hand side.
      kernel: the matrix that the ridge keeps the solution near to.
    """

    matrix: Float[Array, "I I"]
    right: Float[Array, "I D"]
    kernel: Float[Array, "I D"]


@jax.jit
def gains_on_device(
    fit: OnDevice, held: OnDevice, kept: Bool[Array, " I"], more: Float[Array, " ridges"]
) -> Float[Array, " ridges"]:
    """By how much each ridge lowers the squared error on held-out windows; not finite where it has no solution.

    The error of the kept rows W is tr(Wᵀ G W) − 2 tr(Wᵀ R), with the matrix G and the right-hand side R of `held`. Its
    change from W₀ to W is tr((W − W₀)ᵀ (G (W + W₀) − 2 R)), which keeps the digits that a difference of two errors
    loses.

    Args:
      fit: the system of the other windows.
      held: that of the held-out windows, without a ridge.
      kept: whether a row is kept.
      more: the ridges, each as what is added to the diagonal of `fit`.
    """
    before = jnp.where(kept[:, None], fit.kernel, 0)

    def gain(more: Array) -> Array:
        after = rows_on_device(fit.matrix, fit.right + more * fit.kernel, kept, more)
        slope = ops.einsum("IJ,JD->ID", held.matrix, after + before) - 2 * held.right
        return -jnp.sum((after - before) * slope)

    return jax.lax.map(gain, more)


@jax.jit
def cholesky_solve(matrix: Float[Array, "I I"], right: Float[Array, "I D"]) -> Float[Array, "I D"]:
    """`solve` on the device, float32; NaN where the matrix is not positive definite."""
    with jax.default_matmul_precision("highest"):
        return solve_on_device(matrix, right, refine=False)


@jax.jit
def device_product(left: Float[Array, "I J"], right: Float[Array, "J K"]) -> Float[Array, "I K"]:
    """`product` on the device, float32."""
    return ops.einsum("IJ,JK->IK", left, right)
