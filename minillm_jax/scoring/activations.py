"""Norms of the activations of every input feature over the calibration windows, from one or two forward passes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import sharding
from minillm_jax.evaluation.layerwise import begin
from minillm_jax.model.decoder import Decoder, embed, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.modules import Block
from minillm_jax.model.streamed import StreamedDecoder

# For each run: name of a matrix -> one number for each layer and input feature, [L, inputs...].
RunStatistics = list[dict[str, Float[Array, "_ ..."]]]


def activation_norms(decoder: Decoder, batches: Batches, norm: str = "l2") -> RunStatistics:
    """The norm of every input feature of every matrix over all calibration tokens, float32.

    Args:
      decoder: the dense model.
      batches: calibration windows.
      norm: a name of `settings.ACTIVATION_NORMS`: `l2`, ‖X_:i‖₂ (Wanda, arXiv 2306.11695); `rms`; `mean-abs`;
        `std`, the standard deviation (the fluctuation of FLAP, arXiv 2312.11983), which takes a second pass; `none`,
        ones.

    Returns:
      For each run: name of a matrix -> [L, inputs...].
    """
    if norm != "std":
        sums = _totals(decoder, batches, "squares" if norm in ("l2", "rms") else "absolute")
        return [jax.tree.map(lambda sums: _finish(sums, norm, batches.tokens), run) for run in sums]
    means = [jax.tree.map(lambda sums: sums / batches.tokens, run) for run in _totals(decoder, batches, "plain")]
    squares = _totals(decoder, batches, "squares", means)
    return [jax.tree.map(lambda sums: jnp.sqrt(sums / (batches.tokens - 1)), run) for run in squares]


def _totals(decoder: Decoder, batches: Batches, power: str, means: RunStatistics | None = None) -> RunStatistics:
    """The sums of `_sums` over all batches."""
    if isinstance(decoder, StreamedDecoder):
        return list(_layerwise(decoder, batches, power, means))
    return batches.total(lambda batch: _sums(decoder, batch.tokens, means, power=power))


def _layerwise(
    decoder: Decoder, batches: Batches, power: str, means: RunStatistics | None
) -> Iterator[dict[str, Float[Array, "_ ..."]]]:
    """The same for every layer as a run of its own: all batches pass a layer before the next one is read."""
    mesh, outer = batches.mesh, sharding.outer_of(decoder, batches.mesh)
    streams = [begin(outer, batch.tokens, mesh=mesh) for batch in batches]
    for index, layer in enumerate(sharding.layers_of(decoder, mesh)):
        total = None
        for place, x in enumerate(streams):
            streams[place], sums = _layer_sums(outer, layer, x, means and means[index], power=power, mesh=mesh)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        assert total is not None, "there is at least one batch"
        yield total


def _finish(sums: Array, norm: str, tokens: int) -> Array:
    """The norm of every input feature from its sum over all tokens."""
    match norm:
        case "l2":
            return jnp.sqrt(sums)
        case "rms":
            return jnp.sqrt(sums / tokens)
        case "mean-abs":
            return sums / tokens
    return jnp.ones_like(sums)


@partial(jax.jit, static_argnames="power")
def _sums(
    decoder: Decoder, tokens: Int[Array, "B T"], means: RunStatistics | None = None, *, power: str
) -> RunStatistics:
    """The sum of every input feature over the tokens of a batch, float32.

    Args:
      decoder: the model.
      tokens: token ids of the batch.
      means: mean of every input feature, which is subtracted first; nothing is subtracted if None.
      power: the terms of the sum: the features (`plain`), their absolute values (`absolute`), or their `squares`.
    """
    angles = rotary_angles(decoder, tokens.shape[1])

    def step(x: Array, block: Block, layer: Array, of_layer: Any) -> tuple[Array, dict[str, Array]]:
        x, inputs = apply_layer(block, decoder.config, x, angles)
        return x, _totals_of(inputs, of_layer, power)

    return scan_layers(decoder.runs, step, embed(decoder, tokens), per_layer=means)[1]


def _totals_of(inputs: dict[str, Array], means: dict[str, Array] | None, power: str) -> dict[str, Array]:
    """The sums of the input features of one layer over the tokens of a batch."""
    apply = {"plain": lambda x: x, "absolute": jnp.abs, "squares": jnp.square}[power]

    def total(x: Array, mean: Array | None) -> Array:
        x32 = x.astype(jnp.float32)
        return jnp.sum(apply(x32 if mean is None else x32 - jnp.broadcast_to(mean, x32.shape)), axis=(0, 1))

    return {name: total(value, None if means is None else means[name]) for name, value in inputs.items()}


@partial(jax.jit, static_argnames=("power", "mesh"))
def _layer_sums(
    outer: Decoder,
    run: Block,
    x: Float[Array, "B T D"],
    means: dict[str, Array] | None,
    *,
    power: str,
    mesh: Mesh | None,
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "1 ..."]]]:
    """The residual stream after a layer, a run of one layer, and the sums of its input features."""
    block, means = jax.tree.map(lambda array: array[0], (run, means))
    x, inputs = apply_layer(block, outer.config, x, rotary_angles(outer, x.shape[1]))
    return sharding.spread(x, mesh), jax.tree.map(lambda sums: sums[None], _totals_of(inputs, means, power))
