"""Decoders that are larger than the memory: their layers are read one at a time."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax

from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import build, optional_parts, with_runs
from minillm_jax.model.config import Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import layer_count, named_arrays, sizes_of

# Index of a layer -> the layer on its devices, a run of one layer.
ReadLayer = Callable[[int], Block]


class StreamedDecoder(Decoder):
    """A decoder whose layers are read when they are needed: its runs have shapes alone, and all other arrays values.

    Functions that take one layer after the other (`devices.sharding.layers_of`) compute with it. Functions of shapes
    take it as they take an abstract decoder.

    Args:
      outer: a decoder with the arrays outside the layers.
      runs: the shapes of the layers.
      read: reads a layer.
    """

    def __init__(self, outer: Decoder, runs: Sequence[Block], read: ReadLayer):
        super().__init__(outer.config, outer.embedding[...], runs, **optional_parts(outer))
        self.read = _one_at_a_time(read)


def _one_at_a_time(read: ReadLayer) -> ReadLayer:
    """The same for several threads: a reader uses one buffer for all layers."""
    lock = threading.Lock()

    def read_alone(index: int) -> Block:
        with lock:
            return read(index)

    return read_alone


def read_ahead(read: ReadLayer, layers: Sequence[int]) -> Iterator[Block]:
    """The layers in order. The next one is read in a thread while the caller works with a layer.

    With several processes nothing is read ahead: a read may wait for the other processes, and the work of the caller
    may too, in another order.

    Raises:
      InputError: the error of a read, when its layer is asked for.
    """
    if jax.process_count() > 1 or not layers:
        yield from map(read, layers)
        return
    with ThreadPoolExecutor(1, "next layer") as thread:
        coming = thread.submit(read, layers[0])
        for following in layers[1:]:
            layer = coming.result()
            coming = thread.submit(read, following)
            yield layer
            del layer  # it would live on while the next one is waited for
        yield coming.result()


def check_in_memory(decoder: Decoder, what: str) -> None:
    """Check that all layers of a decoder are in memory.

    Args:
      decoder: the decoder.
      what: what needs them, as the subject of the message.

    Raises:
      InputError: they are read one at a time.
    """
    if isinstance(decoder, StreamedDecoder):
        raise InputError(f"{what} needs all layers in memory; load the model without stream=True")


def resized(decoder: StreamedDecoder, sizes: Sizes, read: ReadLayer) -> StreamedDecoder:
    """The decoder with layers of other sizes, or with other layers.

    Args:
      decoder: the decoder; the arrays of its first layer have the types of all layers.
      sizes: the new sizes.
      read: reads the new layers.
    """
    types = {path.split(".", 2)[2]: leaf.dtype for path, leaf in named_arrays(decoder) if path.startswith("runs.")}
    return StreamedDecoder(decoder, of_types(build(decoder.config, sizes).runs, types), read)


def of_types(runs: Iterable[Block], types: Mapping[str, Any]) -> list[Block]:
    """Abstract runs whose arrays have the given types, by their names in a layer; data of the layers keep theirs."""

    def leaf(path: jax.tree_util.KeyPath, shape: Any) -> Any:
        name = axis_table.array_path(path)
        return shape if axis_table.is_data(name) else jax.ShapeDtypeStruct(shape.shape, types[name])

    return [jax.tree_util.tree_map_with_path(leaf, run) for run in runs]


def map_layers(
    decoder: StreamedDecoder, sizes: Sizes, change: Callable[[int, Block], Block], layers: Sequence[int] | None = None
) -> StreamedDecoder:
    """The decoder with changed layers, each of which is read and changed when it is needed.

    Args:
      decoder: the decoder.
      sizes: the sizes of the result.
      change: index of a layer and the layer -> the changed layer.
      layers: the layers of the result; all by default.
    """
    numbers = list(range(layer_count(decoder)) if layers is None else layers)
    return resized(decoder, sizes, lambda index: change(numbers[index], decoder.read(numbers[index])))


def as_model_of(decoder: StreamedDecoder, layer: Block) -> Decoder:
    """A decoder in memory with a single layer."""
    return with_runs(decoder, [layer])


def sizes_of_layers(decoder: Decoder, layers: Sequence[int]) -> Sizes:
    """The sizes of a decoder with only some layers."""
    sizes = sizes_of(decoder)
    return replace(sizes, layers=tuple(sizes.layers[layer] for layer in layers))
