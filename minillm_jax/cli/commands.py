"""The commands. They import what they need when they run, so that `--help` answers at once."""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm_jax.cli.arguments import (
    DtypeOption,
    HelpAllOption,
    HiddenJson,
    JsonOption,
    ModelArgument,
    OutputOption,
    QuietOption,
    RecipeModelArgument,
    RecipeOption,
    RevisionOption,
    SetOption,
)
from minillm_jax.cli.bench import bench
from minillm_jax.cli.compare import compare
from minillm_jax.cli.evaluate import evaluate
from minillm_jax.cli.flags import COMMON, with_settings
from minillm_jax.cli.generate import generate
from minillm_jax.cli.recover import after_pruning, recover
from minillm_jax.cli.recover import run as run_recovery
from minillm_jax.cli.report import report
from minillm_jax.cli.show import progress, show, show_warnings
from minillm_jax.errors import InputError, shortened
from minillm_jax.options import shard_size
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recipes.synonyms import suggestion
from minillm_jax.settings import dtype_name
from minillm_jax.version import __version__

if TYPE_CHECKING:
    from minillm_jax.run import Job, Result
    from minillm_jax.run_recovery import RecoveryJob

app = typer.Typer(
    help="Make a language model physically smaller with forward passes alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
recipe_app = typer.Typer(help="List the recipes, or show what one sets.", no_args_is_help=True)
convert_app = typer.Typer(help="Convert Hugging Face folders, Flax checkpoints and GGUF files.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(convert_app, name="convert")


def main() -> None:
    """Entry point of `minillm-jax`: bad input is one sentence on standard error and exit status 2."""
    # transformers otherwise advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    show_warnings()
    try:
        import minillm_jax.hidden  # noqa: F401  before the first import of convert

        with terminable():
            status = app(standalone_mode=False)
    except InputError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not an error of the command line
            raise
        _fail(_usage(error))
    else:
        sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block, SIGTERM is an exit with status 143, as Ctrl-C is one with status 130.

    Without a handler, the process would end at once, and leave scratch folders behind.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(sentence: str) -> None:
    """Ends the process with one sentence, in which a huge word of the user's, and a huge text, are shortened."""
    words = " ".join(shortened(word, 300) for word in sentence.split())
    print(f"minillm-jax: {shortened(words, 2000)}", file=sys.stderr)
    sys.exit(2)


# What other tools call the argument MODEL.
_MODEL_NAMES = ("model", "m", "model-name", "model-path", "model-id", "model-name-or-path", "base-model", "pretrained")


def _usage(error: Any) -> str:
    """What is wrong with a command line, and the option that is meant where one does not exist."""
    wrong = getattr(error, "option_name", None)
    if wrong is None:
        sentence = error.format_message().rstrip(".")
        return f"{shortened(sentence[:1].lower() + sentence[1:], 300)}; see minillm-jax --help"
    parameters = getattr(getattr(error.ctx, "command", None), "params", [])
    if wrong.lstrip("-").replace("_", "-") in _MODEL_NAMES and any(one.name == "model" for one in parameters):
        return f"no such option: {wrong}; the model is named without an option, {error.ctx.command_path} MODEL"
    flags = [flag for one in parameters for flag in one.opts if flag.startswith("--")]
    near = suggestion(wrong, flags)
    return f"no such option: {shortened(wrong)}; " + (f"did you mean {near}?" if near else "see --help-all")


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"minillm-jax {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


# ------------------------------------------------------------------------------------------------- prune and plan


def prune(
    model: RecipeModelArgument = None,
    output: OutputOption = "",
    recipe: RecipeOption = recipes.DEFAULT,
    recovery: Annotated[
        str | None,
        typer.Option(
            "--recover",
            metavar="NAME|FILE",
            help="Recover the pruned model into OUTPUT-recovered, by a recipe of `recipe list --recover`.",
            rich_help_panel=COMMON,
        ),
    ] = None,
    assignments: SetOption = None,
    revision: RevisionOption = None,
    as_json: HiddenJson = False,
    quiet: QuietOption = False,
    help_all: HelpAllOption = False,
    **given: Any,
) -> None:
    """Prune a model and write it as a folder that transformers loads."""
    if not output:
        raise InputError("no output folder is given; name one that does not exist with --output")
    job = _job(model, output, recipe, assignments, revision, given)
    if recovery is None:
        _run(job, as_json, quiet)
        return
    _run_both(job, after_pruning(job, recovery), as_json, quiet)


def plan(
    model: RecipeModelArgument = None,
    recipe: RecipeOption = recipes.DEFAULT,
    assignments: SetOption = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="KIND-N",
            help="Devices of the run: v5e-8, h100; this machine if unset.",
            rich_help_panel=COMMON,
        ),
    ] = None,
    revision: RevisionOption = None,
    as_json: HiddenJson = False,
    help_all: HelpAllOption = False,
    **given: Any,
) -> None:
    """Show what a run of prune would cost and write, before anything is loaded."""
    from convert.reader import describe_model
    from minillm_jax import plan as plans
    from minillm_jax.recipes.used import used
    from minillm_jax.report import tables

    job = _job(model, "", recipe, assignments, revision, given)
    settings = used(job.recipe, job.given).recipe
    described = describe_model(job.model, settings.output.dtype, job.revision)
    planned = plans.plan(described, job.model, settings, devices)
    show(as_json, planned.as_json, lambda: tables.plan_table(planned))


app.command("prune")(with_settings(prune))
app.command("plan")(with_settings(plan))
app.command("recover")(with_settings(recover, Recovery))
app.command("compare")(compare)
app.command("report")(report)


def _job(
    model: str | None,
    output: str,
    recipe: str,
    assignments: list[str] | None,
    revision: str | None,
    given: dict[str, Any],
) -> "Job":
    """The job that a command line describes."""
    from minillm_jax.run import Job

    loaded = recipes.load(recipe)
    chosen, set_flags = recipes.with_assignments(loaded, assignments or [])
    chosen, flags = recipes.with_options(chosen, given)
    name = model or loaded.origin.get("model")
    if name is None:
        raise InputError("no model is given; name a local model folder or a Hub id")
    if revision is None and model in (None, loaded.origin.get("model")):
        revision = loaded.origin.get("revision")
    return Job(str(name), output, chosen, set_flags | flags, revision)


def _run(job: "Job", as_json: bool, quiet: bool) -> None:
    from minillm_jax.devices import hosts
    from minillm_jax.report import tables

    result = _pruned(job, quiet or as_json)
    if hosts.is_writer():
        show(as_json, lambda: tables.result_json(result), lambda: tables.result_table(result))


def _pruned(job: "Job", quiet: bool) -> "Result":
    from minillm_jax import run as runs
    from minillm_jax.report import tables

    with progress(quiet) as told:
        return runs.run(job, told, tables.documents)


def _run_both(job: "Job", recovery: "RecoveryJob", as_json: bool, quiet: bool) -> None:
    """A pruning, then the recovery of its output; one JSON object, or a table of each and one of all three models."""
    from minillm_jax.devices import hosts
    from minillm_jax.report import recovery as reports
    from minillm_jax.report import tables

    result = _pruned(job, quiet or as_json)
    if hosts.is_writer() and not as_json:
        show(False, dict, lambda: tables.result_table(result))
    recovered = run_recovery(recovery, quiet or as_json)
    if hosts.is_writer():
        both = {**tables.result_json(result), "recovery": reports.summary(recovered)}
        show(as_json, lambda: both, lambda: reports.three_rows(result, recovered))


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder to write; it must not exist.")] = "demo-pruned",
    ratio: Annotated[
        str, typer.Option(metavar="NUMBER", help="Share of the heads and channels of every layer to remove.")
    ] = "0.2",
    recipe: Annotated[str, typer.Option("--recipe", "--preset", help="As in prune.")] = recipes.DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Prune and recover the bundled demo model, and measure it on text it has never seen."""
    from minillm_jax import demo as bundled

    with tempfile.TemporaryDirectory() as folder:
        training, held_out = Path(folder, "training.txt"), Path(folder, "held-out.txt")
        training.write_text(bundled.training_text(), encoding="utf-8")
        held_out.write_text(bundled.held_out_text(), encoding="utf-8")
        given = {"ratio": ratio, "calibration": str(training), "evaluate": str(held_out)}
        job = _job(str(bundled.FOLDER), output, recipe, None, None, given)
        _run_both(job, after_pruning(job, Recovery.DEFAULT, bundled.RECOVERY), as_json, quiet=False)


# ------------------------------------------------------------------------------------------------------ the others


app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("bench")(bench)


OfRecoverOption = Annotated[bool, typer.Option("--recover", help="Recipes of recover, not of prune.")]


@recipe_app.command("list")
def list_recipes(of_recover: OfRecoverOption = False, as_json: JsonOption = False) -> None:
    """List the recipes of the package, and what each sets."""
    from minillm_jax.report import tables

    kind = Recovery if of_recover else recipes.Recipe
    show(as_json, lambda: tables.recipes_json(kind), lambda: tables.recipes_table(kind))


@recipe_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe of the package, or a TOML file.")],
    changes: Annotated[
        bool, typer.Option("--changes", help="Show only the settings that differ from the defaults.")
    ] = False,
    of_recover: OfRecoverOption = False,
) -> None:
    """Show a recipe as TOML."""
    kind = Recovery if of_recover else recipes.Recipe
    print(recipes.to_toml(recipes.load_as(kind, name), None if changes else recipes.all_keys(kind)), end="")


@app.command("presets", hidden=True)
def show_presets(as_json: JsonOption = False) -> None:
    """List the recipes: the former name of `recipe list`."""
    list_recipes(False, as_json)


OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")]


@convert_app.command("to-flax")
def to_flax(model: ModelArgument, output: OutArgument, dtype: DtypeOption = None) -> None:
    """Convert a Hugging Face folder, GGUF file or Hub id to an Orbax checkpoint of the Flax pytree."""
    from convert.__main__ import convert, use_cpu_alone

    use_cpu_alone()
    print(f"written to {output} ({convert('to-flax', model, output, dtype_name(dtype))})")


@convert_app.command("to-torch")
def to_torch(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A Flax checkpoint folder, or a GGUF file.")],
    output: OutArgument,
    dtype: DtypeOption = None,
    format: Annotated[  # noqa: A002  the name of the option
        str | None, typer.Option(help="stock, per-layer or padded; the first that holds the shapes by default.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of the largest weight file.")] = "5GB",
) -> None:
    """Convert a Flax checkpoint or a GGUF file to a Hugging Face folder."""
    from convert.__main__ import convert, use_cpu_alone

    use_cpu_alone()
    if format in ("flax", "gguf"):
        raise InputError("to-torch writes a Hugging Face folder; use one of the formats stock, per-layer and padded")
    try:
        largest = shard_size(max_shard_size)
    except ValueError as error:
        raise InputError(f"--max-shard-size {shortened(max_shard_size)!r} {error}") from None
    print(f"written to {output} ({convert('to-torch', checkpoint, output, dtype_name(dtype), format, largest)})")


@convert_app.command("to-gguf")
def to_gguf(
    model: ModelArgument,
    output: OutArgument,
    dtype: DtypeOption = None,
    gguf_type: Annotated[
        str | None, typer.Option(help="Type of the matrices: f32, f16, bf16 or q8_0; the stored type by default.")
    ] = None,
) -> None:
    """Convert a Hugging Face folder, Flax checkpoint or Hub id to a folder with model.gguf, for llama.cpp."""
    from convert.__main__ import convert, use_cpu_alone

    use_cpu_alone()
    print(f"written to {output} ({convert('to-gguf', model, output, dtype_name(dtype), gguf_type=gguf_type)})")


if __name__ == "__main__":
    main()
