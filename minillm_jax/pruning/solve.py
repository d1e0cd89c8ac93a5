"""Positive definite systems: in float64 on the host, or in float32 on the device.

A function that does not find a solution raises LinAlgError. `system.Solver` decides what happens then.
"""

import jax
import jax.scipy.linalg
import numpy as np
import scipy.linalg
from jax import numpy as jnp
from jaxtyping import Array, Float
from numpy.linalg import LinAlgError

from minillm_jax.model import ops
from minillm_jax.settings import SOLVERS as SOLVERS

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
        return _checked(solution, "float32").astype(np.float64)
    factor = scipy.linalg.cho_factor(matrix, check_finite=False)
    return _checked(scipy.linalg.cho_solve(factor, right, check_finite=False), "float64")


def inverse(matrix: Float[np.ndarray, "I I"], solver: str = "host") -> Float[np.ndarray, "I I"]:
    """The inverse of a symmetric matrix, symmetric up to rounding; arguments and errors are those of `solve`."""
    if solver == "device":
        return solve(matrix, np.eye(len(matrix)), solver)
    factorise, invert = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
    factor, failed = factorise(matrix, lower=True, clean=True)
    if failed:
        raise LinAlgError(NOT_DEFINITE.format(type="float64"))
    lower, _ = invert(factor, lower=True, overwrite_c=True)
    lower += np.tril(lower, -1).T  # dpotri writes the lower triangle only; the upper one holds zeros
    return _checked(lower, "float64")


def product(
    left: Float[np.ndarray, "I J"], right: Float[np.ndarray, "J K"], solver: str = "host"
) -> Float[np.ndarray, "I K"]:
    """The product left · right, in the type of the solver and on its device."""
    if solver == "device":
        return np.asarray(device_product(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)))
    return left @ right


def _checked(solution: np.ndarray, type_name: str) -> np.ndarray:
    if not np.isfinite(solution).all():
        raise LinAlgError(NOT_DEFINITE.format(type=type_name))
    return solution


@jax.jit
def cholesky_solve(matrix: Float[Array, "I I"], right: Float[Array, "I D"]) -> Float[Array, "I D"]:
    """`solve` on the device, float32; NaN where the matrix is not positive definite."""
    with jax.default_matmul_precision("highest"):
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), right)


@jax.jit
def device_product(left: Float[Array, "I J"], right: Float[Array, "J K"]) -> Float[Array, "I K"]:
    """`product` on the device, float32."""
    return ops.einsum("IJ,JK->IK", left, right)
