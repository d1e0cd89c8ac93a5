"""Allocation: the number of groups that every layer keeps, from the budget, the model, its scores and its losses."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minillm_jax.budget import budget as budgets
from minillm_jax.budget import curves
from minillm_jax.budget import search as searches
from minillm_jax.budget.budget import Counts, Inventory
from minillm_jax.budget.cheapest import Levels, Losses, correct
from minillm_jax.budget.library import composed, dense_on
from minillm_jax.budget.measured_losses import level_losses
from minillm_jax.data.calibration_size import widest_mlp
from minillm_jax.data.windows import Calibration
from minillm_jax.devices import hosts
from minillm_jax.devices.work_folder import WorkFolder
from minillm_jax.errors import InputError, shortened
from minillm_jax.model import costs
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.tree import group_counts, layer_count, part_counts
from minillm_jax.progress import StageProgress, in_turn, tell
from minillm_jax.pruning.walk import PROJECTIONS
from minillm_jax.settings import BY_CURVES, Budget, Refit

# Removed shares of the groups of a layer at which the allocation `measured` measures the loss.
SHARES = tuple(n / 10 for n in range(1, 10))


@dataclass(frozen=True)
class Allocated:
    """The number of groups that every layer keeps.

    Attributes:
      counts: kind -> one number for each layer.
      losses: with an allocation of `MEASURED`: kind -> for each layer, pairs of a number of kept groups and the mean
        divergence from the dense model (nats) when only this kind of groups of this layer is pruned to that number;
        None where the divergence is not finite. The first pair is for all groups.
      searched: with the allocation `search`: the divergence of the whole model at the start and after each generation,
        nats; None where it is not finite.
    """

    counts: Counts
    losses: dict[str, list[list[tuple[int, float | None]]]] | None = None
    searched: list[float | None] | None = None

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> "Allocated":
        """From the same fields after they were JSON, which has no tuples."""
        losses = note["losses"] and {
            kind: [[(count, loss) for count, loss in row] for row in rows] for kind, rows in note["losses"].items()
        }
        return cls(note["counts"], losses, note["searched"])


def expected(decoder: Decoder, kinds: tuple[str, ...], budget: Budget) -> Counts | None:
    """The counts where the shapes alone determine them; None where scores or losses do.

    Args:
      decoder: the dense model; only its shapes are read.
      kinds: the pruned kinds of groups.
      budget: how much is removed.

    Raises:
      InputError: the budget is out of its range, does not suit the model, or cannot be met.
    """
    inventory = inventory_of(decoder, kinds, budget)
    return _uniform(inventory, _limit(decoder, inventory, budget), budget)


def _limit(decoder: Decoder, inventory: Inventory, budget: Budget) -> float:
    return budgets.limit_of(inventory, budget, costs.block_parameters(decoder))


def _uniform(inventory: Inventory, limit: float, budget: Budget) -> Counts | None:
    """The counts of the allocation `uniform`; None for the other allocations."""
    if not budget.uniform:
        return None
    if budget.by_share:
        return budgets.by_ratio(inventory, budget.ratio or 0.0, budget)
    return budgets.uniform(inventory, limit, budget)


def possible(decoder: Decoder, kinds: tuple[str, ...], budget: Budget) -> Iterator[Counts]:
    """Counts that an allocation which is not uniform may choose: all of `equal`, and one example of the others.

    Args:
      decoder: the dense model; only its shapes are read.
      kinds: the pruned kinds of groups.
      budget: how much is removed, and its allocation.

    Raises:
      InputError: see `expected`.
    """
    inventory = inventory_of(decoder, kinds, budget)
    choices = budgets.same_in_layers(inventory, _limit(decoder, inventory, budget), budget)
    if budget.allocation == "equal":
        yield from choices
        return
    counts, first = next(choices, inventory.fewest(budget)), inventory.layers[0]
    yield {kind: [*row[:first], inventory.counts[kind][first], *row[first + 1 :]] for kind, row in counts.items()}


def inventory_of(decoder: Decoder, kinds: tuple[str, ...], budget: Budget) -> Inventory:
    """The groups of a model and their costs in the measure of the budget.

    Args:
      decoder: the dense model; only its shapes are read.
      kinds: the pruned kinds of groups.
      budget: its measure, window and layers.

    Raises:
      InputError: a setting is out of its range, the model lacks the layers, or no query head can be removed.
    """
    budget.check()
    layers = layers_of(budget, layer_count(decoder))
    counts = {kind: group_counts(decoder, kind) for kind in kinds}
    parts = part_counts(decoder, kinds)
    for kind in kinds:
        if kind == "query" and all(counts[kind][layer] == parts[kind][layer] for layer in layers):
            raise InputError("every key/value head has one query head in this model; leave out --heads query")
    group_costs = costs.group_costs(decoder, kinds, budget.measure, budget.window)
    return Inventory(counts, parts, group_costs, costs.cost(decoder, budget.measure, budget.window), layers)


def counts_for(
    decoder: Decoder,
    kinds: tuple[str, ...],
    scores: dict[str, list[np.ndarray]] | None,
    per_cost: bool,
    budget: Budget,
    refit: Refit,
    calibration: Calibration | None,
    progress: StageProgress | None = None,
    fits: Callable[[Counts], bool] = lambda counts: True,
    work: WorkFolder | None = None,
) -> Allocated:
    """The number of groups of every kind that each layer keeps.

    Args:
      decoder: the dense model.
      kinds: the pruned kinds of groups.
      scores: kind -> for each layer, the scores of its groups; None where structured OBS chooses the groups.
      per_cost: whether the allocation `global` divides scores by the cost of the groups.
      budget: how much is removed, and its allocation.
      refit: the refit of the pruned model; the allocation `measured` measures losses after this refit.
      calibration: the windows on which losses are measured; None for other allocations.
      progress: called with the number of losses measured, and of all.
      fits: whether the output format can hold counts of the allocation `equal`.
      work: the folder of the measured sublayers, from which an interrupted measurement continues.

    Raises:
      InputError: see `expected`; or the allocation needs scores or windows that are missing.
    """
    inventory = inventory_of(decoder, kinds, budget)
    limit = _limit(decoder, inventory, budget)
    counts = _uniform(inventory, limit, budget)
    if counts is not None:
        return Allocated(counts)
    if budget.allocation == "global":
        check_comparable("obs" if scores is None else "")
        assert scores is not None
        return Allocated(_decided(lambda: budgets.globally(inventory, limit, budget, scores, per_cost)))
    if calibration is None:
        raise InputError("measured budgets take losses on calibration windows; give the calibration")
    report = partial(tell, progress, "budget")
    if budget.allocation in BY_CURVES:
        check_curves("obs" if scores is None else "a criterion with scores", budget.allocation)
        if budget.allocation == "search":
            return _search(decoder, inventory, limit, budget, refit, calibration, report, work)
        levels, losses = _by_curves(decoder, inventory, budget, refit, calibration, report, work)
        return _cheapest(inventory, limit, levels, losses, budget, fits)
    levels = budgets.levels(inventory, budget, SHARES)

    def choose(kind: str, layer: int, keep: int) -> np.ndarray:
        assert scores is not None, "structured OBS chooses groups without scores"
        of_layer = {kind: [scores[kind][layer]]}
        kept = budgets.choose(of_layer, {kind: [keep]}, {kind: [inventory.parts[kind][layer]]})
        return np.asarray(kept[kind][0])

    chosen = None if scores is None else choose
    losses = level_losses(decoder, calibration.batches, levels, chosen, refit, report, work=work).divergences
    return _cheapest(inventory, limit, levels, losses, budget)


def _by_curves(
    decoder: Decoder,
    inventory: Inventory,
    budget: Budget,
    refit: Refit,
    calibration: Calibration,
    report: Callable[[int, int], None],
    work: WorkFolder | None = None,
) -> tuple[Levels, Losses]:
    """All levels and their losses, from a few measured levels of every sublayer, and from that without any groups."""
    levels = budgets.levels(inventory, budget, curves.SHARES)
    tried = _measured_levels(inventory, budget)
    fewest = {kind: [row[-1] for row in rows] for kind, rows in levels.items()}
    batches = curves.windows_of_curves(calibration.batches, widest_mlp(decoder))
    windows = batches.first(max(1, curves.MEASURED_TOKENS // batches.length))
    found = level_losses(decoder, batches, tried, None, refit, report, fewest, windows, work)
    assert found.errors is not None, "structured OBS has errors"
    return levels, curves.curve_losses(levels, tried, found.divergences, found.errors)


def _measured_levels(inventory: Inventory, budget: Budget) -> dict[str, list[list[int]]]:
    """The levels of every sublayer at which the allocations by curves measure, after that of the dense model."""
    levels, most = budgets.levels(inventory, budget, curves.MEASURED_SHARES), len(curves.MEASURED_SHARES) + 1
    return {kind: [row[:most] + [0] * (0 in row[most:]) for row in rows] for kind, rows in levels.items()}


def _search(
    decoder: Decoder,
    inventory: Inventory,
    limit: float,
    budget: Budget,
    refit: Refit,
    calibration: Calibration,
    report: Callable[[int, int], None],
    work: WorkFolder | None = None,
) -> Allocated:
    """The counts of `curves` after a search of steps between sublayers, and the record of both."""
    batches, generations = calibration.batches, searches.generations_of(len(inventory.layers))
    measured = sum(len(row) - 1 for rows in _measured_levels(inventory, budget).values() for row in rows)
    told = in_turn(report, (measured, len(PROJECTIONS) * layer_count(decoder), generations))
    tried, losses = _by_curves(decoder, inventory, budget, refit, calibration, next(told), work)
    start = _cheapest(inventory, limit, tried, losses, budget)
    levels = searches.levels_around(inventory, budget, start.counts)
    dense = [dense_on(decoder, part) for part in searches.windows(batches)]
    with tempfile.TemporaryDirectory(prefix="minillm-jax-") as folder:
        model = composed(decoder, batches, levels, start.counts, refit, Path(folder), next(told))

        def divergence(counts: Counts, number: int) -> float:
            return model.divergence(counts, dense[number])

        seed = calibration.seed
        found = searches.search(inventory, limit, levels, start.counts, divergence, seed, generations, next(told))
    counts = _decided(lambda: _filled(inventory, limit, found.counts, tried, losses, budget))
    return replace(start, counts=counts, searched=[x if np.isfinite(x) else None for x in found.divergences])


def _filled(
    inventory: Inventory, limit: float, counts: Counts, tried: Levels, losses: Losses, budget: Budget
) -> Counts:
    """The counts with single groups added by their losses: the levels of a search leave room below the limit."""
    filled = {kind: list(row) for kind, row in counts.items()}
    correct(inventory, limit, filled, tried, losses, budget)
    return filled


def _pairs(levels: Levels, losses: Losses) -> dict[str, list[list[tuple[int, float | None]]]]:
    """Each level with its loss, for the record; None where the loss is not finite."""
    return {
        kind: [
            [(count, loss if np.isfinite(loss) else None) for count, loss in zip(*row, strict=True)]
            for row in zip(levels[kind], rows, strict=True)
        ]
        for kind, rows in losses.items()
    }


def _cheapest(
    inventory: Inventory,
    limit: float,
    levels: Levels,
    losses: Losses,
    budget: Budget,
    fits: Callable[[Counts], bool] = lambda counts: True,
) -> Allocated:
    """The counts with the least sum of losses, and the losses for the record."""
    equal = budget.allocation == "equal"
    cheapest = partial(budgets.cheapest_equal, fits=fits) if equal else budgets.cheapest
    counts = _decided(lambda: cheapest(inventory, limit, levels, losses, budget))
    return Allocated(counts, _pairs(levels, losses))


def _decided(compute: Callable[[], Counts]) -> Counts:
    """The counts of process 0, in every process: all have measured together, but may compare the values otherwise."""
    return {kind: [int(count) for count in rows] for kind, rows in hosts.rows_of_first(compute).items()}


def check_curves(criterion: str, allocation: str) -> None:
    """Check that a criterion has a curve of errors, for an allocation of `BY_CURVES`.

    Raises:
      InputError: the criterion is not `obs`.
    """
    if criterion != "obs":
        raise InputError(
            f"the allocation {allocation} follows the errors of structured OBS, not {criterion}; use --criterion obs, "
            "or the allocation measured"
        )


def check_comparable(criterion: str) -> None:
    """Check that a criterion has scores that the allocation `global` can compare between layers.

    Raises:
      InputError: the criterion is `obs`, which chooses groups during pruning.
    """
    if criterion == "obs":
        raise InputError(
            "the criterion obs chooses while it prunes and has no scores to compare between layers; use the allocation "
            "uniform or measured"
        )


def steps_between(before: Counts, after: Counts, parts: Counts, steps: int) -> list[Counts]:
    """The counts after each round of pruning. All rounds remove about equally many groups.

    Args:
      before: kind -> for each layer, the number of groups of the dense model.
      after: the number of kept groups after the last round.
      parts: number of parts, each of which loses equally many groups in every round.
      steps: number of rounds.
    """

    def after_step(kind: str, step: int) -> list[int]:
        rows = zip(before[kind], after[kind], parts[kind], strict=True)
        return [n - p * round((n - k) / p * step / steps) for n, k, p in rows]

    return [{kind: after_step(kind, step) for kind in before} for step in range(1, steps + 1)]


def layers_of(budget: Budget, count: int, named_by: str | None = None) -> range:
    """The pruned layers of a model with `count` layers.

    Args:
      budget: its layers.
      count: number of layers of the model.
      named_by: the recipe that names the layers; None where the user does.

    Raises:
      InputError: the model lacks these layers.
    """
    if budget.layers is None:
        return range(count)
    start, stop = budget.layers
    last = stop + count if stop < 0 else stop
    if not 0 <= start < last <= count:
        instead = "--layers 1:-1 for all but the first and the last" if count > 2 else "--layers all"
        if named_by is None:
            raise InputError(
                f"layers {start}:{stop} are not a range of this model's layers; it has 0:{count}; use {instead}, for "
                "example"
            )
        raise InputError(
            f"the recipe {shortened(named_by)} prunes layers {start}:{stop}, {_range_in_words(start, stop)}, but this "
            f"model has {count} layers; give other layers beside the recipe, {instead}, for example"
        )
    return range(start, last)


def _range_in_words(start: int, stop: int) -> str:
    return f"all but the first {start} and the last {-stop}" if stop < 0 else f"{start} to {stop - 1}"
