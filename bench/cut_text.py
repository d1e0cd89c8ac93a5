"""A text from parts of others, so that a study trains and measures on separate parts.

    python bench/cut_text.py OUTPUT PART [PART ...]

A part is FILE, or FILE:FIRST:LAST. FIRST and LAST count characters of a plain text and rows of a JSON or JSON-lines
file; either may be missing. Rows with Alpaca's fields keep them if all parts have them, and become one text each
otherwise. <|endoftext|> separates the documents of a plain text. OUTPUT is JSON lines, or a plain text if it ends with
`.txt`.
"""

import json
import sys
from pathlib import Path
from typing import Any

ALPACA = ("instruction", "input", "output")

Entry = dict[str, Any]


def rows_of(part: str) -> list[Entry]:
    """The rows of a part: those of a JSON file, or the documents of a plain text."""
    name, *bounds = part.split(":")
    chosen = slice(*(int(bound) if bound else None for bound in bounds)) if bounds else slice(None)
    path = Path(name)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)[chosen]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()][chosen]
    documents = (document.strip() for document in text[chosen].split("<|endoftext|>"))
    return [{"text": document} for document in documents if document]


def as_text(row: Entry) -> Entry:
    """A row with the field `text` alone."""
    return {"text": row["text"] if "text" in row else "\n".join(row[key] for key in ALPACA if row[key])}


def main() -> None:
    """Write the output."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    output, *parts = sys.argv[1:]
    rows = [row for part in parts for row in rows_of(part)]
    if not all("instruction" in row for row in rows):
        rows = [as_text(row) for row in rows]
    plain = output.endswith(".txt")
    lines = [as_text(row)["text"] + "\n<|endoftext|>\n" if plain else json.dumps(row) + "\n" for row in rows]
    Path(output).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
