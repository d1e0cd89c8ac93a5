"""A linear system on the device: from the moments to the kept groups and the refitted rows, float32.

The formulas are those of `system` and `removal_order`. Nothing leaves the device but the result. All functions work at
full width: rows that are not kept stand as the identity in a matrix and as zeros in a solution, so that one program
serves every number of kept groups.

On a mesh, the matrices of I rows are shared over `model` where that divides: each device holds its own rows of a matrix
and its own columns of the right-hand sides (see `blocked.Rows`).

    I    input features        i    those whose rows this device holds
    D    output features       d    those of this device
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.devices.sharding import MODEL, place
from minillm_jax.model import ops
from minillm_jax.pruning.blocked import ALL, Rows, block_of, product, solve_on_device
from minillm_jax.pruning.removal_order import order_on_device
from minillm_jax.pruning.system import CHOICES, COLUMNS, ENOUGH

# Fewest rows of a block for which the rows of a matrix are shared: smaller blocks send too many messages.
FEWEST = 16


class DeviceSystem(NamedTuple):
    """The fields of `system.System`, float32.

    Attributes:
      matrix: G + λI.
      right: the right-hand side.
      kernel: the matrix W that the ridge keeps the solution near to.
      ridge: λ.
      diagonal: mean diagonal of G; 1 where G is zero.
      mean: mean of the inputs.
      target: mean of the target.
    """

    matrix: Float[Array, "i I"]
    right: Float[Array, "I d"]
    kernel: Float[Array, "I d"]
    ridge: Float[Array, ""]
    diagonal: Float[Array, ""]
    mean: Float[Array, " I"]
    target: Float[Array, " d"]


class Prepared(NamedTuple):
    """A system, and the two by which its ridge is chosen (see `system.HeldOut`), with some of their columns.

    Attributes:
      system: of all windows.
      fit: of the windows that are not held out, with a ridge of 0; None where the ridge is given.
      held: of the held-out windows, with a ridge of 0; None where the ridge is given.
    """

    system: DeviceSystem
    fit: DeviceSystem | None
    held: DeviceSystem | None


class Refitted(NamedTuple):
    """The refitted rows of a matrix.

    Attributes:
      kernel: the rows, zero where a row is not kept.
      shift: the change of the bias.
      sound: whether moments, rows and shift are finite: float32 was precise enough.
    """

    kernel: Float[Array, "I d"]
    shift: Float[Array, " d"]
    sound: Bool[Array, ""]


class Numbers(NamedTuple):
    """The numbers of a problem, arguments of its program.

    Attributes:
      tokens: of all windows.
      held_tokens: of the held-out windows.
      towards: γ, see `system.system_of`.
      share: the ridge as a share of the mean diagonal.
    """

    tokens: Float[Array, ""]
    held_tokens: Float[Array, ""]
    towards: Float[Array, ""]
    share: Float[Array, ""]


# The six fields of `walk.Moments` or `walk.InputMoments`.
Sums = tuple[Array, ...]

_ROWS, _COLUMNS, _WHOLE, _PART = PartitionSpec(MODEL), PartitionSpec(None, MODEL), PartitionSpec(), PartitionSpec(MODEL)
SUMS = (_ROWS, _WHOLE, _COLUMNS, _PART, _WHOLE, _PART)
# Specifications in the place of arrays.
SYSTEM: Any = DeviceSystem._make((_ROWS, _COLUMNS, _COLUMNS, _WHOLE, _WHOLE, _WHOLE, _PART))
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
    own, columns, stride = inputs // devices, outputs // devices, _stride(outputs)
    divides = inputs % devices == outputs % devices == count % devices == columns % stride == 0
    return Rows(MODEL) if devices > 1 and divides and block_of(own) >= FEWEST else ALL


def placed(sums: Sequence[Any], mesh: Mesh | None, rows: Rows) -> Sums:
    """Moments on the devices of a mesh, with the shards of their program."""
    specs = SUMS if rows.axis else (_WHOLE,) * len(SUMS)
    return tuple(_placed(part, mesh, spec) for part, spec in zip(sums, specs, strict=True))


def placed_kernel(kernel: Any, mesh: Mesh | None, rows: Rows) -> Float[Array, "I D"]:
    """A matrix W on the devices of a mesh, float32."""
    return _placed(kernel, mesh, _COLUMNS if rows.axis else _WHOLE)


def _placed(array: Any, mesh: Mesh | None, spec: PartitionSpec) -> Array:
    sharding = None if mesh is None else NamedSharding(mesh, spec)
    return place(jnp.asarray(array, jnp.float32), sharding)


# --------------------------------------------------------------------------------------------------------- programs


@partial(jax.jit, static_argnames=("biased", "mesh", "rows"))
def prepare(
    total: Sums,
    held: Sums | None,
    kernel: Float[Array, "I D"],
    numbers: Numbers,
    *,
    biased: bool,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> Prepared:
    """The systems of a problem.

    Args:
      total: the moments of all windows.
      held: those of the held-out windows; None where the ridge is given.
      kernel: W.
      numbers: the numbers of the problem.
      biased: whether the map has a bias: it is fitted on centred inputs and targets.
      mesh: the devices of the arrays; None for one device.
      rows: from `shared_rows`.
    """
    specs = SUMS, None if held is None else SUMS, _COLUMNS, _WHOLE
    pair = None if held is None else SYSTEM
    body = partial(_prepare, biased=biased, rows=rows)
    return _over(mesh, rows, body, specs, Prepared(SYSTEM, pair, pair))(total, held, kernel, numbers)


@partial(jax.jit, static_argnames=("count", "parts", "mesh", "rows"))
def order(
    system: DeviceSystem,
    removed: Int[Array, ""],
    *,
    count: int,
    parts: int,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> tuple[Int[Array, " count"], Float[Array, " count"], Bool[Array, " count"]]:
    """The groups in the order of removal, the error of each removal, and the groups that remain.

    Entries of the first two behind `removed` mean nothing. An error that is not finite says that float32 was not
    precise enough.

    Args:
      system: the system, from `prepare`.
      removed: number of removed groups.
      count: number of groups.
      parts: number of parts of equally many groups, of which every part loses equally many.
      mesh: the devices of the arrays; None for one device.
      rows: from `shared_rows`.
    """
    body = partial(_order, count=count, parts=parts, rows=rows)
    return _over(mesh, rows, body, (SYSTEM, _WHOLE), (_WHOLE,) * 3)(system, removed)


@partial(jax.jit, static_argnames=("least_squares", "mesh", "rows"))
def refit(
    prepared: Prepared,
    kept: Bool[Array, " groups"],
    *,
    least_squares: bool = True,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> Refitted:
    """The refitted rows of the kept groups.

    Args:
      prepared: from `prepare`.
      kept: whether a group is kept.
      least_squares: whether the rows are solved for; otherwise they stay, and the bias alone changes.
      mesh: the devices of the arrays; None for one device.
      rows: from `shared_rows`.
    """
    pair = None if prepared.fit is None else SYSTEM
    body = partial(_refit, least_squares=least_squares, rows=rows)
    return _over(mesh, rows, body, (Prepared(SYSTEM, pair, pair), _WHOLE), REFITTED)(prepared, kept)


def choose_and_refit(
    total: Sums,
    held: Sums | None,
    kernel: Float[Array, "I D"],
    numbers: Numbers,
    removed: Int[Array, ""],
    *,
    biased: bool,
    count: int,
    parts: int,
    least_squares: bool = True,
    mesh: Mesh | None = None,
    rows: Rows = ALL,
) -> tuple[Bool[Array, " count"], Refitted]:
    """The groups that structured OBS keeps, and their refitted rows: `prepare`, `order` and `refit` in turn.

    They are three programs, between which nothing leaves the device. As one program they take a TPU's compiler minutes.
    """
    prepared = prepare(total, held, kernel, numbers, biased=biased, mesh=mesh, rows=rows)
    _, errors, kept = order(prepared.system, removed, count=count, parts=parts, mesh=mesh, rows=rows)
    found = refit(prepared, kept, least_squares=least_squares, mesh=mesh, rows=rows)
    sound = jnp.isfinite(errors) | (jnp.arange(count) >= removed)
    return kept, found._replace(sound=found.sound & jnp.all(sound))


def _over(mesh: Mesh | None, rows: Rows, body: Callable[..., Any], inside: Any, outside: Any) -> Callable[..., Any]:
    """A function of local arrays as one of whole arrays; HIGHEST for its products."""

    def precise(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return body(*arguments)

    if rows.axis is None:
        return precise
    return jax.shard_map(precise, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=False)


# ----------------------------------------------------------------------------------------------------------- bodies


def _prepare(
    total: Sums, held: Sums | None, kernel: Float[Array, "I d"], numbers: Numbers, *, biased: bool, rows: Rows
) -> Prepared:
    make = partial(_system, towards=numbers.towards, biased=biased, rows=rows)
    system = make(total, kernel, numbers.tokens, share=numbers.share)
    if held is None:
        return Prepared(system, None, None)
    columns = slice(None, None, _stride(kernel.shape[1] * rows.shares))
    fit = tuple(whole - part for whole, part in zip(total[:4], held[:4], strict=True)) + total[4:]
    fit_tokens = numbers.tokens - numbers.held_tokens
    pair = (
        make(_columns(sums, columns), kernel[:, columns], tokens, share=0.0)
        for sums, tokens in ((fit, fit_tokens), (held, numbers.held_tokens))
    )
    return Prepared(system, *pair)


def _stride(outputs: int) -> int:
    """The distance of the columns on which ridges are compared."""
    return -(-outputs // COLUMNS)


def _columns(sums: Sums, columns: slice) -> Sums:
    """The moments with some columns of the target."""
    gram, inputs, cross, targets, center, target_center = sums
    return gram, inputs, cross[:, columns], targets[columns], center, target_center[columns]


def _system(
    sums: Sums,
    kernel: Float[Array, "I d"],
    tokens: float | Array,
    *,
    towards: float | Array,
    share: float | Array,
    biased: bool,
    rows: Rows,
) -> DeviceSystem:
    """`system.system_of` on the device."""
    gram, inputs, cross, targets, center, target_center = sums
    own, mean = rows.own(gram), center + inputs / tokens
    if biased:  # a covariance is the same about any center
        gram = gram - jnp.outer(inputs[own], inputs) / tokens
        cross = cross - jnp.outer(inputs / tokens, targets)
    else:
        about_zero = inputs + tokens * center
        gram = gram + jnp.outer(center[own], about_zero) + jnp.outer(inputs[own], center)
        cross = cross + jnp.outer(center, targets) + jnp.outer(about_zero, target_center)
    on_diagonal = own[:, None] == jnp.arange(gram.shape[1])[None]
    diagonal = rows.total(jnp.sum(jnp.where(on_diagonal, gram, 0))) / gram.shape[1]
    diagonal = jnp.where(diagonal == 0, 1.0, diagonal)
    ridge = share * diagonal
    right = (1 - towards) * product(gram, kernel, rows) + towards * cross + ridge * kernel
    target = (1 - towards) * ops.einsum("I,ID->D", mean, kernel) + towards * (target_center + targets / tokens)
    return DeviceSystem(gram + ridge * on_diagonal, right, kernel, ridge, diagonal, mean, target)


def _order(
    system: DeviceSystem, removed: Int[Array, ""], *, count: int, parts: int, rows: Rows
) -> tuple[Array, Array, Array]:
    own, width = rows.own(system.matrix), system.matrix.shape[1]
    one = (jnp.arange(width)[:, None] == own[None]).astype(jnp.float32)
    inverse = solve_on_device(system.matrix, one, refine=False, rows=rows)
    inverse = inverse if rows.axis is None else inverse.T  # its own columns are its own rows
    weights = rows.whole(product(inverse, system.right, rows), axis=1)
    products = ops.einsum("ID,JD->IJ", weights[own], weights)
    return order_on_device(inverse, products, removed, count=count, parts=parts, rows=rows)


def _refit(prepared: Prepared, kept: Bool[Array, " groups"], *, least_squares: bool, rows: Rows) -> Refitted:
    system = prepared.system
    of_rows = jnp.repeat(kept, system.matrix.shape[1] // len(kept))
    if least_squares:
        more = jnp.float32(0)
        if prepared.fit is not None and prepared.held is not None:
            share = best_ridge(prepared.fit, prepared.held, of_rows, rows)
            more = share * system.diagonal - system.ridge
        kernel = solved_rows(system.matrix, system.right + more * system.kernel, of_rows, more, rows)
    else:
        kernel = jnp.where(of_rows[:, None], system.kernel, 0)
    shift = system.target - ops.einsum("I,ID->D", system.mean, kernel)
    parts = (system.matrix, system.right, kernel, shift)
    broken = rows.total(jnp.stack([jnp.sum(~jnp.isfinite(part)) for part in parts]))
    return Refitted(kernel, shift, jnp.all(broken == 0))


def best_ridge(fit: DeviceSystem, held: DeviceSystem, kept: Bool[Array, " I"], rows: Rows = ALL) -> Float[Array, ""]:
    """`system.HeldOut.best` on the device: the chosen ridge, as a share of the mean diagonal."""
    choices = jnp.asarray(CHOICES, jnp.float32)
    gains = ridge_gains(fit, held, kept, choices * fit.diagonal, rows)
    gains = jnp.where(jnp.isfinite(gains), gains, -jnp.inf)
    most = jnp.max(gains)
    enough = (gains >= ENOUGH * most) & (most > 0)
    return jnp.where(most > 0, choices[jnp.argmax(enough)], choices[-1])


def ridge_gains(
    fit: DeviceSystem, held: DeviceSystem, kept: Bool[Array, " I"], ridges: Float[Array, " R"], rows: Rows = ALL
) -> Float[Array, " R"]:
    """By how much each ridge lowers the squared error on held-out windows; not finite where it has no solution.

    The error of the kept rows W is tr(Wᵀ G W) − 2 tr(Wᵀ R), with the matrix G and the right-hand side R of `held`. Its
    change from W₀ to W is tr((W − W₀)ᵀ (G (W + W₀) − 2 R)), which keeps the digits that a difference of two errors
    loses.

    Args:
      fit: the system of the other windows, with a ridge of 0.
      held: that of the held-out windows, with a ridge of 0.
      kept: whether a row is kept.
      ridges: values of λ.
      rows: how the rows lie on the devices.
    """
    before = jnp.where(kept[:, None], fit.kernel, 0)

    def gain(ridge: Array) -> Array:
        after = solved_rows(fit.matrix, fit.right + ridge * fit.kernel, kept, ridge, rows)
        slope = product(held.matrix, after + before, rows) - 2 * held.right
        return -rows.total(jnp.sum((after - before) * slope))

    return jax.lax.map(gain, ridges)


def solved_rows(
    matrix: Float[Array, "i I"],
    right: Float[Array, "I d"],
    kept: Bool[Array, " I"],
    more: Float[Array, ""],
    rows: Rows = ALL,
) -> Float[Array, "I d"]:
    """The solution for the kept rows with a larger ridge, with one step of refinement; zeros elsewhere.

    Args:
      matrix: this device's rows of the matrix of the system.
      right: the right-hand sides, those of the larger ridge.
      kept: whether a row is kept.
      more: what is added to the diagonal.
      rows: how the rows lie on the devices.
    """
    own = rows.own(matrix)
    both, one = (
        kept[own][:, None] & kept[None],
        (own[:, None] == jnp.arange(matrix.shape[1])[None]).astype(matrix.dtype),
    )
    inside = jnp.where(both, matrix + more * one, one)
    return solve_on_device(inside, jnp.where(kept[:, None], right, 0), refine=True, rows=rows)
