"""The allocation `measured`: the counts with the least sum of measured losses, by dynamic programming over levels."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil, inf, isfinite

import numpy as np
from jaxtyping import Float

from minillm_jax.budget.inventory import Counts, Inventory, kept_count
from minillm_jax.errors import InputError
from minillm_jax.settings import Budget

# Kind -> for each layer, the measured numbers of kept groups, descending.
Levels = Mapping[str, Sequence[Sequence[int]]]
# Kind -> for each layer, the change of the loss at each level, nats; not finite where the pruned model overflows.
Losses = Mapping[str, Sequence[Sequence[float]]]

# Savings are counted in at most this many units: exactly if they are no more, otherwise rounded up to whole units.
_UNITS = 4096


def levels(inventory: Inventory, budget: Budget, shares: Sequence[float]) -> dict[str, list[list[int]]]:
    """The counts at which a layer's loss is measured: kind -> for each layer, descending, first all its groups.

    Args:
      inventory: the groups of the model.
      budget: its multiples round the counts, and its `keep_at_least` bounds them from below.
      shares: the removed shares to try, and beside them the largest that the budget allows. A layer outside the pruned
        layers has one level, all its groups.
    """
    levels_of = {}
    for kind in inventory.counts:
        multiple, rows = budget.multiple(kind), []
        for sizes, parts in zip(inventory.sizes(kind, budget), inventory.parts[kind], strict=True):
            asked = {parts * kept_count(sizes[-1] // parts, share, multiple) for share in shares}
            rows.append(sorted(({sizes[0]} | asked).intersection(sizes) | {sizes[-1]}, reverse=True))
        levels_of[kind] = rows
    return levels_of


def cheapest(inventory: Inventory, limit: float, tried: Levels, losses: Losses, budget: Budget | None = None) -> Counts:
    """The counts with the least sum of losses within the limit, by dynamic programming over the measured levels.

    Steps from one allowed size to the next then correct the counts: fewer groups where rounded units exceed the limit,
    more groups where the levels leave room below it. Losses between two levels are interpolated linearly. A level whose
    loss is not finite is never chosen, nor a size beside it.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model.
      tried: the measured counts, from `levels`.
      losses: the change of the loss at each of these counts, with one kind of one layer pruned alone, nats.
      budget: its multiples round the counts; no rounding by default.

    Raises:
      InputError: even the fewest measured groups of all layers exceed the limit, or no finite losses are within it.
    """
    fewest = {kind: [counts[-1] for counts in rows] for kind, rows in tried.items()}
    if inventory.left(fewest) > limit:
        raise InputError(
            f"the fewest measured groups of all layers leave more than the limit of {limit:,.0f}; use a smaller ratio "
            "or a larger target, or a smaller --keep-at-least"
        )
    ordered = {kind: [[x if isfinite(x) else inf for x in row] for row in rows] for kind, rows in losses.items()}
    kept = _best_levels(inventory, limit, tried, ordered)
    if kept is None or not correct(inventory, limit, kept, tried, ordered, budget or Budget(keep_at_least=0.0)):
        raise InputError(no_finite_loss(limit, losses))
    return kept


def no_finite_loss(limit: float, losses: Losses) -> str:
    """The message where no counts within the limit have finite losses."""
    return (
        f"no choice within the limit of {limit:,.0f} has a finite loss: the loss overflows where "
        f"{_overflowing(losses)} are pruned; use --dtype float32, a smaller ratio or a larger target"
    )


def _overflowing(losses: Losses) -> str:
    """The kinds and layers with a loss that is not finite, in words."""
    layers = {kind: [n for n, row in enumerate(rows) if not np.isfinite(row).all()] for kind, rows in losses.items()}
    words = [f"{kind} groups of layers {', '.join(map(str, of_kind))}" for kind, of_kind in layers.items() if of_kind]
    return " and ".join(words)


def _best_levels(inventory: Inventory, limit: float, tried: Levels, losses: Losses) -> Counts | None:
    """The level of every layer with the least sum of losses; None where no sum within the limit is finite."""
    unit = max(1.0, (inventory.whole - limit) / _UNITS)
    needed = ceil((inventory.whole - limit) / unit - 1e-9)
    sites = [(kind, layer) for kind in inventory.counts for layer in inventory.layers]
    best = np.full(needed + 1, np.inf)  # least sum of losses by number of saved units; the last entry: needed or more
    best[0] = 0.0
    steps = []
    for kind, layer in sites:
        counts = tried[kind][layer]
        saved = [ceil(inventory.costs[kind][layer] * (counts[0] - count) / unit - 1e-9) for count in counts]
        best, choice, before = _with_site(best, saved, losses[kind][layer])
        steps.append((choice, before))
    if not isfinite(best[-1]):
        return None
    kept = {kind: list(counts) for kind, counts in inventory.counts.items()}
    place = needed
    for (kind, layer), (choice, before) in zip(reversed(sites), reversed(steps), strict=True):
        kept[kind][layer] = tried[kind][layer][choice[place]]
        place = before[place]
    return kept


def _with_site(
    best: Float[np.ndarray, " units"], saved: Sequence[int], losses: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of the dynamic program: the least sums of losses with one more site.

    Args:
      best: least sum of losses of the sites so far, by number of saved units.
      saved: units saved at each level of the site.
      losses: loss of each level; infinite where it must not be chosen, never NaN.

    Returns:
      By number of saved units: the least sums, the level of the site in each, and the number of units that the sites
      before it save.
    """
    last = len(best) - 1
    sums = np.full((len(saved), len(best)), np.inf)
    before = np.zeros_like(sums, dtype=np.int64)
    for level, (units, loss) in enumerate(zip(saved, losses, strict=True)):
        units = min(units, last)
        sums[level, units:] = best[: last + 1 - units] + loss
        before[level, units:] = np.arange(last + 1 - units)
        enough = last - units + int(np.argmin(best[last - units :]))
        sums[level, last], before[level, last] = best[enough] + loss, enough
    choice = np.argmin(sums, axis=0)
    entries = np.arange(len(best))
    return sums[choice, entries], choice, before[choice, entries]


def correct(inventory: Inventory, limit: float, kept: Counts, tried: Levels, losses: Losses, budget: Budget) -> bool:
    """Changes the counts by steps: removals until the limit holds, then additions as long as one fits.

    Each step leads to the next allowed size of one layer. It is the step with the least change of the loss for its
    cost. Returns whether the limit holds.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model.
      kept: the counts, changed in place.
      tried: the counts with known losses, from `levels`.
      losses: the loss at each of these counts, infinite where it must not be chosen.
      budget: its multiples round the counts.
    """
    sizes = {
        kind: [[size for size in row if size >= tried[kind][layer][-1]] for layer, row in enumerate(rows)]
        for kind, rows in ((kind, inventory.sizes(kind, budget)) for kind in inventory.counts)
    }

    def step(sign: int) -> tuple[float, str, int, int] | None:
        """The best step of this sign: change of the loss for its cost, kind, layer, new size; None without one."""
        steps = []
        for kind in inventory.counts:
            for layer in inventory.layers:
                row, now = sizes[kind][layer], kept[kind][layer]
                place = bisect_left(row, now) + sign
                if not 0 <= place < len(row):
                    continue
                cost = (row[place] - now) * inventory.costs[kind][layer]
                change = loss_at(tried[kind][layer], losses[kind][layer], row[place]) - loss_at(
                    tried[kind][layer], losses[kind][layer], now
                )
                if isfinite(change) and (sign < 0 or left + cost <= limit):
                    steps.append((change / abs(cost), kind, layer, row[place]))
        return min(steps, key=lambda one: one[0], default=None)

    left = inventory.left(kept)
    for sign in (-1, 1):
        while (left > limit or sign > 0) and (best := step(sign)) is not None:
            _, kind, layer, size = best
            kept[kind][layer] = size
            left = inventory.left(kept)
    return left <= limit


def loss_at(counts: Sequence[int], losses: Sequence[float], count: int) -> float:
    """The loss at a count between measured ones, by linear interpolation; infinite beside an infinite loss."""
    for (more, loss), (fewer, other) in pairwise(zip(counts, losses, strict=True)):
        if fewer < count <= more:
            return (
                loss if count == more or not isfinite(loss) else loss + (other - loss) * (more - count) / (more - fewer)
            )
    return losses[-1]
