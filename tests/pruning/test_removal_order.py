"""The removal order of structured OBS against brute force; an error that is not finite is never the least."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.pruning import removal_order
from minillm_jax.pruning.removal_order import Removal, greedy_removal
from tests.pruning.test_refit import obs_update


def on_host(inverse: np.ndarray, products: np.ndarray, count: int, keep: int, parts: int = 1, *more: int) -> Removal:
    return greedy_removal(inverse.copy(), products.copy(), count, keep, parts, *more)


def on_device(
    inverse: np.ndarray, products: np.ndarray, count: int, keep: int, parts: int = 1, gathered: int = 128
) -> Removal:
    program = jax.jit(removal_order.order_on_device, static_argnames=("count", "parts", "gathered"))
    arrays = (jnp.asarray(array, jnp.float32) for array in (inverse, products))
    (order, errors, kept), _ = program(*arrays, jnp.int32(count - keep), count=count, parts=parts, gathered=gathered)
    groups = np.asarray(order)[: count - keep]
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(kept)), np.sort(groups))
    return Removal(groups, np.asarray(errors)[: count - keep])


Order = Callable[..., Removal]
ORDERS = pytest.mark.parametrize("order", [on_host, on_device], ids=["host", "device"])


@ORDERS
@pytest.mark.parametrize("gathered", [128, 3])
@pytest.mark.parametrize("width", [1, 3])
def test_the_order_of_removal_equals_brute_force(width: int, gathered: int, order: Order) -> None:
    """Errors, order and updated weights, against a least-squares solution for every candidate."""
    rng = np.random.default_rng(width)
    count, size = 8, 8 * width
    a, weights = rng.normal(size=(60, size)) @ rng.normal(size=(size, size)), rng.normal(size=(size, 4))
    hessian = a.T @ a + 0.1 * np.eye(size)
    inverse, products = np.linalg.inv(hessian), weights @ weights.T

    def least_squares(kept: list[int]) -> tuple[float, np.ndarray]:
        rows = np.arange(size).reshape(count, width)[kept].ravel()
        solution = np.linalg.solve(hessian[np.ix_(rows, rows)], hessian[rows] @ weights)
        delta = weights.copy()
        delta[rows] -= solution
        return float(np.trace(delta.T @ hessian @ delta)), solution

    def blocks(matrix: np.ndarray) -> np.ndarray:
        return np.stack([matrix[i : i + width, i : i + width] for i in range(0, size, width)])

    errors = [least_squares([g for g in range(count) if g != removed])[0] for removed in range(count)]
    np.testing.assert_allclose(removal_order.removal_errors(blocks(inverse), blocks(products)), errors)
    kept, expected = list(range(count)), []
    for keep in range(count - 1, 0, -1):
        expected.append(min(kept, key=lambda group, kept=kept: least_squares([g for g in kept if g != group])[0]))
        kept.remove(expected[-1])
        if order is on_host or keep == 1:
            found = order(inverse, products, count, keep, 1, gathered)
            assert found.groups.tolist() == expected
            exact = [
                least_squares(np.delete(np.arange(count), expected[:n]).tolist())[0] for n in range(count - keep + 1)
            ]
            np.testing.assert_allclose(np.cumsum(found.errors), exact[1:], rtol=1e-3)
            solution = least_squares(kept)[1]
            np.testing.assert_allclose(
                obs_update(inverse, weights, found.groups, count), solution, rtol=1e-9, atol=1e-12
            )


@ORDERS
def test_every_part_loses_equally_many_groups(order: Order) -> None:
    """Although all groups of the second part cost less than those of the first."""
    products = np.diag([4.0, 3.0, 2.0, 1.0, 0.4, 0.3, 0.2, 0.1])
    assert order(np.eye(8), products, 8, 4).groups.tolist() == [7, 6, 5, 4]
    assert order(np.eye(8), products, 8, 4, 2).groups.tolist() == [7, 6, 3, 2]


def test_an_order_that_takes_more_precision_is_not_guessed() -> None:
    inverse, products = np.diag([1e-60, 1e-60, 1e-60]), np.diag([3.0, 1.0, 2.0])
    assert not np.isfinite(on_device(inverse, products, 3, 1).errors).all()
    assert on_host(inverse, products, 3, 1).groups.tolist() == [1, 2]
    for broken in (np.nan, -1.0):
        with pytest.raises(np.linalg.LinAlgError, match="more precision than float64"):
            on_host(np.diag([1.0, broken, 1.0]), np.diag([3.0, 1.0, 2.0]), 3, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_error_that_is_not_finite_is_refused(value: float) -> None:
    """The solver of the walk then tries the host, and larger ridges."""
    inverse, products = np.eye(6), np.diag([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    products[2, 2] = value
    if value == np.inf:  # an infinite error is the last of all, and is refused once nothing else is left
        assert on_host(inverse, products, 6, 1).groups.tolist() == [5, 4, 3, 1, 0]
        return
    assert not np.isfinite(on_device(inverse, products, 6, 3).errors).all()
    with pytest.raises(np.linalg.LinAlgError, match="the order of removal takes more precision than float"):
        on_host(inverse, products, 6, 3)


def test_a_block_that_is_not_positive_definite_is_refused() -> None:
    inverse = np.eye(6)
    inverse[2:4, 2:4] = 0.0
    with pytest.raises(np.linalg.LinAlgError):
        greedy_removal(inverse, np.eye(6), 3, 1)
