"""Calibration windows: drawn from the tokens of a text by a seed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from minillm_jax.data import first_token
from minillm_jax.data.batches import Batches
from minillm_jax.data.calibration_size import Size, fitted
from minillm_jax.data.documents import Opened, check_ids, no_text
from minillm_jax.data.mixture import Seed, Share
from minillm_jax.data.passages import passages, reservoir
from minillm_jax.data.text import Joined, Tokens, all_tokens, check_bos, in_vocabulary
from minillm_jax.data.tokenizing import Tokenizer, token_ids
from minillm_jax.errors import InputError, shortened, warn
from minillm_jax.model.decoder import Decoder, learned_positions

# Characters of a text that is tokenised whole, so that windows are drawn from all its tokens.
WHOLE = 2**22
# Characters of a passage for each token of a window, four times as many as usual, so that a window fits in.
PER_TOKEN = 16
SHORTEST_PASSAGE = 1024
# Passages that are drawn for each window. Passages with fewer tokens than a window are joined.
SPARE = 4
# Characters after which no more of a text is read for calibration.
MOST_CHARACTERS = 200_000_000


@dataclass(frozen=True)
class Calibration:
    """The calibration windows, from which scores, statistics and refits are estimated, with their source.

    Attributes:
      batches: the windows.
      source: path or Hub id of the text, or the mixture of several.
      seed: seed of the draw.
      mixture: the texts of a mixture, with the weight and the number of windows of each; empty for one text.
    """

    batches: Batches
    source: str
    seed: int
    mixture: tuple[Share, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of the token ids and of the shape of the windows; the same on every machine."""
        return self.batches.fingerprint()

    def record(self) -> dict[str, Any]:
        """Source, number, length, seed and fingerprint of the windows, for pruning.json."""
        return {
            "source": self.source,
            "samples": self.batches.count,
            "length": self.batches.length,
            "seed": self.seed,
            "tokens_sha256": self.fingerprint(),
        } | ({"mixture": [share._asdict() for share in self.mixture]} if self.mixture else {})


def draw(
    opened: Opened,
    tokenizer: Callable[[], Tokenizer],
    vocabulary: int,
    size: Size,
    seed: Seed,
    bos: str = "no",
    family: str = "",
) -> Int[np.ndarray, "B T"]:
    """Windows of an opened text, int32 [B, T], drawn without replacement.

    The windows of a text of at most `WHOLE` characters are those of `sample`. A longer text goes by in passages. Only
    passages that are drawn stay in memory, and each begins one window. No more than `MOST_CHARACTERS` are read.

    Args:
      opened: the text, which is read once.
      tokenizer: loads the tokenizer, which token ids do not need.
      vocabulary: number of token ids of the model.
      size: number and length of the windows, fitted to a short text where the size allows it.
      seed: decides the draw.
      bos: where the beginning-of-sequence token stands, see `data.first_token`.
      family: of the model.

    Raises:
      InputError: see `sample`; or the text cannot be read, or a token id lies outside the vocabulary.
    """
    check_seed(seed)
    _check_samples(size.samples)
    check_length(size.length)
    source = opened.source
    check_bos(opened, bos == "yes")
    if isinstance(opened.content, np.ndarray):
        return _sample(all_tokens(opened, tokenizer, vocabulary), size, seed, None)
    loaded = tokenizer()
    first = first_token.of_windows(loaded, bos, family)
    joined = Joined(opened.content, first_token.between_documents(loaded, bos))
    characters = max(SHORTEST_PASSAGE, PER_TOKEN * size.length)
    whole, texts = max(WHOLE, SPARE * size.samples * characters), iter(joined)
    held = list(_until(texts, whole + 1))
    if sum(map(len, held)) > whole:
        every = passages(_until(chain(held, texts), max(whole, MOST_CHARACTERS)), characters)
        windows = _windows(reservoir(every, SPARE * size.samples, seed), loaded, size, first, source)
        return in_vocabulary(windows, vocabulary, source)
    if joined.blank:
        raise no_text(source)
    ids = in_vocabulary(token_ids(loaded, held), vocabulary, source)
    return _sample(Tokens(ids, source, joined.documents), size, seed, first)


def _until(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The parts of a text until they have a number of characters together."""
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= characters:
            return


def _windows(
    drawn: list[str], tokenizer: Tokenizer, size: Size, first: int | None, source: str
) -> Int[np.ndarray, "B T"]:
    """The beginning of each passage, of `length` tokens; a passage with fewer tokens continues in the next one."""
    windows, held, total = [], np.zeros(0, np.int32), 0
    for passage in drawn:
        ids = token_ids(tokenizer, [passage.lstrip()])
        held, total = np.concatenate([held, ids]), total + len(ids)
        if len(held) >= size.length:
            windows.append(_begun(held, np.zeros(1, int), size.length, first)[0])
            held = held[:0]
        if len(windows) == size.samples:
            return np.stack(windows)
    raise _too_few(source, total, len(windows), size)


def cut(tokens: Tokens, length: int, first: int | None = None) -> Int[np.ndarray, "B T"]:
    """Consecutive windows of `length` tokens of a text, int32 [B, T], without the last partial window.

    Args:
      tokens: of the text.
      length: tokens of a window.
      first: a token that every window begins with, before `length` - 1 tokens of the text; None for text alone.

    Raises:
      InputError: the length is below 2, or the text is shorter than one window.
    """
    count = _count(tokens, length, first)
    if first is None:
        return tokens.ids[: count * length].reshape(count, length).astype(np.int32, copy=False)
    return _begun(tokens.ids, (length - 1) * np.arange(count), length, first).astype(np.int32, copy=False)


def places(tokens: Tokens, length: int, first: int | None = None) -> Int[np.ndarray, "B T"]:
    """The number of the token in the text at each place of the windows of `cut`, int64 [B, T].

    With a first token, the number in the first column says nothing.

    Raises:
      InputError: see `cut`.
    """
    starts = _step(length, first) * np.arange(_count(tokens, length, first))
    return _places(tokens.ids, starts, length, first)


def _step(length: int, first: int | None) -> int:
    """Tokens of the text from one window to the next."""
    return length if first is None else length - 1


def _count(tokens: Tokens, length: int, first: int | None) -> int:
    """Number of windows of a text, at least 1."""
    check_length(length)
    count = _windows_of(tokens, length, first)
    if count == 0:
        raise InputError(f"{tokens.source}: {len(tokens.ids)} tokens are less than one window of {length}")
    return count


def _windows_of(tokens: Tokens, length: int, first: int | None) -> int:
    """Number of windows; behind each of those with a first token follows one more token, see `_begun`."""
    return (len(tokens.ids) - (first is not None)) // _step(length, first)


def _begun(
    ids: Integer[np.ndarray, " tokens"], starts: Int[np.ndarray, " B"], length: int, first: int | None
) -> Integer[np.ndarray, "B T"]:
    """The windows that start at these tokens of a text.

    With a first token, `length` - 1 tokens of the text follow it. A window whose text begins with that token already,
    because a document begins there, does not get a second one.
    """
    windows = ids[_places(ids, starts, length, first)]
    if first is not None:
        windows[:, 0] = first
    return windows


def _places(
    ids: Integer[np.ndarray, " tokens"], starts: Int[np.ndarray, " B"], length: int, first: int | None
) -> Int[np.ndarray, "B T"]:
    begins = starts if first is None else starts - (ids[starts] != first)
    return np.maximum(begins[:, None] + np.arange(length), 0)


def sample(tokens: Tokens, samples: int, length: int, seed: Seed) -> Int[np.ndarray, "B T"]:
    """`samples` windows of `length` tokens of a text, int32 [B, T], drawn without replacement.

    Raises:
      InputError: the text has fewer windows, a number is out of its range, or the text is shorter than one window.
    """
    check_seed(seed)
    _check_samples(samples)
    return _sample(tokens, Size(samples, length), seed, None)


def _sample(tokens: Tokens, size: Size, seed: Seed, first: int | None) -> Int[np.ndarray, "B T"]:
    size = fitted(size, lambda length: _windows_of(tokens, length, first))
    count = _count(tokens, size.length, first)
    if count < size.samples:
        raise _too_few(tokens.source, len(tokens.ids), count, size)
    numbers = np.random.default_rng(seed).choice(count, size.samples, replace=False)
    return _begun(tokens.ids, _step(size.length, first) * numbers, size.length, first).astype(np.int32)


def _too_few(source: str, tokens: int, made: int, size: Size) -> InputError:
    return InputError(
        f"{source}: {tokens} tokens make {made} windows of {size.length}, but {size.samples} are asked for; give more "
        "text, or fewer or shorter samples"
    )


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise InputError(f"--samples must be at least 1, found {samples}")


def check_length(length: int) -> None:
    """Checks the number of tokens of a window.

    Raises:
      InputError: it is below 2.
    """
    if length < 2:
        raise InputError(f"a window of {length} tokens has nothing to predict; use at least 2")


def whole_number(flag: str, value: Any) -> int:
    """A whole number of Python or NumPy as an int.

    Raises:
      InputError: the value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{flag} must be a whole number, found {shortened(repr(value))}")
    return int(value)


def positions(decoder: Decoder) -> int | None:
    """Tokens of the longest window that a model has learned positions for, or was trained for; None without a limit."""
    learned = learned_positions(decoder)
    return decoder.config.trained_length if learned is None else learned


def check_positions(decoder: Decoder, length: int, flag: str) -> None:
    """Checks a window against the positions of a model; warns where the model was not trained for so many.

    Args:
      decoder: the model, which may be abstract.
      length: tokens of a window.
      flag: the option that sets the length.

    Raises:
      InputError: the model has learned positions, and they are fewer.
    """
    learned = learned_positions(decoder)
    if learned is not None and length > learned:
        raise InputError(f"{flag} {length}: the model has {learned} learned positions; use {flag} {learned} or less")
    most = decoder.config.trained_length
    if most is not None and length > most:
        warn(
            f"{flag} {length}: the model was trained for windows of at most {most} tokens, and longer ones give a "
            f"worse perplexity; use {flag} {most} or less"
        )


def check_windows(batches: Batches, vocabulary: int, source: str) -> None:
    """Checks windows that were made by hand.

    Raises:
      InputError: they are not a table of token ids of the vocabulary.
    """
    windows = batches.windows
    if getattr(windows, "ndim", None) != 2:
        raise InputError(f"{source}: expected windows of token ids, [windows, tokens], found {type(windows).__name__}")
    check_ids(np.asarray(windows), source)
    check_length(windows.shape[1])
    in_vocabulary(np.asarray(windows), vocabulary, source)


def check_seed(seed: Seed) -> None:
    """Checks that a seed has 32 bits: a random key holds no more, so larger seeds would repeat smaller seeds.

    Raises:
      InputError: the seed is negative or has more than 32 bits.
    """
    first = seed if isinstance(seed, int) else seed[0]
    if not 0 <= first < 2**32:
        raise InputError(f"--seed must lie between 0 and 2^32 - 1, found {first}")
