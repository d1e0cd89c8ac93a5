"""What is perturbed: every block matrix, along a direction that a key rebuilds at any time.

A direction is never stored. The entries of one matrix depend on the seed, the number of the direction, the layer and
the matrix's place in the table of axes, and on nothing else: not on batches, chunks, runs or devices.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key

from minillm_jax.model import axis_table

# Named, because the default of `jax.random.key` is a setting of the process and would change the directions. Both are
# the same bits whatever is vmapped and however arrays are sharded; JAX's `rbg` and `philox4x32` are not, or not yet.
IMPLEMENTATIONS = ("threefry2x32", "threefry4x32")
IMPLEMENTATION = IMPLEMENTATIONS[0]

# Upper limit; the number of parts of a matrix is the largest divisor of its hidden dimension up to it. A constant of
# the definition: another number makes other directions.
GAUSSIAN_PARTS = 16

# `sphere` draws Gaussian entries; the whole direction is then scaled to the length √d (see `spaces.lengths`).
DISTRIBUTIONS = ("gaussian", "rademacher", "sphere")

_ORDINAL = {name: ordinal for ordinal, name in enumerate(axis_table.matrices())}

# Streams that must never meet: directions of the estimate, the noise of its control, random scores.
_STREAMS = {"direction": 0, "noise": 1, "random": 2}


class Directions(NamedTuple):
    """Some directions: their keys, and factors on their entries that give them the length they should have."""

    keys: Key[Array, "*P"]
    factors: Float[Array, "*P"]

    @classmethod
    def plain(cls, keys: Key[Array, "*P"]) -> "Directions":
        """Directions as they are drawn."""
        return cls(keys, jnp.ones(keys.shape, jnp.float32))

    def stacked(self, per_step: int) -> "Directions":
        """Cut into chunks of directions that share a pass, [P] -> [P / per_step, per_step]."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, per_step), self)


def stream_key(seed: int, stream: str, implementation: str = IMPLEMENTATION) -> Key[Array, ""]:
    """The key of one of the package's independent random streams: `direction`, `noise` or `random`."""
    return jax.random.fold_in(jax.random.key(seed, impl=implementation), _STREAMS[stream])


def direction_keys(seed: int, first: int, last: int, implementation: str = IMPLEMENTATION) -> Key[Array, " P"]:
    """The keys of directions first, ..., last - 1."""
    numbers = jnp.arange(first, last, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(stream_key(seed, "direction", implementation), numbers)


def has_implementation(name: str) -> bool:
    """Whether this version of JAX makes random numbers in that way."""
    try:
        jax.random.key(0, impl=name)
    except ValueError:
        return False
    return True


def part_key(key: Key[Array, ""], layer: Int[Array, ""], name: str) -> Key[Array, ""]:
    """The key of a direction's part that belongs to one matrix of one layer."""
    return jax.random.fold_in(jax.random.fold_in(key, layer), _ORDINAL[name])


def sample(key: Key[Array, ""], shape: tuple[int, ...], distribution: str) -> Float[Array, "..."]:
    """A small array of entries of zero mean and unit variance, float32, from a key of its own."""
    return _signs(key, shape) if distribution == "rademacher" else jax.random.normal(key, shape, jnp.float32)


def add(
    target: Float[Array, "..."],
    scale: Float[Array, ""],
    key: Key[Array, ""],
    layer: Int[Array, ""],
    name: str,
    distribution: str,
) -> Float[Array, "..."]:
    """One matrix moved along its part of a direction: target + scale · z, float32.

    Every use of a direction goes through here: z is made while it is added and need not exist as a whole.

    Args:
      target: what z is added to, float32, of the matrix's shape.
      scale: how far.
      key: key of the direction.
      layer: index of the layer in the whole model.
      name: the matrix, as the table of axes calls it (`attention.q`).
      distribution: of the entries of z, zero mean and unit variance: `gaussian` (as for `sphere`), or `rademacher`
        (signs, as in Spall 1992), 32 of them from one random word.
    """
    key = part_key(key, layer, name)
    if distribution == "rademacher":
        return target + scale * _signs(key, target.shape)
    axis = axis_table.letters(axis_table.matrices()[name]).index("D")
    return _add_gaussian(target, scale, key, axis)


def draw(
    key: Key[Array, ""], layer: Int[Array, ""], name: str, shape: tuple[int, ...], distribution: str
) -> Float[Array, "..."]:
    """The part z of a direction that belongs to one matrix, float32; the arguments are those of `add`."""
    return add(jnp.zeros(shape, jnp.float32), jnp.float32(1.0), key, layer, name, distribution)


def _add_gaussian(
    target: Float[Array, "..."], scale: Float[Array, ""], key: Key[Array, ""], axis: int
) -> Float[Array, "..."]:
    """In place and in a few parts along the hidden dimension, because making normals takes five times their size."""
    size = target.shape[axis]
    parts = max(n for n in range(1, GAUSSIAN_PARTS + 1) if size % n == 0)
    width = size // parts
    shape = (*target.shape[:axis], width, *target.shape[axis + 1 :])

    def part(number: ArrayLike, target: Array) -> Array:
        z = jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
        old = jax.lax.dynamic_slice_in_dim(target, number * width, width, axis)
        return jax.lax.dynamic_update_slice_in_dim(target, old + scale * z, number * width, axis)

    return jax.lax.fori_loop(0, parts, part, target)


def _signs(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Random signs along the last axis, each word spread over 32 neighbours."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 32)), jnp.uint32)
    places = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * len(shape) + (32,))
    bits = (words[..., None] >> places) & jnp.uint32(1)
    flat = bits.reshape(*shape[:-1], -1)[..., : shape[-1]]
    return 1.0 - 2.0 * flat.astype(jnp.float32)
