"""Activation statistics of every input feature, collected in one forward pass."""

from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax import mesh
from minillm_jax.decoder import Decoder, apply_block, embed, rotary_angles, scan_layers
from minillm_jax.loss import batches
from minillm_jax.modules import Block

ACTIVATION_NORMS = ("l2", "rms", "mean-abs", "none")

# For each run: matrix name -> one number for each layer and input feature, [L, inputs...].
RunStatistics = list[dict[str, Float[Array, "L ..."]]]


def activation_norms(decoder: Decoder, windows: Int[np.ndarray, "B T"], norm: str = "l2") -> RunStatistics:
    """The norm of every input feature of every matrix over all calibration tokens, float32.

    Args:
      decoder: the dense model.
      windows: calibration windows of token ids.
      norm: `l2` (‖X_:i‖₂, as Wanda), `rms`, `mean-abs`, or `none` (ones).
    """
    total: RunStatistics | None = None
    devices = mesh.of(decoder)
    for batch in batches(windows, devices=mesh.data_size(devices)):
        part = _sums(decoder, mesh.shard_batch(batch, devices), squares=norm in ("l2", "rms"))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    assert total is not None, "there is always at least one batch"
    return [jax.tree.map(lambda sums: _finish(sums, norm, windows.size), run) for run in total]


def _finish(sums: Array, norm: str, tokens: int) -> Array:
    match norm:
        case "l2":
            return jnp.sqrt(sums)
        case "rms":
            return jnp.sqrt(sums / tokens)
        case "mean-abs":
            return sums / tokens
    return jnp.ones_like(sums)


@partial(jax.jit, static_argnames="squares")
def _sums(decoder: Decoder, tokens: Int[Array, "B T"], squares: bool) -> RunStatistics:
    """Sum of squares (or of absolute values) of every input feature over batch and positions, float32."""
    angles = rotary_angles(decoder, tokens.shape[1])

    def total(x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        return jnp.sum(jnp.square(x32) if squares else jnp.abs(x32), axis=(0, 1))

    def step(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, dict[str, Array]]:
        x, inputs = apply_block(block, decoder.config, x, angles)
        return x, jax.tree.map(total, inputs)

    return scan_layers(decoder.runs, step, embed(decoder, tokens))[1]
