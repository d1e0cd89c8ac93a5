"""The removal order of structured OBS where an error is not finite: NaN is never the cheapest removal."""

import numpy as np
import pytest

from minillm_jax.pruning.removal_order import greedy_removal
from minillm_jax.pruning.solve import SOLVERS


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_error_that_is_not_finite_is_refused(value: float, solver: str) -> None:
    """The solver of the walk then tries the host, and larger ridges."""
    inverse, products = np.eye(6), np.diag([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    products[2, 2] = value
    if value == np.inf:  # an infinite error is the last of all, and is refused once nothing else is left
        assert greedy_removal(inverse.copy(), products.copy(), 6, 1, 1, "host").groups.tolist() == [5, 4, 3, 1, 0]
        return
    with pytest.raises(np.linalg.LinAlgError, match="the order of removal takes more precision than float"):
        greedy_removal(inverse, products, 6, 3, 1, solver)


def test_a_block_that_is_not_positive_definite_is_refused() -> None:
    inverse = np.eye(6)
    inverse[2:4, 2:4] = 0.0
    with pytest.raises(np.linalg.LinAlgError):
        greedy_removal(inverse, np.eye(6), 3, 1)
