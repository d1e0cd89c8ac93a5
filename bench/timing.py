"""The timing loop of the benches: no module of its own to run.

Programs take turns, so that a drift of the machine's speed meets all of them; the first call of each compiles and
does not count; every run is waited for. What is reported is the median over rounds, and ratios of medians.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax

Program = Callable[[], Any]


def seconds(program: Program) -> float:
    """One timed run, waiting for the arrays that it returns; a program of another library waits for its own."""
    started = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - started


def take_turns(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """All times of every program, in seconds and in the order they were taken."""
    for program in programs.values():
        seconds(program)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(seconds(program))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each program's times."""
    return {name: median(all_) for name, all_ in times.items()}
