"""Finished runs, read from the report.json of their folders, and the groups in which they can be compared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, log
from pathlib import Path
from typing import Any

from minillm_jax.errors import InputError, reason, shortened
from minillm_jax.paths import absolute_path
from minillm_jax.report.summary import short_name

# The file of a pruning or recovery, and that of a comparison.
FILE, COMPARISON = "report.json", "compare.json"

# Perplexities of one dense model on the same windows differ by less, in nats, whatever the type of the weights.
_SAME = 0.01


@dataclass(frozen=True)
class Run:
    """One model: that of a run, or the dense model of a group.

    Attributes:
      name: last part of the folder, with as many further parts as tell it from the others.
      kind: `pruned`, `recovered`, `compared` or `dense`.
      base_model: the dense model, as the run names it.
      text: what the perplexity was measured on; None where none was measured.
      windows: fingerprint of the windows; None in reports that lack it.
      window: tokens of a window.
      parameters: of the model.
      memory: bytes of the weights, keys and values.
      memory_window: tokens of the keys and values.
      perplexity: of the model.
      stderr: its standard error.
      dense: perplexity of the dense model.
      dense_parameters: of the dense model.
      dense_memory: of the dense model, bytes.
      seconds: of the run.
    """

    name: str
    kind: str
    base_model: str
    parameters: int
    text: str | None = None
    windows: str | None = None
    window: int | None = None
    memory: int | None = None
    memory_window: int | None = None
    perplexity: float | None = None
    stderr: float | None = None
    dense: float | None = None
    dense_parameters: int | None = None
    dense_memory: int | None = None
    seconds: float | None = None

    @property
    def ratio(self) -> float | None:
        """The perplexity over that of the dense model."""
        return None if self.perplexity is None or not self.dense else self.perplexity / self.dense


@dataclass
class Group:
    """Runs that can be compared: one dense model, one text, one window.

    Attributes:
      runs: in the order of the folders; the dense model comes first where its perplexity is known.
    """

    runs: list[Run] = field(default_factory=list)

    def takes(self, run: Run) -> bool:
        """Whether a run belongs to the group."""
        first = self.runs[0]
        if (run.base_model, run.window, _text_of(run)) != (first.base_model, first.window, _text_of(first)):
            return False
        known = [
            (one.dense, run.dense) for one in self.runs if one.dense is not None and run.dense is not None
        ]  # a path may have held another model, or another text
        same = all(abs(log(one / other)) < _SAME for one, other in known)
        return same and all(
            one.dense_parameters == run.dense_parameters
            for one in self.runs
            if one.dense_parameters is not None and run.dense_parameters is not None
        )

    def completed(self) -> "Group":
        """The group with the dense model, and its perplexity in every run, where a run knows it."""
        runs = [replace(run, dense=run.dense or self._known("dense")) for run in self.runs]
        parameters, perplexity = self._known("dense_parameters"), self._known("dense")
        if parameters is None:
            return Group(runs)
        first, memory = runs[0], self._known("dense_memory")
        windows = {run.memory_window for run in runs if run.dense_memory is not None}
        dense = Run(
            short_name(first.base_model),
            "dense",
            first.base_model,
            parameters,
            first.text,
            first.windows,
            first.window,
            memory,
            windows.pop() if len(windows) == 1 else None,
            perplexity,
            dense=perplexity,
        )
        return Group([dense, *runs])

    def _known(self, name: str) -> Any:
        return next((value for run in self.runs if (value := getattr(run, name)) is not None), None)


def _text_of(run: Run) -> str | None:
    return run.windows or run.text


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Runs in groups that can be compared, in the order of their first runs.

    Two runs are in one group if base model, window and text are the same. Texts are the same if the fingerprints of
    their windows are, or if both reports lack it and their names are the same; and if the perplexities of the dense
    model, where both are known, agree.
    """
    groups: list[Group] = []
    for run in runs:
        group = next((one for one in groups if one.takes(run)), None)
        if group is None:
            groups.append(Group([run]))
        else:
            group.runs.append(run)
    return [group.completed() for group in groups]


# ------------------------------------------------------------------------------------------------------------ reading


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs of some folders, in their order.

    Raises:
      InputError: no folder is named, one is named twice, or its report is missing or broken.
    """
    if not folders:
        raise InputError("no run is named; name the output folders of prune, recover or compare")
    paths = [absolute_path(folder, "folder of a run") for folder in folders]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: the folder is named twice; name every run once")
    return [run for path, name in zip(paths, _names(paths), strict=True) for run in _read(path, name)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of every path, or as many parts as tell all of them apart."""
    most = max(len(path.parts) for path in paths)
    names = (["/".join(path.parts[-count:]) for path in paths] for count in range(1, most + 1))
    return next(each for each in names if len(set(each)) == len(paths))


def _read(folder: Path, name: str) -> list[Run]:
    """The runs of a folder: that of its report, and the models of its comparison."""
    report, comparison = (_json(folder / file) for file in (FILE, COMPARISON))
    if report is None and comparison is None:
        missing = "there is no such folder" if not folder.exists() else f"the folder has no {FILE}"
        raise InputError(f"{folder}: {missing}; name a folder that prune, recover or compare has written")
    found = [] if comparison is None else _compared(comparison, name)
    if report is None:
        return found
    return [_recovered(report, name) if "points" in report.values else _pruned(report, name), *found]


def _json(path: Path) -> "_Report | None":
    """The object of a file; None where there is no such file."""
    try:
        return _Report(path, json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: the report cannot be read ({reason(error)}); run the command again") from error


def _compared(report: "_Report", name: str) -> list[Run]:
    """The models that `compare` has measured beside a dense one, each named by its folder too."""
    dense = report.part("dense")
    shared = {
        "base_model": dense.text("model"),
        "text": report.text("text"),
        "windows": report.text("fingerprint") if report.values.get("fingerprint") else None,
        "window": report.number("window"),
        "dense": dense.number("perplexity"),
        "dense_parameters": dense.number("parameters"),
    }
    return [
        Run(
            f"{name}: {short_name(other.text('model'))}",
            "compared",
            parameters=other.number("parameters"),
            perplexity=other.number("perplexity"),
            **shared,
        )
        for other in report.parts("others")
    ]


def _pruned(report: "_Report", name: str) -> Run:
    before, after = report.part("costs.before"), report.part("costs.after")
    run = Run(
        name,
        "pruned",
        report.text("base_model"),
        report.number("parameters_after"),
        memory=after.number("memory"),
        memory_window=report.number("costs.window"),
        dense_parameters=report.number("parameters_before"),
        dense_memory=before.number("memory"),
        seconds=report.seconds(),
    )
    return _measured(run, report, "perplexity_before")


def _recovered(report: "_Report", name: str) -> Run:
    costs = "costs" in report.values
    run = Run(
        name,
        "recovered",
        report.text("base_model"),
        report.number("parameters"),
        memory=report.number("costs.after.memory") if costs else None,
        memory_window=report.number("costs.window") if costs else None,
        dense_parameters=report.number("parameters_dense") if report.values.get("parameters_dense") else None,
        seconds=report.seconds(),
    )
    return _measured(run, report, "perplexity_teacher")


def _measured(run: Run, report: "_Report", dense: str) -> Run:
    """The run with its perplexity, and that of the dense model, where they were measured."""
    if not report.values.get("perplexity_after"):
        return run
    after = report.part("perplexity_after")
    return replace(
        run,
        text=report.text("evaluation"),
        windows=after.text("fingerprint") if after.values.get("fingerprint") else None,
        window=after.number("window"),
        perplexity=after.number("perplexity"),
        stderr=after.number("stderr") if after.values.get("stderr") is not None else None,
        dense=report.number(f"{dense}.perplexity") if report.values.get(dense) else None,
    )


class _Report:
    """An object of a report.json, whose fields are checked when they are read.

    Args:
      path: of the file, for messages.
      found: the object.

    Raises:
      InputError: it is no object; or, of the methods, a field is missing or has another type.
    """

    def __init__(self, path: Path, found: object) -> None:
        if not isinstance(found, dict):
            raise InputError(f"{path}: the report holds no JSON object; it is not one of prune or recover")
        self._path, self.values = path, found

    def _get(self, name: str, kinds: tuple[type, ...], what: str) -> Any:
        value: Any = self.values
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, kinds) or isinstance(value, bool):
            shown = "nothing" if value is None else shortened(repr(value))
            raise InputError(
                f"{self._path}: the report is broken at {name}, expected {what}, found {shown}; run the command again"
            )
        return value

    def number(self, name: str) -> Any:
        """A finite number that is not negative, by the names that lead to it."""
        value = self._get(name, (int, float), "a number")
        if not (isfinite(value) and value >= 0):
            raise InputError(f"{self._path}: the report is broken at {name}, expected a finite number, found {value}")
        return value

    def text(self, name: str) -> str:
        """A text."""
        return self._get(name, (str,), "a text")

    def part(self, name: str) -> "_Report":
        """An object inside the object."""
        return _Report(self._path, self._get(name, (dict,), "an object"))

    def parts(self, name: str) -> "list[_Report]":
        """The objects of a list."""
        return [_Report(self._path, one) for one in self._get(name, (list,), "a list")]

    def seconds(self) -> float:
        """The seconds of all stages."""
        stages = self.part("seconds")
        return float(sum(stages.number(stage) for stage in stages.values))
