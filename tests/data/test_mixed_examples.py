"""Sequences to train on of several texts: their shares, their order, what is drawn, and what is refused."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from minillm_jax import demo
from minillm_jax.api import describe
from minillm_jax.data.examples import Examples
from minillm_jax.data.mixed_examples import mixed
from minillm_jax.data.mixture import shares_of
from minillm_jax.errors import InputError
from minillm_jax.recipes.recipe import with_options
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recovering import texts_of

COUNTS = {"a.npy": 70, "b.npy": 500}
LENGTHS = {"a.npy": 8, "b.npy": 5}


def read(source: str) -> Examples:
    """Sequences that tell their text by their first token, and their number by the second."""
    tokens = np.full((COUNTS[source], LENGTHS[source]), 9, np.int32)
    tokens[:, 0], tokens[:, 1] = list(COUNTS).index(source), np.arange(COUNTS[source])
    counted = np.ones(tokens.shape, bool)
    counted[:, 0] = False
    return Examples(tokens, counted, source)


def test_texts_give_their_shares_and_no_sequence_twice() -> None:
    found = mixed(shares_of("a.npy:0.7,b.npy:0.3"), read, "both", 0)
    texts, numbers = found.tokens[:, 0], found.tokens[:, 1]
    assert (found.count, found.length, found.source) == (100, 8, "both")
    assert np.sort(numbers[texts == 0]).tolist() == list(range(70)), "all of the text that limits the number"
    drawn = numbers[texts == 1]
    assert len(np.unique(drawn)) == 30
    assert drawn.max() > 250, "drawn from the whole text, and not its beginning"
    assert all(abs(np.mean(texts[at : at + 10]) - 0.3) <= 0.1 for at in range(0, 100, 10)), "mixed evenly"


def test_shorter_sequences_are_padded_with_tokens_that_do_not_count() -> None:
    found = mixed(shares_of("a.npy:1,b.npy:1"), read, "both", 0)
    short = found.tokens[:, 0] == 1
    assert not found.counted[short, 5:].any()
    assert found.counted[short, 1:5].all()
    assert found.counted[~short, 1:].all()
    assert found.targets == 70 * 7 + 70 * 4


def test_the_seed_decides_which_sequences_are_drawn() -> None:
    one, again, other = (mixed(shares_of("a.npy:1,b.npy:1"), read, "both", seed).fingerprint() for seed in (0, 0, 1))
    assert one == again
    assert one != other


def test_a_weight_without_a_sequence_is_refused() -> None:
    with pytest.raises(InputError, match=r"a.npy: a weight of 0.0005 gives no sequence of 500; use a larger weight or"):
        mixed(shares_of("a.npy:0.0005,b.npy:0.9995"), read, "both", 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text and a file of conversations, in the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(demo.training_text()[:6000])
    rows = [{"prompt": f"Say {number}.", "response": f"{number}, gladly."} for number in range(40)]
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*the tokenizer has no chat template")
def test_texts_and_conversations_are_mixed_each_by_its_own_rules(folder: Path) -> None:
    """Every token of a text counts, and the responses of a conversation; validation is of both."""
    settings, _ = with_options(Recovery(), {"seq_len": 32, "held_out": 8})
    read_one = partial(texts_of, settings, describe(demo.FOLDER))
    both, text, rows = (read_one(given) for given in ("a.txt:0.5,b.jsonl:0.5", "a.txt", "b.jsonl"))
    assert both.training.source == "a.txt:0.5,b.jsonl:0.5"
    whole = both.training.counted[:, 1:].all(axis=1)
    assert min(text.training.count, rows.training.count) - 10 < np.sum(whole) < both.training.count
    assert both.validation is not None
    assert both.validation.count == 8
    assert len(np.unique(both.validation.counted.sum(axis=1))) > 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.txt:0.5,b.jsonl:x", "--data 'b.jsonl:x': every source of a mixture has a weight, found 'x'"),
        ("a.txt:0,b.jsonl:1", "--data a.txt: the weight must be above 0, found 0"),
        ("a.txt:0.5,missing.txt:0.5", "missing.txt: no such file"),
    ],
)
def test_bad_mixtures_are_one_sentence(folder: Path, data: str, message: str) -> None:
    settings, _ = with_options(Recovery(), {"seq_len": 32})
    with pytest.raises(InputError) as caught:
        texts_of(settings, describe(demo.FOLDER), data)
    assert message in str(caught.value)
