"""Time of a paired loss as a ratio to the plain forward loss in the same run.

    python bench/pair.py [--output bench/results/pair.json]

25 M parameters, 8 windows of 128 tokens, float32. The programs take turns, so that a drift of the machine's speed meets
all of them; the median over rounds is reported.
"""

import argparse
import json
from pathlib import Path

from environment import environment
from jax import numpy as jnp
from shapes import SHAPES, random_decoder, random_tokens
from timing import Program, medians, take_turns

from minillm_jax.estimate import directions, gradient
from minillm_jax.estimate.spaces import Weights
from minillm_jax.loss import sequence_losses


def main() -> None:
    """Print a line for each program, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    decoder = random_decoder("25M")
    tokens = random_tokens(SHAPES["25M"].V, batch=8, length=128)
    keys, epsilon = directions.direction_keys(0, 0, 1), jnp.float32(1e-3)
    programs: dict[str, Program] = {"forward": lambda: sequence_losses(decoder, tokens)}
    for name in directions.DISTRIBUTIONS:
        space = Weights(name)
        programs[f"pair, {name}"] = lambda space=space: gradient.paired_losses(decoder, keys, tokens, epsilon, space)
    times = medians(take_turns(programs, arguments.rounds))
    rows = [
        {"program": name, "milliseconds": round(1e3 * time, 1), "forwards": round(time / times["forward"], 3)}
        for name, time in times.items()
    ]
    for row in rows:
        print(json.dumps(row))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
