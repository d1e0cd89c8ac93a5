"""Norms, rotary positions, attention, activations: free functions over arrays (letters: see `groups`).

Dtype policy: matrix products run in the type their operands promote to and accumulate in float32; norms, softmax and
rotary angles are float32 whatever that type is. float32 products ask for precision HIGHEST, because accelerators
otherwise round their operands to TF32 or bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": jax.nn.silu}


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base, and how low frequencies are stretched (`default`, `linear` or `llama3`)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


ROPE_KINDS = ("default", "linear", "llama3")


def einsum(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."], out: DTypeLike | None = None
) -> Float[Array, "..."]:
    """Matrix product in the operands' common type, accumulated in float32, returned in that type or in `out`."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(dtype if out is None else out)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "... D"]:
    """Root-mean-square norm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    # Rounded before the scale, as the reference implementation does: it is what bfloat16 checkpoints were trained with.
    return normed.astype(x.dtype) * jnp.broadcast_to(scale, x.shape).astype(x.dtype)


def rotary_frequencies(rope: Rope, head_size: int) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [H / 2]."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_length * frequencies / (2 * np.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        smooth = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    return frequencies.astype(np.float32)


def rotary_angles(rope: Rope, head_size: int, length: int) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosine and sine of every position's angles, float32 [T, H / 2] each."""
    positions = jnp.arange(length, dtype=jnp.float32)
    angles = positions[:, None] * jnp.asarray(rotary_frequencies(rope, head_size))[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], angles: tuple[Float[Array, "T half"], Float[Array, "T half"]]
) -> Float[Array, "B T N H"]:
    """Rotary embedding in the half-split convention (feature i turns with feature i + H / 2)."""
    cos, sin = (jnp.expand_dims(a, (0, 2)) for a in angles)  # [1, T, 1, H / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(length: int, window: int | None) -> Bool[Array, "T S"]:
    """Which keys each query sees: itself and earlier ones, at most `window` of them when one is given."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; consecutive query heads share a key/value head. Softmax in float32."""
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, size)  # [B, T, K, G, H]
    scores = einsum("BTKGH,BSKH->BKGTS", grouped, k, out=jnp.float32) * size**-0.5
    # A finite floor instead of -inf keeps forward-mode derivatives free of inf - inf.
    scores = jnp.where(jnp.expand_dims(mask, (0, 1, 2)), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(batch, length, heads, size)
