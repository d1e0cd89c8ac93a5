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
from jaxtyping import Array, Float, Int

from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import LOGITS_AT_ONCE, token_losses
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

    return jax.lax.map(lambda chunk: _map_chunk(both_sides, chunk), directions)


def _map_chunk(program: Callable[[Directions], Array], chunk: Directions) -> Array:
    """The program for every direction of a chunk, vmapped. A single direction skips `jax.vmap`, which costs time."""
    if chunk.factors.shape[0] == 1:
        return program(jax.tree.map(lambda leaf: leaf[0], chunk))[None]
    return jax.vmap(program)(chunk)


def _pair(decoder: Decoder, moved: Any, x: Array, scale: Array, angles: Angles) -> Float[Array, "2 B T D"]:
    """The residual streams of both sides after the last layer.

    The scan visits every layer twice, once for each side. The two streams change places between the visits, so that
    only one perturbed layer exists at a time. One visit for both sides held almost five perturbed layers at the 7B
    shape (docs/LOG.md), and was not faster in the spaces without a copy.
    """

    def step(carry: tuple[Array, Array, Array], block: Block, layer: Array, extra: None) -> tuple[Any, None]:
        current, opposite, scale = carry
        perturbed = moved(block, layer=layer, step=spaces.finite(scale))
        return (opposite, apply_layer(perturbed, decoder.config, current, angles)[0], -scale), None

    (plus, minus, _), _ = scan_layers(decoder.runs, step, (x, x, scale), visits=2)
    return jnp.stack([plus, minus])


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
            def along(key: Array, tangent: Array) -> tuple[Array, Array]:
                def layer_at(scale: Array, x: Array) -> Array:
                    moved = space.moved(block, key, layer, spaces.derivative(scale), windows)
                    return apply_layer(moved, decoder.config, x, angles)[0]

                return jax.jvp(layer_at, (jnp.float32(0), x), (jnp.float32(1), tangent))

            x, tangents = carry
            return jax.vmap(along, out_axes=(None, 0))(directions.keys, tangents), None

        start = jnp.zeros((directions.factors.shape[0], *x.shape), x.dtype)
        last, tangents = scan_layers(decoder.runs, step, (x, start))[0]
        slopes = jax.vmap(partial(_derivative_of_losses, decoder, tokens, last), out_axes=(None, 0))(tangents)[1]
        return slopes * directions.factors[:, None]

    return jax.lax.map(chunk, directions)


def _derivative_of_losses(decoder: Decoder, tokens: Array, x: Array, tangent: Array) -> tuple[Array, Array]:
    """The loss of every window from the last residual stream, and its derivative along a tangent."""

    def losses(x: Array) -> Array:
        return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)

    return jax.jvp(losses, (x,), (tangent,))
