"""Structured OBS: the order in which the groups of one matrix are removed.

The error of a matrix with weights W, on inputs with second moments H, is the quadratic tr(Δᵀ H Δ) of its change Δ.
The removal of a group with the rows S costs at least tr((H⁻¹_SS)⁻¹ M_SS), where M = W Wᵀ. The update of OBS reaches
that minimum: W ← W − H⁻¹_:S (H⁻¹_SS)⁻¹ W_S. The inverse of the remaining system is H⁻¹ − H⁻¹_:S (H⁻¹_SS)⁻¹ H⁻¹_S:.
Sources: Hassibi and Stork, 1993; for groups Kurtic et al., ZipLM, arXiv 2302.04089.

The order needs M, but not W. With H⁻¹_SS = R Rᵀ, N = R⁻¹ H⁻¹_S: and P = R⁻¹ M_S: − ½ (R⁻¹ M_SS R⁻ᵀ) N, the removal of
a group updates both matrices:

    H⁻¹ ← H⁻¹ − Nᵀ N        M ← M − Nᵀ P − Pᵀ N

This is a Cholesky factorisation of H⁻¹ that chooses its pivots by their cost, and updates M along with H⁻¹. As in a
blocked factorisation, the rows N and P of several groups are gathered first. One matrix product then applies all
gathered rows to each matrix. Between two such updates, the program computes the current rows of the next group only,
and updates the diagonal block of every group.

The host computes this in NumPy and float64, a device in JAX and float32, where the rows of both matrices may be shared
between devices (`blocked.Rows`): each applies the gathered rows to its own rows.

    G groups    R gathered rows at most    w features of a group    i of I rows on this device
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.pruning import blocked, solve
from minillm_jax.pruning.blocked import ALL, UPDATED, Rows, by_blocks

# Rows N and P that are gathered before both matrices are updated.
GATHERED = 128

Matrix = Float[Array, "_ _"] | Float[np.ndarray, "_ _"]
Blocks = Float[Array, "_ _ _"] | Float[np.ndarray, "_ _ _"]


class _State(NamedTuple):
    """The system during the removal, as NumPy or JAX arrays.

    Attributes:
      inverse: [i, I], H⁻¹ after its last update.
      products: [i, I], M after its last update.
      n: [R, I], the rows N gathered since the last update; zero in rows not yet filled, and in the columns of removed
        groups.
      p: [R, I], the rows P gathered since the last update.
      inverse_blocks: [G, w, w], the diagonal block of H⁻¹ of every group; current for all kept groups.
      product_blocks: [G, w, w], the diagonal block of M of every group; current for all kept groups.
      kept: [G], whether a group is kept so far.
      to_remove: number of groups still to be removed from each part.
    """

    inverse: Matrix
    products: Matrix
    n: Matrix
    p: Matrix
    inverse_blocks: Blocks
    product_blocks: Blocks
    kept: Bool[Array, " _"] | Bool[np.ndarray, " _"]
    to_remove: Int[Array, " _"] | Int[np.ndarray, " _"]


def products_of_best(inverse: Float[np.ndarray, "I I"], right: Float[np.ndarray, "I D"]) -> Float[np.ndarray, "I I"]:
    """M = W Wᵀ of the least-squares weights before any removal, W = H⁻¹ · right."""
    weights = inverse @ right
    return weights @ weights.T


class Removal(NamedTuple):
    """The removed groups of a matrix, in the order of removal.

    Attributes:
      groups: their indices.
      errors: the error that each removal adds, tr(Δᵀ H Δ) over the best change Δ of the remaining weights.
    """

    groups: Int[np.ndarray, " removed"]
    errors: Float[np.ndarray, " removed"]


class Removed(NamedTuple):
    """The same on a device. Entries of `order` and `errors` behind the number of removed groups mean nothing.

    Attributes:
      order: the groups in the order of removal.
      errors: the error of each removal; one that is not finite says that float32 was not precise enough.
      kept: whether a group remains.
    """

    order: Int[Array, " groups"]
    errors: Float[Array, " groups"]
    kept: Bool[Array, " groups"]


def greedy_removal(
    inverse: Float[np.ndarray, "I I"],
    products: Float[np.ndarray, "I I"],
    count: int,
    keep: int,
    parts: int = 1,
    gathered: int = GATHERED,
) -> Removal:
    """The removed groups in the order of removal, with the error of each; on the host, in float64.

    Each step removes the group with the least error, of equal ones the group with the lowest index, until `keep`
    groups remain.

    Args:
      inverse: H⁻¹, symmetric and positive definite. It is overwritten, as is `products`.
      products: M = W Wᵀ of the least-squares weights W before any removal.
      count: number of groups. Each group has equally many neighbouring features.
      keep: number of kept groups.
      parts: number of parts, each of equally many neighbouring groups. Every part loses equally many groups.
      gathered: number of gathered rows after which both matrices are updated, rounded down to whole groups.

    Raises:
      LinAlgError: a group is not positive definite, so that its error is not known.
    """
    inverse, products = (np.require(matrix, np.float64, "W") for matrix in (inverse, products))
    state = _begin(inverse, products, count, count - keep, parts, gathered)
    groups, errors, width = [], [], len(inverse) // count
    for _ in range(count - keep):
        place = len(groups) * width % len(state.n)
        with np.errstate(invalid="ignore", divide="ignore"):
            group, error, state = _remove(state, place)
        if not np.isfinite(error):
            raise np.linalg.LinAlgError("the order of removal takes more precision than float64 has")
        groups.append(int(group))
        errors.append(float(error))
        if place + width == len(state.n):
            state = _updated(state)
    return Removal(np.asarray(groups, np.int64), np.asarray(errors, np.float64))


def order_on_device(
    inverse: Float[Array, "i I"],
    products: Float[Array, "i I"],
    removed: Int[Array, ""],
    *,
    count: int,
    parts: int,
    gathered: int = GATHERED,
    rows: Rows = ALL,
) -> tuple[Removed, Float[Array, "i I"]]:
    """The order of removal on a device, and H⁻¹ after the last update; a function to be compiled.

    The number of removed groups is an argument of the program, so that all layers share it. With H⁻¹ as a result, the
    program can work in the memory of its argument.

    Args:
      inverse: this device's rows of H⁻¹, float32.
      products: this device's rows of M.
      removed: number of removed groups.
      count: see `greedy_removal`.
      parts: see `greedy_removal`.
      gathered: see `greedy_removal`.
      rows: how the rows lie on the devices; the groups of a device are whole.
    """
    width = inverse.shape[1] // count
    per_update = max(1, gathered // width)

    def step(done: Array, carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        state, order, errors = carry
        group, error, state = _remove(state, done % per_update * width, rows)
        return state, order.at[done].set(group), errors.at[done].set(error)

    # Two nested loops: a condition inside a single loop would copy the matrices for every group.
    def steps_and_update(number: Array, carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        first = number * per_update
        state, order, errors = lax.fori_loop(first, jnp.minimum(first + per_update, removed), step, carry)
        return _updated(state, rows), order, errors

    with jax.default_matmul_precision("highest"):
        state = _begin(inverse, products, count, removed, parts, gathered, rows)
        carry = (state, jnp.zeros(count, jnp.int32), jnp.zeros(count))
        state, order, errors = lax.fori_loop(0, -(-removed // per_update), steps_and_update, carry)
    return Removed(order, errors, jnp.asarray(state.kept)), jnp.asarray(state.inverse)


def _begin(
    inverse: Matrix,
    products: Matrix,
    count: int,
    removed: int | Array,
    parts: int,
    gathered: int,
    rows: Rows = ALL,
) -> _State:
    """The state before the first removal."""
    xp, features = inverse.__array_namespace__(), inverse.shape[1]
    width = features // count
    own = xp.arange(len(inverse) // width)  # of this device's groups
    first = 0 if rows.axis is None else lax.axis_index(rows.axis) * len(own)
    inverse_blocks, product_blocks = (
        matrix.reshape(-1, width, count, width)[own, :, first + own] for matrix in (inverse, products)
    )
    if rows.axis is not None:
        inverse_blocks, product_blocks = (rows.whole(jnp.asarray(b)) for b in (inverse_blocks, product_blocks))
    n, p = (xp.zeros((max(1, gathered // width) * width, features), inverse.dtype) for _ in range(2))
    kept, to_remove = xp.ones(count, bool), xp.full(parts, removed // parts)
    return _State(inverse, products, n, p, inverse_blocks, product_blocks, kept, to_remove)


def _remove(state: _State, place: int | Array, rows: Rows = ALL) -> tuple[Any, Any, _State]:
    """The next removed group, its error, and the state after its removal, with its rows N and P at `place`."""
    xp, width = state.n.__array_namespace__(), state.inverse_blocks.shape[-1]
    per_part = len(state.kept) // len(state.to_remove)
    removable = state.kept & xp.repeat(state.to_remove > 0, per_part)
    errors = xp.where(removable, removal_errors(state.inverse_blocks, state.product_blocks), xp.inf)
    group = xp.argmin(errors)
    kept = state.kept & (xp.arange(len(state.kept)) != group)
    n, p = _rows(state, group, xp.repeat(kept, width)[None], rows)
    n_blocks, p_blocks = (gathered.reshape(width, -1, width).swapaxes(0, 1) for gathered in (n, p))
    state = state._replace(
        n=_put(state.n, n, place),
        p=_put(state.p, p, place),
        inverse_blocks=state.inverse_blocks - n_blocks.mT @ n_blocks,
        product_blocks=state.product_blocks - n_blocks.mT @ p_blocks - p_blocks.mT @ n_blocks,
        kept=kept,
        to_remove=state.to_remove - (xp.arange(len(state.to_remove)) == group // per_part),
    )
    error = xp.where(xp.isfinite(n).all(), errors[group], xp.nan)  # the pivot of a group that is not definite is NaN
    return group, error, state


def _rows(state: _State, group: Any, kept: Array | np.ndarray, rows: Rows) -> tuple[Matrix, Matrix]:
    """N and P of one group, [w, I] each; `kept` [1, I] marks the features of the groups that remain."""
    width = state.inverse_blocks.shape[-1]
    first = group * width

    def of_group(matrix: Matrix) -> Matrix:
        on_host = isinstance(matrix, np.ndarray)
        return matrix[first : first + width] if on_host else rows.take(matrix, first, width)

    def columns(gathered: Matrix) -> Matrix:
        on_host = isinstance(gathered, np.ndarray)
        return gathered[:, first : first + width] if on_host else lax.dynamic_slice_in_dim(gathered, first, width, 1)

    inverse, products = of_group(state.inverse), of_group(state.products)
    if len(state.n) > width:  # else both matrices are updated after every group
        before_n, before_p = columns(state.n).T, columns(state.p).T
        inverse = inverse - before_n @ state.n
        products = products - before_n @ state.p - before_p @ state.n
    whiten = _inverse_pivot(state.inverse_blocks[group])
    n, p = whiten @ inverse * kept, whiten @ products
    square = whiten @ columns(p).T  # R⁻¹ M_SS R⁻ᵀ, symmetric
    return n, p - 0.5 * (square @ n)


def _inverse_pivot(block: Matrix) -> Matrix:
    """R⁻¹ of a block R Rᵀ; for groups of one feature, such as channels, the inverse of a square root."""
    if block.shape[-1] == 1:
        return 1 / block.__array_namespace__().sqrt(block)
    if isinstance(block, np.ndarray):
        return scipy.linalg.solve_triangular(np.linalg.cholesky(block), np.eye(len(block)), lower=True)
    return blocked.inverse_factor(block)


def _put(array: Matrix, rows: Matrix, place: int | Array) -> Matrix:
    """The array with new rows from `place` on; NumPy arrays are changed in place."""
    if not isinstance(array, np.ndarray):
        return lax.dynamic_update_slice_in_dim(array, rows, place, 0)
    array[place : place + len(rows)] = rows
    return array


def _updated(state: _State, rows: Rows = ALL) -> _State:
    """The state with all gathered rows applied to both matrices; NumPy matrices are changed in place."""
    inverse, products, n, p = state.inverse, state.products, state.n, state.p
    xp = n.__array_namespace__()
    left, right = xp.concat([n, p]), xp.concat([p, n])
    if isinstance(inverse, np.ndarray):
        # Products of two different arrays: for a product of an array with its own transpose, and for a sum with a
        # transpose, NumPy takes three times as long.
        other = n.copy()
        for block in solve.row_blocks(len(inverse)):
            inverse[block] -= n[:, block].T @ other
            products[block] -= left[:, block].T @ right
    else:
        gathered = ((n, n), (left, right))
        inverse, products = (
            _less(jnp.asarray(matrix), rows.mine(jnp.asarray(own).T), jnp.asarray(others))
            for matrix, (own, others) in zip((inverse, products), gathered, strict=True)
        )
    return state._replace(inverse=inverse, products=products, n=xp.zeros_like(n), p=xp.zeros_like(p))


def _less(matrix: Float[Array, "i I"], left: Float[Array, "i R"], right: Float[Array, "R I"]) -> Float[Array, "i I"]:
    """Matrix − left · right, some rows at a time in the memory of the matrix."""

    def update(first: int | Array, count: int, matrix: Array) -> Array:
        old, own = (lax.dynamic_slice_in_dim(part, first, count, 0) for part in (matrix, left))
        return lax.dynamic_update_slice_in_dim(matrix, old - own @ right, first, 0)

    return by_blocks(len(matrix), UPDATED, update, matrix)


def removal_errors(inverse_blocks: Blocks, product_blocks: Blocks) -> Float[Array, " G"] | Float[np.ndarray, " G"]:
    """The error of removing each group, tr((H⁻¹_SS)⁻¹ M_SS), from its diagonal blocks of both matrices, [G, w, w]."""
    if inverse_blocks.shape[-1] == 1:
        return (product_blocks / inverse_blocks)[:, 0, 0]
    if isinstance(inverse_blocks, np.ndarray):
        return np.trace(np.linalg.solve(inverse_blocks, product_blocks), axis1=-2, axis2=-1)
    whiten = lax.map(blocked.inverse_factor, inverse_blocks)  # with H⁻¹_SS = R Rᵀ, tr(R⁻¹ M_SS R⁻ᵀ)
    return jnp.sum((whiten @ product_blocks) * whiten, axis=(1, 2))
