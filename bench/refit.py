"""Time and memory of the default recipe at a real size: structured OBS and the refit, on random weights.

    python bench/refit.py [--preset 7B] [--layers 3] [--dtype float32] [--ratio 0.2] [--samples 64]
        [--length 128] [--solver host] [--output bench/results/refit.json]

The default recipe scores, refits and slices in one walk over the layers, with no gradient estimate. The decoder has
`--layers` layers of the preset's shape. A row of kind `layer` for every layer holds its seconds and those of each part:

    moments     the moments; on the host, waits for the residual streams
    system      the linear systems in float64
    inverse     the inverse of the system's matrix
    products    all products of two rows of the least-squares weights
    order       the removal order
    ridge       the choice of the ridges
    solve       the kept rows, and the input refit
    outputs     with `--solver device`: the kept groups and rows of the output projections, from their moments
    inputs      with `--solver device`: the input refit
    rest        the residual streams, slicing

The first layer also compiles. The row of kind `whole` multiplies the median of the other layers by the number of layers
of the preset. It holds the peak memory, which includes the weights of the `--layers` layers. The device computes
residual streams while the host solves, so a part can include time of the previous layer.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from environment import environment, peak_bytes
from shapes import SHAPES, layer_bytes, random_decoder

from minillm_jax.budget.budget import kept_count
from minillm_jax.data.batches import Batches
from minillm_jax.model.axis_table import KINDS
from minillm_jax.model.tree import group_counts
from minillm_jax.pruning import refit, solve, solver, system
from minillm_jax.settings import SOLVERS

# Solver -> part -> the owner of the function of that part, and the function's name.
PARTS: dict[str, dict[str, tuple[Any, str]]] = {
    "host": {
        "moments": (solver.Solver, "problem"),
        "system": (solver, "system_with_ridge"),
        "inverse": (solve, "inverse"),
        "products": (solver, "products_of_best"),
        "order": (solver, "greedy_removal"),
        "ridge": (system.HeldOut, "best"),
        "solve": (solve, "solve"),
    },
    "device": {
        "moments": (solver.Solver, "problem"),
        "outputs": (solver.DeviceFit, "choose_and_refit"),
        "inputs": (solver.DeviceFit, "refit"),
    },
}


@contextmanager
def watched(name: str) -> Iterator[dict[str, float]]:
    """Seconds of every part of a solver so far. Inside the block, the functions of `PARTS` measure their own time."""
    parts = PARTS[name]
    seconds = dict.fromkeys(parts, 0.0)
    inside = [False]

    def watch(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **settings: Any) -> Any:
            if inside[0]:  # the outer part counts this time
                return function(*arguments, **settings)
            inside[0], started = True, time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                seconds[part] += time.perf_counter() - started
                inside[0] = False

        return timed

    functions = {part: getattr(module, name) for part, (module, name) in parts.items()}
    for part, (module, name) in parts.items():
        setattr(module, name, watch(part, functions[part]))
    try:
        yield seconds
    finally:
        for part, (module, name) in parts.items():
            setattr(module, name, functions[part])


def layers(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each layer, then one row for all layers of the preset."""
    sizes = SHAPES[arguments.preset]
    decoder = random_decoder(arguments.preset, arguments.dtype, layers=arguments.layers)
    windows = np.random.default_rng(1).integers(0, sizes.V, (arguments.samples, arguments.length), np.int32)
    counts = {kind: [kept_count(n, arguments.ratio) for n in group_counts(decoder, kind)] for kind in KINDS}
    settings = refit.Refit(solver=arguments.solver)
    rows: list[dict[str, Any]] = []
    with watched(arguments.solver) as part_seconds:
        last, before = [time.perf_counter()], dict(part_seconds)

        def progress(done: int, total: int) -> None:
            if done % len(KINDS):
                return
            now = time.perf_counter()
            parts = {part: round(part_seconds[part] - before[part], 2) for part in part_seconds}
            seconds = round(now - last[0], 2)
            rows.append({"kind": "layer", "layer": done // len(KINDS) - 1, "seconds": seconds, **parts})
            rows[-1]["rest"] = round(seconds - sum(parts.values()), 2)
            last[0] = now
            before.update(part_seconds)
            print(json.dumps(rows[-1]), flush=True)

        pruned, _ = refit.prune_by_obs(decoder, counts, Batches(windows), settings, progress)
        jax.block_until_ready(jax.tree.leaves(pruned))
    assert all(math.isfinite(float(leaf.sum())) for leaf in jax.tree.leaves(pruned)), "a refitted array is not finite"
    yield from rows
    per_layer = median(row["seconds"] for row in rows[1:] or rows)
    yield {
        "kind": "whole",
        "layers": len(sizes.layers),
        "seconds": round(per_layer * len(sizes.layers), 1),
        "layer_bytes": layer_bytes(decoder),
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Print a line for each row, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--solver", choices=SOLVERS, default="host")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = list(layers(arguments))
    print(json.dumps(rows[-1]))
    if arguments.output is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "output"}
        result = {"environment": environment(), "settings": settings, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
