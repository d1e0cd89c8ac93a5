"""How many groups every layer keeps: where the budget meets the model, its scores, and measured losses."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from minillm_jax.budget import budget as budgets
from minillm_jax.budget.budget import Budget, Counts, Stock
from minillm_jax.budget.measured_losses import level_losses
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError, one_of
from minillm_jax.model import costs
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.tree import group_counts, layer_count, part_counts
from minillm_jax.progress import StageProgress, tell
from minillm_jax.pruning.refit import Refit

# Shares of the groups of a layer that are tried on their own for measured budgets.
SHARES = tuple(n / 10 for n in range(1, 10))


@dataclass(frozen=True)
class Allocated:
    """How many groups every layer keeps.

    Attributes:
      counts: kind -> one number for each layer.
      losses: of measured budgets: kind -> for each layer, pairs of a count and the change of the loss (nats) when only
        so many groups of that kind of that layer stay; all groups first.
    """

    counts: Counts
    losses: dict[str, list[list[tuple[int, float]]]] | None = None


def expected(decoder: Decoder, kinds: tuple[str, ...], budget: Budget) -> Counts | None:
    """What a budget will keep, as far as the shapes alone say it: None where scores or losses decide.

    Raises:
      InputError: the budget is out of its range, not for this model, or cannot be met.
    """
    stock = stock_of(decoder, kinds, budget)
    return _uniform(stock, _limit(decoder, stock, budget), budget)


def _limit(decoder: Decoder, stock: Stock, budget: Budget) -> float:
    return budgets.limit_of(stock, budget, costs.block_parameters(decoder))


def _uniform(stock: Stock, limit: float, budget: Budget) -> Counts | None:
    """The counts where the shapes alone say them."""
    if budget.allocation != "uniform":
        return None
    if budget.by_share:
        return budgets.by_ratio(stock, budget.ratio or 0.0, budget)
    return budgets.uniform(stock, limit, budget)


def stock_of(decoder: Decoder, kinds: tuple[str, ...], budget: Budget) -> Stock:
    """What there is to remove, and what it costs in the measure of the budget.

    Raises:
      InputError: a setting is out of its range, the layers are not the model's, or no group could ever go.
    """
    budget.check()
    one_of("measure", budget.measure, costs.MEASURES)
    layers = layers_of(budget, layer_count(decoder))
    counts = {kind: group_counts(decoder, kind) for kind in kinds}
    parts = part_counts(decoder, kinds)
    for kind in kinds:
        if kind == "query" and all(counts[kind][layer] == parts[kind][layer] for layer in layers):
            raise InputError("every key/value head has one query head in this model; leave out --heads query")
    prices = costs.group_costs(decoder, kinds, budget.measure, budget.window)
    return Stock(counts, parts, prices, costs.cost(decoder, budget.measure, budget.window), layers)


def counts_for(
    decoder: Decoder,
    scores: dict[str, list[np.ndarray]],
    on_the_way: bool,
    per_cost: bool,
    budget: Budget,
    refit: Refit,
    calibration: Calibration | None,
    progress: StageProgress | None = None,
) -> Allocated:
    """How many groups of every kind each layer keeps.

    Args:
      decoder: the dense model.
      scores: of its groups; the order in which they go.
      on_the_way: there are no scores: the groups are chosen while they are removed.
      per_cost: scores are compared per cost in global budgets.
      budget: how much goes.
      refit: as what stays will be refitted; measured budgets measure with it.
      calibration: what they measure on.
      progress: told how many losses are measured.

    Raises:
      InputError: see `expected`; or the allocation needs what is not there.
    """
    stock = stock_of(decoder, tuple(scores), budget)
    limit = _limit(decoder, stock, budget)
    counts = _uniform(stock, limit, budget)
    if counts is not None:
        return Allocated(counts)
    if budget.allocation == "global":
        check_comparable("obs" if on_the_way else "")
        return Allocated(budgets.globally(stock, limit, budget, scores, per_cost))
    if calibration is None:
        raise InputError("measured budgets take losses on calibration windows; give the calibration")
    tried = budgets.levels(stock, budget, SHARES)

    def stays(kind: str, layer: int, keep: int) -> np.ndarray:
        one = {kind: [scores[kind][layer]]}
        return np.asarray(budgets.choose(one, {kind: [keep]}, {kind: [stock.parts[kind][layer]]})[kind][0])

    told = partial(tell, progress, "budget")
    batches = calibration.batches
    losses = level_losses(decoder, batches, tried, None if on_the_way else stays, refit, told)
    pairs = {
        kind: [list(zip(*row, strict=True)) for row in zip(tried[kind], rows, strict=True)]
        for kind, rows in losses.items()
    }
    return Allocated(budgets.cheapest(stock, limit, tried, losses), pairs)


def check_comparable(criterion: str) -> None:
    """Whether a criterion has scores that global budgets can compare.

    Raises:
      InputError: it chooses while it prunes.
    """
    if criterion == "obs":
        raise InputError(
            "the criterion obs chooses while it prunes and has no scores to compare between layers; use the allocation "
            "uniform or measured"
        )


def steps_between(before: Counts, after: Counts, parts: Counts, steps: int) -> list[Counts]:
    """The counts after each of so many rounds, which remove about equally many."""

    def after_step(kind: str, step: int) -> list[int]:
        rows = zip(before[kind], after[kind], parts[kind], strict=True)
        return [n - p * round((n - k) / p * step / steps) for n, k, p in rows]

    return [{kind: after_step(kind, step) for kind in before} for step in range(1, steps + 1)]


def layers_of(budget: Budget, count: int) -> range:
    """The layers that are pruned, of so many.

    Raises:
      InputError: they are not the model's.
    """
    if budget.layers is None:
        return range(count)
    start, stop = budget.layers
    last = stop + count if stop < 0 else stop
    if not 0 <= start < last <= count:
        raise InputError(f"layers {start}:{stop} are not a range of this model's layers; it has 0:{count}")
    return range(start, last)
