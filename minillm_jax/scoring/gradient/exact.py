"""The exact gradient by reverse mode, for those who have the memory: the reference, and LLM-Pruner's road.

Every layer is computed again on the way back (`jax.checkpoint`), so activations take one stream a layer. The gradient
by the weights takes as much memory as float32 weights; that by the gates almost none.
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

# For each run: matrix -> gradient stacked like the run, or kind of group -> [L, B, groups].
RunGradients = list[dict[str, Float[Array, "L ..."]]]


def _losses(decoder: Decoder, tokens: Int[Array, "B T"], parameters: Any, apply: Any) -> Float[Array, " B"]:
    """Summed cross entropy of every sequence with `apply(block, a layer's parameters)` in each layer's place."""
    angles = rotary_angles(decoder, tokens.shape[1])

    @jax.checkpoint
    def layer_at(x: Array, block: Block, own: Any) -> Array:
        return apply_layer(apply(block, own), decoder.config, x, angles)[0]

    def step(x: Array, block: Block, layer: Array, own: Any) -> tuple[Array, None]:
        return layer_at(x, block, own), None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens), per_layer=parameters)
    return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)


@jax.jit
def weight_gradients(decoder: Decoder, tokens: Int[Array, "B T"]) -> RunGradients:
    """The gradient of the batch's summed cross entropy by every block matrix, in the weights' type."""
    matrices = [{name: kernel[...] for name, kernel in kernels(run).items()} for run in decoder.runs]

    def apply(block: Block, own: dict[str, Array]) -> Block:
        return replace_kernels(block, lambda name, _: own[name])

    return jax.grad(lambda own: jnp.sum(_losses(decoder, tokens, own, apply)))(matrices)


def gated_losses(
    decoder: Decoder, tokens: Int[Array, "B T"], changes: Sequence[dict[str, Float[Array, "L #B groups"]]]
) -> Float[Array, " B"]:
    """Summed cross entropy of every sequence with a factor 1 + change on every group, float32.

    A change of -1 removes a group. Every sequence may have changes of its own.
    """

    def apply(block: Block, own: dict[str, Array]) -> Block:
        return spaces.gated(block, own, spaces.finite(jnp.float32(1)))

    return _losses(decoder, tokens, changes, apply)


@jax.jit
def gate_gradients(decoder: Decoder, tokens: Int[Array, "B T"]) -> RunGradients:
    """The gradient of each sequence's summed cross entropy by a factor on every group, float32 [L, B, groups].

    One backward pass for all sequences, because each has gates of its own.
    """

    def unchanged(run: Block, kind: str) -> Array:
        return jnp.zeros((depth(run), tokens.shape[0], group_count(run, kind)), jnp.float32)

    start = [{kind: unchanged(run, kind) for kind in spaces.GATED} for run in decoder.runs]
    return jax.grad(lambda changes: jnp.sum(gated_losses(decoder, tokens, changes)))(start)
