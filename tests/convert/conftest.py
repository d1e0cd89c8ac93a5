"""Folders that the tests of reading and of conversion share."""

import shutil
from pathlib import Path

import pytest

from tests.helpers import hugging_face_folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama."""
    return hugging_face_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture
def folder(dense: Path, tmp_path: Path) -> Path:
    """A copy of the dense folder that a test may change."""
    return Path(shutil.copytree(dense, tmp_path / "model"))
