"""Systems in tiles: solutions and inverses are those of LAPACK, from the tiles on and above the diagonal."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from minillm_jax.pruning import tiled
from tests.pruning.test_blocked import definite

TILE = tiled.BLOCK


@pytest.mark.parametrize("count", [129, 256, 300, 400])
def test_inverse_is_that_of_lapack(count: int) -> None:
    matrix = definite(count)
    found = jax.jit(partial(tiled.inverse, most=TILE))(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(matrix), atol=1e-4)
    np.testing.assert_allclose(found, found.T, atol=1e-6)  # within a tile, a product rounds as the CPU sums


@pytest.mark.parametrize("count", [300, 256, 40])
def test_solution_is_that_of_the_rows_inside(count: int) -> None:
    """Also of a matrix of one tile, which is swept."""
    random = np.random.default_rng(0)
    matrix, right = definite(count), random.normal(size=(count, 5))
    inside, diagonal = random.random(count) < 0.7, random.random(count)
    changed = np.where(inside[:, None] & inside, matrix, 0) + np.diag(np.where(inside, diagonal, 1))

    @jax.jit
    def solution(matrix: jax.Array, diagonal: jax.Array, right: jax.Array) -> jax.Array:
        return tiled.solver(matrix, jnp.asarray(inside), diagonal, most=TILE)(right)

    arrays = (matrix, np.where(inside, diagonal, 1), right)
    found = solution(*(jnp.asarray(array, jnp.float32) for array in arrays))
    np.testing.assert_allclose(found, np.linalg.solve(changed, right), atol=2e-4)


def test_an_indefinite_matrix_gives_nan_everywhere() -> None:
    matrix = definite(300)
    matrix[200, 200] = -1
    array = jnp.asarray(matrix, jnp.float32)
    solve = tiled.solver(array, jnp.ones(300, bool), jnp.zeros(300), most=TILE)
    assert np.isnan(np.asarray(tiled.inverse(array, most=TILE))).any()
    assert np.isnan(np.asarray(solve(jnp.ones((300, 1))))).all()


@given(st.integers(1, 40_000))
@settings(deadline=None)
def test_tiles_cover_all_rows_with_few_behind_them(count: int) -> None:
    tile = tiled.tile_of(count)
    tiles = -(-count // tile)
    assert tile <= tiled.TILE
    assert tile % tiled.BLOCK == 0
    assert tiles == -(-count // tiled.TILE)
    assert tiles * tile - count < tiles * tiled.BLOCK


def test_squares_below_the_diagonal_are_not_read() -> None:
    matrix = jnp.asarray(definite(300), jnp.float32)
    below = jnp.arange(300)[:, None] // TILE > jnp.arange(300)[None] // TILE
    found, other = (tiled.inverse(jnp.where(below, value, matrix), most=TILE) for value in (0, jnp.nan))
    np.testing.assert_array_equal(found, other)


def test_tiles_on_and_above_the_diagonal_lie_row_by_row() -> None:
    matrix = definite(3 * TILE)
    tiles = tiled.tiles_of(jnp.asarray(matrix), jnp.ones(3 * TILE, bool), jnp.zeros(3 * TILE), TILE)
    squares = matrix.reshape(3, TILE, 3, TILE).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(tiles, squares[np.triu_indices(3)], rtol=1e-6)


def test_the_program_has_one_size_whatever_the_number_of_rows() -> None:
    def lines(count: int) -> int:
        lowered = jax.jit(tiled.inverse).lower(jax.ShapeDtypeStruct((count, count), jnp.float32))
        return lowered.as_text().count("\n")

    assert lines(2048) == lines(8192)
