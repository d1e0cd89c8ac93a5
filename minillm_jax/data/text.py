"""Texts and data sets to token ids."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from minillm_jax.data.tokenizer import load_tokenizer
from minillm_jax.errors import InputError, cause

BLANK_LINE = "\n\n"
FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".npy", ".csv")

# Number of characters that are read of a Hub data set, which may be larger than the memory.
HUB_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class Tokens:
    """The token ids of a text.

    Attributes:
      ids: the token ids.
      source: path or Hub id of the text, for errors and records.
      documents: number of documents that were joined.
    """

    ids: Integer[np.ndarray, " tokens"]
    source: str
    documents: int


def read_tokens(source: str | Path, tokenizer_folder: Path, vocabulary: int, bos: bool = False) -> Tokens:
    """The token ids of a file or a Hub data set, documents joined by blank lines, without special tokens.

    Args:
      source: a text file, a .jsonl or .parquet file with a `text` field, a .npy file of token ids, or a Hub data set as
        `owner/name`, optionally with `/config` and `:split` (`train` by default), of which the first twenty million
        characters are read.
      tokenizer_folder: folder of the model with the tokenizer.
      vocabulary: number of token ids of the model.
      bos: whether to put the tokenizer's beginning-of-sequence token before the text.

    Raises:
      InputError: the source is missing, empty or in an unknown format, or a token id lies outside the vocabulary.
    """
    path = Path(source).expanduser()
    if path.suffix == ".npy" and os.path.isfile(path):  # noqa: PTH113  see read_documents
        return given_tokens(_read_ids(path), tokenizer_folder, vocabulary, bos, str(source))
    return given_tokens(list(read_documents(source)), tokenizer_folder, vocabulary, bos, str(source))


def given_tokens(
    data: Sequence[str] | np.ndarray,
    tokenizer_folder: Path,
    vocabulary: int,
    bos: bool = False,
    source: str = "the given data",
) -> Tokens:
    """The token ids of documents, joined by blank lines, or of an array of token ids.

    Args:
      data: documents, or token ids of any shape.
      tokenizer_folder: folder of the model with the tokenizer.
      vocabulary: number of token ids of the model.
      bos: whether to put the tokenizer's beginning-of-sequence token before the text.
      source: name of the data in errors and records.

    Raises:
      InputError: there is no text, the data are of another type, or an id lies outside the vocabulary.
    """
    if isinstance(data, np.ndarray):
        if bos:
            raise InputError(f"{source}: --bos is for text; put the token into the array instead")
        tokens = Tokens(_checked_ids(data, source), source, 1)
    else:
        if not all(isinstance(document, str) for document in data):
            raise InputError(f"{source}: expected texts or an array of token ids, found {type(data).__name__}")
        text = BLANK_LINE.join(data)
        if not text.strip():
            raise InputError(f"{source}: there is no text in it")
        tokens = Tokens(tokenise(text, tokenizer_folder, bos), source, len(data))
    outside = tokens.ids[(tokens.ids < 0) | (tokens.ids >= vocabulary)]
    if outside.size:
        raise InputError(f"{source}: token id {outside[0]} lies outside the model's vocabulary of {vocabulary}")
    return replace(tokens, ids=tokens.ids.astype(np.int32))


def read_documents(source: str | Path, hub_characters: int = HUB_CHARACTERS) -> Iterator[str]:
    """The documents of a file (a text file is one document) or of a Hub data set.

    Args:
      source: as for `read_tokens`.
      hub_characters: number of characters after which a Hub data set is read no further.

    Raises:
      InputError: the source is missing or in an unknown format.
    """
    path = Path(source).expanduser()
    if not os.path.exists(path):  # noqa: PTH110  Path.exists raises for a name that is too long
        yield from _hub_documents(str(source), hub_characters)
        return
    try:
        match path.suffix:
            case ".jsonl":
                yield from _jsonl_documents(path)
            case ".parquet":
                yield from _parquet_documents(path)
            case _:
                yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({cause(error)})") from error


def tokenise(text: str, folder: Path, bos: bool = False) -> Int[np.ndarray, " tokens"]:
    """Token ids of a text from the tokenizer of a model folder, int32, without special tokens but for `bos`.

    Raises:
      InputError: the folder has no tokenizer that works without remote code.
    """
    from transformers.utils import logging

    tokenizer = load_tokenizer(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a warning says that the text is longer than the context, as it is meant to be
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:
        raise InputError(f"the text cannot be tokenised by the tokenizer of {folder} ({cause(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
    if bos:
        if tokenizer.bos_token_id is None:
            raise InputError(f"{folder}: the tokenizer has no beginning-of-sequence token; leave out --bos")
        ids = [tokenizer.bos_token_id, *ids]
    return np.asarray(ids, dtype=np.int32)


def _read_ids(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a NumPy array of token ids ({cause(error)})") from error
    if not isinstance(ids, np.ndarray):
        raise InputError(f"{path}: not a NumPy array of token ids but an archive of several arrays")
    return ids


def _checked_ids(ids: np.ndarray, source: str) -> Integer[np.ndarray, " tokens"]:
    if not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise InputError(f"{source}: expected whole-number token ids, found {ids.dtype} of shape {ids.shape}")
    return ids.reshape(-1)


def _jsonl_documents(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number} is not JSON ({cause(error)})") from error
            yield _text_of(row, f"{path}: line {number}")


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: parquet needs the data extra: pip install 'minillm-jax[data]'") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a complete parquet file ({cause(error)})") from error
    if "text" not in table.column_names:
        raise InputError(f"{path}: expected a column 'text', found {', '.join(table.column_names)}")
    for value in table.column("text").to_pylist():
        yield _text_of({"text": value}, str(path))


def _text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{where}: expected an object with a string 'text'")
    return text


def _hub_documents(source: str, limit: int) -> Iterator[str]:
    name, _, split = source.partition(":")
    parts = name.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts) or name[0] in "./~" or Path(name).suffix in FILE_SUFFIXES:
        raise InputError(f"{source}: no such file; give a text, .jsonl, .parquet or .npy file, or a Hub data set")
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise InputError(
            f"{source}: no such file, and Hub data sets need the data extra: pip install 'minillm-jax[data]'"
        ) from error
    characters = 0
    try:
        config = parts[2] if len(parts) == 3 else None
        for row in datasets.load_dataset("/".join(parts[:2]), config, split=split or "train", streaming=True):
            document = _text_of(row, source)
            yield document
            characters += len(document)
            if characters >= limit:
                return
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # the Hub client raises many types
        raise InputError(f"{source}: no such file, and the Hub could not provide it ({cause(error)})") from error
