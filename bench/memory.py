"""Memory of the paired loss beside that of the plain forward loss, from the compiler's own account.

    python bench/memory.py [--output bench/results/memory.json]

Nothing is allocated: both programs are lowered for abstract weights. Compiling for the CPU keeps float32 copies of
bfloat16 weights, so this is float32; and it is the difference of temporaries that carries over to other backends.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
from environment import environment
from jax import numpy as jnp
from shapes import CONFIG, SHAPES

from minillm_jax.decoder import Decoder, build, depth, parameter_count
from minillm_jax.estimate import directions, gradient
from minillm_jax.estimate.directions import Directions
from minillm_jax.estimate.spaces import Weights
from minillm_jax.loss import sequence_losses


def layer_bytes(decoder: Decoder) -> int:
    """Bytes of one layer's weights."""
    run = decoder.runs[0]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run)) // depth(run)


def account(compiled: Any) -> dict[str, int]:
    """Argument and temporary bytes of a compiled program."""
    memory = compiled.memory_analysis()
    return {"argument": memory.argument_size_in_bytes, "temp": memory.temp_size_in_bytes}


def measure(name: str, batch: int, length: int, count: int, at_once: int, distribution: str) -> dict[str, Any]:
    """Both programs at one shape."""
    abstract = build(CONFIG, SHAPES[name])
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    drawn = jax.eval_shape(lambda: Directions.plain(directions.direction_keys(0, 0, count)).stacked(at_once))
    windows, epsilon = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    forward = account(sequence_losses.lower(abstract, tokens).compile())
    lowered = gradient.paired_losses.lower(abstract, drawn, tokens, windows, epsilon, Weights(distribution))
    pair = account(lowered.compile())
    return {
        "shape": name,
        "parameters": parameter_count(abstract),
        "batch": batch,
        "length": length,
        "directions": count,
        "directions_at_once": at_once,
        "distribution": distribution,
        "forward": forward,
        "pair": pair,
        "layer_bytes": layer_bytes(abstract),
        "ratio": round(sum(pair.values()) / sum(forward.values()), 4),
        "extra_layers": round((pair["temp"] - forward["temp"]) / layer_bytes(abstract), 4),
    }


def main() -> None:
    """Print a line for each shape, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["25M", "7B"], choices=list(SHAPES))
    parser.add_argument("--distributions", nargs="+", default=list(directions.DISTRIBUTIONS))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.shapes:
        for distribution in arguments.distributions:
            row = measure(name, batch=8, length=128, count=16, at_once=1, distribution=distribution)
            rows.append(row)
            print(json.dumps(row))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
