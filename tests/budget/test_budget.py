"""Budgets: what is asked for is kept, to within a step; the cheapest combination is the cheapest there is."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.api import prune, prune_in_rounds
from minillm_jax.budget import allocate
from minillm_jax.budget import budget as budgets
from minillm_jax.budget.budget import Budget, Stock
from minillm_jax.budget.measured_losses import level_losses
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model import axis_table, costs
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts
from minillm_jax.pruning.refit import Refit, slice_and_refit
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.scoring.score import Scoring, score
from tests.helpers import random_tokens, small_decoder

WINDOWS = random_tokens(61, 24, 12)
CALIBRATION = Calibration(WINDOWS, "random", 0)
BLOCKS = ("head", "channel")


def small_model(**changes: Any) -> Model:
    return Model(small_decoder(**changes), {}, Path("small"), "small")


def step_of(stock: Stock, kind: str) -> int:
    """What one step in every layer costs."""
    return sum(cost * parts for cost, parts in zip(stock.costs[kind], stock.parts[kind], strict=True))


# ------------------------------------------------------------------------------------------------------- uniform


@pytest.mark.parametrize("kinds", [BLOCKS, ("query", "channel"), ("head",)])
@pytest.mark.parametrize(
    "budget",
    [
        Budget(0.3, of="blocks"),
        Budget(0.1, of="model"),
        Budget(target=("parameters", 6500)),
        Budget(target=("macs", 26_000), window=4),
        Budget(target=("memory", 28_000.0), window=4),
    ],
    ids=str,
)
def test_uniform_budgets_are_met_to_within_a_step_in_every_layer(budget: Budget, kinds: tuple[str, ...]) -> None:
    decoder = small_decoder()
    stock = allocate.stock_of(decoder, kinds, budget)
    limit = budgets.limit_of(stock, budget, costs.block_parameters(decoder))
    counts = allocate.expected(decoder, kinds, budget)
    assert counts is not None
    assert all(len(set(rows)) == 1 for rows in counts.values())
    whole = {kind: [np.arange(n) for n in rows] for kind, rows in counts.items()}
    kept = budgets.choose({k: [np.zeros(n) for n in group_counts(decoder, k)] for k in kinds}, counts, stock.parts)
    pruned = slice_groups(decoder, kept)
    left = costs.cost(pruned, budget.measure, budget.window)
    assert left == stock.left(counts)
    assert limit - step_of(stock, list(kinds)[-1]) < left <= limit
    assert whole.keys() == kept.keys()


def test_a_ratio_of_parameters_is_of_what_it_says() -> None:
    decoder = small_decoder()
    blocks, model = costs.block_parameters(decoder), costs.cost(decoder, "parameters")
    stock = allocate.stock_of(decoder, BLOCKS, Budget(0.25))
    assert budgets.limit_of(stock, Budget(0.25, of="blocks"), blocks) == model - 0.25 * blocks
    assert budgets.limit_of(stock, Budget(0.25, of="model"), blocks) == 0.75 * model


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(), "give a ratio or a target"),
        (Budget(0.2, target=("parameters", 10)), "give a ratio or a target"),
        (Budget(0.2, of="heads"), "unknown thing that the ratio counts 'heads'"),
        (Budget(0.2, allocation="fair"), "unknown allocation 'fair'"),
        (Budget(target=("parameters", 10), of="blocks"), "nothing for it to be a share of"),
        (Budget(target=("speed", 10)), "unknown measure 'speed'"),
        (Budget(target=("parameters", 1e9)), "there is nothing to remove"),
        (Budget(target=("parameters", 10)), "ask for less, or prune more kinds"),
        (Budget(0.99, of="model"), "ask for less, or prune more kinds"),
        (Budget(0.2, allocation="global", round_width_to=64), "rounded in uniform budgets only, not global"),
        (Budget(0.2, least=1.0), r"least share that stays must lie in \[0, 1\)"),
        (Budget(0.2, window=0), "at least 1 token"),
        (Budget(0.2, layers=(2, 1)), "layers 2:1 are not a range"),
        (Budget(0.2, layers=(1, -3)), "layers 1:-3 are not a range"),
    ],
)
def test_budgets_that_make_no_sense(budget: Budget, words: str) -> None:
    with pytest.raises(InputError, match=words):
        allocate.expected(small_decoder(), BLOCKS, budget)


def test_layers_are_counted_from_the_end() -> None:
    assert allocate.layers_of(Budget(0.2, layers=(4, -2)), 32) == range(4, 30)
    counts = allocate.expected(small_decoder(), BLOCKS, Budget(0.5, layers=(1, -1)))
    assert counts == {"head": [4, 2, 4], "channel": [12, 6, 12]}


# -------------------------------------------------------------------------------------------------------- global


def test_global_budgets_remove_the_lowest_scores_per_cost_wherever_they_are() -> None:
    model = small_model()
    scores = score(model, CALIBRATION, Scoring("wanda"))
    budget = Budget(0.4, of="blocks", allocation="global", least=0.25)
    pruned = prune(model, scores, budget)
    stock = allocate.stock_of(model.decoder, BLOCKS, budget)
    limit = budgets.limit_of(stock, budget, costs.block_parameters(model.decoder))
    assert limit - max(map(max, stock.costs.values())) < costs.cost(pruned.decoder, "parameters") <= limit
    kept = (pruned.record or {})["kept"]
    per_cost = [
        (scores.groups[kind][layer][group] / stock.costs[kind][layer], group in kept[kind][layer], kind, layer)
        for kind in BLOCKS
        for layer in range(3)
        for group in range(stock.counts[kind][layer])
    ]
    at_least = {"head": 1, "channel": 3}
    assert all(len(kept[kind][layer]) >= at_least[kind] for kind in BLOCKS for layer in range(3))
    worst_gone = max(value for value, stays, *_ in per_cost if not stays)
    free = [row for row in per_cost if row[1] and len(kept[row[2]][row[3]]) > at_least[row[2]]]
    assert min(value for value, *_ in free) >= worst_gone
    assert len({len(rows) for rows in kept["channel"]}) > 1, "layers of this model differ"


def test_obs_has_no_scores_to_compare() -> None:
    model = small_model()
    with pytest.raises(InputError, match="has no scores to compare between layers"):
        prune(model, score(model, CALIBRATION, Scoring("obs")), Budget(0.3, allocation="global"), None, CALIBRATION)


# ------------------------------------------------------------------------------------------------------ measured


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_the_cheapest_combination_is_the_cheapest_there_is(data: st.DataObject) -> None:
    layers, most = data.draw(st.integers(1, 3)), 4
    costs_of = data.draw(st.lists(st.integers(1, 5), min_size=2 * layers, max_size=2 * layers))
    counts = {kind: [most] * layers for kind in BLOCKS}
    price = {"head": costs_of[:layers], "channel": costs_of[layers:]}
    ones = {kind: [1] * layers for kind in BLOCKS}
    whole = most * sum(costs_of)
    stock = Stock(counts, ones, price, whole, range(layers))
    losses_of = st.lists(st.floats(0, 1), min_size=most - 1, max_size=most - 1)
    losses = {kind: [[0.0, *np.cumsum(data.draw(losses_of))] for _ in range(layers)] for kind in BLOCKS}
    tried = {kind: [list(range(most, 0, -1))] * layers for kind in BLOCKS}
    limit = float(data.draw(st.integers(sum(costs_of), whole - 1)))
    found = budgets.cheapest(stock, limit, tried, losses)

    def total(kept: dict[str, list[int]]) -> float:
        return sum(losses[kind][layer][most - kept[kind][layer]] for kind in BLOCKS for layer in range(layers))

    each = [
        {"head": list(kept[:layers]), "channel": list(kept[layers:])}
        for kept in product(range(1, most + 1), repeat=2 * layers)
    ]
    best = min(total(kept) for kept in each if stock.left(kept) <= limit)
    assert stock.left(found) <= limit
    assert total(found) <= best + 1e-9


def test_limits_hold_where_savings_are_counted_in_units() -> None:
    """Seven layers of uneven costs, far more than units; each level loses its square."""
    rng = np.random.default_rng(0)
    costs_of = [int(cost) for cost in rng.integers(10**5, 10**6, size=7)]
    whole = 100 * sum(costs_of)
    stock = Stock({"channel": [100] * 7}, {"channel": [1] * 7}, {"channel": costs_of}, whole, range(7))
    tried = {"channel": [[100, 90, 70, 50, 30, 10]] * 7}
    losses = {"channel": [[(i + 1) * (100 - n) ** 2 / 1e4 for n in tried["channel"][0]] for i in range(7)]}
    for share in (0.05, 0.4, 0.85):
        limit = (1 - share) * whole
        left = stock.left(budgets.cheapest(stock, limit, tried, losses))
        assert limit - max(costs_of) < left <= limit


@pytest.mark.parametrize("method", ["none", "least-squares"])
def test_a_measured_level_is_the_loss_of_the_model_pruned_there(method: str) -> None:
    """By really slicing that one layer, for every kind; with biases, whose means are made up for."""
    decoder = small_decoder(output_bias=True, mlp_bias=True)
    refit = Refit(method, alpha=0.0, inner=0.0)
    levels = {"query": [[8, 4]] * 3, "channel": [[12, 9, 5]] * 3}

    def stays(kind: str, layer: int, keep: int) -> np.ndarray:
        return np.arange(0, 8, 2) if kind == "query" else np.arange(keep)

    found = level_losses(decoder, WINDOWS, levels, stays, refit)
    dense = perplexity(decoder, WINDOWS).loss
    for kind, rows in levels.items():
        for layer in range(3):
            for level, keep in enumerate(rows[layer]):
                kept = {kind: [np.arange(n) for n in group_counts(decoder, kind)]}
                if level:
                    kept[kind][layer] = stays(kind, layer, keep)
                loss = perplexity(slice_and_refit(decoder, kept, WINDOWS, refit), WINDOWS).loss
                assert found[kind][layer][level] == pytest.approx(loss - dense, abs=2e-6)
    assert any(abs(loss) > 1e-4 for rows in found.values() for row in rows for loss in row)


@pytest.mark.parametrize("criterion", ["obs", "wanda"])
def test_measured_budgets_keep_the_limit_and_what_is_needed(criterion: str) -> None:
    model = small_model()
    scores = score(model, CALIBRATION, Scoring(criterion))
    uniform = prune(model, scores, Budget(0.5), Refit(), CALIBRATION)
    measured = prune(model, scores, Budget(0.5, allocation="measured"), Refit(), CALIBRATION)
    before, after = (costs.cost(one.decoder, "parameters") for one in (uniform, measured))
    assert before - 3 * 16 * 16 < after <= before, "filled up to within one group"
    with pytest.raises(InputError, match="give the calibration"):
        prune(model, scores, Budget(0.5, allocation="measured"), Refit())


# ------------------------------------------------------------------------------------------------------- rounds


def test_rounds_end_with_the_same_counts_and_remember_what_was_kept_of_the_dense_model() -> None:
    model = small_model()
    once = prune_in_rounds(model, CALIBRATION, Scoring("magnitude"), Budget(0.5))
    thrice = prune_in_rounds(model, CALIBRATION, Scoring("magnitude"), Budget(0.5), rounds=3)
    for kind in axis_table.KINDS:
        assert group_counts(once.decoder, kind) == group_counts(thrice.decoder, kind)
    kept = {k: [np.asarray(r) for r in rows] for k, rows in (thrice.record or {})["kept"].items()}
    same: Decoder = slice_groups(model.decoder, kept)
    assert perplexity(same, WINDOWS) == perplexity(thrice.decoder, WINDOWS)
    assert (once.record or {})["kept"] == (thrice.record or {})["kept"], "magnitudes of what stays do not change"
    with pytest.raises(InputError, match="at least 1 round"):
        prune_in_rounds(model, CALIBRATION, Scoring("magnitude"), Budget(0.5), rounds=0)
    with pytest.raises(InputError, match="cannot be used with several rounds"):
        prune_in_rounds(model, CALIBRATION, Scoring("fms"), Budget(0.5), rounds=2, checkpoint="saved")


def test_steps_between_remove_about_equally_many() -> None:
    ones = {"channel": [1], "query": [4]}
    found = allocate.steps_between({"channel": [10], "query": [16]}, {"channel": [3], "query": [4]}, ones, 3)
    assert found == [{"channel": [8], "query": [12]}, {"channel": [5], "query": [8]}, {"channel": [3], "query": [4]}]
