"""A GGUF file as a model folder: config.json and tokenizer files made from its metadata, and a link to it."""

import atexit
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from convert import companions, gguf_config, gguf_file, gguf_tokenizer
from convert.gguf_read import WEIGHTS
from minillm_jax.errors import InputError, cause


def unpack(path: Path) -> Path:
    """The folder of a GGUF file: its config.json and tokenizer as files, and a link to it under the name `WEIGHTS`.

    The folder lies among the temporary files, and is removed as the process ends. The same file gives the same folder.

    Raises:
      InputError: the file is no whole GGUF file, or of an architecture or with a setting that is not supported.
    """
    stamp = path.stat()
    return _unpack(path.absolute(), stamp.st_size, stamp.st_mtime_ns)


@cache
def _unpack(path: Path, size: int, changed: int) -> Path:
    file = gguf_file.open_gguf(path)
    config = gguf_config.to_hugging_face(file)
    try:
        root = Path(tempfile.mkdtemp(prefix="minillm-jax-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        folder = root / path.name  # messages name the folder
        folder.mkdir()
        (folder / WEIGHTS).symlink_to(file.path.absolute())
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        record = path.with_name("pruning.json")
        if path.name == WEIGHTS and record.is_file():  # a folder that this package has written
            companions.copy(path.parent, folder)
            shutil.copyfile(record, folder / record.name)
    except OSError as error:
        raise InputError(f"{path}: its files cannot be written to {tempfile.gettempdir()} ({cause(error)})") from error
    gguf_tokenizer.write_files(file, folder)
    return folder


def single_file(folder: Path) -> Path | None:
    """The GGUF file of a folder without config.json that holds one model in this format; None for another folder."""
    if os.path.lexists(folder / "config.json"):
        return None
    names = sorted(path.name for path in folder.glob("*.gguf"))
    first = [name for name in names if "-of-" not in name or "-00001-of-" in name]
    return folder / first[0] if len(first) == 1 else None


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == gguf_file.MAGIC
    except OSError:
        return False
