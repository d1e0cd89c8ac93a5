"""Norms of the activations of every input feature over the calibration windows, from one or two forward passes."""

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.model.decoder import Decoder, embed, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.modules import Block

# For each run: name of a matrix -> one number for each layer and input feature, [L, inputs...].
RunStatistics = list[dict[str, Float[Array, "_ ..."]]]


def activation_norms(decoder: Decoder, batches: Batches, norm: str = "l2") -> RunStatistics:
    """The norm of every input feature of every matrix over all calibration tokens, float32.

    Args:
      decoder: the dense model.
      batches: calibration windows.
      norm: a name of `settings.ACTIVATION_NORMS`: `l2`, ‖X_:i‖₂ (Wanda, arXiv 2306.11695); `rms`; `mean-abs`;
        `std`, the standard deviation (the fluctuation of FLAP, arXiv 2312.11983), which takes a second pass; `none`,
        ones.

    Returns:
      For each run: name of a matrix -> [L, inputs...].
    """
    if norm != "std":
        sums = _totals(decoder, batches, "squares" if norm in ("l2", "rms") else "absolute")
        return [jax.tree.map(lambda sums: _finish(sums, norm, batches.tokens), run) for run in sums]
    means = [jax.tree.map(lambda sums: sums / batches.tokens, run) for run in _totals(decoder, batches, "plain")]
    squares = _totals(decoder, batches, "squares", means)
    return [jax.tree.map(lambda sums: jnp.sqrt(sums / (batches.tokens - 1)), run) for run in squares]


def _totals(decoder: Decoder, batches: Batches, power: str, means: RunStatistics | None = None) -> RunStatistics:
    """The sums of `_sums` over all batches."""
    return batches.total(lambda batch: _sums(decoder, batch.tokens, means, power=power))


def _finish(sums: Array, norm: str, tokens: int) -> Array:
    """The norm of every input feature from its sum over all tokens."""
    match norm:
        case "l2":
            return jnp.sqrt(sums)
        case "rms":
            return jnp.sqrt(sums / tokens)
        case "mean-abs":
            return sums / tokens
    return jnp.ones_like(sums)


@partial(jax.jit, static_argnames="power")
def _sums(
    decoder: Decoder, tokens: Int[Array, "B T"], means: RunStatistics | None = None, *, power: str
) -> RunStatistics:
    """The sum of every input feature over the tokens of a batch, float32.

    Args:
      decoder: the model.
      tokens: token ids of the batch.
      means: mean of every input feature, which is subtracted first; nothing is subtracted if None.
      power: the terms of the sum: the features (`plain`), their absolute values (`absolute`), or their `squares`.
    """
    angles = rotary_angles(decoder, tokens.shape[1])
    apply = {"plain": lambda x: x, "absolute": jnp.abs, "squares": jnp.square}[power]

    def total(x: Array, mean: Array | None = None) -> Array:
        x32 = x.astype(jnp.float32)
        return jnp.sum(apply(x32 if mean is None else x32 - jnp.broadcast_to(mean, x32.shape)), axis=(0, 1))

    def step(x: Array, block: Block, layer: Array, of_layer: Any) -> tuple[Array, dict[str, Array]]:
        x, inputs = apply_layer(block, decoder.config, x, angles)
        return x, {name: total(value, None if of_layer is None else of_layer[name]) for name, value in inputs.items()}

    return scan_layers(decoder.runs, step, embed(decoder, tokens), per_layer=means)[1]
