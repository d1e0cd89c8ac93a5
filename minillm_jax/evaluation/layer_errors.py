"""What each layer lost: how far the pruned residual stream is from the dense one after every layer.

The error of a token is ||x' - x|| / ||x||, where x and x' are its dense and its pruned vector. The error of a layer is
the median over the tokens. A quotient of two sums over all tokens would be the error of a few tokens alone, because
some models give their first tokens vectors that are a thousand times larger than all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.model import ops
from minillm_jax.model.build import with_runs
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder, embed, rotary_angles
from minillm_jax.model.layer import attention_sublayer, mlp_sublayer
from minillm_jax.model.modules import Angles, Block
from minillm_jax.model.padded_runs import one_run, worth_padding
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import hidden_size, layer_count

# Windows that are enough for a median over tokens.
WINDOWS = 8


@dataclass(frozen=True)
class LayerErrors:
    """The error of every layer of the dense model, the removed ones included.

    Attributes:
      stream: of the residual stream after the layer. A removed layer leaves the pruned stream as it is.
      attention: of the update of the attention sublayer, its term of the residual sum; None for a removed layer.
      mlp: of the update of the MLP sublayer.
      windows: number of windows.
      window: tokens of a window.
    """

    stream: list[float]
    attention: list[float | None]
    mlp: list[float | None]
    windows: int
    window: int


class _After(NamedTuple):
    """One batch after a layer: the residual stream, and the two updates of the layer."""

    stream: Float[Array, "B T D"]
    attention: Float[Array, "B T D"]
    mlp: Float[Array, "B T D"]


def layer_errors(
    dense: Decoder,
    pruned: Decoder,
    batches: Batches,
    layers: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
) -> LayerErrors:
    """The error of every layer, on two residual streams side by side.

    Memory at a time beside the weights of both models: two float32 residual streams of all windows, one layer of each
    model, and the activations of one batch; where the layers are padded to equal sizes, a copy of the pruned layers.

    Args:
      dense: the dense model.
      pruned: the pruned model.
      batches: windows of token ids.
      layers: the kept layers of the dense model, ascending; all by default.
      dimensions: the kept hidden dimensions, ascending; all by default. The others are left out of x.

    Raises:
      InputError: the pruned model has another number of layers or hidden dimensions than those that are kept.
    """
    layers = list(range(layer_count(dense)) if layers is None else layers)
    dimensions = list(range(hidden_size(dense)) if dimensions is None else dimensions)
    _check(pruned, layers, dimensions)
    mesh = batches.mesh
    angles = rotary_angles(dense, batches.length)
    outer = sharding.outer_of(pruned, mesh), sharding.outer_of(dense, mesh)
    ours, theirs = ([_begin(one, batch.tokens, mesh=mesh) for batch in batches] for one in outer)
    smaller = iter(sharding.layers_of(_few_programs(pruned), mesh))
    rows = []
    for index, layer in enumerate(sharding.layers_of(dense, mesh)):
        kept = next(smaller) if index in layers else None
        errors = []
        for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            after = _step(layer, their, config=dense.config, mesh=mesh, angles=angles)
            mine = None if kept is None else _step(kept, our, config=pruned.config, mesh=mesh, angles=angles)
            theirs[place], ours[place] = after.stream, our if mine is None else mine.stream
            pairs = [(ours[place], after.stream)] if mine is None else list(zip(mine, after, strict=True))
            errors.append([_relative(*pair, dimensions) for pair in pairs])
        stream, *updates = (float(np.median(np.concatenate(each))) for each in zip(*errors, strict=True))
        rows.append((stream, *(updates or (None, None))))
    streams, attention, mlp = (list(column) for column in zip(*rows, strict=True))
    return LayerErrors(streams, attention, mlp, batches.count, batches.length)


def _check(pruned: Decoder, layers: list[int], dimensions: list[int]) -> None:
    for what, found, kept in (
        ("layers", layer_count(pruned), len(layers)),
        ("hidden dimensions", hidden_size(pruned), len(dimensions)),
    ):
        if found != kept:
            raise InputError(
                f"the pruned model has {found} {what}, where {kept} of the dense model are kept; compare it with the "
                "model that it was pruned from"
            )


def _few_programs(pruned: Decoder) -> Decoder:
    """The model with layers of equal sizes, where programs for every size would take long to compile."""
    if isinstance(pruned, StreamedDecoder) or not worth_padding(pruned.runs):
        return pruned
    return with_runs(pruned, jax.jit(one_run)(list(pruned.runs)))


@partial(jax.jit, static_argnames="mesh")
def _begin(decoder: Decoder, tokens: Int[Array, "B T"], *, mesh: Mesh | None) -> Float[Array, "B T D"]:
    """The residual stream before the first layer, float32."""
    return sharding.spread(embed(decoder, tokens).astype(jnp.float32), mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _step(run: Block, x: Float[Array, "B T D"], *, config: DecoderConfig, mesh: Mesh | None, angles: Angles) -> _After:
    """A batch after one layer, which is a run of one layer."""
    block = jax.tree.map(lambda array: array[0], run)
    attention = attention_sublayer(block, config, x, angles)
    mlp = mlp_sublayer(block, config, x, attention.stream)
    after = _After(mlp.stream, attention.total - attention.base, mlp.total - mlp.base)
    return _After(*(sharding.spread(part, mesh) for part in after))


def _relative(pruned: Array, dense: Array, dimensions: list[int]) -> Float[np.ndarray, " tokens"]:
    """The error of every token, on the host; 0 where both vectors are zero, infinite where the dense one alone is."""
    gaps, norms = (sharding.gather(part) for part in _norms(pruned, dense, jnp.asarray(dimensions, jnp.int32)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gaps == 0, 0.0, gaps / norms).ravel()


@jax.jit
def _norms(
    pruned: Float[Array, "B T kept"], dense: Float[Array, "B T D"], dimensions: Int[Array, " kept"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The norms of the difference and of the dense vector of every token."""
    dense = jnp.take(dense, dimensions, axis=-1)
    gap = pruned - dense
    squares = (ops.einsum("BTD,BTD->BT", part, part) for part in (gap, dense))
    gaps, norms = map(jnp.sqrt, squares)
    return gaps, norms
