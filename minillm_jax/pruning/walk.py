"""The walk through the layers: one sublayer after the other, on the dense and on the pruned residual stream.

The walk carries two copies of the calibration activations: the residual stream of the dense model, and that of the
model pruned so far. At each output projection (attention.o, mlp.down) it calls `replace(site)`, which may ask for the
Gram matrix of the projection's inputs and returns the layer to use from there on: sliced, refitted, or unchanged.
Structured OBS, the refit and the measured losses of a budget are functions of what the walk shows.

    I    input features of an output projection: N * H of attention.o, F of mlp.down
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.model import ops
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder, embed, rotary_angles
from minillm_jax.model.layer import Sublayer, attention_sublayer, mlp_sublayer
from minillm_jax.model.modules import Angles, Block, Linear, depth
from minillm_jax.model.tree import layer_count

# The output projection that reads the groups of a kind, and no other groups.
PROJECTIONS = {"head": "attention.o", "channel": "mlp.down"}


class State(NamedTuple):
    """The activations of a batch between two sublayers.

    Attributes:
      stream: the residual stream.
      before: the residual stream before the layer, kept between the parallel sublayers of GPT-NeoX; otherwise None.
    """

    stream: Float[Array, "B T D"]
    before: Float[Array, "B T D"] | None = None


class Moments(NamedTuple):
    """Sums over all calibration tokens of A, the input of an output projection on the pruned residual stream, float32.

    The gap is the output, without its bias, with which the projection would turn the pruned residual stream into the
    dense one: the dense residual sum after this sublayer, minus the base of the pruned residual sum, minus the bias. In
    models with a norm between the projection and the residual sum (Gemma 2, GLM 4) no output of the projection is known
    to close the gap, and `cross` and `gaps` mean nothing.

    Attributes:
      gram: the Gram matrix Aᵀ A.
      inputs: the sum of A.
      cross: Aᵀ gap.
      gaps: the sum of the gap.
    """

    gram: Float[Array, "I I"]
    inputs: Float[Array, " I"]
    cross: Float[Array, "I D"]
    gaps: Float[Array, " D"]


class InputMoments(NamedTuple):
    """Sums over all calibration tokens of X, the input of a sublayer's matrices on the pruned residual stream, float32.

    Attributes:
      gram: the Gram matrix Xᵀ X.
      inputs: the sum of X.
      cross: Xᵀ X', where X' is the input on the dense residual stream.
      targets: the sum of X'.
    """

    gram: Float[Array, "D D"]
    inputs: Float[Array, " D"]
    cross: Float[Array, "D D"]
    targets: Float[Array, " D"]


@dataclass(frozen=True)
class Site:
    """One output projection, as the walk shows it.

    Attributes:
      layer: index of its layer.
      kind: kind of the groups that it reads: `head` for attention.o, `channel` for mlp.down.
      run: its layer, a run of one layer. This sublayer has its full width; the other one may be pruned already.
      tokens: number of calibration tokens.
      moments: collects the moments of the projection's input when it is called first; valid until `replace` returns.
    """

    layer: int
    kind: str
    run: Block
    tokens: int
    moments: Callable[[], Moments]


# Refits the matrices of a sublayer that read the residual stream: layer index, kind, layer, moments -> layer.
RefitInputs = Callable[[int, str, Block, Callable[[], InputMoments]], Block]


def projection(block: Block, kind: str) -> Linear:
    """The output projection that reads the groups of a kind."""
    return block.attention.o if kind == "head" else block.mlp.down


def walk(
    decoder: Decoder,
    batches: Batches,
    replace: Callable[[Site], Block],
    progress: Callable[[int, int], None] | None = None,
    refit_inputs: RefitInputs | None = None,
) -> list[Block]:
    """Every layer as `replace` returned it, each a run of one layer.

    Memory at a time: two float32 residual streams of all windows (four with parallel sublayers), one layer's
    activations of one batch, and the moments of one projection.

    Args:
      decoder: the dense model; computes in float32 whatever its type is.
      batches: calibration windows.
      replace: called with each site in the order of the forward pass; returns the site's layer, changed in this
        sublayer only.
      progress: called with the number of sublayers done, and of all.
      refit_inputs: called before `replace` with the layer index, the kind, the layer, and a function that collects the
        moments of the sublayer's inputs; returns the layer with refitted matrices in this sublayer.
    """
    angles = rotary_angles(decoder, batches.length)
    dense = [_begin(decoder, batch.tokens) for batch in batches]
    pruned, layers, done = list(dense), [], 0
    for index, dense_layer in enumerate(_layers(decoder)):
        layer = dense_layer
        for kind in PROJECTIONS:
            settings = {"kind": kind, "config": decoder.config, "angles": angles}
            if refit_inputs is not None:
                input_moments = partial(_collect_inputs, dense_layer, list(dense), list(pruned), settings)
                layer = refit_inputs(index, kind, layer, input_moments)
                del input_moments
            dense_totals = _advance_all(dense_layer, dense, settings)
            moments = cache(partial(_collect, layer, pruned, dense_totals, settings))
            layer = replace(Site(index, kind, layer, batches.tokens, moments))
            del dense_totals, moments  # they would live on through the next sublayer
            _advance_all(layer, pruned, settings)
            done += 1
            if progress is not None:
                progress(done, len(PROJECTIONS) * layer_count(decoder))
        layers.append(layer)
    return layers


def _advance_all(run: Block, states: list[State], settings: dict[str, Any]) -> Sequence[Float[Array, "_ T D"]]:
    """Moves every batch one sublayer further, in place. Returns the residual sums before a norm that follows them."""
    totals = []
    for index, state in enumerate(states):
        states[index], total = _advance(run, state, **settings)
        totals.append(states[index].stream if total is None else total)
    return totals


def _layers(decoder: Decoder) -> Iterator[Block]:
    """Every layer, each a run of one layer."""
    for run in decoder.runs:
        for index in range(depth(run)):
            yield _layer(run, jnp.asarray(index, jnp.int32))


# The index is an argument of the compiled program, so that all layers of a shape share one compilation.
@jax.jit
def _layer(run: Block, index: Int[Array, ""]) -> Block:
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, index, 1), run)


@jax.jit
def _begin(decoder: Decoder, tokens: Int[Array, "B T"]) -> State:
    return State(embed(decoder, tokens).astype(jnp.float32))


def _sublayer(kind: str, run: Block, config: DecoderConfig, state: State, angles: Angles) -> Sublayer:
    block = jax.tree.map(lambda array: array[0], run)
    if kind == "head":
        return attention_sublayer(block, config, state.stream, angles)
    return mlp_sublayer(block, config, state.stream if state.before is None else state.before, state.stream)


@partial(jax.jit, static_argnames=("kind", "config"))
def _advance(
    run: Block, state: State, *, kind: str, config: DecoderConfig, angles: Angles
) -> tuple[State, Float[Array, "B T D"] | None]:
    """The state after a sublayer, and the residual sum where a norm follows it."""
    sublayer = _sublayer(kind, run, config, state, angles)
    before = state.stream if config.parallel and kind == "head" else None
    return State(sublayer.stream, before), sublayer.total if config.norm_after else None


def _collect(
    run: Block, states: Sequence[State], dense_totals: Sequence[Float[Array, "_ T D"]], settings: dict[str, Any]
) -> Moments:
    """The moments of one output projection over all batches."""
    pairs = zip(states, dense_totals, strict=True)
    return _total(_moments(run, state, total, **settings) for state, total in pairs)


def _collect_inputs(
    run: Block, dense: Sequence[State], pruned: Sequence[State], settings: dict[str, Any]
) -> InputMoments:
    """The moments of a sublayer's inputs over all batches."""
    return _total(_input_moments(run, d, p, **settings) for d, p in zip(dense, pruned, strict=True))


def _total(parts: Iterable[Any]) -> Any:
    return reduce(lambda total, part: jax.tree.map(jnp.add, total, part), parts)


@partial(jax.jit, static_argnames=("kind", "config"))
def _input_moments(
    run: Block, dense: State, pruned: State, *, kind: str, config: DecoderConfig, angles: Angles
) -> InputMoments:
    """Input moments of one batch. The norms before the matrices are those of the dense layer, which pruning keeps."""
    name = "attention.q" if kind == "head" else "mlp.up"
    target, x = (_sublayer(kind, run, config, state, angles).inputs[name] for state in (dense, pruned))
    gram, cross = ops.einsum("BTD,BTE->DE", x, x), ops.einsum("BTD,BTE->DE", x, target)
    return InputMoments(gram, jnp.sum(x, axis=(0, 1)), cross, jnp.sum(target, axis=(0, 1)))


@partial(jax.jit, static_argnames=("kind", "config"))
def _moments(
    run: Block, state: State, dense_total: Float[Array, "B T D"], *, kind: str, config: DecoderConfig, angles: Angles
) -> Moments:
    """Moments of one batch."""
    sublayer = _sublayer(kind, run, config, state, angles)
    bias = projection(run, kind).bias
    gap = dense_total - sublayer.base
    gap = gap if bias is None else gap - jnp.broadcast_to(bias[0], gap.shape)
    a = sublayer.inputs[PROJECTIONS[kind]].reshape(*gap.shape[:2], -1)  # [B, T, I]
    gram, cross = ops.einsum("BTI,BTJ->IJ", a, a), ops.einsum("BTI,BTD->ID", a, gap)
    return Moments(gram, jnp.sum(a, axis=(0, 1)), cross, jnp.sum(gap, axis=(0, 1)))
