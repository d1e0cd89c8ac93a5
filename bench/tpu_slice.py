"""Programs on whole TPU slices, compiled without one: memory of a chip and collectives at 7B, 8B and 70B.

    python bench/tpu_slice.py [--shapes 7B 8B 70B] [--slices v5e-8 v6e-8] [--programs walk solver]
        --output bench/results/tpu-slices.json

bfloat16 weights, windows of 2,048 tokens, two for each device that shares them. It needs the package libtpu. A row for
each shape, slice and program:

    compile_seconds     of lowering and compiling, on this machine
    bytes               of a chip, by the compiler: argument + output + temp - alias
    resident            bytes of a chip beside the program, where it does not take all weights: those of a model in
                        memory, and of a pruned model of four fifths of them; with `streamed` the layer in both models,
                        in an evaluation one layer and the arrays outside the layers
    fits                whether both fit the memory of the chip
    flops               of a chip, by the compiler, which counts a loop over the layers once
    collectives         kind -> number and bytes of the results on a chip, in a loop counted once

A study that was interrupted goes on with the programs that its file lacks.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import tpu_job
from environment import environment
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from shapes import CONFIG, SHAPES
from tpu_job import BATCH, LENGTH, Program

from minillm_jax.devices import sharding
from minillm_jax.devices.sharding import MeshShape
from minillm_jax.evaluation import layerwise
from minillm_jax.model import axis_table
from minillm_jax.model.build import build, without_layers
from minillm_jax.model.config import Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning import device_system, walk
from minillm_jax.scoring.gradient import slopes
from minillm_jax.scoring.gradient.directions import Directions, direction_keys
from minillm_jax.scoring.gradient.spaces import Gates, Space, Weights

KEPT = 0.8  # share of the weights of the pruned model
WIDTHS = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1}
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


class Slice(NamedTuple):
    """A slice of TPU chips: its name for libtpu, the memory of a chip in GB, the mesh, and whether layers are read."""

    topology: str
    memory: float
    mesh: MeshShape
    streamed: bool = False


SLICES = {
    "v5e-8": Slice("v5e:2x4", 16.0, MeshShape(1, 8)),
    "v5e-8, fsdp": Slice("v5e:2x4", 16.0, MeshShape(1, 1, 8)),
    "v5e-16": Slice("v5e:4x4", 16.0, MeshShape(1, 8, 2)),
    "v6e-8": Slice("v6e:2x4", 32.0, MeshShape(1, 8)),
    "v6e-8, streamed": Slice("v6e:2x4", 32.0, MeshShape(1, 8), True),
    "v5p-8": Slice("v5p:2x2x1", 95.0, MeshShape(1, 4)),
}


def programs(sizes: Sizes, mesh: Mesh, streamed: bool) -> Iterator[Program]:
    """The programs of a job: passes over the whole model, then those of one layer of the walk."""
    resident = resident_bytes(sizes, mesh, streamed)
    decoder, batch = on_mesh(build(sharding.on_mesh(CONFIG, mesh), sizes, jnp.bfloat16), mesh), batch_of(mesh)

    def array(*shape: int, kind: Any = jnp.float32, spec: tuple[Any, ...] = ()) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    over = sharding.batch_axes(mesh)
    tokens, windows = array(batch, LENGTH, kind=jnp.int32, spec=(over,)), array(batch, kind=jnp.int32)
    if not streamed:
        yield Program("forward loss", sequence_losses, (decoder, tokens), 0)
        for name, space in {"rademacher": Weights("rademacher"), "gaussian": Weights(), "gates": Gates()}.items():
            yield Program(f"side of a pair, {name}", *side(decoder, tokens, windows, space), 0)
        yield Program("jvp, 8 gates", *derivatives(decoder, tokens, windows, 8), 0)
    (layer,) = build(CONFIG, Sizes(sizes.V, sizes.D, sizes.H, sizes.layers[:1]), jnp.bfloat16).runs
    run = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        layer,
        sharding.run_shardings(layer, mesh, whole=True),
    )
    outer = on_mesh(jax.eval_shape(without_layers, decoder), mesh)
    stream = array(batch, LENGTH, sizes.D, spec=(over,))
    narrow = array(batch, LENGTH, sizes.D, kind=jnp.bfloat16, spec=(over,))
    beside = size_on_chip(outer) if streamed else resident
    yield Program("layer of an evaluation", partial(layerwise.advance, mesh=mesh), (outer, run, narrow), beside)
    angles = tuple(array(LENGTH, sizes.H // 2) for _ in range(2))
    settings = {"kind": "channel", "config": decoder.config, "mesh": mesh}
    state, width, shares = walk.State(stream), sizes.layers[0].F, sharding.shares(batch, mesh)
    yield Program(
        "walk: advance",
        lambda run, state, angles: walk.advance(run, state, angles=angles, **settings),
        (run, state, angles),
        resident,
    )
    yield Program(
        "walk: inputs and gaps",
        lambda run, state, total, angles: walk.inputs_and_gaps(run, state, total, angles=angles, **settings),
        (run, state, stream, angles),
        resident,
    )
    inputs = array(batch, LENGTH, width, spec=(over, None, sharding.MODEL))
    sums = (
        array(shares, width, width, spec=(over, sharding.MODEL)),
        array(shares, width, spec=(over,)),
        array(shares, width, sizes.D, spec=(over, sharding.MODEL)),
        array(shares, sizes.D, spec=(over,)),
    )
    add, centers = partial(walk.add_pair, shares=shares, mesh=mesh), (array(width), array(sizes.D))
    yield Program("walk: Gram matrix", add, (sums, (inputs, stream), centers), resident, donated=(0,))
    yield from of_system(sizes, mesh, resident, streamed)


def of_system(sizes: Sizes, mesh: Mesh, resident: int, streamed: bool) -> Iterator[Program]:
    """The programs from the moments of mlp.down to its kept groups and their rows.

    The moments of a model in memory stay on the chips, those of a streamed one on the host.
    """
    width, outputs = sizes.layers[0].F, sizes.D
    rows = device_system.shared_rows(width, outputs, width, mesh)

    def place(tree: Any, specs: Any) -> Any:
        def leaf(array: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            shards = NamedSharding(mesh, spec if rows.axis else PartitionSpec())
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shards)

        return jax.tree.map(leaf, tree, specs)

    matrices = width * (width + outputs) * 4 // (mesh.shape[sharding.MODEL] if rows.axis else 1)
    beside = resident if streamed else resident + 2 * matrices
    yield from tpu_job.of_system("solver", (width, outputs, width), place, beside, mesh=mesh, rows=rows)


def side(decoder: Decoder, tokens: Any, windows: Any, space: Space) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One side of the paired losses of one direction, which runs twice: function and arguments."""
    step = jax.ShapeDtypeStruct((), jnp.float32)
    return partial(slopes.losses_at, space=space), (decoder, directions_of_pass(1), tokens, windows, step)


def derivatives(decoder: Decoder, tokens: Any, windows: Any, count: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The derivatives along a number of directions of gates in one pass: function and arguments."""
    return partial(slopes.directional_derivatives, space=Gates()), (decoder, directions_of_pass(count), tokens, windows)


def directions_of_pass(count: int) -> Directions:
    """Abstract directions of one pass."""
    return jax.eval_shape(lambda: Directions.plain(direction_keys(0, 0, count)))


def on_mesh(decoder: Decoder, mesh: Mesh) -> Decoder:
    """An abstract decoder with the shardings of its arrays."""
    places = sharding.shardings(decoder, mesh)

    def leaf(path: jax.tree_util.KeyPath, shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=places[axis_table.array_path(path)])

    return jax.tree_util.tree_map_with_path(leaf, decoder)


def batch_of(mesh: Mesh) -> int:
    """Windows of a batch."""
    return BATCH * sharding.data_size(mesh)


def size_on_chip(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one chip."""
    return sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for _, leaf in named_arrays(tree))


def resident_bytes(sizes: Sizes, mesh: Mesh, streamed: bool) -> int:
    """Bytes of a chip beside a program of one layer."""
    decoder = build(CONFIG, sizes, jnp.bfloat16)
    whole = size_on_chip(on_mesh(decoder, mesh))
    if not streamed:
        return int((1 + KEPT) * whole)
    outer = size_on_chip(on_mesh(jax.eval_shape(without_layers, decoder), mesh))
    return 2 * (whole - outer) // len(sizes.layers)


def collectives(text: str) -> dict[str, list[int]]:
    """Kind -> number and bytes of the results of the collective operations in a compiled program."""
    found: dict[str, list[int]] = {}
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(WIDTHS.get(kind, 0) * prod(map(int, filter(None, shape.split(",")))) for kind, shape in shapes)
            count, total = found.get(match[2], [0, 0])
            found[match[2]] = [count + 1, total + size]
    return found


def compiled(program: Program, memory: float) -> dict[str, Any]:
    """The row of a program."""
    row, made = tpu_job.compiled(program, memory)
    if made is None:
        return row
    row |= {"flops": made.cost_analysis()["flops"], "temporary": made.memory_analysis().temp_size_in_bytes}
    try:
        return row | {"collectives": collectives(made.as_text() or "")}
    except jax.errors.JaxRuntimeError:  # libtpu 0.0.52 cannot print some programs for a v6e
        return row


def mesh_of(place: Slice) -> tuple[Mesh, str]:
    """The mesh of a slice, and the kind of its chips."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=place.topology).devices
    return sharding.mesh_over(place.mesh, devices), devices[0].device_kind


def main() -> None:
    """Compile all programs and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["7B", "8B", "70B"])
    parser.add_argument("--slices", nargs="+", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--programs", nargs="+", default=[""], help="only programs whose names hold one of these")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    done = {(row["shape"], row["slice"], row["program"]) for row in rows}
    for where in arguments.slices:
        place = SLICES[where]
        mesh, chip = mesh_of(place)
        for name in arguments.shapes:
            sizes = SHAPES[name]
            for program in programs(sizes, mesh, place.streamed):
                wanted = any(part in program.name for part in arguments.programs)
                if (name, where, program.name) in done or not wanted:
                    continue
                named = {"shape": name, "slice": where, "chip": chip, "mesh": asdict(place.mesh)}
                rows.append(named | compiled(program, place.memory))
                print(json.dumps(rows[-1]), flush=True)
                settings = {"windows": BATCH, "length": LENGTH, "pruned": KEPT}
                result = {"environment": environment(), "settings": settings, "rows": rows}
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
