"""The work folder of a job: finished parts of its work, each written whole or not at all.

A killed job leaves its work folder behind, and the same command goes on from the parts in it. Process 0 reads and
writes the folder and sends what it reads to the other processes, so that only process 0 needs the disk.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minillm_jax.devices import hosts
from minillm_jax.errors import InputError, reason
from minillm_jax.paths import absolute_path

MANIFEST = "manifest.json"


class Part(NamedTuple):
    """A finished part of a job.

    Attributes:
      arrays: on the host, by name.
      note: anything that JSON holds; infinite numbers too.
    """

    arrays: dict[str, np.ndarray]
    note: dict[str, Any]


@dataclass(frozen=True)
class WorkFolder:
    """The folder of one job. It is created with the first part that is written.

    Attributes:
      folder: absolute.
      identity: whatever decides the results of the job, by name. A folder with another identity is refused.
      job: the noun for the job in messages, `a pruning`.
      prefix: begins the names of all parts.
    """

    folder: Path
    identity: Mapping[str, Any]
    job: str
    prefix: str = ""

    @classmethod
    def of(cls, folder: str | Path, identity: Mapping[str, Any], job: str) -> "WorkFolder":
        """The work folder at a path, after a check that it belongs to the job if it exists.

        Raises:
          InputError: the folder belongs to another job, or is none.
        """
        opened = cls(absolute_path(folder, "work folder"), dict(identity), job)
        hosts.decide(opened._check)
        return opened

    def within(self, name: str) -> "WorkFolder":
        """The same folder for the parts of one stage of the job."""
        return WorkFolder(self.folder, self.identity, self.job, f"{self.prefix}{name}-")

    def subfolder(self, name: str) -> Path:
        """A folder in it for the state of one stage, created by the stage."""
        self._begin()
        return self.folder / name

    def read(self, name: str) -> Part | None:
        """A part; None if it is not finished. All processes must call it.

        Raises:
          InputError: the file is damaged.
        """
        found: list[Part | None] = [None]

        def arrays() -> dict[str, np.ndarray]:
            found[0] = self._read(name)
            return {} if found[0] is None else found[0].arrays

        received = hosts.of_first(arrays)
        note = hosts.agree("null" if found[0] is None else json.dumps(found[0].note))
        return None if note == "null" else Part(received, json.loads(note))

    def write(self, name: str, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> None:
        """Writes a part. All processes must call it; those beside process 0 write nothing.

        Raises:
          InputError: it cannot be written, for example on a full disk.
        """
        hosts.decide(lambda: self._write(name, arrays, note))

    def remove(self) -> None:
        """Removes the folder with all its parts, in process 0."""
        if hosts.is_writer():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.prefix}{name}.safetensors"

    def _check(self) -> None:
        try:
            stored = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise InputError(f"{self.folder}: the folder holds something else than {self.job}; remove it") from None
            return
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}: no work folder of {self.job} ({reason(error)}); remove it") from error
        for name, expected in json.loads(json.dumps(self.identity)).items():
            if stored.get(name) != expected:
                raise InputError(
                    f"{self.folder}: holds an unfinished job, {self.job} with another {name} ({stored.get(name)}, not "
                    f"{expected}); remove the folder to begin anew, or choose another output"
                )

    def _read(self, name: str) -> Part | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy", backend="pread") as file:
                note = json.loads((file.metadata() or {})["note"])
                return Part({key: file.get_tensor(key) for key in file.keys()}, note)  # noqa: SIM118  not a dictionary
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not a whole part of {self.job} ({reason(error)}); remove the file") from error

    def _write(self, name: str, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any]) -> None:
        # safetensors writes wrong data of an array that is not contiguous.
        whole = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        self._begin()
        try:
            _write_whole(self._path(name), save(whole, {"note": json.dumps(dict(note))}))
        except OSError as error:
            raise self._unwritable(error) from error

    def _begin(self) -> None:
        """Creates the folder with its manifest."""
        if (self.folder / MANIFEST).exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(self.folder / MANIFEST, json.dumps(dict(self.identity), indent=1).encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.folder}: the work folder cannot be written ({reason(error)})")


def computed_once(work: WorkFolder | None, name: str, compute: Callable[[], Part]) -> Part:
    """A part from the work folder; computed and written there if it is not finished, or computed without a folder."""
    part = None if work is None else work.read(name)
    if part is None:
        part = compute()
        if work is not None:
            work.write(name, *part)
    return part


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is on the disk before it gets its name."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
