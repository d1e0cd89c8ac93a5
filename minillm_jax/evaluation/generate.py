"""Generation: the next token of every prompt, one after another (letters: see `axis_table`).

The keys and values of earlier tokens are kept (`model.cache`). Two programs are compiled: one reads the prompts, the
other one further token. Prompts are padded to a power of two, and all arrays keep their sizes.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.model import cache
from minillm_jax.model.decoder import Decoder, learned_positions, project_to_vocabulary

# Prompts are padded to a power of two of at least so many tokens, the cache to a multiple of it.
SHORTEST = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divisor of the logits; 0 takes the most probable token (greedy).
      top_p: only the most probable tokens are drawn from, the fewest whose probabilities reach `top_p` together
        (nucleus sampling, Holtzman et al., arXiv 1904.09751).
      seed: draws the tokens; every prompt has a stream of its own, which the other prompts do not change.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling = GREEDY,
    stops: Collection[int] = (),
) -> list[list[int]]:
    """The tokens that follow each prompt; the arguments are those of `steps`."""
    found: list[list[int]] = [[] for _ in prompts]
    for tokens in steps(decoder, prompts, count, sampling, stops):
        for row, token in zip(found, tokens, strict=True):
            row.extend([] if token is None else [token])
    return found


def steps(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling = GREEDY,
    stops: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """The next token of every prompt, `count` times or until all have ended; None for a prompt that has ended.

    Args:
      decoder: the model.
      prompts: token ids, at least one for each prompt.
      count: number of tokens at most.
      sampling: how a token is chosen.
      stops: the tokens that end a text; the one that does is the last.

    Raises:
      InputError: a prompt is empty, or the model has too few learned positions for prompt and text.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    size, width = sizes_for(decoder, lengths, count)
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    mesh = sharding.mesh_of(decoder)
    tokens, numbers = (sharding.shard_batch(array, mesh) for array in (padded, lengths))
    choose = partial(next_tokens, keys=_keys(sampling.seed, len(prompts)), sampling=sampling)
    ended = np.zeros(len(prompts), bool)
    written = np.pad(padded, ((0, 0), (0, max(0, size - width))))
    logits, kept = read_prompts(decoder, tokens, numbers, size)
    for step in range(count):
        chosen = choose(logits, step=step)
        found = sharding.gather(chosen)
        yield [None if over else int(token) for over, token in zip(ended, found, strict=True)]
        ended |= np.isin(found, list(stops))
        if ended.all():
            return
        if step + 1 < count:
            written[np.arange(len(prompts)), lengths + step] = found
            if begins_anew(decoder, lengths + step + 1):
                whole, counts = (sharding.shard_batch(array, mesh) for array in (written, lengths + step + 1))
                logits, kept = read_prompts(decoder, whole, counts, size)
            else:
                logits, kept = read_token(decoder, kept, chosen)


def begins_anew(decoder: Decoder, lengths: Int[np.ndarray, " B"]) -> bool:
    """Whether a text has just outgrown the context in which LongRoPE rotates by its short factors.

    All tokens are then read again, because the states of the earlier ones change too.
    """
    rope = decoder.config.rope
    return rope is not None and rope.kind == "longrope" and bool(np.any(lengths == rope.original_length + 1))


def sizes_for(decoder: Decoder, lengths: Int[np.ndarray, " B"], count: int) -> tuple[int, int]:
    """Sizes of the arrays for prompts of some lengths and `count` further tokens: of the cache, of the padded prompts.

    Raises:
      InputError: a prompt is empty, or the model has too few learned positions.
    """
    if not lengths.min():
        raise InputError("a prompt has no tokens; give at least one word")
    longest, limit = int(lengths.max()), learned_positions(decoder)
    if limit is not None and longest + count > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {count} further ones are too long: the model has {limit} learned "
            "positions; use a shorter prompt or fewer tokens"
        )
    room = SHORTEST * -(-(longest + count) // SHORTEST)
    size = room if limit is None else min(room, limit)
    return size, min(size, max(SHORTEST, 2 ** (longest - 1).bit_length()))


@partial(jax.jit, static_argnames="size")
def read_prompts(
    decoder: Decoder, tokens: Int[Array, "B T"], counts: Int[Array, " B"], size: int
) -> tuple[Float[Array, "B V"], cache.Cache]:
    """The logits of the token behind every prompt, and the prompts in a new cache of `size` tokens.

    Args:
      decoder: the model.
      tokens: prompts, padded on the right.
      counts: tokens of each prompt.
      size: see `model.cache.empty`.
    """
    hidden, kept = cache.extend(decoder, cache.empty(decoder, len(tokens), size), tokens, counts)
    last = jnp.take_along_axis(hidden, jnp.expand_dims(counts - 1, (1, 2)), axis=1)
    return project_to_vocabulary(decoder, last[:, 0]), kept


@partial(jax.jit, donate_argnames="kept")
def read_token(
    decoder: Decoder, kept: cache.Cache, tokens: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], cache.Cache]:
    """The logits of the token behind one more token of every sequence, and the cache with it; `kept` is overwritten."""
    hidden, kept = cache.extend(decoder, kept, jnp.expand_dims(tokens, 1))
    return project_to_vocabulary(decoder, hidden[:, 0]), kept


def next_tokens(logits: Float[Array, "B V"], step: int, keys: Key[Array, " B"], sampling: Sampling) -> Int[Array, " B"]:
    """The chosen token of every sequence.

    Args:
      logits: of the next token.
      step: number of the token behind the prompt.
      keys: of every sequence.
      sampling: how a token is chosen.
    """
    if not sampling.temperature:
        return most_probable(logits)
    return _drawn(logits, jnp.int32(step), keys, jnp.float32(sampling.temperature), jnp.float32(sampling.top_p))


def _keys(seed: int, rows: int) -> Key[Array, " B"]:
    """A key for every sequence, by its number alone."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))


@jax.jit
def most_probable(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The most probable token of every sequence."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def _drawn(
    logits: Float[Array, "B V"],
    step: Int[Array, ""],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " B"]:
    def one(logits: Float[Array, " V"], key: Key[Array, ""]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(key, step), nucleus(logits / temperature, top_p))

    return jax.vmap(one)(logits, keys).astype(jnp.int32)


def nucleus(logits: Float[Array, " V"], top_p: Float[Array, ""]) -> Float[Array, " V"]:
    """Logits of which only the most probable tokens remain, the fewest whose probabilities reach `top_p`; else -inf.

    Tokens as probable as the last of these remain too.
    """
    falling = -jnp.sort(-logits)
    before = jnp.cumsum(jax.nn.softmax(falling)) - jax.nn.softmax(falling)
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf))
    return jnp.where(logits < least, -jnp.inf, logits)
