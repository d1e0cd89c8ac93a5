"""Sequences to train on: conversations, documents or windows of token ids, with a mark on every token that counts."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer

from minillm_jax.data import chat, first_token, windows
from minillm_jax.data.documents import FIELD, Opened, no_text, open_data
from minillm_jax.data.text import Joined, Tokens, all_tokens, check_bos, in_vocabulary
from minillm_jax.data.tokenizing import Tokenizer, encode, token_ids
from minillm_jax.errors import InputError, one_of, warn
from minillm_jax.settings import BOS, LOSS_ON, PACKINGS, TEMPLATES

# The padded length is a multiple of this, as long as that is not above the given length.
MULTIPLE = 8


@dataclass(frozen=True, eq=False)
class Examples:
    """Sequences to train on, padded on the right.

    Attention is causal and positions count from the left, so that padding on the right changes no other token.

    Attributes:
      tokens: token ids, int32.
      counted: whether the loss counts the prediction of the token at that place: false in the first column, at padding,
        and in a prompt where responses alone count.
      source: path, Hub id or description of the data.
    """

    tokens: Int[np.ndarray, "B T"]
    counted: Bool[np.ndarray, "B T"]
    source: str

    @property
    def count(self) -> int:
        """Number of sequences B."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens T of a sequence, with its padding."""
        return self.tokens.shape[1]

    @property
    def targets(self) -> int:
        """Number of tokens that count."""
        return int(np.count_nonzero(self.counted))

    def fingerprint(self) -> str:
        """SHA-256 of the token ids, of the marks and of their shape; the same on every machine."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        digest.update(np.ascontiguousarray(self.tokens, dtype="<i4").data)
        digest.update(np.packbits(self.counted).data)
        return digest.hexdigest()

    def take(self, numbers: Integer[np.ndarray, " b"]) -> tuple[Int[np.ndarray, "b T"], Bool[np.ndarray, "b T"]]:
        """Token ids and marks of the sequences with these numbers."""
        return self.tokens[numbers], self.counted[numbers]

    def split(self, held_out: int, seed: int) -> tuple["Examples", "Examples"]:
        """Sequences for training, and `held_out` others for validation, both in the order of the data.

        Args:
          held_out: number of sequences for validation.
          seed: decides which.

        Raises:
          InputError: the number is negative, fewer than two sequences remain for training, or the seed has not 32 bits.
        """
        windows.check_seed(seed)
        if held_out < 0:
            raise InputError(f"the number of sequences for validation must be at least 0, found {held_out}")
        if self.count - held_out < 2:
            raise InputError(
                f"{self.source}: {self.count} sequences without {held_out} for validation leave fewer than 2 for "
                "training; give more text, or fewer sequences for validation"
            )
        drawn = np.zeros(self.count, bool)
        drawn[np.random.default_rng(seed).choice(self.count, held_out, replace=False)] = True
        return self._with(np.flatnonzero(~drawn)), self._with(np.flatnonzero(drawn))

    def _with(self, numbers: Int[np.ndarray, " b"]) -> "Examples":
        tokens, counted = self.take(numbers)
        return replace(self, tokens=tokens, counted=counted)


class _Example(NamedTuple):
    """The tokens of a conversation or of a document, and which of them count."""

    ids: Int[np.ndarray, " n"]
    counted: Bool[np.ndarray, " n"]


def whole_windows(tokens: Int[np.ndarray, "B T"], source: str) -> Examples:
    """Windows of which every prediction counts.

    Args:
      tokens: token ids, without padding.
      source: path, Hub id or description of the data.
    """
    counted = np.ones(tokens.shape, bool)
    counted[:, 0] = False
    return Examples(tokens, counted, source)


def read_examples(
    data: Any,
    tokenizer: Callable[[], Tokenizer],
    vocabulary: int,
    length: int,
    *,
    template: str = "auto",
    loss_on: str = "auto",
    packing: str = "auto",
    bos: str = "auto",
    family: str = "",
    field: str = FIELD,
) -> Examples:
    """Everything that may be given as a text, as sequences to train on.

    A row of a conversation (`data.chat`) becomes one example. A document becomes one where it is padded. An example
    begins with the beginning-of-sequence token where the tokenizer puts one, and ends with the end-of-sequence token
    unless a chat template has written it.

    Padded examples have a row each, and are cut off behind `length` tokens. One without a counted token is left out,
    with a warning. Packed examples follow one another and are cut into windows of `length` tokens, without the last
    partial window. The first token of a window never counts, and a window without a counted token is left out.
    Attention may reach earlier examples of the same window, as is usual in pre-training. Packed documents make the
    windows from which calibration draws.

    Args:
      data: as in `documents.open_data`.
      tokenizer: loads the tokenizer, which token ids do not need.
      vocabulary: number of token ids of the model.
      length: most tokens of a sequence.
      template: `auto` writes a conversation by the tokenizer's chat template, or plainly where it has none; `alpaca` by
        Alpaca's prompt, with any tokenizer.
      loss_on: `response` counts the tokens whose first character lies in a message of the assistant or in the mark
        that closes it; `all` counts every token but the first; `auto` is `response` for conversations, `all` otherwise.
      packing: `padded` or `packed`; `auto` pads conversations and packs documents and token ids.
      bos: where the beginning-of-sequence token stands: `auto`, `yes` or `no`, see `data.first_token`. `yes` puts it
        before every example that does not begin with it.
      family: of the model.
      field: name of the field that holds the text of a row.

    Raises:
      InputError: a setting is unknown or does not suit the data; the data cannot be read, hold no text, or have rows of
        several forms; a chat template does not show where a response begins; or a token id lies outside the vocabulary.
    """
    one_of("template --template", template, TEMPLATES)
    one_of("choice of tokens --loss-on", loss_on, LOSS_ON)
    one_of("packing --packing", packing, PACKINGS)
    one_of("place of the token --bos", bos, BOS)
    windows.check_length(length)
    write = chat.by_alpaca if template == "alpaca" else chat.Templated(tokenizer, loss_on != "all")
    opened, is_text = _peeked(open_data(data, field, write))
    if is_text:
        _check_text(opened, template, loss_on, packing, bos)
        if packing != "padded":
            return _of_text(opened, tokenizer, vocabulary, length, bos, family)
    loaded = tokenizer()
    begun = bos == "yes" or (bos == "auto" and first_token.is_put_by(loaded))
    first = first_token.first_token(loaded) if begun else None
    every = _documents(opened, loaded, first) if is_text else _conversations(opened, loaded, first, loss_on)
    if packing == "packed":
        kept = _kept(every, opened.source, None)
        tokens, counted = _packed(kept, opened.source, length, first_token.of_windows(loaded, bos, family))
    else:
        kept = _kept(every, opened.source, length)
        tokens, counted = _padded(kept, length, _padding(loaded, vocabulary))
    return Examples(in_vocabulary(tokens, vocabulary, opened.source), counted, opened.source)


def _peeked(opened: Opened) -> tuple[Opened, bool]:
    """The same data, and whether they are text or token ids instead of conversations, as the first row tells."""
    if isinstance(opened.content, np.ndarray):
        return opened, True
    first = next(opened.content, None)
    if first is None:
        raise no_text(opened.source)
    return replace(opened, content=chain([first], opened.content)), first.responses is None


def _check_text(opened: Opened, template: str, loss_on: str, packing: str, bos: str) -> None:
    is_ids = isinstance(opened.content, np.ndarray)
    found = "token ids" if is_ids else "text"
    if template == "alpaca":
        raise InputError(f"{opened.source}: {chat.ALPACA_ROWS}, found {found}; use --template auto")
    if loss_on == "response":
        raise InputError(
            f"{opened.source}: --loss-on response is for conversations, found {found}; use --loss-on all, or give rows "
            "with messages, with prompt and response, or with instruction and output"
        )
    if is_ids and packing == "padded":
        raise InputError(f"{opened.source}: token ids show no ends of documents to pad; use --packing packed")
    check_bos(opened, bos == "yes")


def _of_text(
    opened: Opened, tokenizer: Callable[[], Tokenizer], vocabulary: int, length: int, bos: str, family: str
) -> Examples:
    """Consecutive windows of all documents or token ids, of which all tokens but the first count."""
    if isinstance(opened.content, np.ndarray):
        tokens, first = all_tokens(opened, tokenizer, vocabulary), None
    else:
        loaded = tokenizer()
        first = first_token.of_windows(loaded, bos, family)
        joined = Joined(opened.content, first_token.between_documents(loaded, bos))
        ids = token_ids(loaded, joined)
        if joined.blank:
            raise no_text(opened.source)
        tokens = Tokens(in_vocabulary(ids, vocabulary, opened.source), opened.source, joined.documents)
    cut = windows.cut(tokens, length, first)
    return Examples(cut, np.broadcast_to(np.arange(length) > 0, cut.shape), opened.source)


# -------------------------------------------------------------------------------------------------- single examples


def _documents(opened: Opened, tokenizer: Tokenizer, first: int | None) -> Iterator[_Example]:
    """Every document by itself, whole.

    Args:
      opened: documents in blocks.
      tokenizer: of the model.
      first: the token that each begins with; None where it begins with its text.
    """
    for _, blocks in groupby(opened.content, lambda block: block.document):
        joined = Joined(blocks)
        ids = token_ids(tokenizer, joined)
        if not joined.blank:
            yield _completed(_Example(ids, np.ones(len(ids), bool)), first, tokenizer.eos, closed=True)


def _conversations(opened: Opened, tokenizer: Tokenizer, first: int | None, loss_on: str) -> Iterator[_Example]:
    """Every conversation by itself, whole.

    Args:
      opened: conversations, a block each.
      tokenizer: of the model.
      first: the token that each begins with; None where it begins with its text.
      loss_on: see `read_examples`.
    """
    for _, text, by_template, responses in opened.content:
        spans = ((0, len(text)),) if loss_on == "all" else responses or ()
        closed = bool(spans) and spans[-1][1] == len(text)
        last = None if by_template else tokenizer.eos
        yield _completed(_marked(tokenizer, text, spans), first, last, closed)


def _marked(tokenizer: Tokenizer, text: str, spans: tuple[chat.Span, ...]) -> _Example:
    """The tokens of a text; those count whose first character lies in a span.

    A tokenizer that says nothing about characters gets the text in parts, cut at the ends of the spans.
    """
    borders = np.array(list(chain.from_iterable(spans)), int)
    if tokenizer.offsets:
        encoded = encode(tokenizer, text)
        return _Example(encoded.ids, np.searchsorted(borders, encoded.starts, side="right") % 2 == 1)
    parts = [encode(tokenizer, text[start:end]).ids for start, end in pairwise([0, *borders, len(text)])]
    marks = [np.full(len(part), number % 2 == 1) for number, part in enumerate(parts)]
    return _Example(np.concatenate(parts), np.concatenate(marks))


def _completed(example: _Example, first: int | None, last: int | None, closed: bool) -> _Example:
    """An example with the tokens at its ends, as far as they are not there; its first token never counts.

    Args:
      example: the tokens of the text.
      first: the token that the example begins with; None where it begins with its text.
      last: the token that the example ends with; None where it ends with its text.
      closed: whether the last token counts, because a response ends there.
    """
    ids, counted = example
    if first is not None and not np.array_equal(ids[:1], [first]):
        ids, counted = np.append(np.int32(first), ids), np.append(False, counted)
    if last is not None and not np.array_equal(ids[-1:], [last]):
        ids, counted = np.append(ids, np.int32(last)), np.append(counted, closed)
    counted[:1] = False
    return _Example(ids, counted)


def _kept(examples: Iterable[_Example], source: str, length: int | None) -> list[_Example]:
    """The examples with a counted token, cut off behind `length` tokens; warns of those that are left out.

    Raises:
      InputError: there is none.
    """
    kept, total, without = [], 0, 0
    for example in examples:
        total, without = total + 1, without + (not example.counted.any())
        if example.counted[:length].any():
            # Copies, so that what is cut off leaves memory.
            kept.append(_Example(example.ids[:length].copy(), example.counted[:length].copy()))
    if not total:
        raise no_text(source)
    if len(kept) == total:
        return kept
    sentence = _left_out(source, total - len(kept), total, without, length)
    if not kept:
        raise InputError(sentence)
    warn(sentence)
    return kept


def _left_out(source: str, left_out: int, total: int, without: int, length: int | None) -> str:
    """The sentence about examples without a counted token.

    Args:
      source: of the data.
      left_out: number of these examples.
      total: number of all.
      without: number of those that have no counted token at any length.
      length: tokens of an example.
    """
    cut, bare = left_out - without, f"{without} have no response; give rows with messages of the assistant"
    sentence = f"{source}: {left_out} of {total} examples are left out, because the loss would count none of their "
    if not cut:
        return f"{sentence}tokens: {bare}"
    return f"{sentence}first {length} tokens; use a longer --seq-len" + (f" ({bare})" if without else "")


# ----------------------------------------------------------------------------------------------------------- arrays


def _padding(tokenizer: Tokenizer, vocabulary: int) -> int:
    """The token behind the end of an example: end-of-sequence, or 0 where the model has none."""
    return tokenizer.eos if tokenizer.eos is not None and 0 <= tokenizer.eos < vocabulary else 0


def _padded(
    examples: list[_Example], length: int, padding: int
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """One example a row, padded up to the longest."""
    longest = max(len(example.ids) for example in examples)
    shape = len(examples), min(length, -(-longest // MULTIPLE) * MULTIPLE)
    tokens, counted = np.full(shape, padding, np.int32), np.zeros(shape, bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = example.ids
        counted[row, : len(example.ids)] = example.counted
    return tokens, counted


def _packed(
    examples: list[_Example], source: str, length: int, first: int | None
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Windows of all examples one after the other, each of which may begin with a token."""
    tokens = Tokens(np.concatenate([example.ids for example in examples]), source, len(examples))
    places = windows.places(tokens, length, first)
    counted = np.concatenate([example.counted for example in examples])[places]
    counted[:, 0] = False
    # Where windows begin with a token and one begins with an example, the next window repeats its last token.
    counted[1:] &= places[1:] > places[:-1, -1:]
    some = counted.any(axis=1)
    if not some.any():
        raise InputError(f"{source}: the loss would count no token of the windows of {length}; give more text")
    return windows.cut(tokens, length, first)[some], counted[some]
