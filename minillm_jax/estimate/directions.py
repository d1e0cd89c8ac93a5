"""What is perturbed: every block matrix, along a direction that a key rebuilds at any time.

A direction is never stored. The entries of one matrix depend on the seed, the number of the direction, the layer and
the matrix's place in the table of axes, and on nothing else: not on batches, chunks, runs or devices.
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Key

from minillm_jax import groups
from minillm_jax.decoder import Block, replace_kernels

# Named, because the default of `jax.random.key` is a setting of the process and would change the directions.
IMPLEMENTATION = "threefry2x32"

DISTRIBUTIONS = ("gaussian", "rademacher")

_ORDINAL = {name: ordinal for ordinal, name in enumerate(groups.matrices())}

# Streams that must never meet: directions of the estimate, the noise of its control, random scores.
_STREAMS = {"direction": 0, "noise": 1, "random": 2}


def stream_key(seed: int, stream: str) -> Key[Array, ""]:
    """The key of one of the package's independent random streams: `direction`, `noise` or `random`."""
    return jax.random.fold_in(jax.random.key(seed, impl=IMPLEMENTATION), _STREAMS[stream])


def direction_keys(seed: int, first: int, last: int) -> Key[Array, " P"]:
    """The keys of directions first, ..., last - 1."""
    numbers = jnp.arange(first, last, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(stream_key(seed, "direction"), numbers)


def draw(
    key: Key[Array, ""], layer: Array, name: str, shape: tuple[int, ...], distribution: str
) -> Float[Array, "..."]:
    """The part of a direction that belongs to one matrix: zero mean, unit variance, float32.

    Args:
      key: key of the direction.
      layer: index of the layer in the whole model, int32 [].
      name: the matrix, as the table of groups calls it (`attention.q`).
      shape: the matrix's shape.
      distribution: `gaussian`, or `rademacher` (signs, as in Spall 1992), 32 of them from one random word.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, layer), _ORDINAL[name])
    if distribution == "gaussian":
        return jax.random.normal(key, shape, jnp.float32)
    return _signs(key, shape)


def _signs(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Random signs along the last axis, each word spread over 32 neighbours."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 32)), jnp.uint32)
    places = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * len(shape) + (32,))
    bits = (words[..., None] >> places) & jnp.uint32(1)
    flat = bits.reshape(*shape[:-1], -1)[..., : shape[-1]]
    return 1.0 - 2.0 * flat.astype(jnp.float32)


def perturb(block: Block, key: Key[Array, ""], layer: Array, scale: Array, distribution: str) -> Block:
    """One layer moved along a direction: every matrix W becomes W + scale · z, in float32.

    The sum is float32 whatever the weights are stored as: rounding W + εz to bfloat16 would lose most of z.
    """

    def moved(name: str, kernel: Array) -> Array:
        return kernel.astype(jnp.float32) + scale * draw(key, layer, name, kernel.shape, distribution)

    return replace_kernels(block, moved)
