"""The walk through the layers: one sublayer after the other, on the dense and on the pruned residual stream.

The walk carries two copies of the calibration activations: the residual stream of the dense model, and that of the
model pruned so far. At each output projection (attention.o, mlp.down) it calls `replace(site)`, which may ask for the
Gram matrix of the projection's inputs and returns the layer to use from there on: refitted, with zeros in the rows of
removed groups, or unchanged. Structured OBS, the refit and the measured losses of a budget are functions of what the
walk shows.

All layers keep their full width during the walk, so that layers with other numbers of kept groups share one compiled
program. `finish(layer)` slices a layer when the walk has passed it.

On a mesh, every array of the walk is shared between the devices: the weights of a layer over `model`, the residual
streams over `data`. Each device sums the moments of its own windows. The devices add their sums once, after the last
batch.

    I    input features of an output projection: N * H of attention.o, F of mlp.down
    S    devices that share the windows of a batch
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import sharding
from minillm_jax.model import ops
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder, embed, rotary_angles
from minillm_jax.model.layer import Sublayer, attention_sublayer, mlp_sublayer
from minillm_jax.model.modules import Angles, Block, Linear
from minillm_jax.model.narrow import is_narrow, narrowed
from minillm_jax.model.streamed import StreamedDecoder
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

    def moved(self, move: Callable[[Any], Any]) -> "State":
        """The same in another memory: `move` takes an array there."""
        return State(move(self.stream), None if self.before is None else move(self.before))


class Moments(NamedTuple):
    """Sums over all calibration tokens of A, the input of an output projection on the pruned residual stream, float32.

    The gap is the output, without its bias, with which the projection would turn the pruned residual stream into the
    dense one: the dense residual sum after this sublayer, minus the base of the pruned residual sum, minus the bias. In
    models with a norm between the projection and the residual sum (Gemma 2, GLM 4) no output of the projection is known
    to close the gap, and `cross` and `gaps` mean nothing.

    All sums are about a reference point, the means of the first batch: where a mean is much larger than the deviation
    from it, a float32 sum of squares would lose the digits of the deviation. A system moves them to zero or to the
    means.

    Attributes:
      gram: the Gram matrix (A − a₀)ᵀ (A − a₀).
      inputs: the sum of A − a₀.
      cross: (A − a₀)ᵀ (gap − g₀).
      gaps: the sum of gap − g₀.
      center: a₀, the mean of A in the first batch.
      gap_center: g₀, the mean of the gap in the first batch.
    """

    gram: Float[Array, "I I"]
    inputs: Float[Array, " I"]
    cross: Float[Array, "I D"]
    gaps: Float[Array, " D"]
    center: Float[Array, " I"]
    gap_center: Float[Array, " D"]


class InputMoments(NamedTuple):
    """Sums over all calibration tokens of X, the input of a sublayer's matrices on the pruned residual stream, float32.

    As in `Moments`, the sums are about the means of the first batch.

    Attributes:
      gram: the Gram matrix (X − x₀)ᵀ (X − x₀).
      inputs: the sum of X − x₀.
      cross: (X − x₀)ᵀ (X' − x'₀), where X' is the input on the dense residual stream.
      targets: the sum of X' − x'₀.
      center: x₀, the mean of X in the first batch.
      target_center: x'₀, the mean of X' in the first batch.
    """

    gram: Float[Array, "D D"]
    inputs: Float[Array, " D"]
    cross: Float[Array, "D D"]
    targets: Float[Array, " D"]
    center: Float[Array, " D"]
    target_center: Float[Array, " D"]


M = TypeVar("M", Moments, InputMoments)


@dataclass(frozen=True)
class Collected(Generic[M]):
    """Moments of all calibration tokens, and of the held-out windows alone.

    Attributes:
      total: over all windows.
      held_out: over the held-out windows, about the same centers; None where no windows are held out.
    """

    total: M
    held_out: M | None


@dataclass(frozen=True)
class Site:
    """One output projection, as the walk shows it.

    Attributes:
      layer: index of its layer.
      kind: kind of the groups that it reads: `head` for attention.o, `channel` for mlp.down.
      run: its layer, a run of one layer at full width. The other sublayer may be pruned already: zeros in the rows of
        its output projection.
      tokens: number of calibration tokens.
      mesh: the devices of the walk; None for one device.
      moments: collects the moments of the projection's input, anew at every call; valid until `replace` returns. The
        walk keeps no copy, so that they leave the device with the caller's.
      held_tokens: number of tokens of the held-out windows.
      dense: the layer of the dense model.
      states: of every batch before the sublayer on the pruned stream, and after it on the dense one.
      held_batches: number of batches of the held-out windows, which stand at the end.
    """

    layer: int
    kind: str
    run: Block
    tokens: int
    mesh: Mesh | None
    moments: Callable[[], Collected[Moments]]
    held_tokens: int
    dense: Block
    states: tuple[Sequence[State], Sequence[State]]
    held_batches: int


# Refits the matrices of a sublayer that read the residual stream: layer index, kind, layer, moments -> layer.
RefitInputs = Callable[[int, str, Block, Callable[[], Collected[InputMoments]]], Block]


def projection(block: Block, kind: str) -> Linear:
    """The output projection that reads the groups of a kind."""
    return block.attention.o if kind == "head" else block.mlp.down


def walk(
    decoder: Decoder,
    batches: Batches,
    replace: Callable[[Site], Block],
    progress: Callable[[int, int], None] | None = None,
    refit_inputs: RefitInputs | None = None,
    held_out: int = 0,
    pruned_decoder: Decoder | None = None,
    finish: Callable[[int, Block, Block], None] | None = None,
    restore: Callable[[Block], Block | None] | None = None,
) -> None:
    """Shows every output projection of the model to `replace`, and every finished layer to `finish`.

    Memory at a time: two float32 residual streams of all windows (four with parallel sublayers), one layer's
    activations of one batch, and the moments of one projection.

    Args:
      decoder: the dense model. The products that its residual stream needs run in bfloat16 if its weights are bfloat16;
        everything else is float32 whatever its type is.
      batches: calibration windows.
      replace: called with each site in the order of the forward pass; returns the site's layer, changed in this
        sublayer only. A layer of another width is correct too, and compiles programs of its own.
      progress: called with the number of sublayers done, and of all.
      refit_inputs: called before `replace` with the layer index, the kind, the layer, and a function that collects the
        moments of the sublayer's inputs; returns the layer with refitted matrices in this sublayer.
      held_out: number of windows at the end whose moments are collected alone as well.
      pruned_decoder: a model pruned before, with as many layers and the same stream; the sites show its layers in the
        place of the dense ones.
      finish: called with the index of a layer, the dense layer, and the layer when both sublayers are done.
      restore: called with each dense layer before its sublayers; returns the layer at full width if an earlier walk has
        finished it, and else None. A restored layer moves the streams; neither `replace` nor `finish` is called.
    """
    angles = rotary_angles(decoder, batches.length)
    parts = batches.split(batches.count - held_out) if held_out else (batches,)

    # A model that is streamed may leave no room on the device for the streams of all windows, or for moments beside a
    # system.
    park = sharding.parked if isinstance(decoder, StreamedDecoder) else None

    def begun(model: Decoder) -> list[State]:
        outer = sharding.outer_of(model, batches.mesh)
        return [parked(begin(outer, batch.tokens, mesh=batches.mesh), park) for part in parts for batch in part]

    dense = begun(decoder)
    pruned, done = list(dense) if pruned_decoder is None else begun(pruned_decoder), 0
    held_tokens = held_out * batches.length
    for index, (dense_layer, layer) in enumerate(_pairs_of_layers(decoder, pruned_decoder, batches.mesh)):
        restored = None if restore is None else restore(dense_layer)
        for kind in PROJECTIONS:
            settings = {"kind": kind, "config": decoder.config, "mesh": batches.mesh, "angles": angles}
            collected = partial(_collected, lengths=[len(part) for part in parts], mesh=batches.mesh, park=park)
            if refit_inputs is not None and restored is None:
                pairs = partial(inputs_of_both, layer, dense_layer, **settings)
                inputs = list(zip(pruned, dense, strict=True))
                layer = refit_inputs(index, kind, layer, partial(collected, InputMoments, pairs, inputs))
                del inputs
            same = all(left is right for left, right in zip(pruned, dense, strict=True))
            dense_totals = advance_all(dense_layer, dense, settings, park, narrow=is_narrow(dense_layer))
            if restored is None:
                pairs = partial(inputs_and_gaps, layer, **settings)
                moments = partial(collected, Moments, pairs, list(zip(pruned, dense_totals, strict=True)))
                held, states = len(parts[-1]) if held_out else 0, (tuple(pruned), tuple(dense))
                site = Site(
                    index, kind, layer, batches.tokens, batches.mesh, moments, held_tokens, dense_layer, states, held
                )
                layer = replace(site)
                del moments, states, site  # they would live on through the next sublayer
            else:
                layer = restored
            del dense_totals
            if same and layer is dense_layer:  # both streams are still one
                pruned = list(dense)
            else:
                advance_all(layer, pruned, settings, park)
            done += 1
            if progress is not None:
                progress(done, len(PROJECTIONS) * layer_count(decoder))
        if finish is not None and restored is None:
            finish(index, dense_layer, layer)


def _pairs_of_layers(decoder: Decoder, pruned: Decoder | None, mesh: Mesh | None) -> Iterator[tuple[Block, Block]]:
    """Every dense layer, and the layer of the pruned model; twice the same one without a pruned model.

    None is read ahead: the systems of a layer take many times as long as its reading, and the most memory.
    """
    layers = partial(sharding.layers_of, mesh=mesh, ahead=False)
    if pruned is None:
        return ((layer, layer) for layer in layers(decoder))
    return zip(layers(decoder), layers(pruned), strict=True)


# Takes an array into the memory of the host; None to leave it on the devices.
Park = Callable[[Array], Any] | None


def parked(state: State, park: Park) -> State:
    """A state in the memory of the host, or as it is."""
    return state if park is None else state.moved(park)


def advance_all(
    run: Block, states: list[State], settings: dict[str, Any], park: Park, narrow: bool = False
) -> Sequence[Any]:
    """Moves every batch one sublayer further, in place. Returns the residual sums before a norm that follows them."""
    totals = []
    for index, state in enumerate(states):
        after, total = advance(run, _on_devices(state, settings["mesh"]), narrow=narrow, **settings)
        states[index] = parked(after, park)
        totals.append(states[index].stream if total is None else total if park is None else park(total))
    return totals


def _on_devices(values: Any, mesh: Mesh | None) -> Any:
    """States and totals of a batch on the devices again."""
    return jax.tree.map(lambda array: sharding.unparked(array, mesh), values)


@partial(jax.jit, static_argnames="mesh")
def begin(decoder: Decoder, tokens: Int[Array, "B T"], *, mesh: Mesh | None) -> State:
    """The state before the first layer."""
    return State(sharding.spread(embed(decoder, tokens).astype(jnp.float32), mesh))


def _sublayer(kind: str, run: Block, config: DecoderConfig, state: State, angles: Angles) -> Sublayer:
    block = jax.tree.map(lambda array: array[0], run)
    if kind == "head":
        return attention_sublayer(block, config, state.stream, angles)
    return mlp_sublayer(block, config, state.stream if state.before is None else state.before, state.stream)


@partial(jax.jit, static_argnames=("kind", "config", "mesh", "narrow"))
def advance(
    run: Block,
    state: State,
    *,
    kind: str,
    config: DecoderConfig,
    mesh: Mesh | None,
    angles: Angles,
    narrow: bool = False,
) -> tuple[State, Float[Array, "B T D"] | None]:
    """The state after a sublayer, and the residual sum where a norm follows it.

    `narrow` computes the products in the type of the weights, and the residual sum in float32 nevertheless.
    """
    sublayer = _sublayer(kind, narrowed(run) if narrow else run, config, state, angles)
    before = state.stream if config.parallel and kind == "head" else None
    total = sharding.spread(sublayer.total, mesh) if config.norm_after else None
    return State(sharding.spread(sublayer.stream, mesh), before), total


# ---------------------------------------------------------------------------------------------------------- moments


# The inputs of a projection, and what it is fitted to, at every token of a batch.
Pair = tuple[Float[Array, "B T I"], Float[Array, "B T J"]]


def _collected(
    fields: type[M],
    pair_of: Callable[..., Pair],
    batches: Sequence[tuple[Any, ...]],
    *,
    lengths: Sequence[int],
    mesh: Mesh | None,
    park: Park,
) -> Collected[M]:
    """Sums over all batches, and over the held-out ones, which are the last; `lengths` counts both parts."""

    def made(sums: tuple[Array, ...]) -> M:
        return fields._make(sums if park is None else map(park, sums))

    sums = sums_about_means(pair_of, batches[: lengths[0]], mesh)
    centers, fit = (sums[4], sums[5]), made(sums)
    del sums  # parked sums leave the devices before the next ones are collected
    if len(lengths) == 1:
        return Collected(fit, None)
    held_out = made(sums_about_means(pair_of, batches[lengths[0] :], mesh, centers))
    add = _added if isinstance(fit[0], jax.Array) else partial(jax.tree.map, operator.add)
    return Collected(fields._make((*add(tuple(fit[:4]), tuple(held_out[:4])), *fit[4:])), held_out)


@partial(jax.jit, donate_argnums=0)
def _added(sums: tuple[Array, ...], more: tuple[Array, ...]) -> tuple[Array, ...]:
    """Two sums, in the memory of the first."""
    return jax.tree.map(jnp.add, sums, more)


@partial(jax.jit, static_argnames=("kind", "config", "mesh"))
def inputs_of_both(
    run: Block,
    dense_run: Block,
    pruned: State,
    dense: State,
    *,
    kind: str,
    config: DecoderConfig,
    mesh: Mesh | None,
    angles: Angles,
) -> Pair:
    """The inputs of a sublayer's matrices in the pruned and the dense model, float32."""
    name = "attention.q" if kind == "head" else "mlp.up"
    layers = ((run, pruned), (dense_run, dense))
    pair = (_sublayer(kind, layer, config, state, angles).inputs[name] for layer, state in layers)
    x, target = (sharding.spread(x.astype(jnp.float32), mesh) for x in pair)
    return x, target


@partial(jax.jit, static_argnames=("kind", "config", "mesh"))
def inputs_and_gaps(
    run: Block,
    state: State,
    dense_total: Float[Array, "B T D"],
    *,
    kind: str,
    config: DecoderConfig,
    mesh: Mesh | None,
    angles: Angles,
) -> Pair:
    """The inputs of an output projection, and its gaps, float32."""
    sublayer = _sublayer(kind, run, config, state, angles)
    bias = projection(run, kind).bias
    gap = (dense_total - sublayer.base) / (config.residual_scale or 1.0)
    gap = gap if bias is None else gap - jnp.broadcast_to(bias[0], gap.shape)
    a = sublayer.inputs[PROJECTIONS[kind]].reshape(*gap.shape[:2], -1)
    return sharding.spread(a.astype(jnp.float32), mesh, sharding.MODEL), sharding.spread(gap, mesh)


def sums_about_means(
    pair_of: Callable[..., Pair],
    batches: Sequence[tuple[Any, ...]],
    mesh: Mesh | None,
    centers: tuple[Array, Array] | None = None,
) -> tuple[Array, ...]:
    """Sums about two centers, by default the means of the first batch (the six fields of `Moments`).

    Every device adds up its own windows. The devices add their sums once, at the end. Batches whose windows do not
    divide by the devices are summed on every device.
    """
    sums = {}
    for batch in batches:
        pair = pair_of(*_on_devices(batch, mesh))
        centers = centers or tuple(_mean(part) for part in pair)
        shares = sharding.shares(len(pair[0]), mesh)
        total = sums.get(shares) or no_sums(pair, shares, mesh)
        sums[shares] = add_pair(total, pair, centers, shares=shares, mesh=mesh)
    assert centers is not None, "there is at least one batch"
    parts = (_over_devices(part) for part in sums.values())
    return *reduce(lambda total, part: jax.tree.map(jnp.add, total, part), parts), *centers


@partial(jax.jit, static_argnames=("shares", "mesh"))
def no_sums(pair: Pair, shares: int, mesh: Mesh | None) -> tuple[Array, ...]:
    """The sums over no windows: the first batch is added by the same program as all others."""
    inputs, targets = (part.shape[-1] for part in pair)
    shapes = (inputs, inputs), (inputs,), (inputs, targets), (targets,)
    return _spread_sums((jnp.zeros((shares, *shape)) for shape in shapes), mesh)


def _spread_sums(sums: Iterable[Array], mesh: Mesh | None) -> tuple[Array, ...]:
    """The sums of each device on it. The rows of the matrices are shared over `model` like the features of x."""
    return tuple(sharding.spread(part, mesh, sharding.MODEL if part.ndim == 3 else None, 1) for part in sums)


@jax.jit
def _mean(x: Float[Array, "B T I"]) -> Float[Array, " I"]:
    return jnp.mean(x, axis=(0, 1))


@partial(jax.jit, static_argnames=("shares", "mesh"), donate_argnames="total")
def add_pair(
    total: tuple[Array, ...], pair: Pair, centers: tuple[Array, Array], *, shares: int, mesh: Mesh | None
) -> tuple[Array, ...]:
    """The sums over the windows of each device, [S, ...], with those of one more batch, in the memory of `total`."""
    x, target = (part - jnp.broadcast_to(mean, part.shape) for part, mean in zip(pair, centers, strict=True))
    x, target = (part.reshape(shares, -1, *part.shape[1:]) for part in (x, target))
    x = sharding.spread(x, mesh, sharding.MODEL)
    gram, cross = ops.einsum("SBTI,SBTJ->SIJ", x, x), ops.einsum("SBTI,SBTJ->SIJ", x, target)
    sums = gram, jnp.sum(x, axis=(1, 2)), cross, jnp.sum(target, axis=(1, 2))
    return jax.tree.map(jnp.add, total, _spread_sums(sums, mesh))


@jax.jit
def _over_devices(sums: tuple[Array, ...]) -> tuple[Array, ...]:
    return jax.tree.map(lambda part: jnp.sum(part, axis=0), sums)
