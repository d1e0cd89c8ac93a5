"""`python -m minillm_jax` is `minillm-jax`."""

import sys
from contextlib import suppress
from pathlib import Path


def _leave_out_working_directory() -> None:
    """Remove the working directory from the import path, except in a checkout, where this package lies in it.

    `python -m` puts it before the installed packages, and a file `convert.py` in it would hide ours.
    """
    with suppress(OSError):  # the working directory no longer exists
        here = Path.cwd()
        if not sys.flags.safe_path and sys.path[0] == str(here) and here != Path(__file__).resolve().parents[1]:
            del sys.path[0]


if __name__ == "__main__":
    _leave_out_working_directory()

    from minillm_jax.cli import main

    main()
