"""Time of a paired loss as a ratio to the plain forward loss in the same run.

    python bench/pair.py [--output bench/results/pair.json]

25 M parameters, 8 windows of 128 tokens, float32. The programs take turns, so that a drift of the machine's speed meets
all of them; the median over rounds is reported.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jax
from environment import environment
from jax import numpy as jnp
from memory import CONFIG, SHAPES

from minillm_jax.decoder import build, initialise
from minillm_jax.estimate import directions, gradient
from minillm_jax.estimate.spaces import Weights
from minillm_jax.loss import sequence_losses


def seconds(program: Callable[[], jax.Array]) -> float:
    """One timed run."""
    started = time.perf_counter()
    program().block_until_ready()
    return time.perf_counter() - started


def main() -> None:
    """Print a line for each program, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    decoder = initialise(build(CONFIG, SHAPES["25M"]), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 128), 0, SHAPES["25M"].V)
    keys, epsilon = directions.direction_keys(0, 0, 1), jnp.float32(1e-3)
    programs: dict[str, Callable[[], jax.Array]] = {"forward": lambda: sequence_losses(decoder, tokens)}
    for name in directions.DISTRIBUTIONS:
        space = Weights(name)
        space = Weights(name)
        programs[f"pair, {name}"] = lambda space=space: gradient.paired_losses(decoder, keys, tokens, epsilon, space)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        seconds(program)  # compiles
    for _ in range(arguments.rounds):
        for name, program in programs.items():
            times[name].append(seconds(program))
    forward = median(times["forward"])
    rows = [
        {"program": name, "milliseconds": round(1e3 * median(all_), 1), "forwards": round(median(all_) / forward, 3)}
        for name, all_ in times.items()
    ]
    for row in rows:
        print(json.dumps(row))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
