"""Calibration windows, or sequences to train on, of several texts mixed by weight: `a.txt:0.7,b.jsonl:0.3`."""

import os
import re
from collections.abc import Sequence
from itertools import accumulate, takewhile
from math import floor, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from minillm_jax.errors import InputError, shortened

# Seed of a draw; with the number of a text in a mixture, so that every text has a stream of its own.
Seed = int | tuple[int, int]

_WEIGHTED = re.compile(r"(.+):\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf))\s*", re.DOTALL)


# Characters of the longest name of a file with its weight: more than any system allows. A text that was given in the
# place of its file's name has too many commas to try all ends.
LONGEST = 5000


class Share(NamedTuple):
    """A text of a mixture.

    Attributes:
      source: a file or a Hub data set.
      weight: share of the windows or sequences; all weights together are 1.
      samples: number of windows or sequences; 0 before they are counted.
    """

    source: str
    weight: float
    samples: int = 0


def shares_of(text: str, flag: str = "--calibration") -> tuple[Share, ...]:
    """The texts of a mixture; empty where a text names one source without a weight.

    The name of a file that exists is a source, whatever colons and commas are in it.

    Args:
      text: the mixture as the user writes it.
      flag: the option that it belongs to, for messages.

    Raises:
      InputError: a source has no weight, or one that is no number above 0.
    """
    if _exists(text):
        return ()
    parts = _parts(text)
    if not any(_WEIGHTED.fullmatch(part) or (_exists(part) and len(parts) > 1) for part in parts):
        names = [part.rpartition(":")[0] for part in parts]
        if not any(_exists(name) for name in names):
            return ()
    shares = [_share(part, flag) for part in parts]
    total = sum(share.weight for share in shares)
    return tuple(share._replace(weight=share.weight / total) for share in shares)


def check_one_text(text: Any) -> None:
    """Checks that a text to evaluate on, or to watch, is no mixture.

    Raises:
      InputError: it is one.
    """
    if isinstance(text, str | Path) and shares_of(str(text)):
        raise InputError(f"{text}: a mixture is for --calibration of prune and --data of recover; give one text here")


def _parts(text: str) -> list[str]:
    """The text between commas, but for the commas in the name of a file that exists."""
    pieces, parts = text.split(","), []
    while pieces:
        lengths = accumulate(len(piece) + 1 for piece in pieces)
        most = sum(1 for _ in takewhile(lambda length: length <= LONGEST, lengths))
        named = (end for end in range(most, 1, -1) if _exists(_source(",".join(pieces[:end]))))
        end = next(named, 1)
        parts.append(",".join(pieces[:end]).strip())
        pieces = pieces[end:]
    return parts


def _source(part: str) -> str:
    match = _WEIGHTED.fullmatch(part.strip())
    return part.strip() if match is None else match[1]


def _share(part: str, flag: str) -> Share:
    match = _WEIGHTED.fullmatch(part)
    if match is None:
        _, colon, word = part.rpartition(":")
        found = f", found {shortened(word)!r}" if colon and not {"/", os.sep} & set(word) else ""
        raise InputError(
            f"{flag} {shortened(part)!r}: every source of a mixture has a weight{found}; give numbers, "
            "a.txt:0.7,b.jsonl:0.3 for example"
        )
    weight = float(match[2])
    if not (isfinite(weight) and weight > 0):
        raise InputError(f"{flag} {shortened(match[1], 200)}: the weight must be above 0, found {match[2]}")
    return Share(match[1], weight)


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))  # noqa: PTH110, PTH111  Path raises for a name that is too long


def counted(
    shares: Sequence[Share], samples: int, noun: str = "window", remedy: str = "more --samples"
) -> tuple[Share, ...]:
    """The texts with their numbers of windows, by the largest remainders.

    Args:
      shares: the texts.
      samples: number of all windows.
      noun: what is counted, for messages.
      remedy: what gives more, for messages.

    Raises:
      InputError: a text would have no window.
    """
    exact = [share.weight * samples for share in shares]
    counts = [floor(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: samples - sum(counts)]:
        counts[k] += 1
    for share, count in zip(shares, counts, strict=True):
        if count == 0:
            raise InputError(
                f"{share.source}: a weight of {share.weight:.3g} gives no {noun} of {samples}; use a larger weight or "
                f"{remedy}"
            )
    return tuple(share._replace(samples=count) for share, count in zip(shares, counts, strict=True))


def interleaved(parts: Sequence[Shaped[np.ndarray, "_ T"]]) -> Shaped[np.ndarray, "B T"]:
    """The windows of all texts, in an order in which every stretch has about the shares of the whole."""
    places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
    return np.concatenate(parts)[np.argsort(places, kind="stable")]
