"""Texts of every format to token ids and windows; errors of unusable sources."""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from minillm_jax import demo
from minillm_jax.data.documents import Block, read_blocks
from minillm_jax.data.text import Tokens, read_tokens, tokenise
from minillm_jax.data.windows import cut, sample
from minillm_jax.errors import InputError

FOLDER, VOCABULARY = demo.FOLDER, 1024
TEXT = "The first document.\n\nIt has two paragraphs."


def ids_of(text: str) -> np.ndarray:
    return tokenise(text, FOLDER)


def texts(blocks: Iterable[Block]) -> list[str]:
    """The documents, each in one block."""
    read = list(blocks)
    assert [block.document for block in read] == list(range(len(read)))
    return [block.text for block in read]


def read(path: Path, **options: bool) -> Tokens:
    return read_tokens(path, FOLDER, VOCABULARY, **options)


def test_documents_of_every_format_are_joined_by_blank_lines(tmp_path: Path) -> None:
    documents = [TEXT, "The second."]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    lines = [json.dumps({"text": text, "other": 1}) for text in documents]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "text.parquet")
    expected = ids_of("\n\n".join(documents))
    for name, count in (("text.txt", 1), ("text.jsonl", 2), ("text.parquet", 2)):
        tokens = read(tmp_path / name)
        np.testing.assert_array_equal(tokens.ids, expected)
        assert tokens.documents == count


def test_bos_is_the_only_special_token_and_optional(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    plain, with_bos = read(tmp_path / "text.txt"), read(tmp_path / "text.txt", bos=True)
    np.testing.assert_array_equal(plain.ids, ids_of(TEXT))
    np.testing.assert_array_equal(with_bos.ids, [0, *plain.ids])


def test_an_array_of_token_ids_is_read_unchanged(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(20).reshape(4, 5))
    np.testing.assert_array_equal(read(tmp_path / "ids.npy").ids, np.arange(20))


def test_windows_are_consecutive_and_the_last_partial_window_is_dropped() -> None:
    windows = cut(Tokens(np.arange(23, dtype=np.int32), "here", 1), 5)
    np.testing.assert_array_equal(windows, np.arange(20).reshape(4, 5))


def test_samples_are_different_windows_drawn_by_the_seed() -> None:
    tokens = Tokens(np.arange(1000, dtype=np.int32), "here", 1)
    first = sample(tokens, 10, 16, 0)
    assert first.shape == (10, 16)
    assert len({row[0] for row in first.tolist()}) == 10
    assert (np.diff(first, axis=1) == 1).all()
    np.testing.assert_array_equal(first, sample(tokens, 10, 16, 0))
    assert not np.array_equal(first, sample(tokens, 10, 16, 1))


def test_the_error_of_a_short_text_names_its_length() -> None:
    tokens = Tokens(np.arange(100, dtype=np.int32), "here", 1)
    with pytest.raises(InputError, match="here: 100 tokens make 6 windows of 16, but 7 are asked for"):
        sample(tokens, 7, 16, 0)
    with pytest.raises(InputError, match="here: 100 tokens are less than one window of 128"):
        sample(tokens, 1, 128, 0)
    with pytest.raises(InputError, match="a window of 1 tokens has nothing to predict"):
        cut(tokens, 1)
    with pytest.raises(InputError, match="--samples must be at least 1"):
        sample(tokens, 0, 16, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "there is no text in it"),
        ("blank.txt", b" \n\n", "there is no text in it"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text"),
        ("empty.jsonl", b"\n", "there is no text in it"),
        ("bad.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}', "line 1: expected a field 'text', found 'body'; name one with --field"),
        ("number.jsonl", b"7", "line 1: expected a text, or an object with a field 'text', found a number"),
        ("bad.parquet", b"no parquet", "not a complete parquet file"),
        ("bad.npy", b"no array", "not a NumPy array of token ids"),
        ("empty.npy", b"", "not a NumPy array of token ids"),
        ("nested.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}', "the text cannot be tokenised"),
    ],
)
def test_unreadable_files_are_errors(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_unusable_arrays_are_errors(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.ones(4))
    with pytest.raises(InputError, match="expected whole-number token ids, found float64"):
        read(tmp_path / "floats.npy")
    np.save(tmp_path / "large.npy", np.array([0, 1024]))
    with pytest.raises(InputError, match="token id 1024 lies outside the model's vocabulary of 1024"):
        read(tmp_path / "large.npy")
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(InputError, match="not a NumPy array of token ids"):
        read(tmp_path / "pickled.npy")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "body.parquet")
    with pytest.raises(InputError, match="expected a field 'text', found 'body'"):
        read(tmp_path / "body.parquet")


def test_a_byte_order_mark_and_a_line_separator_are_read(tmp_path: Path) -> None:
    (tmp_path / "separator.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8-sig")
    assert texts(read_blocks(tmp_path / "separator.jsonl")) == ["one\u2028two"]


def test_a_list_longer_than_a_block_is_read_block_by_block(tmp_path: Path) -> None:
    """A document of more than a block, one that ends with the block, and many short ones."""
    documents = ["x" * 1_500_000, "é" * (2**20 - 4), *(f'"{number}" \\ [{{,' for number in range(2000))]
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(documents, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert texts(read_blocks(tmp_path / "a.json")) == documents


def test_archives_large_token_ids_and_bos_with_ids_are_errors(tmp_path: Path) -> None:
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, a=np.arange(3), b=np.arange(3))
    with pytest.raises(InputError, match="an archive of several arrays"):
        read(tmp_path / "archive.npy")
    np.save(tmp_path / "ids.npy", np.array([1, 2**64 - 1], dtype=np.uint64))
    with pytest.raises(InputError, match="token id 18446744073709551615 lies outside"):
        read(tmp_path / "ids.npy")
    with pytest.raises(InputError, match="--bos is for text"):
        read(tmp_path / "ids.npy", bos=True)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_outside_32_bits_is_an_error(seed: int) -> None:
    with pytest.raises(InputError, match="--seed must lie between 0 and"):
        sample(Tokens(np.arange(100, dtype=np.int32), "here", 1), 1, 16, seed)


def test_missing_sources_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nowhere.txt", "./a/b", "a/b/c/d", "plain", "owner/file.jsonl", "long" * 100):
        with pytest.raises(InputError, match="no such file"):
            list(read_blocks(name))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'minillm-jax\[data\]'"):
        list(read_blocks("owner/name"))


def test_hub_data_sets_are_streamed_up_to_a_number_of_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
            if name == "owner/lost":
                raise ConnectionError("offline")
            if name == "owner/endless":
                return repeat({"text": "word " * 100})
            return iter([{"text": f"{name} {config} {split} {streaming}"}])

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert texts(read_blocks("owner/name-v1.5")) == ["owner/name-v1.5 None train True"]
    assert texts(read_blocks("owner/name/config:test")) == ["owner/name config test True"]
    assert len(texts(read_blocks("owner/endless", hub_characters=1200))) == 3
    with pytest.raises(InputError, match=r"the Hub could not provide it \(offline\)"):
        list(read_blocks("owner/lost"))


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no usable tokenizer .*give token ids as \.npy instead"):
        tokenise("text", tmp_path)


def test_held_out_text_of_the_demo_is_not_in_the_training_text() -> None:
    training = {" ".join(part.split()) for part in demo.training_text().split("\n\n")}
    held_out = [" ".join(part.split()) for part in demo.held_out_text().split("\n\n")]
    assert not training & set(held_out)
    total = len(demo.training_text()) + len(demo.held_out_text())
    assert 0.05 < len(demo.held_out_text()) / total < 0.2
