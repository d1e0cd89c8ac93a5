"""Programs of dense and pruned models compiled for a TPU, without one: compile time, memory, operations, bytes.

    python bench/tpu.py NAME=FOLDER [NAME=FOLDER ...] [--topology v5e:2x2] [--batch 8] [--length 512]
        --output bench/results/tpu-NAME.json

The program is the forward loss in bfloat16 on one chip. It needs the package libtpu, which compiles ahead of time for a
chip that is not there. A row for each model and way to compile its layers:

    runs        a scan of every run of equal layers
    padded      all layers padded to the widest, one scan (`minillm_jax.model.padded_runs`)

and the fields

    compile_seconds     of lowering and compiling
    bytes               the compiler's memory: argument + output + temp - alias
    flops, traffic      operations, and bytes to and from the memory of the chip, as the compiler counts them; in the
                        row `runs` alone, and from a program whose layers are not scanned, because the compiler counts
                        a scan once whatever its length
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from environment import environment
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from minillm_jax import api
from minillm_jax.model import padded_runs
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.modules import Block, depth
from minillm_jax.model.tree import parameter_count

PLATFORMS = padded_runs.SCAN_EVERY_RUN


def compiled(decoder: Decoder, tokens: tuple[int, int], place: SingleDeviceSharding, padded: bool) -> tuple[float, Any]:
    """Seconds of lowering and compiling, and the compiled program."""

    def abstract(array: Any) -> jax.ShapeDtypeStruct:
        kind = jnp.bfloat16 if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype
        return jax.ShapeDtypeStruct(array.shape, kind, sharding=place)

    padded_runs.SCAN_EVERY_RUN = () if padded else PLATFORMS
    jax.clear_caches()
    ids = jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=place)
    started = time.perf_counter()
    program = jax.jit(lambda decoder, ids: sequence_losses(decoder, ids)).lower(jax.tree.map(abstract, decoder), ids)
    program = program.compile()
    return time.perf_counter() - started, program


def every_layer(runs: Sequence[Block]) -> list[Block]:
    """Every layer as a run of its own."""
    return [jax.tree.map(lambda array, i=i: array[i : i + 1], run) for run in runs for i in range(depth(run))]


def rows(name: str, folder: str, tokens: tuple[int, int], place: SingleDeviceSharding) -> list[dict[str, Any]]:
    """The rows of one model."""
    decoder, found = api.load(folder).decoder, []
    for way in ("runs", "padded"):
        seconds, program = compiled(decoder, tokens, place, way == "padded")
        memory = program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        row = {"model": name, "way": way, "runs": len(decoder.runs), "parameters": parameter_count(decoder)}
        row |= {"compile_seconds": round(seconds, 1), "bytes": held - memory.alias_size_in_bytes}
        if way == "runs":
            apart = with_runs(decoder, every_layer(decoder.runs))
            cost = compiled(apart, tokens, place, False)[1].cost_analysis()
            row |= {"flops": cost["flops"], "traffic": cost["bytes accessed"]}
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def main() -> None:
    """Compile all models and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology)
    place = SingleDeviceSharding(topology.devices[0])
    found, tokens = [], (arguments.batch, arguments.length)
    for name, folder in (one.split("=", 1) for one in arguments.models):
        found += rows(name, folder, tokens, place)
    settings = {"topology": arguments.topology, "batch": arguments.batch, "length": arguments.length}
    result = {"environment": environment(), "compiled_for": topology.devices[0].device_kind, "settings": settings}
    arguments.output.write_text(json.dumps(result | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
