"""A linear system on the device: from the moments to the kept groups in float32, and to the refitted rows.

The formulas are those of `system` and `removal_order`. All functions work at full width: rows that are not kept stand
as the identity in a matrix and as zeros in a solution, so that one program serves every number of kept groups.

A matrix of I rows is the largest array of the job. No program has more than two of them, and each program takes the
memory of its first argument for its result: `system` makes the matrix of a system from its Gram matrix, and `order`
inverts it, in place. `refit` makes no such matrix: it refines rows with the Gram matrix itself (`refinement`). The
moments may lie in the memory of the host.

On a mesh, the matrices of I rows are shared over `model` where that divides: each device holds its own rows of a matrix
and its own columns of the right-hand sides (see `blocked.Rows`).

    I    input features        i    those whose rows this device holds
    D    output features       d    those of this device
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from minillm_jax.devices.sharding import MODEL, place
from minillm_jax.model import ops
from minillm_jax.pruning.blocked import ALL, UPDATED, Rows, block_of, by_blocks, product
from minillm_jax.pruning.float64 import Pair, number
from minillm_jax.pruning.refinement import Equations, Targets, ridge_of
from minillm_jax.pruning.removal_order import Removed, order_on_device
from minillm_jax.pruning.system import CHOICES, COLUMNS, ENOUGH
from minillm_jax.pruning.tiled import inverse, solver

# Fewest rows of a block for which the rows of a matrix are shared: smaller blocks send too many messages.
FEWEST = 16
# Columns of a right-hand side that are refined at a time: their refinement takes several arrays of them.
SOLVED = 512


class DeviceSystem(NamedTuple):
    """The fields of `system.System`, float32.

    Attributes:
      matrix: G + λI.
      right: the right-hand side.
      kernel: the matrix W that the ridge keeps the solution near to, in its own type.
      ridge: λ.
      diagonal: mean diagonal of G; 1 where G is zero.
    """

    matrix: Float[Array, "i I"]
    right: Float[Array, "I d"]
    kernel: Shaped[Array, "I d"]
    ridge: Float[Array, ""]
    diagonal: Float[Array, ""]


class Refitted(NamedTuple):
    """The refitted rows of a matrix.

    Attributes:
      kernel: the rows, zero where a row is not kept.
      shift: the change of the bias.
      sound: whether the refinement has ended near the solution, and moments, rows and shift are finite.
    """

    kernel: Float[Array, "I d"]
    shift: Pair
    sound: Bool[Array, ""]


class Numbers(NamedTuple):
    """The numbers of a system, arguments of its program.

    Attributes:
      tokens: number of tokens in the moments.
      towards: γ, see `system.system_of`.
      share: the ridge as a share of the mean diagonal.
    """

    tokens: Pair
    towards: Pair
    share: Pair

    @classmethod
    def of(cls, tokens: int, towards: float, share: float) -> "Numbers":
        """The arguments of these numbers."""
        return cls._make(map(number, (float(tokens), towards, share)))


# The six fields of `walk.Moments` or `walk.InputMoments`.
Sums = tuple[Array, ...]

_ROWS, _COLUMNS, _WHOLE, _PART = PartitionSpec(MODEL), PartitionSpec(None, MODEL), PartitionSpec(), PartitionSpec(MODEL)
SUMS = (_ROWS, _WHOLE, _COLUMNS, _PART, _WHOLE, _PART)
# Specifications in the place of arrays.
SYSTEM: Any = DeviceSystem._make((_ROWS, _COLUMNS, _COLUMNS, _WHOLE, _WHOLE))
SOLUTIONS = PartitionSpec(None, None, MODEL)
REMOVED: Any = Removed._make((_WHOLE,) * 3)
REFITTED: Any = Refitted._make((_COLUMNS, _PART, _WHOLE))


def shared_rows(inputs: int, outputs: int, count: int, mesh: Mesh | None) -> Rows:
    """How the rows of the matrices of a system lie on a mesh: shared where the groups and the columns divide.

    Args:
      inputs: number of rows.
      outputs: number of columns of the right-hand sides.
      count: number of groups.
      mesh: the devices; None for one device.
    """
    devices = 1 if mesh is None else mesh.shape[MODEL]
    own, columns, stride = inputs // devices, outputs // devices, stride_of(outputs)
    divides = inputs % devices == outputs % devices == count % devices == columns % stride == 0
    return Rows(MODEL) if devices > 1 and divides and block_of(own) >= FEWEST else ALL


def stride_of(outputs: int) -> int:
    """The distance of the columns on which ridges are compared."""
    return -(-outputs // COLUMNS)


def placed(sums: Sequence[Any], mesh: Mesh | None, rows: Rows) -> Sums:
    """Moments on the devices of a mesh, float32, with the shards of their program."""
    specs = SUMS if rows.axis else (_WHOLE,) * len(SUMS)
    return tuple(_placed(part, mesh, spec) for part, spec in zip(sums, specs, strict=True))


def placed_kernel(kernel: Any, mesh: Mesh | None, rows: Rows) -> Shaped[Array, "I D"]:
    """A matrix W on the devices of a mesh."""
    return _placed(kernel, mesh, _COLUMNS if rows.axis else _WHOLE)


def _placed(array: Any, mesh: Mesh | None, spec: PartitionSpec) -> Array:
    return place(array, None if mesh is None else NamedSharding(mesh, spec))


# --------------------------------------------------------------------------------------------------------- programs


@partial(jax.jit, static_argnames=("biased", "stride", "mesh", "rows"), donate_argnames="gram")
def system(
    gram: Float[Array, "I I"],
    others: Sums,
    less: Sums | None,
    kernel: Shaped[Array, "I D"],
    numbers: Numbers,
    *,
    biased: bool,
    stride: int = 1,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> DeviceSystem:
    """`system.system_of` on the device.

    Args:
      gram: the Gram matrix of the moments, whose memory the matrix of the system takes.
      others: the other moments.
      less: moments of a part of the tokens, which are left out; None to leave out none.
      kernel: W.
      numbers: γ and the ridge; the number of tokens without those that are left out.
      biased: whether the map has a bias: it is fitted on centred inputs and targets.
      stride: distance of the columns of the target that are taken.
      mesh: the devices of the arrays; None for one device.
      rows: from `shared_rows`.
    """
    specs = _ROWS, SUMS[1:], None if less is None else SUMS, _COLUMNS, _WHOLE
    body = partial(_system, biased=biased, stride=stride, rows=rows)
    return _over(mesh, rows, body, specs, SYSTEM)(gram, others, less, kernel, numbers)


@partial(jax.jit, static_argnames=("count", "parts", "mesh", "rows"), donate_argnames="matrix")
def order(
    matrix: Float[Array, "I I"],
    right: Float[Array, "I D"],
    removed: Int[Array, ""],
    *,
    count: int,
    parts: int,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> tuple[Removed, Float[Array, "I I"]]:
    """The order in which structured OBS removes groups, and what is left in the memory of the matrix.

    Args:
      matrix: the matrix of the system; its memory is taken.
      right: the right-hand side of the system.
      removed: number of removed groups.
      count: number of groups.
      parts: number of parts of equally many groups, of which every part loses equally many.
      mesh: the devices of the arrays; None for one device.
      rows: from `shared_rows`.
    """
    body = partial(_order, count=count, parts=parts, rows=rows)
    return _over(mesh, rows, body, (_ROWS, _COLUMNS, _WHOLE), (REMOVED, _ROWS))(matrix, right, removed)


@partial(jax.jit, static_argnames=("mesh", "rows"))
def solutions(
    system: DeviceSystem,
    kept: Bool[Array, " groups"],
    shares: Float[Array, " R"],
    *,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> Float[Array, "R I D"]:
    """The rows of the kept groups with each of some ridges.

    Args:
      system: from `system`.
      kept: whether a group is kept.
      shares: the ridges, as shares of the mean diagonal.
      mesh: the devices of the arrays; None for one device.
      rows: from `shared_rows`.
    """
    body = partial(_solutions, rows=rows)
    return _over(mesh, rows, body, (SYSTEM, _WHOLE, _WHOLE), SOLUTIONS)(system, kept, shares)


@partial(jax.jit, static_argnames=("mesh", "rows"))
def best_share(
    held: DeviceSystem,
    kept: Bool[Array, " groups"],
    found: Float[Array, "R I D"],
    *,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> Pair:
    """`system.HeldOut.best` on the device: the ridge that held-out windows choose, as a share of the mean diagonal.

    Args:
      held: the system of the held-out windows, with a ridge of 0.
      kept: whether a group is kept.
      found: the rows with each of `CHOICES`, fitted without the held-out windows.
      mesh: the devices of the arrays; None for one device.
      rows: from `shared_rows`.
    """
    specs = SYSTEM, _WHOLE, SOLUTIONS
    return _over(mesh, rows, partial(_best_share, rows=rows), specs, _WHOLE)(held, kept, found)


@partial(jax.jit, static_argnames=("biased", "least_squares", "mesh", "rows"))
def refit(
    sums: Sums,
    kernel: Shaped[Array, "I D"],
    numbers: Numbers,
    kept: Bool[Array, " groups"],
    *,
    biased: bool,
    least_squares: bool = True,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> Refitted:
    """The refitted rows of the kept groups, as precise as on the host (see `refinement`).

    Args:
      sums: the moments of all windows.
      kernel: W.
      numbers: of the system; the ridge is the chosen one.
      kept: whether a group is kept.
      biased: whether the map has a bias: it is fitted on centred inputs and targets.
      least_squares: whether the rows are solved for; otherwise they stay, and the bias alone changes.
      mesh: the devices of the arrays; None for one device.
      rows: from `shared_rows`.
    """
    body = partial(_refit, biased=biased, least_squares=least_squares, rows=rows)
    specs = SUMS, _COLUMNS, _WHOLE, _WHOLE
    return _over(mesh, rows, body, specs, REFITTED)(sums, kernel, numbers, kept)


def _over(mesh: Mesh | None, rows: Rows, body: Callable[..., Any], inside: Any, outside: Any) -> Callable[..., Any]:
    """A function of local arrays as one of whole arrays; HIGHEST for its products."""

    def precise(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return body(*arguments)

    if rows.axis is None:
        return precise
    return jax.shard_map(precise, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=False)


# ----------------------------------------------------------------------------------------------------------- bodies


def _system(
    gram: Float[Array, "i I"],
    others: Sums,
    less: Sums | None,
    kernel: Shaped[Array, "I d"],
    numbers: Numbers,
    *,
    biased: bool,
    stride: int,
    rows: Rows,
) -> DeviceSystem:
    own = rows.own(gram)
    diagonal = _diagonal(gram, own)
    if less is not None:  # about the same centers
        diagonal = diagonal - _diagonal(less[0], own)
        whole = (gram, *others[:3])
        gram, *rest = (total - part for total, part in zip(whole, less[:4], strict=True))
        others = (*rest, *others[3:])
    inputs, cross, targets, center, target_center = others
    cross, targets, target_center = cross[:, ::stride], targets[::stride], target_center[::stride]
    kernel, (tokens, towards, share) = kernel[:, ::stride], (part.high for part in numbers)
    wide = kernel.astype(jnp.float32)
    if biased:  # a covariance is the same about any center
        gram = gram - jnp.outer(inputs[own], inputs) / tokens
        diagonal = diagonal - inputs[own] ** 2 / tokens
        cross = cross - jnp.outer(inputs / tokens, targets)
    else:
        about_zero = inputs + tokens * center
        gram = gram + jnp.outer(center[own], about_zero) + jnp.outer(inputs[own], center)
        diagonal = diagonal + ((about_zero + inputs) * center)[own]
        cross = cross + jnp.outer(center, targets) + jnp.outer(about_zero, target_center)
    on_diagonal = own[:, None] == jnp.arange(gram.shape[1])[None]
    diagonal = rows.total(jnp.sum(diagonal)) / gram.shape[1]
    diagonal = jnp.where(diagonal == 0, 1.0, diagonal)
    ridge = share * diagonal
    matrix = gram + ridge * on_diagonal
    # (1 − γ) G W + γ C + λ W, with the one matrix that is in memory
    right = (1 - towards) * product(matrix, wide, rows) + towards * (cross + ridge * wide)
    return DeviceSystem(matrix, right, kernel, ridge, diagonal)


def _diagonal(matrix: Float[Array, "i I"], own: Int[Array, " i"]) -> Float[Array, " i"]:
    """The entries in the columns of the rows' own indices, of some rows at a time: no other array has I columns."""

    def take(first: int | Array, count: int, found: Array) -> Array:
        part, at = (lax.dynamic_slice_in_dim(array, first, count, 0) for array in (matrix, own))
        entries = jnp.where(at[:, None] == jnp.arange(matrix.shape[1])[None], part, 0)
        return lax.dynamic_update_slice_in_dim(found, jnp.sum(entries, axis=1), first, 0)

    return by_blocks(len(matrix), UPDATED, take, jnp.zeros(len(matrix), matrix.dtype))


def _order(
    matrix: Float[Array, "i I"],
    right: Float[Array, "I d"],
    removed: Int[Array, ""],
    *,
    count: int,
    parts: int,
    rows: Rows,
) -> tuple[Removed, Float[Array, "i I"]]:
    inverted = inverse(matrix, rows=rows)
    weights = rows.whole(product(inverted, right, rows), axis=1)
    products = ops.einsum("ID,JD->IJ", rows.mine(weights), weights)
    return order_on_device(inverted, products, removed, count=count, parts=parts, rows=rows)


def _solutions(
    system: DeviceSystem, kept: Bool[Array, " groups"], shares: Float[Array, " R"], *, rows: Rows
) -> Float[Array, "R I d"]:
    return lax.map(lambda share: _rows(system, kept, share, rows), shares)


def _best_share(held: DeviceSystem, kept: Bool[Array, " groups"], found: Float[Array, "R I d"], *, rows: Rows) -> Pair:
    gains = ridge_gains(held, kept, found, rows)
    gains = jnp.where(jnp.isfinite(gains), gains, -jnp.inf)
    most = jnp.max(gains)
    enough = (gains >= ENOUGH * most) & (most > 0)
    best = jnp.where(most > 0, jnp.argmax(enough), len(CHOICES) - 1)
    return jax.tree.map(lambda *choices: jnp.stack(choices)[best], *map(number, CHOICES))


def ridge_gains(
    held: DeviceSystem, kept: Bool[Array, " groups"], found: Float[Array, "R I d"], rows: Rows = ALL
) -> Float[Array, " R"]:
    """By how much each solution lowers the squared error on held-out windows; not finite where there is none.

    The error of the kept rows W is tr(Wᵀ G W) − 2 tr(Wᵀ R), with the matrix G and the right-hand side R of `held`. Its
    change from W₀ to W is tr((W − W₀)ᵀ (G (W + W₀) − 2 R)), which keeps the digits that a difference of two errors
    loses.
    """
    before = jnp.where(_of_rows(kept, held.kernel)[:, None], held.kernel.astype(jnp.float32), 0)

    def gain(after: Array) -> Array:
        slope = product(held.matrix, after + before, rows) - 2 * held.right
        return -rows.total(jnp.sum((after - before) * slope))

    return lax.map(gain, found)


def _refit(
    sums: Sums,
    kernel: Shaped[Array, "I d"],
    numbers: Numbers,
    kept: Bool[Array, " groups"],
    *,
    biased: bool,
    least_squares: bool,
    rows: Rows,
) -> Refitted:
    gram, inputs, cross, targets, center, target_center = sums
    inside, diagonal = _of_rows(kept, kernel), rows.whole(_diagonal(gram, rows.own(gram)))
    ridge = ridge_of(numbers.share, diagonal, inputs, center, numbers.tokens, biased)
    equations = Equations(gram, inputs, center, inside, numbers.tokens, numbers.towards, ridge, biased, rows)
    solve = solver(gram, inside, jnp.where(inside, ridge.high, 1), rows, added=equations.added())

    def columns(first: int | Array, width: int, carry: Refitted) -> Refitted:
        part = Targets(*(_columns(array, first, width) for array in (cross, targets, target_center, kernel)))
        if least_squares:
            found, sound = equations.solved(solve, part)
        else:
            as_it_is = jnp.where(inside[:, None], part.kernel.astype(jnp.float32), 0)
            found, sound = Pair(as_it_is, jnp.zeros_like(as_it_is)), jnp.bool_(True)
        rows_so_far = lax.dynamic_update_slice_in_dim(carry.kernel, found.high, first, 1)
        shifts = zip(carry.shift, equations.shift(found, part), strict=True)
        shift_so_far = Pair(*(lax.dynamic_update_slice_in_dim(before, new, first, 0) for before, new in shifts))
        return Refitted(rows_so_far, shift_so_far, carry.sound & sound)

    no_shift = jnp.zeros_like(targets)
    nothing = Refitted(jnp.zeros_like(cross), Pair(no_shift, no_shift), jnp.bool_(True))
    found = by_blocks(cross.shape[1], SOLVED, columns, nothing)
    # Of the Gram matrix the diagonal is enough: no entry exceeds the largest.
    finite = [jnp.all(jnp.isfinite(part)) for part in (diagonal, cross, found.kernel, found.shift.high)]
    broken = rows.total(jnp.stack([~part for part in (found.sound, *finite)]).astype(jnp.int32))
    return found._replace(sound=jnp.all(broken == 0))


def _columns(array: Shaped[Array, "... d"], first: int | Array, width: int) -> Shaped[Array, "... w"]:
    return lax.dynamic_slice_in_dim(array, first, width, -1)


def _rows(
    system: DeviceSystem, kept: Bool[Array, " groups"], share: Float[Array, ""], rows: Rows
) -> Float[Array, "I d"]:
    """The solution for the kept rows with another ridge, zeros elsewhere: precise enough to compare ridges.

    One step of iterative refinement in float32 follows the first solution (Higham, Accuracy and Stability of Numerical
    Algorithms, chapter 12).
    """
    matrix, of_rows = system.matrix, _of_rows(kept, system.kernel)
    more = share * system.diagonal - system.ridge
    solve, inside = solver(matrix, of_rows, jnp.where(of_rows, more, 1), rows), of_rows[:, None]
    right = jnp.where(inside, system.right + more * system.kernel.astype(jnp.float32), 0)
    solution = solve(right)
    rest = right - jnp.where(inside, product(matrix, solution, rows) + more * solution, 0)
    return solution + solve(rest)


def _of_rows(kept: Bool[Array, " groups"], kernel: Shaped[Array, "I d"]) -> Bool[Array, " I"]:
    """Whether the group of each row is kept."""
    return jnp.repeat(kept, len(kernel) // len(kept))
