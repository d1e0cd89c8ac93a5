"""Refit of the down projections of the kept experts, on the tokens that reach them after the router lost choices.

The target of the sum of the kept experts is, for every token,

    Y = (1 − α) · (sum of the dense experts) + α · gap

`gap` is the sum that would bring the pruned residual stream back to the dense one, as for `refit`. One sweep computes
the error E of the present experts, and for every expert the step of a ridge regression to the whole of it:

    D_j = (G_j + λ_j I)⁻¹ A_jᵀ E        A_j = g_j · (channels of expert j), G_j = A_jᵀ A_j        W_j ← W_j + D_j / k

A token has k experts, so the average of k steps that each lower the squared error alone lowers it together: the square
is convex, and the error of a token after the sweep is the mean of k errors with one step each.

λ_j is chosen by held-out windows for every expert, or no step at all: an expert that few tokens reach stays as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.sharding import run_shardings
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table, experts, ops
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.layer import mlp_sublayer
from minillm_jax.model.modules import Block, experts_of
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning import slicing
from minillm_jax.pruning.finished import KeptOfLayer
from minillm_jax.pruning.system import CHOICES
from minillm_jax.pruning.walk import State
from minillm_jax.settings import Refit

# Measured on a model of eight experts: the third sweep lowers the error by a tenth of what the first does.
SWEEPS = 3


@dataclass(frozen=True)
class Streams:
    """The activations of all batches at the MLP of a layer.

    Attributes:
      pruned: the states of the pruned stream before the MLP, of every batch.
      dense: the states of the dense stream after the MLP; none without a refit.
      held_out: number of batches at the end that choose ridges.
      mesh: the devices.
    """

    pruned: list[State]
    dense: list[State]
    held_out: int
    mesh: Mesh | None

    def __iter__(self) -> Iterator[tuple[State, Float[Array, "B T D"] | None]]:
        """The state before the MLP and the dense stream after it, of one batch after the other, on the devices."""
        for number, state in enumerate(self.pruned):
            after = sharding.unparked(self.dense[number].stream, self.mesh) if self.dense else None
            yield jax.tree.map(lambda array: sharding.unparked(array, self.mesh), state), after


class ExpertMoments(NamedTuple):
    """Sums over tokens for every expert, float32.

    Attributes:
      gram: G = Aᵀ A.
      cross: Aᵀ E.
    """

    gram: Float[Array, "X W W"]
    cross: Float[Array, "X W D"]


class HostMoments(NamedTuple):
    """`ExpertMoments` in host memory."""

    gram: Float[np.ndarray, "X W W"]
    cross: Float[np.ndarray, "X W D"]


def refit_experts(
    index: int, layer: Block, kept: KeptOfLayer, streams: Streams, refit: Refit, config: DecoderConfig
) -> Block:
    """The layer with all experts and channels, of which the kept ones have refitted down projections.

    Args:
      index: of the layer.
      layer: a run of one layer.
      kept: kind of group -> the kept ones.
      streams: the activations of all batches.
      refit: from `refit.resolve`.
      config: how the decoder computes.

    Raises:
      InputError: an activation is not finite.
    """
    smaller = refit_towards(index, layer, slicing.take_layer(kept, layer, streams.mesh), streams, refit, config)
    return slicing.put_layer(kept, {path: sharding.gather(array) for path, array in named_arrays(smaller)}, layer)


def refit_towards(
    index: int, layer: Block, smaller: Block, streams: Streams, refit: Refit, config: DecoderConfig
) -> Block:
    """A layer whose experts have refitted down projections.

    Args:
      index: of the layer.
      layer: the dense layer, a run of one layer.
      smaller: the layer with fewer or narrower experts.
      streams: the activations of all batches.
      refit: from `refit.resolve`.
      config: how the decoder computes.

    Raises:
      InputError: an activation is not finite.
    """
    assert config.routing is not None, "the layer has experts"
    for _ in range(SWEEPS):
        fit, held_out = _moments(layer, smaller, streams, refit.alpha or 0.0, config)
        steps = hosts.of_first(lambda fit=fit, rest=held_out: {"steps": _steps(index, fit, rest, refit.ridge)})["steps"]
        smaller = _with_down(smaller, steps / config.routing.chosen, streams.mesh)
    return smaller


def _moments(
    layer: Block, smaller: Block, streams: Streams, alpha: float, config: DecoderConfig
) -> tuple["HostMoments", "HostMoments | None"]:
    """The sums over all batches but the held-out ones, and over those, on the host."""
    sums: list[ExpertMoments | None] = [None, None]
    for number, (state, dense) in enumerate(streams):
        assert dense is not None, "a refit carries the dense stream"
        moments = expert_moments(layer, smaller, state, dense, alpha=alpha, config=config)
        part = int(number >= len(streams.pruned) - streams.held_out)
        before = sums[part]
        sums[part] = moments if before is None else jax.tree.map(jnp.add, before, moments)
    fit, held_out = (None if one is None else HostMoments(*map(sharding.gather, one)) for one in sums)
    assert fit is not None, "not all windows are held out"
    return fit, held_out


@partial(jax.jit, static_argnames=("alpha", "config"))
def expert_moments(
    dense_layer: Block,
    layer: Block,
    state: State,
    dense: Float[Array, "B T D"],
    *,
    alpha: float,
    config: DecoderConfig,
) -> ExpertMoments:
    """The sums of one batch.

    Args:
      dense_layer: a run of one layer with all experts.
      layer: the same with the kept experts.
      state: of the pruned stream before the MLP.
      dense: the dense stream after the layer.
      alpha: α of the target.
      config: how the decoder computes.
    """
    blocks = [jax.tree.map(lambda array: array[0], run) for run in (dense_layer, layer)]
    before = state.stream if state.before is None else state.before
    whole, smaller = (mlp_sublayer(block, config, before, state.stream) for block in blocks)
    local, gap = whole.stream - smaller.stream, dense - smaller.stream
    error = ((1 - alpha) * local + alpha * gap).reshape(-1, local.shape[-1]).astype(jnp.float32)
    routing, mixture = config.routing, experts_of(blocks[1])
    assert routing is not None, "the layer has experts"
    tokens = smaller.inputs["mlp.up"].reshape(error.shape)
    choice = experts.route(mixture, routing, tokens)

    def of_expert(number: Int[Array, ""]) -> tuple[Array, Array]:
        a = experts.weighted_channels(mixture, routing, config.activation, tokens, choice, number)
        return ops.einsum("MW,MJ->WJ", a, a), ops.einsum("MW,MD->WD", a, error)

    return ExpertMoments(*jax.lax.map(of_expert, jnp.arange(mixture.down.shape[0])))


def _steps(
    index: int, fit: "HostMoments", held_out: "HostMoments | None", ridge: float | None
) -> Float[np.ndarray, "X W D"]:
    """The step of every expert, zero for one that held-out windows do not improve."""
    if not all(np.isfinite(one).all() for one in fit):
        raise InputError(f"an activation of the experts of layer {index} is not finite")
    steps = np.zeros(fit.cross.shape)
    for expert, (gram, cross) in enumerate(zip(*(one.astype(np.float64) for one in fit), strict=True)):
        if not np.trace(gram) > 0:
            continue
        if held_out is None:
            steps[expert] = _step(gram, cross, ridge or 0.0)
            continue
        of_held = held_out.gram[expert].astype(np.float64), held_out.cross[expert].astype(np.float64)
        tried = {share: _step(gram, cross, share) for share in CHOICES}
        gains = {share: _gain(step, *of_held) for share, step in tried.items()}
        share = max(gains, key=gains.__getitem__)
        if gains[share] > 0:
            steps[expert] = _step(gram + of_held[0], cross + of_held[1], share)
    return steps


def _step(gram: Float[np.ndarray, "W W"], cross: Float[np.ndarray, "W D"], share: float) -> Float[np.ndarray, "W D"]:
    """The solution of the ridge regression, with a ridge as a share of the mean diagonal."""
    return np.linalg.solve(gram + share * np.trace(gram) / len(gram) * np.eye(len(gram)), cross)


def _gain(step: Float[np.ndarray, "W D"], gram: Float[np.ndarray, "W W"], cross: Float[np.ndarray, "W D"]) -> float:
    """How much a step alone lowers the squared error of the tokens of these moments."""
    return float(2 * np.vdot(step, cross) - np.vdot(step, gram @ step))


def _with_down(layer: Block, steps: Float[np.ndarray, "X W D"], mesh: Mesh | None) -> Block:
    """The layer with the steps added to the down projections of its experts."""
    before = sharding.gather(experts_of(layer).down[...])
    down = (before.astype(np.float64) + steps[None]).astype(before.dtype)
    places = {} if mesh is None else dict(named_arrays(run_shardings(layer, mesh)))

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = axis_table.array_path(path)
        return sharding.place(down, places.get(name)) if name == "experts.down" else array

    return jax.tree_util.tree_map_with_path(leaf, layer)
