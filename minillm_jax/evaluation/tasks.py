"""Zero-shot and few-shot tasks through lm-eval: several models on the same questions in one run."""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

from minillm_jax.errors import InputError, cause, one_of, shortened
from minillm_jax.model.loaded import Model
from minillm_jax.model.streamed import check_in_memory
from minillm_jax.progress import StageProgress, tell

# Names for several tasks, beside the groups of lm-eval (`blimp`, `mmlu`): the seven tasks of LLM-Pruner's tables
# (arXiv 2305.11627), and those of MINI-LLM's by kind: classification, multiple choice, generation.
GROUPS: dict[str, tuple[str, ...]] = {
    "llm-pruner": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    "mini-llm": ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad_completion", "drop"),
}

# The tasks whose published figures are acc_norm, the accuracy by log-likelihood per byte; the others take acc.
NORMALISED = ("hellaswag", "arc_challenge", "openbookqa")

# Metrics that a task may have, the first of which is its main one.
ACCURACY, NORMALISED_ACCURACY = "acc", "acc_norm"


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are evaluated.

    Attributes:
      tasks: names of tasks of lm-eval, of its groups, or of `GROUPS`.
      fewshot: examples before every question; the number of the task itself by default.
      limit: questions of each task at most.
      include_path: folder with further tasks as YAML.
      seed: draws the examples.
    """

    tasks: tuple[str, ...]
    fewshot: int | None = None
    limit: int | None = None
    include_path: str | None = None
    seed: int = 1234


class Score(NamedTuple):
    """One metric of a task.

    Attributes:
      task: name of the task or group.
      metric: name of the metric, as in lm-eval.
      value: the metric.
      error: its standard error; None where lm-eval gives none.
      questions: number of questions.
    """

    task: str
    metric: str
    value: float
    error: float | None
    questions: int


@dataclass(frozen=True)
class TaskScores:
    """The metrics of one model.

    Attributes:
      scores: of every task and metric, tasks in the order that was asked for.
      versions: version of every task.
      harness: version of lm-eval.
    """

    scores: tuple[Score, ...]
    versions: Mapping[str, Any]
    harness: str


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Names of tasks with those of `GROUPS` in place of the groups, each once."""
    return tuple(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def check(settings: TaskSettings) -> None:
    """Check what can be checked before a model is read.

    Raises:
      InputError: lm-eval is not installed, a number is out of its range, a folder is missing, or a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-eval: pip install 'minillm-jax[eval]'")
    if not settings.tasks:
        raise InputError("no task is given; name one with --tasks, for example llm-pruner or piqa,arc_easy")
    for flag, value, least in (("--fewshot", settings.fewshot, 0), ("--limit", settings.limit, 1)):
        if value is not None and value < least:
            raise InputError(f"{flag} {value}: expected a whole number of at least {least}")
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        raise InputError(f"--include-path {settings.include_path}: no such folder")
    known = _manager(settings).all_tasks
    for name in expanded(settings.tasks):
        if name not in known:
            near = [task for task in known if name.lower() in task.lower()][:5]
            one_of("task", name, near or [*GROUPS, "boolq", "piqa", "mmlu", "blimp", "gsm8k"])


def evaluate(
    models: Iterable[tuple[str, Model]], settings: TaskSettings, progress: StageProgress | None = None
) -> dict[str, TaskScores]:
    """The metrics of several models on the same questions.

    Args:
      models: names and models, taken one after another; each needs a tokenizer.
      settings: tasks, numbers of examples and questions.
      progress: called with a stage for each model, and how many requests are done.

    Raises:
      InputError: see `check`; or the questions of a task cannot be read.
    """
    check(settings)
    questions = questions_of(settings)
    return {
        name: scores_of(model, questions, settings, partial(tell, progress, f"tasks, {name}")) for name, model in models
    }


def questions_of(settings: TaskSettings) -> list[Any]:
    """The tasks and groups of lm-eval that are asked for, with their questions.

    Raises:
      InputError: the questions of a task cannot be read.
    """
    return [task for name in expanded(settings.tasks) for task in _loaded(name, settings)]


def scores_of(
    model: Model,
    questions: Sequence[Any],
    settings: TaskSettings,
    told: Callable[[int, int], None] | None = None,
) -> TaskScores:
    """The metrics of one model.

    Args:
      model: it needs a tokenizer.
      questions: of `questions_of`; several models can take the same.
      settings: as for `questions_of`.
      told: called with the number of requests done, and of all.

    Raises:
      InputError: the layers of the model are not in memory.
    """
    from lm_eval.evaluator import simple_evaluate

    from minillm_jax.evaluation.harness import Harness

    check_in_memory(model.decoder, "a task")
    found = simple_evaluate(
        Harness(model, told=told),
        tasks=list(questions),
        num_fewshot=settings.fewshot,
        limit=settings.limit,
        task_manager=_manager(settings),
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=cast(Any, None),  # PyTorch draws nothing here
        fewshot_random_seed=settings.seed,
        log_samples=False,
    )
    assert found is not None, "a single process has all results"
    return TaskScores(tuple(_scores(found)), dict(found.get("versions", {})), version("lm_eval"))


def _loaded(name: str, settings: TaskSettings) -> list[Any]:
    """The tasks or the group of a name, with their questions."""
    try:
        found = _manager(settings).load([name])
    except Exception as error:  # of data sets, files and connections
        raise InputError(
            f"the questions of {name} cannot be read ({shortened(cause(error), 200)}); without a connection to the "
            "Hub, give tasks with local files by --include-path"
        ) from error
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _manager(settings: TaskSettings) -> Any:
    """Knows the tasks of a folder alone where these are all that is asked for: lm-eval's own are thousands of files."""
    if settings.include_path is not None:
        alone = _indexed(settings.include_path, False)
        if set(expanded(settings.tasks)) <= set(alone.all_tasks):
            return alone
    return _indexed(settings.include_path, True)


@cache
def _indexed(include_path: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    # Its warnings are remarks on settings that are made here on purpose.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """All metrics of lm-eval's result, whose names are `metric,filter`."""
    for task, metrics in found["results"].items():
        questions = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if which and not metric.endswith("_stderr") and isinstance(value, float | int):
                error = metrics.get(f"{metric}_stderr,{which}")
                named = metric if which == "none" else f"{metric} ({which})"
                yield Score(task, named, float(value), error if isinstance(error, float) else None, int(questions))


def main_metric(scores: Sequence[Score], task: str) -> Score | None:
    """The metric of published tables: acc_norm for the tasks of `NORMALISED`, else acc, else the first one."""
    of_task = {score.metric: score for score in scores if score.task == task}
    order = [NORMALISED_ACCURACY, ACCURACY] if task in NORMALISED else [ACCURACY, NORMALISED_ACCURACY]
    return next((of_task[name] for name in [*order, *of_task] if name in of_task), None)


def mean(scores: Sequence[Score], tasks: Sequence[str]) -> tuple[float, float] | None:
    """Mean of the main metrics of some tasks, and its standard error; None if one of these has none."""
    found = [main_metric(scores, task) for task in tasks]
    if not found or any(score is None or score.error is None for score in found):
        return None
    values = [score.value for score in found if score is not None]
    errors = [score.error for score in found if score is not None and score.error is not None]
    return math.fsum(values) / len(values), math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
