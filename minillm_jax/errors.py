"""InputError, the exception for bad input; InputWarning, for input that is usable but surprising; message helpers."""

import warnings
from collections.abc import Iterable


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
    """Issues an `InputWarning`. Python shows equal warnings of one line once."""
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
    if name not in known:
        raise InputError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")


def shortened(text: str, most: int = 60) -> str:
    """A text cut to at most `most` characters, for a message."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
