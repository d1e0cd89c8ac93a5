"""How many groups stay, and which.

A budget says how much goes and how that is shared between the layers; `Stock` is what there is. From both follow the
counts, kind -> one number for each layer, and from the counts and the scores the groups that stay.

    step        the smallest removal from one layer: one group, or one query head of every key/value head
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor

import numpy as np
from jaxtyping import Float

from minillm_jax.errors import InputError, one_of
from minillm_jax.model.axis_table import Kept

COUNTED = ("groups", "blocks", "model")
ALLOCATIONS = ("uniform", "global", "measured")

Counts = dict[str, list[int]]


@dataclass(frozen=True)
class Budget:
    """How much goes, and from where.

    Attributes:
      ratio: share that goes, in (0, 1); None with a target.
      of: what the ratio is a share of: the `groups` of every kind in every pruned layer; or the parameters of the
        `blocks` or of the whole `model`, which are reached to within one step (`uniform`: one step in every layer).
      target: instead of a ratio, the measure and the most of it that may be left: ("parameters", 5.4e9).
      allocation: `uniform`, the same share in every layer; `global`, the lowest scores per cost wherever they are; or
        `measured`, the cheapest combination of measured losses.
      layers: first layer that is pruned, and the one after the last, from the end where negative; all by default.
      round_heads_to: keep a multiple of this many heads in a pruned layer, rounding up, where there are as many: tensor
        parallelism wants its degree (`uniform` only).
      round_width_to: the same for MLP channels: hardware wants 64 or 128.
      least: share of a layer's groups that stays at least (`global` and `measured`).
      window: tokens of the window that targets in macs and memory are for.
    """

    ratio: float | None = None
    of: str = "groups"
    target: tuple[str, float | int] | None = None
    allocation: str = "uniform"
    layers: tuple[int, int] | None = None
    round_heads_to: int = 1
    round_width_to: int = 1
    least: float = 0.1
    window: int = 128

    def check(self) -> None:
        """Whether the settings go together.

        Raises:
          InputError: they do not, or one is out of its range.
        """
        one_of("thing that the ratio counts", self.of, COUNTED)
        one_of("allocation", self.allocation, ALLOCATIONS)
        if (self.ratio is None) == (self.target is None):
            raise InputError("give a ratio or a target for what is left, one of them")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise InputError(f"the ratio must lie between 0 and 1, both excluded, found {self.ratio:g}")
        if self.target is not None and self.of != "groups":
            raise InputError("a target takes the place of the ratio, so there is nothing for it to be a share of")
        for words, multiple in (("heads", self.round_heads_to), ("channels", self.round_width_to)):
            if multiple < 1:
                raise InputError(
                    f"the number of kept {words} can be rounded to multiples of at least 1, not {multiple}"
                )
            if multiple > 1 and self.allocation != "uniform":
                raise InputError(
                    f"the number of kept {words} is rounded in uniform budgets only, not {self.allocation}"
                )
        if not 0 <= self.least < 1:
            raise InputError(f"the least share that stays must lie in [0, 1), found {self.least:g}")
        if self.window < 1:
            raise InputError(f"the window that costs are for must have at least 1 token, found {self.window}")

    @property
    def measure(self) -> str:
        """What is counted where costs are: parameters, but for other targets."""
        return "parameters" if self.target is None else self.target[0]

    @property
    def by_share(self) -> bool:
        """Whether every pruned layer loses the same share of its groups: nothing else has to be found out."""
        return self.allocation == "uniform" and self.target is None and self.of == "groups"

    def multiple(self, kind: str) -> int:
        """What the number of kept groups of a kind is rounded to."""
        return self.round_width_to if kind == "channel" else self.round_heads_to


@dataclass(frozen=True)
class Stock:
    """What there is to remove, kind -> one number for each layer; kinds in the order of the forward pass.

    Attributes:
      counts: groups.
      parts: in how many parts they lie, from each of which equally many go (see `decoder.part_count`).
      costs: what one group less saves in the measure of the budget.
      whole: what the dense model costs.
      layers: the layers that are pruned.
    """

    counts: Counts
    parts: Counts
    costs: Counts
    whole: int
    layers: range

    def left(self, kept: Mapping[str, Sequence[int]]) -> int:
        """What a model with those counts costs."""
        saved = 0
        for kind, counts in self.counts.items():
            saved += sum(c * (n - k) for c, n, k in zip(self.costs[kind], counts, kept[kind], strict=True))
        return self.whole - saved

    def prunable(self) -> int:
        """What all groups of the pruned layers cost together."""
        return sum(self.costs[k][layer] * n[layer] for k, n in self.counts.items() for layer in self.layers)


def kept_count(count: int, ratio: float, multiple: int = 1) -> int:
    """How many of `count` groups stay: floor(count · ratio + 1/2) go, but at least one stays.

    The ratio is read as the decimal number it is written as: 0.29 of 50 is 14.5, although the float is a little less.
    With a `multiple`, the number is rounded up to one; to the largest there is when that is more than `count`, and
    to `count` itself when there is none.
    """
    asked = max(1, count - floor(count * Decimal(str(ratio)) + Decimal("0.5")))
    rounded = min(-(-asked // multiple), count // multiple) * multiple
    return rounded or count


def by_ratio(stock: Stock, ratio: float, budget: Budget | None = None) -> Counts:
    """The same share of the groups of every kind and pruned layer goes; rounded as the budget says."""
    return {kind: _by_ratio(stock, kind, ratio, budget.multiple(kind) if budget else 1) for kind in stock.counts}


def _by_ratio(stock: Stock, kind: str, ratio: float, multiple: int = 1, more: int = 0) -> list[int]:
    """The counts of one kind; with so many more steps in every pruned layer, as far as there are."""
    found = []
    for layer, (count, parts) in enumerate(zip(stock.counts[kind], stock.parts[kind], strict=True)):
        steps = count // parts
        kept = min(max(kept_count(steps, ratio, multiple) + more, 1), steps)
        found.append(parts * kept if layer in stock.layers else count)
    return found


def limit_of(stock: Stock, budget: Budget, blocks: int) -> float:
    """The most that the pruned model may cost.

    Args:
      stock: what there is, in parameters unless the budget has a target in another measure.
      budget: what is asked for.
      blocks: parameters of the layers.

    Raises:
      InputError: the target is not below what the model costs, or cannot be reached.
    """
    if budget.target is not None:
        limit, asked = float(budget.target[1]), f"the target of {budget.target[1]:,.0f} ({budget.target[0]})"
        if not limit < stock.whole:
            raise InputError(f"{asked} is not below the {stock.whole:,} of the model: there is nothing to remove")
    else:
        ratio = budget.ratio or 0.0
        if budget.of == "groups":
            return float(stock.left(by_ratio(stock, ratio, budget)))
        limit, asked = stock.whole - ratio * (blocks if budget.of == "blocks" else stock.whole), f"a ratio of {ratio:g}"
    least = stock.left({k: _fewest(stock, k, budget.least) for k in stock.counts})
    if limit < least:
        raise InputError(
            f"{asked} asks for {limit:,.0f} at most, but the least that pruning these groups leaves is {least:,}; "
            "ask for less, or prune more kinds of groups or layers"
        )
    return limit


def _fewest(stock: Stock, kind: str, least: float) -> list[int]:
    """The fewest groups that may stay in each layer."""
    found = []
    for layer, (count, parts) in enumerate(zip(stock.counts[kind], stock.parts[kind], strict=True)):
        fewest = parts * max(1, ceil(count // parts * least))
        found.append(fewest if layer in stock.layers else count)
    return found


def uniform(stock: Stock, limit: float, budget: Budget) -> Counts:
    """The same share in every layer: heads by the share that is asked of everything, then as many channels as fit.

    The last kind in the stock fills up; it leaves less than one step in every layer. Where the others' share is too
    much even with all of it, or too little with the least of it, they change by a step in every layer.

    Raises:
      InputError: no such counts are few enough.
    """
    share = min((stock.whole - limit) / stock.prunable(), 0.999)
    *others, filler = stock.counts
    most = max(n // p for kind in stock.counts for n, p in zip(stock.counts[kind], stock.parts[kind], strict=True))

    def with_more(steps: int) -> Counts:
        return {kind: _by_ratio(stock, kind, share, budget.multiple(kind), steps) for kind in others}

    everything = {filler: stock.counts[filler]}
    first = next((steps for steps in range(most) if stock.left(with_more(steps) | everything) > limit), 0)
    for steps in range(first, -most, -1):
        found = _fill(stock, limit, with_more(steps), filler, budget.multiple(filler))
        if found is not None:
            return found
    raise InputError(
        f"no number of groups, the same share in every layer, leaves at most {limit:,.0f}; use the allocation global "
        "or measured, or ask for less"
    )


def _fill(stock: Stock, limit: float, counts: Counts, filler: str, multiple: int) -> Counts | None:
    """As many groups of one kind, the same share in every layer, as keep the limit; None where the fewest do not."""
    sizes = {n // p for n, p in zip(stock.counts[filler], stock.parts[filler], strict=True)}
    ratios = sorted({gone / n for n in sizes for gone in range(n)})

    def fits(ratio: float) -> bool:
        return stock.left(counts | {filler: _by_ratio(stock, filler, ratio, multiple)}) <= limit

    place = bisect_left(ratios, True, key=fits)
    return counts | {filler: _by_ratio(stock, filler, ratios[place], multiple)} if place < len(ratios) else None


# ------------------------------------------------------------------------------------------------ between layers


def globally(
    stock: Stock, limit: float, budget: Budget, scores: Mapping[str, Sequence[np.ndarray]], per_cost: bool
) -> Counts:
    """The steps of the lowest scores go, wherever they are, until the limit is kept.

    Args:
      stock: what there is.
      limit: the most that may be left.
      budget: how much of a layer stays at least.
      scores: of all groups; they must mean the same in every layer.
      per_cost: compare scores per cost, for scores that are losses; not for standardised ones.
    """
    steps = []
    for kind, counts in stock.counts.items():
        fewest = _fewest(stock, kind, budget.least)
        for layer in stock.layers:
            parts = stock.parts[kind][layer]
            rows = np.sort(np.asarray(scores[kind][layer]).reshape(parts, -1), axis=1).sum(axis=0)
            cost = parts * stock.costs[kind][layer]
            rows = rows[: (counts[layer] - fewest[layer]) // parts] / (cost if per_cost else parts)
            steps += [(float(score), kind, layer, number) for number, score in enumerate(rows)]
    kept = {kind: list(counts) for kind, counts in stock.counts.items()}
    left = stock.whole
    for _, kind, layer, _ in sorted(steps, key=lambda step: step[0]):
        if left <= limit:
            break
        kept[kind][layer] -= stock.parts[kind][layer]
        left -= stock.parts[kind][layer] * stock.costs[kind][layer]
    return kept


def levels(stock: Stock, budget: Budget, shares: Sequence[float]) -> dict[str, list[list[int]]]:
    """The counts whose loss is measured, for each kind and pruned layer, most to least; all groups first."""
    found = {}
    for kind, counts in stock.counts.items():
        fewest, parts = _fewest(stock, kind, budget.least), stock.parts[kind]
        found[kind] = [
            sorted({max(fewest[i], parts[i] * kept_count(n // parts[i], s)) for s in shares} | {n}, reverse=True)
            if i in stock.layers
            else [n]
            for i, n in enumerate(counts)
        ]
    return found


# What is saved is counted in at most this many units, exactly where it is no more; else rounded up, and made good for.
_UNITS = 4096


def cheapest(
    stock: Stock,
    limit: float,
    tried: Mapping[str, Sequence[Sequence[int]]],
    losses: Mapping[str, Sequence[Sequence[float]]],
) -> Counts:
    """The counts with the least sum of losses that keep the limit, by dynamic programming; then groups come back.

    Between the measured counts losses are taken to be linear: what the levels leave below the limit is filled with the
    groups that gain most for their cost.

    Args:
      stock: what there is.
      limit: the most that may be left.
      tried: the counts that were measured, as `levels` makes them.
      losses: the loss of the model with only that one kind of one layer pruned, for each of them.

    Raises:
      InputError: not even the fewest groups of all keep the limit.
    """
    unit = max(1.0, (stock.whole - limit) / _UNITS)
    needed = ceil((stock.whole - limit) / unit - 1e-9)
    sites = [(kind, layer) for kind in stock.counts for layer in stock.layers]
    best = np.full(needed + 1, np.inf)  # by units that are saved; the last place is for all that are enough
    best[0] = 0.0
    steps = []
    for kind, layer in sites:
        counts = tried[kind][layer]
        saved = [ceil(stock.costs[kind][layer] * (counts[0] - count) / unit - 1e-9) for count in counts]
        best, choice, before = _further(best, saved, losses[kind][layer])
        steps.append((choice, before))
    if not np.isfinite(best[-1]):
        raise InputError(f"the counts that were measured do not reach {limit:,.0f}; ask for less, or let less stay")
    kept = {kind: list(counts) for kind, counts in stock.counts.items()}
    place = needed
    for (kind, layer), (choice, before) in zip(reversed(sites), reversed(steps), strict=True):
        kept[kind][layer] = tried[kind][layer][choice[place]]
        place = before[place]
    return _fitted(stock, limit, kept, tried, losses)


def _further(
    best: Float[np.ndarray, " units"], saved: Sequence[int], losses: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best sums with one more site; which of its levels each takes, and from which place it comes."""
    last = len(best) - 1
    found = np.full((len(saved), len(best)), np.inf)
    before = np.zeros_like(found, dtype=np.int64)
    for option, (units, loss) in enumerate(zip(saved, losses, strict=True)):
        units = min(units, last)
        found[option, units:] = best[: last + 1 - units] + loss
        before[option, units:] = np.arange(last + 1 - units)
        enough = last - units + int(np.argmin(best[last - units :]))
        found[option, last], before[option, last] = best[enough] + loss, enough
    choice = np.argmin(found, axis=0)
    everywhere = np.arange(len(best))
    return found[choice, everywhere], choice, before[choice, everywhere]


def _fitted(
    stock: Stock,
    limit: float,
    kept: Counts,
    tried: Mapping[str, Sequence[Sequence[int]]],
    losses: Mapping[str, Sequence[Sequence[float]]],
) -> Counts:
    """Steps less, the one that loses least for its cost first, until the limit is kept; then steps back that fit."""

    def slope(kind: str, layer: int, way: int) -> float:
        """What one step more, or less, changes the loss by for its cost."""
        count, parts = kept[kind][layer], stock.parts[kind][layer]
        counts, values = tried[kind][layer][::-1], losses[kind][layer][::-1]
        now, after = np.interp([count, count + way * parts], counts, values)
        return float(after - now) / (parts * stock.costs[kind][layer])

    def step(way: int) -> bool:
        """The best step one way, if there is one."""
        sites = [
            (kind, layer)
            for kind, counts in stock.counts.items()
            for layer in stock.layers
            if tried[kind][layer][-1] <= kept[kind][layer] + way * stock.parts[kind][layer] <= counts[layer]
            and (way < 0 or left + stock.parts[kind][layer] * stock.costs[kind][layer] <= limit)
        ]
        if not sites:
            return False
        kind, layer = min(sites, key=lambda site: slope(*site, way))
        kept[kind][layer] += way * stock.parts[kind][layer]
        return True

    left = stock.left(kept)
    while left > limit and step(-1):
        left = stock.left(kept)
    while step(+1):
        left = stock.left(kept)
    return kept


# ------------------------------------------------------------------------------------------------------- which


def choose(
    scores: Mapping[str, Sequence[Float[np.ndarray, " _"]]],
    counts: Mapping[str, Sequence[int]],
    parts: Mapping[str, Sequence[int]],
) -> Kept:
    """The groups with the highest scores of every part of every layer; ties keep the lower index.

    Args:
      scores: kind -> one array of scores for each layer.
      counts: how many stay.
      parts: in how many parts the groups of a layer lie, from each of which equally many stay.

    Raises:
      InputError: a score is not finite.
    """
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in scores}
    for kind, rows in kept.items():
        for layer, values in enumerate(scores[kind]):
            if not np.isfinite(values).all():
                raise InputError(f"the {kind} scores of layer {layer} are not finite; try another criterion or epsilon")
            of_parts = np.reshape(values, (parts[kind][layer], -1))
            best = np.argsort(-of_parts, axis=1, kind="stable")[:, : counts[kind][layer] // len(of_parts)]
            first = of_parts.shape[1] * np.arange(len(of_parts))[:, None]
            rows.append(np.sort((first + best).ravel()))
    return kept
