"""A hash of a model, of its configuration and every bit of its weights: the same on every mesh and from every file."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Shaped, UInt32

from minillm_jax.model.build import without_layers
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.streamed import StreamedDecoder, read_ahead
from minillm_jax.model.tree import layer_count, named_arrays

# Odd constants of MurmurHash3's finaliser, and two seeds: a hash of one array has 64 bits.
MIX = (0x85EBCA6B, 0xC2B2AE35)
SEEDS = (0x9E3779B9, 0x7F4A7C15)


def model_digest(decoder: Decoder) -> str:
    """SHA-256 over the configuration and the name, type, shape and hash of every array, in hexadecimal.

    The devices hash the weights where they lie, with sums of integers: these do not depend on their order, so that
    every mesh gives the same digest. That of a streamed model is another one: it hashes layer by layer.
    """
    if isinstance(decoder, StreamedDecoder):
        outer = tree_digest(without_layers(decoder), repr(decoder.config))
        layers = [tree_digest(layer) for layer in read_ahead(decoder.read, range(layer_count(decoder)))]
        return hashlib.sha256("".join([outer, *layers]).encode()).hexdigest()
    return tree_digest(decoder, repr(decoder.config))


def tree_digest(tree: Any, configuration: str = "") -> str:
    """The same of a tree of arrays, a layer for example, and of a text."""
    total = hashlib.sha256(configuration.encode())
    for path, array in named_arrays(tree):
        words = np.asarray(array_hash(array))
        total.update(f"{path} {array.dtype} {array.shape} {words.tolist()}".encode())
    return total.hexdigest()


@jax.jit
def array_hash(array: Shaped[Array, "..."]) -> UInt32[Array, " 2"]:
    """Two sums over the mixed bits and places of all entries, modulo 2^32."""
    width = jnp.dtype(array.dtype).itemsize
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    strides = np.cumprod([1, *array.shape[::-1]])[:-1][::-1]
    place = sum(
        (lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(stride % 2**32)
         for axis, stride in enumerate(strides)),
        start=jnp.zeros(array.shape, jnp.uint32),
    )  # fmt: skip
    return jnp.stack([jnp.sum(_mixed(bits + _mixed(place ^ np.uint32(seed))), dtype=jnp.uint32) for seed in SEEDS])


def _mixed(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Words whose bits each depend on all bits of the given words."""
    words = (words ^ (words >> 16)) * np.uint32(MIX[0])
    words = (words ^ (words >> 13)) * np.uint32(MIX[1])
    return words ^ (words >> 16)
