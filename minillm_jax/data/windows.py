"""Calibration windows: drawn from the tokens of a text by a seed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from minillm_jax.data.batches import Batches
from minillm_jax.data.documents import Opened, check_ids, no_text
from minillm_jax.data.passages import passages, reservoir
from minillm_jax.data.text import Joined, Tokens, all_tokens, in_vocabulary
from minillm_jax.data.tokenizing import Tokenizer, token_ids
from minillm_jax.errors import InputError, shortened, warn
from minillm_jax.model.decoder import Decoder

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
      source: path or Hub id of the text.
      seed: seed of the draw.
    """

    batches: Batches
    source: str
    seed: int

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
        }


def draw(
    opened: Opened, tokenizer: Callable[[], Tokenizer], vocabulary: int, samples: int, length: int, seed: int
) -> Int[np.ndarray, "B T"]:
    """`samples` windows of `length` tokens of an opened text, int32 [B, T], drawn without replacement.

    The windows of a text of at most `WHOLE` characters are those of `sample`. A longer text goes by in passages. Only
    passages that are drawn stay in memory, and each begins one window. No more than `MOST_CHARACTERS` are read.

    Args:
      opened: the text, which is read once.
      tokenizer: loads the tokenizer, which token ids do not need.
      vocabulary: number of token ids of the model.
      samples: number of windows.
      length: tokens of a window.
      seed: decides the draw.

    Raises:
      InputError: see `sample`; or the text cannot be read, or a token id lies outside the vocabulary.
    """
    check_seed(seed)
    _check_samples(samples)
    _check_length(length)
    source = opened.source
    if isinstance(opened.content, np.ndarray):
        return sample(all_tokens(opened, tokenizer, vocabulary), samples, length, seed)
    loaded, joined = tokenizer(), Joined(opened.content)
    size = max(SHORTEST_PASSAGE, PER_TOKEN * length)
    whole, texts = max(WHOLE, SPARE * samples * size), iter(joined)
    held = list(_until(texts, whole + 1))
    if sum(map(len, held)) > whole:
        every = passages(_until(chain(held, texts), max(whole, MOST_CHARACTERS)), size)
        windows = _windows(reservoir(every, SPARE * samples, seed), loaded, samples, length, source)
        return in_vocabulary(windows, vocabulary, source)
    if joined.blank:
        raise no_text(source)
    ids = in_vocabulary(token_ids(loaded, held), vocabulary, source)
    return sample(Tokens(ids, source, joined.documents), samples, length, seed)


def _until(texts: Iterable[str], characters: int) -> Iterator[str]:
    """The parts of a text until they have a number of characters together."""
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= characters:
            return


def _windows(drawn: list[str], tokenizer: Tokenizer, samples: int, length: int, source: str) -> Int[np.ndarray, "B T"]:
    """The first `length` tokens of each passage; a passage with fewer tokens continues in the next one."""
    windows, held, total = [], np.zeros(0, np.int32), 0
    for passage in drawn:
        ids = token_ids(tokenizer, [passage.lstrip()])
        held, total = np.concatenate([held, ids]), total + len(ids)
        if len(held) >= length:
            windows.append(held[:length])
            held = held[:0]
        if len(windows) == samples:
            return np.stack(windows)
    raise _too_few(source, total, len(windows), samples, length)


def cut(tokens: Tokens, length: int) -> Int[np.ndarray, "B T"]:
    """Consecutive windows of `length` tokens of a text, int32 [B, T], without the last partial window.

    Raises:
      InputError: the length is below 2, or the text is shorter than one window.
    """
    return _cut(tokens, length).astype(np.int32, copy=False)


def _cut(tokens: Tokens, length: int) -> Integer[np.ndarray, "B T"]:
    _check_length(length)
    count = len(tokens.ids) // length
    if count == 0:
        raise InputError(f"{tokens.source}: {len(tokens.ids)} tokens are less than one window of {length}")
    return tokens.ids[: count * length].reshape(count, length)


def sample(tokens: Tokens, samples: int, length: int, seed: int) -> Int[np.ndarray, "B T"]:
    """`samples` windows of `length` tokens of a text, int32 [B, T], drawn without replacement.

    Raises:
      InputError: the text has fewer windows, a number is out of its range, or the text is shorter than one window.
    """
    check_seed(seed)
    _check_samples(samples)
    windows = _cut(tokens, length)
    if len(windows) < samples:
        raise _too_few(tokens.source, len(tokens.ids), len(windows), samples, length)
    numbers = np.random.default_rng(seed).choice(len(windows), samples, replace=False)
    return windows[numbers].astype(np.int32)


def _too_few(source: str, tokens: int, made: int, samples: int, length: int) -> InputError:
    return InputError(
        f"{source}: {tokens} tokens make {made} windows of {length}, but {samples} are asked for; give more text, or "
        "fewer or shorter samples"
    )


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise InputError(f"--samples must be at least 1, found {samples}")


def _check_length(length: int) -> None:
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


def check_positions(decoder: Decoder, length: int, flag: str) -> None:
    """Checks a window against the positions of a model; warns where the model was not trained for so many.

    Args:
      decoder: the model, which may be abstract.
      length: tokens of a window.
      flag: the option that sets the length.

    Raises:
      InputError: the model has learned positions, and they are fewer.
    """
    if decoder.position_embedding is not None:
        most = decoder.position_embedding.shape[0] - (decoder.config.position_offset or 0)
        if length > most:
            raise InputError(f"{flag} {length}: the model has {most} learned positions; use {flag} {most} or less")
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
    _check_length(windows.shape[1])
    in_vocabulary(np.asarray(windows), vocabulary, source)


def check_seed(seed: int) -> None:
    """Checks that a seed has 32 bits: a random key holds no more, so larger seeds would repeat smaller seeds.

    Raises:
      InputError: the seed is negative or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must lie between 0 and 2^32 - 1, found {seed}")
