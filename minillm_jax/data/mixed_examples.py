"""Sequences to train on of several texts, mixed by weight (`data.mixture`)."""

from collections.abc import Callable, Sequence

import numpy as np

from minillm_jax.data.examples import Examples
from minillm_jax.data.mixture import Share, counted, interleaved


def mixed(shares: Sequence[Share], read: Callable[[str], Examples], source: str, seed: int) -> Examples:
    """As many sequences of several texts as they give in the asked shares, no sequence twice.

    A text that has more than its share gives a part of its sequences, drawn by the seed. Sequences of shorter texts are
    padded on the right up to the longest.

    Args:
      shares: the texts and their weights.
      read: the sequences of a text, by its name.
      source: name of the mixture, for messages and records.
      seed: draws the sequences.

    Raises:
      InputError: a text cannot be used, or a weight gives no sequence.
    """
    texts = [read(share.source) for share in shares]
    total = min(int(text.count / share.weight) for text, share in zip(texts, shares, strict=True))
    numbers = counted(shares, total, "sequence", "more text of the other sources")
    parts = [
        _drawn(text, share.samples, (seed, place))
        for place, (text, share) in enumerate(zip(texts, numbers, strict=True))
    ]
    length = max(part.length for part in parts)
    widths = [((0, 0), (0, length - part.length)) for part in parts]
    tokens, counts = (
        interleaved([np.pad(array, width) for array, width in zip(arrays, widths, strict=True)])
        for arrays in ([part.tokens for part in parts], [part.counted for part in parts])
    )
    return Examples(tokens, counts, source)


def _drawn(text: Examples, count: int, seed: tuple[int, int]) -> Examples:
    """Some sequences of a text, in its order."""
    numbers = np.sort(np.random.default_rng(seed).choice(text.count, min(count, text.count), replace=False))
    return Examples(*text.take(numbers), text.source)
