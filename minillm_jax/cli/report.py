"""The command `report`."""

from typing import Annotated

import typer

from minillm_jax.cli.arguments import JsonOption
from minillm_jax.cli.show import show
from minillm_jax.errors import InputError


def report(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Folders that prune, recover or compare has written.")
    ],
    output: Annotated[
        str, typer.Option("--output", metavar="FILE.html", help="Page to write; it must not exist.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Put several runs on one page: a table that sorts, and plots of size against quality."""
    from convert import folders as files
    from minillm_jax.paths import absolute_path
    from minillm_jax.report import runs, several

    if not output:
        raise InputError("no page is named; name a file that does not exist with --output")
    path = absolute_path(output, "page")
    files.check_new_file(path)
    groups = runs.groups_of(runs.read_runs(folders))
    files.add_texts(path.parent, {path.name: several.page(groups)})
    show(as_json, lambda: several.as_json(groups, output), lambda: several.table(groups, output))
