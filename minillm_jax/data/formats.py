"""What a file of text holds: its content decides, and its name where the content leaves a choice.

A file is never read as plain text for want of a better guess: JSON documents and binary data are told apart from it.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minillm_jax.errors import InputError, cause, warn

KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".npy": "ids",
}
COMPRESSED = (".gz", ".zst")
EXPECTED = "a text, .json, .jsonl, .csv or .parquet file, or a .npy file of token ids"

# Bytes at the beginning of a file from which its kind is found.
HEAD = 2**16

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_KNOWN = {b"PAR1": "parquet", b"\x93NUMPY": "ids"}
_REFUSED = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF-": "a PDF document",
    b"ARROW1\0\0": "an Arrow file",
    b"\x80\x02": "a pickle, which may run code",
    b"\x80\x03": "a pickle, which may run code",
    b"\x80\x04": "a pickle, which may run code",
    b"\x80\x05": "a pickle, which may run code",
    b"\xff\xfe": "text in UTF-16, not UTF-8",
    b"\xfe\xff": "text in UTF-16, not UTF-8",
}


def kind_of(path: Path) -> str:
    """What a file holds: `text`, `json`, `csv`, `tsv`, `parquet` or `ids`.

    Raises:
      InputError: the file cannot be read, or holds none of these; or plain text is expected and JSON is found.
    """
    if not os.path.isfile(path):  # noqa: PTH113  Path.is_file raises for a name that is too long
        kind = "a folder" if path.is_dir() else "no regular file"
        raise InputError(f"{path}: {kind}; expected {EXPECTED}")
    with reading(path), _open_bytes(path) as stream:
        head = stream.read(HEAD)
    suffix = _suffix(path)
    named = KINDS.get(suffix)
    for magic, kind in _KNOWN.items():
        if head.startswith(magic):
            return _uncompressed(path, kind)
    if named in ("parquet", "ids"):
        _check_archive(head, path)
        return named  # whose reader says what is wrong
    _check_text(head, path)
    if named in ("json", "csv", "tsv"):
        return named
    if _holds_json(head):
        if named == "text":
            raise InputError(
                f"{path}: a {suffix} file is read as plain text, but this one holds JSON documents; name it "
                f"{path.name.split('.')[0]}.jsonl to read a field of them, or write their text alone to the file"
            )
        return "json"
    if named is None and suffix:
        warn(f"{path}: read as plain text, because {suffix} is no known suffix; expected {EXPECTED}")
    return "text"


def _suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def _uncompressed(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        if _compression(file.read(len(_ZSTD))):
            raise InputError(f"{path}: a compressed {'parquet' if kind == 'parquet' else '.npy'} file; unpack it first")
    return kind


def _check_archive(head: bytes, path: Path) -> None:
    if head.startswith(b"PK\x03\x04"):
        raise InputError(f"{path}: not a NumPy array of token ids but an archive of several arrays")


def _check_text(head: bytes, path: Path) -> None:
    for magic, words in _REFUSED.items():
        if head.startswith(magic):
            raise InputError(f"{path}: {words}; expected {EXPECTED}")
    check_no_nul("\0" if b"\0" in head else "", path)


def check_no_nul(text: str, path: Path) -> None:
    """Checks that there is no NUL character in a text.

    Raises:
      InputError: there is one.
    """
    if "\0" in text:
        raise InputError(f"{path}: not UTF-8 text but binary data (it has NUL bytes); expected {EXPECTED}")


_OBJECT = re.compile(r'\{\s*("(?:[^"\\]|\\.)*"\s*:|\})')
_LIST = re.compile(r'\[\s*(\{\s*"|"(?:[^"\\]|\\.)*"\s*[,\]])')


def _holds_json(head: bytes) -> bool:
    """Whether the beginning of a text is that of JSON documents: objects, or a list of objects or texts."""
    text = head.decode("utf-8-sig", errors="ignore").lstrip()
    if not (_OBJECT.match(text) or _LIST.match(text)):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return len(head) == HEAD  # the first document is longer than the head
    except RecursionError:
        return True
    rest = text[end:].lstrip()
    return not rest or (text[0] == "{" and rest[0] == "{")


# --------------------------------------------------------------------------------------------------------- reading


@contextmanager
def open_text(path: Path, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """The text of a file, unpacked where it is compressed, read as UTF-8.

    Args:
      path: the file.
      newline: line ends, as in `open`.
    """
    packed: Any = _open_bytes(path)
    with packed as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline) as text:
        yield text


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the errors of reading a file into one sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        before = error.object[max(0, error.start - 20) : error.start].decode(errors="replace")
        where = f" after {before!r}" if before else ""
        raise InputError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x}{where}); save it as UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cannot be unpacked ({cause(error)}); is it complete?") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({cause(error)})") from error


def _compression(head: bytes) -> str | None:
    if head.startswith(_GZIP):
        return "gzip"
    return "zstd" if head.startswith(_ZSTD) else None


def _open_bytes(path: Path) -> io.BufferedIOBase:
    """The bytes of a file, unpacked where they are compressed by gzip or zstd, whatever its name."""
    with path.open("rb") as file:
        compression = _compression(file.read(len(_ZSTD)))
    if compression == "gzip":
        return gzip.open(path, "rb")
    return path.open("rb") if compression is None else _open_zstd(path)


def _open_zstd(path: Path) -> io.BufferedIOBase:
    try:
        import zstandard  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise InputError(
            f"{path}: compressed by zstd, which needs the data extra: pip install 'minillm-jax[data]'"
        ) from error

    class Frames(io.RawIOBase):
        """The unpacked bytes of all frames. The readers of `zstandard` take a cut frame for a complete one."""

        def __init__(self) -> None:
            self._file = path.open("rb")
            self._frame: Any = None
            self._ready = memoryview(b"")

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._ready:
                following = self._frame is None or self._frame.eof
                packed = (following and self._frame and self._frame.unused_data) or self._file.read(2**16)
                if not packed and following:
                    return 0
                if not packed:
                    raise EOFError("the compressed file ends within a frame")
                if following:
                    self._frame = zstandard.ZstdDecompressor().decompressobj()
                frame: Any = self._frame
                try:
                    self._ready = memoryview(frame.decompress(packed))
                except zstandard.ZstdError as error:
                    raise EOFError(cause(error)) from error
            count = min(len(buffer), len(self._ready))
            buffer[:count], self._ready = self._ready[:count], self._ready[count:]
            return count

        def close(self) -> None:
            self._file.close()
            super().close()

    return io.BufferedReader(Frames())
