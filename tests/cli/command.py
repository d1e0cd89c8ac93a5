"""The console command, run in the process of the tests."""

import sys
from collections.abc import Sequence

import pytest

from minillm_jax import cli


def call(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[object]) -> int:
    """The exit status of the console command."""
    monkeypatch.setattr(sys, "argv", ["minillm-jax", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
