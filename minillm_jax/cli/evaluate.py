"""The command `eval`."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm_jax.cli.arguments import (
    BosOption,
    DtypeOption,
    FieldOption,
    HostsOption,
    JsonOption,
    MeshOption,
    ModelArgument,
    ShownQuietOption,
)
from minillm_jax.cli.show import progress, show
from minillm_jax.errors import InputError
from minillm_jax.recipes import recipe as recipes

if TYPE_CHECKING:
    from minillm_jax.data.batches import Batches
    from minillm_jax.evaluation.tasks import TaskSettings
    from minillm_jax.model.loaded import Model
    from minillm_jax.progress import StageProgress
    from minillm_jax.report.evaluation import Measured


def evaluate(
    model: ModelArgument,
    text: Annotated[
        str | None,
        typer.Option(help="Text, .json, .jsonl, .csv, .parquet or .npy (token ids) file, or a Hub data set."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-eval, with commas between; llm-pruner and mini-llm stand for the tasks of these papers.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="MODEL", help="Another model on the same text and questions; again for more."
        ),
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Examples before a question; the task's own number by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="COUNT", help="Questions of each task at most.")] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder with further tasks as YAML, such as local ones.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Put the tasks into the report of MODEL; the first --against is before.")
    ] = False,
    window: Annotated[str, typer.Option(metavar="COUNT", help="Tokens of a window.")] = "128",
    field: FieldOption = "text",
    bos: BosOption = "auto",
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
    hosts: HostsOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub, of MODEL.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read one layer at a time, for the perplexity of a model of any size.")
    ] = False,
    as_json: JsonOption = False,
    quiet: ShownQuietOption = False,
) -> None:
    """Measure the perplexity on a text, the accuracy on tasks, or both; of one model, or of several side by side."""
    from convert.folders import add_texts
    from minillm_jax import api
    from minillm_jax.data.documents import check_source
    from minillm_jax.data.mixture import check_one_text
    from minillm_jax.devices import hosts as processes
    from minillm_jax.devices import sharding
    from minillm_jax.evaluation import tasks as of_tasks
    from minillm_jax.report import evaluation as reports

    given = {"window": window} | ({} if dtype is None else {"dtype": dtype})
    settings, _ = recipes.with_options(recipes.Recipe(), given)
    questions = _task_settings(tasks, fewshot, limit, include_path)
    if text is None and questions is None:
        raise InputError("nothing is to be measured; give a text with --text, tasks with --tasks, or both")
    if stream and questions is not None:
        raise InputError("--stream reads one layer at a time, for the perplexity on a text; leave it out for tasks")
    folder = reports.check_report(model, against or [], questions) if report else None
    shape, kind = sharding.parse_mesh(mesh), settings.output.dtype
    if hosts is not None:
        processes.initialise_hosts(processes.parse_hosts(hosts))
    devices = sharding.make_mesh(shape)
    if questions is not None:
        of_tasks.check(questions)
    if text is not None:
        check_one_text(text)
        check_source(text, field, most=1)  # the whole text is read below, before the weights
    names = {model: revision} | dict.fromkeys(against or [])
    described = {name: api.describe(name, kind, commit) for name, commit in names.items()}
    windows = {
        name: None if text is None else api.held_out(one, text, settings.evaluation.window, bos, field)
        for name, one in described.items()
    }
    found = []
    with progress(quiet or as_json) as told:
        asked = [] if questions is None else of_tasks.questions_of(questions)
        for name, commit in names.items():
            loaded = api.load(name, kind, devices, commit, stream)
            found.append(_measured(name, loaded, windows[name], asked, questions, told))
            del loaded  # one model is in memory at a time
    if processes.is_writer():
        if folder is not None:
            add_texts(folder, reports.documents(folder, found), replace=True)
        show(
            as_json,
            lambda: reports.result_json(found, text, questions),
            lambda: reports.table(found, text, questions),
        )


def _measured(
    name: str,
    model: "Model",
    windows: "Batches | None",
    asked: Sequence[Any],
    questions: "TaskSettings | None",
    told: "StageProgress",
) -> "Measured":
    """The figures of one model."""
    from minillm_jax import api
    from minillm_jax.evaluation import tasks
    from minillm_jax.progress import tell
    from minillm_jax.report.evaluation import Measured
    from minillm_jax.report.summary import short_name

    perplexity = None if windows is None else api.evaluate(model, windows, progress=told)
    if questions is None:
        return Measured(name, perplexity, None)
    told_of_tasks = partial(tell, told, f"tasks, {short_name(name)}")
    return Measured(name, perplexity, tasks.scores_of(model, asked, questions, told_of_tasks))


def _task_settings(
    tasks: str | None, fewshot: int | None, limit: int | None, include_path: str | None
) -> "TaskSettings | None":
    """The settings of the tasks; None where none are asked for.

    Raises:
      InputError: an option of tasks is given without tasks.
    """
    from minillm_jax.evaluation.tasks import TaskSettings

    if tasks is not None:
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        return TaskSettings(names, fewshot, limit, include_path)
    for flag, value in (("--fewshot", fewshot), ("--limit", limit), ("--include-path", include_path)):
        if value is not None:
            raise InputError(f"{flag} {value} would do nothing without --tasks; name the tasks")
    return None
