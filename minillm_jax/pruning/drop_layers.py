"""Whole layers go, by measured loss: each time the one without which the model predicts best."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.evaluation.perplexity import window_losses
from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import token_losses
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import layer_count


def best_layers(
    decoder: Decoder,
    batches: Batches,
    keep: int,
    layers: range | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """The layers that stay when one after the other goes whose removal leaves the least loss.

    Takes one forward pass over the windows for every layer that is left, each time.

    Args:
      decoder: the dense model.
      batches: calibration windows.
      keep: how many layers stay.
      layers: those that may go; all by default.
      progress: called with the number of layers that are gone, and of all that go.
    """
    count = layer_count(decoder)
    alive = np.ones(count, dtype=bool)
    for done in range(count - keep):
        candidates = [layer for layer in layers or range(count) if alive[layer]]
        losses = [_loss(decoder, batches, alive & (np.arange(count) != layer)) for layer in candidates]
        alive[candidates[int(np.argmin(losses))]] = False
        if progress is not None:
            progress(done + 1, count - keep)
    return np.flatnonzero(alive).tolist()


def _loss(decoder: Decoder, batches: Batches, alive: np.ndarray) -> float:
    found = window_losses(decoder, batches, partial(_losses_with, alive=jnp.asarray(alive)))
    return float(found.sum(dtype=np.float64))


@jax.jit
def _losses_with(decoder: Decoder, tokens: Int[Array, "B T"], alive: Bool[Array, " L"]) -> Float[Array, " B"]:
    """Summed cross entropy of every sequence with only some of the layers; one program whichever they are."""
    angles = rotary_angles(decoder, tokens.shape[1])

    def step(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
        return jnp.where(alive[layer], apply_layer(block, decoder.config, x, angles)[0], x), None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens))
    return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)
