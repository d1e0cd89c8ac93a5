"""Shards of arrays on a mesh of devices (letters: see `axis_table`).

A mesh has up to three axes. `data` shares windows or directions between devices. `model` shares weights: key/value
heads with their query heads, channels, the width of experts, the vocabulary. `fsdp` shares both: windows as `data`
does, and every matrix along the hidden size D, whatever its heads are; a device receives one layer at a time and
computes with the whole of it (fully sharded data parallelism: ZeRO stage 3, arXiv 1910.02054). The compiler of JAX adds
the communication between devices. The mesh of a decoder is read from its arrays (`mesh_of`), so functions of a decoder
need no mesh argument.

An array whose size does not divide by the number of devices is replicated: every device holds the full array.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import assemble, without_layers
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block, depth, run_letters
from minillm_jax.model.streamed import StreamedDecoder, read_ahead
from minillm_jax.model.tree import layer_count, named_arrays, outer_arrays, outer_letters

DATA, FSDP, MODEL = "data", "fsdp", "model"

# Letter that is cut over `model` -> letter whose size must divide by the devices. Query heads are cut with their
# key/value head, because attention on another device would have to fetch it.
# Experts are cut along their width: every device has a part of every expert, so that all have equally much to compute
# however the tokens choose.
SHARDED = {"V": "V", "F": "F", "W": "W", "K": "K", "N": "K"}


@dataclass(frozen=True)
class MeshShape:
    """The numbers of devices along the axes of a mesh.

    Attributes:
      data: devices that share the windows or the directions.
      model: devices that share the weights.
      fsdp: devices that share the windows, and the weights along the hidden size.
    """

    data: int = 1
    model: int = 1
    fsdp: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.model


def parse_mesh(text: str | None) -> MeshShape | None:
    """The shape written as `data=2,model=4` or `fsdp=8`; a missing axis is 1.

    None, for one device, if the text is None or `auto`.

    Raises:
      InputError: the text has another form.
    """
    if text is None or text == "auto":
        return None
    axes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(rf"({DATA}|{FSDP}|{MODEL})=([1-9]\d{{0,5}})", part.strip(), re.ASCII)
        if match is None or match[1] in axes:
            raise InputError(
                f"mesh {text!r} is not understood at {part!r}; expected {DATA}=A,{MODEL}=B with numbers of devices, "
                f"{DATA}=2,{MODEL}=4 or {FSDP}=8 for example, or auto for a single device"
            )
        axes[match[1]] = int(match[2])
    return MeshShape(**axes)


def make_mesh(shape: MeshShape | None) -> Mesh | None:
    """The mesh of a shape over the devices of all processes; None for one device.

    Raises:
      InputError: the mesh is larger than the number of devices, or smaller with several processes.
    """
    processes, devices = jax.process_count(), jax.device_count()
    if shape is None and processes == 1:
        return None
    size = 1 if shape is None else shape.size
    if shape is None or size > devices or (processes > 1 and size < devices):
        raise InputError(
            f"the mesh is for {size} devices, but there are {devices} in {processes} processes; "
            f"use --mesh {DATA}={devices} for all devices"
        )
    return mesh_over(shape)


def mesh_over(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a shape over the given devices; all of the processes by default."""
    axes = {DATA: shape.data, FSDP: shape.fsdp, MODEL: shape.model}
    if shape.fsdp == 1:
        del axes[FSDP]
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def mesh_of(decoder: Decoder) -> Mesh | None:
    """The mesh of the arrays of a decoder; None for one device, and for shapes alone."""
    sharding = getattr(decoder.embedding.get_value(), "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


# ---------------------------------------------------------------------------------------------------------- rules


def shardings(decoder: Decoder, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each array of a decoder, by its path. The decoder may be abstract."""
    sizes = [run_letters(run) for run in decoder.runs]

    def one(path: str) -> NamedSharding:
        letters = sizes[int(path.split(".")[1])] if path.startswith("runs.") else outer_letters(decoder)
        return _rule(path, axis_table.axes_of(path), letters, mesh)

    return {path: one(path) for path, _ in named_arrays(decoder)}


def _rule(name: str, axes: str, sizes: Mapping[str, int], mesh: Mesh, whole: bool = False) -> NamedSharding:
    """The sharding of an array by its axes; of an array that is computed with, `whole` along `fsdp`.

    Data of a layer are replicated: every host reads their few numbers.
    """
    fsdp = 1 if whole else mesh.shape.get(FSDP, 1)
    cut = PartitionSpec() if axis_table.is_data(name) else spec(axes, sizes, mesh.shape[MODEL], fsdp)
    return NamedSharding(mesh, cut)


def spec(axes: str, sizes: Mapping[str, int], model: int, fsdp: int = 1) -> PartitionSpec:
    """The sharding of an array over `model`, which cuts at most one axis, and over `fsdp`, which cuts D.

    Arrays with one axis beside L are small and not cut over `fsdp`. Nor are those outside the layers: the loss reads
    the head once for every chunk of positions.

    Args:
      axes: axes of the array, as in `axis_table`.
      sizes: size of every axis letter.
      model: number of devices along `model`.
      fsdp: number of devices along `fsdp`.
    """
    letters = axis_table.letters(axes)
    along_hidden = fsdp > 1 and "V" not in letters and len(set(letters) - {"L"}) > 1 and sizes["D"] % fsdp == 0

    def cut(letter: str) -> str | None:
        if letter == "D" and along_hidden:
            return FSDP
        return MODEL if letter in SHARDED and sizes[SHARDED[letter]] % model == 0 else None

    return PartitionSpec(*map(cut, letters))


def run_shardings(run: Block, mesh: Mesh, whole: bool = False) -> Block:
    """The sharding of each array of a run of equal layers, as a tree of the structure of the run.

    Args:
      run: the run; its arrays may be abstract.
      mesh: the mesh.
      whole: whether the layers are whole along `fsdp`, to compute with them.
    """
    sizes = run_letters(run)

    def one(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        name = axis_table.array_path(path)
        return _rule(name, f"L {axis_table.BLOCK_AXES[name]}", sizes, mesh, whole)

    return jax.tree_util.tree_map_with_path(one, run)


@dataclass(frozen=True)
class WholeLayer:
    """Brings the arrays of a layer together along `fsdp` before it computes (see `DecoderConfig.whole_layer`).

    Without it, the compiler may leave the weights in their parts, and add the products of the parts up: for more than a
    few tokens this moves more bytes than the weights, and every device holds the activations of all windows.
    """

    mesh: Mesh

    def __call__(self, block: Block) -> Block:
        """The layer, whole along `fsdp`, inside a compiled program; arrays that a direction or adapter adds stay."""
        sizes = run_letters(jax.tree.map(lambda array: jax.ShapeDtypeStruct((1, *array.shape), array.dtype), block))

        def one(path: jax.tree_util.KeyPath, array: Array) -> Array:
            name = axis_table.array_path(path)
            if name not in axis_table.BLOCK_AXES:
                return array
            rule = _rule(name, axis_table.BLOCK_AXES[name], sizes, self.mesh, whole=True)
            return jax.lax.with_sharding_constraint(array, rule)

        return jax.tree_util.tree_map_with_path(one, block)


def on_mesh(config: DecoderConfig, mesh: Mesh | None) -> DecoderConfig:
    """A configuration whose layers compute on a mesh."""
    return replace(config, whole_layer=WholeLayer(mesh)) if mesh is not None and FSDP in mesh.shape else config


def constrain_run(run: Block, mesh: Mesh | None, whole: bool = False) -> Block:
    """A run with the shardings of `run_shardings`, inside a compiled program; unchanged without a mesh."""
    if mesh is None:
        return run
    return jax.tree.map(jax.lax.with_sharding_constraint, run, run_shardings(run, mesh, whole))


def constrain(
    array: Shaped[Array, "..."], name: str, sizes: Mapping[str, int], mesh: Mesh | None
) -> Shaped[Array, "..."]:
    """An array of one layer with the sharding of its rule, inside a compiled program; unchanged without a mesh.

    Args:
      array: the array, without a leading axis L.
      name: name of the array in the layer (`attention.q.kernel`).
      sizes: size of every axis letter.
      mesh: the mesh, or None.
    """
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, _rule(name, axis_table.BLOCK_AXES[name], sizes, mesh))


def layers_of(decoder: Decoder, mesh: Mesh | None, first: int = 0, ahead: bool = True) -> Iterator[Block]:
    """The layers of a decoder from `first` on, each a run of one layer, in its shards over `model`.

    Args:
      decoder: the decoder.
      mesh: its devices.
      first: the first layer.
      ahead: whether the next layer of a streamed decoder is read while the caller works with a layer; it takes the
        memory of a layer.
    """
    if isinstance(decoder, StreamedDecoder):
        numbers = range(first, layer_count(decoder))
        layers = read_ahead(decoder.read, numbers) if ahead else map(decoder.read, numbers)
        yield from layers if mesh is None or FSDP not in mesh.shape else map(partial(_whole_layer, mesh=mesh), layers)
        return
    start = 0
    for run in decoder.runs:
        for index in range(max(first - start, 0), depth(run)):
            yield take_layer(run, jnp.asarray(index, jnp.int32), mesh=mesh)
        start += depth(run)


# The index is an argument of the compiled program, so that all layers of a shape share one compilation.
@partial(jax.jit, static_argnames="mesh")
def take_layer(run: Block, index: Int[Array, ""], *, mesh: Mesh | None) -> Block:
    """One layer of a run."""
    layer = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, index, 1), run)
    return constrain_run(layer, mesh, whole=True)


@partial(jax.jit, static_argnames="mesh")
def _whole_layer(run: Block, *, mesh: Mesh) -> Block:
    return constrain_run(run, mesh, whole=True)


# ----------------------------------------------------------------------------------- to the devices and to the host


def place(array: Shaped[np.ndarray, "..."] | Shaped[Array, "..."], sharding: NamedSharding | None) -> Array:
    """An array on its devices, each of which receives only its shard; on the default device without a sharding.

    An array that lies on these devices already is returned as it is. An array whose shards lie on the devices of
    several processes moves between devices, never through a host. Each process fills only its own devices, so all
    processes must call this with the same array.
    """
    if sharding is None:
        return jax.device_put(array)
    if isinstance(array, jax.Array):
        if array.sharding.is_equivalent_to(sharding, array.ndim):
            return array
        if sharding.is_fully_addressable and array.is_fully_addressable:
            return jax.device_put(array, sharding)
        if not array.is_fully_addressable:
            return jax.jit(lambda array: array, out_shardings=sharding)(array)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicated(array: Shaped[np.ndarray, "..."] | Shaped[Array, "..."], mesh: Mesh | None) -> Array:
    """An array that every device of a mesh holds whole; on the default device without a mesh."""
    return place(array, None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def with_mesh(array: Shaped[Array, "..."], mesh: Mesh | None) -> Array:
    """An array that lies on the devices of a mesh: as it is if it does already, else whole on every device."""
    if mesh is None or (isinstance(array.sharding, NamedSharding) and array.sharding.mesh == mesh):
        return array
    return replicated(np.asarray(array), mesh)


def like(array: Shaped[np.ndarray, "..."] | Shaped[Array, "..."], other: Shaped[Array, "..."]) -> Array:
    """An array on the devices of another one, in its shards."""
    return place(array, other.sharding if isinstance(other.sharding, NamedSharding) else None)


def parked(array: Shaped[Array, "..."]) -> Shaped[Array, "..."] | Shaped[np.ndarray, "..."]:
    """An array in the memory of the host, where that is another memory and this process holds the whole array."""
    on_host = jax.default_backend() == "cpu"
    return array if on_host or not array.is_fully_addressable else np.asarray(array)


def unparked(array: Shaped[Array, "B ..."] | Shaped[np.ndarray, "B ..."], mesh: Mesh | None) -> Shaped[Array, "B ..."]:
    """A parked array whose first axis counts windows, on its devices again."""
    return array if isinstance(array, jax.Array) else shard_batch(array, mesh)


def outer_of(decoder: Decoder, mesh: Mesh | None) -> Decoder:
    """The decoder without its layers (see `without_layers`), on its devices.

    A streamed model keeps these arrays in the memory of the host, and its callers keep the result while they need it.
    """
    outer = without_layers(decoder)
    if not isinstance(decoder, StreamedDecoder):
        return outer
    rules = {} if mesh is None else shardings(outer, mesh)

    def leaf(path: jax.tree_util.KeyPath, array: Any) -> Any:
        name = axis_table.array_path(path)
        return array if name.startswith("runs.") else place(array, rules.get(name))

    return jax.tree_util.tree_map_with_path(leaf, outer)


def shard(decoder: Decoder, mesh: Mesh | None) -> Decoder:
    """A decoder with its weights cut over `model` and `fsdp`, replicated over `data`; unchanged without a mesh."""
    if mesh is None:
        return decoder
    rules = shardings(decoder, mesh)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(leaf, rules[axis_table.array_path(path)]), decoder
    )
    return assemble(on_mesh(decoder.config, mesh), outer_arrays(placed), placed.runs)


def shard_batch(rows: Shaped[np.ndarray, "B ..."], mesh: Mesh | None) -> Shaped[Array, "B ..."]:
    """Windows spread over `data`; replicated if their number does not divide by the devices of `data`."""
    return jnp.asarray(rows) if mesh is None else place(rows, over_data(len(rows), mesh))


def data_size(mesh: Mesh | None) -> int:
    """Number of devices that share a batch."""
    return 1 if mesh is None else mesh.shape[DATA] * mesh.shape.get(FSDP, 1)


def batch_axes(mesh: Mesh) -> Any:
    """The axes of a mesh that share a batch: `data`, and `fsdp` where there is one."""
    return (DATA, FSDP) if FSDP in mesh.shape else DATA


def shares(count: int, mesh: Mesh | None) -> int:
    """Number of equal parts of a batch of `count` windows on the devices of `data`; 1 where it is replicated."""
    return data_size(mesh) if count % data_size(mesh) == 0 else 1


def spread(
    array: Shaped[Array, "..."], mesh: Mesh | None, cut: str | None = None, axis: int = -1
) -> Shaped[Array, "..."]:
    """An array whose first axis is shared over `data`, inside a compiled program; unchanged without a mesh.

    Args:
      array: the array; an axis that does not divide by its devices is replicated.
      mesh: the mesh, or None.
      cut: the axis of the mesh that also shares another axis of the array; None for no other axis.
      axis: the position of that axis.
    """
    if mesh is None:
        return array
    rule: list[str | None] = [None] * array.ndim
    if cut is not None and array.shape[axis] % mesh.shape[cut] == 0:
        rule[axis] = cut
    rule[0] = batch_axes(mesh) if array.shape[0] % data_size(mesh) == 0 else None
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*rule)))


def over_data(count: int, mesh: Mesh) -> NamedSharding:
    """The sharding of an array with a first axis of size `count`, spread over `data` as in `shard_batch`."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh) if count % data_size(mesh) == 0 else None))


def gather(array: Shaped[Array, "..."] | Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """An array with all its shards on the host. With several processes, every process must call it."""
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array.sharding, NamedSharding) and not array.is_fully_addressable:
        replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.jit(lambda array: array, out_shardings=replicated)(array)
    return np.asarray(array)


def parts(array: Shaped[Array, "..."]) -> Iterator[tuple[tuple[slice, ...], Shaped[np.ndarray, "..."]]]:
    """Index and values of each shard of an array on the devices of this process; equal shards once."""
    seen = set()
    for shard in array.addressable_shards:
        bounds = tuple((part.start, part.stop) for part in shard.index)
        if bounds not in seen:
            seen.add(bounds)
            yield shard.index, np.asarray(shard.data)
