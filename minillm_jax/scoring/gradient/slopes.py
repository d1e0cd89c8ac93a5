"""Slopes of the loss along directions, from forward passes.

Simultaneous perturbation (SPSA; Spall 1992; MINI-LLM, arXiv 2407.11681, step 1):

    ĝ = mean over n directions of [L(W + εz) - L(W - εz)] / (2ε) · z

The factor of z is the projected gradient, one number for each direction. `spsa` computes it from the losses after two
opposite steps. `jvp` computes its limit for ε → 0, the exact directional derivative, in forward mode; directions
that share a pass share everything that does not depend on them. Only the projected gradients are stored: `rebuild`
computes ĝ from them and the keys, one layer at a time. `exact` computes the exact gradient in reverse mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import LOGITS_AT_ONCE, losses_of_stream, token_losses
from minillm_jax.model.modules import Angles, Block
from minillm_jax.scoring.gradient import spaces
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.spaces import Space


@partial(jax.jit, static_argnames=("space", "logits_at_once"))
def losses_at(
    decoder: Decoder,
    directions: Directions,
    tokens: Int[Array, "B T"],
    windows: Int[Array, " B"],
    step: Float[Array, ""],
    space: Space,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Float[Array, "P B"]:
    """Summed cross entropy of every window after a step along every direction, float32, nats.

    The pass draws the direction of a layer when it reaches the layer. The P directions are vmapped. The extra memory is
    at most P perturbed layers, never a perturbed model.

    The loops over sides and over further directions are those of the caller. Inside this program, the loop over layers
    would be a loop within a loop, and the compiler for TPUs would hold a second copy of all weights (docs/LOG.md).

    Args:
      decoder: the model.
      directions: keys and factors, [P].
      tokens: token ids of the batch.
      windows: the number of each window among all calibration windows (see `spaces.Space`).
      step: length of the step; ε for one side of a pair, -ε for the other.
      space: the space of the directions.
      logits_at_once: see `token_losses`.
    """
    angles = rotary_angles(decoder, tokens.shape[1])

    def along(direction: Directions) -> Array:
        moved, scale = partial(space.moved, key=direction.keys, windows=windows), step * direction.factors

        def through_layer(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
            return perturbed_layer(moved, block, decoder.config, x, scale, layer, angles), None

        x, _ = scan_layers(decoder.runs, through_layer, embed(decoder, tokens).astype(jnp.float32))
        return jnp.sum(token_losses(decoder, finish(decoder, x), tokens, logits_at_once), axis=-1)

    return map_chunk(along, directions)


def map_chunk(program: Callable[..., Array], chunk: Directions, *of_chunk: Array) -> Array:
    """The program for every direction of a chunk, vmapped. A single direction skips `jax.vmap`, which costs time.

    Args:
      program: direction, and its part of each further array -> result.
      chunk: keys and factors, [P].
      of_chunk: further arrays, [P, ...].
    """
    if chunk.factors.shape[0] == 1:
        return program(*jax.tree.map(lambda leaf: leaf[0], (chunk, *of_chunk)))[None]
    return jax.vmap(program)(chunk, *of_chunk)


def perturbed_layer(
    moved: Any, block: Block, config: DecoderConfig, x: Array, scale: Array, layer: Array, angles: Angles
) -> Float[Array, "B T D"]:
    """The residual stream of one side after a layer that is moved by `scale` along a direction."""
    return apply_layer(moved(block, layer=layer, step=spaces.finite(scale)), config, x, angles)[0]


@partial(jax.jit, static_argnames="space")
def directional_derivatives(
    decoder: Decoder, directions: Directions, tokens: Int[Array, "B T"], windows: Int[Array, " B"], space: Space
) -> Float[Array, "P B"]:
    """The derivative of every window's summed cross entropy along every direction, float32, nats.

    Forward mode inside the scan over layers: the pass computes the residual stream of the unperturbed model once, and a
    tangent of it for each direction. No losses are subtracted, so bfloat16 weights and streams keep their type.

    The arguments are those of `losses_at`.
    """
    angles, x = rotary_angles(decoder, tokens.shape[1]), embed(decoder, tokens)

    def step(carry: tuple[Array, Array], block: Block, layer: Array, extra: None) -> tuple[Any, None]:
        keys = directions.keys
        return tangents_after_layer(space, block, decoder.config, carry, keys, layer, windows, angles), None

    start = jnp.zeros((directions.factors.shape[0], *x.shape), x.dtype)
    last, tangents = scan_layers(decoder.runs, step, (x, start))[0]
    return derivatives_of_losses(decoder, tokens, last, tangents) * directions.factors[:, None]


def tangents_after_layer(
    space: Space,
    block: Block,
    config: DecoderConfig,
    streams: tuple[Float[Array, "B T D"], Float[Array, "P B T D"]],
    keys: Key[Array, " P"],
    layer: Int[Array, ""],
    windows: Int[Array, " B"],
    angles: Angles,
) -> tuple[Float[Array, "B T D"], Float[Array, "P B T D"]]:
    """The residual stream and its tangents along P directions after a layer; the stream is computed once."""
    x, tangents = streams

    def along(key: Array, tangent: Array) -> tuple[Array, Array]:
        def layer_at(scale: Array, x: Array) -> Array:
            moved = space.moved(block, key, layer, spaces.derivative(scale), windows)
            return apply_layer(moved, config, x, angles)[0]

        return jax.jvp(layer_at, (jnp.float32(0), x), (jnp.float32(1), tangent))

    return jax.vmap(along, out_axes=(None, 0))(keys, tangents)


def derivatives_of_losses(
    decoder: Decoder, tokens: Int[Array, "B T"], x: Float[Array, "B T D"], tangents: Float[Array, "P B T D"]
) -> Float[Array, "P B"]:
    """The derivative of every window's summed cross entropy along P tangents of the last residual stream."""

    def along(tangent: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda x: losses_of_stream(decoder, x, tokens), (x,), (tangent,))

    return jax.vmap(along, out_axes=(None, 0))(tangents)[1]
