"""Texts and data sets to token ids."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from minillm_jax.data import chat, tokenizing
from minillm_jax.data.documents import FIELD, Block, Opened, no_text, open_data
from minillm_jax.data.first_token import first_token
from minillm_jax.data.tokenizing import Tokenizer
from minillm_jax.errors import InputError

BLANK_LINE = "\n\n"


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


class Joined:
    """Documents joined to one text, in parts, with what is known once they have been read.

    Between two documents stands the beginning-of-sequence token or a blank line; nothing where a chat template has
    written the token, or marks the beginning and the end of a document itself.

    Attributes:
      documents: number of documents so far.
      blank: whether there was no character yet that is no space.
    """

    def __init__(self, blocks: Iterable[Block], token: str | None = None) -> None:
        self._blocks, self._token, self.documents, self.blank = blocks, token, 0, True

    def __iter__(self) -> Iterator[str]:
        """The parts of the text, once."""
        for block in self._blocks:
            if block.document == self.documents > 0:
                yield self._between(block)
            self.documents, self.blank = block.document + 1, self.blank and not block.text.strip()
            yield block.text

    def _between(self, block: Block) -> str:
        """The text between a document and the next one, which begins with this block."""
        if self._token is None:
            return "" if block.by_template else BLANK_LINE
        return "" if block.text.startswith(self._token.rstrip()) else self._token


def read_tokens(
    source: str | Path, tokenizer_folder: Path, vocabulary: int, bos: bool = False, field: str = FIELD
) -> Tokens:
    """The token ids of a file or a Hub data set, documents joined by blank lines, without special tokens.

    Conversations are written by the chat template of the tokenizer. The text is read and tokenised in pieces; the ids
    alone stay in memory.

    Args:
      source: a text, .json, .jsonl, .csv, .tsv or .parquet file, all but the last also compressed by gzip or zstd; a
        .npy file of token ids; or a Hub data set as `owner/name`, optionally with `/config` and `:split` (`train` by
        default), of which the first twenty million characters are read.
      tokenizer_folder: folder of the model with the tokenizer.
      vocabulary: number of token ids of the model.
      bos: whether to put the tokenizer's beginning-of-sequence token before the text.
      field: name of the field that holds the text of a row.

    Raises:
      InputError: the source is missing, empty or in an unknown format, or a token id lies outside the vocabulary.
    """
    tokenizer = tokenizer_of(tokenizer_folder)
    return all_tokens(open_data(source, field, chat.Templated(tokenizer)), tokenizer, vocabulary, bos)


def tokenizer_of(folder: Path) -> Callable[[], Tokenizer]:
    """Loads the tokenizer of a model folder at the first call; later calls return the same one."""
    return cache(partial(tokenizing.load, folder))


def all_tokens(opened: Opened, tokenizer: Callable[[], Tokenizer], vocabulary: int, bos: bool = False) -> Tokens:
    """All token ids of an opened text.

    Args:
      opened: the text, which is read once.
      tokenizer: loads the tokenizer, which token ids do not need.
      vocabulary: number of token ids of the model.
      bos: whether to put the tokenizer's beginning-of-sequence token before the text.

    Raises:
      InputError: see `read_tokens`.
    """
    source, content = opened.source, opened.content
    if isinstance(content, np.ndarray):
        check_bos(opened, bos)
        return Tokens(in_vocabulary(content, vocabulary, source), source, 1)
    joined, loaded = Joined(content), tokenizer()
    ids = _with_bos(loaded, joined, bos)
    if joined.blank:
        raise no_text(source)
    return Tokens(in_vocabulary(ids, vocabulary, source), source, joined.documents)


def check_bos(opened: Opened, bos: bool) -> None:
    """Checks that a beginning-of-sequence token is asked for with a text alone.

    Raises:
      InputError: it is asked for with token ids.
    """
    if bos and isinstance(opened.content, np.ndarray):
        raise InputError(f"{opened.source}: --bos is for text; put the token into the array instead")


def in_vocabulary(ids: Integer[np.ndarray, "*shape"], vocabulary: int, source: str) -> Integer[np.ndarray, "*shape"]:
    """Token ids that were checked.

    Raises:
      InputError: one lies outside the vocabulary.
    """
    least, most = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if least < 0 or most >= vocabulary:
        outside = least if least < 0 else most
        raise InputError(f"{source}: token id {outside} lies outside the model's vocabulary of {vocabulary}")
    return ids


def tokenise(text: str, folder: Path, bos: bool = False) -> Int[np.ndarray, " tokens"]:
    """Token ids of a text from the tokenizer of a model folder, int32, without special tokens but for `bos`.

    Raises:
      InputError: the folder has no tokenizer that works without remote code.
    """
    return _with_bos(tokenizing.load(folder), [text], bos)


def _with_bos(tokenizer: Tokenizer, texts: Iterable[str], bos: bool) -> Int[np.ndarray, " tokens"]:
    """Token ids of a text in parts, behind the beginning-of-sequence token if `bos`."""
    first = [first_token(tokenizer)] if bos else []
    ids = tokenizing.token_ids(tokenizer, texts)
    return np.concatenate([np.asarray(first, np.int32), ids]) if bos else ids
