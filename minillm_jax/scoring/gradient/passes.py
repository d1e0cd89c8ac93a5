"""Measurements along directions, of models in memory and of models whose layers are read one at a time."""

from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from minillm_jax.data.batches import Batch, Batches
from minillm_jax.devices import sharding
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.scoring.gradient import layerwise, slopes
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.spaces import Space


def measure(
    decoder: Decoder, batches: Batches, directions: Directions, space: Space, epsilon: float | None
) -> Float[np.ndarray, "chunks P *sides B"]:
    """The losses of every window at ε and -ε along every direction, or the derivatives along the directions.

    Args:
      decoder: the model.
      batches: calibration windows.
      directions: keys and factors, [chunks, P].
      space: the space of the directions.
      epsilon: the step of the paired losses; None for the derivatives.

    Returns:
      For a step the losses at both sides, [chunks, P, 2, B]; the derivatives [chunks, P, B] for None; float64, nats.
    """
    if isinstance(decoder, StreamedDecoder):
        return layerwise.measure(decoder, batches, directions, space, epsilon).astype(np.float64)

    chunks = [jax.tree.map(lambda leaf, n=n: leaf[n], directions) for n in range(len(directions.factors))]

    def of_batch(batch: Batch) -> Float[np.ndarray, "chunks P *sides B"]:
        """All programs are started before the first result is waited for."""
        found = [
            of_chunk((decoder, _spread(chunk, batch, batches.mesh), batch.tokens, batch.numbers)) for chunk in chunks
        ]
        return np.stack([np.stack([sharding.gather(side) for side in sides], axis=1) for sides in found])

    def of_chunk(arguments: tuple[Any, ...]) -> list[Array]:
        if epsilon is None:
            return [slopes.directional_derivatives(*arguments, space)]
        return [slopes.losses_at(*arguments, jnp.float32(step), space) for step in (epsilon, -epsilon)]

    measured = batches.collect(of_batch).astype(np.float64)
    return measured[:, :, 0] if epsilon is None else measured


def _spread(directions: Directions, batch: Batch, mesh: Mesh | None) -> Directions:
    """Directions [P], spread over the axis `data` where the windows of the batch do not divide by it."""
    devices = sharding.data_size(mesh)
    if mesh is None or len(batch.numbers) % devices == 0:
        return directions
    over_data = sharding.over_data(len(directions.factors), mesh)
    data = sharding.place(np.asarray(jax.random.key_data(directions.keys)), over_data)
    keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(directions.keys))
    return Directions(keys, sharding.place(np.asarray(directions.factors), over_data))
