"""Random directions over the block matrices, drawn again from a key at any time.

A direction is never stored. Its entries in one matrix depend on the seed, the number of the direction, the layer and
the place of the matrix in the table of axes. They do not depend on batches, chunks, runs or devices.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key

from minillm_jax.model import axis_table
from minillm_jax.settings import RNGS

# A Gaussian matrix is drawn in parts along its hidden dimension. The number of parts is the largest divisor of the
# hidden size up to this limit. The limit belongs to the definition of a direction: a change of it changes directions.
GAUSSIAN_PARTS = 16

_ORDINAL = {name: ordinal for ordinal, name in enumerate(axis_table.all_matrices())}

# Independent random streams: directions of an estimate, noise of the criterion `noise`, scores of `random`, the first
# values of an adapter, dropout, directions of MeZO.
STREAMS = {"direction": 0, "noise": 1, "random": 2, "adapter": 3, "dropout": 4, "mezo": 5}


class Directions(NamedTuple):
    """Directions, drawn from their keys.

    Attributes:
      keys: the key of each direction.
      factors: a factor on all entries of each direction; it sets the length.
    """

    keys: Key[Array, "*P"]
    factors: Float[Array, "*P"]

    @classmethod
    def plain(cls, keys: Key[Array, "*P"]) -> "Directions":
        """Directions with factors of 1."""
        return cls(keys, jnp.ones(keys.shape, jnp.float32))

    def stacked(self, per_step: int) -> "Directions":
        """The directions in chunks that share a pass: [P] -> [P / per_step, per_step]."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, per_step), self)


def stream_key(seed: int, stream: str, implementation: str = RNGS[0]) -> Key[Array, ""]:
    """The key of a random stream of the package, a name of `STREAMS`."""
    return jax.random.fold_in(jax.random.key(seed, impl=implementation), STREAMS[stream])


def direction_keys(seed: int, first: int, last: int, implementation: str = RNGS[0]) -> Key[Array, " P"]:
    """The keys of directions first, ..., last - 1."""
    numbers = jnp.arange(first, last, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(stream_key(seed, "direction", implementation), numbers)


def has_implementation(name: str) -> bool:
    """Whether this version of JAX has an implementation of random bits."""
    try:
        jax.random.key(0, impl=name)
    except ValueError:
        return False
    return True


def part_key(key: Key[Array, ""], layer: Int[Array, ""], name: str) -> Key[Array, ""]:
    """The key of one matrix of one layer, from the key of a direction."""
    return jax.random.fold_in(jax.random.fold_in(key, layer), _ORDINAL[name])


def sample(key: Key[Array, ""], shape: tuple[int, ...], distribution: str) -> Float[Array, "..."]:
    """A small array with entries of zero mean and unit variance, float32; the arguments are those of `add`."""
    return _signs(key, shape) if distribution == "rademacher" else jax.random.normal(key, shape, jnp.float32)


def add(
    target: Float[Array, "..."],
    scale: Float[Array, ""],
    key: Key[Array, ""],
    layer: Int[Array, ""],
    name: str,
    distribution: str,
) -> Float[Array, "..."]:
    """One matrix moved along a direction: target + scale · z, float32.

    Gaussian entries are drawn and added part by part, so that z never exists as a whole array.

    Args:
      target: an array of the shape of the matrix, float32.
      scale: the factor of z.
      key: the key of the direction.
      layer: index of the layer in the model.
      name: name of the matrix in the table of axes (`attention.q`).
      distribution: distribution of the entries of z, with zero mean and unit variance: `gaussian` draws normals, and
        so does `sphere`, whose directions `spaces.lengths` scales to the length √d; `rademacher` draws signs (Spall
        1992), 32 signs from one random word.
    """
    key = part_key(key, layer, name)
    if distribution == "rademacher":
        return target + scale * _signs(key, target.shape)
    axis = axis_table.letters(axis_table.all_matrices()[name]).index("D")
    return _add_gaussian(target, scale, key, axis)


def draw(
    key: Key[Array, ""], layer: Int[Array, ""], name: str, shape: tuple[int, ...], distribution: str
) -> Float[Array, "..."]:
    """The entries z of a direction in one matrix, float32; the arguments are those of `add`."""
    return add(jnp.zeros(shape, jnp.float32), jnp.float32(1.0), key, layer, name, distribution)


def _add_gaussian(
    target: Float[Array, "..."], scale: Float[Array, ""], key: Key[Array, ""], axis: int
) -> Float[Array, "..."]:
    """Adds scale · z in place and in parts along an axis, because drawing normals takes five times their size."""
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
    """Random signs; one random word gives 32 neighbours along the last axis."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 32)), jnp.uint32)
    places = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * len(shape) + (32,))
    bits = (words[..., None] >> places) & jnp.uint32(1)
    flat = bits.reshape(*shape[:-1], -1)[..., : shape[-1]]
    return 1.0 - 2.0 * flat.astype(jnp.float32)
