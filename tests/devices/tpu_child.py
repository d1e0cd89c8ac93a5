"""Compiles programs for four chips of a TPU v5e, without one; prints what the compiled programs hold as JSON."""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from minillm_jax.devices.sharding import DATA, MODEL, shardings
from minillm_jax.model import axis_table
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.ops import Rope
from minillm_jax.pruning import blocked, device_system, tiled
from minillm_jax.pruning.device_system import Numbers
from minillm_jax.pruning.float64 import Pair
from minillm_jax.scoring.gradient import exact

SIZES = Sizes(V=256, D=128, H=32, layers=(LayerSizes(N=4, K=4, F=256),) * 2)


def main() -> None:
    """Compile all programs."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = jax.make_mesh((1, 4), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)
    found = {
        "all-reduce": loss_on(mesh).count("all-reduce("),
        "temporaries / matrix": [temporaries_on(devices[0], function) for function in (blocked.inverse, tiled.inverse)],
    }
    found |= {
        "gradients / weights": memory_of_gradients_on(devices[0]),
        "refit / matrix": memory_of_refit_on(devices[0]),
    }
    sys.stdout.write(json.dumps(found))


def loss_on(mesh: Mesh) -> str:
    """The forward loss of a small model in bfloat16, its weights shared over `model`, as HLO."""
    decoder = build(DecoderConfig("llama", 1e-5, Rope(10000.0)), SIZES, jnp.bfloat16)
    places = shardings(decoder, mesh)

    def leaf(path: jax.tree_util.KeyPath, shape: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=places[axis_table.array_path(path)])

    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    program = jax.jit(lambda decoder, tokens: sequence_losses(decoder, tokens))
    return program.lower(jax.tree_util.tree_map_with_path(leaf, decoder), tokens).compile().as_text()


def temporaries_on(device: Any, inverse: Callable[[Any], Any]) -> float:
    """Bytes that the inverse of a system takes beside its argument, over those of the argument."""
    matrix = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=SingleDeviceSharding(device))
    held: Any = jax.jit(inverse, donate_argnums=0).lower(matrix).compile().memory_analysis()
    return (held.temp_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes) / (matrix.size * 4)


def memory_of_refit_on(device: Any) -> float:
    """Bytes that a refit takes beside its arguments, over those of the Gram matrix."""
    size, place = 4096, SingleDeviceSharding(device)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    sums = tuple(array(*shape) for shape in ((size, size), (size,), (size, 64), (64,), (size,), (64,)))
    numbers = Numbers(*(3 * (Pair(array(), array()),)))
    arguments = sums, array(size, 64, dtype=jnp.bfloat16), numbers, array(size, dtype=jnp.bool_)
    held: Any = device_system.refit.lower(*arguments, biased=False).compile().memory_analysis()
    return held.temp_size_in_bytes / (4 * size**2)


def memory_of_gradients_on(device: Any) -> float:
    """Bytes of a program that adds exact gradients of a model in bfloat16 to their sums, over those of the weights."""
    place = SingleDeviceSharding(device)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    sizes = Sizes(V=64, D=256, H=64, layers=(LayerSizes(N=4, K=4, F=704),) * 8)
    decoder = build(DecoderConfig("llama", 1e-5, Rope(10000.0)), sizes, jnp.bfloat16)
    sums = jax.eval_shape(lambda decoder: exact.no_gradients(decoder, curvature=False), decoder)
    tokens, one = jax.ShapeDtypeStruct((1, 32), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (placed(one_of) for one_of in (sums, decoder, tokens, one, one))
    held: Any = exact.add_weight_gradients.lower(*arguments).compile().memory_analysis()
    taken = held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes - held.alias_size_in_bytes
    return taken / sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(decoder))


if __name__ == "__main__":
    main()
