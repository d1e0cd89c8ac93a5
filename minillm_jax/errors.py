"""InputError, the exception for bad input; InputWarning, for input that is usable but surprising; message helpers."""

import re
import traceback
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TypeVar

Result = TypeVar("Result")


class InputError(ValueError):
    """An argument, a file or a setting of the user is not usable.

    The message is one sentence: what, where, expected and found, what to do. The command line prints the message and
    exits with status 2. No output is written before the error.
    """


class InputWarning(UserWarning):
    """A run goes on, but otherwise than its input suggests. The message is one sentence, as for `InputError`.

    The command line prints it on standard error.
    """


def warn(sentence: str) -> None:
    """Issues an `InputWarning`."""
    warnings.warn(InputWarning(sentence), stacklevel=3)


def cause(error: BaseException) -> str:
    """The message of another library's exception, on one line; the name of its class if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def one_of(what: str, name: str, known: Iterable[str]) -> None:
    """Checks that a name is known.

    Args:
      what: the noun for the name in the message.
      name: the name to check.
      known: the known names.

    Raises:
      InputError: the name is unknown.
    """
    words = list(known)
    if name not in words:
        near = get_close_matches(str(name).lower(), words, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"unknown {what} {shortened(str(name))!r}; expected one of {', '.join(words)}{hint}")


def shortened(text: str, most: int = 60) -> str:
    """A text cut to at most `most` characters, for a message."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def reason(error: BaseException, most: int = 200) -> str:
    """The reason inside another library's exception, in a few words.

    The reason of an error of the system is its text without number and path. TensorStore and Orbax name the reason last
    and list their settings behind it.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = re.split(r" \[\w+(?:\[\d+\])?=| \[source locations", cause(error), maxsplit=1)[0]
    if re.match(r"[A-Z_]+: ", text) or text.startswith("Error while serializing: "):
        text = re.sub(r" \(os error \d+\)$", "", text.split(": ")[-1])
    return shortened(text.split(". ")[0], most)


def size_text(size: int) -> str:
    """A number of bytes for a message: `512 kB`, `1.5 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


class LastSteps:
    """The steps after the expensive result is saved: a failure of one does not keep the others from running.

    Args:
      saved: the clause that says what is saved.
    """

    def __init__(self, saved: str) -> None:
        self._saved, self._missing = saved, list[tuple[str, Exception]]()

    def attempt(self, missing: str, step: Callable[[], Result]) -> Result | None:
        """The result of a step; None if it fails.

        Args:
          missing: the clause that says what is missing then.
          step: the step.
        """
        try:
            return step()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they would keep arrays of the step in memory
            self._missing.append((missing, error))
            return None

    def check(self) -> None:
        """Checks that no step has failed.

        Raises:
          InputError: one has; the message says what is saved and what is missing.
        """
        if self._missing:
            reasons = ", ".join(f"{what} ({shortened(cause(error), 300)})" for what, error in self._missing)
            raise InputError(f"{self._saved}, but {reasons}") from self._missing[0][1]
