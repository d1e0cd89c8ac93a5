"""ĝ from the keys of directions and their projected gradients, one matrix of one layer at a time, or of the gates."""

from functools import partial

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.spaces import Gates, LowRank, Weights


def rebuild(
    name: str,
    shape: tuple[int, ...],
    layer: Int[Array, ""],
    directions: Directions,
    projected: Float[Array, " P"],
    space: Weights | LowRank,
) -> Float[Array, "..."]:
    """ĝ of one matrix of one layer, the mean over directions of projected gradient times direction, float32."""

    def add(total: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        key, slope = one
        return space.add(total, slope, key, layer, name), None

    slopes = projected * directions.factors
    total, _ = jax.lax.scan(add, jnp.zeros(shape, jnp.float32), (directions.keys, slopes))
    return total / slopes.shape[0]


@partial(jax.jit, static_argnames=("counts", "space"))
def rebuild_gates(
    layers: Int[Array, " L"],
    directions: Directions,
    projected: Float[Array, "P B"],
    counts: tuple[tuple[str, int], ...],
    space: Gates,
) -> dict[str, Float[Array, "L B groups"]]:
    """ĝ of the gates of equal layers: for each kind, each sequence's part of the derivative of the loss by every gate.

    As in `rebuild`, the mean over directions of projected gradient times direction; for each sequence on its own,
    because gates are so few.
    """
    slopes = projected * directions.factors[:, None]
    windows = jnp.arange(projected.shape[1], dtype=jnp.int32)

    def one_layer(layer: Array) -> dict[str, Array]:
        def add(total: dict[str, Array], one: tuple[Array, Array]) -> tuple[dict[str, Array], None]:
            key, slope = one
            drawn = space.draw(key, layer, dict(counts), windows)
            return jax.tree.map(lambda t, z: t + slope[:, None] * z, total, drawn), None

        start = {kind: jnp.zeros((len(windows), count), jnp.float32) for kind, count in counts}
        total, _ = jax.lax.scan(add, start, (directions.keys, slopes))
        return jax.tree.map(lambda t: t / slopes.shape[0], total)

    return jax.lax.map(one_layer, layers)
