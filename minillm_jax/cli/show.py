"""Printing: tables, JSON, progress bars on a terminal and lines elsewhere."""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from minillm_jax.errors import InputWarning

if TYPE_CHECKING:
    from rich.table import Table

    from minillm_jax.progress import StageProgress

# Seconds between two lines of a stage that is not over.
LINE_EVERY = 10.0


def show(as_json: bool, value: Callable[[], dict[str, Any]], table: Callable[[], "Table"]) -> None:
    """One JSON object, or a table, on standard output."""
    from rich.console import Console

    if as_json:
        print(json.dumps(value()))
    else:
        Console().print(table())


def show_warnings() -> None:
    """Prints every `InputWarning` once, as a sentence on standard error, and no warning of another library.

    With several processes, process 0 prints, once the processes are joined. `python -W` and PYTHONWARNINGS bring the
    others back.
    """
    printed: set[str] = set()  # Python's own memory of warnings is lost where a library changes the filters

    def print_one(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, InputWarning):
            if _prints() and str(message) not in printed:
                printed.add(str(message))
                print(f"minillm-jax: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
        else:
            others(message, category, *rest, **more)

    others = warnings.showwarning
    warnings.showwarning = print_one
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    warnings.simplefilter("always", InputWarning)


def _prints() -> bool:
    """Whether this process prints: of several joined processes, process 0.

    Before the processes are joined their numbers are not known, and to ask JAX for them would keep them from joining.
    """
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


@contextmanager
def progress(quiet: bool) -> Iterator["StageProgress"]:
    """Progress on standard error: a bar for each stage on a terminal, lines elsewhere, nothing with `quiet`."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet:
        yield lambda stage, done, total: None
    elif console.is_terminal:
        with _bars(console) as update:
            yield _by_writer(update)
    else:
        yield _by_writer(Lines(sys.stderr))


def _by_writer(told: "StageProgress") -> "StageProgress":
    """Progress that only the printing process shows."""

    def update(stage: str, done: int, total: int) -> None:
        if _prints():
            told(stage, done, total)

    return update


@contextmanager
def _bars(console: Any) -> Iterator["StageProgress"]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


class Lines:
    """Progress as lines: stage, layer or step, seconds, memory. For logs of long jobs.

    Stages of the layer walk (`refit`, `layers`, `scores`) print a line for each layer; other stages print at most one
    line every `every` seconds, and one at their end.

    Args:
      stream: a text stream.
      every: seconds.
    """

    def __init__(self, stream: Any, every: float = LINE_EVERY) -> None:
        self._stream, self._every = stream, every
        self._started: dict[str, float] = {}
        self._printed: dict[str, tuple[int, float]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        started = self._started.setdefault(stage, now)
        unit, count, whole = ("layer", done // 2, total // 2) if stage == "refit" else ("", done, total)
        last, at = self._printed.get(stage, (0, started))
        by_layer = stage in ("refit", "layers", "scores")
        if count == last or not (by_layer or done == total or now - at >= self._every):
            return
        self._printed[stage] = count, now
        name = f"{unit} {count}/{whole}".strip()
        print(f"{stage:<12} {name:<14} {now - started:8.1f} s  {_memory()}", file=self._stream, flush=True)


def _memory() -> str:
    """Resident memory of the process, and what the first device holds where it says so."""
    words = []
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        words.append(f"peak {peak * (1 if sys.platform == 'darwin' else 1024) / 1e6:,.0f} MB")
    except ImportError:  # not a POSIX system
        pass
    import jax

    used = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
    if used is not None:
        words.append(f"device {used / 1e6:,.0f} MB")
    return ", ".join(words)
