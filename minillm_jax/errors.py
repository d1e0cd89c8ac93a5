"""The one exception a user of the package is meant to see."""

from collections.abc import Iterable


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message is one sentence: what, where, expected and found, what to do. The command line prints it as it
    stands and exits with status 2; nothing has been written by then.
    """


def cause(error: BaseException) -> str:
    """What another library's exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def one_of(what: str, name: str, known: Iterable[str]) -> None:
    """Whether a name is one of those that are known.

    Raises:
      InputError: it is not.
    """
    if name not in known:
        raise InputError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")
