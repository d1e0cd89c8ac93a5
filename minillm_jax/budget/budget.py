"""Budget: the number of groups that each layer keeps, and the choice of the kept groups by their scores.

A `Budget` says how much is removed and how the budget is shared between layers (`settings.Budget`). An `Inventory` says
how many groups a model has, what each costs, and how many a layer may keep. Every allocation is a function from both to
the counts: kind -> for each layer, the number of kept groups. `choose` then takes that many groups with the highest
scores. The allocation `measured` is in `budget.cheapest`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import isfinite

import numpy as np
from jaxtyping import Float

from minillm_jax.budget.cheapest import Levels, Losses, loss_at, no_finite_loss
from minillm_jax.budget.cheapest import cheapest as cheapest
from minillm_jax.budget.cheapest import levels as levels
from minillm_jax.budget.inventory import Counts as Counts
from minillm_jax.budget.inventory import Inventory as Inventory
from minillm_jax.budget.inventory import kept_count as kept_count
from minillm_jax.errors import InputError
from minillm_jax.model.axis_table import Kept
from minillm_jax.scoring.criteria import check_finite
from minillm_jax.settings import Budget


def by_ratio(inventory: Inventory, ratio: float, budget: Budget | None = None) -> Counts:
    """The counts after removal of the same share of the groups of every kind and pruned layer.

    Args:
      inventory: the groups of the model.
      ratio: the removed share.
      budget: its multiples round the counts; no rounding by default.
    """
    multiples = {kind: budget.multiple(kind) if budget else 1 for kind in inventory.counts}
    return {
        kind: [
            parts * kept_count(count // parts, ratio, multiple) if layer in inventory.layers else count
            for layer, (count, parts) in enumerate(zip(inventory.counts[kind], inventory.parts[kind], strict=True))
        ]
        for kind, multiple in multiples.items()
    }


def limit_of(inventory: Inventory, budget: Budget, blocks: int) -> float:
    """The largest cost of the pruned model, in the measure of the budget.

    Args:
      inventory: the groups of the model, with costs in the measure of the budget.
      budget: the ratio or the target. A share of the groups counts as `by_ratio` rounds it.
      blocks: number of parameters of the layers.

    Raises:
      InputError: the target is not below the cost of the dense model, or the limit cannot be reached.
    """
    if budget.target is not None:
        measure, limit = budget.target
        request = f"the target of {limit:,.0f} ({measure})"
        if not limit < inventory.whole:
            raise InputError(
                f"{request} is not below the {inventory.whole:,} of the model: there is nothing to remove; use a "
                "smaller target"
            )
    else:
        ratio, request = budget.ratio or 0.0, f"a ratio of {budget.ratio:g}"
        if budget.ratio_of == "groups" and all(map(budget.single, inventory.counts)):
            limit = inventory.left(by_ratio(inventory, ratio, budget))
        elif budget.ratio_of == "groups":  # whole sublayers: no share of their groups has to be a whole number
            limit = inventory.whole - ratio * inventory.prunable()
        else:
            limit = inventory.whole - ratio * (blocks if budget.ratio_of == "blocks" else inventory.whole)
    least = inventory.left(inventory.fewest(budget))
    if limit < least and not budget.by_share:
        raise InputError(
            f"{request} allows {limit:,.0f} at most, but a model with the fewest groups of these kinds still has "
            f"{least:,}; {_less(inventory, budget)}"
        )
    return float(limit)


def _less(inventory: Inventory, budget: Budget) -> str:
    """What to do where a budget cannot be met."""
    ways = ["use a smaller ratio" if budget.target is None else "use a larger target"]
    fewest, fewer = (inventory.fewest(one) for one in (budget, replace(budget, keep_at_least=0.0)))
    if fewest != fewer:
        ways.append("a smaller --keep-at-least")
    ways += [f"a smaller {budget.multiple_flag(kind)}" for kind in inventory.counts if budget.multiple(kind) > 1]
    return f"{', '.join(ways)}, or prune more kinds of groups or layers"


def uniform(inventory: Inventory, limit: float, budget: Budget) -> Counts:
    """The counts with the same share in every layer whose cost is within the limit.

    All kinds but the last (heads) lose the share that the limit requires of all groups together. The last kind
    (channels) then keeps as many groups as fit, so that the cost is less than one step in every layer below the limit.
    If even all or even the fewest groups of the last kind miss the limit, the other kinds change in every layer, from
    one of their `sizes` to the next.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model, at least that of the fewest groups (see `limit_of`).
      budget: its multiples round the counts, and `keep_at_least` bounds them from below.
    """
    return next(same_in_layers(inventory, limit, budget))


def cheapest_equal(
    inventory: Inventory,
    limit: float,
    tried: Levels,
    losses: Losses,
    budget: Budget,
    fits: Callable[[Counts], bool] = lambda counts: True,
) -> Counts:
    """The counts of `uniform`, or with more of one kind and less of another, with the least sum of losses.

    The shares of a kind are the same in every layer, but those of two kinds may differ.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model, at least that of the fewest groups (see `limit_of`).
      tried: kind -> for each layer, the counts with known losses.
      losses: the loss at each of these counts, nats; between two of them it is interpolated.
      budget: its multiples round the counts, and `keep_at_least` bounds them from below.
      fits: whether the output format can hold the counts, which is true of some.

    Raises:
      InputError: no counts within the limit have finite losses.
    """

    def loss(counts: Counts) -> float:
        return sum(
            loss_at(tried[kind][layer], losses[kind][layer], count)
            for kind, row in counts.items()
            for layer, count in enumerate(row)
        )

    best = min(filter(fits, same_in_layers(inventory, limit, budget)), key=loss)
    if not isfinite(loss(best)):
        raise InputError(no_finite_loss(limit, losses))
    return best


def same_in_layers(inventory: Inventory, limit: float, budget: Budget) -> Iterator[Counts]:
    """All counts within the limit with the same shares in every layer; those that share the budget equally first.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model, at least that of the fewest groups (see `limit_of`).
      budget: its multiples round the counts, and `keep_at_least` bounds them from below.
    """
    share = min((inventory.whole - limit) / inventory.prunable(), 0.999)
    *leading, filler = inventory.counts
    most = max(len(sizes) for kind in inventory.counts for sizes in inventory.sizes(kind, budget))

    def leading_counts(more: int) -> Counts:
        return {kind: _shared(inventory, kind, share, budget, more) for kind in leading}

    full = {filler: inventory.counts[filler]}
    first = next((more for more in range(most) if inventory.left(leading_counts(more) | full) > limit), 0)
    seen = None
    for more in (*range(first, -most, -1), *range(first + 1, most)):
        kept = leading_counts(more)
        if kept != seen and (counts := _fill(inventory, limit, kept, filler, budget)) is not None:
            yield counts
        seen = kept


def _shared(inventory: Inventory, kind: str, share: float, budget: Budget, more: int = 0) -> list[int]:
    """The counts of one kind without a share of its groups, and then `more` of the allowed sizes further up."""
    counts, rows = [], zip(inventory.sizes(kind, budget), inventory.parts[kind], strict=True)
    for sizes, parts in rows:
        asked = parts * kept_count(sizes[-1] // parts, share, budget.multiple(kind))
        place = bisect_left(sizes, asked) + more
        counts.append(sizes[min(max(place, 0), len(sizes) - 1)])
    return counts


def _fill(inventory: Inventory, limit: float, leading: Counts, filler: str, budget: Budget) -> Counts | None:
    """The counts with the most groups of the kind `filler` within the limit, the same share in every layer.

    None where even the fewest groups of that kind exceed the limit.
    """
    steps = {n // p for n, p in zip(inventory.counts[filler], inventory.parts[filler], strict=True)}
    ratios = sorted({removed / n for n in steps for removed in range(n)})

    def fits(ratio: float) -> bool:
        return inventory.left(leading | {filler: _shared(inventory, filler, ratio, budget)}) <= limit

    place = bisect_left(ratios, True, key=fits)
    if place == len(ratios):
        return None
    return leading | {filler: _shared(inventory, filler, ratios[place], budget)}


def globally(
    inventory: Inventory, limit: float, budget: Budget, scores: Mapping[str, Sequence[np.ndarray]], per_cost: bool
) -> Counts:
    """The counts after removal of the groups with the lowest scores of the whole model, until the limit is reached.

    Groups are removed in blocks: from one of the `sizes` of a layer to the next smaller one. A block is compared by the
    mean of its scores.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model, at least that of the fewest groups (see `limit_of`).
      budget: its `keep_at_least` bounds the counts from below, and its multiples round them.
      scores: kind -> for each layer, the scores of all groups. They must be comparable between layers.
      per_cost: compare scores divided by the cost of the groups, for scores that estimate losses. Standardised scores
        are compared as they are.

    Raises:
      InputError: a score is not finite.
    """
    check_finite(scores)
    blocks: list[tuple[float, str, int]] = []
    smaller: dict[tuple[str, int], list[int]] = {}
    for kind in inventory.counts:
        for layer, sizes in enumerate(inventory.sizes(kind, budget)):
            parts, cost = inventory.parts[kind][layer], inventory.costs[kind][layer]
            sums = np.sort(np.reshape(scores[kind][layer], (parts, -1)), axis=1).sum(axis=0)
            removed = [(sizes[-1] - size) // parts for size in reversed(sizes)]
            for first, last in pairwise(removed):
                blocks.append((float(sums[first:last].mean()) / (parts * (cost if per_cost else 1)), kind, layer))
            smaller[kind, layer] = list(sizes[:-1])
    kept = {kind: list(counts) for kind, counts in inventory.counts.items()}
    left = inventory.whole
    for _, kind, layer in sorted(blocks, key=lambda block: block[0]):
        if left <= limit:
            break
        size = smaller[kind, layer].pop()
        left -= (kept[kind][layer] - size) * inventory.costs[kind][layer]
        kept[kind][layer] = size
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
    check_finite(scores)
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in scores}
    for kind, rows in kept.items():
        for layer, values in enumerate(scores[kind]):
            by_part = np.reshape(values, (parts[kind][layer], -1))
            best = np.argsort(-by_part, axis=1, kind="stable")[:, : counts[kind][layer] // len(by_part)]
            first = by_part.shape[1] * np.arange(len(by_part))[:, None]
            rows.append(np.sort((first + best).ravel()))
    return kept
