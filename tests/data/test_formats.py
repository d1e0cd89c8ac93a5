"""What a file holds is found from its content and its name; it is never plain text for want of a better guess."""

import gzip
import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from minillm_jax import demo
from minillm_jax.data.documents import check_source, open_data
from minillm_jax.data.text import Tokens, read_tokens, tokenise
from minillm_jax.errors import InputError, InputWarning

DOCUMENTS = ["The first, “quoted” document.\nIt has two lines.", "Second; it is not very long.", "Tab\tand comma, 3."]
ROWS = [{"text": text, "n": number, "body": f"body {number}"} for number, text in enumerate(DOCUMENTS)]
LINES = "\n".join(map(json.dumps, ROWS))
CSV = "n,text,body\r\n" + "".join(f'{row["n"]},"{row["text"]}",{row["body"]}\r\n' for row in ROWS)
TSV = "n\ttext\tbody\n" + "".join(f'{row["n"]}\t"{row["text"]}"\t{row["body"]}\n' for row in ROWS)
EXPECTED = tokenise("\n\n".join(DOCUMENTS), demo.FOLDER)


def read(path: Path, **options: str) -> Tokens:
    return read_tokens(path, demo.FOLDER, 1024, **options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("objects.json", json.dumps(ROWS)),
        ("indented.json", json.dumps(ROWS, indent=2)),
        ("texts.json", json.dumps(DOCUMENTS)),
        ("c4.json", LINES),
        ("lines.JSONL", LINES),
        ("lines.Jsonl", LINES + "\r\n\r\n"),
        ("lines.ndjson", LINES),
        ("list.jsonl", json.dumps(ROWS)),
        ("strings.jsonl", "\n".join(map(json.dumps, DOCUMENTS))),
        ("c4-train.00000-of-00512.json", LINES),
        ("c4-train.00000-of-00512", LINES),
        ("noname", json.dumps(ROWS)),
        ("table.csv", CSV),
        ("table.CSV", CSV),
        ("table.tsv", TSV),
    ],
)
def test_rows_are_read_in_every_spelling(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    tokens = read(tmp_path / name)
    np.testing.assert_array_equal(tokens.ids, EXPECTED)
    assert tokens.documents == 3


def test_one_object_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"meta": {"a": [1]}, "text": DOCUMENTS[0]}, indent=1))
    tokens = read(tmp_path / "one.json")
    np.testing.assert_array_equal(tokens.ids, tokenise(DOCUMENTS[0], demo.FOLDER))
    assert tokens.documents == 1


@pytest.mark.parametrize(
    "name", ["a.json.gz", "a.jsonl.gz", "A.JSONL.GZ", "a.txt.gz", "a.csv.gz", "misnamed.jsonl", "b.gz"]
)
def test_gzip_is_unpacked_whatever_the_name(tmp_path: Path, name: str) -> None:
    content = {"a.txt.gz": "\n\n".join(DOCUMENTS), "a.csv.gz": CSV, "b.gz": json.dumps(ROWS)}.get(name, LINES)
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    np.testing.assert_array_equal(read(tmp_path / name).ids, EXPECTED)


def test_a_name_of_gzip_without_gzip_is_read_as_it_is(tmp_path: Path) -> None:
    """Some programs unpack what they download and keep its name."""
    (tmp_path / "a.jsonl.gz").write_text(LINES)
    np.testing.assert_array_equal(read(tmp_path / "a.jsonl.gz").ids, EXPECTED)


def test_zstd_is_unpacked_frame_by_frame(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="the data extra")
    half = LINES.index("\n") + 1
    frames = [zstandard.compress(part.encode()) for part in (LINES[:half], LINES[half:])]
    for name in ("a.jsonl.zst", "misnamed.jsonl"):
        (tmp_path / name).write_bytes(b"".join(frames))
        np.testing.assert_array_equal(read(tmp_path / name).ids, EXPECTED)
    (tmp_path / "cut.jsonl.zst").write_bytes(b"".join(frames)[:-12])
    with pytest.raises(InputError, match=r"cannot be unpacked \(the compressed file ends within a frame\)"):
        read(tmp_path / "cut.jsonl.zst")
    (tmp_path / "damaged.jsonl.zst").write_bytes(frames[0][:20] + b"damaged" + frames[0][27:])
    with pytest.raises(InputError, match="cannot be unpacked"):
        read(tmp_path / "damaged.jsonl.zst")


def test_zstd_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(InputError, match=r"compressed by zstd, .* pip install 'minillm-jax\[data\]'"):
        read(tmp_path / "a.jsonl.zst")


def test_the_field_is_chosen_in_every_format_with_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.csv").write_text(CSV)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    expected = tokenise("body 0\n\nbody 1\n\nbody 2", demo.FOLDER)
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet"):
        np.testing.assert_array_equal(read(tmp_path / name, field="body").ids, expected)
        with pytest.raises(InputError, match=r"expected a field 'content', found .*'text'.*; name one with --field"):
            read(tmp_path / name, field="content")


def test_a_field_of_plain_text_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.warns(InputWarning, match="plain text has no fields; the field 'body' is not used for it"):
        read(tmp_path / "a.txt", field="body")


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": text} for text in (None, DOCUMENTS[0], "", " \n", *DOCUMENTS[1:], None)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[1:]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        tokens = read(tmp_path / name)
        np.testing.assert_array_equal(tokens.ids, EXPECTED)
        assert tokens.documents == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "lines.txt",
            LINES,
            "a .txt file is read as plain text, but this one holds JSON documents; name it lines.jsonl",
        ),
        ("objects.txt", json.dumps(ROWS, indent=2), "holds JSON documents"),
        ("long.md", json.dumps([{"text": "x" * 200_000}]), "holds JSON documents"),
        ("texts.txt", json.dumps(DOCUMENTS), "holds JSON documents"),
        ("text.txt.gz", gzip.compress(LINES.encode()), "holds JSON documents"),
        ("utf16.txt", "text".encode("utf-16"), "text in UTF-16, not UTF-8"),
        ("utf16le.txt", "text".encode("utf-16-le"), "binary data .it has NUL bytes"),
        ("latin.txt", "un café.".encode("latin-1"), "not UTF-8 text .byte 0xe9 after 'un caf'.; save it as UTF-8"),
        ("latin.jsonl", '{"text": "café"}'.encode("latin-1"), "not UTF-8 text"),
        ("latin.csv", "text\ncafé".encode("latin-1"), "not UTF-8 text"),
        ("late.txt", b"word " * 300_000 + b"\0", "binary data"),
        ("model.txt", pickle.dumps({"a": 1}), "a pickle, which may run code"),
        ("corpus.txt", b"BZh91AY&SY rest", "compressed by bzip2"),
        ("corpus.jsonl.xz", b"\xfd7zXZ\x00 rest", "compressed by xz"),
        ("paper.txt", b"%PDF-1.7 rest", "a PDF document"),
        ("cut.jsonl.gz", gzip.compress(LINES.encode())[:-12], "cannot be unpacked .*; is it complete"),
        ("trailing.json", '["a",]', "line 1 is not JSON"),
        ("open.json", '["a",\n"b"', "line 2 is not JSON .the list has no end"),
        (
            "more.json",
            '["a"]\n["b"]',
            "line 1 is not JSON .more follows the list.; expected one list, or one object a line",
        ),
        ("comma.json", '["a" "b"]', "expected a comma or the end of the list"),
        ("bad.json", '[{"text": "a"},\n{"text" "b"}]', "line 2 is not JSON"),
        ("broken.json", '{"text":\n "a"\n "b"}', "line 3 is not JSON"),
        ("plain.json", "just words", "line 1 is not JSON"),
        ("number.jsonl", '{"text": 3}', "the field 'text' holds a number, expected a text"),
        ("lists.jsonl", '{"text": ["a"]}', "the field 'text' holds a list, expected a text"),
        ("content.jsonl", '{"content": "a", "meta": {}}', "expected a field 'text', found 'content', 'meta'; name one"),
        ("wide.csv", "text,n\na,1,2\n", "line 2 has 3 cells, but the header has 2"),
        ("quote.csv", 'text,n\n"a,1\n', "cannot be read as CSV"),
        ("nothing.json", "[]", "there is no text in it"),
        ("nothing.csv", "text\n", "there is no text in it"),
        ("folder", None, "folder: a folder; expected a text, .json"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        read(path)


@pytest.mark.parametrize("name", ["text.md", "README", "prose.txt"])
@pytest.mark.parametrize(
    "start", ["[1] See below.", '["a", "b"] is a list.', '{"a": 1} is an object.', "{x}", '"Quoted"']
)
def test_prose_that_begins_like_json_is_plain_text(tmp_path: Path, name: str, start: str) -> None:
    (tmp_path / name).write_text(f"{start}\nMore words follow.")
    np.testing.assert_array_equal(read(tmp_path / name).ids, tokenise(f"{start}\nMore words follow.", demo.FOLDER))


def test_plain_text_of_an_unknown_suffix_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.tokens").write_text("= Title =")
    with pytest.warns(InputWarning, match=r"read as plain text, because \.tokens is no known suffix"):
        read(tmp_path / "wiki.test.tokens")


@pytest.mark.parametrize("name", ["data.npy", "data.npz", "model.pt", "corpus.txt"])
def test_archives_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("a.txt", "words")
    with pytest.raises(InputError, match="archive"):
        read(tmp_path / name)


def test_binary_formats_are_known_by_their_content(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "misnamed.txt")
    np.testing.assert_array_equal(read(tmp_path / "misnamed.txt").ids, EXPECTED)
    with (tmp_path / "ids.txt").open("wb") as file:
        np.save(file, np.arange(7))
    np.testing.assert_array_equal(read(tmp_path / "ids.txt").ids, np.arange(7))
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "misnamed.txt").read_bytes()))
    with pytest.raises(InputError, match="a compressed parquet file; unpack it first"):
        read(tmp_path / "a.parquet.gz")


def test_the_text_itself_and_long_names_are_shortened() -> None:
    text = "It was a dark and stormy night; the rain fell in torrents. " * 1000
    with pytest.raises(InputError, match="is no file: expected the name of one and not the text itself") as raised:
        read_tokens(text, demo.FOLDER, 1024)
    assert len(str(raised.value)) < 250
    for name in ("word" * 20_000, "owner/" + "word" * 20_000):
        with pytest.raises(InputError, match="no such file") as raised:
            read_tokens(name, demo.FOLDER, 1024)
        assert len(str(raised.value)) < 450


@pytest.mark.parametrize("address", ["gs://bucket/text.txt", "https://example.org/text.txt", "s3://bucket/t.jsonl"])
def test_an_address_is_no_file(address: str) -> None:
    for read in (check_source, open_data):
        with pytest.raises(
            InputError, match=r"the text is a path on this machine, and \w+:// is neither read nor written"
        ):
            read(address)
