"""Mixtures of calibration texts: how they are written, how windows are shared and drawn, and their record."""

import json
from pathlib import Path

import numpy as np
import pytest

from minillm_jax import demo
from minillm_jax.api import calibrate, describe, evaluate, held_out, load
from minillm_jax.data.mixture import Share, check_one_text, counted, interleaved, shares_of
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two texts, the working directory of every test."""
    text = demo.training_text()
    (tmp_path / "a.txt").write_text(text[:40_000])
    rows = [{"text": part} for part in text[50_000:90_000].split("\n\n")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model() -> Model:
    return describe(demo.FOLDER)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.txt:0.7,b.jsonl:0.3", [("a.txt", 0.7), ("b.jsonl", 0.3)]),
        ("a.txt:7, b.jsonl:3", [("a.txt", 0.7), ("b.jsonl", 0.3)]),
        ("a.txt:1e1,b.jsonl:.5e1,c.txt:5", [("a.txt", 0.5), ("b.jsonl", 0.25), ("c.txt", 0.25)]),
        ("a.txt:2", [("a.txt", 1.0)]),
        ("owner/name:train:0.5,owner/other/config:0.5", [("owner/name:train", 0.5), ("owner/other/config", 0.5)]),
        ("C:\\texts\\a.txt:1,D:\\b.txt:1", [("C:\\texts\\a.txt", 0.5), ("D:\\b.txt", 0.5)]),
        ("a.txt", []),
        ("owner/name:train", []),
        ("C:\\texts\\a.txt", []),
        ("hf://datasets/owner/name", []),
        ("Once upon a time, there was a text: short.", []),
        ("nowhere.txt,other.txt", []),
    ],
)
def test_a_mixture_is_sources_with_weights(text: str, expected: list[tuple[str, float]]) -> None:
    found = shares_of(text)
    assert [share.source for share in found] == [source for source, _ in expected]
    assert [share.weight for share in found] == pytest.approx([weight for _, weight in expected])


def test_a_file_that_exists_is_a_source_whatever_its_name(folder: Path) -> None:
    for name in ("a.txt:0.7", "a:1,b:2", "x,y.txt"):
        (folder / name).write_text("words")
        assert shares_of(name) == ()
    assert [share.source for share in shares_of("x,y.txt:1,a.txt:1")] == ["x,y.txt", "a.txt"]
    assert [share.source for share in shares_of("a.txt:1,x,y.txt:1")] == ["a.txt", "x,y.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.txt:x,b.jsonl:0.3", "--calibration 'a.txt:x': every source of a mixture has a weight, found 'x'; give num"),
        ("a.txt,b.jsonl:0.3", "--calibration 'a.txt': every source of a mixture has a weight; give numbers, a.txt:0.7"),
        ("a.txt,b.jsonl", "--calibration 'a.txt': every source of a mixture has a weight"),
        ("a.txt:0.5,", "--calibration '': every source of a mixture has a weight"),
        ("a.txt:half,b.jsonl:half", "has a weight, found 'half'"),
        ("a.txt:0,b.jsonl:1", "--calibration a.txt: the weight must be above 0, found 0"),
        ("a.txt:-1,b.jsonl:1", "the weight must be above 0, found -1"),
        ("a.txt:nan,b.jsonl:1", "the weight must be above 0, found nan"),
        ("a.txt:1e999,b.jsonl:1", "the weight must be above 0, found 1e999"),
        ("a.txt:1,nowhere.txt:1", "nowhere.txt: no such file"),
        ("a.txt:99,b.jsonl:1", "b.jsonl: a weight of 0.01 gives no window of 6; use a larger weight or more --samples"),
    ],
)
def test_unusable_mixtures_are_one_sentence(model: Model, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(model, text, samples=6, length=16)


def test_windows_are_shared_by_the_largest_remainders() -> None:
    shares = [Share("a", 0.5), Share("b", 0.3), Share("c", 0.2)]
    for samples in range(4, 40):
        counts = [share.samples for share in counted(shares, samples)]
        assert sum(counts) == samples
        assert all(abs(count - share.weight * samples) < 1 for count, share in zip(counts, shares, strict=True))
    assert [share.samples for share in counted(shares, 7)] == [4, 2, 1]


def test_every_stretch_has_the_shares_of_the_whole() -> None:
    parts = [np.full((6, 2), 0, np.int32), np.full((3, 2), 1, np.int32)]
    assert interleaved(parts)[:, 0].tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0]


def test_the_windows_come_from_all_texts_by_the_seed(model: Model) -> None:
    mixed = calibrate(model, "a.txt:0.75,b.jsonl:0.25", samples=8, length=16, seed=3)
    assert mixed.batches.windows.shape == (8, 16)
    shares = [("a.txt", 0.75, 6), ("b.jsonl", 0.25, 2)]
    names = ("source", "weight", "samples")
    assert mixed.record()["mixture"] == [dict(zip(names, share, strict=True)) for share in shares]
    assert mixed.record()["source"] == "a.txt:0.75,b.jsonl:0.25"
    assert mixed.record()["samples"] == 8
    for source, _, count in shares:
        whole = {tuple(row) for row in calibrate(model, source, samples=30, length=16).batches.windows.tolist()}
        every = {tuple(row) for row in held_out(model, source, 16).windows.tolist()}
        assert whole <= every
        assert sum(tuple(row) in every for row in mixed.batches.windows.tolist()) == count
    again = calibrate(model, "a.txt:0.75,b.jsonl:0.25", samples=8, length=16, seed=3)
    other = calibrate(model, "a.txt:0.75,b.jsonl:0.25", samples=8, length=16, seed=4)
    assert mixed.fingerprint() == again.fingerprint() != other.fingerprint()


def test_the_same_text_twice_gives_different_draws(model: Model) -> None:
    """Every text of a mixture has a stream of its own."""
    twice = calibrate(model, "a.txt:1,./a.txt:1", samples=40, length=16).batches.windows
    assert len(np.unique(twice, axis=0)) > 20


def test_one_text_without_weight_keeps_its_windows_and_its_record(model: Model) -> None:
    assert "mixture" not in calibrate(model, "a.txt", 4, 16).record()
    assert shares_of("a.txt:1") == (Share("a.txt", 1.0),)


def test_a_text_of_the_mixture_that_is_too_short_is_named(folder: Path, model: Model) -> None:
    (folder / "short.txt").write_text("Only a few words.")
    with pytest.raises(InputError, match=r"short.txt: \d+ tokens are less than one window of 128"):
        calibrate(model, "a.txt:0.5,short.txt:0.5")


def test_evaluation_takes_one_text() -> None:
    check_one_text("a.txt")
    check_one_text(["a.txt:0.5,b.jsonl:0.5"])
    with pytest.raises(
        InputError, match="a mixture is for --calibration of prune and --data of recover; give one text here"
    ):
        evaluate(load(demo.FOLDER), "a.txt:0.5,b.jsonl:0.5")
