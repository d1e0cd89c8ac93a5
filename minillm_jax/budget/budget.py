"""Budget: the number of groups that each layer keeps, and the choice of the kept groups by their scores.

A `Budget` says how much is removed and how the budget is shared between layers (`settings.Budget`). An `Inventory` says
how many groups a model has and what each costs. Every allocation is a function from both to the counts: kind -> for
each layer, the number of kept groups. `choose` then takes that many groups with the highest scores.

    part        all parts of a layer lose equally many groups: each key/value head is a part of the query heads; groups
                of other kinds have one part
    step        the smallest removal from one layer: one group of every part
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor

import numpy as np
from jaxtyping import Float

from minillm_jax.errors import InputError
from minillm_jax.model.axis_table import Kept
from minillm_jax.settings import Budget

Counts = dict[str, list[int]]


@dataclass(frozen=True)
class Inventory:
    """The groups of a model and their costs: kind -> one number for each layer; kinds in the order of the forward pass.

    Attributes:
      counts: number of groups.
      parts: number of parts in which the groups lie, each of equally many groups (see `tree.part_count`). Every part
        loses equally many groups.
      costs: cost of one group, in the measure of the budget.
      whole: cost of the dense model.
      layers: the pruned layers.
    """

    counts: Counts
    parts: Counts
    costs: Counts
    whole: int
    layers: range

    def left(self, kept: Mapping[str, Sequence[int]]) -> int:
        """The cost of a model with these numbers of kept groups."""
        saved = 0
        for kind, counts in self.counts.items():
            saved += sum(c * (n - k) for c, n, k in zip(self.costs[kind], counts, kept[kind], strict=True))
        return self.whole - saved

    def prunable(self) -> int:
        """The cost of all groups of the pruned layers together."""
        return sum(self.costs[k][layer] * n[layer] for k, n in self.counts.items() for layer in self.layers)


def kept_count(count: int, ratio: float, multiple: int = 1) -> int:
    """Number of kept groups of `count`: floor(count · ratio + 1/2) are removed, and at least one is kept.

    The ratio counts as the decimal number that is written: 0.29 of 50 is 14.5, although the float is a little less.
    The number of kept groups is rounded up to a multiple of `multiple`; where that exceeds `count`, down to the largest
    multiple within `count`; and to `count` itself where no multiple fits.
    """
    exact = max(1, count - floor(count * Decimal(str(ratio)) + Decimal("0.5")))
    rounded = min(-(-exact // multiple), count // multiple) * multiple
    return rounded or count


def by_ratio(inventory: Inventory, ratio: float, budget: Budget | None = None) -> Counts:
    """The counts after removal of the same share of the groups of every kind and pruned layer.

    Args:
      inventory: the groups of the model.
      ratio: the removed share.
      budget: its multiples round the counts; no rounding by default.
    """
    multiples = {kind: budget.multiple(kind) if budget else 1 for kind in inventory.counts}
    return {kind: _by_ratio(inventory, kind, ratio, multiple) for kind, multiple in multiples.items()}


def _by_ratio(inventory: Inventory, kind: str, ratio: float, multiple: int = 1, more: int = 0) -> list[int]:
    """The counts of one kind, with `more` steps kept in addition in every pruned layer, between one step and all."""
    counts = []
    for layer, (count, parts) in enumerate(zip(inventory.counts[kind], inventory.parts[kind], strict=True)):
        steps = count // parts
        kept = min(max(kept_count(steps, ratio, multiple) + more, 1), steps)
        counts.append(parts * kept if layer in inventory.layers else count)
    return counts


def limit_of(inventory: Inventory, budget: Budget, blocks: int) -> float:
    """The largest cost of the pruned model, in the measure of the budget.

    Args:
      inventory: the groups of the model, with costs in the measure of the budget.
      budget: the ratio or the target.
      blocks: number of parameters of the layers.

    Raises:
      InputError: the target is not below the cost of the dense model, or the limit cannot be reached.
    """
    if budget.target is not None:
        measure, limit = budget.target
        request = f"the target of {limit:,.0f} ({measure})"
        if not limit < inventory.whole:
            raise InputError(f"{request} is not below the {inventory.whole:,} of the model: there is nothing to remove")
    else:
        ratio = budget.ratio or 0.0
        if budget.ratio_of == "groups":
            return float(inventory.left(by_ratio(inventory, ratio, budget)))
        limit = inventory.whole - ratio * (blocks if budget.ratio_of == "blocks" else inventory.whole)
        request = f"a ratio of {ratio:g}"
    least = inventory.left({kind: _fewest(inventory, kind, budget.keep_at_least) for kind in inventory.counts})
    if limit < least:
        raise InputError(
            f"{request} allows {limit:,.0f} at most, but a model with the fewest groups of these kinds still has "
            f"{least:,}; ask for less, or prune more kinds of groups or layers"
        )
    return float(limit)


def _fewest(inventory: Inventory, kind: str, least: float) -> list[int]:
    """The smallest counts of one kind: at least the share `least` and one step of every pruned layer."""
    counts = []
    for layer, (count, parts) in enumerate(zip(inventory.counts[kind], inventory.parts[kind], strict=True)):
        fewest = parts * max(1, ceil(count // parts * least))
        counts.append(fewest if layer in inventory.layers else count)
    return counts


def uniform(inventory: Inventory, limit: float, budget: Budget) -> Counts:
    """The counts with the same share in every layer whose cost is within the limit.

    All kinds but the last (heads) lose the share that the limit requires of all groups together. The last kind
    (channels) then keeps as many groups as fit, so that the cost is less than one step in every layer below the limit.
    If even all or even the fewest groups of the last kind miss the limit, the other kinds change by single steps in
    every layer.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model.
      budget: its multiples round the counts.

    Raises:
      InputError: no such counts are within the limit.
    """
    share = min((inventory.whole - limit) / inventory.prunable(), 0.999)
    *leading, filler = inventory.counts
    steps_of = [zip(inventory.counts[kind], inventory.parts[kind], strict=True) for kind in inventory.counts]
    most = max(count // parts for rows in steps_of for count, parts in rows)

    def leading_counts(more: int) -> Counts:
        return {kind: _by_ratio(inventory, kind, share, budget.multiple(kind), more) for kind in leading}

    full = {filler: inventory.counts[filler]}
    first = next((more for more in range(most) if inventory.left(leading_counts(more) | full) > limit), 0)
    for more in range(first, -most, -1):
        counts = _fill(inventory, limit, leading_counts(more), filler, budget.multiple(filler))
        if counts is not None:
            return counts
    raise InputError(
        f"no number of groups, the same share in every layer, leaves at most {limit:,.0f}; use the allocation global "
        "or measured, or ask for less"
    )


def _fill(inventory: Inventory, limit: float, leading: Counts, filler: str, multiple: int) -> Counts | None:
    """The counts with the most groups of the kind `filler` within the limit, the same share in every layer.

    None where even the fewest groups of that kind exceed the limit.
    """
    sizes = {n // p for n, p in zip(inventory.counts[filler], inventory.parts[filler], strict=True)}
    ratios = sorted({removed / n for n in sizes for removed in range(n)})

    def fits(ratio: float) -> bool:
        return inventory.left(leading | {filler: _by_ratio(inventory, filler, ratio, multiple)}) <= limit

    place = bisect_left(ratios, True, key=fits)
    if place == len(ratios):
        return None
    return leading | {filler: _by_ratio(inventory, filler, ratios[place], multiple)}


# ------------------------------------------------------------------------------------ allocation: global, measured


def globally(
    inventory: Inventory, limit: float, budget: Budget, scores: Mapping[str, Sequence[np.ndarray]], per_cost: bool
) -> Counts:
    """The counts after removal of the steps with the lowest scores of the whole model, until the limit is reached.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model.
      budget: its `keep_at_least` bounds the counts from below.
      scores: kind -> for each layer, the scores of all groups. They must be comparable between layers.
      per_cost: compare scores divided by the cost of the groups, for scores that estimate losses. Standardised scores
        are compared as they are.
    """
    steps = []
    for kind, counts in inventory.counts.items():
        fewest = _fewest(inventory, kind, budget.keep_at_least)
        for layer in inventory.layers:
            parts = inventory.parts[kind][layer]
            sums = np.sort(np.asarray(scores[kind][layer]).reshape(parts, -1), axis=1).sum(axis=0)
            cost = parts * inventory.costs[kind][layer]
            sums = sums[: (counts[layer] - fewest[layer]) // parts] / (cost if per_cost else parts)
            steps += [(float(score), kind, layer) for score in sums]
    kept = {kind: list(counts) for kind, counts in inventory.counts.items()}
    left = inventory.whole
    for _, kind, layer in sorted(steps, key=lambda step: step[0]):
        if left <= limit:
            break
        kept[kind][layer] -= inventory.parts[kind][layer]
        left -= inventory.parts[kind][layer] * inventory.costs[kind][layer]
    return kept


def levels(inventory: Inventory, budget: Budget, shares: Sequence[float]) -> dict[str, list[list[int]]]:
    """The counts at which a layer's loss is measured: kind -> for each layer, descending, first all its groups.

    Args:
      inventory: the groups of the model.
      budget: its `keep_at_least` bounds the counts from below.
      shares: the removed shares to try. A layer outside the pruned layers has one level, all its groups.
    """
    levels_of = {}
    for kind, counts in inventory.counts.items():
        fewest, parts = _fewest(inventory, kind, budget.keep_at_least), inventory.parts[kind]
        levels_of[kind] = [
            sorted({max(fewest[i], parts[i] * kept_count(n // parts[i], s)) for s in shares} | {n}, reverse=True)
            if i in inventory.layers
            else [n]
            for i, n in enumerate(counts)
        ]
    return levels_of


# Savings are counted in at most this many units: exactly if they are no more, otherwise rounded up to whole units.
_UNITS = 4096


def cheapest(
    inventory: Inventory,
    limit: float,
    tried: Mapping[str, Sequence[Sequence[int]]],
    losses: Mapping[str, Sequence[Sequence[float]]],
) -> Counts:
    """The counts with the least sum of losses within the limit, by dynamic programming over the measured levels.

    Single steps then correct the counts: fewer groups where rounded units exceed the limit, more groups where the
    levels leave room below it. Losses between two levels are interpolated linearly.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model.
      tried: the measured counts, from `levels`.
      losses: the change of the loss at each of these counts, with one kind of one layer pruned alone, nats.

    Raises:
      InputError: even the fewest measured groups of all layers exceed the limit.
    """
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
    if not np.isfinite(best[-1]):
        raise InputError(
            f"the fewest measured groups of all layers leave more than the limit of {limit:,.0f}; ask for less, or "
            "lower --keep-at-least"
        )
    kept = {kind: list(counts) for kind, counts in inventory.counts.items()}
    place = needed
    for (kind, layer), (choice, before) in zip(reversed(sites), reversed(steps), strict=True):
        kept[kind][layer] = tried[kind][layer][choice[place]]
        place = before[place]
    return _corrected(inventory, limit, kept, tried, losses)


def _with_site(
    best: Float[np.ndarray, " units"], saved: Sequence[int], losses: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of the dynamic program: the least sums of losses with one more site.

    Args:
      best: least sum of losses of the sites so far, by number of saved units.
      saved: units saved at each level of the site.
      losses: loss of each level.

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


def _corrected(
    inventory: Inventory,
    limit: float,
    kept: Counts,
    tried: Mapping[str, Sequence[Sequence[int]]],
    losses: Mapping[str, Sequence[Sequence[float]]],
) -> Counts:
    """The counts after single steps: removals until the limit holds, then additions as long as one fits.

    Each step is the one with the least change of the loss for its cost.
    """

    def slope(kind: str, layer: int, sign: int) -> float:
        """Change of the loss by one step more (+1) or less (-1), divided by the cost of the step."""
        count, parts = kept[kind][layer], inventory.parts[kind][layer]
        counts, values = tried[kind][layer][::-1], losses[kind][layer][::-1]
        now, after = np.interp([count, count + sign * parts], counts, values)
        return float(after - now) / (parts * inventory.costs[kind][layer])

    def step(sign: int) -> bool:
        """Takes the best step of this sign; False where there is none."""
        sites = [
            (kind, layer)
            for kind, counts in inventory.counts.items()
            for layer in inventory.layers
            if tried[kind][layer][-1] <= kept[kind][layer] + sign * inventory.parts[kind][layer] <= counts[layer]
            and (sign < 0 or left + inventory.parts[kind][layer] * inventory.costs[kind][layer] <= limit)
        ]
        if not sites:
            return False
        kind, layer = min(sites, key=lambda site: slope(*site, sign))
        kept[kind][layer] += sign * inventory.parts[kind][layer]
        return True

    left = inventory.left(kept)
    while left > limit and step(-1):
        left = inventory.left(kept)
    while step(+1):
        left = inventory.left(kept)
    return kept


# ----------------------------------------------------------------------------------------------- choice of groups


def choose(
    scores: Mapping[str, Sequence[Float[np.ndarray, " _"]]],
    counts: Mapping[str, Sequence[int]],
    parts: Mapping[str, Sequence[int]],
) -> Kept:
    """The groups with the highest scores of every part of every layer. A tie keeps the lower index.

    Args:
      scores: kind -> one array of scores for each layer.
      counts: kind -> for each layer, the number of kept groups.
      parts: kind -> for each layer, the number of parts in which the groups lie. Every part keeps equally many groups.

    Returns:
      Kind -> for each layer, the indices of the kept groups, ascending.

    Raises:
      InputError: a score is not finite.
    """
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in scores}
    for kind, rows in kept.items():
        for layer, values in enumerate(scores[kind]):
            if not np.isfinite(values).all():
                raise InputError(f"the {kind} scores of layer {layer} are not finite; try another criterion or epsilon")
            by_part = np.reshape(values, (parts[kind][layer], -1))
            best = np.argsort(-by_part, axis=1, kind="stable")[:, : counts[kind][layer] // len(by_part)]
            first = by_part.shape[1] * np.arange(len(by_part))[:, None]
            rows.append(np.sort((first + best).ravel()))
    return kept
