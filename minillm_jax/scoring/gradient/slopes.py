"""How the slope is taken: the change of the loss along a direction, from forward passes.

Simultaneous perturbation (Spall 1992; MINI-LLM 2024, step 1):

    ĝ = mean over n directions of [L(W + εz) - L(W - εz)] / (2ε) · z

The factor of z is the projected gradient, one number for each direction. `spsa` takes it from the paired losses of two
opposite steps, `jvp` is what it tends to when ε goes to zero: the directional derivative in forward mode, exact, with
several directions sharing everything that does not depend on them. The list of projected gradients is all that is
kept; `rebuild` makes ĝ from it and the keys, one layer at a time. The reference by reverse mode is in `exact`.
"""

from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import token_losses
from minillm_jax.model.modules import Angles, Block
from minillm_jax.scoring.gradient import spaces
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.spaces import Space

DIFFERENCES = ("spsa", "jvp", "exact")


@partial(jax.jit, static_argnames="space")
def paired_losses(
    decoder: Decoder,
    directions: Directions,
    tokens: Int[Array, "B T"],
    windows: Int[Array, " B"],
    epsilon: Float[Array, ""],
    space: Space,
) -> Float[Array, "chunks P 2 B"]:
    """Summed cross entropy of every sequence at ε and at -ε along every direction of a space, float32.

    Both passes walk the layers together and make each layer's direction when they meet it, so the extra memory is at
    most a perturbed layer for each of the P directions of a chunk, which are vmapped, never a perturbed model.

    Args:
      decoder: the model.
      directions: keys and factors, [chunks, P]; the chunks are scanned.
      tokens: the batch.
      windows: number of every sequence in the calibration set (see `spaces.Gates`).
      epsilon: length of the step.
      space: of the directions.
    """
    angles = rotary_angles(decoder, tokens.shape[1])

    def one(directions: Directions) -> Array:
        x = embed(decoder, tokens).astype(jnp.float32)
        moved = partial(space.moved, key=directions.keys, windows=windows)
        hidden = finish(decoder, _pair(decoder, moved, x, epsilon * directions.factors, angles))
        return jax.lax.map(lambda side: jnp.sum(token_losses(decoder, side, tokens), axis=-1), hidden)

    return jax.lax.map(lambda chunk: _each(one, chunk), directions)


def _each(one: Any, chunk: Directions) -> Array:
    """A chunk's directions side by side; one alone without an axis of its own, which would cost it time."""
    if chunk.factors.shape[0] == 1:
        return one(jax.tree.map(lambda leaf: leaf[0], chunk))[None]
    return jax.vmap(one)(chunk)


def _pair(decoder: Decoder, moved: Any, x: Array, scale: Array, angles: Angles) -> Float[Array, "2 B T D"]:
    """Both streams after the last layer.

    Two visits to every layer, one for each side, and the streams change places in between: so one perturbed layer
    exists at a time. Perturbing both sides in one step held almost five layers' worth at the 7B shape (docs/LOG.md),
    and took no less time where nothing is copied.
    """

    def step(carry: tuple[Array, Array, Array], block: Block, layer: Array, extra: None) -> tuple[Any, None]:
        here, other, scale = carry
        there = moved(block, layer=layer, step=spaces.finite(scale))
        return (other, apply_layer(there, decoder.config, here, angles)[0], -scale), None

    (plus, minus, _), _ = scan_layers(decoder.runs, step, (x, x, scale), visits=2)
    return jnp.stack([plus, minus])


@partial(jax.jit, static_argnames="space")
def directional_derivatives(
    decoder: Decoder, directions: Directions, tokens: Int[Array, "B T"], windows: Int[Array, " B"], space: Space
) -> Float[Array, "chunks P B"]:
    """The derivative of every sequence's summed cross entropy along every direction of a space, float32.

    Forward mode inside the layer scan: the stream of the model as it is goes through once a chunk, with the tangents of
    the chunk's directions beside it. Nothing is subtracted, so bfloat16 weights and streams stay bfloat16.

    The arguments are those of `paired_losses`.
    """
    angles, x = rotary_angles(decoder, tokens.shape[1]), embed(decoder, tokens)

    def chunk(directions: Directions) -> Array:
        def step(carry: tuple[Array, Array], block: Block, layer: Array, extra: None) -> tuple[Any, None]:
            def one(key: Array, tangent: Array) -> tuple[Array, Array]:
                def layer_at(scale: Array, x: Array) -> Array:
                    moved = space.moved(block, key, layer, spaces.derivative(scale), windows)
                    return apply_layer(moved, decoder.config, x, angles)[0]

                return jax.jvp(layer_at, (jnp.float32(0), x), (jnp.float32(1), tangent))

            x, tangents = carry
            return jax.vmap(one, out_axes=(None, 0))(directions.keys, tangents), None

        start = jnp.zeros((directions.factors.shape[0], *x.shape), x.dtype)
        last, tangents = scan_layers(decoder.runs, step, (x, start))[0]
        slopes = jax.vmap(partial(_derivative_of_losses, decoder, tokens, last), out_axes=(None, 0))(tangents)[1]
        return slopes * directions.factors[:, None]

    return jax.lax.map(chunk, directions)


def _derivative_of_losses(decoder: Decoder, tokens: Array, x: Array, tangent: Array) -> tuple[Array, Array]:
    def losses(x: Array) -> Array:
        return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)

    return jax.jvp(losses, (x,), (tangent,))
