"""Time and memory of choosing and refitting at a real size: structured OBS with least squares on random weights.

    python bench/refit.py [--preset 7B] [--layers 3] [--dtype float32] [--ratio 0.2] [--samples 64]
        [--length 128] [--solver host] [--output bench/results/refit.json]

The default recipe, layer after layer, on a decoder of the preset's shape with that many layers: score, slice_and_refit and
slice are one walk there, and there is nothing to estimate. A row of kind `layer` for every layer: its seconds, and how
many of them go to each part,

    system      the moments of the projection's input, waiting for the streams, and the linear system in float64
    inverse     of its matrix
    products    all products of two rows of the best weights
    order       which groups go
    solve       the kept rows, and the maps that turn the inner matrices
    rest        the streams, the moments of the inner matrices, slicing

The first layer compiles too. The row of kind `whole` takes the median of the others for every layer of the preset, and
holds the highest memory, the weights of the layers that ran in it. Streams go on while the host solves, so a part can
be that of the layer before.
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
from minillm_jax.model.axis_table import KINDS
from minillm_jax.model.tree import group_counts
from minillm_jax.pruning import refit, removal_order, solve

PARTS = {
    "system": (refit, "fit_of"),
    "inverse": (solve, "inverse"),
    "products": (removal_order, "products_of_best"),
    "order": (removal_order, "greedy_removal"),
    "solve": (solve, "solve"),
}


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds of every part so far, while the functions that make it are called through a watch."""
    taken = dict.fromkeys(PARTS, 0.0)
    inside = [False]

    def watch(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **settings: Any) -> Any:
            if inside[0]:  # a part of a part
                return function(*arguments, **settings)
            inside[0], started = True, time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                taken[part] += time.perf_counter() - started
                inside[0] = False

        return timed

    functions = {part: getattr(module, name) for part, (module, name) in PARTS.items()}
    for part, (module, name) in PARTS.items():
        setattr(module, name, watch(part, functions[part]))
    try:
        yield taken
    finally:
        for part, (module, name) in PARTS.items():
            setattr(module, name, functions[part])


def layers(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each layer, then one for the whole model."""
    sizes = SHAPES[arguments.preset]
    decoder = random_decoder(arguments.preset, arguments.dtype, layers=arguments.layers)
    windows = np.random.default_rng(1).integers(0, sizes.V, (arguments.samples, arguments.length), np.int32)
    counts = {kind: [kept_count(n, arguments.ratio) for n in group_counts(decoder, kind)] for kind in KINDS}
    settings = refit.Refit(solver=arguments.solver)
    rows: list[dict[str, Any]] = []
    with watched() as taken:
        last, before = [time.perf_counter()], dict(taken)

        def progress(done: int, total: int) -> None:
            if done % len(KINDS):
                return
            now = time.perf_counter()
            seconds = {part: round(taken[part] - before[part], 2) for part in taken}
            whole = round(now - last[0], 2)
            rows.append({"kind": "layer", "layer": done // len(KINDS) - 1, "seconds": whole, **seconds})
            rows[-1]["rest"] = round(whole - sum(seconds.values()), 2)
            last[0] = now
            before.update(taken)
            print(json.dumps(rows[-1]), flush=True)

        pruned, _ = refit.prune_by_obs(decoder, counts, windows, settings, progress)
        jax.block_until_ready(jax.tree.leaves(pruned))
    assert all(math.isfinite(float(leaf.sum())) for leaf in jax.tree.leaves(pruned)), "a refitted array is not finite"
    yield from rows
    each = median(row["seconds"] for row in rows[1:] or rows)
    yield {
        "kind": "whole",
        "layers": len(sizes.layers),
        "seconds": round(each * len(sizes.layers), 1),
        "layer_bytes": layer_bytes(decoder),
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """Measure, print a line for each row, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--solver", choices=solve.SOLVERS, default="host")
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
