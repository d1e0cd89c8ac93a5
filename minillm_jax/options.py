"""Settings as data: a field of a settings class is a flag, a recipe key, a default and a sentence of help."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field
from decimal import Decimal
from math import isfinite
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """How people write a value that is no plain number, word or switch.

    Attributes:
      read: text -> value; raises ValueError with what is expected.
      write: value -> what a TOML file holds.
      example: the metavariable in help.
    """

    read: Callable[[str], Any]
    write: Callable[[Any], Any]
    example: str


@dataclass(frozen=True)
class Option:
    """What the command line and recipes know of a field.

    Attributes:
      kind: type of the value: float, int, str or bool; str where a spelling reads it.
      help: a sentence.
      flag: the flag, without dashes; by default the field's name.
      aliases: other flags of the same field.
      choices: the words that are allowed, in the order of help; empty for any value.
      common: whether `--help` shows it, and not `--help-all` alone.
      spelling: how the value is written where it is no plain value.
      recorded: whether a recipe holds it. Paths of one run are not recorded.
      synonyms: other spellings of the choices, in small letters.
      elsewhere: words that another option takes -> what to give instead.
    """

    kind: type
    help: str
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    common: bool = False
    spelling: Spelling | None = None
    recorded: bool = True
    synonyms: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def word(self, text: str) -> str:
        """The choice that a text is a spelling of; the text itself where it is none."""
        small = text.strip().lower()
        word = self.synonyms.get(small, small)
        return word if word in self.choices else text


def option(default: Any, kind: type, help: str, **more: Any) -> Any:  # noqa: A002  the name of the attribute
    """A field of a settings class, with its default and what `Option` says of it."""
    return field(default=default, metadata={"option": Option(kind, help, **more)})


def option_of(one: "Field[Any]") -> Option | None:
    """The option of a field; None for a field that is no option."""
    return one.metadata.get("option")


def flag_of(one: "Field[Any]") -> str:
    """The flag of a field: `ratio_of` -> `--ratio-of`."""
    described = option_of(one)
    name = one.name if described is None or described.flag is None else described.flag
    return "--" + name.replace("_", "-")


# -------------------------------------------------------------------------------------------------------- spellings


# One way to write numbers with units: 5.4B, 5.4 b, 5_400_000_000, 5,400,000,000, 5.4e9. Bytes: 2GB, 2 gb, 2G, 2GiB.
_NUMBER = r"(\d[\d_]*|\d{1,3}(?:,\d{3})+)(\.\d+)?(e[+-]?\d{1,3})?"
# Longer texts are no numbers, and the pattern need not be tried on them.
_LONGEST = 60
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "b": 3, "t": 4, "p": 5}


def _quantity(text: str, units: str) -> tuple[float, str] | None:
    """The number and the unit, in small letters, of a text; None for another text."""
    match = re.fullmatch(rf"{_NUMBER}\s*({units})", text.strip().lower(), re.ASCII) if len(text) <= _LONGEST else None
    if match is None:
        return None
    return float(re.sub("[_,]", "", match[1]) + (match[2] or "") + (match[3] or "")), match[4]


def _count(text: str) -> float:
    match = _quantity(text, "[kmgbtp]?")
    if match is None or not isfinite(count := match[0] * 1000.0 ** _PREFIXES[match[1]]):
        raise ValueError("is not a number; expected 5.4B, 120M or 2e9, for example")
    return count


def read_bytes(text: str) -> int:
    """The number of bytes that a text stands for: 2GB and 2G are 2 · 10⁹, 2GiB is 2 · 2³⁰.

    Raises:
      ValueError: the text is no size; the message says what is expected.
    """
    match = _quantity(text, "[kmgtp](?:i?b)?|b")
    if match is None or not isfinite(match[0]):
        raise ValueError("is not a size; expected 2GB, 500MB or 1.5GiB, for example")
    base = 1024 if "i" in match[1] else 1000
    return round(match[0] * base ** (0 if match[1] == "b" else _PREFIXES[match[1][0]]))


def whole_number(text: str) -> int | None:
    """The whole number that a text stands for, written as 1024, 1_024, 1,024 or 1e3; None for another text."""
    match = _quantity(text.strip().removeprefix("-"), "")
    if match is None or not match[0].is_integer() or match[0] >= 2**63:
        return None
    plain = re.sub("[_,]", "", text.strip())
    return int(plain) if plain.removeprefix("-").isdecimal() else int(match[0]) * (-1 if plain[0] == "-" else 1)


def shard_size(text: str) -> str:
    """A size of files in the spelling that `convert.writer` takes: 2gb -> 2GB, 1.5GiB -> 1.610612736GB.

    Raises:
      ValueError: the text is no size.
    """
    count = read_bytes(text)
    if count < 1:
        raise ValueError("is no size of a file; expected 5GB or 500MB, for example")
    unit, size = next((one for one in (("GB", 10**9), ("MB", 10**6)) if count >= one[1]), ("KB", 1000))
    number = f"{Decimal(count) / size:f}"
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{unit}"


def _layers(text: str) -> tuple[int, int] | None:
    if text.strip() == "all":
        return None
    match = re.fullmatch(r"(\d{1,9}):(-?\d{1,9})", text.strip(), re.ASCII)
    if match is None:
        raise ValueError("is not a range; expected A:B, 4:30 for example, 4:-2 or all")
    return int(match[1]), int(match[2])


def _step(text: str) -> float | None:
    if text.strip() == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError("is not a number; expected 1e-3 for example, or auto") from None


# Other words for structures and factors. Each has one meaning here.
_SAME = {
    "head": "heads",
    "attention-heads": "heads",
    "attention_heads": "heads",
    "channel": "channels",
    "mlp-channels": "channels",
    "layer": "layers",
    "hidden-dimensions": "hidden",
    "magnitudes": "magnitude",
    "activations": "activation",
    "gradients": "gradient",
}


def _words(text: str) -> tuple[str, ...]:
    return same_words(re.split(r"\s*[,;+]\s*|\s+", text.strip().rstrip(",;+").strip()))


def same_words(words: Iterable[str]) -> tuple[str, ...]:
    """The words in the spelling of the settings: `Head` -> `heads`; other words unchanged."""
    known = {*_SAME.values()}
    small = [(word, word.strip().lower()) for word in words]
    return tuple(_SAME.get(low, low if low in known else word) for word, low in small)


COUNT = Spelling(_count, lambda count: count, "5.4B")
BYTES = Spelling(read_bytes, lambda size: size, "2GB")
LAYERS = Spelling(_layers, lambda layers: "all" if layers is None else f"{layers[0]}:{layers[1]}", "A:B")
STEP = Spelling(_step, lambda step: "auto" if step is None else step, "1e-3")
WORDS = Spelling(_words, list, "A,B")
SHARDS = Spelling(shard_size, lambda size: size, "5GB")
