"""Model and text of the studies: from the command line, or the bundled demo model and its held-out text."""

import argparse
from pathlib import Path

from minillm_jax import api, demo
from minillm_jax.data.text import Tokens, tokenise
from minillm_jax.model.loaded import Model


def documents(path: Path) -> str:
    """The documents of a text file, which <|endoftext|> separates, joined by blank lines."""
    parts = path.read_text(encoding="utf-8").split("<|endoftext|>")
    return "\n\n".join(part.strip() for part in parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments MODEL and TEXT to a parser: both or neither."""
    parser.add_argument("model", nargs="?", default=demo.FOLDER)
    parser.add_argument("text", nargs="?", type=Path)


def load(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> tuple[Model, Tokens]:
    """The model and the tokens that the arguments name."""
    if arguments.text is None and arguments.model != demo.FOLDER:
        parser.error("MODEL needs a TEXT; give both or neither")
    model = api.load(arguments.model)
    text = demo.held_out_text() if arguments.text is None else documents(arguments.text)
    name = "the demo's held-out text" if arguments.text is None else arguments.text.name
    return model, Tokens(tokenise(text, model.folder), name, 1)
