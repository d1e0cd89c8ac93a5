"""The command `recover`."""

from typing import Annotated, Any

import typer

from minillm_jax.cli.arguments import (
    HelpAllOption,
    HiddenJson,
    ModelArgument,
    OutputOption,
    QuietOption,
    RevisionOption,
    SetOption,
)
from minillm_jax.cli.flags import COMMON
from minillm_jax.cli.show import progress, show
from minillm_jax.errors import InputError
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recovery import Recovery


def recover(
    model: ModelArgument,
    output: OutputOption = "",
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "--preset",
            metavar="NAME|FILE",
            help="Settings for all options that are not given: distil, llm-pruner, forward, or a TOML file.",
            rich_help_panel=COMMON,
        ),
    ] = Recovery.DEFAULT,
    assignments: SetOption = None,
    revision: RevisionOption = None,
    as_json: HiddenJson = False,
    quiet: QuietOption = False,
    help_all: HelpAllOption = False,
    **given: Any,
) -> None:
    """Train a pruned model until it is better, and write an adapter of PEFT and the merged folder."""
    from minillm_jax import run_recovery as runs
    from minillm_jax.devices import hosts
    from minillm_jax.report import recovery as reports

    if not output:
        raise InputError("no output folder is given; name one that does not exist with --output")
    chosen, set_flags = recipes.with_assignments(recipes.load_as(Recovery, recipe), assignments or [])
    chosen, flags = recipes.with_options(chosen, given)
    with progress(quiet or as_json) as told:
        result = runs.run(runs.RecoveryJob(model, output, chosen, set_flags | flags, revision), told, reports.documents)
    if hosts.is_writer():
        show(as_json, lambda: reports.summary(result), lambda: reports.table(result))
