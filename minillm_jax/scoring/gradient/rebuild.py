"""The estimate ĝ from keys and projected gradients: of one matrix of one layer at a time, or of the gates."""

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
    """The estimate ĝ of one matrix of one layer: the mean of projected gradient · direction, float32.

    Args:
      name: name of the matrix in the table of axes.
      shape: shape of the matrix.
      layer: index of the layer in the model.
      directions: keys and factors of P directions.
      projected: the projected gradient of each direction.
      space: the space of the directions.
    """

    def add(total: Array, direction: tuple[Array, Array]) -> tuple[Array, None]:
        key, slope = direction
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
    """The estimate ĝ of the gates of a run: kind of group -> share of each window in ∂L/∂gate, [L, B, groups].

    The mean of projected gradient · direction as in `rebuild`, but for each window separately, because gates are few.

    Args:
      layers: indices of the run's layers in the model.
      directions: keys and factors of P directions.
      projected: the share of each window in the projected gradient of each direction.
      counts: pairs of a kind of group and the number of its groups in a layer.
      space: the space of the directions.
    """
    slopes = projected * directions.factors[:, None]
    windows = jnp.arange(projected.shape[1], dtype=jnp.int32)

    def one_layer(layer: Array) -> dict[str, Array]:
        def add(total: dict[str, Array], direction: tuple[Array, Array]) -> tuple[dict[str, Array], None]:
            key, slope = direction
            entries = space.draw(key, layer, dict(counts), windows)
            return jax.tree.map(lambda t, z: t + slope[:, None] * z, total, entries), None

        start = {kind: jnp.zeros((len(windows), count), jnp.float32) for kind, count in counts}
        total, _ = jax.lax.scan(add, start, (directions.keys, slopes))
        return jax.tree.map(lambda t: t / slopes.shape[0], total)

    return jax.lax.map(one_layer, layers)
