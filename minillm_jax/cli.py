"""The command line: the only place that prints, asks for a path, or exits.

Commands import what they need when they run, so that `--help` answers at once.
"""

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm_jax import __version__
from minillm_jax.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from minillm_jax.progress import StageProgress
    from minillm_jax.run import Job

app = typer.Typer(
    help="Make a language model physically smaller with forward passes alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A local model folder or a Hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def main() -> None:
    """Entry point of `minillm-jax`: bad input is one sentence on standard error and exit status 2."""
    # transformers otherwise advises to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        app()
    except InputError as error:
        print(f"minillm-jax: {error}", file=sys.stderr)
        sys.exit(2)


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


@app.command()
def prune(
    model: ModelArgument,
    calibration: Annotated[
        str, typer.Option(help="Text, .jsonl, .parquet or .npy (token ids) file, or a Hub data set OWNER/NAME[:SPLIT].")
    ],
    output: Annotated[str, typer.Option(help="Folder to write; it must not exist.")],
    ratio: Annotated[
        float | None, typer.Option(help="Share of the heads and channels of every layer that goes, in (0, 1).")
    ] = None,
    ratio_of: Annotated[
        str | None, typer.Option(help="What the ratio is a share of: groups, or parameters of the blocks or the model.")
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(help="Instead of a ratio: at most so many, 5.4B or 120M.")
    ] = None,
    target_macs: Annotated[
        str | None, typer.Option(help="Instead of a ratio: multiply-accumulates for a window of --seq-len, 340G.")
    ] = None,
    target_memory: Annotated[
        str | None, typer.Option(help="Instead of a ratio: weights, keys and values of such a window, 10GB.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Between layers: uniform, global (by scores), measured (by losses)."),
    ] = None,
    structures: Annotated[
        str | None, typer.Option(help="What goes, with commas between: heads, channels, hidden (dimensions), layers.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="group: a key/value head with its query heads; query: query heads alone.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Prune in so many rounds, with fresh scores in each.")] = None,
    preset: Annotated[
        str, typer.Option(help="What the options below are where they are not given: see minillm-jax presets.")
    ] = "ours",
    criterion: Annotated[
        str | None,
        typer.Option(
            help="obs, wanda, flap, fms, magnitude, magnitude-l1, vector, element-1, element-2, mixed, gate, "
            "gate-square, random, or noise (the control)."
        ),
    ] = None,
    factors: Annotated[str | None, typer.Option(help="Of fms: some of magnitude,activation,gradient.")] = None,
    refit: Annotated[
        str | None, typer.Option(help="What stays takes over from what goes: least-squares, bias or none.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Its target, from 0 (as it was) to 1 (the dense stream).")] = None,
    ridge: Annotated[float | None, typer.Option(help="How strongly it holds to the old weights.")] = None,
    inner: Annotated[
        float | None, typer.Option(help="How far it turns inner matrices to what they read before, from 0 to 1.")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="Of linear systems and obs: host (float64), or device (float32, for an accelerator)."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of calibration windows.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a calibration window.")] = None,
    seed: Annotated[int, typer.Option(help="Decides windows, directions, noise and random scores.")] = 0,
    difference: Annotated[
        str | None,
        typer.Option(help="How the slope is taken: spsa (two steps), jvp (exact, forward mode), exact (backward)."),
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Of the directions: weights or low-rank for fms, gates for gate.")
    ] = None,
    directions: Annotated[int | None, typer.Option(help="Random directions of the gradient estimate.")] = None,
    epsilon: Annotated[str | None, typer.Option(help="Step of spsa along a direction, or auto.")] = None,
    distribution: Annotated[str | None, typer.Option(help="Of them: gaussian, rademacher or sphere.")] = None,
    rank: Annotated[int, typer.Option(help="Of low-rank directions.")] = 1,
    per_sequence: Annotated[
        bool, typer.Option("--per-sequence", help="A direction of its own for every window (gates).")
    ] = False,
    directions_per_step: Annotated[
        int | None, typer.Option(help="Directions vmapped into one pass; by the memory when not given.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="For the estimate besides the model: 2GB, 500MB.")] = None,
    rng: Annotated[str, typer.Option(help="threefry2x32, or threefry4x32 (other directions, made faster).")] = (
        "threefry2x32"
    ),
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder to save the estimate in, and to go on from after an interruption.")
    ] = None,
    activation_norm: Annotated[str | None, typer.Option(help="l2, rms, mean-abs, std or none.")] = None,
    within: Annotated[
        str | None, typer.Option(help="Reduction inside a structure: sum, mean, max, l2, vector, standardised.")
    ] = None,
    across: Annotated[str | None, typer.Option(help="Over a group's structures: max, sum, mean, prod, last.")] = None,
    layers: Annotated[str | None, typer.Option(metavar="A:B", help="Prune layers A to B - 1 only; 4:-2, all.")] = None,
    round_heads_to: Annotated[int, typer.Option(help="Keep a multiple of this many key/value heads a layer.")] = 1,
    round_width_to: Annotated[int, typer.Option(help="Keep a multiple of this many channels a layer: 64, 128.")] = 1,
    format: Annotated[  # noqa: A002  the name of the option
        str | None, typer.Option(help="stock, per-layer, padded or flax; by default what holds the shapes.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of the weight files.")] = "5GB",
    evaluate: Annotated[str | None, typer.Option(help="Text for the perplexity before and after.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of an evaluation window.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the stored type by default.")] = None,
    mesh: Annotated[str | None, typer.Option(help="Devices: data=2,model=4; one without it.")] = None,
    hosts: Annotated[
        str | None, typer.Option(help="Several processes: auto, or ADDRESS:PORT,COUNT,NUMBER (docs/scale.md).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prune a model and write it as a folder that transformers loads."""
    asked = dict(locals())
    from minillm_jax import presets, unused

    chosen = {**asked, **presets.options(preset, asked)}
    defaults = inspect.signature(prune).parameters
    unused.check({name for name, value in asked.items() if value != defaults[name].default}, chosen)
    _run(_job(chosen), as_json)


@app.command("eval")
def evaluate_model(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help="Text, .jsonl, .parquet or .npy (token ids) file, or a Hub data set.")],
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 128,
    bos: Annotated[bool, typer.Option("--bos", help="Put the beginning-of-sequence token before the text.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the stored type by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity over non-overlapping windows of a whole text."""
    from minillm_jax import api
    from minillm_jax.report import tables

    with _progress(quiet=as_json) as progress:
        found = api.evaluate(api.load(model, dtype), text, window, bos, progress)
    _show(
        as_json, lambda: tables.perplexity_json(model, text, found), lambda: tables.perplexity_table(model, text, found)
    )


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Folder to write; it must not exist.")] = "demo-pruned",
    ratio: Annotated[float, typer.Option(help="Share of the heads and channels of every layer that goes.")] = 0.2,
    preset: Annotated[str, typer.Option(help="As in prune.")] = "ours",
    as_json: JsonOption = False,
) -> None:
    """Prune the bundled demo model and measure it on text it has never seen."""
    import tempfile

    from minillm_jax import demo as bundled

    with tempfile.TemporaryDirectory() as folder:
        training, held_out = Path(folder, "training.txt"), Path(folder, "held-out.txt")
        training.write_text(bundled.training_text(), encoding="utf-8")
        held_out.write_text(bundled.held_out_text(), encoding="utf-8")
        options = {"preset": preset, "evaluate": str(held_out), "as_json": as_json}
        prune(str(bundled.FOLDER), str(training), output, ratio, **options)


@app.command("presets")
def show_presets(as_json: JsonOption = False) -> None:
    """The recipes that --preset knows, and what they set."""
    from minillm_jax.report import tables

    _show(as_json, tables.presets_json, tables.presets_table)


def _job(chosen: dict[str, Any]) -> "Job":
    """The job that the options of `prune` describe, by their names."""
    from minillm_jax.budget.budget import Budget
    from minillm_jax.pruning.refit import Refit
    from minillm_jax.run import Job
    from minillm_jax.scoring.gradient.settings import Estimation
    from minillm_jax.scoring.score import Scoring

    estimation = Estimation(
        epsilon=_epsilon(chosen["epsilon"]),
        per_step=chosen["directions_per_step"],
        memory=_bytes("--memory", chosen["memory"]),
        **_named(chosen, "difference space directions seed distribution rank per_sequence rng"),
    )
    factors = None if chosen["factors"] is None else tuple(chosen["factors"].split(","))
    scoring = Scoring(
        estimation=estimation, factors=factors, **_named(chosen, "criterion activation_norm within across seed")
    )
    budget = Budget(
        ratio=chosen["ratio"],
        of=chosen["ratio_of"],
        target=_target(chosen),
        allocation=chosen["budget"],
        layers=None if chosen["layers"] == "all" else _layer_range(chosen["layers"]),
        window=chosen["seq_len"],
        **_named(chosen, "round_heads_to round_width_to"),
    )
    return Job(
        budget=budget,
        structures=tuple(chosen["structures"].split(",")),
        length=chosen["seq_len"],
        scoring=scoring,
        refit=Refit(chosen["refit"], **_named(chosen, "alpha ridge solver inner")),
        evaluation=chosen["evaluate"],
        **_named(chosen, "model calibration output heads rounds samples seed preset window dtype format"),
        **_named(chosen, "max_shard_size checkpoint mesh hosts"),
    )


def _named(chosen: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: chosen[name] for name in names.split()}


def _target(chosen: dict[str, Any]) -> tuple[str, float] | None:
    """The target that is given, and its measure."""
    options = {"target_params": "parameters", "target_macs": "macs", "target_memory": "memory"}
    given = [option for option in options if chosen[option] is not None]
    if len(given) > 1:
        raise InputError("give one target: --target-params, --target-macs or --target-memory")
    if not given:
        return None
    text, (option,) = chosen[given[0]], given
    if option == "target_memory":
        return options[option], float(_bytes("--target-memory", text) or 0)
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([kMGBT]?)", text, re.ASCII)
    if found is None:
        raise InputError(f"--{option.replace('_', '-')} {text!r} is not a number; expected 5.4B or 120M, for example")
    return options[option], float(found[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}[found[2]]


def _run(job: "Job", as_json: bool) -> None:
    from minillm_jax import run as jobs
    from minillm_jax.devices import hosts
    from minillm_jax.report import tables

    with _progress(quiet=as_json) as progress:
        result = jobs.run(job, progress, tables.documents)
    if hosts.is_writer():
        _show(as_json, lambda: tables.result_json(result), lambda: tables.result_table(result))


def _show(as_json: bool, value: Callable[[], dict[str, Any]], table: Callable[[], "Table"]) -> None:
    from rich.console import Console

    if as_json:
        print(json.dumps(value()))
    else:
        Console().print(table())


@contextmanager
def _progress(quiet: bool) -> Iterator["StageProgress"]:
    """A progress bar for each stage on standard error; none where it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda stage, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def _epsilon(text: str) -> float | None:
    """A number, or None for `auto`."""
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--epsilon {text!r} is not a number; expected 1e-3 for example, or auto") from None


def _bytes(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kMGT]?)B", text, re.ASCII)
    if found is None:
        raise InputError(f"{option} {text!r} is not a size; expected 2GB or 500MB, for example")
    return round(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))


def _layer_range(text: str) -> tuple[int, int]:
    """First and last; the last counted from the end where it is negative."""
    found = re.fullmatch(r"(\d{1,9}):(-?\d{1,9})", text, re.ASCII)
    if found is None:
        raise InputError(f"--layers {text!r} is not a range; expected A:B, 4:30 for example, 4:-2 or all")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
