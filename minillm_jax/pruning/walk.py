"""The walk over blocks: each half of each layer once, on the dense and on the already pruned residual stream.

Whoever walks is shown one output projection (attention.o, mlp.down) at a time, with the moments of its input, and
answers with the layer as it is to be from there on: sliced, restored, or left alone. Statistics, structured OBS and
restoration are functions of what the walk shows.

    I input features of an output projection: N * H of attention.o, F of mlp.down
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.model import ops
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder, embed, rotary_angles
from minillm_jax.model.layer import Sublayer, attention_sublayer, mlp_sublayer
from minillm_jax.model.loss import batches
from minillm_jax.model.modules import Angles, Block, Linear, depth
from minillm_jax.model.tree import layer_count

# The output projection of each kind of group: what reads the groups of the kind, and nothing else.
PROJECTIONS = {"head": "attention.o", "channel": "mlp.down"}


class State(NamedTuple):
    """How far a batch has come: its residual stream, and between parallel halves also the stream before them."""

    stream: Float[Array, "B T D"]
    before: Float[Array, "B T D"] | None = None


class Moments(NamedTuple):
    """Sums over all calibration tokens of A, the input of an output projection on the pruned stream, float32.

    `gap` is what the projection would have to make, without its bias, for the pruned stream to become the dense one:
    the dense stream after this half, minus what the half adds to on the pruned stream, minus the bias. Before a norm
    that follows the sum. In models with a norm between the projection and the sum (Gemma 2, GLM 4) nothing the
    projection makes is the gap, and its two moments mean nothing.

    Attributes:
      gram: Aᵀ A.
      inputs: sum of A.
      cross: Aᵀ gap.
      gaps: sum of gap.
    """

    gram: Float[Array, "I I"]
    inputs: Float[Array, " I"]
    cross: Float[Array, "I D"]
    gaps: Float[Array, " D"]


class InputMoments(NamedTuple):
    """Sums over all calibration tokens of X, what the inner matrices of a half read on the pruned stream, float32.

    Attributes:
      gram: Xᵀ X.
      inputs: sum of X.
      cross: Xᵀ X', X' what they read on the dense stream.
      goals: sum of X'.
    """

    gram: Float[Array, "D D"]
    inputs: Float[Array, " D"]
    cross: Float[Array, "D D"]
    goals: Float[Array, " D"]


@dataclass(frozen=True)
class Site:
    """One output projection, as the walk shows it.

    Attributes:
      layer: number of its layer.
      kind: `head` for attention.o, `channel` for mlp.down: the groups it reads.
      run: its layer, a run of one; of full width in this half, whose other half may be done already.
      tokens: how many calibration tokens there are.
      moments: collects the moments of its input, once, when they are asked for; before the site is answered.
    """

    layer: int
    kind: str
    run: Block
    tokens: int
    moments: Callable[[], Moments]


def projection(block: Block, kind: str) -> Linear:
    """The output projection that reads the groups of a kind."""
    return block.attention.o if kind == "head" else block.mlp.down


def walk(
    decoder: Decoder,
    windows: Int[np.ndarray, "B T"],
    replace: Callable[[Site], Block],
    progress: Callable[[int, int], None] | None = None,
    align: Callable[[int, str, Block, Callable[[], InputMoments]], Block] | None = None,
) -> list[Block]:
    """Every layer as `replace` made it, a run of one layer each.

    Alive at a time: two float32 streams of all windows (four where attention and MLP are parallel), one layer's
    activations of one batch, the moments of one projection.

    Args:
      decoder: the dense model; computes in float32 whatever its type is.
      windows: calibration windows of token ids.
      replace: called with each site in the order of the forward pass; the layer that it returns is that of the site,
        changed in this half only.
      progress: called with the number of halves done, and of all.
      align: called before that with the layer's number, the kind, the layer, and what collects the moments of what its
        inner matrices read; the layer that it returns has other inner matrices in this half.
    """
    angles = rotary_angles(decoder, windows.shape[1])
    dense = [_begin(decoder, jnp.asarray(batch)) for batch in batches(windows)]
    pruned, found, done = list(dense), [], 0
    for old in _layers(decoder):
        found.append(old)
        for kind in PROJECTIONS:
            settings = {"kind": kind, "config": decoder.config, "angles": angles}
            if align is not None:
                read = partial(_collect_inputs, old, list(dense), list(pruned), settings)
                found[-1] = align(len(found) - 1, kind, found[-1], read)
                del read
            goals = _advance_all(old, dense, settings)
            moments = cache(partial(_collect, found[-1], pruned, goals, settings))
            found[-1] = replace(Site(len(found) - 1, kind, found[-1], windows.size, moments))
            del goals, moments  # streams and moments of this half, which would live on through the next
            _advance_all(found[-1], pruned, settings)
            done += 1
            if progress is not None:
                progress(done, len(PROJECTIONS) * layer_count(decoder))
    return found


def _advance_all(run: Block, states: list[State], settings: dict[str, Any]) -> Sequence[Float[Array, "_ T D"]]:
    """One half further, in place, batch by batch; what it adds to and what it adds, summed."""
    totals = []
    for index, state in enumerate(states):
        states[index], total = _advance(run, state, **settings)
        totals.append(states[index].stream if total is None else total)
    return totals


def _layers(decoder: Decoder) -> Iterator[Block]:
    """Every layer, a run of one each."""
    for run in decoder.runs:
        for index in range(depth(run)):
            yield _layer(run, jnp.asarray(index, jnp.int32))


# The index is no constant of the programs below: one compilation for all layers of a shape.
@jax.jit
def _layer(run: Block, index: Int[Array, ""]) -> Block:
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, index, 1), run)


@jax.jit
def _begin(decoder: Decoder, tokens: Int[Array, "B T"]) -> State:
    return State(embed(decoder, tokens).astype(jnp.float32))


def _half(kind: str, run: Block, config: DecoderConfig, state: State, angles: Angles) -> Sublayer:
    block = jax.tree.map(lambda array: array[0], run)
    if kind == "head":
        return attention_sublayer(block, config, state.stream, angles)
    return mlp_sublayer(block, config, state.stream if state.before is None else state.before, state.stream)


@partial(jax.jit, static_argnames=("kind", "config"))
def _advance(
    run: Block, state: State, *, kind: str, config: DecoderConfig, angles: Angles
) -> tuple[State, Float[Array, "B T D"] | None]:
    """One half further; also the sum before a norm that stands after it, in models that have one there."""
    made = _half(kind, run, config, state, angles)
    before = state.stream if config.parallel and kind == "head" else None
    return State(made.stream, before), made.total if config.norm_after else None


def _collect(
    run: Block, states: Sequence[State], goals: Sequence[Float[Array, "_ T D"]], settings: dict[str, Any]
) -> Moments:
    """The moments of one output projection over all batches."""
    return _summed(_moments(run, state, goal, **settings) for state, goal in zip(states, goals, strict=True))


def _collect_inputs(
    run: Block, dense: Sequence[State], pruned: Sequence[State], settings: dict[str, Any]
) -> InputMoments:
    """The moments of what the inner matrices of a half read over all batches."""
    return _summed(_input_moments(run, d, p, **settings) for d, p in zip(dense, pruned, strict=True))


def _summed(parts: Iterable[Any]) -> Any:
    return reduce(lambda total, part: jax.tree.map(jnp.add, total, part), parts)


@partial(jax.jit, static_argnames=("kind", "config"))
def _input_moments(
    run: Block, dense: State, pruned: State, *, kind: str, config: DecoderConfig, angles: Angles
) -> InputMoments:
    """Of one batch; the norms before the matrices are those of the dense layer, which nobody changes."""
    name = "attention.q" if kind == "head" else "mlp.up"
    goal, x = (_half(kind, run, config, state, angles).inputs[name] for state in (dense, pruned))
    gram, cross = ops.einsum("BTD,BTE->DE", x, x), ops.einsum("BTD,BTE->DE", x, goal)
    return InputMoments(gram, jnp.sum(x, axis=(0, 1)), cross, jnp.sum(goal, axis=(0, 1)))


@partial(jax.jit, static_argnames=("kind", "config"))
def _moments(
    run: Block, state: State, goal: Float[Array, "B T D"], *, kind: str, config: DecoderConfig, angles: Angles
) -> Moments:
    made = _half(kind, run, config, state, angles)
    bias = projection(run, kind).bias
    gap = goal - made.base
    gap = gap if bias is None else gap - jnp.broadcast_to(bias[0], gap.shape)
    a = made.inputs[PROJECTIONS[kind]].reshape(*gap.shape[:2], -1)  # [B, T, I]
    gram, cross = ops.einsum("BTI,BTJ->IJ", a, a), ops.einsum("BTI,BTD->ID", a, gap)
    return Moments(gram, jnp.sum(a, axis=(0, 1)), cross, jnp.sum(gap, axis=(0, 1)))
