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
from minillm_jax.estimate import directions
from minillm_jax.loss import token_losses
from minillm_jax.modules import Block


@partial(jax.jit, static_argnames=("distribution", "at_once"))
def paired_losses(
    decoder: Decoder,
    keys: Key[Array, " P"],
    tokens: Int[Array, "B T"],
    epsilon: Float[Array, ""],
    distribution: str,
    at_once: int = 1,
) -> Float[Array, "P 2 B"]:
    """Summed cross entropy of every sequence at W + εz and at W - εz, for every direction, float32.

    Both passes walk the layers together and make each layer's direction when they meet it, so the extra memory is at
    most a perturbed layer for each of the `at_once` directions that are vmapped, never a perturbed model.
    """

    def one(key: Array) -> Array:
        return _pair(decoder, key, tokens, epsilon, distribution)

    return jax.lax.map(one, keys, batch_size=at_once if at_once > 1 else None)


def _pair(decoder: Decoder, key: Array, tokens: Array, epsilon: Array, distribution: str) -> Float[Array, "2 B"]:
    angles = rotary_angles(decoder, tokens.shape[1])
    x = embed(decoder, tokens).astype(jnp.float32)

    # Two visits to every layer, one for each side, and the streams change places in between: so one perturbed layer
    # exists at a time. Perturbing both sides in one step held almost five layers' worth at the 7B shape (docs/LOG.md).
    def step(carry: tuple[Array, Array, Array], block: Block, layer: Array, extra: None) -> tuple[Any, None]:
        here, other, scale = carry
        there = directions.perturb(block, key, layer, scale, distribution)
        moved = apply_block(there, decoder.config, here, angles)[0]
        return (other, moved, -scale), None

    (plus, minus, _), _ = scan_layers(decoder.runs, step, (x, x, epsilon), visits=2)
    hidden = finish(decoder, jnp.stack([plus, minus]))
    losses = jax.lax.map(lambda one: token_losses(decoder, one, tokens), hidden)
    return jnp.sum(losses, axis=-1)


def rebuild(
    name: str,
    shape: tuple[int, ...],
    layer: Array,
    keys: Key[Array, " P"],
    projected: Float[Array, " P"],
    distribution: str,
) -> Float[Array, "..."]:
    """ĝ of one matrix of one layer, the mean over directions of projected gradient times direction, float32."""

    def add(total: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        key, slope = one
        return directions.add(total, slope, key, layer, name, distribution), None

    total, _ = jax.lax.scan(add, jnp.zeros(shape, jnp.float32), (keys, projected))
    return total / projected.shape[0]


def projected_gradients(losses: Sequence[Float[np.ndarray, "P 2 _"]], predictions: int, epsilon: float) -> np.ndarray:
    """[L(W + εz) - L(W - εz)] / (2ε) of every direction from the losses of all batches; sums in float64, [P].

    L is the mean over all predictions, whatever the split into batches.
    """
    totals = np.concatenate(losses, axis=-1).astype(np.float64).sum(axis=-1)  # [P, 2]
    return (totals[:, 0] - totals[:, 1]) / predictions / (2 * epsilon)
