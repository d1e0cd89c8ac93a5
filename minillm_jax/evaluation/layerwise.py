"""Losses of a decoder whose layers are read one at a time: all windows pass a layer before the next one is read."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batch, Batches
from minillm_jax.devices import sharding
from minillm_jax.model.decoder import Decoder, embed, rotary_angles
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import losses_of_stream
from minillm_jax.model.modules import Block

Stream = Float[Array, "B T D"]

# Bytes of the residual streams that are on the devices at a time. The layers are read once for so many windows.
STREAMS = 2**30


def layerwise_losses(
    decoder: Decoder,
    batches: Batches,
    progress: Callable[[int, int], None] | None = None,
    most_bytes: int = STREAMS,
) -> Float[np.ndarray, " B"]:
    """The summed cross entropy of every window, float32, nats.

    Memory on the devices: the residual streams of some windows, one layer, and the arrays outside the layers.

    Args:
      decoder: the model.
      batches: windows of token ids.
      progress: called with the number of windows done, and of all.
      most_bytes: of the residual streams on the devices.
    """
    outer, mesh, losses, done = sharding.outer_of(decoder, batches.mesh), batches.mesh, [], 0
    for part in parts(batches, decoder.embedding.shape[1] * decoder.embedding.dtype.itemsize, most_bytes):
        streams = [begin(outer, batch.tokens, mesh=mesh) for batch in part]
        for layer in sharding.layers_of(decoder, mesh):
            streams = [advance(outer, layer, x, mesh=mesh) for x in streams]
        for x, batch in zip(streams, part, strict=True):
            losses.append(sharding.gather(losses_of_stream(outer, x, batch.tokens)))
            done += len(batch.numbers)
            if progress is not None:
                progress(done, batches.count)
    return np.concatenate(losses)


def parts(batches: Batches, token_bytes: int, most_bytes: int) -> Iterator[list[Batch]]:
    """The batches, as many at a time as the bytes of their streams allow, and one at least.

    Args:
      batches: windows of token ids.
      token_bytes: of the streams of one token.
      most_bytes: of the streams of a part.
    """
    part, used = [], 0
    for batch in batches:
        needed = batch.tokens.size * token_bytes
        if part and used + needed > most_bytes:
            yield part
            part, used = [], 0
        part.append(batch)
        used += needed
    yield part


@partial(jax.jit, static_argnames="mesh")
def begin(outer: Decoder, tokens: Int[Array, "B T"], *, mesh: Mesh | None) -> Stream:
    """The residual stream before the first layer, in the type of the model."""
    return sharding.spread(embed(outer, tokens), mesh)


@partial(jax.jit, static_argnames="mesh")
def advance(outer: Decoder, run: Block, x: Stream, *, mesh: Mesh | None) -> Stream:
    """The residual stream after a layer, a run of one layer.

    All layers of equal shapes share one program.
    """
    block, angles = jax.tree.map(lambda array: array[0], run), rotary_angles(outer, x.shape[1])
    return sharding.spread(apply_layer(block, outer.config, x, angles)[0], mesh)
