"""The one exception a user of the package is meant to see."""


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message is one sentence: what, where, expected and found, what to do. The command line prints it as it
    stands and exits with status 2; nothing has been written by then.
    """
