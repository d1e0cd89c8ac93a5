"""Many devices: what of a decoder and of a batch lies where.

A mesh has two axes. Over `data` go sequences or directions, over `model` go weights: query heads with their key/value
heads, channels, the vocabulary. JAX's compiler does the rest; nothing else in the package knows of devices. A decoder
carries its mesh in its arrays (`of`), so nobody has to hand it on.

What does not divide by its axis is replicated: every device holds all of it.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.tree import named_arrays, outer_letters, run_letters

DATA, MODEL = "data", "model"

# The letters that are cut over `model`. Query heads go with their key/value head, or attention would have to fetch it.
SHARDED = {"V": "V", "F": "F", "K": "K", "N": "K"}


@dataclass(frozen=True)
class MeshShape:
    """How many devices share the batch or the directions, and how many share the weights."""

    data: int = 1
    model: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.model


def parse_mesh(text: str | None) -> MeshShape | None:
    """The shape that `data=2,model=4` stands for; an axis left out is 1. None for None and for `auto`: one device.

    Raises:
      InputError: it is not written like that.
    """
    if text is None or text == "auto":
        return None
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(rf"({DATA}|{MODEL})=([1-9]\d{{0,5}})", part.strip(), re.ASCII)
        if match is None or match[1] in found:
            raise InputError(
                f"mesh {text!r} is not understood at {part!r}; expected {DATA}=A,{MODEL}=B with numbers of devices, "
                f"{DATA}=2,{MODEL}=4 for example, or auto for a single device"
            )
        found[match[1]] = int(match[2])
    return MeshShape(**found)


def make(shape: MeshShape | None) -> Mesh | None:
    """The mesh of that shape over the devices of all processes; None for one device.

    Raises:
      InputError: there are fewer devices, or several processes and devices that would be left out.
    """
    processes, devices = jax.process_count(), jax.device_count()
    if shape is None and processes == 1:
        return None
    asked = 1 if shape is None else shape.size
    if shape is None or asked > devices or (processes > 1 and asked < devices):
        raise InputError(
            f"the mesh is for {asked} devices, but there are {devices} in {processes} processes; "
            f"--mesh {DATA}={devices} would take all of them"
        )
    return jax.make_mesh((shape.data, shape.model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def of(decoder: Decoder) -> Mesh | None:
    """The mesh that a decoder's arrays lie on, None for one device."""
    sharding = getattr(decoder.embedding[...], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


# ------------------------------------------------------------------------------------------------------- the rules


def shardings(decoder: Decoder, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each array of a decoder goes, by its path. The decoder may be abstract."""
    sizes = [run_letters(run) for run in decoder.runs]

    def one(path: str) -> NamedSharding:
        if axis_table.is_data(path):  # a few numbers, which every host reads
            return NamedSharding(mesh, PartitionSpec())
        letters = sizes[int(path.split(".")[1])] if path.startswith("runs.") else outer_letters(decoder)
        return NamedSharding(mesh, spec(axis_table.axes_of(path), letters, mesh.shape[MODEL]))

    return {path: one(path) for path, _ in named_arrays(decoder)}


def spec(axes: str, sizes: Mapping[str, int], devices: int) -> PartitionSpec:
    """Which axis of an array is cut over so many devices of `model`: at most one is.

    Args:
      axes: of the array, as the table writes them.
      sizes: of every axis letter.
      devices: of the axis `model`.
    """

    def cut(letter: str) -> str | None:
        return MODEL if letter in SHARDED and sizes[SHARDED[letter]] % devices == 0 else None

    return PartitionSpec(*(cut(letter) for letter in axis_table.letters(axes)))


def constrain(
    array: Shaped[Array, "..."], name: str, sizes: Mapping[str, int], mesh: Mesh | None
) -> Shaped[Array, "..."]:
    """Inside a compiled program: one layer's array, by its name in the layer, lies where the rules say."""
    if mesh is None:
        return array
    where = PartitionSpec() if axis_table.is_data(name) else spec(axis_table.BLOCK_AXES[name], sizes, mesh.shape[MODEL])
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, where))


# ---------------------------------------------------------------------------------------------------- there and back


def place(array: Shaped[np.ndarray, "..."] | Shaped[Array, "..."], sharding: NamedSharding | None) -> Array:
    """An array in the shards of its devices; each gets its own part only, and a process fills its own devices only.

    In several processes the array must be the same in all of them. Without a sharding it goes to the one device.
    """
    if sharding is None or (sharding.is_fully_addressable and isinstance(array, jax.Array)):
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def shard(decoder: Decoder, mesh: Mesh | None) -> Decoder:
    """A decoder with its weights cut over `model`, and replicated over `data`; unchanged without a mesh."""
    if mesh is None:
        return decoder
    places = shardings(decoder, mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(leaf, places[axis_table.array_path(path)]), decoder
    )


def shard_batch(tokens: Int[np.ndarray, "B T"], mesh: Mesh | None) -> Int[Array, "B T"]:
    """Sequences spread over `data`; replicated where their number does not divide."""
    return jnp.asarray(tokens) if mesh is None else place(tokens, over_data(len(tokens), mesh))


def data_size(mesh: Mesh | None) -> int:
    """How many devices share a batch."""
    return 1 if mesh is None else mesh.shape[DATA]


def over_data(count: int, mesh: Mesh) -> NamedSharding:
    """The first axis of an array, of that size, spread over `data`; replicated where it does not divide."""
    return NamedSharding(mesh, PartitionSpec(DATA if count % data_size(mesh) == 0 else None))


def gather(array: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """A whole array on every host, wherever its shards lie; in several processes all of them have to ask for it."""
    if isinstance(array.sharding, NamedSharding) and not array.is_fully_addressable:
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.jit(lambda whole: whole, out_shardings=everywhere)(array)
    return np.asarray(array)


def parts(array: Shaped[Array, "..."]) -> Iterator[tuple[tuple[slice, ...], Shaped[np.ndarray, "..."]]]:
    """What this process holds of an array: every different part once, and where it belongs."""
    seen = set()
    for one in array.addressable_shards:
        place = tuple((part.start, part.stop) for part in one.index)
        if place not in seen:
            seen.add(place)
            yield one.index, np.asarray(one.data)
