"""Sums and products of float64 in programs of float32 arrays."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.pruning import float64
from minillm_jax.pruning.float64 import Pair, as_float64, in_float64, pair, plus, product


def as_pair(array: np.ndarray) -> Pair:
    """A float64 array as a pair."""
    high = array.astype(np.float32)
    return Pair(jnp.asarray(high), jnp.asarray((array - high).astype(np.float32)))


@pytest.mark.parametrize("inputs", [7, float64.TILE, float64.TILE + 300])
def test_a_product_has_the_digits_of_float64(inputs: int) -> None:
    """Of matrices of one tile, and of tiles that overlap."""
    random = np.random.default_rng(0)
    matrix, right = random.normal(size=(inputs, inputs)).astype(np.float32), random.normal(size=(inputs, 3))
    expected, found = matrix.astype(np.float64) @ right, jax.jit(product)(jnp.asarray(matrix), as_pair(right))
    assert np.abs(as_float64(found) - expected).max() < 1e-12 * inputs
    assert np.abs(np.asarray(found.high) - expected).max() > 1e-9  # float32 alone has not


def test_a_pair_has_48_bits() -> None:
    third, small = as_pair(np.full(4, 1 / 3)), jnp.full(4, 1e-9, jnp.float32)
    assert as_float64(plus(third, small)) == pytest.approx(1 / 3 + 1e-9, rel=1e-14)
    assert as_float64(in_float64(lambda: pair(jnp.full(4, 1 / 7)))()) == pytest.approx(1 / 7, rel=1e-14)


def test_programs_stay_float32_outside() -> None:
    assert all(part.dtype == jnp.float32 for part in product(jnp.ones((2, 2)), as_pair(np.ones((2, 1)))))
    assert jnp.asarray(np.ones(2)).dtype == jnp.float32
