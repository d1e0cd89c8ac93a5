"""Arguments and options that several commands share."""

from typing import Annotated

import typer

from minillm_jax.cli.flags import COMMON, SHOW, show_all
from minillm_jax.recipes import recipe as recipes

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local model folder, a GGUF file or a Hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
HiddenJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object instead of a table.", rich_help_panel=SHOW, hidden=True),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="Print no progress on standard error.", rich_help_panel=SHOW, hidden=True)
]
HelpAllOption = Annotated[
    bool,
    typer.Option(
        "--help-all", help="Show every option, by panel.", rich_help_panel=COMMON, is_eager=True, callback=show_all
    ),
]
RecipeModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="A local model folder, a GGUF file or a Hub id; by default the one that a recipe names."
    ),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        "--preset",
        metavar="NAME|FILE",
        help="Settings for all options that are not given: a recipe of `minillm-jax recipe list`, or a TOML file.",
        rich_help_panel=COMMON,
        autocompletion=lambda incomplete: [name for name in recipes.names() if name.startswith(incomplete)],
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One setting of the recipe, refit.ridge=0.1.", rich_help_panel=COMMON
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision", metavar="TEXT", help="Branch, tag or commit on the Hub.", rich_help_panel="Data", hidden=True
    ),
]
OutputOption = Annotated[
    str, typer.Option("--output", metavar="FOLDER", help="Folder to write; it must not exist.", rich_help_panel=COMMON)
]
TextOption = Annotated[
    str, typer.Option(help="Text, .json, .jsonl, .csv, .parquet or .npy (token ids) file, or a Hub data set.")
]
FieldOption = Annotated[str, typer.Option(help="Field that holds the text, in files of rows and Hub data sets.")]
BosOption = Annotated[
    str,
    typer.Option(
        metavar="[auto|yes|text|no]",
        help="Beginning-of-sequence token before every window (yes), once before the text (text) or nowhere (no); "
        "auto: yes for Gemma, no for other families.",
    ),
]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the stored type by default.")]
MeshOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Mesh of devices, data=2,model=4 or fsdp=8; one device if unset.")
]
HostsOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Several processes: auto, or ADDRESS:PORT,COUNT,NUMBER.")
]
ShownQuietOption = Annotated[bool, typer.Option("--quiet", help="Print no progress on standard error.")]
