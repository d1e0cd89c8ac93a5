"""The allocations by curves: the loss of every level from one measured level and the errors of structured OBS.

Structured OBS knows the error of each removal, so that one order of removal is a curve: the squared error of a
sublayer's output by the number of removed groups. What a squared error costs the whole model differs between sublayers
by orders of magnitude. One measured divergence from the dense model for each sublayer, at one level, gives that factor:

    loss(removed) ≈ divergence(measured) · error(removed) / error(measured)

Where a whole sublayer may be removed, its loss is measured too, and losses between the two measured levels are linear
in the error. On a LLaMA of 30 layers the factor is the same within a fifth at a quarter, a half and three quarters of
the channels. The allocation `measured` takes nine forward passes over all windows for each sublayer, this one a single
pass over a few windows. `curves` finds the counts with the least sum of losses, `equal` the same with equal counts in
all layers.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from minillm_jax.budget.cheapest import Levels

# The removed share of the groups of a sublayer at which its loss is measured.
MEASURED_SHARE = 0.5

# Tokens on which it is measured. On 1,024 tokens the divergence grows with every level of every sublayer of a 30-layer
# model (docs/LOG.md), but that of the same level on 1,536 tokens differed by up to 40 %.
MEASURED_TOKENS = 2048

# Removed shares at which losses are computed from the curve.
SHARES = tuple(n / 40 for n in range(1, 40))

# The least measured divergence, as a share of the median over all sublayers: one of zero, rounding apart, would make
# all removals of its sublayer free.
LEAST = 0.02


def curve_losses(
    levels: Levels, measured: Levels, losses: dict[str, list[list[float]]], errors: dict[str, list[np.ndarray]]
) -> dict[str, list[list[float]]]:
    """The loss of every level, nats: kind -> for each layer, one number for each level.

    Args:
      levels: kind -> for each layer, numbers of kept groups, descending; the first is that of the dense model.
      measured: the same, with one or two measured levels beside the first, or none for a layer that is not pruned.
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
    known = np.asarray([errors[measured[0] - count] for count in measured])
    if not known[1] > 0:  # groups of zeros, whose removal changes nothing
        return of_levels.tolist()
    factors = np.maximum([0.0, *losses[1:]], [0.0] + [least] * (len(losses) - 1))
    beyond = np.maximum(of_levels / known[-1], 1.0)
    return (np.interp(of_levels, known, factors) * beyond).tolist()
