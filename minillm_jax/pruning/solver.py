"""Solves the least-squares problems of a walk: on the host in float64, or on the device in float32.

A problem is the moments of one matrix, as the walk collects them, and what it is fitted to. Its `Fit` gives the order
in which structured OBS removes the groups of the matrix, and the refitted rows of those that are kept.

With several processes, the device's programs run in all of them, on the shared mesh. On the host process 0 solves, and
sends the results to the others: two machines may round differently.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Shaped
from numpy.linalg import LinAlgError

from minillm_jax.devices import hosts
from minillm_jax.devices.sharding import gather
from minillm_jax.errors import InputError, cause, shortened, warn
from minillm_jax.pruning import device_system, solve
from minillm_jax.pruning.device_system import Numbers, placed, placed_kernel, shared_rows
from minillm_jax.pruning.float64 import Pair, as_float64, number
from minillm_jax.pruning.removal_order import Removal, Removed, greedy_removal, products_of_best
from minillm_jax.pruning.system import CHOICES, RIDGE, System, system_with_ridge
from minillm_jax.pruning.walk import Collected

# Shares of the mean diagonal that are tried as the ridge, in turn, where a system is not positive definite.
RIDGES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0)

T = TypeVar("T")
Matrix = Shaped[np.ndarray, "I D"] | Shaped[Array, "I D"]


@dataclass(frozen=True)
class Groups:
    """The groups of the rows of a matrix.

    Attributes:
      count: number of groups, each of equally many neighbouring rows.
      parts: number of parts, each of equally many neighbouring groups. A removal takes equally many from every part.
    """

    count: int
    parts: int = 1


@dataclass(frozen=True)
class Problem:
    """A least-squares problem of the walk (see `system`).

    Attributes:
      total: moments of all windows; the fields of `walk.Moments` or `walk.InputMoments`, on the devices or the host.
      held_out: the same of the held-out windows; None where the ridge is given, or without such windows.
      kernel: W, the matrix that the ridge keeps the solution near to.
      groups: the groups of its rows.
      tokens: number of all tokens, and of those of the held-out windows.
      towards: γ.
      ridge: λ as a share of the mean diagonal; None to choose it by held-out windows.
      biased: whether the map has a bias.
      where: layer and matrix, for messages.
      mesh: the devices of the moments; None for one device, or for moments on the host.
    """

    total: tuple[Any, ...]
    held_out: tuple[Any, ...] | None
    kernel: Any
    groups: Groups
    tokens: tuple[int, int]
    towards: float
    ridge: float | None
    biased: bool
    where: str
    mesh: Mesh | None = None


class Solution(NamedTuple):
    """The refitted rows of a matrix.

    Attributes:
      kernel: at full width, with zeros in the rows that are not kept.
      shift: the change of the bias, float64; None without a bias.
    """

    kernel: Matrix
    shift: Float[np.ndarray, " D"] | None

    def named(self) -> dict[str, Any]:
        """The arrays by name."""
        return {"kernel": self.kernel} | ({} if self.shift is None else {"shift": self.shift})


class Fit(ABC):
    """The solutions of one problem, the same in every process. Every process must call the methods."""

    @abstractmethod
    def order(self, keep: int) -> Removal:
        """The removed groups in the order of structured OBS, until `keep` groups remain."""

    @abstractmethod
    def refit(self, kept: Bool[np.ndarray, " count"], least_squares: bool = True) -> Solution:
        """The rows of the kept groups: solved for, or as they are with another bias."""

    @abstractmethod
    def choose_and_refit(self, keep: int, least_squares: bool = True) -> tuple[Bool[np.ndarray, " count"], Solution]:
        """Which groups structured OBS keeps, and their rows."""


class Solver:
    """Solves the problems of one walk.

    A problem that fails on the device, for lack of precision or of memory, is solved on the host. A system that is not
    positive definite on the host gets a larger ridge. The first case of each kind is a warning.

    Args:
      name: `host` or `device`.
    """

    def __init__(self, name: str = "host") -> None:
        self.name = name
        self._warned: set[str] = set()

    def problem(self, collected: Collected, kernel: Any, mesh: Mesh | None, **settings: Any) -> Problem:
        """A problem with its moments where the solver needs them. With several processes, every one must call this.

        Args:
          collected: the moments, on the devices or the host.
          kernel: W, on the devices or the host; [I, D] or with more axes in the place of I.
          mesh: the devices of the moments.
          settings: the other fields of `Problem`.
        """
        total, held_out = tuple(collected.total), collected.held_out and tuple(collected.held_out)
        problem = Problem(total, held_out, kernel.reshape(total[2].shape[0], -1), mesh=mesh, **settings)
        return problem if self.name == "device" else on_host(problem)

    def fit(self, problem: Problem) -> Fit:
        """The solutions of a problem."""
        return WithFallback(problem, self) if self.name == "device" else HostFit(problem, self)

    def warn_once(self, kind: str, sentence: str) -> None:
        """A warning, unless this walk had one of its kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warn(f"{sentence}; further cases in this run are not reported")


def on_host(problem: Problem) -> Problem:
    """A problem with its arrays on the host. With several processes, every one must call this."""
    total, held_out = (moments and tuple(map(gather, moments)) for moments in (problem.total, problem.held_out))
    return replace(problem, total=total, held_out=held_out, kernel=gather(problem.kernel), mesh=None)


# ------------------------------------------------------------------------------------------------------------- host


class HostFit(Fit):
    """The solutions in float64 on the host.

    Args:
      problem: the problem, with its arrays on the host.
      solver: the solver of the walk, which warns.

    Raises (all methods):
      InputError: the moments are not finite, no ridge helps, or the host has not enough memory.
    """

    def __init__(self, problem: Problem, solver: Solver) -> None:
        self._problem, self._solver = problem, solver

    @cached_property
    def system(self) -> System:
        """The linear system."""
        p = self._problem
        kernel = p.kernel.astype(np.float64)
        return system_with_ridge(p.total, p.held_out, kernel, p.tokens, p.towards, p.ridge, p.biased, p.where)

    def order(self, keep: int) -> Removal:
        """See `Fit`."""
        groups = self._problem.groups

        def work(system: System) -> Removal:
            inverse = solve.inverse(system.hessian)
            return greedy_removal(inverse, products_of_best(inverse, system.right), groups.count, keep, groups.parts)

        return Removal(**hosts.of_first(lambda: self._solved(work)._asdict()))

    def refit(self, kept: Bool[np.ndarray, " count"], least_squares: bool = True) -> Solution:
        """See `Fit`."""
        found = hosts.of_first(lambda: self._refitted(kept, least_squares).named())
        return Solution(found["kernel"], found.get("shift"))

    def _refitted(self, kept: Bool[np.ndarray, " count"], least_squares: bool) -> Solution:
        system = self._with_memory(lambda: self.system)
        rows = np.flatnonzero(np.repeat(kept, len(system.kernel) // len(kept)))
        found, kernel = system.kernel[rows], np.zeros_like(system.kernel)
        if least_squares and len(rows):
            found = self._solved(lambda system: system.rows(rows))
        kernel[rows] = found
        return Solution(kernel, system.shift(rows, found))

    def choose_and_refit(self, keep: int, least_squares: bool = True) -> tuple[Bool[np.ndarray, " count"], Solution]:
        """See `Fit`."""
        kept = np.ones(self._problem.groups.count, bool)
        kept[self.order(keep).groups] = False
        return kept, self.refit(kept, least_squares)

    def _solved(self, work: Callable[[System], T]) -> T:
        """The result of `work`, with the least ridge that it succeeds with."""
        system, reason = self._with_memory(lambda: self.system), ""
        for ridge in _ridges(system):
            raised = system if ridge == system.ridge else system.with_ridge(ridge)
            try:
                result = self._with_memory(lambda raised=raised: work(raised))
            except LinAlgError as error:
                reason = reason or cause(error)
                continue
            if ridge > system.ridge:
                shares = f"{system.ridge / system.diagonal:.1e} to {ridge / system.diagonal:.1e}"
                sentence = f"{system.where}: the ridge is raised from {shares} of the mean diagonal ({reason})"
                self._solver.warn_once("ridge", sentence)
            return result
        raise InputError(
            f"{system.where}: the refit has no solution at any ridge ({reason}); give more calibration windows, or use "
            "--refit none and another criterion than obs"
        )

    def _with_memory(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except MemoryError as error:
            rows = len(self._problem.kernel)
            raise InputError(
                f"{self._problem.where}: the host has no memory for a system of {rows:,} x {rows:,} numbers in "
                "float64; use --solver device, or --refit none and another criterion than obs"
            ) from error


def _ridges(system: System) -> Iterator[float]:
    """The ridge of a system, then larger ones."""
    yield system.ridge
    yield from (share * system.diagonal for share in RIDGES if share * system.diagonal > system.ridge)


# ----------------------------------------------------------------------------------------------------------- device


class DeviceFit(Fit):
    """The solutions in float32 on the device.

    The moments stay where they are, on the device or on the host. Each system is made from a copy. A program begins
    when the one before has ended: the arrays of one that waits in the queue would take memory already.

    Args:
      problem: the problem.

    Raises (all methods):
      LinAlgError: float32 is not precise enough, or the moments are not finite.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._chooses = problem.ridge is None and problem.held_out is not None
        self._share = RIDGE if problem.ridge is None else problem.ridge
        inputs, outputs = problem.kernel.shape
        rows = shared_rows(inputs, outputs, problem.groups.count, problem.mesh)
        self._places: dict[str, Any] = {"mesh": problem.mesh, "rows": rows}

    def order(self, keep: int) -> Removal:
        """See `Fit`."""
        count = self._problem.groups.count - keep
        found = self.removed(count)
        order, errors = (gather(array)[:count] for array in (found.order, found.errors))
        _check(bool(np.isfinite(errors).all()))
        return Removal(order.astype(np.int64), errors.astype(np.float64))

    def refit(self, kept: Bool[np.ndarray, " count"], least_squares: bool = True) -> Solution:
        """See `Fit`."""
        return self._solution(self.refitted(jnp.asarray(kept), least_squares))

    def choose_and_refit(self, keep: int, least_squares: bool = True) -> tuple[Bool[np.ndarray, " count"], Solution]:
        """See `Fit`; the kept groups do not pass the host between the programs."""
        count = self._problem.groups.count - keep
        removed = self.removed(count)
        found = self.refitted(removed.kept, least_squares)
        _check(bool(np.isfinite(gather(removed.errors)[:count]).all()))
        return gather(removed.kept), self._solution(found)

    def removed(self, count: int) -> Removed:
        """The order of removal of some groups."""
        system, groups = self._system(self._problem.total, self._share), self._problem.groups
        counts = {"count": groups.count, "parts": groups.parts}
        found, _ = device_system.order(system.matrix, system.right, jnp.int32(count), **counts, **self._places)
        return jax.block_until_ready(found)

    def refitted(self, kept: Bool[Array, " count"], least_squares: bool = True) -> device_system.Refitted:
        """The rows of the kept groups, with the ridge that held-out windows choose for them."""
        share = number(self._share)
        if self._chooses and least_squares:
            share = self.best_share(kept)
        problem = self._problem
        sums, kernel = placed(problem.total, **self._places), placed_kernel(problem.kernel, **self._places)
        numbers = Numbers.of(problem.tokens[0], problem.towards, 0.0)._replace(share=share)
        settings = {"biased": problem.biased, "least_squares": least_squares} | self._places
        return device_system.refit(sums, kernel, numbers, kept, **settings)

    def best_share(self, kept: Bool[Array, " count"]) -> Pair:
        """The ridge that held-out windows choose, as a share of the mean diagonal."""
        problem, stride = self._problem, device_system.stride_of(self._problem.kernel.shape[1])
        assert problem.held_out is not None
        fit = self._system(problem.total, 0.0, problem.held_out, stride)
        found = device_system.solutions(fit, kept, jnp.asarray(CHOICES, jnp.float32), **self._places)
        del fit  # two matrices at a time
        found = jax.block_until_ready(found)
        held = self._system(problem.held_out, 0.0, stride=stride)
        return jax.block_until_ready(device_system.best_share(held, kept, found, **self._places))

    def _system(
        self, sums: tuple[Any, ...], share: float, less: tuple[Any, ...] | None = None, stride: int = 1
    ) -> device_system.DeviceSystem:
        problem = self._problem
        total, held = problem.tokens
        tokens = held if sums is problem.held_out else total - held if less else total
        gram, *others = placed(sums, **self._places)
        gram = jnp.copy(gram) if isinstance(sums[0], jax.Array) else gram  # the program takes its memory
        numbers = Numbers.of(tokens, problem.towards, share)
        less, kernel = less and placed(less, **self._places), placed_kernel(problem.kernel, **self._places)
        settings = {"biased": problem.biased, "stride": stride} | self._places
        return device_system.system(gram, tuple(others), less, kernel, numbers, **settings)

    def _solution(self, found: device_system.Refitted) -> Solution:
        _check(bool(gather(found.sound)))
        return Solution(found.kernel, as_float64(found.shift) if self._problem.biased else None)


def _check(sound: bool) -> None:
    if not sound:
        raise LinAlgError("the system takes more precision than float32 has")


class WithFallback(Fit):
    """The solutions on the device, and on the host from the first failure on.

    Args:
      problem: the problem.
      solver: the solver of the walk, which warns.

    Raises (all methods):
      InputError: see `HostFit`.
    """

    def __init__(self, problem: Problem, solver: Solver) -> None:
        self._problem, self._solver = problem, solver
        self._fit: Fit = DeviceFit(problem)

    def order(self, keep: int) -> Removal:
        """See `Fit`."""
        return self._solved(lambda fit: fit.order(keep))

    def refit(self, kept: Bool[np.ndarray, " count"], least_squares: bool = True) -> Solution:
        """See `Fit`."""
        return self._solved(lambda fit: fit.refit(kept, least_squares))

    def choose_and_refit(self, keep: int, least_squares: bool = True) -> tuple[Bool[np.ndarray, " count"], Solution]:
        """See `Fit`."""
        return self._solved(lambda fit: fit.choose_and_refit(keep, least_squares))

    def _solved(self, work: Callable[[Fit], T]) -> T:
        if isinstance(self._fit, DeviceFit):
            try:
                return work(self._fit)
            except LinAlgError as error:
                reason = cause(error)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                reason = shortened(cause(error), 120)
            sentence = f"{self._problem.where}: solved on the host in place of the device ({reason})"
            self._solver.warn_once("device", sentence)
            self._fit = HostFit(on_host(self._problem), self._solver)
        return work(self._fit)
