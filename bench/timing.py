"""The timing loop of the benchmarks. A module of the benchmarks, not a script.

Programs take turns, so that a change of the machine's speed affects all programs. The first call of each program
compiles and does not count. Every run lasts until its arrays are ready. The benchmarks report medians over rounds, and
ratios of medians.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax

Program = Callable[[], Any]


def seconds(program: Program) -> float:
    """Seconds of one run, until its JAX arrays are ready. A PyTorch program must wait for its own arrays."""
    started = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - started


def take_turns(programs: Mapping[str, Program], rounds: int) -> dict[str, list[float]]:
    """The times of every program, in seconds and in the order of the rounds."""
    for program in programs.values():
        seconds(program)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            times[name].append(seconds(program))
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each program's times."""
    return {name: median(durations) for name, durations in times.items()}
