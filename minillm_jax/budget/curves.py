"""The allocations by curves: the losses of all levels from a few measured levels and the errors of structured OBS.

Structured OBS knows the error of each removal, so that one order of removal is a curve: the squared error of a
sublayer's output by the number of removed groups. What a squared error costs the whole model differs between sublayers
by orders of magnitude. The divergence from the dense model is therefore measured for each sublayer at two levels. A
power of the error connects the two, and gives the loss of all other levels:

    loss(removed) ≈ divergence(measured) · (error(removed) / error(measured)) ^ power

Where a whole sublayer may be removed, its loss is measured too, and each two neighbours have a power of their own. With
one measured level the power is one. The allocation `measured` takes nine forward passes over all windows for each
sublayer, this one two passes over a few windows. `curves` finds the counts with the least sum of losses, `equal` the
same with equal counts in all layers.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from minillm_jax.budget.cheapest import Levels
from minillm_jax.data import calibration_size
from minillm_jax.data.batches import Batches

# The removed shares of the groups of a sublayer at which its loss is measured. One level of a half gives up to 7 % more
# perplexity on a small model that loses half of its groups, and three levels give no less than two (docs/LOG.md).
MEASURED_SHARES = (0.3, 0.7)

# The least and the largest power between two measured levels: on few tokens their divergences are noisy.
POWERS = (0.5, 3.0)

# Tokens on which they are measured. On 1,024 tokens the divergence grows with every level of every sublayer of a
# 30-layer model, but that of the same level on 1,536 tokens differed by up to 40 %. Twice as many tokens give about 2 %
# less perplexity on a small model at a half of its groups (docs/LOG.md), and take as much more time.
MEASURED_TOKENS = 1024

# Calibration tokens for each channel of the widest MLP from which the curves are taken, if there are more: the order
# of structured OBS and its errors are known from fewer tokens than the refit needs.
CURVE_FACTOR = 8

# Removed shares at which losses are computed from the curve.
SHARES = tuple(n / 40 for n in range(1, 40))

# The least measured divergence, as a share of the median over all sublayers: one of zero, rounding apart, would make
# all removals of its sublayer free.
LEAST = 0.02

# The least measured divergence in nats where all are zero: the logarithm of zero is not finite.
TINY = 1e-30


def windows_of_curves(batches: Batches, width: int) -> Batches:
    """The calibration windows from which the curves are taken.

    Args:
      batches: all calibration windows.
      width: channels of the widest MLP.
    """
    return batches.first(-(-tokens_of_curves(width) // batches.length))


def tokens_of_curves(width: int) -> int:
    """The calibration tokens from which the curves are taken, at most, for a model with so many channels."""
    return max(calibration_size.LEAST, CURVE_FACTOR * width)


def curve_losses(
    levels: Levels, measured: Levels, losses: dict[str, list[list[float]]], errors: dict[str, list[np.ndarray]]
) -> dict[str, list[list[float]]]:
    """The loss of every level, nats: kind -> for each layer, one number for each level.

    Args:
      levels: kind -> for each layer, numbers of kept groups, descending; the first is that of the dense model.
      measured: the same, with measured levels beside the first, or none for a layer that is not pruned.
      losses: the divergence at each measured level, nats.
      errors: the sum of the errors of structured OBS by the number of removed groups, from none.
    """
    found = np.asarray([row[1] for rows in losses.values() for row in rows if len(row) > 1])
    finite = found[np.isfinite(found) & (found > 0)]
    least = LEAST * float(np.median(finite)) if finite.size else 0.0
    return {
        kind: [
            _of_layer(levels[kind][layer], measured[kind][layer], losses[kind][layer], row, least)
            for layer, row in enumerate(rows)
        ]
        for kind, rows in errors.items()
    }


def _of_layer(
    levels: Sequence[int],
    measured: Sequence[int],
    losses: Sequence[float],
    errors: Float[np.ndarray, " _"],
    least: float,
) -> list[float]:
    if len(measured) < 2:
        return [0.0] * len(levels)
    of_levels = np.maximum(errors[[levels[0] - count for count in levels]], 0.0)
    known = np.asarray([errors[measured[0] - count] for count in measured[1:]])
    if not known[0] > 0:  # groups of zeros, whose removal changes nothing
        return of_levels.tolist()
    at_known = np.maximum.accumulate(np.maximum(losses[1:], max(least, TINY)))
    finite = int(np.isfinite(at_known).sum())
    found = _by_powers(of_levels, known[:finite], at_known[:finite]) if finite else np.zeros(len(levels))
    overflows = of_levels > (known[finite - 1] if finite else 0.0)
    return (np.where(overflows, np.inf, found) if finite < len(known) else found).tolist()


def _by_powers(
    errors: Float[np.ndarray, " levels"], known: Float[np.ndarray, " measured"], losses: Float[np.ndarray, " measured"]
) -> Float[np.ndarray, " levels"]:
    """The losses of errors: a power of the error through each two neighbours of the known errors, all ascending."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, at = np.log(errors), np.log(known)
        powers = np.clip(np.diff(np.log(losses)) / np.diff(at), *POWERS) if len(known) > 1 else np.ones(1)
        place = np.clip(np.searchsorted(at, logs) - 1, 0, len(powers) - 1)
        found = losses[place] * np.exp(np.nan_to_num(powers, nan=1.0)[place] * (logs - at[place]))
    return np.where(errors > 0, found, 0.0)
