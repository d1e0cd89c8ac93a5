"""Pruning of whole experts: scores from forward passes, layer by layer on the pruned residual stream.

Score of expert j, over the calibration tokens that chose it (REAP, Lasby et al., arXiv 2510.13999):

    reap         mean of g_j(x) · ‖f_j(x)‖      g_j: the weight that the router gives it, f_j: its output
    frequency    number of tokens
    expert-norm  mean of ‖f_j(x)‖               (EAN)
    random       a random number

The experts of the lowest scores are removed with their columns of the router; the tokens that chose them choose among
the others. Every layer keeps equally many, because stock configurations hold one number of experts.

Channels inside experts are removed too, equally many of every expert, because stock configurations hold one width.
Channel c of expert j has the score of Wanda (Sun et al., arXiv 2306.11695) over the tokens that chose j:

    mean of (g_j(x) · a_jc(x))² · ‖row c of the down projection of j‖²      a_jc: the channel
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.work_folder import WorkFolder
from minillm_jax.errors import InputError
from minillm_jax.model import experts
from minillm_jax.model.axis_table import EXPERT_CHANNEL
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder, rotary_angles
from minillm_jax.model.layer import mlp_sublayer
from minillm_jax.model.modules import Block, experts_of, run_letters
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import group_count, layer_count
from minillm_jax.pruning import slicing, walk
from minillm_jax.pruning.expert_refit import Streams, refit_experts
from minillm_jax.pruning.finished import FinishedLayers
from minillm_jax.pruning.refit import held_out_windows
from minillm_jax.pruning.walk import State
from minillm_jax.settings import Refit


class Routed(NamedTuple):
    """Sums for every expert over the tokens that chose it, float32.

    Attributes:
      tokens: their number.
      norms: of ‖f(x)‖.
      weighted: of g(x) · ‖f(x)‖.
    """

    tokens: Float[Array, " X"]
    norms: Float[Array, " X"]
    weighted: Float[Array, " X"]


@dataclass(frozen=True)
class Choice:
    """How experts are chosen.

    Attributes:
      keep: number of kept experts of every layer that has experts.
      width: number of kept channels of every expert.
      criterion: of `EXPERT_CRITERIA`.
      seed: of random scores.
    """

    keep: int
    width: int
    criterion: str = "reap"
    seed: int = 0


def prune_experts(
    decoder: Decoder,
    choice: Choice,
    batches: Batches,
    refit: Refit,
    progress: Callable[[int, int], None] | None = None,
    work: WorkFolder | None = None,
) -> tuple[Decoder, dict[str, list[Int[np.ndarray, " kept"]]]]:
    """A decoder with fewer experts, or narrower ones; and the kept groups of every layer, none of a dense layer.

    The kept groups are of the kinds `expert` and `expert_channel`; the latter count the channels of the kept experts.

    Args:
      decoder: the model; float32 residual streams whatever its type is.
      choice: how many experts are kept, and which.
      batches: calibration windows.
      refit: from `refit.resolve`; `least-squares` refits the down projections of the kept experts (`expert_refit`).
      progress: called with the number of layers done, and of all.
      work: the folder of the finished layers, from which an interrupted run continues.

    Raises:
      InputError: an activation is not finite, or the work folder cannot be used.
    """
    finished, angles = FinishedLayers(decoder, work), rotary_angles(decoder, batches.length)
    mesh, refits = batches.mesh, refit.method == "least-squares"
    park = sharding.parked if isinstance(decoder, StreamedDecoder) else None

    def advance(layer: Block, states: list[State], *kinds: str) -> None:
        for kind in kinds:
            settings = {"kind": kind, "config": decoder.config, "mesh": mesh, "angles": angles}
            walk.advance_all(layer, states, settings, park)

    held = held_out_windows(refit, batches)
    parts, outer = list(batches.split(batches.count - held) if held else (batches,)), sharding.outer_of(decoder, mesh)
    pruned = [walk.parked(walk.begin(outer, batch.tokens, mesh=mesh), park) for part in parts for batch in part]
    dense = list(pruned) if refits else []
    streams = Streams(pruned, dense, len(parts[1]) if held else 0, mesh)
    for index, layer in enumerate(sharding.layers_of(decoder, mesh)):
        advance(layer, pruned, "head")
        if refits:
            advance(layer, dense, "head", "channel")
        whole = finished.restore(layer)
        if whole is None:
            chosen, whole = _of_layer(index, layer, streams, choice, refit, decoder.config)
            finished.add(layer, whole, chosen)
        kept = {kind: rows[-1] for kind, rows in finished.kept.items()}
        advance(slicing.take_layer(kept, whole, mesh), pruned, "channel")
        if progress is not None:
            progress(index + 1, layer_count(decoder))
    return finished.pruned(), finished.kept


def _of_layer(
    index: int, layer: Block, streams: Streams, choice: Choice, refit: Refit, config: DecoderConfig
) -> tuple[dict[str, Int[np.ndarray, " kept"]], Block]:
    """The kept groups of a layer, and the layer with all experts and channels, of which the kept ones are refitted."""
    letters, routing = run_letters(layer), config.routing
    kept = {"expert": np.arange(letters["X"]), EXPERT_CHANNEL: np.arange(letters["X"] * letters["W"])}
    if not letters["X"] or routing is None:
        return kept, layer
    if choice.keep < letters["X"]:
        scores = expert_scores(index, layer, streams, choice, config)
        kept["expert"] = hosts.of_first(lambda: {"kept": best(scores, choice.keep, routing.groups)})["kept"]
    kept[EXPERT_CHANNEL] = np.arange(len(kept["expert"]) * letters["W"])
    if choice.width < letters["W"]:
        values = channel_scores(index, slicing.take_layer(kept, layer, streams.mesh), streams, config)
        kept[EXPERT_CHANNEL] = hosts.of_first(lambda: {"kept": widest(values, choice.width)})["kept"]
    if refit.method != "least-squares":
        return kept, layer
    return kept, refit_experts(index, layer, kept, streams, refit, config)


def expert_scores(
    index: int, layer: Block, streams: Streams, choice: Choice, config: DecoderConfig
) -> Float[np.ndarray, " X"]:
    """The scores of the experts of a layer, float64.

    Raises:
      InputError: an activation is not finite.
    """
    if choice.criterion == "random":
        return np.random.default_rng([choice.seed, index]).random(group_count(layer, "expert"))
    sums = jax.tree.map(lambda *parts: sum(parts), *(routed(layer, state, config=config) for state, _ in streams))
    tokens, norms, weighted = (np.asarray(sharding.gather(one), np.float64) for one in sums)
    if not np.isfinite(tokens + norms + weighted).all():
        raise InputError(f"an activation of the experts of layer {index} is not finite")
    means = {"reap": weighted, "expert-norm": norms}
    return tokens if choice.criterion == "frequency" else means[choice.criterion] / np.maximum(tokens, 1.0)


def channel_scores(index: int, layer: Block, streams: Streams, config: DecoderConfig) -> Float[np.ndarray, "X W"]:
    """The scores of the channels of the experts of a layer, float64.

    Raises:
      InputError: an activation is not finite.
    """
    sums = [energies(layer, state, config=config) for state, _ in streams]
    total = np.asarray(sharding.gather(sum(sums[1:], sums[0])), np.float64)
    down = np.asarray(sharding.gather(experts_of(layer).down[...])[0], np.float64)
    if not np.isfinite(total).all():
        raise InputError(f"an activation of the experts of layer {index} is not finite")
    return total * np.sum(np.square(down), axis=-1)


@partial(jax.jit, static_argnames="config")
def energies(run: Block, state: State, *, config: DecoderConfig) -> Float[Array, "X W"]:
    """The sums over the tokens of a batch of (g · a)², for every channel of every expert; the arguments of `routed`."""
    block = jax.tree.map(lambda array: array[0], run)
    mixture, routing = experts_of(block), config.routing
    assert routing is not None, "the layer has experts"
    tokens = mlp_input(block, config, state)
    weights, chosen = experts.route(mixture, routing, tokens)

    def of_expert(number: Int[Array, ""]) -> Float[Array, " W"]:
        a = experts.weighted_channels(mixture, routing, config.activation, tokens, (weights, chosen), number)
        return jnp.sum(jnp.square(a), axis=0)

    return jax.lax.map(of_expert, jnp.arange(mixture.down.shape[0]))


@partial(jax.jit, static_argnames="config")
def routed(run: Block, state: State, *, config: DecoderConfig) -> Routed:
    """The sums of one batch.

    Args:
      run: a run of one layer.
      state: before its MLP.
      config: how the decoder computes.
    """
    block = jax.tree.map(lambda array: array[0], run)
    mixture, routing = experts_of(block), config.routing
    assert routing is not None, "the layer has experts"
    tokens = mlp_input(block, config, state)
    weights, chosen = experts.route(mixture, routing, tokens)
    outputs = experts.of_chosen(mixture, routing, config.activation, tokens, chosen)
    norms = jnp.linalg.norm(outputs.astype(jnp.float32), axis=-1)

    def by_expert(values: Float[Array, "M C"]) -> Float[Array, " X"]:
        zeros = jnp.zeros(mixture.down.shape[0], jnp.float32)
        return zeros.at[chosen.reshape(-1)].add(values.reshape(-1))

    return Routed(by_expert(jnp.ones_like(norms)), by_expert(norms), by_expert(weights * norms))


def mlp_input(block: Block, config: DecoderConfig, state: State) -> Float[Array, "M D"]:
    """The input of the router and of the experts of a layer, of all tokens of a batch."""
    before = state.stream if state.before is None else state.before
    inputs = mlp_sublayer(block, config, before, state.stream).inputs["mlp.up"]
    return inputs.reshape(-1, inputs.shape[-1])


def widest(scores: Float[np.ndarray, "X W"], keep: int) -> Int[np.ndarray, " kept"]:
    """The channels of the highest scores, equally many of every expert, counted over all experts."""
    first = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :keep], axis=1)
    return (first + scores.shape[1] * np.arange(len(scores))[:, None]).ravel()


def best(scores: Float[np.ndarray, " X"], keep: int, groups: int = 1) -> Int[np.ndarray, " kept"]:
    """The indices of the highest scores, equally many of each group of consecutive experts; of equal ones the first."""
    by_group = scores.reshape(groups, -1)
    first = np.argsort(-by_group, axis=1, kind="stable")[:, : keep // groups]
    return np.sort((first + by_group.shape[1] * np.arange(groups)[:, None]).ravel())
