"""Budgets and allocations: limits are met to within a step, and measured allocations are the cheapest."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from minillm_jax.budget import allocate
from minillm_jax.budget import budget as budgets
from minillm_jax.budget.budget import Inventory
from minillm_jax.budget.measured_losses import level_losses
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model import axis_table, costs
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.loaded import Model
from minillm_jax.model.loss import token_divergences, top_tokens
from minillm_jax.model.tree import group_counts
from minillm_jax.pruning.refit import slice_and_refit
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.recipes.used import used
from minillm_jax.scoring.score import score
from minillm_jax.settings import Budget, Data, Output, Refit, Scoring
from minillm_jax.stages import prune_groups, prune_in_rounds
from tests.helpers import random_tokens, small_decoder

BATCHES = Batches(random_tokens(61, 24, 12))
CALIBRATION = Calibration(BATCHES, "random", 0)
BLOCKS = ("head", "channel")


def small_model(**changes: Any) -> Model:
    return Model(small_decoder(**changes), {}, Path("small"), "small")


def step_cost(inventory: Inventory, kind: str) -> int:
    """The cost of one step in every layer."""
    return sum(cost * parts for cost, parts in zip(inventory.costs[kind], inventory.parts[kind], strict=True))


# ------------------------------------------------------------------------------------------------------- uniform


@pytest.mark.parametrize("kinds", [BLOCKS, ("query", "channel"), ("head",)])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(0.3, ratio_of="blocks"),
        Budget(0.1, ratio_of="model"),
        Budget(target_params=6500.0),
        Budget(target_macs=26_000.0, window=4, keep_at_least=0.05),
        Budget(target_memory=28_000.0, window=4),
    ],
    ids=str,
)
def test_uniform_budgets_are_met_to_within_a_step_in_every_layer(budget: Budget, kinds: tuple[str, ...]) -> None:
    decoder = small_decoder()
    inventory = allocate.inventory_of(decoder, kinds, budget)
    limit = budgets.limit_of(inventory, budget, costs.block_parameters(decoder))
    counts = allocate.expected(decoder, kinds, budget)
    assert counts is not None
    assert counts.keys() == set(kinds)
    assert all(len(set(rows)) == 1 for rows in counts.values())
    equal_scores = {kind: [np.zeros(n) for n in group_counts(decoder, kind)] for kind in kinds}
    pruned = slice_groups(decoder, budgets.choose(equal_scores, counts, inventory.parts))
    cost = costs.cost(pruned, budget.measure, budget.window)
    assert cost == inventory.left(counts)
    assert limit - step_cost(inventory, list(kinds)[-1]) < cost <= limit


def test_limit_of_a_ratio_of_parameters_counts_the_blocks_or_the_model() -> None:
    decoder = small_decoder()
    blocks, model = costs.block_parameters(decoder), costs.cost(decoder, "parameters")
    inventory = allocate.inventory_of(decoder, BLOCKS, Budget(0.25))
    assert budgets.limit_of(inventory, Budget(0.25, ratio_of="blocks"), blocks) == model - 0.25 * blocks
    assert budgets.limit_of(inventory, Budget(0.25, ratio_of="model"), blocks) == 0.75 * model


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(), "give a ratio or a target"),
        (Budget(0.2, target_params=10.0), "give a ratio or a target"),
        (Budget(0.2, ratio_of="heads"), "unknown thing that the ratio counts 'heads'"),
        (Budget(0.2, allocation="fair"), "unknown allocation 'fair'"),
        (Budget(target_params=10.0, target_macs=10.0), "give one target"),
        (Budget(target_params=1e9), "there is nothing to remove"),
        (Budget(target_params=10.0), "use a larger target, a smaller --keep-at-least, or prune more kinds"),
        (Budget(0.99, ratio_of="model"), "use a smaller ratio, a smaller --keep-at-least, or prune more kinds"),
        (Budget(0.97, allocation="global"), "use a smaller ratio, a smaller --keep-at-least, or prune more kinds"),
        (
            Budget(target_params=10.0, keep_at_least=0.0, round_width_to=8),
            "use a larger target, a smaller --round-width-to, or prune more kinds",
        ),
        (Budget(0.2, allocation="global", round_width_to=0), "multiples of at least 1, not 0"),
        (Budget(0.2, allocation="global", keep_at_least=1.0), r"--keep-at-least must lie in \[0, 1\)"),
        (Budget(0.2, window=0), "at least 1 token"),
        (Budget(0.2, layers=(2, 1)), "layers 2:1 are not a range"),
        (Budget(0.2, layers=(1, -3)), "layers 1:-3 are not a range"),
    ],
)
def test_budgets_out_of_range_are_errors(budget: Budget, words: str) -> None:
    with pytest.raises(InputError, match=words):
        allocate.expected(small_decoder(), BLOCKS, budget)


def test_negative_layers_count_from_the_end() -> None:
    assert allocate.layers_of(Budget(0.2, layers=(4, -2)), 32) == range(4, 30)
    counts = allocate.expected(small_decoder(), BLOCKS, Budget(0.5, layers=(1, -1)))
    assert counts == {"head": [4, 2, 4], "channel": [12, 6, 12]}


# ----------------------------------------------------------------------------------------- multiples, all allocations


def drawn_inventory(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[Inventory, Budget]:
    """A small inventory with unequal layers, and a budget with multiples that may exceed a layer's groups."""
    layers = draw(st.integers(1, 3))
    parts = {"query": draw(st.lists(st.integers(1, 3), min_size=layers, max_size=layers)), "channel": [1] * layers}
    counts = {kind: [p * draw(st.integers(1, 9)) for p in parts[kind]] for kind in parts}
    group_costs = {kind: draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers)) for kind in parts}
    dense = sum(c * n for kind in parts for c, n in zip(group_costs[kind], counts[kind], strict=True))
    start = draw(st.integers(0, layers - 1))
    budget = Budget(
        round_heads_to=draw(st.integers(1, 4)),
        round_width_to=draw(st.integers(1, 10)),
        keep_at_least=draw(st.sampled_from([0.0, 0.1, 0.3, 0.5])),
    )
    return Inventory(counts, parts, group_costs, dense, range(start, layers)), budget


def check_multiples(inventory: Inventory, budget: Budget, kept: dict[str, list[int]], limit: float) -> None:
    """The limit holds; a layer keeps all its groups, or a multiple in every part, at least the asked share."""
    assert inventory.left(kept) <= limit
    for kind, counts in kept.items():
        for layer, count in enumerate(counts):
            whole, parts = inventory.counts[kind][layer], inventory.parts[kind][layer]
            assert 0 < count <= whole
            if count == whole:
                continue
            assert layer in inventory.layers
            assert count % parts == 0
            assert count // parts % budget.multiple(kind) == 0
            assert count // parts >= budget.keep_at_least * whole // parts


def all_sizes(inventory: Inventory, budget: Budget, kind: str) -> list[list[int]]:
    """What a layer may keep, written out: descending."""
    rows = []
    for layer, (whole, parts) in enumerate(zip(inventory.counts[kind], inventory.parts[kind], strict=True)):
        rows.append([whole])
        for size in range(whole - parts, 0, -parts if layer in inventory.layers else -whole):
            enough = size >= budget.keep_at_least * whole
            if layer in inventory.layers and enough and size // parts % budget.multiple(kind) == 0:
                rows[-1].append(size)
    return rows


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_allocation_keeps_multiples_within_the_limit(data: st.DataObject) -> None:
    inventory, budget = drawn_inventory(data.draw)
    tried = {kind: all_sizes(inventory, budget, kind) for kind in inventory.counts}
    least = inventory.left({kind: [row[-1] for row in rows] for kind, rows in tried.items()})
    limit = float(data.draw(st.integers(least, inventory.whole)))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    check_multiples(inventory, budget, budgets.uniform(inventory, limit, budget), limit)
    scores = {kind: [rng.random(n) for n in counts] for kind, counts in inventory.counts.items()}
    per_cost = data.draw(st.booleans())
    check_multiples(inventory, budget, budgets.globally(inventory, limit, budget, scores, per_cost), limit)
    equal = {kind: [np.ones(n) for n in counts] for kind, counts in inventory.counts.items()}
    check_multiples(inventory, budget, budgets.globally(inventory, limit, budget, equal, per_cost), limit)

    losses = {kind: [[0.0, *np.cumsum(rng.random(len(row) - 1))] for row in rows] for kind, rows in tried.items()}
    measured = budgets.cheapest(inventory, limit, tried, losses, budget)
    check_multiples(inventory, budget, measured, limit)
    sites = [(kind, layer) for kind in inventory.counts for layer in range(len(inventory.counts[kind]))]
    totals = []
    for places in product(*(range(len(tried[kind][layer])) for kind, layer in sites)):
        chosen = {kind: [0] * len(rows) for kind, rows in tried.items()}
        for (kind, layer), place in zip(sites, places, strict=True):
            chosen[kind][layer] = tried[kind][layer][place]
        if inventory.left(chosen) <= limit:
            totals.append(sum(losses[kind][layer][place] for (kind, layer), place in zip(sites, places, strict=True)))
    total = sum(losses[kind][layer][tried[kind][layer].index(measured[kind][layer])] for kind, layer in sites)
    assert total <= min(totals) + 1e-9


@settings(deadline=None, max_examples=60)
@given(data=st.data(), share=st.floats(0.0, 0.99))
def test_measured_levels_are_sizes_that_a_layer_may_keep(data: st.DataObject, share: float) -> None:
    inventory, budget = drawn_inventory(data.draw)
    levels = budgets.levels(inventory, budget, (share, *allocate.SHARES))
    for kind, rows in levels.items():
        for row, sizes in zip(rows, all_sizes(inventory, budget, kind), strict=True):
            assert row == sorted(set(row), reverse=True)
            assert set(row) <= set(sizes)
            assert (row[0], row[-1]) == (sizes[0], sizes[-1])


@pytest.mark.filterwarnings("ignore:the allocation (global|measured) removes no query heads")
@pytest.mark.parametrize("allocation", ["uniform", "global", "measured"])
@pytest.mark.parametrize(("amount", "rounds"), [({"ratio": 0.4}, 2), ({"target_params": 7000.0}, 1)], ids=str)
def test_models_are_pruned_to_multiples_by_every_allocation(
    allocation: str, amount: dict[str, float], rounds: int
) -> None:
    """Two query heads of every key/value head, and channels in fours; in rounds, the last one counts."""
    model = small_model(sizes=Sizes(V=61, D=16, H=4, layers=(LayerSizes(N=8, K=2, F=12),) * 3))
    budget = Budget(**amount, allocation=allocation, rounds=rounds, round_heads_to=2, round_width_to=4)
    scoring = Scoring("wanda", kinds=("query", "channel"))
    pruned = prune_in_rounds(model, CALIBRATION, scoring, budget)
    assert set(group_counts(pruned.decoder, "query")) <= {4, 8}
    assert set(group_counts(pruned.decoder, "channel")) <= {4, 8, 12}
    inventory = allocate.inventory_of(model.decoder, ("query", "channel"), budget)
    limit = budgets.limit_of(inventory, budget, costs.block_parameters(model.decoder))
    assert costs.cost(pruned.decoder, "parameters") <= limit < costs.cost(model.decoder, "parameters")


# -------------------------------------------------------------------------------------------------------- global


def test_scores_that_are_not_finite_have_no_order() -> None:
    """NaN would otherwise be neither the lowest nor the highest score, and be kept or removed by chance."""
    decoder = small_decoder()
    budget = Budget(0.4, allocation="global")
    inventory = allocate.inventory_of(decoder, BLOCKS, budget)
    scores = {kind: [np.arange(1.0, n + 1) for n in inventory.counts[kind]] for kind in BLOCKS}
    for value in (np.nan, np.inf, -np.inf):
        scores["channel"][1][3] = value
        words = "the channel scores of layer 1 are not finite: 1 of 12, the first that of group 3; .* --dtype float32"
        with pytest.raises(InputError, match=words):
            budgets.globally(inventory, 1.0, budget, scores, per_cost=True)


def test_a_model_whose_scores_overflow_names_the_layer() -> None:
    def leaf(path: Any, array: Any) -> Any:
        return array.at[1].mul(1e30) if axis_table.array_path(path).endswith("mlp.down.kernel") else array

    model = small_model()
    model = replace(model, decoder=jax.tree_util.tree_map_with_path(leaf, model.decoder))
    with pytest.raises(InputError, match="the channel scores of layer 1 are not finite: 12 of 12"):
        score(model, CALIBRATION, Scoring("magnitude"))


def test_global_allocation_removes_the_lowest_scores_per_cost_of_the_whole_model() -> None:
    model = small_model()
    scores = score(model, CALIBRATION, Scoring("wanda"))
    budget = Budget(0.4, ratio_of="blocks", allocation="global", keep_at_least=0.25)
    pruned = prune_groups(model, scores, budget)
    inventory = allocate.inventory_of(model.decoder, BLOCKS, budget)
    limit = budgets.limit_of(inventory, budget, costs.block_parameters(model.decoder))
    assert limit - max(map(max, inventory.costs.values())) < costs.cost(pruned.decoder, "parameters") <= limit
    kept = (pruned.record or {})["kept"]
    per_cost = [
        (scores.groups[kind][layer][group] / inventory.costs[kind][layer], group in kept[kind][layer], kind, layer)
        for kind in BLOCKS
        for layer in range(3)
        for group in range(inventory.counts[kind][layer])
    ]
    at_least = {"head": 1, "channel": 3}
    assert all(len(kept[kind][layer]) >= at_least[kind] for kind in BLOCKS for layer in range(3))
    highest_removed = max(value for value, is_kept, *_ in per_cost if not is_kept)
    removable = [row for row in per_cost if row[1] and len(kept[row[2]][row[3]]) > at_least[row[2]]]
    assert min(value for value, *_ in removable) >= highest_removed
    assert len({len(rows) for rows in kept["channel"]}) > 1, "layers lose unequal numbers of groups"


def test_global_allocation_of_structured_obs_is_an_error() -> None:
    model = small_model()
    scores = score(model, CALIBRATION, Scoring("obs"))
    with pytest.raises(InputError, match="has no scores to compare between layers"):
        prune_groups(model, scores, Budget(0.3, allocation="global"), None, CALIBRATION)


# ------------------------------------------------------------------------------------------------------ measured


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_measured_allocation_is_the_cheapest_of_all_combinations(data: st.DataObject) -> None:
    layers, most = data.draw(st.integers(1, 3)), 4
    group_costs = data.draw(st.lists(st.integers(1, 5), min_size=2 * layers, max_size=2 * layers))
    counts = {kind: [most] * layers for kind in BLOCKS}
    costs_of = {"head": group_costs[:layers], "channel": group_costs[layers:]}
    ones = {kind: [1] * layers for kind in BLOCKS}
    dense_cost = most * sum(group_costs)
    inventory = Inventory(counts, ones, costs_of, dense_cost, range(layers))
    increases = st.lists(st.floats(0, 1), min_size=most - 1, max_size=most - 1)
    losses = {kind: [[0.0, *np.cumsum(data.draw(increases))] for _ in range(layers)] for kind in BLOCKS}
    levels = {kind: [list(range(most, 0, -1))] * layers for kind in BLOCKS}
    limit = float(data.draw(st.integers(sum(group_costs), dense_cost - 1)))
    cheapest = budgets.cheapest(inventory, limit, levels, losses)

    def total(kept: dict[str, list[int]]) -> float:
        return sum(losses[kind][layer][most - kept[kind][layer]] for kind in BLOCKS for layer in range(layers))

    combinations = [
        {"head": list(kept[:layers]), "channel": list(kept[layers:])}
        for kept in product(range(1, most + 1), repeat=2 * layers)
    ]
    least = min(total(kept) for kept in combinations if inventory.left(kept) <= limit)
    assert inventory.left(cheapest) <= limit
    assert total(cheapest) <= least + 1e-9


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_level_whose_loss_is_not_finite_is_never_chosen(data: st.DataObject) -> None:
    """Whatever the loss: NaN, which every comparison would otherwise take for the least, or an infinity."""
    most, layers = 5, 2
    costs_of = {"channel": data.draw(st.lists(st.integers(1, 5), min_size=layers, max_size=layers))}
    dense_cost = most * sum(costs_of["channel"])
    inventory = Inventory({"channel": [most] * layers}, {"channel": [1] * layers}, costs_of, dense_cost, range(layers))
    levels = {"channel": [[5, 3, 2, 1]] * layers}
    broken = st.sampled_from([float("nan"), float("inf"), float("-inf")])
    row = st.tuples(*[st.floats(0, 1) | broken] * 3).map(lambda values: [0.0, *values])
    losses = {"channel": data.draw(st.lists(row, min_size=layers, max_size=layers))}
    limit = float(data.draw(st.integers(sum(costs_of["channel"]), dense_cost - 1)))
    finite = [
        [
            count
            for count, loss in zip(levels["channel"][layer], losses["channel"][layer], strict=True)
            if isfinite(loss)
        ]
        for layer in range(layers)
    ]
    reachable = [kept for kept in product(*finite) if inventory.left({"channel": kept}) <= limit]
    if not reachable:
        with pytest.raises(
            InputError, match=r"no choice within the limit of [\d,]+ has a finite loss: .* channel groups"
        ):
            budgets.cheapest(inventory, limit, levels, losses)
        return
    kept = budgets.cheapest(inventory, limit, levels, losses)["channel"]
    assert inventory.left({"channel": kept}) <= limit
    for layer, count in enumerate(kept):
        around = (
            [n for n in levels["channel"][layer] if n >= count][-1],
            next(n for n in levels["channel"][layer] if n <= count),
        )
        assert set(around) <= set(finite[layer]), "a size between two levels has finite losses on both sides"


def test_measured_losses_of_a_broken_model_are_an_error_and_overflows_are_infinite() -> None:
    """Layer 0 adds the opposites 3e38 and -3e38 by two channels; without one of them, layer 1 leaves the range."""
    decoder = small_decoder(layers=3, mlp_bias=True, activation="relu", gated=False)

    def leaf(path: Any, array: Any) -> Any:
        match axis_table.array_path(path).rpartition("mlp.")[2]:
            case "up.kernel":
                return array.at[0].set(0)
            case "up.bias":
                return array.at[0].set(1)
            case "down.kernel":
                return array.at[0].set(0).at[0, 0].set(3e38).at[0, 1].set(-3e38)
            case "down.bias":
                return array.at[1].set(3e38).at[2].set(-3e38)
        return array

    decoder = jax.tree_util.tree_map_with_path(leaf, decoder)
    levels = {"channel": [[12, 11, 6], [12], [12]]}
    kept = {11: np.delete(np.arange(12), 1), 6: np.arange(6)}
    losses = level_losses(decoder, BATCHES, levels, lambda kind, layer, keep: kept[keep], Refit("none")).losses
    assert losses["channel"][0] == [0.0, np.inf, pytest.approx(0.0, abs=1e-5)]

    def broken(path: Any, array: Any) -> Any:
        return array.at[1].set(np.nan) if axis_table.array_path(path).endswith("down.bias") else array

    with pytest.raises(InputError, match="the loss of the dense model on the calibration windows is nan"):
        level_losses(jax.tree_util.tree_map_with_path(broken, decoder), BATCHES, levels, None, Refit("none"))


def test_measured_allocation_keeps_limits_far_larger_than_its_units() -> None:
    """Seven layers of unequal costs; the loss of a level grows with the square of the removed groups."""
    rng = np.random.default_rng(0)
    group_costs = [int(cost) for cost in rng.integers(10**5, 10**6, size=7)]
    dense_cost = 100 * sum(group_costs)
    ones = {"channel": [1] * 7}
    inventory = Inventory({"channel": [100] * 7}, ones, {"channel": group_costs}, dense_cost, range(7))
    levels = {"channel": [[100, 90, 70, 50, 30, 10]] * 7}
    losses = {"channel": [[(i + 1) * (100 - n) ** 2 / 1e4 for n in levels["channel"][0]] for i in range(7)]}
    for share in (0.05, 0.4, 0.85):
        limit = (1 - share) * dense_cost
        cost = inventory.left(budgets.cheapest(inventory, limit, levels, losses))
        assert limit - max(group_costs) < cost <= limit


@pytest.mark.parametrize("method", [pytest.param("none", marks=pytest.mark.slow), "least-squares"])
def test_measured_loss_equals_that_of_the_model_with_one_layer_sliced(method: str) -> None:
    """For every kind of groups and every layer; in a model with biases, which the refit changes."""
    decoder = small_decoder(output_bias=True, mlp_bias=True)
    refit = Refit(method, alpha=0.0, inputs=0.0)
    levels = {"query": [[8, 4]] * 3, "channel": [[12, 9, 5]] * 3}

    def choose(kind: str, layer: int, keep: int) -> np.ndarray:
        return np.arange(0, 8, 2) if kind == "query" else np.arange(keep)

    found = level_losses(decoder, BATCHES, levels, choose, refit)
    losses, dense = found.losses, perplexity(decoder, BATCHES).loss
    tokens = jnp.asarray(BATCHES.windows)
    top = top_tokens(decoder, final_hidden(decoder, tokens))
    for kind, rows in levels.items():
        for layer in range(3):
            for level, keep in enumerate(rows[layer]):
                kept = {kind: [np.arange(n) for n in group_counts(decoder, kind)]}
                if level:
                    kept[kind][layer] = choose(kind, layer, keep)
                pruned = slice_and_refit(decoder, kept, BATCHES, refit)
                loss = perplexity(pruned, BATCHES).loss
                assert losses[kind][layer][level] == pytest.approx(loss - dense, abs=2e-6)
                _, divergences = token_divergences(pruned, final_hidden(pruned, tokens), tokens, top)
                assert found.divergences[kind][layer][level] == pytest.approx(float(divergences.mean()), abs=2e-6)
    assert any(abs(loss) > 1e-4 for rows in losses.values() for row in rows for loss in row)


@pytest.mark.parametrize("criterion", ["obs", "wanda"])
def test_measured_allocation_reaches_the_cost_of_the_uniform_one(criterion: str) -> None:
    model = small_model()
    scores = score(model, CALIBRATION, Scoring(criterion))
    uniform = prune_groups(model, scores, Budget(0.5), Refit(), CALIBRATION)
    measured = prune_groups(model, scores, Budget(0.5, allocation="measured"), Refit(), CALIBRATION)
    limit, cost = (costs.cost(pruned.decoder, "parameters") for pruned in (uniform, measured))
    assert limit - 3 * 16 * 16 < cost <= limit, "within one group of the limit"
    with pytest.raises(InputError, match="give the calibration"):
        prune_groups(model, scores, Budget(0.5, allocation="measured"), Refit())


def test_equal_allocation_is_the_cheapest_with_as_many_groups_in_every_layer() -> None:
    """Heads cost more of the loss here and channels less, or the other way round."""
    ones = {"head": [1] * 3, "channel": [1] * 3}
    counts, group_costs = {"head": [6] * 3, "channel": [40] * 3}, {"head": [20] * 3, "channel": [3] * 3}
    inventory = Inventory(counts, ones, group_costs, 3 * (6 * 20 + 40 * 3), range(3))
    budget, limit = Budget(target_params=450, keep_at_least=0.0), 450.0
    levels = {kind: [list(range(n, 0, -1)) for n in row] for kind, row in counts.items()}
    found = {}
    for dear in counts:
        losses = {
            kind: [[(5.0 if kind == dear else 1.0) * (1 - n / row[0]) ** 2 for n in row] for row in rows]
            for kind, rows in levels.items()
        }

        def loss(heads: int, channels: int, losses: dict[str, list[list[float]]] = losses) -> float:
            return 3 * (losses["head"][0][6 - heads] + losses["channel"][0][40 - channels])

        best = budgets.cheapest_equal(inventory, limit, levels, losses, budget)
        assert inventory.left(best) <= limit
        assert all(len(set(row)) == 1 for row in best.values())
        pairs = product(range(1, 7), range(1, 41))
        least = min(
            loss(*pair) for pair in pairs if inventory.left({"head": [pair[0]] * 3, "channel": [pair[1]] * 3}) <= limit
        )
        assert loss(best["head"][0], best["channel"][0]) == pytest.approx(least)
        found[dear] = best["head"][0]
    assert found["head"] > found["channel"]


# ------------------------------------------------------------------------------------------------------- rounds


def test_rounds_end_with_the_counts_of_one_round_and_record_the_kept_groups_of_the_dense_model() -> None:
    model, scoring = small_model(), Scoring("magnitude")
    once, thrice = (prune_in_rounds(model, CALIBRATION, scoring, Budget(0.5, rounds=rounds)) for rounds in (1, 3))
    for kind in axis_table.KINDS:
        assert group_counts(once.decoder, kind) == group_counts(thrice.decoder, kind)
    kept = {k: [np.asarray(r) for r in rows] for k, rows in (thrice.record or {})["kept"].items()}
    sliced: Decoder = slice_groups(model.decoder, kept)
    assert perplexity(sliced, BATCHES) == perplexity(thrice.decoder, BATCHES)
    assert (once.record or {})["kept"] == (thrice.record or {})["kept"], "magnitudes of kept groups do not change"
    with pytest.raises(InputError, match="at least 1 round"):
        prune_in_rounds(model, CALIBRATION, scoring, Budget(0.5, rounds=0))


def test_checkpoint_with_several_rounds_is_an_error() -> None:
    recipe = Recipe(
        data=Data("text.txt"),
        budget=Budget(0.5, rounds=2),
        scoring=Scoring("fms"),
        output=Output(checkpoint="saved"),
    )
    with pytest.raises(InputError, match="cannot be used with several rounds"):
        used(recipe)


def test_steps_between_remove_about_equally_many_groups_in_every_round() -> None:
    parts = {"channel": [1], "query": [4]}
    counts = allocate.steps_between({"channel": [10], "query": [16]}, {"channel": [3], "query": [4]}, parts, 3)
    assert counts == [{"channel": [8], "query": [12]}, {"channel": [5], "query": [8]}, {"channel": [3], "query": [4]}]
