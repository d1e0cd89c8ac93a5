"""Attention of grouped queries: which keys a query attends to, and the mixed values (letters: see `axis_table`).

A sequence is computed in a few parts of its queries, each with the keys up to its own end, because later keys have no
weight there. A part of a long sequence is computed in blocks of queries, so that the float32 scores [B, K, G, T, S] are
never whole in memory.

    R    queries of a part or block
    G    query heads of a key/value head
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.model.ops import einsum, soft_cap


@dataclass(frozen=True)
class Mask:
    """The keys that queries attend to.

    Attributes:
      rows: indices of queries -> the keys that each of them attends to, of all sequences or of each.
      is_causal: whether query t attends to no key after key t.
    """

    rows: Callable[[Int[Array, " R"]], Bool[Array, "*batch R S"]]
    is_causal: bool


# Scores T * S of one head that are computed at once: windows of up to 2,048 tokens, which most calibrations have. A
# batch of 4,096 tokens then has 1 GB of float32 scores for 32 heads. A window of 8,192 tokens would have 9 GB.
WHOLE_SCORES = 2**22

# Parts of a sequence. Four parts compute 5/8 of the scores; eight compute 9/16 and are slower on a CPU.
PARTS = 4

# Tokens of the shortest sequence that is computed in parts.
SHORTEST_IN_PARTS = 128

# Scores of one head in a block of a longer sequence: 128 queries at 8,192 tokens, enough for a matrix unit.
SCORES_AT_ONCE = 2**20


def causal_mask(length: int, window: Int[Array, ""] | int | None) -> Mask:
    """The keys that each query attends to: its own position and earlier positions, the last `window` if it is given."""

    def rows(queries: Array) -> Array:
        return _within(queries[:, None] - jnp.arange(length)[None, :], window)

    return Mask(rows, is_causal=True)


def cached_mask(positions: Int[Array, "B T"], size: int, window: Int[Array, ""] | int | None) -> Mask:
    """`causal_mask` for queries at given positions and a cache of `size` keys, of which key s has position s."""

    def rows(queries: Array) -> Array:
        places = jnp.take(positions, queries, axis=1)
        return _within(jnp.expand_dims(places, -1) - jnp.expand_dims(jnp.arange(size), (0, 1)), window)

    return Mask(rows, is_causal=False)


def branch_mask(positions: Int[Array, "B T"], branches: Int[Array, "B T"], window: Int[Array, ""] | int | None) -> Mask:
    """The keys that each query attends to where several continuations follow one prefix (see `modules.Branches`)."""
    length = positions.shape[1]

    def rows(queries: Array) -> Array:
        places, numbers = (jnp.expand_dims(jnp.take(of, queries, axis=1), 2) for of in (positions, branches))
        key = jnp.expand_dims(branches, 1)
        earlier = jnp.expand_dims(causal_mask(length, None).rows(queries), 0)
        allowed = ((key == 0) | (key == numbers)) & earlier
        return allowed if window is None else allowed & (places - jnp.expand_dims(positions, 1) < window)

    return Mask(rows, is_causal=True)


def _within(distance: Int[Array, "*batch R S"], window: Int[Array, ""] | int | None) -> Bool[Array, "*batch R S"]:
    """Whether a key stands so far before a query, or beside it, that the query attends to it."""
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def grouped_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    scale: float | None = None,
    cap: float | None = None,
    slopes: Float[Array, " N"] | None = None,
    positions: Int[Array, "B S"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    rows: int | None = None,
    parts: int | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with the softmax in float32. Consecutive query heads share a key/value head.

    Reverse mode keeps no scores of a long sequence: it computes those of a block again.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: the keys that each query attends to.
      scale: factor of the scores, H^-1/2 by default.
      cap: soft cap of the scores.
      slopes: slopes of the linear biases (ALiBi). slope · key position is added to each score; because the softmax
        ignores a constant, this is a penalty on the distance.
      positions: of the keys; 0, 1, ... by default.
      sinks: a logit of each query head that takes part in the softmax and has no value.
      rows: the most queries of a block; `rows_at_once` by default.
      parts: parts of the sequence, with a causal mask; by default `PARTS`, and one for a short sequence.
    """
    length, heads = q.shape[1:3]
    if not heads:
        return q
    rows = rows_at_once(length, k.shape[1]) if rows is None else rows
    parts = (parts_of(length) if parts is None else parts) if mask.is_causal else 1
    places = jnp.expand_dims(jnp.arange(k.shape[1]), 0) if positions is None else positions
    mixed = []
    for first, last in pairwise(length * part // parts for part in range(parts + 1)):
        keys = slice(last if mask.is_causal else k.shape[1])
        others = {"scale": scale, "cap": cap, "slopes": slopes, "sinks": sinks, "positions": places[:, keys]}
        mix = partial(_mixed, k=k[:, keys], v=v[:, keys], mask=mask, **others)
        mixed.append(_in_blocks(mix, q[:, first:last], jnp.arange(first, last), rows))
    return jnp.concatenate(mixed, axis=1)


def _in_blocks(
    mix: Callable[..., Array], q: Float[Array, "B T N H"], queries: Int[Array, " T"], rows: int
) -> Float[Array, "B T N H"]:
    """`mix(q, queries)`, in a loop over blocks of at most `rows` queries."""
    batch, length = q.shape[:2]
    if rows >= length:
        return mix(q, queries)
    count = -(-length // rows)
    rows = -(-length // count)
    # The last block may be filled up with queries of zeros, whose results are cut off.
    filled = jnp.pad(q, ((0, 0), (0, count * rows - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(filled.reshape(batch, count, rows, *q.shape[2:]), 1, 0)  # [blocks, B, R, N, H]
    places = jnp.minimum(queries[0] + jnp.arange(count * rows), queries[-1]).reshape(count, rows)
    one_block = jax.checkpoint(lambda block: mix(*block), prevent_cse=False)  # in a loop, nothing can be merged
    mixed = jax.lax.map(one_block, (blocks, places))
    return jnp.moveaxis(mixed, 0, 1).reshape(filled.shape)[:, :length]


def parts_of(length: int) -> int:
    """The number of parts of a sequence with a causal mask."""
    return PARTS if length >= SHORTEST_IN_PARTS else 1


def causal_rows(length: int) -> int:
    """The most queries of a sequence whose scores are in memory at the same time, with a causal mask."""
    return min(rows_at_once(length, length), -(-length // parts_of(length)))


def rows_at_once(queries: int, keys: int) -> int:
    """The most queries whose scores are in memory at the same time, for so many queries and keys of a sequence."""
    return queries if queries * keys <= WHOLE_SCORES else max(1, SCORES_AT_ONCE // keys)


def _mixed(
    q: Float[Array, "B R N H"],
    queries: Int[Array, " R"],
    *,
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    scale: float | None,
    cap: float | None,
    slopes: Float[Array, " N"] | None,
    positions: Int[Array, "#B S"],
    sinks: Float[Array, " N"] | None,
) -> Float[Array, "B R N H"]:
    """`grouped_attention` of the queries with the given indices, over the first S keys.

    Heads stand before positions in the products: on a CPU, XLA multiplies them twice as fast so.
    """
    batch, length, heads, size = q.shape
    grouped = jnp.moveaxis(q.reshape(batch, length, k.shape[2], -1, size), 1, 3)  # [B, K, G, R, H]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, S, H]
    scores = einsum("BKGRH,BKSH->BKGRS", grouped, k, out=jnp.float32) * (size**-0.5 if scale is None else scale)
    scores = soft_cap(scores, cap)
    if slopes is not None:
        by_head = slopes.reshape(1, k.shape[1], -1, 1, 1)  # [1, K, G, 1, 1]
        scores = scores + by_head * jnp.expand_dims(positions.astype(jnp.float32), (1, 2, 3))
    # A finite floor instead of -inf keeps forward-mode derivatives free of inf - inf.
    allowed = mask.rows(queries)[..., : k.shape[2]]
    scores = jnp.where(allowed.reshape(-1, 1, 1, *allowed.shape[-2:]), scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        column = sinks.astype(jnp.float32).reshape(1, k.shape[1], -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(column, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[2]].astype(q.dtype)
    mixed = einsum("BKGRS,BKSH->BKGRH", weights, v)
    return jnp.moveaxis(mixed, 3, 1).reshape(batch, length, heads, size)
