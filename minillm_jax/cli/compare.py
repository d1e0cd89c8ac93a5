"""The command `compare`."""

from typing import Annotated

import typer

from minillm_jax.cli.arguments import (
    BosOption,
    DtypeOption,
    FieldOption,
    HostsOption,
    JsonOption,
    MeshOption,
    ShownQuietOption,
    TextOption,
)
from minillm_jax.cli.show import progress, show
from minillm_jax.errors import InputError, shortened
from minillm_jax.options import whole_number
from minillm_jax.recipes import recipe as recipes
from minillm_jax.settings import Comparing


def compare(
    dense: Annotated[
        str, typer.Argument(metavar="DENSE", help="The dense model: a local model folder, a GGUF file or a Hub id.")
    ],
    pruned: Annotated[list[str], typer.Argument(metavar="PRUNED [MORE ...]", help="Models that were pruned from it.")],
    text: TextOption,
    window: Annotated[str, typer.Option(metavar="COUNT", help="Tokens of a window.")] = str(Comparing.window),
    windows: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Most windows, evenly spaced over the text; all if unset.")
    ] = None,
    field: FieldOption = "text",
    bos: BosOption = "auto",
    draft: Annotated[
        str, typer.Option(metavar="COUNT", help="Tokens that PRUNED drafts for one pass of DENSE; 0 for no drafting.")
    ] = str(Comparing.draft),
    prompts: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help=f"Most prompts of the drafting. Default: {Comparing.prompts}."),
    ] = None,
    new_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT", help=f"Tokens that are decoded behind a prompt. Default: {Comparing.new_tokens}."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder for compare.json and compare.html; it must not exist."),
    ] = None,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    hosts: HostsOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub, of DENSE.")] = None,
    as_json: JsonOption = False,
    quiet: ShownQuietOption = False,
) -> None:
    """Compare the next-token probabilities of pruned models with the dense model's, and draft with them."""
    from convert.writer import check_new, new_folder
    from minillm_jax import api, comparing
    from minillm_jax.data.documents import check_source
    from minillm_jax.data.mixture import check_one_text
    from minillm_jax.devices import hosts as processes
    from minillm_jax.devices import sharding
    from minillm_jax.report import compare as reports

    settings = _settings(window, windows, draft, prompts, new_tokens)
    chosen, _ = recipes.with_options(recipes.Recipe(), {} if dtype is None else {"dtype": dtype})
    shape, kind = sharding.parse_mesh(mesh), chosen.output.dtype
    if hosts is not None:
        processes.initialise_hosts(processes.parse_hosts(hosts))
    devices = sharding.make_mesh(shape)
    check_one_text(text)
    check_source(text, field, most=1)  # the whole text is read below, before the weights
    names = [(dense, revision), *((name, None) for name in pruned)]
    if output is not None:
        for name, _ in names:
            check_new(output, name)
    with progress(quiet or as_json) as told:
        first, *others = (api.describe(name, kind, commit) for name, commit in names)
        batches = comparing.windows_of(first, others, text, settings, bos, field)
        processes.check_same("windows", batches.fingerprint())
        first, *others = (api.load(name, kind, devices, commit) for name, commit in names)
        found = reports.summary(comparing.measure(first, others, batches, text, settings, told))
    if not processes.is_writer():
        return
    if output is not None:
        with new_folder(output) as folder:
            for name, content in reports.documents(found).items():
                (folder / name).write_text(content, encoding="utf-8")
    show(as_json, lambda: found, lambda: reports.table(found))


def _settings(window: str, windows: str | None, draft: str, prompts: str | None, new_tokens: str | None) -> Comparing:
    """The numbers of the command line."""
    given = {"window": window, "windows": windows, "draft": draft, "prompts": prompts, "new-tokens": new_tokens}
    numbers = {name.replace("-", "_"): _number(name, value) for name, value in given.items() if value is not None}
    settings = Comparing(**numbers)
    settings.check()
    idle = [flag for flag in ("prompts", "new-tokens") if given[flag] is not None]
    if settings.draft == 0 and idle:
        raise InputError(f"--{idle[0]} does nothing with --draft 0; leave out one of the two")
    return settings


def _number(name: str, text: str) -> int:
    number = whole_number(text)
    if number is None:
        raise InputError(f"--{name} must be a whole number, found {shortened(text)!r}")
    return number
