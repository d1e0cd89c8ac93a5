"""The linear system of a refit, and what happens to a system that cannot be solved as it is.

Both refits fit a matrix W' to a target by ridge regression, with the ridge towards a known matrix W:

    (G + λI) W' = (1 − γ) G W + γ C + λ W        G = Xᵀ X, C = Xᵀ target, λ = ridge · mean diagonal of G

For an output projection, X is its input, W its dense kernel, the target the gap, and γ is α. For the input refit, X is
the input of a sublayer, W the identity, the target the dense input, and γ is β.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Float, Int
from numpy.linalg import LinAlgError

from minillm_jax.errors import InputError, cause, shortened, warn
from minillm_jax.pruning import solve
from minillm_jax.pruning.walk import raw_moments

# Shares of the mean diagonal that are tried as the ridge, in turn, where a system is not positive definite.
RIDGES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0)

# The ridge by which OBS orders groups where another is chosen for the refit, as a share of the mean diagonal.
RIDGE = 1e-2
# The held-out share of the calibration windows.
HELD_OUT = 0.25

# Ridges among which held-out windows choose, ascending, as shares of the mean diagonal.
CHOICES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
# The smallest ridge whose gain on held-out windows is at least this share of the largest gain is chosen: the squared
# error is flat around its minimum, and of equal ridges the smaller one gives the smaller loss (measured).
ENOUGH = 0.99
# Columns of the matrix on which ridges are compared, evenly spaced.
COLUMNS = 256

T = TypeVar("T")


@dataclass(frozen=True)
class System:
    """A linear system at full width, float64: hessian · W' = right.

    Attributes:
      hessian: G + λI, the matrix of the system.
      right: (1 − γ) G W + γ C + λ W, its right-hand side.
      ridge: λ.
      diagonal: mean diagonal of G; 1 where G is zero.
      kernel: W, the matrix that the ridge keeps W' near to.
      mean: mean of the inputs X over all tokens; None for a map without a bias.
      target: mean of the target over all tokens.
      where: layer and matrix, for messages.
      held_out: chooses the ridge of the kept rows; None where λ is given.
    """

    hessian: Float[np.ndarray, "I I"]
    right: Float[np.ndarray, "I D"]
    ridge: float
    diagonal: float
    kernel: Float[np.ndarray, "I D"]
    mean: Float[np.ndarray, " I"] | None
    target: Float[np.ndarray, " D"]
    where: str
    held_out: "HeldOut | None" = None

    def rows(self, rows: Int[np.ndarray, " kept"], solver: str) -> Float[np.ndarray, "kept D"]:
        """The least-squares solution for the kept rows, with the ridge that held-out windows choose for these rows.

        Raises:
          LinAlgError: see `solve.solve`.
        """
        ridge = self.ridge if self.held_out is None else self.held_out.best(rows, solver) * self.diagonal
        return self.solution(rows, ridge, slice(None), solver)

    def solution(
        self, rows: Int[np.ndarray, " kept"], ridge: float, columns: slice, solver: str
    ) -> Float[np.ndarray, "kept _"]:
        """The least-squares solution for some rows and columns, with any ridge λ.

        Raises:
          LinAlgError: see `solve.solve`.
        """
        more = ridge - self.ridge
        if solver == "device":
            matrix, right, kernel = self.on_device
            right, kept = right[:, columns] + more * kernel[:, columns], solve.mask(rows, len(matrix))
            found = np.asarray(solve.rows_on_device(matrix, right, kept, jnp.float32(more)))
            return solve.checked(found[rows], "float32").astype(np.float64)
        hessian = self.hessian[np.ix_(rows, rows)]
        np.fill_diagonal(hessian, hessian.diagonal() + more)
        right = self.right[rows, columns] + more * self.kernel[rows, columns]
        return solve.solve(hessian, right, solver)

    @cached_property
    def on_device(self) -> solve.OnDevice:
        """The system in float32 on the device, for all its solutions there."""
        return solve.OnDevice(*(jnp.asarray(array, jnp.float32) for array in (self.hessian, self.right, self.kernel)))

    def shift(self, rows: Int[np.ndarray, " kept"], kernel: Float[np.ndarray, "kept D"]) -> np.ndarray | None:
        """The change of the bias that gives the output with these rows the mean of the target; None without a bias."""
        return None if self.mean is None else self.target - self.mean[rows] @ kernel

    def with_ridge(self, ridge: float) -> "System":
        """The same system with a larger ridge λ, which no held-out windows choose."""
        hessian, more = self.hessian.copy(), ridge - self.ridge
        np.fill_diagonal(hessian, hessian.diagonal() + more)
        right = self.right + more * self.kernel
        return replace(self, hessian=hessian, right=right, ridge=ridge, held_out=None)


@dataclass(frozen=True)
class HeldOut:
    """Chooses the ridge that predicts held-out windows best.

    The squared error of W' on them is, up to a constant, tr(W'ᵀ G W') − 2 tr(W'ᵀ R), with the Gram matrix G of the
    held-out inputs and R = (1 − γ) G W + γ C.

    Both systems are made when they are first needed: the order of removal comes before, and needs the memory.

    Attributes:
      make_fit: makes `fit`.
      make_held: makes `held`.
    """

    make_fit: Callable[[], System]
    make_held: Callable[[], System]

    @cached_property
    def fit(self) -> System:
        """The system of the windows that are not held out, with a ridge of 0."""
        return self.make_fit()

    @cached_property
    def held(self) -> System:
        """The system of the held-out windows, with a ridge of 0."""
        return self.make_held()

    def best(self, rows: Int[np.ndarray, " kept"], solver: str) -> float:
        """The chosen ridge, as a share of the mean diagonal: of `CHOICES`, the smallest with `ENOUGH` of the best gain.

        The gain of a ridge is the held-out error of the kept rows as they are, minus that of the refitted rows. The
        largest ridge is chosen where none has a gain.
        """
        columns = slice(None, None, -(-self.fit.kernel.shape[1] // COLUMNS))
        gains = (self._gains_on_device if solver == "device" else self._gains)(rows, columns)
        most = max(gains.values(), default=0.0)
        return next((ridge for ridge, gain in gains.items() if gain >= ENOUGH * most > 0), CHOICES[-1])

    def _gains(self, rows: Int[np.ndarray, " kept"], columns: slice) -> dict[float, float]:
        """The gain of every ridge that has a solution, in float64 on the host."""
        gram, right = self.held.hessian[np.ix_(rows, rows)], self.held.right[rows, columns]

        def error(kernel: np.ndarray) -> float:
            return float(np.sum(kernel * (gram @ kernel - 2 * right)))

        before, gains = error(self.fit.kernel[rows, columns]), {}
        for ridge in CHOICES:
            # A small ridge may leave the system singular. Where all do, the largest is tried on the whole system.
            with suppress(LinAlgError):
                gains[ridge] = before - error(self.fit.solution(rows, ridge * self.fit.diagonal, columns, "host"))
        return gains

    def _gains_on_device(self, rows: Int[np.ndarray, " kept"], columns: slice) -> dict[float, float]:
        """The same in float32 on the device, by one program for any number of rows."""
        both = self.fit.on_device, self.held.on_device
        fit, held = (solve.OnDevice(m, r[:, columns], k[:, columns]) for m, r, k in both)
        more = np.asarray(CHOICES) * self.fit.diagonal - self.fit.ridge
        kept = solve.mask(rows, len(self.fit.kernel))
        gains = np.asarray(solve.gains_on_device(fit, held, kept, jnp.asarray(more, jnp.float32)), np.float64)
        return {ridge: gain for ridge, gain in zip(CHOICES, gains.tolist(), strict=True) if np.isfinite(gain)}


def system_of(
    moments: Sequence[np.ndarray],
    kernel: Float[np.ndarray, "I D"],
    tokens: int,
    towards: float,
    ridge: float,
    biased: bool,
    where: str,
    solver: str = "host",
) -> System:
    """The linear system of a map.

    Args:
      moments: the fields of `walk.Moments` or `walk.InputMoments`.
      kernel: W, float64.
      tokens: number of tokens in the moments.
      towards: γ, from 0 (the target is the map's own dense output) to 1.
      ridge: λ as a share of the mean diagonal of G.
      biased: the map has a bias: it is fitted on centred inputs and targets.
      where: layer and matrix, for messages.
      solver: `host` (float64); `device` computes the matrix product in float32.

    Raises:
      InputError: the moments are not finite.
    """
    gram, inputs, cross, targets, center, target_center = (moment.astype(np.float64) for moment in moments)
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        raise InputError(
            f"the input of {where} is not finite on the calibration windows: the model's weights are broken, or "
            "overflow their type; use --dtype float32"
        )
    mean, target = center + inputs / tokens, target_center + targets / tokens
    if biased:  # a covariance is the same about any center
        for rows in solve.row_blocks(len(gram)):
            gram[rows] -= np.outer(inputs[rows] / tokens, inputs)
        cross -= np.outer(inputs / tokens, targets)
    else:
        gram, cross = raw_moments(gram, inputs, cross, targets, center, target_center, tokens)
    # Inputs of zeros have a trace of zero: any ridge keeps the dense kernel.
    diagonal = np.trace(gram) / len(gram) or 1.0
    penalty = ridge * diagonal
    right = (1 - towards) * solve.product(gram, kernel, solver) + towards * cross + penalty * kernel
    mean_target = (1 - towards) * (mean @ kernel) + towards * target
    np.fill_diagonal(gram, gram.diagonal() + penalty)  # in place: for a 7B model this matrix takes a gigabyte
    return System(gram, right, penalty, diagonal, kernel, mean if biased else None, mean_target, where)


def system_with_ridge(
    moments: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray] | None,
    tokens: tuple[int, int],
    ridge: float | None,
    make: Callable[[Sequence[np.ndarray], int, float], System],
) -> System:
    """The system of a map with a given ridge, or with one that held-out windows choose.

    Args:
      moments: over all windows; the fields of `walk.Moments` or `walk.InputMoments`.
      held_out: the same over the held-out windows; None where there are none.
      tokens: number of all tokens, and of those of the held-out windows.
      ridge: λ as a share of the mean diagonal; None to choose it. Without held-out windows that is `RIDGE`.
      make: moments, number of tokens, ridge -> system.
    """
    system = make(moments, tokens[0], RIDGE if ridge is None else ridge)
    if ridge is not None or held_out is None:
        return system

    def make_fit() -> System:
        fit = [total - held for total, held in zip(moments[:4], held_out[:4], strict=True)]
        return make([*fit, *moments[4:]], tokens[0] - tokens[1], 0.0)

    return replace(system, held_out=HeldOut(make_fit, lambda: make(held_out, tokens[1], 0.0)))


class Solver:
    """Solves the systems of one walk, on the host or on the device.

    A system that fails on the device, for lack of precision or of memory, is solved on the host. A system that is not
    positive definite on the host gets a larger ridge. The first case of each kind is a warning.

    Args:
      name: `host` or `device`.
    """

    def __init__(self, name: str = "host") -> None:
        self.name = name
        self._warned: set[str] = set()

    def run(self, system: System, work: Callable[[System, str], T]) -> T:
        """The result of `work`, with the least ridge that it succeeds with.

        Args:
          system: the system, with its ridge.
          work: called with a system and `host` or `device`; raises LinAlgError where it cannot be solved.

        Raises:
          InputError: no ridge helps, or the host has not enough memory.
        """
        reason = ""
        for ridge in _ridges(system):
            raised = system if ridge == system.ridge else system.with_ridge(ridge)
            try:
                result = self._on(raised, work)
            except LinAlgError as error:
                reason = reason or cause(error)
                continue
            if ridge > system.ridge:
                shares = f"{system.ridge / system.diagonal:.1e} to {ridge / system.diagonal:.1e}"
                self._warn(
                    "ridge", f"{system.where}: the ridge is raised from {shares} of the mean diagonal ({reason})"
                )
            return result
        raise InputError(
            f"{system.where}: the refit has no solution at any ridge ({reason}); give more calibration windows, or use "
            "--refit none and another criterion than obs"
        )

    def _on(self, system: System, work: Callable[[System, str], T]) -> T:
        if self.name == "device":
            try:
                return work(system, "device")
            except LinAlgError as error:
                reason = cause(error)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                reason = shortened(cause(error), 120)
            self._warn("device", f"{system.where}: solved on the host in place of the device ({reason})")
        try:
            return work(system, "host")
        except MemoryError as error:
            rows = len(system.hessian)
            raise InputError(
                f"{system.where}: the host has no memory for a system of {rows:,} x {rows:,} numbers in float64; use "
                "--solver device, or --refit none and another criterion than obs"
            ) from error

    def _warn(self, kind: str, sentence: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn(f"{sentence}; further cases in this run are not reported")


def _ridges(system: System) -> Iterator[float]:
    """The ridge of a system, then larger ones."""
    yield system.ridge
    yield from (share * system.diagonal for share in RIDGES if share * system.diagonal > system.ridge)
