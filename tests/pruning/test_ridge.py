"""The ridge of the refit, chosen by windows that are held out."""

from dataclasses import replace

import numpy as np
import pytest

from minillm_jax.data.batches import Batches
from minillm_jax.pruning.refit import held_out_windows, prune_by_obs
from minillm_jax.pruning.system import CHOICES, ENOUGH, RIDGE, System, system_of, system_with_ridge
from minillm_jax.settings import Refit
from tests.helpers import arrays_equal, random_tokens, small_decoder

ROWS = np.arange(0, 12, 2)


def moments_of(x: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    zero = np.zeros(x.shape[1]), np.zeros(target.shape[1])
    return [x.T @ x, x.sum(0), x.T @ target, target.sum(0), *zero]


def noisy(tokens: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs whose last features are nearly sums of the first, a kernel, and a target with noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, 12))
    x[:, 6:] = x[:, :6] + 0.1 * x[:, 6:]
    kernel = rng.normal(size=(12, 3))
    return x, kernel, x @ kernel + noise * rng.normal(size=(tokens, 3))


def chosen(x: np.ndarray, kernel: np.ndarray, target: np.ndarray, held: int, biased: bool = False) -> System:
    parts = (moments_of(x, target), moments_of(x[-held:], target[-held:]))
    return system_with_ridge(*parts, kernel, (len(x), held), 1.0, None, biased, "mlp.down of layer 0")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "noise"), [(24, 6.0), (400, 0.1)])
def test_the_chosen_ridge_has_nearly_the_least_error_on_held_out_tokens(
    tokens: int, noise: float, biased: bool
) -> None:
    x, kernel, target = noisy(tokens, noise)
    held = tokens // 4
    system = chosen(x, kernel, target, held, biased)
    fit_x, fit_target = x[:-held], target[:-held]
    errors = []
    for ridge in CHOICES:
        fit = system_of(moments_of(fit_x, fit_target), kernel, len(fit_x), 1.0, ridge, biased, "")
        solution, held_x, held_target = fit.rows(ROWS), x[-held:][:, ROWS], target[-held:]
        if biased:
            held_x, held_target = held_x - held_x.mean(0), held_target - held_target.mean(0)
        errors.append(np.sum((held_x @ solution - held_target) ** 2))
        if ridge == CHOICES[0]:
            before = np.sum((held_x @ kernel[ROWS] - held_target) ** 2)
    assert system.held_out is not None
    best = system.held_out.best(ROWS)
    gains = before - np.asarray(errors)
    expected = next(
        (ridge for ridge, gain in zip(CHOICES, gains, strict=True) if gain >= ENOUGH * gains.max() > 0), 0.3
    )
    assert best == expected
    refitted = system_of(moments_of(x, target), kernel, len(x), 1.0, best, biased, "").rows(ROWS)
    np.testing.assert_allclose(system.rows(ROWS), refitted, rtol=1e-9)


def test_noise_and_few_tokens_ask_for_a_larger_ridge() -> None:
    few, many = (chosen(*noisy(tokens, 6.0), tokens // 4).held_out for tokens in (24, 2000))
    assert few is not None
    assert many is not None
    assert few.best(ROWS) > many.best(ROWS)


def test_a_larger_ridge_after_a_failure_is_not_chosen_again() -> None:
    system = chosen(*noisy(40, 1.0), 10)
    assert system.with_ridge(2 * system.ridge).held_out is None
    assert system.ridge == pytest.approx(RIDGE * system.diagonal)


def test_a_given_ridge_and_few_windows_hold_nothing_out() -> None:
    batches = Batches(random_tokens(61, 12, 16))
    assert held_out_windows(Refit(ridge=0.1), batches) == 0
    assert held_out_windows(Refit(), batches) == 3
    assert held_out_windows(Refit("none"), batches) == held_out_windows(Refit("bias"), batches) == 0
    assert held_out_windows(Refit(), batches.first(3)) == 0
    counts = {"channel": [6] * 3}
    chosen_ridge, given = (
        prune_by_obs(small_decoder(), counts, batches.first(3), Refit(ridge=ridge))[0] for ridge in (None, RIDGE)
    )
    assert arrays_equal(chosen_ridge, given)


def test_the_choice_does_not_depend_on_batches() -> None:
    """The held-out windows are the last, whatever the batches are."""
    batches, counts = Batches(random_tokens(61, 16, 16)), {"head": [1] * 3, "channel": [6] * 3}
    (one, kept), (other, same) = (
        prune_by_obs(small_decoder(), counts, part, Refit())
        for part in (batches, replace(batches, tokens_per_batch=48))
    )
    for kind, rows in kept.items():
        for layer, indices in enumerate(rows):
            np.testing.assert_array_equal(indices, same[kind][layer])
    for run, run_again in zip(one.runs, other.runs, strict=True):
        np.testing.assert_allclose(run.mlp.down.kernel[...], run_again.mlp.down.kernel[...], atol=1e-4)
