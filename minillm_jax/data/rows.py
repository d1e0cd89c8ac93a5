"""Rows of JSON, CSV and Parquet files, read one after another, and the text of a row."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOBase
from itertools import chain
from pathlib import Path
from typing import Any

from minillm_jax.errors import InputError, cause, shortened

# Characters that are read at a time.
BLOCK = 2**20

# Fields that an error names.
NAMED_FIELDS = 8

# The rows that are read without a field of text (`data.chat`), for errors.
CHAT_ROWS = "or give rows with messages, with prompt and response, or with instruction and output"

_SPACE = re.compile(r"[ \t\r\n]*")

# Where a row stands, for errors, and the row.
Row = tuple[str, Any]


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row: the row itself, or its field; the empty text where the field is null.

    Args:
      row: a text, or an object whose field holds a text.
      field: name of the field.
      where: file and line, for errors.

    Raises:
      InputError: the row has no such field, or there is something else in it.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected a text, or an object with a field {field!r}, found {kind_of_value(row)}")
    if field not in row:
        raise InputError(missing_field(field, row, where))
    if row[field] is None:
        return ""
    if not isinstance(row[field], str):
        raise InputError(f"{where}: the field {field!r} holds {kind_of_value(row[field])}, expected a text")
    return row[field]


def missing_field(field: str, found: Iterable[Any], where: str) -> str:
    """The sentence for rows without the field."""
    return f"{where}: expected a field {field!r}, found {named(found)}; name one with --field, {CHAT_ROWS}"


def named(fields: Iterable[Any]) -> str:
    """The first names of fields in quotes, and the number of the others; `none` without one."""
    names = [repr(shortened(str(name), 30)) for name in fields]
    more = f" and {len(names) - NAMED_FIELDS} more" if len(names) > NAMED_FIELDS else ""
    return (", ".join(names[:NAMED_FIELDS]) or "none") + more


def kind_of_value(value: Any) -> str:
    """What a value is, in a word that people who write JSON know."""
    kinds = (
        (str, "a text"),
        (bool, "true or false"),
        (int | float, "a number"),
        (list | tuple, "a list"),
        (Mapping, "an object"),
    )
    return "null" if value is None else next((word for kind, word in kinds if isinstance(value, kind)), "another value")


# ------------------------------------------------------------------------------------------------------------ JSON


def json_rows(stream: TextIOBase, name: str) -> Iterator[Row]:
    """The rows of a JSON file: the elements of a list, or one object a line, or one object.

    Args:
      stream: the text, whose lines end with line feeds.
      name: of the file, for errors.

    Raises:
      InputError: the text is not JSON.
    """
    number, first = 1, stream.read(1)
    while first.isspace():
        number += first == "\n"
        first = stream.read(1)
    if first == "[":
        return _list_rows(stream, name, number)
    return _line_rows(stream, first + stream.readline(), name, number)


def _line_rows(stream: TextIOBase, first: str, name: str, number: int) -> Iterator[Row]:
    for offset, line in enumerate(chain([first], stream)):
        where = f"{name}: line {number + offset}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if offset or not _is_cut(error, line.rstrip()):
                raise _not_json(error, where) from error
            row = _whole(line + stream.read(), name)  # one object over several lines
        yield where, row


def _whole(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        number = getattr(error, "lineno", 1)
        raise _not_json(error, f"{name}: line {number}") from error


def _list_rows(stream: TextIOBase, name: str, number: int) -> Iterator[Row]:
    """The elements of a list, whose opening bracket is read already, block by block."""
    text, at, wanted = "", 0, "value or ]"
    while True:
        more = stream.read(max(BLOCK, len(text) - at))
        text, at = text[at:] + more, 0
        while True:
            gap = _SPACE.match(text, at)
            assert gap is not None, "it may be empty"
            number, at = number + text.count("\n", at, gap.end()), gap.end()
            where = f"{name}: line {number}"
            if at == len(text):
                break
            if text[at] == "]" and wanted != "value":
                return _check_end(text[at + 1 :] + stream.read(BLOCK), where)
            if wanted == ", or ]":
                if text[at] != ",":
                    raise InputError(f"{where} is not JSON (expected a comma or the end of the list)")
                at, wanted = at + 1, "value"
                continue
            try:
                row, end = json.JSONDecoder().raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if more and _is_cut(error, text):
                    break
                raise _not_json(error, where) from error
            yield where, row
            number, at, wanted = number + text.count("\n", at, end), end, ", or ]"
        if not more:
            raise InputError(f"{name}: line {number} is not JSON (the list has no end)")


def _check_end(rest: str, where: str) -> None:
    if rest.strip():
        raise InputError(f"{where} is not JSON (more follows the list); expected one list, or one object a line")


def _is_cut(error: Exception, text: str) -> bool:
    """Whether the rest of a value may follow the text: the error lies at its end, or in a string without an end."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated") or error.pos >= len(text) - len("\\uXXXX")


def _not_json(error: Exception, where: str) -> InputError:
    return InputError(f"{where} is not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else cause(error)})")


# ------------------------------------------------------------------------------------------------- CSV and Parquet


def csv_rows(stream: TextIOBase, delimiter: str, name: str) -> Iterator[Row]:
    """The rows of a CSV file, by the names of its header.

    Args:
      stream: the text, with its line ends as they are.
      delimiter: a comma or a tab.
      name: of the file, for errors.

    Raises:
      InputError: a row is not as wide as the header, or a quotation has no end.
    """
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    with _long_fields():
        while True:
            where = f"{name}: line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise InputError(f"{where} cannot be read as CSV ({cause(error)})") from error
            if cells is None:
                return
            if header is None:
                header = cells or None
            elif len(cells) == len(header):
                yield where, dict(zip(header, cells, strict=True))
            elif cells:
                raise InputError(f"{where} has {len(cells)} cells, but the header has {len(header)}")


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lets a cell be longer than the 131,072 characters that the csv module allows."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def parquet_rows(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[Row]:
    """The rows of a Parquet file, with some of its fields.

    Args:
      path: the file.
      choose: names of all fields -> those to read; raises an InputError where the needed ones are missing.

    Raises:
      InputError: pyarrow is not installed, the file is damaged, or the fields are missing.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: parquet needs the data extra: pip install 'minillm-jax[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1024, columns=choose(file.schema_arrow.names))
            found = chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(found, 1))
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a complete parquet file ({cause(error)})") from error
