"""Slopes of the loss along directions, from forward passes.

Simultaneous perturbation (SPSA; Spall 1992; MINI-LLM, arXiv 2407.11681, step 1):

    ĝ = mean over n directions of [L(W + εz) - L(W - εz)] / (2ε) · z

The factor of z is the projected gradient, one number for each direction. `spsa` computes it from the paired losses of
two opposite steps. `jvp` computes its limit for ε → 0, the exact directional derivative, in forward mode; directions
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
def paired_losses(
    decoder: Decoder,
    directions: Directions,
    tokens: Int[Array, "B T"],
    windows: Int[Array, " B"],
    epsilon: Float[Array, ""],
    space: Space,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Float[Array, "chunks P 2 B"]:
    """Summed cross entropy of every window at ε and at -ε along every direction, float32, nats.

    The two passes run through the layers together and draw the direction of each layer when they reach it. The P
    directions of a chunk are vmapped. The extra memory is at most P perturbed layers, never a perturbed model.

    Args:
      decoder: the model.
      directions: keys and factors, [chunks, P]; the chunks are scanned.
      tokens: token ids of the batch.
      windows: the number of each window among all calibration windows (see `spaces.Space`).
      epsilon: the length ε of the step.
      space: the space of the directions.
      logits_at_once: see `token_losses`.
    """
    angles = rotary_angles(decoder, tokens.shape[1])

    def both_sides(direction: Directions) -> Array:
        x = embed(decoder, tokens).astype(jnp.float32)
        moved = partial(space.moved, key=direction.keys, windows=windows)
        hidden = finish(decoder, _pair(decoder, moved, x, epsilon * direction.factors, angles))
        return jax.lax.map(lambda side: jnp.sum(token_losses(decoder, side, tokens, logits_at_once), axis=-1), hidden)

    return jax.lax.map(lambda chunk: map_chunk(both_sides, chunk), directions)


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


def _pair(decoder: Decoder, moved: Any, x: Array, scale: Array, angles: Angles) -> Float[Array, "2 B T D"]:
    """The residual streams of both sides after the last layer.

    The scan visits every layer twice, once for each side. The two streams change places between the visits, so that
    only one perturbed layer exists at a time. One visit for both sides held almost five perturbed layers at the 7B
    shape (docs/LOG.md), and was not faster in the spaces without a copy.
    """

    def step(carry: tuple[Array, Array, Array], block: Block, layer: Array, extra: None) -> tuple[Any, None]:
        current, opposite, scale = carry
        return (opposite, perturbed_layer(moved, block, decoder.config, current, scale, layer, angles), -scale), None

    (plus, minus, _), _ = scan_layers(decoder.runs, step, (x, x, scale), visits=2)
    return jnp.stack([plus, minus])


def perturbed_layer(
    moved: Any, block: Block, config: DecoderConfig, x: Array, scale: Array, layer: Array, angles: Angles
) -> Float[Array, "B T D"]:
    """The residual stream of one side after a layer that is moved by `scale` along a direction."""
    return apply_layer(moved(block, layer=layer, step=spaces.finite(scale)), config, x, angles)[0]


@partial(jax.jit, static_argnames="space")
def directional_derivatives(
    decoder: Decoder, directions: Directions, tokens: Int[Array, "B T"], windows: Int[Array, " B"], space: Space
) -> Float[Array, "chunks P B"]:
    """The derivative of every window's summed cross entropy along every direction, float32, nats.

    Forward mode inside the scan over layers: each chunk computes the residual stream of the unperturbed model once, and
    a tangent of it for each direction. No losses are subtracted, so bfloat16 weights and streams keep their type.

    The arguments are those of `paired_losses`.
    """
    angles, x = rotary_angles(decoder, tokens.shape[1]), embed(decoder, tokens)

    def chunk(directions: Directions) -> Array:
        def step(carry: tuple[Array, Array], block: Block, layer: Array, extra: None) -> tuple[Any, None]:
            keys = directions.keys
            return tangents_after_layer(space, block, decoder.config, carry, keys, layer, windows, angles), None

        start = jnp.zeros((directions.factors.shape[0], *x.shape), x.dtype)
        last, tangents = scan_layers(decoder.runs, step, (x, start))[0]
        return derivatives_of_losses(decoder, tokens, last, tangents) * directions.factors[:, None]

    return jax.lax.map(chunk, directions)


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
