"""Inventory: how many groups a model has, what each costs, and how many of them a layer may keep.

part        all parts of a layer lose equally many groups: each key/value head is a part of the query heads; groups
            of other kinds have one part
step        the smallest removal from one layer: one group of every part
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from math import ceil, floor

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

    def sizes(self, kind: str, budget: Budget) -> list[tuple[int, ...]]:
        """For each layer, the numbers of groups that an allocation may keep, ascending; the last is all groups.

        A pruned layer keeps all groups; or in every part a multiple of `budget.multiple(kind)` groups, at least one
        and at least the share `budget.keep_at_least`; or none, where whole sublayers may be removed. The other layers
        keep all groups.
        """
        multiple, least = budget.multiple(kind), budget.keep_at_least
        single, whole = budget.single(kind), budget.whole(kind)
        return [
            _sizes(count // parts, parts, multiple, least, single, whole)
            if layer in self.layers and count
            else (count,)
            for layer, (count, parts) in enumerate(zip(self.counts[kind], self.parts[kind], strict=True))
        ]

    def fewest(self, budget: Budget) -> Counts:
        """The smallest of the `sizes` of every kind and layer."""
        return {kind: [sizes[0] for sizes in self.sizes(kind, budget)] for kind in self.counts}


@cache
def _sizes(steps: int, parts: int, multiple: int, least: float, single: bool, whole: bool) -> tuple[int, ...]:
    fewest = max(1, ceil(steps * Decimal(str(least))))
    multiples = range(-(-fewest // multiple) * multiple, steps, multiple) if single else ()
    return (*((0,) if whole else ()), *(parts * size for size in multiples), parts * steps)


def kept_count(count: int, ratio: float, multiple: int = 1) -> int:
    """Number of kept groups of `count`: floor(count · ratio + 1/2) are removed, and at least one is kept.

    The ratio counts as the decimal number that is written: 0.29 of 50 is 14.5, although the float is a little less.
    The number of kept groups is rounded up to a multiple of `multiple`; where that exceeds `count`, down to the largest
    multiple within `count`; and to `count` itself where no multiple fits.
    """
    exact = max(1, count - floor(count * Decimal(str(ratio)) + Decimal("0.5")))
    rounded = min(-(-exact // multiple), count // multiple) * multiple
    return rounded or count
