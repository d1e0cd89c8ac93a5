"""Passages of a long text, drawn while the text goes by, so that memory does not follow its length."""

from collections.abc import Iterable, Iterator

import numpy as np


def passages(texts: Iterable[str], size: int) -> Iterator[str]:
    """A text in consecutive passages of at most `size` characters, which end where a word begins if that is possible.

    The passages do not depend on the parts in which the text comes. A remainder of less than `size` characters is left
    out.

    Args:
      texts: the text in parts of any size.
      size: characters of a passage.
    """
    text = ""
    for part in texts:
        text, start = text + part, 0
        while len(text) - start >= size:
            end = _border(text, start, start + size)
            yield text[start:end]
            start = end
        text = text[start:]


def _border(text: str, start: int, end: int) -> int:
    """The last space or line feed in the second half of a passage; its end where there is none."""
    middle = (start + end) // 2
    space = max(text.rfind(" ", middle, end), text.rfind("\n", middle, end))
    return end if space <= start else space


def reservoir(texts: Iterable[str], count: int, seed: int | tuple[int, int]) -> list[str]:
    """`count` of many texts (or all, where they are fewer) in random order, every choice equally likely.

    Only `count` texts are in memory. Algorithm R of Vitter, "Random Sampling with a Reservoir" (1985): the text with
    the number n, from 0, takes a place with probability count / (n + 1).
    """
    random, kept = np.random.default_rng(seed), []
    for number, one in enumerate(texts):
        if number < count:
            kept.append(one)
        elif (place := int(random.integers(number + 1))) < count:
            kept[place] = one
    return [kept[place] for place in random.permutation(len(kept))]
