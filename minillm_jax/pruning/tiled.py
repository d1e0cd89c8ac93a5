"""Symmetric positive definite systems in square tiles, on one device: factorisation, solution and inverse, float32.

A sweep of `blocked` passes over the whole matrix for every 128 rows. Here a matrix of many rows is cut into tiles of
about 1,024 rows, and only the tiles on and above the diagonal are computed. A step takes one row of tiles and updates
the others by products of whole tiles. A factorisation takes I³ / 3 operations and an inverse I³, where a sweep takes
2 I³, with an eighth of the passes over the memory. The steps are loops, so the program has the size of one step (Golub
and Van Loan, Matrix Computations, section 4.2.9).

A = Uᵀ U, and W = U_kk⁻ᵀ for the tile of the diagonal of a step:

    factorisation    U_kc = W A_kc    A_rc ← A_rc − U_krᵀ U_kc             k < r ≤ c
    inverse          E_c  = W A_kc    A_rc ← A_rc − E_rᵀ E_c               r ≤ c, with E_k = −W and A_kc = A_rk = 0

The second is the sweep of `blocked` with a tile as the block: after all steps, A is −A⁻¹.

    I    rows of the matrix      T    rows of a tile        D    columns of a right-hand side
    k    tile row of a step      r, c tile row, tile column
"""

import math
from collections.abc import Callable
from functools import partial

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.model import ops
from minillm_jax.pruning import blocked
from minillm_jax.pruning.blocked import ALL, BLOCK, Rows, by_blocks, inverse_factor

# Most rows of a tile. A matrix of no more rows, or whose rows are shared between devices, is swept (`blocked`).
TILE = 1024

Index = int | Int[Array, ""]
# The tiles on and above the diagonal, row by row: half the memory of the matrix.
Tiles = Float[Array, "tiles T T"]
# The factors of a product that is added to a matrix; None for no product.
Added = tuple[Float[Array, "I K"], Float[Array, "K I"]] | None


def inverse(matrix: Float[Array, "i I"], rows: Rows = ALL, most: int = TILE) -> Float[Array, "i I"]:
    """The inverse of a symmetric matrix; NaN where the matrix is not positive definite.

    Args:
      matrix: this device's rows.
      rows: how the rows lie on the devices.
      most: most rows of a tile.
    """
    if not _has_tiles(matrix, rows, most):
        return blocked.inverse(matrix, rows=rows)
    inside, nothing = jnp.ones(len(matrix), bool), jnp.zeros(len(matrix), matrix.dtype)
    tile = tile_of(len(matrix), most)
    negative = swept(tiles_of(matrix, inside, nothing, most))

    def write(row: Index, height: int, column: Index, width: int, found: Array) -> Array:
        part = _either(negative, row // tile, column // tile)[:height, :width]
        return lax.dynamic_update_slice(found, -part, (row, column))

    return _by_squares(len(matrix), tile, write, matrix)  # in its memory


def solver(
    matrix: Float[Array, "i I"],
    inside: Bool[Array, " I"],
    diagonal: Float[Array, " I"],
    rows: Rows = ALL,
    most: int = TILE,
    added: Added = None,
) -> Callable[[Float[Array, "I D"]], Float[Array, "I D"]]:
    """The function X ↦ A⁻¹ X; its values are NaN where A is not positive definite.

    A has the rows and columns of the matrix that are inside, zeros elsewhere, and the diagonal added.

    Args:
      matrix: this device's rows.
      inside: whether a row is inside.
      diagonal: what is added to the diagonal.
      rows: how the rows lie on the devices.
      most: most rows of a tile.
      added: what is added to the matrix.
    """
    if _has_tiles(matrix, rows, most):
        return partial(solved, factored(tiles_of(matrix, inside, diagonal, most, added)))
    own = rows.own(matrix)
    matrix = matrix if added is None else matrix + ops.einsum("IK,KJ->IJ", added[0][own], added[1])
    changed = jnp.where(inside[own][:, None] & inside[None], matrix, 0)
    changed = changed + jnp.where(own[:, None] == jnp.arange(len(inside))[None], diagonal[None], 0)
    inverted = blocked.inverse(changed, rows=rows)
    return lambda right: blocked.product(inverted, right, rows)


# ------------------------------------------------------------------------------------------------------------ tiles


def _has_tiles(matrix: Float[Array, "i I"], rows: Rows, most: int) -> bool:
    """Whether a matrix is cut into tiles; otherwise it is swept."""
    return rows.axis is None and len(matrix) > most


def tile_of(count: int, most: int = TILE) -> int:
    """Rows of a tile: as many tiles of equal size as needed, in whole blocks."""
    tiles = -(-count // most)
    return BLOCK * -(-count // (tiles * BLOCK))


def tiles_of(
    matrix: Float[Array, "I I"],
    inside: Bool[Array, " I"],
    diagonal: Float[Array, " I"],
    most: int = TILE,
    added: Added = None,
) -> Tiles:
    """The tiles of the matrix A of `solver`, with the identity behind its last row."""
    size = len(matrix)
    tile = tile_of(size, most)
    count = -(-size // tile)
    behind = count * tile - size
    inside, diagonal = jnp.pad(inside, (0, behind)), jnp.pad(diagonal, (0, behind), constant_values=1)

    def cut(row: Index, height: int, column: Index, width: int, tiles: Array) -> Array:
        part = lax.dynamic_slice(matrix, (row, column), (height, width))
        if added is not None:
            left, right = (
                lax.dynamic_slice_in_dim(factor, first, size, axis)
                for axis, (factor, first, size) in enumerate(zip(added, (row, column), (height, width), strict=True))
            )
            part = part + ops.einsum("IK,KJ->IJ", left, right)
        part = jnp.pad(part, ((0, tile - height), (0, tile - width)))
        inside_rows, inside_columns = (lax.dynamic_slice_in_dim(inside, first, tile) for first in (row, column))
        part = jnp.where(inside_rows[:, None] & inside_columns[None], part, 0)
        part = part + jnp.where(row == column, jnp.diag(lax.dynamic_slice_in_dim(diagonal, row, tile)), 0)
        first, second = jnp.minimum(row, column) // tile, jnp.maximum(row, column) // tile
        part = jnp.where(row <= column, part, _tile(tiles, first, second))
        return _with_tile(tiles, part, first, second)

    return _by_squares(size, tile, cut, jnp.zeros((count * (count + 1) // 2, tile, tile), matrix.dtype))


def _by_squares(size: int, tile: int, body: Callable[[Index, int, Index, int, Array], Array], carry: Array) -> Array:
    """`body(first row, rows, first column, columns, carry)` for one square of a matrix after the other."""

    def row(first: Index, height: int, carry: Array) -> Array:
        return by_blocks(size, tile, partial(body, first, height), carry)

    return by_blocks(size, tile, row, carry)


def _count(tiles: Tiles) -> int:
    """Number of tile rows."""
    return math.isqrt(2 * len(tiles))


def _place(tiles: Tiles, row: Index, column: Index) -> Index:
    """Where a tile lies, row ≤ column: behind those of the rows before it."""
    return row * (2 * _count(tiles) - row - 1) // 2 + column


def _tile(tiles: Tiles, row: Index, column: Index) -> Float[Array, "T T"]:
    return lax.dynamic_index_in_dim(tiles, _place(tiles, row, column), 0, keepdims=False)


def _with_tile(tiles: Tiles, tile: Float[Array, "T T"], row: Index, column: Index) -> Tiles:
    return lax.dynamic_update_index_in_dim(tiles, tile, _place(tiles, row, column), 0)


def _either(tiles: Tiles, row: Index, column: Index) -> Float[Array, "T T"]:
    """A tile of the symmetric matrix."""
    found = _tile(tiles, jnp.minimum(row, column), jnp.maximum(row, column))
    return jnp.where(row <= column, found, found.T)


# ------------------------------------------------------------------------------------------------------- algorithms


def factored(tiles: Tiles) -> Tiles:
    """U of A = Uᵀ U above the diagonal, and W = U_kk⁻ᵀ on the diagonal."""
    count = _count(tiles)

    def step(k: Index, tiles: Tiles) -> Tiles:
        whiten = inverse_factor(_tile(tiles, k, k))

        def whitened(c: Index, tiles: Tiles) -> Tiles:
            return _with_tile(tiles, ops.einsum("IJ,JK->IK", whiten, _tile(tiles, k, c)), k, c)

        def update(r: Index, c: Index, tiles: Tiles) -> Tiles:
            change = ops.einsum("IJ,IK->JK", _tile(tiles, k, r), _tile(tiles, k, c))
            return _with_tile(tiles, _tile(tiles, r, c) - change, r, c)

        tiles = lax.fori_loop(k + 1, count, whitened, _with_tile(tiles, whiten, k, k))
        return _upper(k + 1, count, update, tiles)

    return lax.fori_loop(0, count, step, tiles)


def solved(factor: Tiles, right: Float[Array, "I D"]) -> Float[Array, "I D"]:
    """A⁻¹ · right, from `factored`: Uᵀ Y = right, then U X = Y."""
    count, tile = _count(factor), factor.shape[2]
    behind = count * tile - len(right)

    def forward(k: Index, x: Array) -> Array:
        found = ops.einsum("IJ,JD->ID", _tile(factor, k, k), x[k])

        def update(c: Index, x: Array) -> Array:
            return x.at[c].add(-ops.einsum("IJ,ID->JD", _tile(factor, k, c), found))

        return lax.fori_loop(k + 1, count, update, x.at[k].set(found))

    def backward(step: Index, x: Array) -> Array:
        k = count - 1 - step

        def rest(c: Index, left: Array) -> Array:
            return left - ops.einsum("IJ,JD->ID", _tile(factor, k, c), x[c])

        left = lax.fori_loop(k + 1, count, rest, x[k])
        return x.at[k].set(ops.einsum("IJ,ID->JD", _tile(factor, k, k), left))

    x = jnp.pad(right, ((0, behind), (0, 0))).reshape(count, tile, -1)
    x = lax.fori_loop(0, count, backward, lax.fori_loop(0, count, forward, x))
    return x.reshape(count * tile, -1)[: len(right)]


def swept(tiles: Tiles) -> Tiles:
    """The tiles of −A⁻¹ on and above the diagonal."""
    count = _count(tiles)

    def step(k: Index, tiles: Tiles) -> Tiles:
        whiten = inverse_factor(_tile(tiles, k, k))

        def whitened(c: Index, rows: Array) -> Array:
            return rows.at[c].set(ops.einsum("IJ,JK->IK", whiten, _either(tiles, k, c)))

        rows = lax.fori_loop(0, count, whitened, jnp.zeros((count, *tiles.shape[1:]), tiles.dtype)).at[k].set(-whiten)

        def update(r: Index, c: Index, tiles: Tiles) -> Tiles:
            old = jnp.where((r == k) | (c == k), 0, _tile(tiles, r, c))
            return _with_tile(tiles, old - ops.einsum("IJ,IK->JK", rows[r], rows[c]), r, c)

        return _upper(0, count, update, tiles)

    return lax.fori_loop(0, count, step, tiles)


def _upper(first: Index, count: int, update: Callable[[Index, Index, Tiles], Tiles], tiles: Tiles) -> Tiles:
    """`update(r, c, tiles)` for first ≤ r ≤ c < count."""

    def row(r: Index, tiles: Tiles) -> Tiles:
        return lax.fori_loop(r, count, partial(update, r), tiles)

    return lax.fori_loop(first, count, row, tiles)
