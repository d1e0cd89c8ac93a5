"""The allocation `search`: joint steps between sublayers, kept where the measured divergence of the model falls."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.budget import search as searches
from minillm_jax.budget.allocate import inventory_of
from minillm_jax.budget.budget import Counts, Inventory
from minillm_jax.budget.library import composed, dense_on
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.loss import token_divergences, top_tokens
from minillm_jax.model.tree import group_counts, parameter_count
from minillm_jax.pruning.refit import prune_by_obs
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.recipes.recipe import Recipe, with_options
from minillm_jax.recipes.used import used
from minillm_jax.settings import Budget, Refit, Scoring
from minillm_jax.stages import prune_in_rounds
from tests.budget.test_budget import small_model
from tests.helpers import random_tokens, small_decoder

BATCHES = Batches(random_tokens(61, 12, 16))
CALIBRATION = Calibration(BATCHES, "random", 0)
# Four layers of 5 heads and 60 channels; a head costs as much as 8 channels.
INVENTORY = Inventory(
    {"head": [5] * 4, "channel": [60] * 4},
    {"head": [1] * 4, "channel": [1] * 4},
    {"head": [24] * 4, "channel": [3] * 4},
    1200,
    range(4),
)
BUDGET = Budget(0.5, round_width_to=2, keep_at_least=0.2)
LIMIT = 620.0
START = {"head": [3, 3, 2, 2], "channel": [30, 30, 30, 30]}
LEVELS = searches.levels_around(INVENTORY, BUDGET, START)
BEST = {"head": [5, 3, 2, 1], "channel": [36, 36, 24, 24]}


def distance(counts: Counts, _: int = 0) -> float:
    """A divergence whose least value is at `BEST`, where a head counts as 6 channels."""
    rows = zip((6, 1), counts.values(), BEST.values(), strict=True)
    return float(sum(unit * abs(n - best) for unit, row, bests in rows for n, best in zip(row, bests, strict=True)))


def test_the_levels_hold_the_start_and_the_allowed_sizes_near_it() -> None:
    levels = searches.levels_around(INVENTORY, BUDGET, {"head": [1, 2, 4, 5], "channel": [12, 20, 58, 60]})
    assert levels["head"] == [[4, 3, 2, 1], [5, 4, 3, 2, 1], [5, 4, 3, 2, 1], [5, 4, 3, 2]]
    assert levels["channel"] == [[18, 16, 14, 12], [26, 24, 22, 20, 18, 16, 14], [60, 58, 56, 54, 52], [60, 58, 56, 54]]


def test_a_layer_that_is_not_pruned_has_one_level() -> None:
    inventory = Inventory(*[{"channel": [60, 60]}, {"channel": [1, 1]}, {"channel": [3, 3]}], 400, range(1, 2))
    assert searches.levels_around(inventory, BUDGET, {"channel": [60, 30]})["channel"][0] == [60]


@pytest.mark.parametrize("seed", range(20))
def test_offspring_hold_the_limit_and_move_one_level(seed: int) -> None:
    child = searches.offspring(INVENTORY, LIMIT, LEVELS, START, np.random.default_rng(seed))
    assert child is not None
    assert INVENTORY.left(child) <= LIMIT
    moves = [
        LEVELS[kind][layer].index(child[kind][layer]) - LEVELS[kind][layer].index(START[kind][layer])
        for kind in START
        for layer in range(4)
    ]
    assert set(moves) <= {-1, 0, 1}
    assert 1 <= moves.count(1) <= searches.MOST_LOSERS


def test_a_search_leaves_a_bad_start_and_the_divergence_never_grows() -> None:
    steps = []
    found = searches.search(INVENTORY, LIMIT, LEVELS, START, distance, 0, 12, lambda *step: steps.append(step))
    assert found.divergences[0] == distance(START)
    assert found.divergences[-1] == distance(found.counts) < 0.5 * distance(START)
    assert found.divergences == sorted(found.divergences, reverse=True)
    assert INVENTORY.left(found.counts) <= LIMIT
    assert steps == [(n, 12) for n in range(1, 13)]


def test_the_seed_decides_and_only_the_last_round_accepts() -> None:
    def better_at_first(counts: Counts, number: int) -> float:
        return distance(counts) if number < len(searches.TOKENS) - 1 else 1.0

    first, again = (searches.search(INVENTORY, LIMIT, LEVELS, START, distance, 7, 3) for _ in range(2))
    assert first == again
    assert first.counts != searches.search(INVENTORY, LIMIT, LEVELS, START, distance, 8, 3).counts
    assert searches.search(INVENTORY, LIMIT, LEVELS, START, better_at_first, 0, 3).counts == START


def test_divergences_that_overflow_are_left() -> None:
    def overflowing(counts: Counts, _: int) -> float:
        return np.inf if counts["head"][3] > 1 else distance(counts)

    found = searches.search(INVENTORY, LIMIT, LEVELS, START, overflowing, 0, 12)
    assert found.divergences[0] == np.inf
    assert np.isfinite(found.divergences[-1])


# -------------------------------------------------------------------------------------- the model and its library


def divergence_of(decoder: Decoder, pruned: Decoder) -> float:
    """The mean divergence of a smaller model from the dense one."""

    @jax.jit
    def mean(decoder: Decoder, pruned: Decoder, tokens: Any) -> Any:
        top = top_tokens(decoder, final_hidden(decoder, tokens))
        return token_divergences(pruned, final_hidden(pruned, tokens), tokens, top)[1].mean()

    return float(mean(decoder, pruned, BATCHES.windows))


def kept_of(model: Decoder, counts: Counts) -> axis_table.Kept:
    """The groups with rows of the output projections that are not zero."""
    kernels = {
        "head": [kernel for run in model.runs for kernel in run.attention.o.kernel[...]],
        "channel": [kernel for run in model.runs for kernel in run.mlp.down.kernel[...]],
    }
    whole = {kind: group_counts(model, kind) for kind in counts}
    return {
        kind: [np.flatnonzero(np.any(np.reshape(k, (n, -1)), axis=1)) for k, n in zip(kernels[kind], row, strict=True)]
        for kind, row in whole.items()
    }


@pytest.mark.parametrize(
    ("family", "refit"),
    [
        pytest.param({}, Refit("none"), marks=pytest.mark.slow, id="llama without refit"),
        pytest.param({"norm": "layer", "qkv_bias": True, "output_bias": True, "mlp_bias": True}, Refit(), id="biases"),
    ],
)
def test_a_composed_model_is_the_sliced_one(tmp_path: Path, family: dict[str, Any], refit: Refit) -> None:
    decoder = small_decoder(layers=2, **family)
    start = {"head": [2, 4], "channel": [6, 12]}
    levels = {"head": [[3, 2], [4, 1]], "channel": [[9, 6, 3], [12, 8]]}
    model, dense = composed(decoder, BATCHES, levels, start, refit, tmp_path), dense_on(decoder, BATCHES)
    pruned, kept = prune_by_obs(decoder, start, BATCHES, refit)
    measured = model.divergence(start, dense)
    assert measured == pytest.approx(divergence_of(decoder, pruned), rel=1e-5)
    other = {"head": [3, 1], "channel": [3, 8]}
    of_other = model.divergence(other, dense)
    full = model.at(other)
    sliced = slice_groups(full, kept_of(full, other))
    assert {kind: group_counts(sliced, kind) for kind in other} == other
    assert of_other == pytest.approx(divergence_of(decoder, sliced), rel=1e-5)
    assert of_other != pytest.approx(measured, rel=1e-3)
    assert model.divergence(start, dense) == measured
    groups = {kind: [row.tolist() for row in rows] for kind, rows in kept_of(model.at(start), start).items()}
    assert groups == {kind: [row.tolist() for row in rows] for kind, rows in kept.items()}


def test_a_bfloat16_model_keeps_its_type(tmp_path: Path) -> None:
    decoder = jax.tree.map(lambda array: array.astype(jnp.bfloat16), small_decoder(layers=2))
    levels, start = {"channel": [[12, 6], [12, 6, 4]]}, {"channel": [6, 6]}
    model, dense = composed(decoder, BATCHES, levels, start, Refit(), tmp_path), dense_on(decoder, BATCHES)
    pruned, _ = prune_by_obs(decoder, start, BATCHES)
    assert model.at(start).runs[0].mlp.down.kernel.dtype == jnp.bfloat16
    assert model.divergence(start, dense) == pytest.approx(divergence_of(decoder, pruned), rel=0.05)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_search_prunes_to_the_limit_and_removes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, steps = small_model(), []
    budget = Budget(0.4, ratio_of="model", allocation="search", round_width_to=2)

    def told(stage: str, done: int, total: int) -> None:
        if stage == "budget":
            steps.append((done, total))
            used_files.extend(tmp_path.rglob("*.npy"))

    used_files: list[Path] = []
    pruned = prune_in_rounds(model, CALIBRATION, Scoring(), budget, Refit(), progress=told)
    limit = 0.6 * parameter_count(model.decoder)
    assert 0.9 * limit < parameter_count(pruned.decoder) <= limit
    assert all(count % 2 == 0 for count in group_counts(pruned.decoder, "channel"))
    record = pruned.record or {}
    assert len(record["losses"]["channel"]) == 3
    assert len(record["searched"]) == 3 * searches.GENERATIONS + 1
    assert record["searched"] == sorted(record["searched"], reverse=True)
    total = 12 + 6 + 3 * searches.GENERATIONS
    assert steps == [(n, total) for n in range(1, total + 1)]
    assert used_files
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_search_repeats_itself() -> None:
    budget = Budget(0.5, allocation="search")
    first, again = (prune_in_rounds(small_model(), CALIBRATION, Scoring(), budget, Refit()) for _ in range(2))
    assert (first.record or {})["kept"] == (again.record or {})["kept"]
    assert (first.record or {})["searched"] == (again.record or {})["searched"]


def test_a_search_of_a_model_leaves_a_bad_start(tmp_path: Path) -> None:
    decoder, start = small_decoder(), {"channel": [3, 12, 3]}
    inventory = inventory_of(decoder, ("channel",), Budget(0.5, allocation="search"))
    levels = {"channel": [[12, 9, 6, 3]] * 3}
    model, dense = composed(decoder, BATCHES, levels, start, Refit("none"), tmp_path), dense_on(decoder, BATCHES)
    limit = float(inventory.left(start))
    found = searches.search(inventory, limit, levels, start, lambda counts, _: model.divergence(counts, dense), 0, 3)
    assert found.divergences[-1] < 0.9 * found.divergences[0]
    assert model.divergence(found.counts, dense) == found.divergences[-1]
    assert inventory.left(found.counts) <= limit


def test_a_folder_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1))
    budget = Budget(0.5, allocation="search")
    with pytest.raises(
        InputError, match=r"0\.0 GB left; set TMPDIR to a folder with more room, or use --budget curves"
    ):
        prune_in_rounds(small_model(), CALIBRATION, Scoring(), budget, Refit())
    assert list(tmp_path.iterdir()) == []


def test_the_rounds_measure_on_short_windows() -> None:
    long = searches.windows(Batches(random_tokens(61, 8, 1024)))
    assert [part.windows.shape for part in long] == [(1, 512), (2, 512), (4, 512)]
    assert [part.windows.shape for part in searches.windows(BATCHES)] == [(12, 16)] * 3


def test_other_criteria_are_refused() -> None:
    recipe, options = with_options(Recipe(), {"ratio": 0.2, "allocation": "search", "criterion": "flap"})
    with pytest.raises(InputError, match="the allocation search follows the errors of structured OBS, not flap"):
        used(recipe, options)
