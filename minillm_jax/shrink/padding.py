"""The opposite of slicing: groups of zeros in the places where groups were, so that all layers are equally large."""

from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Int

from minillm_jax import groups
from minillm_jax.config import LayerSizes, Sizes
from minillm_jax.decoder import Decoder, build, depth, group_count, named_arrays, with_runs
from minillm_jax.modules import Block


def pad_groups(decoder: Decoder, sizes: Sizes, places: dict[str, list[Int[np.ndarray, " _"]]]) -> Decoder:
    """A decoder that computes the same with the given, larger layers: every added head and channel is zero.

    A head of zeros adds nothing whatever its attention weights are, a channel of zeros nothing because every
    activation of the families maps zero to zero.

    Args:
      decoder: the model.
      sizes: the sizes to reach, equal in all layers.
      places: kind of group -> for each layer, the places of its groups among the new ones, ascending.
    """
    target, first = sizes.layers[0], 0
    pieces: list[Block] = []
    for run in decoder.runs:
        last = first + depth(run)
        pieces.append(_pad(run, target, {kind: rows[first:last] for kind, rows in places.items()}))
        first = last
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces)
    return _with_data(with_runs(decoder, [whole]), sizes)


def _pad(run: Block, target: LayerSizes, places: dict[str, Sequence[Int[np.ndarray, " _"]]]) -> Block:
    counts = {"head": target.K, "channel": target.F}
    before = {kind: group_count(run, kind) for kind in counts}
    indices = {kind: jnp.asarray(np.stack(rows)) for kind, rows in places.items()}

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        axes = groups.BLOCK_AXES[groups.array_path(path)]
        for kind, rows in indices.items():
            if groups.group_axis(axes, kind) is not None:
                array = jax.vmap(
                    lambda a, i, kind=kind: groups.put_groups(a, axes, kind, i, before[kind], counts[kind])
                )(array, rows)
        return array

    return jax.tree_util.tree_map_with_path(leaf, run)


def _with_data(decoder: Decoder, sizes: Sizes) -> Decoder:
    """The data of the layers as these sizes have them: all heads' slopes, not zeros between those that were kept."""
    data = {path: leaf for path, leaf in named_arrays(build(decoder.config, sizes)) if groups.is_data(path)}

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = groups.array_path(path)
        return jnp.asarray(data[name]) if name in data else array

    return jax.tree_util.tree_map_with_path(leaf, decoder)
