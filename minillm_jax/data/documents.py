"""Documents of a file, a Hub data set or Python objects, streamed block by block; arrays of token ids."""

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from io import IOBase
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from minillm_jax.data import chat, formats, rows
from minillm_jax.errors import InputError, cause, shortened, warn
from minillm_jax.paths import local_path

FIELD = "text"
GIVEN = "the given data"

# Characters that are read of a Hub data set, which may be larger than the disk.
HUB_CHARACTERS = 20_000_000

# Words of a name that is taken for a text; a file of that name may exist all the same.
WORDS_OF_A_TEXT = 4

# Characters of a name in an error. The end of a path matters more than the line's length.
LONGEST_NAME = 250


class Block(NamedTuple):
    """A document, or a part of one.

    Attributes:
      document: number of the document; blocks of one number follow each other.
      text: its next characters.
      by_template: whether a chat template wrote the document, so that it marks its beginning and its end itself.
      responses: the responses in the text of a conversation, see `chat.Written`; None for another text.
    """

    document: int
    text: str
    by_template: bool = False
    responses: tuple[chat.Span, ...] | None = None


@dataclass(frozen=True)
class Opened:
    """A text that is ready to be read, once.

    Attributes:
      source: path, Hub id or description of the data, for errors and records.
      content: its documents, or token ids.
    """

    source: str
    content: Iterator[Block] | Integer[np.ndarray, " tokens"]


def open_data(data: Any, field: str = FIELD, write: chat.Writer = chat.plainly) -> Opened:
    """Everything that may be given as a text, ready to be read.

    Args:
      data: a path or the id of a Hub data set; or texts, rows of text or of conversations, token ids, or lists of
        token ids.
      field: name of the field that holds the text of a row. The default is also a row's choice: rows without it may
        hold conversations (`data.chat`).
      write: the text of a conversation.

    Raises:
      InputError: the data are of another kind, or cannot be read.
    """
    if isinstance(data, str | Path):
        return _open_source(data, field, write)
    if isinstance(data, bytes | Mapping | Set | IOBase) or not hasattr(data, "__iter__"):
        raise InputError(f"expected {EXPECTED}, found {_described(data)}")
    if hasattr(data, "__array__"):
        data = np.asarray(data)
        if np.issubdtype(data.dtype, np.number) or data.dtype == bool or data.ndim != 1:
            return Opened(GIVEN, check_ids(data, GIVEN))
        data = data.tolist()
    remaining = iter(data)
    first = next(remaining, "")
    everything = chain([first], remaining)
    if isinstance(first, str | Mapping):
        found = ((f"text {number} of {GIVEN}", row) for number, row in enumerate(everything))
        return Opened(GIVEN, _blocks(found, field, write))
    return Opened(GIVEN, _given_ids(list(everything)))


EXPECTED = "a path, a Hub data set, a list of texts, or an array of token ids"


def _described(data: Any) -> str:
    return f"{type(data).__name__} {shortened(repr(data), 40)}"


def _given_ids(data: list[Any]) -> Integer[np.ndarray, " tokens"]:
    """The token ids of a list of ids, or of a list of lists or arrays of ids."""
    parts = [data] if all(isinstance(one, int | np.integer) for one in data) else data
    try:
        arrays = [np.asarray(part) for part in parts]
    except ValueError as error:
        raise InputError(f"{GIVEN}: expected texts or token ids, found lists of unequal lists") from error
    for array in arrays:
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{GIVEN}: expected texts or token ids, found {_described(array.reshape(-1).tolist()[0])}")
    return check_ids(np.concatenate([array.reshape(-1) for array in arrays if array.size] or [np.zeros(0)]), GIVEN)


def check_ids(ids: np.ndarray, source: str) -> Integer[np.ndarray, " tokens"]:
    """Token ids in one row.

    Raises:
      InputError: they are not whole numbers, or none.
    """
    if not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise InputError(f"{source}: expected whole-number token ids, found {ids.dtype} of shape {ids.shape}")
    return ids.reshape(-1)


# --------------------------------------------------------------------------------------------------- files and Hub


def _open_source(source: str | Path, field: str, write: chat.Writer) -> Opened:
    path = local_path(source, "text", hub=True)
    if not os.path.exists(path):  # noqa: PTH110  Path.exists raises for a name that is too long
        return Opened(str(source), _hub_blocks(str(source), field, HUB_CHARACTERS, write))
    kind = formats.kind_of(path)
    if kind == "ids":
        return Opened(str(source), _read_ids(path))
    if kind == "text" and field != FIELD:
        warn(f"{path}: plain text has no fields; the field {field!r} is not used for it")
    return Opened(str(source), _file_blocks(path, kind, field, write))


def check_source(source: str | Path, field: str = FIELD, most: int | None = None) -> None:
    """Checks a file by reading it once, without a model; of the id of a Hub data set, that it could be one.

    Args:
      source: as in `open_data`.
      field: name of the field that holds the text of a row.
      most: number of characters after which no more is read; None to read all.

    Raises:
      InputError: the file is missing, unreadable, empty or of an unknown format, or a row has no such field.
    """
    if not os.path.exists(local_path(source, "text", hub=True)):  # noqa: PTH110  see _open_source
        _hub_parts(str(source))
        return
    opened = open_data(source, field)
    if isinstance(opened.content, np.ndarray):
        if opened.content.min() < 0:
            raise InputError(f"{source}: token ids must be at least 0, found {opened.content.min()}")
        return
    characters, blank = 0, True
    for block in opened.content:
        characters, blank = characters + len(block.text), blank and not block.text.strip()
        if most is not None and characters >= most:
            return
    if blank:
        raise no_text(str(source))


def no_text(source: str) -> InputError:
    """The error of a text without a character that is no space."""
    return InputError(f"{source}: there is no text in it")


def read_blocks(source: str | Path, field: str = FIELD, hub_characters: int = HUB_CHARACTERS) -> Iterator[Block]:
    """The documents of a file of text (plain text is one document) or of a Hub data set, in blocks.

    Conversations are written without a chat template.

    Args:
      source: as in `open_data`.
      field: name of the field that holds the text of a row.
      hub_characters: number of characters after which a Hub data set is read no further.

    Raises:
      InputError: the source is missing or in an unknown format, or a row has no such field.
    """
    path = local_path(source, "text", hub=True)
    if not os.path.exists(path):  # noqa: PTH110  see _open_source
        return _hub_blocks(str(source), field, hub_characters, chat.plainly)
    return _file_blocks(path, formats.kind_of(path), field, chat.plainly)


def _file_blocks(path: Path, kind: str, field: str, write: chat.Writer) -> Iterator[Block]:
    with formats.reading(path):
        if kind == "parquet":
            yield from _blocks(rows.parquet_rows(path, partial(_columns, path, field)), field, write)
        elif kind == "json":
            with formats.open_text(path, "\n") as stream:
                yield from _blocks(rows.json_rows(stream, str(path)), field, write)
        elif kind in ("csv", "tsv"):
            with formats.open_text(path, "") as stream:
                read = rows.csv_rows(stream, {"csv": ",", "tsv": "\t"}[kind], str(path))
                yield from _blocks(read, field, write)
        else:
            with formats.open_text(path, None) as stream:
                while text := stream.read(rows.BLOCK):
                    formats.check_no_nul(text, path)
                    yield Block(0, text)


def _columns(path: Path, field: str, names: list[str]) -> list[str]:
    """The fields of a Parquet file that hold its text."""
    form = chat.form_of_fields(names, field, field != FIELD)
    if not all(name in names for name in form.fields):
        raise InputError(rows.missing_field(field, names, str(path)))
    return [*form.fields, *(name for name in form.optional if name in names)]


def _blocks(found: Iterable[rows.Row], field: str, write: chat.Writer) -> Iterator[Block]:
    """The texts of rows, all of the form of the first; rows without a character are left out."""
    number, form = 0, None
    for where, row in found:
        if form is None:
            form = chat.form_of(row, field, field != FIELD)
        if form.kind == chat.TEXT:
            written = chat.Written(rows.text_of(row, field, where), by_template=False)
        else:
            conversation = chat.read(row, form, where)
            written = None if conversation is None else write(conversation, where)
        if written is not None and written.text.strip():
            yield Block(number, *written)
            number += 1


def _read_ids(path: Path) -> Integer[np.ndarray, " tokens"]:
    """The token ids of a file, which stay on the disk until they are read."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a NumPy array of token ids ({cause(error)})") from error
    return check_ids(ids, str(path))


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a Hub data set.

    Raises:
      InputError: the source cannot be one, or `datasets` is not installed.
    """
    name, _, split = source.partition(":")
    parts = name.split("/")
    suffixes = {*formats.KINDS, *formats.COMPRESSED}
    if not 2 <= len(parts) <= 3 or not all(parts) or name[0] in "./~" or Path(name).suffix.lower() in suffixes:
        raise _no_file(source)
    if any(character.isspace() for character in source):
        raise _no_file(source)
    _import_datasets(source)
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"


def _import_datasets(source: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        name = shortened(source, LONGEST_NAME)
        raise InputError(
            f"{name}: no such file, and Hub data sets need the data extra: pip install 'minillm-jax[data]'"
        ) from error
    return datasets


def _no_file(source: str) -> InputError:
    if "\n" in source.strip() or len(source.split()) > WORDS_OF_A_TEXT:
        text = shortened(" ".join(source.split()))
        return InputError(
            f"{text!r} is no file: expected the name of one and not the text itself; in Python, give texts as a list"
        )
    name = shortened(source, LONGEST_NAME)
    if not Path(source).is_absolute():
        try:
            Path.cwd()
        except OSError:
            return InputError(f"{name}: no such file, because the working directory was deleted; change to another one")
    return InputError(f"{name}: no such file; give {formats.EXPECTED}, or a Hub data set")


def _hub_blocks(source: str, field: str, limit: int, write: chat.Writer) -> Iterator[Block]:
    name, config, split = _hub_parts(source)
    characters = 0
    try:
        streamed = _import_datasets(source).load_dataset(name, config, split=split, streaming=True)
        numbered = ((f"{source}: row {number}", row) for number, row in enumerate(streamed, 1))
        for block in _blocks(numbered, field, write):
            yield block
            characters += len(block.text)
            if characters >= limit:
                return
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # the Hub client raises many types
        name, why = shortened(source, LONGEST_NAME), shortened(cause(error), 120)
        raise InputError(f"{name}: no such file, and the Hub could not provide it ({why})") from error
