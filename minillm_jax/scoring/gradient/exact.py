"""The exact gradient in reverse mode: the reference for every estimate, and the gradient of LLM-Pruner's criteria.

`jax.checkpoint` computes every layer again in the backward pass, so the activations take one residual stream a layer.
The gradient by the weights takes as much memory as float32 weights. The gradient by the gates takes almost none.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import token_losses
from minillm_jax.model.modules import Block, depth
from minillm_jax.model.tree import group_count, kernels, replace_kernels
from minillm_jax.scoring.gradient import spaces

# For each run: name of a matrix -> gradient with the axes of the matrix, or kind of group -> [L, B, groups].
RunGradients = list[dict[str, Float[Array, "_ ..."]]]


def _losses(decoder: Decoder, tokens: Int[Array, "B T"], parameters: Any, apply: Any) -> Float[Array, " B"]:
    """Summed cross entropy of every window, with `apply(block, parameters of the layer)` in place of each layer."""
    angles = rotary_angles(decoder, tokens.shape[1])

    @jax.checkpoint
    def layer_at(x: Array, block: Block, of_layer: Any) -> Array:
        return apply_layer(apply(block, of_layer), decoder.config, x, angles)[0]

    def step(x: Array, block: Block, layer: Array, of_layer: Any) -> tuple[Array, None]:
        return layer_at(x, block, of_layer), None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens), per_layer=parameters)
    return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)


@jax.jit
def weight_gradients(decoder: Decoder, tokens: Int[Array, "B T"]) -> RunGradients:
    """The gradient of the batch's summed cross entropy by every block matrix, in the type of the weights."""
    weights = [{name: kernel[...] for name, kernel in kernels(run).items()} for run in decoder.runs]

    def apply(block: Block, matrices: dict[str, Array]) -> Block:
        return replace_kernels(block, lambda name, _: matrices[name])

    return jax.grad(lambda weights: jnp.sum(_losses(decoder, tokens, weights, apply)))(weights)


def gated_losses(
    decoder: Decoder, tokens: Int[Array, "B T"], changes: Sequence[dict[str, Float[Array, "L #B groups"]]]
) -> Float[Array, " B"]:
    """Summed cross entropy of every window with a gate 1 + change on every group, float32, nats.

    Args:
      decoder: the model.
      tokens: token ids of the batch.
      changes: for each run, kind of group -> change of each gate, for every window or for all windows together. A
        change of -1 removes the group.
    """

    def apply(block: Block, of_layer: dict[str, Array]) -> Block:
        return spaces.gated(block, of_layer, spaces.finite(jnp.float32(1)))

    return _losses(decoder, tokens, changes, apply)


@jax.jit
def gate_gradients(decoder: Decoder, tokens: Int[Array, "B T"]) -> RunGradients:
    """The gradient of each window's summed cross entropy by the gate of every group, float32 [L, B, groups].

    Every window has separate gates, so one backward pass gives the gradients of all windows.
    """

    def no_change(run: Block, kind: str) -> Array:
        return jnp.zeros((depth(run), tokens.shape[0], group_count(run, kind)), jnp.float32)

    changes = [{kind: no_change(run, kind) for kind in spaces.GATED} for run in decoder.runs]
    return jax.grad(lambda changes: jnp.sum(gated_losses(decoder, tokens, changes)))(changes)
