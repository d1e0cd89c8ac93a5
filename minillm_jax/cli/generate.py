"""The command `generate`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm_jax.cli.arguments import DtypeOption, JsonOption, MeshOption, ModelArgument
from minillm_jax.cli.show import show
from minillm_jax.errors import InputError, cause
from minillm_jax.settings import dtype_name

if TYPE_CHECKING:
    from rich.table import Table

Found = dict[str, Any]


def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="The text to continue; may be given again.")
    ] = None,
    file: Annotated[str | None, typer.Option(metavar="FILE", help="A text file with the text to continue.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="MODEL", help="Another model for the same prompts; may be given again."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Write the prompt by the tokenizer's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="COUNT", help="Tokens of a text at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", help="Divisor of the logits; 0 takes the most probable token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="NUMBER", help="Draw from the most probable tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="COUNT", help="Seed of the drawn tokens.")] = 0,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub, of MODEL.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, by one model as it is written, or by several side by side."""
    from minillm_jax import api, generating
    from minillm_jax.devices import sharding

    prompts, names = _prompts(prompt or [], file), [model, *(against or [])]
    generating.sampling_of(temperature, top_p, seed)
    devices, kind = sharding.make_mesh(sharding.parse_mesh(mesh)), dtype_name(dtype)
    for name in names:
        api.describe(name, kind, revision if name == model else None)  # all, before one is loaded
    streamed = not as_json and len(names) == len(prompts) == 1
    found = []
    for name in names:
        loaded = api.load(name, kind, devices, revision if name == model else None)
        told = _writer(prompts[0]) if streamed else None
        started = time.perf_counter()
        texts = generating.generate(loaded, prompts, max_tokens, temperature, top_p, seed, chat, told)
        found.append({"model": name, "texts": texts, "seconds": round(time.perf_counter() - started, 3)})
    if streamed:
        print()
    else:
        settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "chat": chat}
        show(as_json, lambda: {"prompts": prompts, **settings, "models": found}, lambda: _table(prompts, found))


def _prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of the command line.

    Raises:
      InputError: there is none, or the file cannot be read.
    """
    if not given and file is None:
        raise InputError("no prompt is given; give one with --prompt or --file")
    if file is None:
        return list(given)
    try:
        return [*given, Path(file).read_text(encoding="utf-8").removesuffix("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file {file}: cannot be read as text ({cause(error)})") from error


def _writer(prompt: str) -> Any:
    """Writes the prompt, then every piece of its text as soon as it is told."""
    sys.stdout.write(prompt)
    sys.stdout.flush()

    def told(number: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    return told


def _table(prompts: Sequence[str], found: Sequence[Found]) -> "Table":
    """A row for every prompt, a column for every model."""
    from rich.table import Table
    from rich.text import Text

    from minillm_jax.report.summary import short_name

    table = Table("prompt", show_lines=True)
    for one in found:
        table.add_column(Text(short_name(one["model"])), ratio=1)
    for number, prompt in enumerate(prompts):
        table.add_row(Text(prompt), *(Text(one["texts"][number]) for one in found))
    return table
