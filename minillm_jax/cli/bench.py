"""The command `bench`."""

from typing import Annotated

import typer

from minillm_jax.cli.arguments import DtypeOption, JsonOption, ShownQuietOption
from minillm_jax.cli.show import progress, show
from minillm_jax.errors import InputError
from minillm_jax.settings import dtype_name


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL [MORE …]", help="Models; all are compared with the first.")
    ],
    torch: Annotated[bool, typer.Option("--torch", help="Time stock transformers on the same folders too.")] = False,
    prompt: Annotated[int, typer.Option(metavar="COUNT", help="Tokens of a prompt.")] = 128,
    tokens: Annotated[int, typer.Option(metavar="COUNT", help="Tokens behind a prompt.")] = 32,
    batch_sizes: Annotated[str, typer.Option(metavar="COUNTS", help="Numbers of prompts at a time.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(metavar="COUNT", help="Rounds, whose medians are printed.")] = 3,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    quiet: ShownQuietOption = False,
) -> None:
    """Time prompts and further tokens of several models in turn, with load time, memory and size on disk."""
    from functools import partial

    from minillm_jax import timing
    from minillm_jax.evaluation.speed import Load
    from minillm_jax.progress import tell
    from minillm_jax.report import speed as reports

    try:
        sizes = tuple(int(size) for size in batch_sizes.split(","))
    except ValueError:
        raise InputError(f"--batch-sizes {batch_sizes}: expected whole numbers with commas between, 1,8,32") from None
    what, libraries = Load(prompt, tokens, sizes), (timing.OURS, timing.TORCH) if torch else (timing.OURS,)
    kind = dtype_name(dtype)
    timing.check(models, what, rounds, libraries)
    with progress(quiet or as_json) as told:
        found = timing.time_models(models, what, rounds, libraries, kind, partial(tell, told, "rounds"))
    show(as_json, lambda: reports.result_json(found, what, rounds), lambda: reports.table(found, what))
