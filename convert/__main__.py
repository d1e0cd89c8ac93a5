"""Command line of the converter: `python -m convert to-flax MODEL OUT`, `to-torch CKPT OUT` and `to-gguf MODEL OUT`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from minillm_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one conversion and print the output folder and its format.

    An `InputError` is printed as one sentence on standard error, and the exit status is 2.

    Args:
      arguments: command-line arguments; `sys.argv[1:]` by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m convert", description="Hugging Face folders ↔ Flax checkpoints ↔ GGUF."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, source, description in (
        ("to-flax", "MODEL", "Hugging Face folder, GGUF file or Hub id → Orbax checkpoint of the Flax pytree"),
        ("to-torch", "CKPT", "Flax checkpoint or GGUF file → Hugging Face folder"),
        ("to-gguf", "MODEL", "Hugging Face folder, Flax checkpoint or Hub id → folder with model.gguf, for llama.cpp"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("source", metavar=source)
        command.add_argument("output", metavar="OUT", help="output folder; it must not exist")
        command.add_argument("--dtype", help="float32, bfloat16 or float16; by default the stored type")
        if name == "to-torch":
            command.add_argument(
                "--format",
                choices=("stock", "per-layer", "padded"),
                help="output format; by default stock where a stock class holds the shapes, else per-layer",
            )
            command.add_argument("--max-shard-size", default="5GB", help="largest size of a weight file; default 5GB")
        if name == "to-gguf":
            command.add_argument(
                "--gguf-type", help="type of the matrices: f32, f16, bf16 or q8_0; by default the stored"
            )
    options = vars(parser.parse_args(arguments))
    use_cpu_alone()
    try:
        print(f"written to {options['output']} ({convert(**options)})")
    except InputError as error:
        print(f"convert: {error}", file=sys.stderr)
        sys.exit(2)


def use_cpu_alone() -> None:
    """Keep JAX off the accelerators in this process. The command lines call it before anything uses a device."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def convert(
    command: str,
    source: str,
    output: str,
    dtype: str | None = None,
    format: str | None = None,  # noqa: A002  the name of the option
    max_shard_size: str = "5GB",
    gguf_type: str | None = None,
) -> str:
    """Read a model, write it in another format, and return the name of that format. All arrays stay on the CPU.

    Args:
      command: `to-flax`, `to-torch` or `to-gguf`.
      source: Hugging Face folder, Flax checkpoint, GGUF file or Hub id.
      output: output folder, which must not exist.
      dtype: float32, bfloat16 or float16; the stored type by default.
      format: `stock`, `per-layer` or `padded`, for `to-torch` only; by default `formats.describe` chooses.
      max_shard_size: largest size of a weight file, for `to-torch` only.
      gguf_type: type of the matrices, for `to-gguf` only: `f32`, `f16`, `bf16` or `q8_0`.

    Raises:
      InputError: the source cannot be read, the output exists, or the format cannot hold the model.
    """
    import jax

    from convert import formats, gguf_write, reader, writer

    writer.check_new(output, source)
    formats.check_format(format)
    writer.check_shard_size(max_shard_size)
    gguf_write.check_type(gguf_type)
    output_format = {"to-flax": formats.FLAX, "to-gguf": formats.GGUF}.get(command, format)
    if output_format == formats.GGUF:
        writer.check_gguf_folder(output)
    with jax.default_device(_cpu()):
        model = reader.read_model(source, dtype)
        return writer.write_model(model, output, output_format, max_shard_size, gguf_type=gguf_type).format


def _cpu() -> Any:
    """The first CPU device of this process.

    Raises:
      InputError: the settings of JAX leave out the CPU.
    """
    import jax

    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise InputError(f"conversion runs on the CPU, which JAX_PLATFORMS leaves out; add cpu ({error})") from error


if __name__ == "__main__":
    main()
