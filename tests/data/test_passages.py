"""Windows of long texts: drawn by the seed from passages, in bounded memory; short texts keep their windows."""

import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from minillm_jax import demo
from minillm_jax.api import calibrate, describe
from minillm_jax.data import tokenizing
from minillm_jax.data.calibration_size import Size
from minillm_jax.data.documents import Block, Opened, open_data
from minillm_jax.data.passages import passages, reservoir
from minillm_jax.data.text import Tokens, tokenise
from minillm_jax.data.windows import MOST_CHARACTERS, WHOLE, draw, sample
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model

WORDS = demo.training_text().split(" ")


@pytest.fixture(scope="module")
def model() -> Model:
    return describe(demo.FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> tokenizing.Tokenizer:
    return tokenizing.load(demo.FOLDER)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About six million characters. Every line begins with its number."""
    path = tmp_path_factory.mktemp("long") / "long.txt"
    draws = random.Random(0)
    with path.open("w") as file:
        for number in range(45_000):
            file.write(f"{number} {' '.join(draws.choices(WORDS, k=25))}\n")
    assert path.stat().st_size > WHOLE
    return path


def test_passages_are_the_text_whatever_its_parts() -> None:
    text = " ".join(WORDS[:3000]) + "x" * 500 + "終" * 500
    whole = list(passages([text], 100))
    assert "".join(whole) == text[: sum(map(len, whole))]
    assert len(text) - sum(map(len, whole)) < 100
    assert all(len(passage) <= 100 for passage in whole)
    assert sum(passage[0].isspace() for passage in whole[1:]) > 0.8 * len(whole)
    for size in (1, 7, 100, 1000):
        assert list(passages([text[at : at + size] for at in range(0, len(text), size)], 100)) == whole


def test_the_reservoir_draws_every_text_equally_often() -> None:
    texts = [str(number) for number in range(40)]
    counts = Counter(text for seed in range(500) for text in reservoir(texts, 10, seed))
    assert all(80 < counts[text] < 170 for text in texts)  # 125 expected, deviation 9.7
    first = Counter(reservoir(texts, 10, seed)[0] for seed in range(500))
    assert len(first) > 30
    assert sorted(reservoir(texts, 50, 3)) == sorted(texts)
    assert len(set(reservoir(texts, 10, 1))) == 10


def test_a_long_text_gives_distinct_windows_from_everywhere_by_the_seed(model: Model, long_text: Path) -> None:
    first = calibrate(model, long_text, samples=24, length=64, seed=1)
    again = calibrate(model, str(long_text), samples=24, length=64, seed=1)
    other = calibrate(model, long_text, samples=24, length=64, seed=2)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert first.batches.windows.shape == (24, 64)
    assert first.batches.windows.dtype == np.int32
    assert len(np.unique(first.batches.windows, axis=0)) == 24


def test_each_window_is_the_beginning_of_a_passage(
    model: Model, long_text: Path, tokenizer: tokenizing.Tokenizer
) -> None:
    """The windows stand in the text, in all of its quarters."""
    text, call = long_text.read_text(), tokenizer.call
    calibration = calibrate(model, long_text, samples=24, length=64)
    decode = getattr(call, "decode")  # noqa: B009  a tokenizer of transformers
    places = [text.find(decode(window)) for window in calibration.batches.windows]
    assert min(places) >= 0
    assert {place * 4 // len(text) for place in places} == {0, 1, 2, 3}


def test_the_windows_do_not_depend_on_the_format(model: Model, long_text: Path, tmp_path: Path) -> None:
    """Documents that are read in blocks, from a file or from Python, give the same passages."""
    text = long_text.read_text()
    lines = [text[at : at + 20_000] for at in range(0, len(text), 20_000)]
    with (tmp_path / "long.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    from_file = calibrate(model, tmp_path / "long.jsonl", samples=3, length=16)
    from_python = calibrate(model, (line for line in lines), samples=3, length=16)
    assert from_file.fingerprint() == from_python.fingerprint()


def test_a_short_text_keeps_the_windows_of_all_its_tokens(model: Model, tmp_path: Path) -> None:
    text = demo.training_text()[:60_000]
    (tmp_path / "short.txt").write_text(text)
    expected = sample(Tokens(tokenise(text, demo.FOLDER), "", 1), 5, 32, 3)
    np.testing.assert_array_equal(calibrate(model, tmp_path / "short.txt", 5, 32, 3).batches.windows, expected)


def endless(text: str, read: list[int]) -> Iterator[Block]:
    """A document without an end, and the number of its blocks that were read."""
    while True:
        read[0] += 1
        yield Block(0, f"{read[0]} {text}")


def test_memory_does_not_follow_the_text(tokenizer: tokenizing.Tokenizer) -> None:
    """Five times as much text as is tokenised whole takes little more memory than that."""
    line, read = " ".join(WORDS)[: 2**17], [0]
    blocks = islice(endless(line, read), 5 * WHOLE // len(line))
    tracemalloc.start()
    windows = draw(Opened("long", blocks), lambda: tokenizer, 1024, Size(4, 32), 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert windows.shape == (4, 32)
    assert read[0] >= 5 * WHOLE // len(line)
    assert peak < 3 * WHOLE


def test_the_reading_ends_after_a_number_of_characters(tokenizer: tokenizing.Tokenizer) -> None:
    text, read = (" ".join(WORDS) * 90)[: 2**24], [0]
    assert draw(Opened("endless", endless(text, read)), lambda: tokenizer, 1024, Size(2, 512), 0).shape == (2, 512)
    assert read[0] == -(-MOST_CHARACTERS // 2**24)


def test_passages_of_few_tokens_are_joined(tokenizer: tokenizing.Tokenizer) -> None:
    """A merge of sixteen spaces is one token, so that a passage of spaces holds few."""
    spaces = (Block(0, (" " * 2000 + "word ") * 2) for _ in range(1500))

    def few(text: str, **options: bool) -> dict[str, list]:
        words = text.split()
        return {"input_ids": [5] * len(words), "offset_mapping": [(0, 1)] * len(words)}

    sparse = tokenizer._replace(call=few, offsets=False)
    windows = draw(Opened("spaces", spaces), lambda: sparse, 1024, Size(3, 2), 0)
    np.testing.assert_array_equal(windows, np.full((3, 2), 5))
    spaces = (Block(0, (" " * 2000 + "word ") * 2) for _ in range(1500))
    with pytest.raises(
        InputError, match=r"spaces: \d+ tokens make \d windows of 32, but 3 are asked for; give more text"
    ):
        draw(Opened("spaces", spaces), lambda: sparse, 1024, Size(3, 32), 0)


def test_an_array_on_the_disk_is_drawn_from_without_reading_it_whole(model: Model, tmp_path: Path) -> None:
    ids = np.arange(200_000, dtype=np.int64) % 1024
    np.save(tmp_path / "ids.npy", ids)
    opened = open_data(tmp_path / "ids.npy")
    assert isinstance(opened.content, np.memmap)
    drawn = draw(opened, partial(pytest.fail, "needs no tokenizer"), 1024, Size(7, 16), 5)
    np.testing.assert_array_equal(drawn, sample(Tokens(ids, "", 1), 7, 16, 5))
    assert drawn.dtype == np.int32
