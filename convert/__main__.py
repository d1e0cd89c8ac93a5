"""`python -m convert to-flax MODEL OUT` and `python -m convert to-torch CKPT OUT`."""

import argparse
import sys
from collections.abc import Sequence

from minillm_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert, and say where the result lies; bad input is one sentence on standard error and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m convert", description="Hugging Face folders ↔ Flax checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, words in (
        ("to-flax", "MODEL", "Hugging Face folder or Hub id → Orbax checkpoint of the Flax pytree"),
        ("to-torch", "CKPT", "Flax checkpoint → Hugging Face folder"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("source", metavar=source)
        command.add_argument("output", metavar="OUT", help="folder to write; it must not exist")
        command.add_argument("--dtype", help="float32, bfloat16 or float16; the stored type by default")
        if name == "to-torch":
            command.add_argument(
                "--format",
                choices=("stock", "per-layer", "padded"),
                help="stock, per-layer or padded; by default what holds the shapes",
            )
            command.add_argument("--max-shard-size", default="5GB", help="of the weight files")
    chosen = vars(parser.parse_args(arguments))
    try:
        print(f"written to {chosen['output']} ({convert(**chosen)})")
    except InputError as error:
        print(f"convert: {error}", file=sys.stderr)
        sys.exit(2)


def convert(
    command: str,
    source: str,
    output: str,
    dtype: str | None = None,
    format: str | None = None,  # noqa: A002  the name of the option
    max_shard_size: str = "5GB",
) -> str:
    """Read a model from `source`, write it as `to-flax` or `to-torch` to `output`, and return the format.

    Raises:
      InputError: the source cannot be read, the output exists, or the format cannot hold the model.
    """
    from convert import formats, reader, writer

    writer.check_new(output)
    formats.check_format(format)
    writer.check_shard_size(max_shard_size)
    model = reader.read_model(source, dtype)
    wanted = formats.FLAX if command == "to-flax" else format
    return writer.write_model(model, output, wanted, max_shard_size).format


if __name__ == "__main__":
    main()
