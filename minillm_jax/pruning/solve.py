"""Positive definite systems on the host, in float64.

A function that does not find a solution raises LinAlgError. `solver.Solver` decides what happens then.
"""

from collections.abc import Iterator

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy.linalg import LinAlgError

# Rows of a matrix that are changed at a time.
BLOCK_ROWS = 1024

NOT_DEFINITE = "the matrix is not positive definite in float64"


def solve(matrix: Float[np.ndarray, "I I"], right: Float[np.ndarray, "I D"]) -> Float[np.ndarray, "I D"]:
    """The solution X of matrix · X = right, by a Cholesky factorisation.

    Args:
      matrix: a symmetric, positive definite matrix.
      right: the right-hand sides.

    Raises:
      LinAlgError: the matrix is not positive definite in float64.
    """
    factor = scipy.linalg.cho_factor(matrix, check_finite=False)
    return checked(scipy.linalg.cho_solve(factor, right, check_finite=False))


def inverse(matrix: Float[np.ndarray, "I I"]) -> Float[np.ndarray, "I I"]:
    """The inverse of a symmetric matrix, symmetric up to rounding; errors are those of `solve`."""
    factorise, invert = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
    factor, failed = factorise(matrix, lower=True, clean=True)
    if failed:
        raise LinAlgError(NOT_DEFINITE)
    lower, _ = invert(factor, lower=True, overwrite_c=True)
    for rows in row_blocks(len(lower)):  # dpotri writes the lower triangle only; the upper one holds zeros
        lower[rows, rows.stop :] = lower[rows.stop :, rows].T
        lower[rows, rows] += np.tril(lower[rows, rows], -1).T
    return checked(lower)


def row_blocks(count: int) -> Iterator[slice]:
    """The rows of a matrix in blocks. Work in blocks has no temporary array of the size of the matrix."""
    for first in range(0, count, BLOCK_ROWS):
        yield slice(first, min(first + BLOCK_ROWS, count))


def checked(solution: np.ndarray) -> np.ndarray:
    """The solution.

    Raises:
      LinAlgError: it is not finite, because the matrix is not positive definite.
    """
    if not np.isfinite(solution).all():
        raise LinAlgError(NOT_DEFINITE)
    return solution
