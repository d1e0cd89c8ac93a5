"""Calibration windows: drawn from the tokens of a text by a seed."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from minillm_jax.data.batches import Batches
from minillm_jax.data.text import Tokens
from minillm_jax.errors import InputError


@dataclass(frozen=True)
class Calibration:
    """The windows of token ids that every score, statistic and refit is estimated on, and where they came from.

    Attributes:
      batches: the windows.
      source: the text's path or Hub id.
      seed: the seed that drew the windows.
    """

    batches: Batches
    source: str
    seed: int

    def fingerprint(self) -> str:
        """The SHA-256 of all token ids and of the windows' shape: equal for equal windows on every machine."""
        ids = np.ascontiguousarray(self.batches.windows, dtype="<i4")
        return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Source, number, length and seed of the windows, for pruning.json."""
        return {
            "source": self.source,
            "samples": self.batches.count,
            "length": self.batches.length,
            "seed": self.seed,
            "tokens_sha256": self.fingerprint(),
        }


def cut(tokens: Tokens, length: int) -> Int[np.ndarray, "B T"]:
    """A text cut into consecutive windows of `length` tokens; the last partial window is dropped.

    Raises:
      InputError: the length is below 2, or the text is shorter than one window.
    """
    if length < 2:
        raise InputError(f"a window of {length} tokens has nothing to predict; use at least 2")
    count = len(tokens.ids) // length
    if count == 0:
        raise InputError(f"{tokens.source}: {len(tokens.ids)} tokens are less than one window of {length}")
    return tokens.ids[: count * length].reshape(count, length)


def sample(tokens: Tokens, samples: int, length: int, seed: int) -> Int[np.ndarray, "B T"]:
    """`samples` different windows of a text, drawn without replacement by a seed.

    Raises:
      InputError: the text holds fewer windows than that, or the seed is out of range.
    """
    check_seed(seed)
    if samples < 1:
        raise InputError(f"--samples must be at least 1, found {samples}")
    windows = cut(tokens, length)
    if len(windows) < samples:
        raise InputError(
            f"{tokens.source}: {len(tokens.ids)} tokens make {len(windows)} windows of {length}, but {samples} are "
            "asked for; give more text, or fewer or shorter samples"
        )
    chosen = np.random.default_rng(seed).choice(len(windows), samples, replace=False)
    return windows[chosen]


def check_seed(seed: int) -> None:
    """Whether a number is a seed: a 32-bit word, because a key takes no more and larger ones would repeat smaller ones.

    Raises:
      InputError: it is not.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must lie between 0 and 2^32 - 1, found {seed}")
