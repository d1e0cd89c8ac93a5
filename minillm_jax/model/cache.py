"""Keys and values of earlier tokens, so that a forward pass reads only the new ones (letters: see `axis_table`).

All sequences of a batch share arrays of one size S, but each has its own number of tokens in them. Sequences of
unequal length are padded on the right: the next tokens are written over the padding, and no query attends to a key
behind its own position.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder, angles_at, embed, finish, learned_positions, scan_layers
from minillm_jax.model.layer import attention_sublayer, mlp_sublayer, whole
from minillm_jax.model.modules import Block, LayerCache, depth


class Stored(NamedTuple):
    """Keys and values of one run."""

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]


class Cache(NamedTuple):
    """Keys and values of the tokens that a model has read.

    Attributes:
      runs: of every run of the decoder.
      lengths: number of tokens of each sequence.
    """

    runs: tuple[Stored, ...]
    lengths: Int[Array, " B"]


def empty(decoder: Decoder, batch: int, size: int) -> Cache:
    """A cache for `size` tokens of each of `batch` sequences, in the type of the residual stream.

    Raises:
      InputError: the model has learned positions, and they are fewer than `size`.
    """
    dtype = jax.eval_shape(embed, decoder, jax.ShapeDtypeStruct((1, 1), jnp.int32)).dtype
    limit = learned_positions(decoder)
    if limit is not None and size > limit:
        raise InputError(f"sequences of {size} tokens are too long: the model has {limit} learned positions")

    def stored(run: Block) -> Stored:
        _, heads, head_size = run.attention.k.kernel.shape[-3:]
        shape = (depth(run), batch, size, heads, head_size)
        return Stored(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return Cache(tuple(stored(run) for run in decoder.runs), jnp.zeros(batch, jnp.int32))


def size_of(cache: Cache) -> int:
    """Number of tokens S of a sequence for which there is room."""
    return cache.runs[0].keys.shape[2]


def select(cache: Cache, rows: Int[Array, " rows"]) -> Cache:
    """The cache of some sequences, of which one may be taken several times."""
    runs = jax.tree.map(lambda array: jnp.take(array, rows, axis=1), cache.runs)
    return Cache(runs, jnp.take(cache.lengths, rows))


def extend(
    decoder: Decoder, cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, " B"] | None = None
) -> tuple[Float[Array, "B T E"], Cache]:
    """The hidden states of new tokens, which are the input of the head, and the cache with these tokens.

    Args:
      decoder: the model.
      cache: the earlier tokens. Its size must hold the new ones too: tokens beyond it are not stored.
      tokens: the new tokens of every sequence, padded on the right.
      counts: number of new tokens of each sequence; T by default.
    """
    positions = jnp.expand_dims(cache.lengths, 1) + jnp.expand_dims(jnp.arange(tokens.shape[1]), 0)
    added = tokens.shape[1] if counts is None else counts
    angles, x = angles_at(decoder, positions, cache.lengths + added), embed(decoder, tokens, positions)
    runs = []
    for run, stored in zip(decoder.runs, cache.runs, strict=True):

        def step(carry: tuple[Array, Stored], block: Block, layer: Array, extra: None) -> tuple[tuple, None]:
            (stream, kept), block = carry, whole(block, decoder.config)
            attention = attention_sublayer(
                block, decoder.config, stream, angles, LayerCache(kept.keys, kept.values, layer, positions)
            )
            assert attention.cache is not None, "a sublayer that was given a cache returns it"
            kept = Stored(attention.cache.keys, attention.cache.values)
            return (mlp_sublayer(block, decoder.config, stream, attention.stream).stream, kept), None

        (x, stored), _ = scan_layers([run], step, (x, stored))
        runs.append(stored)
    return finish(decoder, x), Cache(tuple(runs), cache.lengths + added)
