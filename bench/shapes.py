"""LLaMA-like shapes of the benchmarks, with random weights. A module of the benchmarks, not a script.

tiny    for tests
25M     25 million parameters in its layers and a small vocabulary, small enough for many rounds on two CPU cores
125M    the width and depth of GPT-2 small, with LLaMA's layers and vocabulary
135M    SmolLM2-135M, with a head of its own: 9 query heads share 3 key/value heads
1B      TinyLlama 1.1B (arXiv 2401.02385): 32 query heads share 4 key/value heads
7B      LLaMA 7B (arXiv 2302.13971)
8B      LLaMA 3 8B (arXiv 2407.21783): 32 query heads share 8 key/value heads
70B     LLaMA 3 70B (the same): 64 query heads share 8 key/value heads
"""

from dataclasses import replace
from functools import partial

import jax
from jax import numpy as jnp
from jaxtyping import DTypeLike

from minillm_jax.model.build import build, initialise
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import depth
from minillm_jax.model.ops import Rope

CONFIG = DecoderConfig("llama", 1e-5, Rope(10000.0))
SHAPES = {
    "tiny": Sizes(V=96, D=64, H=16, layers=(LayerSizes(N=4, K=2, F=160),) * 2),
    "25M": Sizes(V=512, D=512, H=64, layers=(LayerSizes(N=8, K=8, F=1376),) * 8),
    "125M": Sizes(V=32000, D=768, H=64, layers=(LayerSizes(N=12, K=12, F=2048),) * 12),
    "135M": Sizes(V=49152, D=576, H=64, layers=(LayerSizes(N=9, K=3, F=1536),) * 30),
    "1B": Sizes(V=32000, D=2048, H=64, layers=(LayerSizes(N=32, K=4, F=5632),) * 22),
    "7B": Sizes(V=32000, D=4096, H=128, layers=(LayerSizes(N=32, K=32, F=11008),) * 32),
    "8B": Sizes(V=128256, D=4096, H=128, layers=(LayerSizes(N=32, K=8, F=14336),) * 32),
    "70B": Sizes(V=128256, D=8192, H=128, layers=(LayerSizes(N=64, K=8, F=28672),) * 80),
}


def random_decoder(name: str, dtype: DTypeLike = jnp.float32, seed: int = 0, layers: int | None = None) -> Decoder:
    """A decoder of a shape with random weights, with `layers` layers instead of the shape's number.

    One program makes all weights on the device, so that no float32 copy of them remains.
    """
    sizes = SHAPES[name]
    if layers is not None:
        sizes = replace(sizes, layers=sizes.layers[:1] * layers)
    return jax.jit(partial(initialise, build(CONFIG, sizes, dtype)))(jax.random.key(seed))


def layer_bytes(decoder: Decoder) -> int:
    """Bytes of the weights of one layer."""
    run = decoder.runs[0]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run)) // depth(run)


def random_tokens(vocabulary: int, batch: int, length: int, seed: int = 1) -> jax.Array:
    """Token ids, int32 [B, T]."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, vocabulary)
