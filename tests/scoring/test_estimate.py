"""How an estimate is cut up changes nothing; each program is compiled once; an interrupted estimate goes on."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from minillm_jax.errors import InputError
from minillm_jax.scoring.gradient import checkpoint, plan, slopes
from minillm_jax.scoring.gradient.estimate import batches, estimate, numbered_batches
from minillm_jax.scoring.gradient.settings import Estimation
from minillm_jax.scoring.gradient.step import CANDIDATES, StepReport
from tests.helpers import random_tokens, small_decoder

SPSA = Estimation("spsa", directions=5, epsilon=1e-2, distribution="rademacher", per_step=1)
GATES = Estimation("jvp", "gates", 5, per_step=1)


def projected_of(settings: Estimation, windows: np.ndarray) -> np.ndarray:
    projected = estimate(small_decoder(), windows, settings).projected
    assert projected is not None
    assert projected.dtype == np.float64
    return projected


@pytest.mark.parametrize("settings", [SPSA, GATES], ids=["spsa", "jvp"])
def test_chunks_and_batches_do_not_change_the_estimate(monkeypatch: pytest.MonkeyPatch, settings: Estimation) -> None:
    """Losses agree to 1e-6 relative, so projected gradients to that over 2ε."""
    windows = random_tokens(61, 7, 16)
    tolerance = 1e-6 * 4.2 / 2e-2 if settings.difference == "spsa" else 1e-6
    whole = projected_of(settings, windows)
    np.testing.assert_allclose(projected_of(replace(settings, per_step=3), windows), whole, rtol=1e-5, atol=tolerance)
    monkeypatch.setattr(plan, "TOKENS_AT_ONCE", 48)
    assert plan.plan(small_decoder(), 16, settings).tokens == 48
    np.testing.assert_allclose(projected_of(settings, windows), whole, rtol=1e-5, atol=tolerance)


def test_calls_of_another_length_are_bit_equal_and_nothing_is_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = random_tokens(61, 7, 16)
    monkeypatch.setattr(plan, "TOKENS_AT_ONCE", 48)
    assert {len(batch) for batch in batches(windows, 48)} == {2, 3}
    jax.clear_caches()
    whole = projected_of(GATES, windows)
    assert slopes.directional_derivatives._cache_size() == 2, "one program for each size of a batch"
    monkeypatch.setattr(plan, "WORK_PER_CALL", 1.0)
    settings = replace(GATES, directions=4, per_step=1)
    assert plan.plan(small_decoder(), 16, settings).chunks == 1
    np.testing.assert_array_equal(projected_of(settings, windows), whole[:4])
    assert slopes.directional_derivatives._cache_size() == 4
    projected_of(replace(settings, directions=3, seed=5), windows)
    assert slopes.directional_derivatives._cache_size() == 4, "seeds and numbers of directions compile nothing"


def test_directions_per_step_follow_the_memory() -> None:
    decoder = small_decoder()
    one = plan.direction_bytes(decoder, 512, 128, GATES.resolve())
    for memory, expected in ((one // 2, 1), (3 * one, 3), (100 * one, plan.MOST_PER_STEP)):
        assert plan.plan(decoder, 128, replace(GATES, directions=64, per_step=None, memory=memory)).per_step == expected
    assert plan.plan(decoder, 128, replace(GATES, directions=2, per_step=None, memory=100 * one)).per_step == 2


def test_memory_of_a_direction_is_bounded_by_the_formula() -> None:
    """The compiler's own account of four directions more."""
    decoder, windows = small_decoder(), random_tokens(61, 4, 128)
    for settings in (replace(GATES, directions=8), Estimation("jvp", "weights", 8, distribution="rademacher")):
        temporary = []
        for per_step in (4, 8):
            stacked = settings.draw(decoder, 0, 8).stacked(per_step)
            tokens, numbers = next(numbered_batches(windows, 512))
            lowered = slopes.directional_derivatives.lower(decoder, stacked, tokens, numbers, settings.make_space())
            temporary.append(lowered.compile().memory_analysis().temp_size_in_bytes)
        bound = 4 * plan.direction_bytes(decoder, 512, 128, settings.resolve())
        assert 0 < temporary[1] - temporary[0] <= bound


def test_an_interrupted_estimate_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "WORK_PER_CALL", 1.0)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0.0)
    decoder, windows, settings = small_decoder(), random_tokens(61, 3, 16), replace(GATES, per_step=2)
    whole = estimate(decoder, windows, settings).projected

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate(decoder, windows, settings, stop, tmp_path / "saved")
    seen: list[int] = []
    monkeypatch.setattr(plan, "WORK_PER_CALL", 1e12)  # the stored plan is used, not a new one
    again = estimate(
        decoder, windows, replace(settings, per_step=1), lambda done, _: seen.append(done), tmp_path / "saved"
    )
    assert seen == [5]
    np.testing.assert_array_equal(again.projected, whole)
    finished = estimate(decoder, windows, settings, lambda done, _: seen.append(done), tmp_path / "saved")
    assert seen == [5]
    np.testing.assert_array_equal(finished.projected, whole)


def test_a_checkpoint_of_another_estimate_is_an_error(tmp_path: Path) -> None:
    decoder, windows, saved = small_decoder(), random_tokens(61, 3, 16), tmp_path / "saved"
    estimate(decoder, windows, GATES, checkpoint=saved)
    for other, word in ((replace(GATES, seed=1), "seed"), (replace(GATES, rng="threefry4x32"), "rng")):
        with pytest.raises(InputError, match=f"holds an estimate with another {word} .* give another --checkpoint"):
            estimate(decoder, windows, other, checkpoint=saved)
    with pytest.raises(InputError, match="another text"):
        estimate(decoder, random_tokens(61, 3, 16, seed=1), GATES, checkpoint=saved)
    with pytest.raises(InputError, match="another model"):
        estimate(small_decoder(seed=1), windows, GATES, checkpoint=saved)
    with pytest.raises(InputError, match="cannot be resumed"):
        estimate(decoder, windows, Estimation("exact", "gates"), checkpoint=saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold a checkpoint"):
        estimate(decoder, windows, GATES, checkpoint=tmp_path / "file")


KILLED = """
import sys
from minillm_jax.estimate import chunks, resume
from minillm_jax.estimate.loop import estimate
from tests.helpers import random_tokens, small_decoder
from tests.scoring.test_estimate import GATES
chunks.WORK_PER_CALL, resume.SAVE_EVERY = 1.0, 0.0
def tell(done, total):
    print(done, flush=True)
    if done == 3:
        sys.stdin.read()  # until it is killed
estimate(small_decoder(), random_tokens(61, 3, 16), GATES, tell, sys.argv[1])
"""


def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "saved")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "3":
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    monkeypatch.setattr(plan, "WORK_PER_CALL", 1.0)
    decoder, windows, seen = small_decoder(), random_tokens(61, 3, 16), []
    again = estimate(decoder, windows, GATES, lambda done, _: seen.append(done), tmp_path / "saved")
    assert seen == [4, 5]
    np.testing.assert_array_equal(again.projected, estimate(decoder, windows, GATES).projected)


def test_the_step_is_reported_and_chosen() -> None:
    decoder, windows = small_decoder(), random_tokens(61, 3, 16)
    for epsilon, words in ((1e-7, "nearly lost in rounding"), (3.0, "too large"), (1e-3, None)):
        report = estimate(decoder, windows, replace(SPSA, epsilon=epsilon)).step
        assert report is not None
        advice = report.advice()
        assert advice is None if words is None else words in (advice or "")
    assert report.rounding < report.second < report.first < report.loss
    chosen = estimate(decoder, windows, replace(SPSA, epsilon=None))
    assert chosen.settings.epsilon in CANDIDATES
    assert chosen.step is not None
    assert chosen.step.advice() is None


def test_the_terms_of_the_step_are_those_of_a_parabola() -> None:
    """L(ε) = 2 + 3ε + 5ε² at ε = ± 0.1."""
    report = StepReport.of(np.asarray([[2.35, 1.75], [2.35, 1.75]]), 2.0)
    assert report.first == pytest.approx(0.3)
    assert report.second == pytest.approx(0.05)


def test_bfloat16_weights_give_the_slopes_of_the_model_they_are() -> None:
    """The step is never rounded to bfloat16: against the same weights in float32, where nothing is lost."""
    decoder, windows = small_decoder(), random_tokens(61, 3, 16)
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), decoder)
    same = jax.tree.map(lambda leaf: leaf.astype("float32"), rounded)
    for settings, tolerance in ((replace(SPSA, epsilon=1e-4), 0.01), (replace(SPSA, difference="jvp"), 0.1)):
        expected = estimate(same, windows, replace(settings, difference="jvp")).projected
        found = estimate(rounded, windows, settings).projected
        assert expected is not None
        assert found is not None
        assert np.linalg.norm((found - expected).sum(1)) <= tolerance * np.linalg.norm(expected.sum(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Estimation("backward"), "unknown difference 'backward'; expected one of spsa, jvp, exact"),
        (Estimation(space="heads"), "unknown space of directions 'heads'"),
        (Estimation(rng="rbg"), "unknown way to make random numbers 'rbg'"),
        (Estimation(rank=0), "the rank of directions must be at least 1, found 0"),
        (Estimation(per_step=0), "the number of directions per step must be at least 1, found 0"),
        (Estimation("exact", "low-rank"), "the exact gradient has no directions of low rank"),
        (Estimation(per_sequence=True), "a direction for every sequence needs the space gates"),
        (Estimation(space="gates", per_sequence=True, distribution="sphere"), "cannot be on the sphere"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings: Estimation, message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimate(small_decoder(), random_tokens(61, 2, 9), settings)
