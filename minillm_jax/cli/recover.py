"""The command `recover`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from minillm_jax.run import Job
    from minillm_jax.run_recovery import RecoveryJob, RecoveryResult


def recover(
    model: ModelArgument,
    output: OutputOption = "",
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "--preset",
            metavar="NAME|FILE",
            help="Settings for all options that are not given: distil, llm-pruner, forward, mezo, or a TOML file.",
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
    from minillm_jax.devices import hosts
    from minillm_jax.report import recovery as reports
    from minillm_jax.run_recovery import RecoveryJob

    if not output:
        raise InputError("no output folder is given; name one that does not exist with --output")
    chosen, set_flags = recipes.with_assignments(recipes.load_as(Recovery, recipe), assignments or [])
    chosen, flags = recipes.with_options(chosen, given)
    result = run(RecoveryJob(model, output, chosen, set_flags | flags, revision), quiet or as_json)
    if hosts.is_writer():
        show(as_json, lambda: reports.summary(result), lambda: reports.table(result))


def run(job: "RecoveryJob", quiet: bool) -> "RecoveryResult":
    """The result of a recovery, whose progress is shown."""
    from minillm_jax import run_recovery
    from minillm_jax.report import recovery as reports

    with progress(quiet) as told:
        return run_recovery.run(job, told, reports.documents)


def after_pruning(job: "Job", recipe: str, options: Mapping[str, Any] | None = None) -> "RecoveryJob":
    """The recovery that follows a pruning: of its output, on its calibration text, with the dense model as teacher.

    Args:
      job: the pruning.
      recipe: of the recovery.
      options: further options of the recovery.

    Raises:
      InputError: a setting is out of its range, or the output exists.
    """
    from convert.writer import check_new
    from minillm_jax.run_recovery import RecoveryJob

    loaded = recipes.load_as(Recovery, recipe)
    data, measured = job.recipe.data, job.recipe.evaluation
    mine = {"data": loaded.data.data or data.calibration, "seed": data.seed, "window": measured.window}
    mine |= {"evaluate": measured.text, "mesh": job.recipe.devices.mesh, "dtype": job.recipe.output.dtype}
    if loaded.training.loss != "ce":
        mine |= {"teacher": job.model}
    given = {name: value for name, value in mine.items() if value is not None}
    settings, _ = recipes.with_options(loaded, given | dict(options or {}))
    recovery = RecoveryJob(job.output, f"{job.output.rstrip('/')}-recovered", settings)
    recovery.check()
    check_new(recovery.output)
    return recovery
