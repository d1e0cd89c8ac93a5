"""Structured OBS: groups of input features go one after the other, and the rest takes over what it can.

The error of a linear map with weights W on inputs of second moments H is a quadratic, tr(ΔᵀHΔ). Removing the rows S of
a group costs at least tr((H⁻¹_SS)⁻¹ M_SS), M = W Wᵀ, reached by W ← W − H⁻¹_:S (H⁻¹_SS)⁻¹ W_S; what is left then has
the inverse H⁻¹ − H⁻¹_:S (H⁻¹_SS)⁻¹ H⁻¹_S: (Hassibi and Stork, 1993; in groups: Kurtic et al., ZipLM, arXiv
2302.04089).

The order needs M alone, not W. With H⁻¹_SS = R Rᵀ, N = R⁻¹ H⁻¹_S: and P = R⁻¹ M_S: − ½ (R⁻¹ M_SS R⁻ᵀ) N, a group that
goes leaves

    H⁻¹ ← H⁻¹ − Nᵀ N        M ← M − Nᵀ P − Pᵀ N

which is a Cholesky factorisation of H⁻¹ whose pivots are chosen on the way, with M carried along. The rows N and P of
many groups are gathered before both matrices are written anew, by matrix products; in between only the rows of the
next group are made, and every group's own block is brought up to date.

    G groups    R rows that are gathered at most    w features of a group
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.pruning import solve

GATHERED = 128

Matrix = Float[Array, "_ _"] | Float[np.ndarray, "_ _"]
Blocks = Float[Array, "_ _ _"] | Float[np.ndarray, "_ _ _"]


class _State(NamedTuple):
    """What is left, in NumPy or JAX alike.

    Attributes:
      inverse: [I, I], H⁻¹ as it was last written.
      products: [I, I], M as it was last written.
      n: [R, I], the rows N since then; zeros where none are yet. Zero for the features of groups that are gone.
      p: [R, I], the rows P since then.
      own: [G, w, w], each group's block of H⁻¹ with itself, up to date while the group is there.
      costs: [G, w, w], the same of M.
      stay: [G], which groups are there.
      left: how many of each part still have to go.
    """

    inverse: Matrix
    products: Matrix
    n: Matrix
    p: Matrix
    own: Blocks
    costs: Blocks
    stay: Bool[Array, " _"] | Bool[np.ndarray, " _"]
    left: Int[Array, " _"] | Int[np.ndarray, " _"]


def products_of_best(
    inverse: Float[np.ndarray, "I I"], right: Float[np.ndarray, "I D"], solver: str = "host"
) -> Float[np.ndarray, "I I"]:
    """M = W Wᵀ of the best weights at full width, W = H⁻¹ · right; the solver is that of `linear.solve`."""
    best = solve.product(inverse, right, solver)
    return solve.product(best, best.T, solver)


def greedy_removal(
    inverse: Float[np.ndarray, "I I"],
    products: Float[np.ndarray, "I I"],
    count: int,
    keep: int,
    parts: int = 1,
    solver: str = "host",
    gathered: int = GATHERED,
) -> Int[np.ndarray, " gone"]:
    """The group of least error goes, again and again, until `keep` are left; of equal ones that of the lower index.

    Args:
      inverse: H⁻¹, symmetric and positive definite; the host writes over it, as over the next.
      products: M = W Wᵀ of the best weights W there are at full width.
      count: number of groups, each of equally many neighbouring features.
      keep: how many groups stay.
      parts: in how many parts of neighbouring groups they lie; equally many go of each.
      solver: `host` (NumPy, float64), or `device` (JAX, float32; what fails there is done on the host).
      gathered: how many rows are gathered, about, before the matrices are written anew.

    Returns:
      The groups that go, in that order.
    """
    if solver == "device" and keep < count:
        matrices = (jnp.asarray(matrix, jnp.float32) for matrix in (inverse, products))
        found, errors = _on_device(*matrices, count=count, gone=count - keep, parts=parts, gathered=gathered)
        if np.isfinite(np.asarray(errors)).all():
            return np.asarray(found, np.int64)
    inverse, products = (np.require(matrix, np.float64, "W") for matrix in (inverse, products))
    state = _begin(inverse, products, count, count - keep, parts, gathered)
    order, width = [], len(inverse) // count
    for _ in range(count - keep):
        place = len(order) * width % len(state.n)
        group, _, state = _remove(state, place)
        order.append(int(group))
        if place + width == len(state.n):
            state = _rewritten(state)
    return np.asarray(order, np.int64)


@partial(jax.jit, static_argnames=("count", "gone", "parts", "gathered"))
def _on_device(
    inverse: Float[Array, "I I"], products: Float[Array, "I I"], *, count: int, gone: int, parts: int, gathered: int
) -> tuple[Int[Array, " gone"], Float[Array, " gone"]]:
    """The groups that go, and the error of each: not finite where float32 did not do."""
    width = len(inverse) // count
    at_once = max(1, gathered // width)

    def step(done: Array, carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        state, order, errors = carry
        group, error, state = _remove(state, done % at_once * width)
        return state, order.at[done].set(group), errors.at[done].set(error)

    # A loop in a loop: with a condition in one loop, the matrices would be copied for every group.
    def block(number: Array, carry: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
        first = number * at_once
        state, *found = lax.fori_loop(first, jnp.minimum(first + at_once, gone), step, carry)
        return _rewritten(state), *found

    with jax.default_matmul_precision("highest"):
        first = (_begin(inverse, products, count, gone, parts, gathered), jnp.zeros(gone, jnp.int32), jnp.zeros(gone))
        _, order, errors = lax.fori_loop(0, -(-gone // at_once), block, first)
    return order, errors


def _begin(inverse: Matrix, products: Matrix, count: int, gone: int, parts: int, gathered: int) -> _State:
    xp, width = inverse.__array_namespace__(), len(inverse) // count
    places = xp.arange(count)
    own, costs = (m.reshape(count, width, count, width)[places, :, places] for m in (inverse, products))
    n, p = (xp.zeros((max(1, gathered // width) * width, len(inverse)), inverse.dtype) for _ in range(2))
    stay, left = xp.ones(count, bool), xp.full(parts, gone // parts)
    return _State(inverse, products, n, p, own, costs, stay, left)


def _remove(state: _State, place: int | Array) -> tuple[Any, Any, _State]:
    """The next group goes: which one it is, its error, and what is left; its rows are gathered from `place` on."""
    xp, width = state.n.__array_namespace__(), state.own.shape[-1]
    per_part = len(state.stay) // len(state.left)
    may_go = state.stay & xp.repeat(state.left > 0, per_part)
    errors = xp.where(may_go, removal_errors(state.own, state.costs), xp.inf)
    group = xp.argmin(errors)
    stay = state.stay & (xp.arange(len(state.stay)) != group)
    n, p = _rows(state, group, xp.repeat(stay, width)[None])
    own_n, own_p = (new.reshape(width, -1, width).swapaxes(0, 1) for new in (n, p))
    state = state._replace(
        n=_put(state.n, n, place),
        p=_put(state.p, p, place),
        own=state.own - own_n.mT @ own_n,
        costs=state.costs - own_n.mT @ own_p - own_p.mT @ own_n,
        stay=stay,
        left=state.left - (xp.arange(len(state.left)) == group // per_part),
    )
    return group, errors[group], state


def _rows(state: _State, group: Any, stay: Array | np.ndarray) -> tuple[Matrix, Matrix]:
    """N and P of one group, [w, I] each."""
    xp, width = state.n.__array_namespace__(), state.own.shape[-1]
    rows = group * width + xp.arange(width)
    before_n, before_p = state.n[:, rows].T, state.p[:, rows].T
    pivot = xp.sqrt(state.own[group]) if width == 1 else xp.linalg.cholesky(state.own[group])
    n = _solve(pivot, state.inverse[rows] - before_n @ state.n) * stay
    p = _solve(pivot, state.products[rows] - before_n @ state.p - before_p @ state.n)
    square = _solve(pivot, p[:, rows].T)  # R⁻¹ M_SS R⁻ᵀ, symmetric
    return n, p - 0.5 * (square @ n)


def _solve(matrix: Matrix | Blocks, right: Matrix | Blocks) -> Matrix | Blocks:
    """X with matrix · X = right; nearly always the matrices are numbers."""
    return right / matrix if matrix.shape[-1] == 1 else matrix.__array_namespace__().linalg.solve(matrix, right)


def _put(array: Matrix, rows: Matrix, place: int | Array) -> Matrix:
    """The rows from `place` on are others; in place in NumPy."""
    if not isinstance(array, np.ndarray):
        return lax.dynamic_update_slice_in_dim(array, rows, place, 0)
    array[place : place + len(rows)] = rows
    return array


def _rewritten(state: _State) -> _State:
    """The same with no rows gathered: they are in the matrices; in place in NumPy."""
    inverse, products, n, p = state.inverse, state.products, state.n, state.p
    xp = n.__array_namespace__()
    # Products of two arrays: NumPy is three times slower where it mirrors a triangle or adds a transpose.
    inverse -= n.T @ n.copy()
    products -= xp.concat([n, p]).T @ xp.concat([p, n])
    return state._replace(inverse=inverse, products=products, n=xp.zeros_like(n), p=xp.zeros_like(p))


def removal_errors(own: Blocks, costs: Blocks) -> Float[Array, " G"] | Float[np.ndarray, " G"]:
    """tr((H⁻¹_SS)⁻¹ M_SS) of every group, from its blocks of the two matrices."""
    return own.__array_namespace__().trace(_solve(own, costs), axis1=-2, axis2=-1)
