"""The allocation `search`: joint steps of several sublayers, kept where the measured divergence of the model falls.

The other allocations add up the losses of sublayers that were pruned alone. What a sublayer costs the model depends on
what the others lost. The search begins at the counts of `curves`. A parent has offspring: sublayers drawn at random
lose a step, and others gain steps as far as the limit allows. In each generation the offspring pass rounds with more
tokens and fewer survivors. The best one replaces the parent if the divergence KL(dense ‖ pruned) of the whole model on
the tokens of the last round is lower. Sources: EvoPress, arXiv 2410.14649; Týr-the-Pruner, arXiv 2503.09657.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

import numpy as np

from minillm_jax.budget.cheapest import Levels
from minillm_jax.budget.inventory import Counts, Inventory
from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts
from minillm_jax.settings import Budget

# Levels on each side of the starting count, and the step between them as a share of the sizes of a sublayer.
REACH = 3
STEP = 1 / 20

# Offspring of a generation, and how many the rounds leave; the last round leaves one.
OFFSPRING = 16
SURVIVORS = (4, 2, 1)
# Tokens on which each round measures.
TOKENS = (512, 1024, 2048)
# Generations for each pruned layer, and the most of all. On stories260K, of five layers, the last better offspring came
# in generation 12 of 72, and more searches with new libraries were no clear gain (docs/LOG.md).
GENERATIONS = 3
MOST_GENERATIONS = 32
# Sublayers that lose a step in one offspring, at most.
MOST_LOSERS = 3
# Drawn offspring for each one that is measured: near the end of a search most are known already.
TRIES = 8

Site = tuple[str, int]


class Found(NamedTuple):
    """The result of a search.

    Attributes:
      counts: kind -> for each layer, the number of kept groups.
      divergences: of the parent at the start and after each generation, on the tokens of the last round, nats.
    """

    counts: Counts
    divergences: list[float]


def levels_around(inventory: Inventory, budget: Budget, counts: Counts) -> dict[str, list[list[int]]]:
    """The levels of a search: kind -> for each layer, numbers of kept groups, descending, with the given one.

    Args:
      inventory: the groups of the model.
      budget: its multiples round the counts, and its `keep_at_least` bounds them from below.
      counts: the counts at which the search begins, each one of the `sizes` of its layer.
    """
    return {
        kind: [_around(sizes, row[layer]) for layer, sizes in enumerate(inventory.sizes(kind, budget))]
        for kind, row in counts.items()
    }


def _around(sizes: tuple[int, ...], count: int) -> list[int]:
    place, step = bisect_left(sizes, count), max(1, round(STEP * len(sizes)))
    places = {min(max(place + step * n, 0), len(sizes) - 1) for n in range(-REACH, REACH + 1)}
    return [sizes[place] for place in sorted(places, reverse=True)]


def generations_of(layers: int) -> int:
    """The number of generations for a number of pruned layers."""
    return min(GENERATIONS * layers, MOST_GENERATIONS)


def measured_tokens(layers: int) -> int:
    """Tokens of all forward passes of a search, at most, with those of the dense model.

    Args:
      layers: number of pruned layers.
    """
    a_generation = sum(count * tokens for count, tokens in zip((OFFSPRING, *SURVIVORS), TOKENS, strict=False))
    return generations_of(layers) * a_generation + TOKENS[-1] + sum(TOKENS)


def windows(batches: Batches) -> list[Batches]:
    """The windows of each round: the first of the calibration windows, cut to the tokens of the first round at most."""
    length = min(batches.length, TOKENS[0])
    short = replace(batches, windows=batches.windows[:, :length])
    return [short.first(max(1, tokens // length)) for tokens in TOKENS]


def search(
    inventory: Inventory,
    limit: float,
    levels: Levels,
    start: Counts,
    divergence: Callable[[Counts, int], float],
    seed: int | Sequence[int],
    generations: int,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """Counts within the limit with a lower divergence than those at the start, if any was found.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model.
      levels: kind -> for each layer, the counts to choose from, descending.
      start: the counts at the start, within the limit, each one of the levels.
      divergence: counts, number of the round -> divergence of the model, nats.
      seed: of the offspring.
      generations: number of generations; fewer where no new offspring is found.
      progress: called with the number of generations done, and of all.
    """
    generator, parent, seen = np.random.default_rng(seed), start, {_key(start)}
    _, values = _ranked([divergence(parent, len(TOKENS) - 1)])
    for done in range(generations):
        children = _new_children(inventory, limit, levels, parent, generator, seen)
        value, best = _best(children, divergence) if children else (values[-1], parent)
        if value < values[-1]:
            parent = best
        values.append(min(value, values[-1]))
        if progress is not None:
            progress(done + 1, generations)
    return Found(parent, values)


def _best(children: Sequence[Counts], divergence: Callable[[Counts, int], float]) -> tuple[float, Counts]:
    """The best of the offspring after all rounds, and its divergence in the last round."""
    value = inf
    for number, survivors in enumerate(SURVIVORS):
        order, values = _ranked([divergence(child, number) for child in children])
        children, value = [children[place] for place in order[:survivors]], values[order[0]]
    return value, children[0]


def _ranked(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Indices of the values, ascending, and the values, both of process 0: all processes must take the same steps."""
    found = hosts.of_first(lambda: {"order": np.argsort(values, kind="stable"), "values": np.asarray(values)})
    return found["order"].tolist(), found["values"].tolist()


def _key(counts: Counts) -> tuple[int, ...]:
    return tuple(count for row in counts.values() for count in row)


def _new_children(
    inventory: Inventory,
    limit: float,
    levels: Levels,
    parent: Counts,
    generator: np.random.Generator,
    seen: set[tuple[int, ...]],
) -> list[Counts]:
    """Offspring that are not in `seen`, to which they are added."""
    children = []
    for _ in range(TRIES * OFFSPRING):
        child = offspring(inventory, limit, levels, parent, generator)
        if child is not None and _key(child) not in seen and len(children) < OFFSPRING:
            seen.add(_key(child))
            children.append(child)
    return children


def offspring(
    inventory: Inventory, limit: float, levels: Levels, parent: Counts, generator: np.random.Generator
) -> Counts | None:
    """Counts within the limit, a step away from those of the parent in a few sublayers.

    One to `MOST_LOSERS` sublayers drawn at random lose a step. The others, in random order, then gain a step each as
    far as the limit allows. None where no sublayer can lose a step.

    Args:
      inventory: the groups of the model.
      limit: the largest cost of the pruned model.
      levels: kind -> for each layer, the counts to choose from, descending.
      parent: counts within the limit, each one of the levels.
      generator: draws the sublayers.
    """
    child = {kind: list(row) for kind, row in parent.items()}
    sites = [(kind, layer) for kind in child for layer in inventory.layers]
    order = [sites[place] for place in generator.permutation(len(sites))]
    losing = [site for site in order if _next(levels, parent, site, 1) is not None]
    losers = losing[: generator.integers(1, MOST_LOSERS, endpoint=True)]
    if not losers:
        return None
    for site in losers:
        _move(child, levels, site, 1)
    left = inventory.left(child)
    for kind, layer in order:
        more = _next(levels, child, (kind, layer), -1)
        if (kind, layer) in losers or more is None:
            continue
        cost = (more - child[kind][layer]) * inventory.costs[kind][layer]
        if left + cost <= limit:
            child[kind][layer], left = more, left + cost
    return child


def _next(levels: Levels, counts: Counts, site: Site, places: int) -> int | None:
    """The level some places after the present one, fewer groups for a positive number; None without such a level."""
    kind, layer = site
    row = levels[kind][layer]
    place = row.index(counts[kind][layer]) + places
    return row[place] if 0 <= place < len(row) else None


def _move(counts: Counts, levels: Levels, site: Site, places: int) -> None:
    count = _next(levels, counts, site, places)
    assert count is not None, "the sublayer has such a level"
    counts[site[0]][site[1]] = count
