"""Norms, rotary positions, ALiBi, products, activations: functions of arrays (letters: see `axis_table`).

Types: a matrix product runs in the promoted type of its operands and accumulates in float32. Norms, softmax and rotary
angles are float32 for every type of the operands. float32 products use precision HIGHEST, because accelerators would
otherwise round their operands to TF32 or bfloat16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the frequencies and the rotated features.

    Attributes:
      theta: base of the frequencies.
      kind: the scaling of the frequencies: `default` (none), `linear`, `llama3`, `dynamic`, `yarn` or `longrope`; or
        `none` for layers without rotary positions, whose angles are all zero.
      factor: the divisor of the (low) frequencies; for `dynamic`, of the range of positions.
      low_freq_factor: for `llama3`, the number of turns in `original_length` below which a frequency is divided fully.
      high_freq_factor: for `llama3`, the number of turns in `original_length` above which a frequency is not divided.
      original_length: the context length in tokens before the scaling.
      fraction: share of a head's features that are rotated; the first features are.
      interleaved: feature 2i is paired with 2i + 1; otherwise feature i is paired with i + half.
      attention_factor: for `yarn` and `longrope`, factor of the rotated queries and keys.
      beta_fast: for `yarn`, the number of turns in `original_length` above which a frequency is not divided.
      beta_slow: for `yarn`, the number of turns in `original_length` below which a frequency is divided fully.
      truncate: for `yarn`, whether the range between the two is widened to whole features.
      short_factors: for `longrope`, the divisor of each frequency in sequences of up to `original_length` tokens.
      long_factors: for `longrope`, the divisor of each frequency in longer sequences.
      query_growth: the factor of the queries at a position is 1 + growth · log(1 + whole multiples of
        `original_length` before it) (Ministral 3; Llama 4, whose layers without positions have it).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    fraction: float = 1.0
    interleaved: bool = False
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    query_growth: float = 0.0


ROPE_KINDS = ("default", "linear", "llama3", "dynamic", "yarn", "longrope")

# The kinds whose frequencies depend on the number of tokens of a sequence.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def einsum(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."], out: DTypeLike | None = None
) -> Float[Array, "..."]:
    """Matrix product in the promoted type of x and y, accumulated in float32, returned in that type or in `out`."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(dtype if out is None else out)


def linear(equation: str, x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """`einsum` of x and a kernel whose inputs, and whose outputs, are merged into one axis each.

    The gradient by x needs the transposed kernel. XLA multiplies by a transposed matrix in place, but copies a
    transposed kernel of three axes on a CPU (docs/LOG.md).

    Args:
      equation: of `einsum`; the axes of the kernel are inputs, which are the last axes of x, then outputs.
      x: the input.
      kernel: the kernel.
    """
    first = len(kernel_letters(equation)[0])
    flat, matrix = merge_last(x, first), merge_axes(kernel, first)
    return einsum("...I,IO->...O", flat, matrix).reshape(*flat.shape[:-1], *kernel.shape[first:])


def kernel_letters(equation: str) -> tuple[str, str]:
    """The inputs and the outputs of a kernel, the second operand of an equation of `einsum`."""
    operands, result = equation.split("->")
    kernel = operands.split(",")[1]
    inputs = "".join(letter for letter in kernel if letter not in result)
    return inputs, kernel[len(inputs) :]


def merge_axes(kernel: Float[Array, "..."], inputs: int) -> Float[Array, "I O"]:
    """A kernel as a matrix; `inputs` is the number of its axes that are inputs."""
    return kernel.reshape(math.prod(kernel.shape[:inputs]), math.prod(kernel.shape[inputs:]))


def merge_last(x: Float[Array, "..."], count: int) -> Float[Array, "... I"]:
    """An array whose last `count` axes are one."""
    leading = x.shape[: x.ndim - count]
    return x.reshape(*leading, math.prod(x.shape[len(leading) :]))


def factored_einsum(
    equation: str, x: Float[Array, "..."], u: Float[Array, "*inputs R"], v: Float[Array, "R *outputs"]
) -> Float[Array, "..."]:
    """The product of x and a kernel u · v of rank R along an equation, computed without the kernel.

    Args:
      equation: of `einsum`, for x and the whole kernel, whose axes are inputs, then outputs.
      x: the input.
      u: the first factor; its last axis is the rank, for which the equation must not use the letter R.
      v: the second factor.
    """
    inputs, outputs = kernel_letters(equation)
    operands, result = equation.split("->")
    letters = operands.split(",")[0]
    narrow = letters.removesuffix(inputs) + "R"
    return einsum(f"{narrow},R{outputs}->{result}", einsum(f"{letters},{inputs}R->{narrow}", x, u), v)


def norm(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"] | None,
    bias: Float[Array, " D"] | None,
    kind: str,
    epsilon: float,
) -> Float[Array, "... D"]:
    """Norm over the last axis, in float32.

    Args:
      x: the input.
      scale: learned factors, or None.
      bias: learned offsets, or None.
      kind: `rms` (root mean square), `rms_float32` (the same, scaled before the result is rounded), `rms_plus_one`
        (scaled by 1 + scale before it is rounded) or `layer` (mean and variance).
      epsilon: added to the mean square or variance.
    """
    x32 = x.astype(jnp.float32)
    if kind == "layer":
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    if kind == "rms":
        # transformers rounds before the scale in this kind, and bfloat16 checkpoints were trained so. The other
        # kinds are scaled in float32.
        normed = normed.astype(x.dtype)
    if scale is not None:
        factor = jnp.broadcast_to(scale, x.shape).astype(normed.dtype)
        normed = normed * (1.0 + factor if kind == "rms_plus_one" else factor)
    if bias is not None:
        normed = normed + jnp.broadcast_to(bias, x.shape).astype(normed.dtype)
    return normed.astype(x.dtype)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Soft cap of values to (-cap, cap), cap · tanh(x / cap); unchanged without a cap (Gemma 2, arXiv 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of the linear attention biases, float32 [N] (Press et al., arXiv 2108.12409).

    The first n heads, where n is the largest power of two up to N, have the geometric series 2^(-8i/n), i = 1, ..., n.
    The other heads have every second slope of the series for 2n heads.
    """
    power = 2 ** (heads.bit_length() - 1)
    first = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power) + 1, 2) / power)
    return np.concatenate([first, between]).astype(np.float32)


def rotary_frequencies(rope: Rope, head_size: int) -> np.ndarray:
    """Angle per position of each pair of rotated features, float32 [half], in sequences of up to `original_length`."""
    size = int(head_size * rope.fraction)
    frequencies = 1.0 / rope.theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    match rope.kind:
        case "none":
            frequencies = np.zeros_like(frequencies)
        case "linear":
            frequencies = frequencies / rope.factor
        case "llama3":
            turns = rope.original_length * frequencies / (2 * np.pi)
            span = rope.high_freq_factor - rope.low_freq_factor
            smooth = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
            frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        case "yarn":
            share = _yarn_ramp(rope, size)
            frequencies = share * frequencies / rope.factor + (1 - share) * frequencies
        case "longrope":
            frequencies = frequencies / np.asarray(rope.short_factors)
    return frequencies.astype(np.float32)


def _yarn_ramp(rope: Rope, size: int) -> np.ndarray:
    """How far each frequency is divided, from 0 to 1 [half] (YaRN, Peng et al., arXiv 2309.00071, section 3.2)."""

    def feature(turns: float) -> float:
        """The pair of features, not whole, that makes so many turns in the original context."""
        return size * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    return np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0.0, 1.0)


def frequencies_at(
    rope: Rope, head_size: int, lengths: Int[Array, "*batch"] | int
) -> Float[Array | np.ndarray, "*any half"]:
    """`rotary_frequencies` of sequences of so many tokens, on which `dynamic` and `longrope` depend.

    Sources: dynamic scaling as in transformers; LongRoPE (Ding et al., arXiv 2402.13753).
    """
    short = rotary_frequencies(rope, head_size)
    if rope.kind not in LENGTH_DEPENDENT:
        return short
    tokens = jnp.expand_dims(jnp.asarray(lengths, jnp.float32), -1)
    if rope.kind == "longrope":
        long = np.asarray(short * np.asarray(rope.short_factors) / np.asarray(rope.long_factors), np.float32)
        return jnp.where(tokens > rope.original_length, *(_to_rank(part, tokens.ndim) for part in (long, short)))
    size = 2 * len(short)
    stretch = rope.factor * jnp.maximum(tokens / rope.original_length, 1.0) - (rope.factor - 1.0)
    powers = _to_rank(np.arange(0, size, 2, dtype=np.float32) / (size - 2), tokens.ndim)
    return _to_rank(short, tokens.ndim) * stretch**-powers


def _to_rank(row: np.ndarray, rank: int) -> Float[Array, "*ones half"]:
    return jnp.asarray(row).reshape(*(1,) * (rank - 1), -1)


def rotary_angles(
    rope: Rope, head_size: int, positions: Float[Array, "*batch T"], lengths: Int[Array, "*batch"] | int
) -> tuple[Float[Array, "*batch T half"], Float[Array, "*batch T half"]]:
    """Cosine and sine of the angle of each position and pair, times `attention_factor`, float32.

    Args:
      rope: the rotary positions.
      head_size: features of a head.
      positions: of the tokens.
      lengths: number of tokens of each sequence, the earlier ones included.
    """
    frequencies = jnp.asarray(frequencies_at(rope, head_size, lengths))
    frequencies = frequencies.reshape(*(1,) * (positions.ndim - frequencies.ndim), *frequencies.shape)
    angles = jnp.expand_dims(positions, -1) * jnp.expand_dims(frequencies, -2)
    return rope.attention_factor * jnp.cos(angles), rope.attention_factor * jnp.sin(angles)


def query_angles(
    rope: Rope,
    angles: tuple[Float[Array, "*batch T half"], Float[Array, "*batch T half"]],
    positions: Float[Array, "*batch T"],
) -> tuple[Float[Array, "*batch T half"], Float[Array, "*batch T half"]]:
    """The cosine and sine for queries: those of `rotary_angles` times the factor of `query_growth`."""
    factor = 1.0 + rope.query_growth * jnp.log1p(jnp.floor(positions / rope.original_length))
    cos, sin = (jnp.expand_dims(factor, -1) * part for part in angles)
    return cos, sin


def rotate(
    x: Float[Array, "B T N H"],
    angles: tuple[Float[Array, "*batch T half"], Float[Array, "*batch T half"]],
    interleaved: bool,
) -> Float[Array, "B T N H"]:
    """Rotary positions of the first 2 · half features; the other features are unchanged (see `Rope.interleaved`)."""
    cos, sin = (a.reshape(-1, x.shape[1], 1, a.shape[-1]) for a in angles)  # [B or 1, T, 1, half]
    half = cos.shape[-1]
    features = x[..., : 2 * half].astype(jnp.float32)
    pairs = features.reshape(*x.shape[:-1], half, 2) if interleaved else features.reshape(*x.shape[:-1], 2, half)
    axis = -1 if interleaved else -2
    first, second = (jnp.take(pairs, i, axis=axis) for i in (0, 1))
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return jnp.concatenate([rotated.reshape(features.shape).astype(x.dtype), x[..., 2 * half :]], axis=-1)
