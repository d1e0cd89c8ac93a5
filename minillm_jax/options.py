"""Settings as data: a field of a settings class is a flag, a recipe key, a default and a sentence of help."""

import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field
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
    """

    kind: type
    help: str
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    common: bool = False
    spelling: Spelling | None = None
    recorded: bool = True


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


def _count(text: str) -> float:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgbt]?)", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError("is not a number; expected 5.4B or 120M, for example")
    return float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}[match[2].lower()]


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]?)b", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError("is not a size; expected 2GB or 500MB, for example")
    return round(float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " "))


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


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


COUNT = Spelling(_count, lambda count: count, "5.4B")
BYTES = Spelling(_bytes, lambda size: size, "2GB")
LAYERS = Spelling(_layers, lambda layers: "all" if layers is None else f"{layers[0]}:{layers[1]}", "A:B")
STEP = Spelling(_step, lambda step: "auto" if step is None else step, "STEP")
WORDS = Spelling(_words, list, "A,B")
