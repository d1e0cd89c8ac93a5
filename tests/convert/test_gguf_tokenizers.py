"""Tokenizers in GGUF: transformers reads the ids of the folder that was read, and folders carry a GGUF's tokenizer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from convert import gguf_file
from convert.gguf_tokenizer import SPLITS, pre_tokenizer
from convert.reader import read_model
from convert.tokenizers import HARD_TEXTS
from convert.writer import write_model
from minillm_jax.data.tokenizer import load_tokenizer
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.loaded import Model
from tests.convert.test_tokenizers import KINDS, SPECIAL, byte_level, json_file, with_tokenizer
from tests.helpers import hugging_face_folder

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small Llama with more tokens than the tokenizers."""
    return read_model(
        hugging_face_folder(tmp_path_factory.mktemp("dense"), num_hidden_layers=1, vocab_size=512, head_dim=8)
    )


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in HARD_TEXTS]


def header(folder: Path) -> dict[str, Any]:
    return gguf_file.open_gguf(folder / "model.gguf").metadata


# GGUF has no normalization (of Unicode, by Qwen 2's class), and transformers splits words otherwise than old files do.
DIFFERENT = ("old Llama", "vocab.json, added tokens")


@pytest.mark.parametrize("kind", ["byte level, class", "vocab.json", "sentencepiece, legacy", *DIFFERENT])
def test_the_ids_are_those_of_the_source_and_of_transformers(dense: Model, tmp_path: Path, kind: str) -> None:
    model = with_tokenizer(dense, tmp_path / "model", KINDS[kind])
    expected = load_tokenizer(model.folder)
    if kind in DIFFERENT:
        with pytest.warns(
            InputWarning, match=r"transformers reads another tokenizer from the GGUF \(other token ids of"
        ):
            write_model(model, tmp_path / "out", "gguf")
        expected = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    else:
        write_model(model, tmp_path / "out", "gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    back = read_model(tmp_path / "out")
    ours = load_tokenizer(back.folder)
    assert ids(ours) == ids(theirs) == ids(expected)
    assert ours.special_tokens_map == theirs.special_tokens_map
    # A Hugging Face folder gets the tokenizer of the GGUF, and another GGUF its metadata unchanged.
    write_model(back, tmp_path / "folder")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "folder")) == ids(expected)
    write_model(back, tmp_path / "again", "gguf")
    first, second = ({k: v for k, v in header(tmp_path / n).items() if "tokenizer" in k} for n in ("out", "again"))
    assert first == second


def test_special_tokens_and_the_chat_template_are_carried_over(dense: Model, tmp_path: Path) -> None:
    config = SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "pad_token": "</s>"}
    model = with_tokenizer(dense, tmp_path / "model", json_file(byte_level, **config))
    write_model(model, tmp_path / "out", "gguf")
    metadata = header(tmp_path / "out")
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    names = ("unknown", "bos", "eos", "padding")
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in names] == [0, 1, 2, 2]
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["tokenizer.ggml.token_type"][-1] == 5
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD511]"
    assert len(metadata["tokenizer.ggml.tokens"]) == 512
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    write_model(read_model(tmp_path / "out"), tmp_path / "folder")
    again = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert again.chat_template == TEMPLATE
    assert again.special_tokens_map == load_tokenizer(model.folder).special_tokens_map
    assert again("a</s>")["input_ids"][-1] == 2
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_first_token_and_scores_are_written(dense: Model, tmp_path: Path) -> None:
    model = with_tokenizer(dense, tmp_path / "model", KINDS["old Llama"])
    with pytest.warns(InputWarning, match="transformers reads another tokenizer"):
        write_model(model, tmp_path / "out", "gguf")
    metadata = header(tmp_path / "out")
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    kinds = metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert kinds[tokens.index("<0x41>")] in (3, 6)
    merges = json.loads((model.folder / "tokenizer.json").read_text())["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    scores = [metadata["tokenizer.ggml.scores"][tokens.index(token)] for token in made]
    assert scores == sorted(scores, reverse=True)
    assert len(set(made)) == len(set(scores))


def split_by(pattern: str) -> Callable[[], Tokenizer]:
    """A byte-level tokenizer that splits texts by a regular expression first."""

    def make() -> Tokenizer:
        tokenizer = byte_level()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return tokenizer

    return make


def test_the_splits_are_those_of_transformers(dense: Model, tmp_path: Path) -> None:
    """transformers has the same table in the other direction."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for pattern, name in SPLITS.items():
        if not pattern.endswith("gpt-2"):
            assert GGUF_PRE_TOKENIZER_SPLITS[name] == pattern
            assert pre_tokenizer(json.loads(split_by(pattern)().to_str())) == name
    digits = byte_level()
    digits.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert pre_tokenizer(json.loads(digits.to_str())) == "smollm"


def test_an_unknown_split_is_a_warning(dense: Model, tmp_path: Path) -> None:
    model = with_tokenizer(dense, tmp_path / "model", json_file(split_by("[a-z]+"), **SPECIAL))
    with pytest.warns(InputWarning) as warnings:
        write_model(model, tmp_path / "out", "gguf")
    words = [str(one.message) for one in warnings]
    assert any(
        "no known name for the way in which this tokenizer splits a text; the GGUF says default" in w for w in words
    )
    assert any("transformers reads another tokenizer from the GGUF (other token ids of" in w for w in words)
    assert header(tmp_path / "out")["tokenizer.ggml.pre"] == "default"


@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_other_kinds_are_refused(dense: Model, tmp_path: Path, kind: str) -> None:
    model = with_tokenizer(dense, tmp_path / "model", KINDS[kind])
    with pytest.raises(InputError, match=r"and this one is another .*; use another format"):
        write_model(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_too_many_tokens_is_refused(tmp_path: Path) -> None:
    model = read_model(hugging_face_folder(tmp_path / "small", num_hidden_layers=1, head_dim=8))
    model = with_tokenizer(replace(model), tmp_path / "model", KINDS["byte level"])
    with pytest.raises(InputError, match="the tokenizer has token 319, but the model has 97 tokens"):
        write_model(model, tmp_path / "out", "gguf")


def test_a_tokenizer_that_transformers_cannot_make_is_a_warning(dense: Model, tmp_path: Path) -> None:
    model = with_tokenizer(dense, tmp_path / "model", KINDS["byte level"])
    write_model(model, tmp_path / "out", "gguf")
    path = tmp_path / "out" / "model.gguf"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\4\0\0\0\0\0\0\0gpt2", b"\4\0\0\0\0\0\0\0bert"))
    with pytest.warns(InputWarning, match="transformers cannot make its tokenizer .*; give texts as token ids"):
        back = read_model(path)
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(back.folder)
