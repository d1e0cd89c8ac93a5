"""Timings of models in processes of their own, and the command `bench`; no second is compared with another."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from minillm_jax import demo
from minillm_jax.api import load
from minillm_jax.errors import InputError
from minillm_jax.evaluation.speed import Load, Ours, Round, one_round, speed_of
from minillm_jax.timing import OURS, TORCH, Torch, check, time_models, weight_bytes
from tests.cli.command import call
from tests.helpers import load_torch, torch_model

SMALL = Load(prompt=8, tokens=4, batches=(1, 2))


def test_speeds_are_tokens_by_median_seconds() -> None:
    rounds = [Round({1: first, 2: 2.0}, {1: 3.0, 2: last}) for first, last in ((0.5, 1.0), (9.0, 4.0), (0.25, 2.0))]
    found = speed_of(rounds, SMALL)
    assert found.first_token == 0.5
    assert found.prefill == {1: 16.0, 2: 8.0}
    assert found.decoding == {1: 1.0, 2: 3.0}


class Counted:
    """An engine that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def read(self, prompts: np.ndarray, size: int) -> None:
        self.asked.append((*prompts.shape, size))

    def more(self, count: int) -> None:
        self.asked.append((count,))


def test_a_round_reads_every_batch_and_decodes_behind_it() -> None:
    engine = Counted()
    one_round(engine, SMALL, 61)
    assert engine.asked == [(1, 8, 12), (3,), (2, 8, 12), (3,)]


def test_both_engines_generate_the_same_tokens() -> None:
    prompts = np.random.default_rng(0).integers(0, 500, (2, 8), dtype=np.int32)
    ours, theirs = Ours(load(demo.FOLDER).decoder), Torch(load_torch(demo.FOLDER))
    for engine in (ours, theirs):
        engine.read(prompts, 12)
        engine.more(3)
    assert ours.last.tolist() == theirs.last.tolist()


def test_models_are_timed_in_processes_of_their_own() -> None:
    told = []
    found = time_models([str(demo.FOLDER)], SMALL, 1, (OURS, TORCH), told=lambda *step: told.append(step))
    assert [one.library for one in found] == [OURS, TORCH]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for one in found:
        assert one.parameters == 964_000
        assert one.disk == (Path(demo.FOLDER) / "model.safetensors").stat().st_size == weight_bytes(Path(demo.FOLDER))
        assert 0 < one.load_seconds < 100
        assert one.peak_bytes > one.disk
        assert set(one.speed.decoding) == {1, 2}


def test_an_error_of_a_process_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: "):
        time_models([str(tmp_path / "nowhere")], SMALL, 1)


def test_bad_input_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    torch_model("opt", max_position_embeddings=40).save_pretrained(tmp_path / "model")
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path / "model"), transformers.OPTConfig)
    for what, rounds, sentence in (
        (Load(prompt=0), 1, "--prompt: expected a whole number of at least 1"),
        (Load(tokens=1), 1, "--tokens: expected a whole number of at least 2"),
        (Load(batches=(1, 0)), 1, "--batch-sizes: expected a whole number of at least 1"),
        (SMALL, 0, "--rounds: expected a whole number of at least 1"),
        (Load(prompt=30, tokens=11), 1, "41 tokens are too long: the model has 40 learned positions"),
    ):
        with pytest.raises(InputError, match=sentence):
            check([str(tmp_path / "model")], what, rounds, (OURS,))


def test_the_command_compares_with_the_first_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", 8, "--tokens", 4, "--batch-sizes", "1,2", "--rounds", 1]
    assert call(monkeypatch, ["bench", demo.FOLDER, demo.FOLDER, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["models"]
    assert first["ratio"] == {"first_token": 1.0, "prefill": {"1": 1.0, "2": 1.0}, "decoding": {"1": 1.0, "2": 1.0}}
    expected = second["speed"]["decoding"]["2"] / first["speed"]["decoding"]["2"]
    assert second["ratio"]["decoding"]["2"] == pytest.approx(expected)
    assert call(monkeypatch, ["bench", demo.FOLDER, "--batch-sizes", "a"]) == 2
    assert "--batch-sizes a: expected whole numbers with commas between" in capsys.readouterr().err
