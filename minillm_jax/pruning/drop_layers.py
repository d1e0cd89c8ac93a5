"""Removal of whole layers, one after the other, by measured loss."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import check_dense_loss, window_losses
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
    """The indices of the kept layers, ascending.

    Layers are removed one at a time: each time the layer whose removal leaves the least loss. A removal takes one
    forward pass over the windows for every layer that may still be removed.

    Args:
      decoder: the dense model.
      batches: calibration windows.
      keep: number of kept layers.
      layers: the layers that may be removed; all by default.
      progress: called with the number of layers removed so far, and of all layers to remove.

    Raises:
      InputError: the loss of the dense model is not finite, or that of every model with one layer less.
    """
    count = layer_count(decoder)
    kept = np.ones(count, dtype=bool)
    for done in range(count - keep):
        candidates = [layer for layer in layers or range(count) if kept[layer]]
        losses = [_loss(decoder, batches, kept & (np.arange(count) != layer)) for layer in candidates]
        if not np.isfinite(losses).all():
            _check_losses(decoder, batches, candidates, losses)
        best = hosts.of_first(lambda losses=losses: {"place": np.argmin(np.nan_to_num(losses, nan=np.inf))})
        kept[candidates[int(best["place"])]] = False
        if progress is not None:
            progress(done + 1, count - keep)
    return np.flatnonzero(kept).tolist()


def _check_losses(decoder: Decoder, batches: Batches, candidates: list[int], losses: list[float]) -> None:
    """Checks that losses of which some are not finite can be compared: a layer with such a loss is then never the best.

    Raises:
      InputError: the loss of the dense model is not finite, or none of the losses is.
    """
    dense = _loss(decoder, batches, np.ones(layer_count(decoder), dtype=bool))
    check_dense_loss(dense, "no layer can be compared with another")
    if not np.isfinite(losses).any():
        raise InputError(
            f"the loss is not finite whichever of the layers {', '.join(map(str, candidates))} is removed: the "
            "activations overflow their type; use --dtype float32, a smaller ratio, or other --layers"
        )


def _loss(decoder: Decoder, batches: Batches, kept: Bool[np.ndarray, " L"]) -> float:
    """The summed loss of the model with only the kept layers, over all windows."""
    losses = window_losses(decoder, batches, partial(_losses_of_layers, kept=jnp.asarray(kept)))
    return float(losses.sum(dtype=np.float64))


# `kept` is an argument of the compiled program, so that all choices of layers share one compilation.
@jax.jit
def _losses_of_layers(decoder: Decoder, tokens: Int[Array, "B T"], kept: Bool[Array, " L"]) -> Float[Array, " B"]:
    """Summed cross entropy of every sequence, by the model with only the kept layers."""
    angles = rotary_angles(decoder, tokens.shape[1])

    def step(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
        return jnp.where(kept[layer], apply_layer(block, decoder.config, x, angles)[0], x), None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens))
    return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)
