"""The header of a GGUF file: metadata, and where each tensor lies. No tensor is read.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf` makes
one array for every string of a vocabulary, which takes seconds; tables of types and the decoding of quantised blocks
come from that package.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert import found
from minillm_jax.errors import InputError, reason

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32

# Number of a type of metadata -> format of `struct`. Strings (8) and arrays (9) have no fixed size.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# The name of one file of a model in several files: its stem, its number from 1, and how many there are.
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)

_INCOMPLETE = "the file ends too early; is the download complete?"


@dataclass(frozen=True)
class Entry:
    """A tensor in a GGUF file.

    Attributes:
      path: the file.
      offset: of its first byte.
      size: its bytes.
      type: name of its type, `F32` or `Q4_K` for example.
      shape: as NumPy and PyTorch write it; GGUF writes it in the other order.
    """

    path: Path
    offset: int
    size: int
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GgufFile:
    """The header of a model in one or several GGUF files.

    Attributes:
      path: the file, or the first of several.
      metadata: key -> value; an array is a list.
      entries: name of a tensor -> where it lies.
    """

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, Entry]

    @property
    def arch(self) -> str:
        """The architecture, `general.architecture`."""
        return str(self.metadata.get("general.architecture"))

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture, `attention.head_count` for example."""
        return self.metadata.get(f"{self.arch}.{key}", default)


def import_gguf(where: str | Path) -> Any:
    """The package `gguf`.

    Args:
      where: what needs it, for the message.

    Raises:
      InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(f'{where}: GGUF needs the package gguf; pip install "minillm-jax[gguf]"') from error
    return gguf


def open_gguf(path: Path) -> GgufFile:
    """The header of a model; of a model in several files (`…-00001-of-00003.gguf`), those of all.

    Raises:
      InputError: a file is missing, no whole GGUF file, or holds a type of tensors that `gguf` cannot decode.
    """
    first = _read(path)
    count = int(first.metadata.get("split.count") or 1)
    if count == 1:
        return first
    files = [_read(one) for one in _parts(path, count)]
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in entries:
                raise InputError(
                    f"{file.path}: tensor {name!r} is in {entries[name].path.name} too; remove one of them"
                )
            entries[name] = entry
    expected = files[0].metadata.get("split.tensors.count")
    if expected is not None and expected != len(entries):
        raise InputError(
            f"{files[0].path}: its {count} files hold {len(entries)} tensors, expected {expected}; are they of one "
            "model?"
        )
    return GgufFile(files[0].path, files[0].metadata, entries)


def _parts(path: Path, count: int) -> list[Path]:
    """The files of a model in several files."""
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise InputError(
            f"{path}: one of {count} files of a model, but it is not named like model-00001-of-{count:05d}.gguf; "
            "give the files the names that they had, or join them with llama-gguf-split --merge"
        )
    paths = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        raise InputError(
            f"{path}: one of {count} files of a model, and {missing[0]} is not beside it; download all files"
        )
    return paths


# ----------------------------------------------------------------------------------------------------------- header


def _read(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error


class _Reader:
    """Reads the header of one file; every read is checked against the size of the file."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._left = self._size = path.stat().st_size

    def header(self) -> GgufFile:
        if self._size < 4 or self._bytes(4) != MAGIC:
            raise self._error(found.file_content(self._path) or "not a GGUF file; is the download complete?")
        version = self._number("I")
        if version not in VERSIONS:
            swapped = "its bytes are in the big-endian order; " if version % 65536 == 0 else ""
            raise self._error(
                f"GGUF version {version}, expected 2 or 3; {swapped}convert the model again with llama.cpp"
            )
        tensor_count, key_count = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(key_count):
            key = self._string()
            metadata[key] = self._value(self._number("I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._error(f"general.alignment must be a whole number from 1, found {alignment!r}")
        start = -(-(self._size - self._left) // alignment) * alignment
        return GgufFile(self._path, metadata, self._entries(infos, start))

    def _entries(self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int) -> dict[str, Entry]:
        gguf, entries = import_gguf(self._path), {}
        for name, shape, number, offset in infos:
            if name in entries:
                raise self._error(f"tensor {name!r} is listed twice; convert the model again")
            kind = self._type(gguf, number, name)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise self._error(f"tensor {name!r} of shape {shape} cannot be {kind.name}, in blocks of {block}")
            count = int(np.prod(shape, dtype=object)) // block * size
            if start + offset + count > self._size:
                raise self._error(f"{_INCOMPLETE} (tensor {name!r} ends after it)")
            entries[name] = Entry(self._path, start + offset, count, kind.name, shape)
        return entries

    def _type(self, gguf: Any, number: int, name: str) -> Any:
        """The type of a tensor, one that `gguf` decodes."""
        known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
        kind = known.get(number)
        if kind is None or not _decodes(gguf, kind):
            words = f"number {number}" if kind is None else kind.name
            raise self._error(
                f"tensor {name!r} has a type that is not supported ({words}); convert the model to F16 or Q8_0 with "
                "llama.cpp"
            )
        return kind

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of a tensor."""
        name, dimensions = self._string(), self._number("I")
        if dimensions > 8:
            raise self._error(f"tensor {name!r} has {dimensions} axes; the file is damaged")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in _NUMBERS:
                width = struct.calcsize(f"<{_NUMBERS[inner]}")
                return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self._bytes(count * width)))
            if count > self._left:
                raise self._error(_INCOMPLETE)
            return [self._value(inner) for _ in range(count)]
        raise self._error(f"metadata of the unknown type {kind}; the file is damaged, or newer than this reader")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        data = self._bytes(self._number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"a name in the header is no text ({data[:20]!r}); the file is damaged") from error

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise self._error(_INCOMPLETE)
        self._left -= count
        data = self._file.read(count)
        if len(data) < count:
            raise self._error("the file has become shorter while it was read")
        return data

    def _error(self, words: str) -> InputError:
        return InputError(f"{self._path}: {words}")


def _decodes(gguf: Any, kind: Any) -> bool:
    """Whether the package `gguf` decodes a type, which it says only by trying."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True
