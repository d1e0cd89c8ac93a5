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
        ids = np.ascontiguousarray(self.batches.windows, dtype="<i4")
        return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Source, number, length, seed and fingerprint of the windows, for pruning.json."""
        return {
            "source": self.source,
            "samples": self.batches.count,
            "length": self.batches.length,
            "seed": self.seed,
            "tokens_sha256": self.fingerprint(),
        }


def cut(tokens: Tokens, length: int) -> Int[np.ndarray, "B T"]:
    """Consecutive windows of `length` tokens of a text, int32 [B, T], without the last partial window.

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
    """`samples` windows of `length` tokens of a text, int32 [B, T], drawn without replacement.

    Raises:
      InputError: the text has fewer windows, a number is out of its range, or the text is shorter than one window.
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
    numbers = np.random.default_rng(seed).choice(len(windows), samples, replace=False)
    return windows[numbers]


def check_seed(seed: int) -> None:
    """Checks that a seed has 32 bits: a random key holds no more, so larger seeds would repeat smaller seeds.

    Raises:
      InputError: the seed is negative or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must lie between 0 and 2^32 - 1, found {seed}")
