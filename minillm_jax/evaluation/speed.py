"""Speed of generation: time of the prompts, then of each further token, for several batch sizes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int

from minillm_jax.evaluation.generate import most_probable, read_prompts, read_token
from minillm_jax.model.decoder import Decoder


@dataclass(frozen=True)
class Load:
    """What is timed.

    Attributes:
      prompt: tokens of a prompt.
      tokens: tokens behind a prompt, of which the prompt's pass gives the first.
      batches: numbers of prompts at a time.
    """

    prompt: int = 128
    tokens: int = 32
    batches: tuple[int, ...] = (1, 8, 32)

    @property
    def size(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt + self.tokens


@runtime_checkable
class Engine(Protocol):
    """A loaded model that generates greedily."""

    def read(self, prompts: Int[np.ndarray, "B T"], size: int) -> None:
        """Read prompts, with room for sequences of `size` tokens; returns when the first token is known."""
        ...

    def more(self, count: int) -> None:
        """`count` further tokens of every prompt; returns when the last is known."""
        ...


class Ours:
    """A decoder as an engine."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._token: Any = None
        self._kept: Any = None

    def read(self, prompts: Int[np.ndarray, "B T"], size: int) -> None:
        """See `Engine`."""
        counts = np.full(len(prompts), prompts.shape[1], np.int32)
        logits, self._kept = read_prompts(self._decoder, jax.numpy.asarray(prompts), jax.numpy.asarray(counts), size)
        self._token = jax.block_until_ready(most_probable(logits))

    def more(self, count: int) -> None:
        """See `Engine`."""
        for _ in range(count):
            logits, self._kept = read_token(self._decoder, self._kept, self._token)
            self._token = most_probable(logits)
        jax.block_until_ready(self._token)

    @property
    def last(self) -> Int[np.ndarray, " B"]:
        """The last token of every prompt."""
        return np.asarray(self._token)


@dataclass(frozen=True)
class Round:
    """Seconds of one round, by number of prompts.

    Attributes:
      prompts: until the first token is known.
      tokens: of all further tokens.
    """

    prompts: Mapping[int, float]
    tokens: Mapping[int, float]


def one_round(engine: Engine, load: Load, vocabulary: int) -> Round:
    """Times every batch size once, with random prompts.

    Args:
      engine: the model.
      load: what is timed.
      vocabulary: number of token ids of the model.
    """
    prompts, tokens, draw = {}, {}, np.random.default_rng(0)
    for batch in load.batches:
        ids = draw.integers(0, vocabulary, (batch, load.prompt), dtype=np.int32)
        started = time.perf_counter()
        engine.read(ids, load.size)
        known = time.perf_counter()
        engine.more(load.tokens - 1)
        prompts[batch], tokens[batch] = known - started, time.perf_counter() - known
    return Round(prompts, tokens)


@dataclass(frozen=True)
class Speed:
    """Medians over rounds.

    Attributes:
      first_token: seconds until the first token of one batch of the smallest size.
      prefill: tokens of prompts a second, by number of prompts.
      decoding: further tokens a second of all prompts together, by number of prompts.
    """

    first_token: float
    prefill: Mapping[int, float]
    decoding: Mapping[int, float]


def speed_of(rounds: Sequence[Round], load: Load) -> Speed:
    """The medians of some rounds."""
    prompts = {batch: median(one.prompts[batch] for one in rounds) for batch in load.batches}
    tokens = {batch: median(one.tokens[batch] for one in rounds) for batch in load.batches}
    return Speed(
        prompts[min(load.batches)],
        {batch: batch * load.prompt / seconds for batch, seconds in prompts.items()},
        {batch: batch * (load.tokens - 1) / seconds for batch, seconds in tokens.items()},
    )
