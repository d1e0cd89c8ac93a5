"""Text to token ids, in pieces of bounded size whose ids together are those of one call on the whole text."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from minillm_jax.data.tokenizer import load_tokenizer, quiet
from minillm_jax.errors import InputError, cause

# Characters of a piece. A call takes about 200 bytes of memory for each.
PIECE = 2**17
# Characters that two pieces have in common.
OVERLAP = 2**12
# Tokens on each side of a border that both pieces must agree on.
AGREEING = 16
# Different ones among these. The tokens of one repeated letter may depend on the length of the whole repetition.
DIFFERENT = 4


class Tokenizer(NamedTuple):
    """A tokenizer of a model folder.

    Attributes:
      folder: the folder, for errors.
      call: the tokenizer of transformers.
      bos: its beginning-of-sequence token; None where it has none.
      offsets: whether it says which characters a token stands for.
      eos: its end-of-sequence token; None where it has none.
    """

    folder: Path
    call: Callable[..., Any]
    bos: int | None
    offsets: bool
    eos: int | None = None


class Encoded(NamedTuple):
    """The tokens of a piece.

    Attributes:
      ids: the token ids.
      starts: first character of each token; empty where the tokenizer has no offsets.
      ends: the character after the last of each token; likewise.
    """

    ids: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " m"]
    ends: Int[np.ndarray, " m"]


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
      InputError: the folder has no tokenizer that works without remote code.
    """
    tokenizer = load_tokenizer(folder)
    offsets = bool(getattr(tokenizer, "is_fast", False))
    return Tokenizer(folder, tokenizer, tokenizer.bos_token_id, offsets, tokenizer.eos_token_id)


def token_ids(tokenizer: Tokenizer, texts: Iterable[str], piece: int = PIECE) -> Int[np.ndarray, " tokens"]:
    """Token ids of a text without special tokens, int32: those of one call on the whole text.

    Args:
      tokenizer: of the model.
      texts: the text in parts of any size.
      piece: characters that are tokenised at a time; all where the tokenizer gives no offsets.

    Raises:
      InputError: the text cannot be tokenised.
    """
    if not tokenizer.offsets:
        return encode(tokenizer, "".join(texts)).ids
    parts = list(_pieces(tokenizer, _Reader(texts), piece))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _pieces(tokenizer: Tokenizer, reader: "_Reader", size: int) -> Iterator[Int[np.ndarray, " n"]]:
    """The ids of each piece, cut where it and the next piece have the same tokens.

    The tokens of a text depend on what stands around them, but only near by. Two neighbours share `OVERLAP` characters.
    Where both give the same tokens over some distance, the border lies between two of these. Where they never agree,
    in a word of many thousand characters for example, the piece is made twice as long.
    """
    text, first = reader.read(size), 0
    encoded = encode(tokenizer, text)
    while not reader.at_end():
        shared = min(OVERLAP, len(text) // 2)
        following = text[-shared:] + reader.read(size)
        after = encode(tokenizer, following)
        border = _border(encoded, after, len(text) - shared, shared)
        if border is None or border[0] < first:
            text += following[shared:] + reader.read(len(text))
            encoded = encode(tokenizer, text)
            continue
        yield encoded.ids[first : border[0]]
        text, encoded, first = following, after, border[1]
    yield encoded.ids[first:]


def _border(left: Encoded, right: Encoded, offset: int, shared: int) -> tuple[int, int] | None:
    """The number of a token of both pieces with the same tokens on both sides; None where there is none.

    Args:
      left: tokens of a piece.
      right: tokens of the next piece.
      offset: the character of the left piece where the right one begins.
      shared: number of characters that both have in common.
    """
    starts, ends = left.starts - offset, left.ends - offset
    candidates = np.flatnonzero((starts > 0) & (ends < shared))
    candidates = candidates[np.argsort(np.abs(starts[candidates] - shared // 2), kind="stable")]
    for here in candidates.tolist():
        there = int(np.searchsorted(right.starts, starts[here]))
        if here < AGREEING or there < AGREEING or starts[here - 1] == starts[here]:
            continue
        mine, theirs = slice(here - AGREEING, here + AGREEING), slice(there - AGREEING, there + AGREEING)
        ids = left.ids[mine]
        if (
            np.array_equal(ids, right.ids[theirs])
            and np.array_equal(starts[mine], right.starts[theirs])
            and np.array_equal(ends[mine], right.ends[theirs])
            and len(ids) == 2 * AGREEING
            and all(len(np.unique(side)) >= DIFFERENT for side in np.split(ids, 2))
        ):
            return here, there
    return None


class _Reader:
    """A text in parts of any size, read by numbers of characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self._text, self._position = iter(texts), "", 0

    def read(self, count: int) -> str:
        """The next characters, fewer only at the end."""
        parts: list[str] = []
        while count and not self.at_end():
            parts.append(self._text[self._position : self._position + count])
            self._position += len(parts[-1])
            count -= len(parts[-1])
        return "".join(parts)

    def at_end(self) -> bool:
        """Whether nothing follows."""
        while self._position == len(self._text):
            text = next(self._texts, None)
            if text is None:
                return True
            self._text, self._position = text, 0
        return False


def encode(tokenizer: Tokenizer, text: str) -> Encoded:
    """The tokens of a text in one call, without special tokens, int32.

    Raises:
      InputError: the text cannot be tokenised.
    """
    with quiet():  # transformers warns of text that is longer than the context, as it is meant to be here
        try:
            result = tokenizer.call(text, add_special_tokens=False, return_offsets_mapping=tokenizer.offsets)
        except Exception as error:  # tokenizers raise many types
            raise InputError(
                f"the text cannot be tokenised by the tokenizer of {tokenizer.folder} ({cause(error)})"
            ) from error
    ids = np.asarray(result["input_ids"], dtype=np.int32)
    spans = np.asarray(result["offset_mapping"] if tokenizer.offsets else [], dtype=np.int64).reshape(-1, 2)
    return Encoded(ids, spans[:, 0], spans[:, 1])
