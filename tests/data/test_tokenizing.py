"""Token ids of pieces are those of one call, for every kind of tokenizer."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minillm_jax import demo
from minillm_jax.data import tokenizing
from tests.helpers import shared

WORDS = demo.held_out_text().split(" ")
LETTERS = ("naïve", "e\u0301", "ﬁn", "東京都は日本の首都です。", "עברית", "🙂🙃", "👩\u200d👩\u200d👧")
SPACES = ("\n", "\n\n\n", "  ", "\t\t", " " * 37, "\u00a0", "\u2028", "\r\n")
LONG = ("-" * 200, "=" * 77, "1234567890123", "x" * 150, "supercalifragilistic" * 9)
ODD = (*LETTERS, *SPACES, *LONG, "<s>", "<|end|>")


def text_of(words: int, seed: int, odd: float) -> str:
    """Words of the demo text with a share of odd ones."""
    draws = random.Random(seed)
    return " ".join(draws.choice(ODD) if draws.random() < odd else draws.choice(WORDS) for _ in range(words))


def trained(model: Any, trainer: Any, build: Callable[[Tokenizer], None]) -> Tokenizer:
    tokenizer = Tokenizer(model)
    build(tokenizer)
    tokenizer.train_from_iterator([text_of(1500, 7, 0.05)], trainer)
    return tokenizer


def byte_level(prefix: bool = False, trim: bool = False) -> Tokenizer:
    def build(tokenizer: Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    return trained(models.BPE(), trainer, build)


def llama_2() -> Tokenizer:
    """No pre-tokenizer: spaces are letters of one long word, and a space is put before the text."""

    def build(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])

    pieces = trained(
        models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"]), metaspace
    )
    build(pieces)
    pieces.pre_tokenizer = None
    return pieces


def metaspace(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")


def unigram() -> Tokenizer:
    def build(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")

    return trained(
        models.Unigram(), trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"]), build
    )


def word_piece() -> Tokenizer:
    def build(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"])
    return trained(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100), trainer, build)


def llama_3() -> Tokenizer:
    """Digits by threes from the left, and runs of spaces as one word."""

    def build(tokenizer: Tokenizer) -> None:
        pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(models.BPE(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet), build)


def stripped() -> Tokenizer:
    """Spaces at both ends of a text are taken away, and special tokens swallow those around them."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.add_special_tokens([AddedToken("<s>", lstrip=True, rstrip=True)])
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte level, prefix space, trimmed offsets": lambda: byte_level(prefix=True, trim=True),
    "sentencepiece BPE without words": llama_2,
    "unigram": unigram,
    "word piece": word_piece,
    "digits by threes": llama_3,
    "stripped, special tokens": stripped,
}


def loaded(tokenizer: Any) -> tokenizing.Tokenizer:
    return tokenizing.Tokenizer(Path("made"), tokenizer, None, True)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> tokenizing.Tokenizer:
    return loaded(PreTrainedTokenizerFast(tokenizer_object=KINDS[request.param]()))


def check_equal(tokenizer: tokenizing.Tokenizer, text: str, pieces: tuple[int, ...] = (300, 5000)) -> None:
    whole = tokenizer.call(text, add_special_tokens=False)["input_ids"]
    for piece in pieces:
        ids = tokenizing.token_ids(tokenizer, parts_of(text), piece)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, whole, err_msg=f"pieces of {piece}")


def parts_of(text: str) -> Iterator[str]:
    """The text in parts of changing size, some of them empty."""
    draws, at = random.Random(0), 0
    while at < len(text):
        size = draws.choice((0, 1, 50, 3000))
        yield text[at : at + size]
        at += size


@pytest.mark.parametrize(("seed", "odd"), [(0, 0.0), (1, 0.1), (2, 0.6)])
def test_pieces_have_the_ids_of_one_call(tokenizer: tokenizing.Tokenizer, seed: int, odd: float) -> None:
    check_equal(tokenizer, text_of(1500, seed, odd))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        " \n ",
        "word " * 5000,
        "\n" * 9001,
        "a" * 9001,
        "ab" * 5000 + " end",
        "7" * 9001 + " and " * 900,
    ],
    ids=["empty", "letter", "spaces", "repeated", "line feeds", "one letter", "one word", "digits"],
)
def test_texts_without_a_clear_border_too(tokenizer: tokenizing.Tokenizer, text: str) -> None:
    check_equal(tokenizer, text)


@pytest.mark.parametrize("model", ["models/stories260K", "models/bloom-3m", "models/opt-3m"])
def test_pieces_of_real_tokenizers(model: str) -> None:
    tokenizer = tokenizing.load(shared(model))
    assert tokenizer.offsets
    check_equal(tokenizer, text_of(3000, 3, 0.2))


def test_a_tokenizer_without_offsets_reads_the_whole_text_in_one_call() -> None:
    calls: list[str] = []

    def call(text: str, **options: bool) -> dict[str, list[int]]:
        assert not options["return_offsets_mapping"]
        calls.append(text)
        return {"input_ids": [len(text)]}

    ids = tokenizing.token_ids(tokenizing.Tokenizer(Path("slow"), call, None, False), ["a" * 700, "b"], 10)
    np.testing.assert_array_equal(ids, [701])
    assert calls == ["a" * 700 + "b"]


def test_pieces_are_short() -> None:
    """The longest call is a piece and what it shares with the one before."""
    fast = tokenizing.load(demo.FOLDER)
    lengths: list[int] = []

    def call(text: str, **options: bool) -> Any:
        lengths.append(len(text))
        return fast.call(text, **options)

    text = demo.training_text()
    ids = tokenizing.token_ids(fast._replace(call=call), [text], 20_000)
    np.testing.assert_array_equal(ids, fast.call(text, add_special_tokens=False)["input_ids"])
    assert max(lengths) <= 20_000 + tokenizing.OVERLAP
    assert sum(lengths) < 1.3 * len(text)
