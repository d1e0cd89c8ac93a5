"""How the slope is taken: SPSA, the paired losses of two opposite steps along a direction.

Spall (1992), simultaneous perturbation stochastic approximation; MINI-LLM (2024), step 1:

    ĝ = mean over n directions of [L(W + εz) - L(W - εz)] / (2ε) · z

The bracket over 2ε is the projected gradient, one number for each direction. The list of them is all that is kept;
ĝ is rebuilt from the keys, one layer at a time.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minillm_jax.decoder import Decoder, apply_block, embed, finish, rotary_angles, scan_layers
from minillm_jax.estimate.spaces import Gates, LowRank, Space, Weights
from minillm_jax.loss import token_losses
from minillm_jax.modules import Angles, Block


@partial(jax.jit, static_argnames=("space", "at_once"))
def paired_losses(
    decoder: Decoder,
    keys: Key[Array, " P"],
    tokens: Int[Array, "B T"],
    epsilon: Float[Array, ""],
    space: Space,
    at_once: int = 1,
) -> Float[Array, "P 2 B"]:
    """Summed cross entropy of every sequence at ε and at -ε along every direction of a space, float32.

    Both passes walk the layers together and make each layer's direction when they meet it, so the extra memory is at
    most a perturbed layer for each of the `at_once` directions that are vmapped, never a perturbed model.
    """
    pair = _pair_in_turn if space.copies else _pair_together

    def one(key: Array) -> Array:
        angles = rotary_angles(decoder, tokens.shape[1])
        hidden = finish(decoder, pair(decoder, key, tokens, epsilon, space, angles))
        losses = jax.lax.map(lambda side: token_losses(decoder, side, tokens), hidden)
        return jnp.sum(losses, axis=-1)

    return jax.lax.map(one, keys, batch_size=at_once if at_once > 1 else None)


def _pair_in_turn(
    decoder: Decoder, key: Array, tokens: Array, epsilon: Array, space: Space, angles: Angles
) -> Float[Array, "2 B T D"]:
    """Both streams after the last layer, where a moved layer is a copy.

    Two visits to every layer, one for each side, and the streams change places in between: so one perturbed layer
    exists at a time. Perturbing both sides in one step held almost five layers' worth at the 7B shape (docs/LOG.md).
    """
    x = embed(decoder, tokens).astype(jnp.float32)

    def step(carry: tuple[Array, Array, Array], block: Block, layer: Array, extra: None) -> tuple[Any, None]:
        here, other, scale = carry
        moved = apply_block(space.moved(block, key, layer, scale), decoder.config, here, angles)[0]
        return (other, moved, -scale), None

    (plus, minus, _), _ = scan_layers(decoder.runs, step, (x, x, epsilon), visits=2)
    return jnp.stack([plus, minus])


def _pair_together(
    decoder: Decoder, key: Array, tokens: Array, epsilon: Array, space: Space, angles: Angles
) -> Float[Array, "2 B T D"]:
    """Both streams after the last layer, where they share its weights: one product with both."""
    x = embed(decoder, tokens).astype(jnp.float32)
    scales = jnp.stack([epsilon, -epsilon])

    def step(streams: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
        def one(stream: Array, scale: Array) -> Array:
            return apply_block(space.moved(block, key, layer, scale), decoder.config, stream, angles)[0]

        return jax.vmap(one)(streams, scales), None

    return scan_layers(decoder.runs, step, jnp.stack([x, x]))[0]


def rebuild(
    name: str,
    shape: tuple[int, ...],
    layer: Array,
    keys: Key[Array, " P"],
    projected: Float[Array, " P"],
    space: Weights | LowRank,
) -> Float[Array, "..."]:
    """ĝ of one matrix of one layer, the mean over directions of projected gradient times direction, float32."""

    def add(total: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        key, slope = one
        return space.add(total, slope, key, layer, name), None

    total, _ = jax.lax.scan(add, jnp.zeros(shape, jnp.float32), (keys, projected))
    return total / projected.shape[0]


@partial(jax.jit, static_argnames=("counts", "space"))
def rebuild_gates(
    layers: Int[Array, " L"],
    keys: Key[Array, " P"],
    projected: Float[Array, " P"],
    counts: tuple[tuple[str, int], ...],
    space: Gates,
) -> dict[str, Float[Array, "L groups"]]:
    """ĝ of the gates of equal layers: for each kind, the derivative of the loss by the factor of every group."""

    def one_layer(layer: Array) -> dict[str, Array]:
        def add(total: dict[str, Array], one: tuple[Array, Array]) -> tuple[dict[str, Array], None]:
            key, slope = one
            return jax.tree.map(lambda t, z: t + slope * z, total, space.draw(key, layer, dict(counts))), None

        start = {kind: jnp.zeros(count, jnp.float32) for kind, count in counts}
        total, _ = jax.lax.scan(add, start, (keys, projected))
        return jax.tree.map(lambda t: t / projected.shape[0], total)

    return jax.lax.map(one_layer, layers)


def projected_gradients(losses: Sequence[Float[np.ndarray, "P 2 _"]], predictions: int, epsilon: float) -> np.ndarray:
    """[L(W + εz) - L(W - εz)] / (2ε) of every direction from the losses of all batches; sums in float64, [P].

    L is the mean over all predictions, whatever the split into batches.
    """
    totals = np.concatenate(losses, axis=-1).astype(np.float64).sum(axis=-1)  # [P, 2]
    return (totals[:, 0] - totals[:, 1]) / predictions / (2 * epsilon)
