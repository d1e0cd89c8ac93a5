"""The allocation `curves`: losses of all levels from one measured level and the errors of structured OBS."""

from typing import Any

import numpy as np
import pytest

from minillm_jax.budget import curves
from minillm_jax.budget.measured_losses import level_losses
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.model.tree import group_counts, parameter_count
from minillm_jax.recipes.recipe import Recipe, with_options
from minillm_jax.recipes.used import used
from minillm_jax.settings import Budget, Refit, Scoring
from minillm_jax.stages import prune_in_rounds
from tests.budget.test_budget import small_model
from tests.helpers import random_tokens, small_decoder

BATCHES = Batches(random_tokens(61, 12, 16))


def test_losses_follow_the_errors_through_the_measured_level() -> None:
    levels, middle = {"channel": [[4, 3, 2, 1], [4]]}, {"channel": [[4, 2], [4]]}
    errors = {"channel": [np.array([0.0, 1.0, 4.0, 10.0]), np.zeros(1)]}
    found = curves.curve_losses(levels, middle, {"channel": [[0.0, 0.2], [0.0]]}, errors)
    np.testing.assert_allclose(found["channel"][0], [0.0, 0.05, 0.2, 0.5])
    assert found["channel"][1] == [0.0]


def test_a_power_of_the_error_connects_the_measured_levels() -> None:
    errors = {"channel": [np.array([0.0, 1.0, 4.0, 9.0, 16.0])]}
    levels, two, three = {"channel": [[5, 4, 3, 2, 1]]}, {"channel": [[5, 4, 2]]}, {"channel": [[5, 4, 3, 1]]}
    squared = curves.curve_losses(levels, two, {"channel": [[0.0, 0.1, 8.1]]}, errors)
    np.testing.assert_allclose(squared["channel"][0], [0.0, 0.1, 1.6, 8.1, 25.6])
    bent = curves.curve_losses(levels, three, {"channel": [[0.0, 0.1, 0.2, 0.8]]}, errors)
    np.testing.assert_allclose(bent["channel"][0], [0.0, 0.1, 0.2, 0.45, 0.8])
    # Noise neither turns a curve downwards nor makes it steeper than the third power.
    for noisy, last in ((0.05, 0.1 * 16**0.5), (1e9, 0.1 * 16**3)):
        found = curves.curve_losses(levels, two, {"channel": [[0.0, 0.1, noisy]]}, errors)
        assert found["channel"][0][-1] == pytest.approx(last)


def test_no_level_beyond_the_last_finite_one_is_chosen() -> None:
    errors, levels = {"channel": [np.array([0.0, 1.0, 4.0, 9.0])]}, {"channel": [[4, 3, 2, 1]]}
    measured = {"channel": [[4, 3, 1]]}
    found = curves.curve_losses(levels, measured, {"channel": [[0.0, 0.1, np.inf]]}, errors)
    assert found["channel"][0] == [0.0, pytest.approx(0.1), np.inf, np.inf]
    found = curves.curve_losses(levels, measured, {"channel": [[0.0, np.inf, np.inf]]}, errors)
    assert found["channel"][0] == [0.0, np.inf, np.inf, np.inf]


def test_a_loss_that_falls_makes_no_removal_free() -> None:
    levels = middle = {"channel": [[2, 1]] * 3}
    errors = {"channel": [np.array([0.0, 1.0])] * 3}
    found = curves.curve_losses(levels, middle, {"channel": [[0.0, -0.1], [0.0, 0.3], [0.0, 0.5]]}, errors)
    assert found["channel"] == [[0.0, pytest.approx(curves.LEAST * 0.4)], [0.0, 0.3], [0.0, 0.5]]


def test_errors_grow_with_every_removal_and_order_the_losses() -> None:
    decoder = small_decoder()
    counts = {"channel": group_counts(decoder, "channel")}
    levels = {"channel": [[n, n - 4, n - 8] for n in counts["channel"]]}
    measured = level_losses(decoder, BATCHES, levels, None, Refit(), fewest={"channel": [1] * 3})
    assert measured.errors is not None
    for errors in measured.errors["channel"]:
        assert len(errors) == 12
        assert (np.diff(errors) >= -1e-9 * errors[-1]).all()


def test_a_budget_by_curves_is_met_and_takes_two_passes_for_each_sublayer() -> None:
    model, steps = small_model(), []
    budget = Budget(0.4, ratio_of="model", allocation="curves")
    calibration = Calibration(BATCHES, "random", 0)

    def told(stage: str, done: int, total: int) -> None:
        if stage == "budget":
            steps.append((done, total))

    pruned = prune_in_rounds(model, calibration, Scoring(), budget, Refit(), progress=told)
    limit = 0.6 * parameter_count(model.decoder)
    assert 0.9 * limit < parameter_count(pruned.decoder) <= limit
    assert steps == [(n, 12) for n in range(1, 13)]
    assert len((pruned.record or {})["losses"]["channel"]) == 3


def test_criteria_without_a_curve_are_refused() -> None:
    recipe, given = with_options(Recipe(), {"ratio": 0.2, "allocation": "curves", "criterion": "wanda"})
    with pytest.raises(InputError, match=r"follows the errors of structured OBS, not wanda; use --criterion obs"):
        used(recipe, given)


@pytest.mark.parametrize(
    ("options", "allocation"),
    [
        ({}, "curves"),
        ({"format": "stock"}, "equal"),
        ({"criterion": "wanda"}, "uniform"),
        ({"structures": ("layers",)}, "uniform"),
        ({"allocation": "uniform"}, "uniform"),
    ],
    ids=str,
)
def test_the_allocation_suits_criterion_format_and_structures(options: dict[str, Any], allocation: str) -> None:
    recipe, given = with_options(Recipe(), {"ratio": 0.2} | options)
    assert used(recipe, given).recipe.budget.allocation == allocation


def test_an_equal_budget_leaves_layers_of_equal_size() -> None:
    model = small_model()
    calibration = Calibration(BATCHES, "random", 0)
    budget = Budget(0.4, ratio_of="model", allocation="equal")
    pruned = prune_in_rounds(model, calibration, Scoring(), budget, Refit())
    limit = 0.6 * parameter_count(model.decoder)
    assert 0.85 * limit < parameter_count(pruned.decoder) <= limit
    assert len(pruned.decoder.runs) == 1
