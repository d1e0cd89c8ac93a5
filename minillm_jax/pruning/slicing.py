"""Removal of groups, hidden dimensions and layers: slices of every array, along the axes of the table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from minillm_jax.devices.sharding import constrain, layers_of, like, mesh_of, place, run_shardings
from minillm_jax.model import axis_table
from minillm_jax.model.axis_table import EXPERT_CHANNEL
from minillm_jax.model.build import with_runs
from minillm_jax.model.config import Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block, depth, run_letters
from minillm_jax.model.streamed import StreamedDecoder, map_layers, sizes_of_layers
from minillm_jax.model.tree import group_count, sizes_of


def slice_groups(decoder: Decoder, kept: axis_table.Kept) -> Decoder:
    """A decoder with only the kept groups of every layer. It shares embeddings, norms and head with the original.

    Layers of a run with equal numbers of kept groups are sliced together, without a copy of each layer. Neighbouring
    runs whose layers have equal sizes are merged.

    Args:
      decoder: the model.
      kept: kind of group -> for each layer, the indices of the kept groups, ascending.
    """
    if isinstance(decoder, StreamedDecoder):
        mesh, sizes = mesh_of(decoder), slice_sizes(sizes_of(decoder), kept)
        return map_layers(
            decoder, sizes, lambda index, layer: take_layer({kind: kept[kind][index] for kind in kept}, layer, mesh)
        )
    if EXPERT_CHANNEL in kept:
        mesh, others = mesh_of(decoder), {kind: rows for kind, rows in kept.items() if kind != EXPERT_CHANNEL}
        layers = zip(kept[EXPERT_CHANNEL], layers_of(slice_groups(decoder, others), mesh), strict=True)
        return with_runs(decoder, merge([take_layer({EXPERT_CHANNEL: rows}, layer, mesh) for rows, layer in layers]))
    pieces: list[Block] = []
    first = 0
    for run in decoder.runs:
        for start, stop in _segments(kept, first, first + depth(run)):
            indices = {kind: jnp.asarray(np.stack(rows[start:stop])) for kind, rows in kept.items()}
            pieces.append(take(run, indices, start - first, stop - first, mesh_of(decoder)))
        first += depth(run)
    return with_runs(decoder, merge(pieces))


def slice_sizes(sizes: Sizes, kept: axis_table.Kept) -> Sizes:
    """The sizes of the decoder that `slice_groups` returns.

    Args:
      sizes: the sizes of the dense decoder.
      kept: kind of group -> for each layer, the indices of the kept groups, ascending.
    """
    layers = []
    for number, layer in enumerate(sizes.layers):
        per_group = layer.N // max(layer.K, 1)
        if "query" in kept:
            groups_kept, heads = range(layer.K), [int(head) for head in kept["query"][number]]
        else:
            groups_kept = kept["head"][number] if "head" in kept else range(layer.K)
            heads = [g * per_group + i for g in groups_kept for i in range(per_group)]
        slopes = tuple(layer.slopes[head] for head in heads if layer.slopes)
        width = len(kept["channel"][number]) if "channel" in kept else layer.F
        experts = len(kept["expert"][number]) if "expert" in kept else layer.X
        of_experts = layer.W
        if EXPERT_CHANNEL in kept and experts:
            of_experts = len(kept[EXPERT_CHANNEL][number]) // experts
        layers.append(replace(layer, slopes=slopes, K=len(groups_kept), N=len(heads), F=width, X=experts, W=of_experts))
    return replace(sizes, layers=tuple(layers))


def slice_hidden(decoder: Decoder, kept: Int[np.ndarray, " kept"]) -> Decoder:
    """A decoder with only the kept hidden dimensions, in every array with an axis D.

    The sliced model differs from the dense model with zeros in the removed dimensions: its norms take the mean over
    the kept dimensions only. The embedding size E is sliced like the hidden size D, except in models with a projection
    between the two. The scale of Gemma's embedding and the head size keep the values of the dense model.

    Args:
      decoder: the model.
      kept: indices of the kept hidden dimensions, ascending.
    """
    sliced = "D" if decoder.config.embedding_projection else axis_table.GROUP_LETTERS["hidden"]

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        letters = axis_table.letters(axis_table.axes_of(axis_table.array_path(path)))
        axes = [axis for axis, letter in enumerate(letters) if letter in sliced]
        return jnp.take(array, jnp.asarray(kept), axis=axes[0]) if axes else array

    return jax.tree_util.tree_map_with_path(leaf, decoder)


def slice_layers(decoder: Decoder, kept: Sequence[int]) -> Decoder:
    """A decoder with only the kept layers, given in ascending order. Each keeps its attention window and slopes."""
    if isinstance(decoder, StreamedDecoder):
        return map_layers(decoder, sizes_of_layers(decoder, kept), lambda _, layer: layer, kept)
    pieces: list[Block] = []
    first = 0
    for run in decoder.runs:
        rows = np.asarray([layer - first for layer in kept if first <= layer < first + depth(run)], np.int32)
        if rows.size:
            pieces.append(jax.tree.map(lambda array, rows=rows: jnp.take(array, rows, axis=0), run))
        first += depth(run)
    return with_runs(decoder, merge(pieces))


def merge(pieces: list[Block]) -> list[Block]:
    """The runs, with neighbours whose layers have equal shapes merged into one run."""
    return [_concatenate(list(equal)) for _, equal in groupby(pieces, _layer_shapes)]


def _segments(kept: axis_table.Kept, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Start and stop of every range of consecutive layers with equal numbers of kept groups of every kind."""
    for _, segment in groupby(range(first, last), lambda layer: [len(rows[layer]) for rows in kept.values()]):
        layers = list(segment)
        yield layers[0], layers[-1] + 1


@partial(jax.jit, static_argnames=("start", "stop", "mesh"))
def take(run: Block, kept: dict[str, Int[Array, "L kept"]], start: int, stop: int, mesh: Mesh | None = None) -> Block:
    """Layers `start` to `stop` of a run, with only the kept groups.

    The program slices one layer at a time: the arrays of a single layer fit on a device where the stacked array of the
    run may not.

    Args:
      run: a run of equal layers.
      kept: kind of group -> the indices of the kept groups of layers `start` to `stop`, ascending. Groups of other
        kinds are all kept.
      start: first layer, counted within the run.
      stop: the layer after the last.
      mesh: the devices of the decoder; None for one device.
    """
    counts = {kind: group_count(run, kind) for kind in kept}
    sizes = run_letters(run) | {axis_table.GROUP_LETTERS[kind][0]: rows.shape[1] for kind, rows in kept.items()}

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = axis_table.array_path(path)

        def one_layer(layer: tuple[Array, dict[str, Array]]) -> Array:
            sliced, indices = layer
            for kind, rows in indices.items():
                sliced = axis_table.take_groups(sliced, axis_table.BLOCK_AXES[name], kind, rows, counts[kind])
            return constrain(sliced, name, sizes, mesh)

        return jax.lax.map(one_layer, (array[start:stop], kept))

    return jax.tree_util.tree_map_with_path(leaf, run)


def take_layer(kept: Mapping[str, Int[np.ndarray, " _"]], run: Block, mesh: Mesh | None) -> Block:
    """A run of one layer with only the kept groups.

    On one device the host slices: a program for every number of kept groups would take longer to compile.

    Args:
      kept: kind of group -> the indices of the kept groups, ascending. Groups of other kinds are all kept. Those of
        `expert_channel` count the channels of the kept experts.
      run: a run of one layer.
      mesh: the devices of the layer; None for one device.
    """
    if EXPERT_CHANNEL in kept:
        others = {kind: rows for kind, rows in kept.items() if kind != EXPERT_CHANNEL}
        return _take_channels(kept[EXPERT_CHANNEL], take_layer(others, run, mesh), mesh)
    counts = {kind: group_count(run, kind) for kind in kept}
    fewer = {kind: np.asarray(rows, np.int32) for kind, rows in kept.items() if len(rows) < counts[kind]}
    if not fewer or mesh is not None:
        return take(run, {kind: jnp.asarray(rows)[None] for kind, rows in fewer.items()}, 0, 1, mesh) if fewer else run

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        places = _places(axis_table.array_path(path), array.shape, fewer, counts)
        return array if places is None else jnp.asarray(np.asarray(array)[places])

    return jax.tree_util.tree_map_with_path(leaf, run)


def _take_channels(kept: Int[np.ndarray, " _"], run: Block, mesh: Mesh | None) -> Block:
    """A run of one layer with only the kept channels of its experts."""
    sizes = run_letters(run)
    if len(kept) == sizes["X"] * sizes["W"]:
        return run
    of_expert = _of_expert(kept, sizes)

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        axes = f"L{axis_table.BLOCK_AXES[axis_table.array_path(path)]}"
        return axis_table.take_channels(array, axes, of_expert, jnp)

    taken = jax.tree_util.tree_map_with_path(leaf, run)
    return taken if mesh is None else jax.tree.map(place, taken, run_shardings(taken, mesh))


def _of_expert(kept: Int[np.ndarray, " _"], sizes: Mapping[str, int]) -> Int[np.ndarray, "X kept"]:
    """The kept channels of every expert, counted within the expert."""
    return np.asarray(kept).reshape(sizes["X"], -1) - sizes["W"] * np.arange(sizes["X"])[:, None]


def put_layer(kept: Mapping[str, Int[np.ndarray, " _"]], arrays: Mapping[str, np.ndarray], run: Block) -> Block:
    """The inverse of `take_layer`: a run of one layer at full width, with zeros in the place of the removed groups.

    Args:
      kept: kind of group -> the indices of the kept groups, ascending.
      arrays: the arrays of the sliced layer on the host, by name.
      run: the layer before it was sliced; its shapes, types and shards are those of the result.
    """
    if EXPERT_CHANNEL in kept:
        return _put_with_channels(kept, arrays, run)
    counts = {kind: group_count(run, kind) for kind in kept}
    fewer = {kind: rows for kind, rows in kept.items() if len(rows) < counts[kind]}

    def leaf(path: jax.tree_util.KeyPath, before: Array) -> Array:
        name = axis_table.array_path(path)
        whole, places = arrays[name], _places(name, before.shape, fewer, counts)
        if places is not None:
            whole = np.zeros(before.shape, before.dtype)
            whole[places] = arrays[name]
        return like(whole, before)

    return jax.tree_util.tree_map_with_path(leaf, run)


def _put_with_channels(
    kept: Mapping[str, Int[np.ndarray, " _"]], arrays: Mapping[str, np.ndarray], run: Block
) -> Block:
    """`put_layer` for a layer that has lost channels inside its experts: these first, then the other groups."""
    sizes, wide = run_letters(run), dict(arrays)
    experts = len(kept["expert"]) if "expert" in kept else sizes["X"]
    of_expert = _of_expert(kept[EXPERT_CHANNEL], sizes | {"X": experts})
    for name, part in arrays.items():
        axes = f"L{axis_table.BLOCK_AXES[name]}"
        if {"X", "W"} <= set(axes):
            shape = [
                sizes["W"] if letter == "W" else n
                for letter, n in zip(axis_table.letters(axes), part.shape, strict=True)
            ]
            wide[name] = np.zeros(shape, part.dtype)
            axis_table.put_channels(wide[name], part, axes, of_expert)
    return put_layer({kind: rows for kind, rows in kept.items() if kind != EXPERT_CHANNEL}, wide, run)


def _places(
    name: str, shape: Sequence[int], kept: Mapping[str, Int[np.ndarray, " _"]], counts: Mapping[str, int]
) -> tuple[Any, ...] | None:
    """The index of the kept groups in an array of a run of one layer; None for an array without such groups."""
    axes = f"L{axis_table.BLOCK_AXES[name]}"
    for kind, rows in kept.items():  # an array has groups of one pruned kind at most
        axis = axis_table.group_axis(axes, kind)
        if axis is not None:
            features = np.arange(shape[axis]).reshape(counts[kind], -1)[rows].ravel()
            return (*(slice(None),) * axis, features)
    return None


def _layer_shapes(run: Block) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape[1:] for leaf in jax.tree.leaves(run))


def _concatenate(runs: list[Block]) -> Block:
    return runs[0] if len(runs) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *runs)
