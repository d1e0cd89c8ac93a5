"""An estimate does not depend on its plan; each program is compiled once; an interrupted estimate continues."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.scoring.gradient import slopes
from minillm_jax.scoring.gradient.estimate import estimate
from minillm_jax.scoring.gradient.plan import MOST_PER_STEP, Plan, direction_bytes, plan
from minillm_jax.scoring.gradient.settings import draw, resolve, space_of
from minillm_jax.scoring.gradient.step import CANDIDATES, StepReport
from minillm_jax.settings import Estimation
from tests.helpers import random_tokens, small_decoder

SPSA = Estimation("spsa", directions=5, epsilon=1e-2, distribution="rademacher", directions_per_step=1)
GATES = Estimation("jvp", "gates", 5, directions_per_step=1)

# The event that JAX reports for every compiled program.
COMPILED = "/jax/core/compile/backend_compile_duration"


def projected_of(settings: Estimation, batches: Batches, chosen: Plan | None = None) -> np.ndarray:
    projected = estimate(small_decoder(), batches, settings, plan=chosen).projected
    assert projected is not None
    assert projected.dtype == np.float64
    return projected


@contextmanager
def compilations(name: str) -> Iterator[list[str]]:
    """A list that grows by one entry for every compilation of a jitted function."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **details: str | int) -> None:
        if event == COMPILED and details.get("fun_name") == f"jit({name})":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("settings", [pytest.param(SPSA, marks=pytest.mark.slow), GATES], ids=["spsa", "jvp"])
def test_directions_per_step_and_batches_do_not_change_the_estimate(settings: Estimation) -> None:
    """Losses agree to 1e-6 relative, so projected gradients to that over 2ε."""
    batches = Batches(random_tokens(61, 7, 16))
    tolerance = 1e-6 * 4.2 / 2e-2 if settings.estimator == "spsa" else 1e-6
    reference = projected_of(settings, batches)
    three_per_step = projected_of(replace(settings, directions_per_step=3), batches)
    np.testing.assert_allclose(three_per_step, reference, rtol=1e-5, atol=tolerance)
    small_batches = plan(small_decoder(), 16, settings, tokens_at_once=48)
    assert small_batches.tokens == 48
    np.testing.assert_allclose(projected_of(settings, batches, small_batches), reference, rtol=1e-5, atol=tolerance)


def test_calls_of_any_length_are_bit_equal_and_no_program_is_compiled_twice() -> None:
    batches = Batches(random_tokens(61, 7, 16))
    long_calls = plan(small_decoder(), 16, GATES, tokens_at_once=48)
    assert {len(batch.numbers) for batch in batches.resized(long_calls.tokens)} == {2, 3}
    jax.clear_caches()
    with compilations("directional_derivatives") as compiled:
        reference = projected_of(GATES, batches, long_calls)
        assert len(compiled) == 2, "one program for each size of a batch"
        settings = replace(GATES, directions=4, directions_per_step=1)
        short_calls = plan(small_decoder(), 16, settings, tokens_at_once=48, work_per_call=1.0)
        assert short_calls.chunks == 1
        np.testing.assert_array_equal(projected_of(settings, batches, short_calls), reference[:4])
        assert len(compiled) == 4
        projected_of(replace(settings, directions=3, seed=5), batches, short_calls)
        assert len(compiled) == 4, "seeds and numbers of directions compile nothing"


def test_directions_per_step_follow_the_memory() -> None:
    decoder = small_decoder()
    one_direction = direction_bytes(decoder, 512, 128, resolve(GATES))
    settings = replace(GATES, directions=64, directions_per_step=None)
    for memory, expected in ((one_direction // 2, 1), (3 * one_direction, 3), (100 * one_direction, MOST_PER_STEP)):
        assert plan(decoder, 128, replace(settings, memory=memory)).per_step == expected
    assert plan(decoder, 128, replace(settings, directions=2, memory=100 * one_direction)).per_step == 2


@pytest.mark.slow
def test_memory_of_a_direction_is_bounded_by_the_formula() -> None:
    """The compiler's account of four more directions in a pass."""
    decoder, (batch,) = small_decoder(), Batches(random_tokens(61, 4, 128), tokens_per_batch=512)
    for settings in (replace(GATES, directions=8), Estimation("jvp", "weights", 8, distribution="rademacher")):
        temporary = []
        for per_step in (4, 8):
            drawn = draw(settings, decoder, 0, per_step)
            arguments = (decoder, drawn, batch.tokens, batch.numbers, space_of(settings))
            compiled = slopes.directional_derivatives.lower(*arguments).compile()
            temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        bound = 4 * direction_bytes(decoder, 512, 128, resolve(settings))
        assert 0 < temporary[1] - temporary[0] <= bound


def test_an_interrupted_estimate_continues_bit_for_bit(tmp_path: Path) -> None:
    decoder, batches = small_decoder(), Batches(random_tokens(61, 3, 16))
    settings, folder = replace(GATES, directions_per_step=2), tmp_path / "saved"
    short_calls = plan(decoder, 16, settings, work_per_call=1.0)
    reference = estimate(decoder, batches, settings, plan=short_calls).projected

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate(decoder, batches, settings, interrupt, folder, short_calls, save_every=0.0)
    reported: list[int] = []

    def report(done: int, total: int) -> None:
        reported.append(done)

    # The stored plan overrides another plan.
    one_per_step = replace(settings, directions_per_step=1)
    long_calls = plan(decoder, 16, one_per_step)
    assert long_calls != short_calls
    resumed = estimate(decoder, batches, one_per_step, report, folder, long_calls, save_every=0.0)
    assert reported == [5]
    np.testing.assert_array_equal(resumed.projected, reference)
    finished = estimate(decoder, batches, settings, report, folder)
    assert reported == [5], "a finished estimate measures nothing"
    np.testing.assert_array_equal(finished.projected, reference)


def test_a_checkpoint_of_another_estimate_is_an_error(tmp_path: Path) -> None:
    decoder, batches, folder = small_decoder(), Batches(random_tokens(61, 3, 16)), tmp_path / "saved"
    estimate(decoder, batches, GATES, checkpoint=folder)
    for settings, word in ((replace(GATES, seed=1), "seed"), (replace(GATES, rng="threefry4x32"), "rng")):
        with pytest.raises(InputError, match=f"holds an estimate with another {word} .* give another --checkpoint"):
            estimate(decoder, batches, settings, checkpoint=folder)
    with pytest.raises(InputError, match="another text"):
        estimate(decoder, Batches(random_tokens(61, 3, 16, seed=1)), GATES, checkpoint=folder)
    with pytest.raises(InputError, match="another model"):
        estimate(small_decoder(seed=1), batches, GATES, checkpoint=folder)
    with pytest.raises(InputError, match="cannot be resumed"):
        estimate(decoder, batches, Estimation("exact", "gates"), checkpoint=folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold a checkpoint"):
        estimate(decoder, batches, GATES, checkpoint=tmp_path / "file")


KILLED = """
import sys
from minillm_jax.data.batches import Batches
from minillm_jax.scoring.gradient.estimate import estimate
from minillm_jax.scoring.gradient.plan import plan
from tests.helpers import random_tokens, small_decoder
from tests.scoring.test_estimate import GATES
def report(done, total):
    print(done, flush=True)
    if done == 3:
        sys.stdin.read()  # waits for the kill
decoder = small_decoder()
short_calls = plan(decoder, 16, GATES, work_per_call=1.0)
estimate(decoder, Batches(random_tokens(61, 3, 16)), GATES, report, sys.argv[1], short_calls, save_every=0.0)
"""


@pytest.mark.slow
def test_the_estimate_of_a_killed_process_continues_bit_for_bit(tmp_path: Path) -> None:
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
    decoder, batches, reported = small_decoder(), Batches(random_tokens(61, 3, 16)), []
    short_calls = plan(decoder, 16, GATES, work_per_call=1.0)
    resumed = estimate(decoder, batches, GATES, lambda done, _: reported.append(done), tmp_path / "saved", short_calls)
    assert reported == [4, 5]
    np.testing.assert_array_equal(resumed.projected, estimate(decoder, batches, GATES, plan=short_calls).projected)


def test_the_step_is_reported_and_chosen() -> None:
    decoder, batches = small_decoder(), Batches(random_tokens(61, 3, 16))
    for epsilon, words in ((1e-7, "nearly lost in rounding"), (3.0, "too large"), (1e-3, None)):
        report = estimate(decoder, batches, replace(SPSA, epsilon=epsilon)).step
        assert report is not None
        advice = report.advice()
        assert advice is None if words is None else words in (advice or "")
    assert report.rounding < report.second < report.first < report.loss
    chosen = estimate(decoder, batches, replace(SPSA, epsilon=None))
    assert chosen.settings.epsilon in CANDIDATES
    assert chosen.step is not None
    assert chosen.step.advice() is None


def test_the_terms_of_the_step_are_those_of_a_parabola() -> None:
    """L(ε) = 2 + 3ε + 5ε² at ε = ± 0.1."""
    report = StepReport.of(np.asarray([[2.35, 1.75], [2.35, 1.75]]), 2.0)
    assert report.first == pytest.approx(0.3)
    assert report.second == pytest.approx(0.05)


@pytest.mark.slow
def test_the_slopes_of_bfloat16_weights_equal_those_of_the_same_weights_in_float32() -> None:
    """The step is never rounded to bfloat16."""
    decoder, batches = small_decoder(), Batches(random_tokens(61, 3, 16))
    in_bfloat16 = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), decoder)
    in_float32 = jax.tree.map(lambda leaf: leaf.astype("float32"), in_bfloat16)
    for settings, tolerance in ((replace(SPSA, epsilon=1e-4), 0.01), (replace(SPSA, estimator="jvp"), 0.1)):
        expected = estimate(in_float32, batches, replace(settings, estimator="jvp")).projected
        projected = estimate(in_bfloat16, batches, settings).projected
        assert expected is not None
        assert projected is not None
        assert np.linalg.norm((projected - expected).sum(1)) <= tolerance * np.linalg.norm(expected.sum(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Estimation("backward"), "unknown estimator 'backward'; expected one of spsa, jvp, exact"),
        (Estimation(space="heads"), "unknown space of directions 'heads'"),
        (Estimation(rng="rbg"), "unknown random generator 'rbg'"),
        (Estimation(space="low-rank", rank=0), "the rank of directions must be at least 1, found 0"),
        (Estimation(directions_per_step=0), "the number of directions per step must be at least 1, found 0"),
        (Estimation("exact", "low-rank"), "the exact gradient has no directions of low rank"),
        (Estimation(per_sequence=True), "a direction for every sequence needs the space gates"),
        (Estimation(space="gates", per_sequence=True, distribution="sphere"), "cannot be on the sphere"),
    ],
)
def test_unknown_or_contradictory_settings_are_errors(settings: Estimation, message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimate(small_decoder(), Batches(random_tokens(61, 2, 9)), settings)
