"""Slopes of a decoder whose layers are read one at a time: all directions pass a layer before the next one is read.

The weights are read once for a call, whatever the number of its directions and windows. The devices hold a residual
stream for each window and each side of each direction (`stream_bytes`), and one layer.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree

from minillm_jax.data.batches import Batch, Batches
from minillm_jax.devices import sharding
from minillm_jax.evaluation.layerwise import STREAMS, begin, parts
from minillm_jax.model.decoder import Decoder, rotary_angles
from minillm_jax.model.loss import losses_of_stream
from minillm_jax.model.modules import Block
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import hidden_size
from minillm_jax.scoring.gradient import slopes
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.spaces import Space

# Both sides of every direction, [chunks, P, 2, B, T, D]; or the stream of the model and a tangent of it for every
# direction, [B, T, D] and [chunks, P, B, T, D].
Streams = PyTree[Float[Array, "..."]]


def measure(
    decoder: StreamedDecoder,
    batches: Batches,
    directions: Directions,
    space: Space,
    epsilon: float | None,
    most_bytes: int = STREAMS,
) -> Float[np.ndarray, "chunks P *sides B"]:
    """The measurements of `passes.measure`, nats.

    Args:
      decoder: the model.
      batches: windows of token ids.
      directions: keys and factors, [chunks, P].
      space: the space of the directions.
      epsilon: the step of the paired losses; None for the derivatives.
      most_bytes: of the residual streams on the devices; the layers are read again for further windows.
    """
    outer, mesh, measured = sharding.outer_of(decoder, batches.mesh), batches.mesh, []
    token_bytes = directions.factors.size * stream_bytes(decoder, pairs=epsilon is not None)
    for part in parts(batches, token_bytes, most_bytes):
        streams = _after_all_layers(decoder, outer, part, directions, space, epsilon, mesh)
        finish = losses_of_pairs if epsilon is not None else partial(derivatives, factors=directions.factors)
        last = [finish(outer, x, batch.tokens) for x, batch in zip(streams, part, strict=True)]
        measured += map(sharding.gather, last)
    return np.concatenate(measured, axis=-1)


def stream_bytes(decoder: Decoder, pairs: bool) -> int:
    """Bytes of the residual streams of one token along one direction: two sides in float32, or one tangent."""
    width = np.dtype(decoder.embedding.dtype).itemsize
    return hidden_size(decoder) * (2 * 4 if pairs else width)


def _after_all_layers(
    decoder: StreamedDecoder,
    outer: Decoder,
    part: list[Batch],
    directions: Directions,
    space: Space,
    epsilon: float | None,
    mesh: Mesh | None,
) -> list[Streams]:
    """The streams of some batches after the last layer."""
    shape, pairs = directions.factors.shape, epsilon is not None
    streams = [first_streams(outer, batch.tokens, shape=shape, pairs=pairs, mesh=mesh) for batch in part]
    advance: Callable[..., Streams] = partial(advance_tangents, space=space)
    if epsilon is not None:
        advance = partial(advance_pairs, epsilon=jnp.float32(epsilon), space=space)
    for number, layer in enumerate(sharding.layers_of(decoder, mesh)):
        index = jnp.asarray(number, jnp.int32)
        streams = [
            advance(outer, layer, of_batch, directions, batch.numbers, index)
            for of_batch, batch in zip(streams, part, strict=True)
        ]
    return streams


@partial(jax.jit, static_argnames=("shape", "pairs", "mesh"))
def first_streams(
    outer: Decoder, tokens: Int[Array, "B T"], *, shape: tuple[int, int], pairs: bool, mesh: Mesh | None
) -> Streams:
    """The streams before the first layer, where all directions agree."""
    x = begin(outer, tokens, mesh=mesh)
    if pairs:
        return jnp.broadcast_to(x.astype(jnp.float32), (*shape, 2, *x.shape))
    return x, jnp.zeros((*shape, *x.shape), x.dtype)


@partial(jax.jit, static_argnames="space", donate_argnames="streams")
def advance_pairs(
    outer: Decoder,
    run: Block,
    streams: Float[Array, "chunks P 2 B T D"],
    directions: Directions,
    windows: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    epsilon: Float[Array, ""],
    space: Space,
) -> Float[Array, "chunks P 2 B T D"]:
    """Both sides of every direction after a layer, a run of one layer."""
    block, angles = jax.tree.map(lambda array: array[0], run), rotary_angles(outer, streams.shape[-2])

    def both_sides(direction: Directions, sides: Array) -> Array:
        scale = epsilon * direction.factors

        def side(of_side: tuple[Array, Array]) -> Array:
            x, scale = of_side
            moved = partial(space.moved, key=direction.keys, windows=windows)
            return slopes.perturbed_layer(moved, block, outer.config, x, scale, layer, angles)

        # One side after the other: a single perturbed layer exists at a time.
        return jax.lax.map(side, (sides, jnp.stack([scale, -scale])))

    return jax.lax.map(lambda chunk: slopes.map_chunk(both_sides, *chunk), (directions, streams))


@partial(jax.jit, static_argnames="space", donate_argnames="streams")
def advance_tangents(
    outer: Decoder,
    run: Block,
    streams: tuple[Float[Array, "B T D"], Float[Array, "chunks P B T D"]],
    directions: Directions,
    windows: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    space: Space,
) -> tuple[Float[Array, "B T D"], Float[Array, "chunks P B T D"]]:
    """The stream of the model and its tangent along every direction after a layer, a run of one layer."""
    x, tangents = streams
    block, angles = jax.tree.map(lambda array: array[0], run), rotary_angles(outer, x.shape[1])

    def chunk(_: Array, of_chunk: tuple[Key[Array, " P"], Array]) -> tuple[Array, Array]:
        return slopes.tangents_after_layer(
            space, block, outer.config, (x, of_chunk[1]), of_chunk[0], layer, windows, angles
        )

    return jax.lax.scan(chunk, x, (directions.keys, tangents))


@jax.jit
def losses_of_pairs(
    outer: Decoder, streams: Float[Array, "chunks P 2 B T D"], tokens: Int[Array, "B T"]
) -> Float[Array, "chunks P 2 B"]:
    """The summed cross entropy of every window on both sides of every direction, from the last streams."""
    flat = streams.reshape(-1, *streams.shape[3:])
    return jax.lax.map(lambda x: losses_of_stream(outer, x, tokens), flat).reshape(streams.shape[:4])


@jax.jit
def derivatives(
    outer: Decoder,
    streams: tuple[Float[Array, "B T D"], Float[Array, "chunks P B T D"]],
    tokens: Int[Array, "B T"],
    factors: Float[Array, "chunks P"],
) -> Float[Array, "chunks P B"]:
    """The derivative of every window's summed cross entropy along every direction, from the last streams."""
    x, tangents = streams
    along = partial(slopes.derivatives_of_losses, outer, tokens, x)
    return jax.lax.map(along, tangents) * factors[..., None]


def lengths(decoder: StreamedDecoder, keys: Key[Array, " P"], space: Space) -> Float[Array, " P"]:
    """`spaces.lengths` of a streamed model. Its shapes are enough: no layer is read."""
    total = jnp.zeros((len(keys), 2))
    for number, run in enumerate(decoder.runs):
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape[1:], shape.dtype), run)
        total += _square_lengths(zeros, keys, jnp.asarray(number, jnp.int32), space=space)
    return jnp.sqrt(total[:, 1] / total[:, 0])


@partial(jax.jit, static_argnames="space")
def _square_lengths(
    block: Block, keys: Key[Array, " P"], layer: Int[Array, ""], *, space: Space
) -> Float[Array, "P 2"]:
    return jax.lax.map(lambda key: space.square_length(block, key, layer), keys)
