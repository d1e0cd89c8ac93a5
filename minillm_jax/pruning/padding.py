"""Padding, the opposite of slicing: groups of zeros in place of removed groups, so that all layers have equal sizes."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Int

from minillm_jax.model import axis_table
from minillm_jax.model.build import build, with_runs
from minillm_jax.model.config import Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block, depth, run_letters
from minillm_jax.model.streamed import StreamedDecoder, as_model_of, map_layers
from minillm_jax.model.tree import group_count, named_arrays
from minillm_jax.pruning.slicing import merge

# Kind of group -> for each layer, the indices of its groups in the padded layer. Key/value heads (`head`) and channels
# are counted in the layer and ascend; query heads (`query`) are counted within their key/value head.
Places = dict[str, list[Int[np.ndarray, " _"]]]


def pad_groups(decoder: Decoder, sizes: Sizes, places: Places) -> Decoder:
    """A decoder with larger layers and the same outputs: every added head, query head and channel is zero.

    A head of zeros adds nothing to the residual stream, whatever its attention weights are. A channel of zeros adds
    nothing either, because the activation function of every family maps zero to zero.

    Args:
      decoder: the model.
      sizes: the sizes of the padded decoder, equal in all dense layers, and in all layers with experts.
      places: the places of the groups in the padded layers.
    """
    if isinstance(decoder, StreamedDecoder):
        return map_layers(decoder, sizes, partial(_padded_layer, decoder, sizes, places))
    first = 0
    pieces: list[Block] = []
    for run in decoder.runs:
        last, target = first + depth(run), sizes.layers[first]
        counts = (("query", target.N // target.K), ("head", target.K), ("channel", target.F))
        indices = {kind: jnp.asarray(np.stack(rows[first:last])) for kind, rows in places.items()}
        pieces.append(_pad(run, indices, counts))
        first = last
    return _with_data(with_runs(decoder, merge(pieces)), sizes)


def _padded_layer(decoder: StreamedDecoder, sizes: Sizes, places: Places, index: int, layer: Block) -> Block:
    """One layer of the padded decoder."""
    of_layer = {kind: rows[index : index + 1] for kind, rows in places.items()}
    single = replace(sizes, layers=sizes.layers[index : index + 1])
    return pad_groups(as_model_of(decoder, layer), single, of_layer).runs[0]


@partial(jax.jit, static_argnames="counts")
def _pad(run: Block, places: dict[str, Int[Array, "L _"]], counts: tuple[tuple[str, int], ...]) -> Block:
    """One run of equal layers, padded to `counts` groups of every kind; query heads per key/value head."""
    kv_heads, (per_group, heads, width) = group_count(run, "head"), (after for _, after in counts)
    letters = run_letters(run) | {"K": heads, "N": heads * per_group, "F": width}

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        axes = axis_table.BLOCK_AXES[axis_table.array_path(path)]
        if not array.size:  # the whole sublayer was removed
            return jnp.zeros((len(array), *axis_table.shape(axes, letters)), array.dtype)
        for kind, after in counts:
            if axis_table.group_axis(axes, kind) is not None:
                before, rows = group_count(run, kind), places[kind]
                if kind == "query":  # all key/value heads at once: their first query heads begin at multiples
                    after *= kv_heads
                    rows = rows + jnp.repeat(jnp.arange(kv_heads), before // kv_heads)[None] * (after // kv_heads)
                sizes = {"axes": axes, "kind": kind, "before": before, "after": after}
                array = jax.vmap(partial(axis_table.put_groups, **sizes))(array, places=rows)
        return array

    return jax.tree_util.tree_map_with_path(leaf, run)


def _with_data(decoder: Decoder, sizes: Sizes) -> Decoder:
    """A decoder with the data of layers of these sizes: padding leaves zeros among the ALiBi slopes of the heads."""
    data = {path: leaf for path, leaf in named_arrays(build(decoder.config, sizes)) if axis_table.is_data(path)}

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = axis_table.array_path(path)
        return jnp.asarray(data[name]) if name in data else array

    return jax.tree_util.tree_map_with_path(leaf, decoder)
