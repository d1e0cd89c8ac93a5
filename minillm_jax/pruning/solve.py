"""Positive definite systems: in float64 on the host, or in float32 on the device."""

import jax
import jax.scipy.linalg
import numpy as np
import scipy.linalg
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.model import ops
from minillm_jax.settings import SOLVERS as SOLVERS


def solve(
    matrix: Float[np.ndarray, "I I"], right: Float[np.ndarray, "I D"], floor: float, solver: str = "host"
) -> Float[np.ndarray, "I D"]:
    """The solution X of matrix · X = right, by a Cholesky factorisation.

    Rounding can make a matrix indefinite. Its eigenvalues below `floor` are then raised to `floor`.

    Args:
      matrix: a symmetric matrix whose eigenvalues are at least `floor`, up to rounding errors.
      right: the right-hand sides.
      floor: the ridge that the matrix contains, positive.
      solver: `host` (float64), or `device` (float32; a system that fails on the device is solved on the host).
    """
    if solver == "device":
        solution = np.asarray(_on_device(jnp.asarray(matrix, jnp.float32), jnp.asarray(right, jnp.float32)))
        if np.isfinite(solution).all():
            return solution.astype(np.float64)
    try:
        return scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix), right)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        return vectors @ ((vectors.T @ right) / np.maximum(values, floor)[:, None])


def inverse(matrix: Float[np.ndarray, "I I"], floor: float, solver: str = "host") -> Float[np.ndarray, "I I"]:
    """The inverse of a symmetric matrix, symmetric up to rounding; the arguments are those of `solve`."""
    if solver == "device":
        return solve(matrix, np.eye(len(matrix)), floor, solver)
    factorise, invert = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
    factor, failed = factorise(matrix, lower=True, clean=True)
    if failed:
        return solve(matrix, np.eye(len(matrix)), floor)
    lower, _ = invert(factor, lower=True, overwrite_c=True)
    lower += np.tril(lower, -1).T  # dpotri writes the lower triangle only; the upper one holds zeros
    return lower


def product(
    left: Float[np.ndarray, "I J"], right: Float[np.ndarray, "J K"], solver: str = "host"
) -> Float[np.ndarray, "I K"]:
    """The product left · right, in the type of the solver and on its device."""
    if solver == "device":
        return np.asarray(_product_on_device(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)))
    return left @ right


@jax.jit
def _on_device(matrix: Float[Array, "I I"], right: Float[Array, "I D"]) -> Float[Array, "I D"]:
    with jax.default_matmul_precision("highest"):
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), right)


@jax.jit
def _product_on_device(left: Float[Array, "I J"], right: Float[Array, "J K"]) -> Float[Array, "I K"]:
    return ops.einsum("IJ,JK->IK", left, right)
