"""The linear system of a refit, and what happens to a system that cannot be solved as it is.

Both refits fit a matrix W' to a target by ridge regression, with the ridge towards a known matrix W:

    (G + λI) W' = (1 − γ) G W + γ C + λ W        G = Xᵀ X, C = Xᵀ target, λ = ridge · mean diagonal of G

For an output projection, X is its input, W its dense kernel, the target the gap, and γ is α. For the input refit, X is
the input of a sublayer, W the identity, the target the dense input, and γ is β.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.linalg import LinAlgError

from minillm_jax.errors import InputError
from minillm_jax.pruning import solve

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

    def rows(self, rows: Int[np.ndarray, " kept"]) -> Float[np.ndarray, "kept D"]:
        """The least-squares solution for the kept rows, with the ridge that held-out windows choose for these rows.

        Raises:
          LinAlgError: see `solve.solve`.
        """
        more = 0.0 if self.held_out is None else self.held_out.best(rows) * self.diagonal - self.ridge
        hessian = self.hessian[np.ix_(rows, rows)]
        np.fill_diagonal(hessian, hessian.diagonal() + more)
        return solve.solve(hessian, self.right[rows] + more * self.kernel[rows])

    def shift(self, rows: Int[np.ndarray, " kept"], kernel: Float[np.ndarray, "kept D"]) -> np.ndarray | None:
        """The change of the bias that gives the output with these rows the mean of the target; None without a bias."""
        return None if self.mean is None else self.target - self.mean[rows] @ kernel

    def with_ridge(self, ridge: float) -> "System":
        """The same system with a larger ridge λ, which no held-out windows choose."""
        hessian, more = self.hessian.copy(), ridge - self.ridge
        np.fill_diagonal(hessian, hessian.diagonal() + more)
        right = self.right + more * self.kernel
        return replace(self, hessian=hessian, right=right, ridge=ridge, held_out=None)


class HostMoments:
    """Moments on the host, moved to where a map needs them: to the means with a bias, else to zero.

    The matrices stay float32. Their rows are float64 when they are used.

    Args:
      moments: about the centers of the walk; the fields of `walk.Moments` or `walk.InputMoments`.
      tokens: number of tokens in the moments.
      biased: whether the map has a bias: it is fitted on centred inputs and targets.
    """

    def __init__(self, moments: Sequence[np.ndarray], tokens: int, biased: bool) -> None:
        self._gram, self._cross, self._tokens, self._biased = moments[0], moments[2], tokens, biased
        vectors = (moments[place].astype(np.float64) for place in (1, 3, 4, 5))
        self._inputs, self._targets, self._center, self._target_center = vectors

    @property
    def mean(self) -> Float[np.ndarray, " I"]:
        """The mean of the inputs."""
        return self._center + self._inputs / self._tokens

    @property
    def target(self) -> Float[np.ndarray, " D"]:
        """The mean of the target."""
        return self._target_center + self._targets / self._tokens

    @property
    def finite(self) -> bool:
        """Whether all products are finite."""
        return bool(np.isfinite(self._gram).all() and np.isfinite(self._cross).all())

    def diagonal(self) -> float:
        """The mean diagonal of the Gram matrix; 1 where it is zero: any ridge then keeps the dense kernel."""
        diagonal = self._gram.diagonal().astype(np.float64)
        if self._biased:
            return float(np.mean(diagonal - self._inputs**2 / self._tokens)) or 1.0
        moved = self._center * (2 * self._inputs + self._tokens * self._center)
        return float(np.mean(diagonal + moved)) or 1.0

    def gram(self, rows: slice | Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows I"]:
        """Rows of the Gram matrix."""
        inputs, center, part = self._inputs, self._center, self._gram[rows].astype(np.float64)
        if self._biased:  # a covariance is the same about any center
            part -= np.outer(inputs[rows] / self._tokens, inputs)
        else:
            part += np.outer(center[rows], inputs + self._tokens * center)
            part += np.outer(inputs[rows], center)
        return part

    def cross(self, columns: slice = slice(None)) -> Float[np.ndarray, "I D"]:
        """Columns of the products of inputs and target."""
        part, targets = self._cross[:, columns].astype(np.float64), self._targets[columns]
        if self._biased:
            part -= np.outer(self._inputs / self._tokens, targets)
        else:
            part += np.outer(self._center, targets)
            part += np.outer(self._inputs + self._tokens * self._center, self._target_center[columns])
        return part


class Part(NamedTuple):
    """Some rows and columns of a system with a ridge of 0, float64.

    Attributes:
      gram: G of the rows.
      right: the right-hand side of the rows and columns.
      kernel: W of the rows and columns.
      diagonal: mean diagonal of the whole G; 1 where G is zero.
    """

    gram: Float[np.ndarray, "rows rows"]
    right: Float[np.ndarray, "rows columns"]
    kernel: Float[np.ndarray, "rows columns"]
    diagonal: float


@dataclass(frozen=True)
class HeldOut:
    """Chooses the ridge that predicts held-out windows best.

    The squared error of W' on them is, up to a constant, tr(W'ᵀ G W') − 2 tr(W'ᵀ R), with the Gram matrix G of the
    held-out inputs and R = (1 − γ) G W + γ C.

    Only the kept rows of both systems are ever made: at 7B a whole matrix takes a gigabyte.

    Attributes:
      fit: makes rows and columns of the system of the windows that are not held out.
      held: the same of the held-out windows.
    """

    fit: Callable[[Int[np.ndarray, " kept"]], Part]
    held: Callable[[Int[np.ndarray, " kept"]], Part]

    def best(self, rows: Int[np.ndarray, " kept"]) -> float:
        """The chosen ridge, as a share of the mean diagonal: of `CHOICES`, the smallest with `ENOUGH` of the best gain.

        The gain of a ridge is the held-out error of the kept rows as they are, minus that of the refitted rows. The
        largest ridge is chosen where none has a gain.
        """
        fit, held, gains = self.fit(rows), self.held(rows), {}

        def error(kernel: np.ndarray) -> float:
            return float(np.sum(kernel * (held.gram @ kernel - 2 * held.right)))

        before = error(fit.kernel)
        for choice in CHOICES:
            hessian, ridge = fit.gram.copy(), choice * fit.diagonal
            np.fill_diagonal(hessian, hessian.diagonal() + ridge)
            # A small ridge may leave the system singular. Where all do, the largest is tried on the whole system.
            with suppress(LinAlgError):
                gains[choice] = before - error(solve.solve(hessian, fit.right + ridge * fit.kernel))
        most = max(gains.values(), default=0.0)
        return next((ridge for ridge, gain in gains.items() if gain >= ENOUGH * most > 0), CHOICES[-1])


def system_of(
    moments: Sequence[np.ndarray],
    kernel: Float[np.ndarray, "I D"],
    tokens: int,
    towards: float,
    ridge: float,
    biased: bool,
    where: str,
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

    Raises:
      InputError: the moments are not finite.
    """
    sums = HostMoments(moments, tokens, biased)
    if not sums.finite:
        raise InputError(
            f"the input of {where} is not finite on the calibration windows: the model's weights are broken, or "
            "overflow their type; use --dtype float32"
        )
    gram, diagonal = np.empty((len(kernel),) * 2), sums.diagonal()
    for rows in solve.row_blocks(len(gram)):
        gram[rows] = sums.gram(rows)
    penalty, mean = ridge * diagonal, sums.mean
    right = (1 - towards) * (gram @ kernel) + towards * sums.cross() + penalty * kernel
    target = (1 - towards) * (mean @ kernel) + towards * sums.target
    np.fill_diagonal(gram, gram.diagonal() + penalty)  # in place: for a 7B model this matrix takes a gigabyte
    return System(gram, right, penalty, diagonal, kernel, mean if biased else None, target, where)


def part_of(
    moments: Sequence[np.ndarray],
    kernel: Float[np.ndarray, "I D"],
    tokens: int,
    towards: float,
    biased: bool,
    rows: Int[np.ndarray, " kept"],
) -> Part:
    """Some rows of the system of `system_of` with a ridge of 0, and the columns on which ridges are compared."""
    columns = slice(None, None, -(-kernel.shape[1] // COLUMNS))
    sums, narrow = HostMoments(moments, tokens, biased), kernel[:, columns]
    gram, right = np.empty((len(rows), len(rows))), towards * sums.cross(columns)[rows]
    for block in solve.row_blocks(len(rows)):
        whole_rows = sums.gram(rows[block])
        gram[block] = whole_rows[:, rows]
        right[block] += (1 - towards) * (whole_rows @ narrow)
    return Part(gram, right, narrow[rows], sums.diagonal())


def system_with_ridge(
    moments: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray] | None,
    kernel: Float[np.ndarray, "I D"],
    tokens: tuple[int, int],
    towards: float,
    ridge: float | None,
    biased: bool,
    where: str,
) -> System:
    """The system of a map with a given ridge, or with one that held-out windows choose; see `system_of`.

    Args:
      moments: over all windows; the fields of `walk.Moments` or `walk.InputMoments`.
      held_out: the same over the held-out windows; None where there are none.
      kernel: W, float64.
      tokens: number of all tokens, and of those of the held-out windows.
      towards: γ.
      ridge: λ as a share of the mean diagonal; None to choose it. Without held-out windows that is `RIDGE`.
      biased: whether the map has a bias.
      where: layer and matrix, for messages.
    """
    share = RIDGE if ridge is None else ridge
    system = system_of(moments, kernel, tokens[0], towards, share, biased, where)
    if ridge is not None or held_out is None:
        return system

    def fit(rows: Int[np.ndarray, " kept"]) -> Part:
        rest = [total - held for total, held in zip(moments[:4], held_out[:4], strict=True)]
        return part_of([*rest, *moments[4:]], kernel, tokens[0] - tokens[1], towards, biased, rows)

    def held(rows: Int[np.ndarray, " kept"]) -> Part:
        return part_of(held_out, kernel, tokens[1], towards, biased, rows)

    return replace(system, held_out=HeldOut(fit, held))
