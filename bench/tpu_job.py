"""The programs of a streamed pruning compiled for one TPU chip, without one: compile time and memory at 7B, 8B and 70B.

    python bench/tpu_job.py [--shapes 7B 8B 70B] [--topology v5e:2x2] [--memory 16] --output RESULT.json

The default recipe with bfloat16 weights, one layer in memory, batches of 4,096 tokens in windows of 2,048. It needs the
package libtpu. A row for each program:

    compile_seconds     of lowering and compiling, on this machine
    bytes               of the compiler: argument + output + temp - alias
    resident            bytes that are on the chip beside it: the layer in the dense and the pruned model, the
                        sums of earlier batches; in an evaluation the arrays outside the layers, and the next layer
    fits                whether both fit the memory of the chip

A study that was interrupted goes on with the programs that its file lacks.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from environment import environment
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import PartitionSpec, SingleDeviceSharding
from shapes import CONFIG, SHAPES

from minillm_jax.evaluation import layerwise
from minillm_jax.model.build import build, without_layers
from minillm_jax.model.config import Sizes
from minillm_jax.model.loss import losses_of_stream
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning import device_system, walk
from minillm_jax.pruning.device_system import Numbers
from minillm_jax.pruning.float64 import Pair
from minillm_jax.pruning.system import CHOICES

BATCH, LENGTH = 2, 2048


class Program(NamedTuple):
    """A function with its abstract arguments, and the bytes that are on the chip beside it.

    `donated` are the places of the arguments whose memory the program takes.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    resident: int
    donated: tuple[int, ...] = ()


def programs(sizes: Sizes, place: SingleDeviceSharding) -> Iterator[Program]:
    """The programs of one layer of the walk, of its systems, and of the evaluation."""

    def array(*shape: int, kind: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: array(*leaf.shape, kind=leaf.dtype), tree)

    decoder = build(CONFIG, replace(sizes, layers=sizes.layers[:1]), jnp.bfloat16)
    outer, run, layer = placed(jax.eval_shape(without_layers, decoder)), placed(decoder.runs[0]), sizes.layers[0]
    outside, of_layer = size_of(outer), size_of(run)
    stream = array(BATCH, LENGTH, sizes.D)
    angles = tuple(array(LENGTH, sizes.H // 2) for _ in range(2))
    settings = {"config": decoder.config, "mesh": None}
    yield Program(
        "layer, bfloat16", partial(layerwise.advance, mesh=None), (outer, run, half(stream)), outside + of_layer
    )
    for kind, inputs, groups in (("head", layer.N * sizes.H, layer.K), ("channel", layer.F, layer.F)):
        word = {"head": "attention", "channel": "mlp"}[kind]
        state, pair = walk.State(stream), (array(BATCH, LENGTH, inputs), stream)
        sums = array(1, inputs, inputs), array(1, inputs), array(1, inputs, sizes.D), array(1, sizes.D)
        moments = size_of(sums)
        both = 2 * of_layer  # of the dense and the pruned model

        def advanced(run: Any, state: Any, angles: Any, kind: str = kind) -> Any:
            return walk.advance(run, state, kind=kind, angles=angles, **settings)

        def inputs_of(run: Any, state: Any, total: Any, angles: Any, kind: str = kind) -> Any:
            return walk.inputs_and_gaps(run, state, total, kind=kind, angles=angles, **settings)

        yield Program(f"{word}: advance", advanced, (run, state, angles), both)
        yield Program(f"{word}: inputs and gaps", inputs_of, (run, state, stream, angles), both + moments)
        centers = array(inputs), array(sizes.D)
        add = partial(walk.add_pair, shares=1, mesh=None)
        yield Program(f"{word}: Gram matrix", add, (sums, pair, centers), both, donated=(0,))
        yield from of_system(word, (inputs, sizes.D, groups), lambda tree, _: placed(tree), both)
    tokens = array(BATCH, LENGTH, kind=jnp.int32)
    yield Program("loss", losses_of_stream, (outer, half(stream), tokens), of_layer)


def of_system(
    word: str, sizes: tuple[int, int, int], place: Callable[..., Any], resident: int, **places: Any
) -> Iterator[Program]:
    """The programs from the moments of a matrix to its kept groups and their rows.

    Args:
      word: begins their names.
      sizes: numbers of inputs, outputs and groups.
      place: gives abstract arrays their shardings, by specifications in the place of the arrays.
      resident: bytes of a chip beside them.
      places: `mesh` and `rows` of the programs; none for one chip.
    """
    inputs, outputs, groups = sizes
    abstract, whole = partial(jax.ShapeDtypeStruct, dtype=jnp.float32), PartitionSpec()
    shapes = (inputs, inputs), (inputs,), (inputs, outputs), (outputs,), (inputs,), (outputs,)
    gram, *others = sums = place(tuple(map(abstract, shapes)), device_system.SUMS)
    kernel = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    kernel = place(kernel, device_system.SYSTEM.kernel)
    kept = place(jax.ShapeDtypeStruct((groups,), jnp.bool_), whole)
    one, choices = (place(abstract(shape), whole) for shape in ((), (len(CHOICES),)))
    numbers = Numbers(*(3 * (Pair(one, one),)))
    removed = place(jax.ShapeDtypeStruct((), jnp.int32), whole)

    make = partial(device_system.system, biased=False, **places)
    making = gram, tuple(others), None, kernel, numbers
    system = place(jax.eval_shape(make, *making), device_system.SYSTEM)
    yield Program(f"{word}: system", make, making, resident, donated=(0,))
    order = partial(device_system.order, count=groups, parts=1, **places)
    yield Program(f"{word}: order of removal", order, (system.matrix, system.right, removed), resident, donated=(0,))
    make = partial(make, stride=device_system.stride_of(outputs))
    making = gram, tuple(others), tuple(sums), kernel, numbers
    part = place(jax.eval_shape(make, *making), device_system.SYSTEM)
    yield Program(f"{word}: system of a part", make, making, resident, donated=(0,))
    solutions = partial(device_system.solutions, **places)
    yield Program(f"{word}: rows with each ridge", solutions, (part, kept, choices), resident)
    found = place(jax.eval_shape(solutions, part, kept, choices), device_system.SOLUTIONS)
    best = partial(device_system.best_share, **places)
    yield Program(f"{word}: choice of the ridge", best, (part, kept, found), resident)
    refit = partial(device_system.refit, biased=False, **places)
    yield Program(f"{word}: refit", refit, (sums, kernel, numbers, kept), resident)


def half(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same array in bfloat16."""
    return jax.ShapeDtypeStruct(array.shape, jnp.bfloat16, sharding=array.sharding)


def size_of(tree: Any) -> int:
    """Bytes of a tree of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for _, leaf in named_arrays(tree))


def compiled(program: Program, memory: float) -> tuple[dict[str, Any], Any]:
    """The row of a program, and the compiled program; None where the chip has too little memory."""
    started = time.perf_counter()
    try:
        made = jax.jit(program.function, donate_argnums=program.donated).lower(*program.arguments).compile()
    except jax.errors.JaxRuntimeError as error:  # the compiler says that the chip has too little memory
        return {"program": program.name, "resident": program.resident, "fits": False, "says": str(error)[:200]}, None
    seconds = time.perf_counter() - started
    held: Any = made.memory_analysis()
    taken = held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes - held.alias_size_in_bytes
    row = {"program": program.name, "compile_seconds": round(seconds, 1), "bytes": taken, "resident": program.resident}
    return row | {"fits": taken + program.resident <= memory * 1e9}, made


def main() -> None:
    """Compile all programs and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["7B", "8B", "70B"])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--memory", type=float, default=16.0, help="GB of a chip")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    settings = {"topology": arguments.topology, "memory": arguments.memory, "tokens": BATCH * LENGTH, "length": LENGTH}
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    done = {(row["shape"], row["program"]) for row in rows}
    for name in arguments.shapes:
        for program in programs(SHAPES[name], SingleDeviceSharding(devices[0])):
            if (name, program.name) in done:
                continue
            rows.append({"shape": name} | compiled(program, arguments.memory)[0])
            print(json.dumps(rows[-1]), flush=True)
            result = {"environment": environment(), "compiled_for": devices[0].device_kind, "settings": settings}
            arguments.output.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
