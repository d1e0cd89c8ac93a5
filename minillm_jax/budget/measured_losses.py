"""Measured losses: what the model loses with one kind of groups of one layer pruned, at each level, by forward passes.

All other sublayers stay dense. A measurement begins at the residual stream before the pruned layer, which the dense
model left there, and goes through the layers from there on. It needs no smaller model: zeros in the rows of the output
projection remove the groups just as slicing does, and the other rows are refitted as in pruning. All measurements
therefore share one compiled program for each shape of a layer.

Two numbers are measured: the change of the cross entropy, and the divergence KL(dense ‖ pruned) of the next-token
probabilities. The cross entropy of a text can fall by chance where a model changes. The divergence cannot, and it
takes fewer tokens to tell two levels apart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts, sharding
from minillm_jax.evaluation.perplexity import check_dense_loss
from minillm_jax.model.decoder import Decoder, finish, layers_from, rotary_angles
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import Top, token_divergences, token_losses, top_tokens
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_count, layer_count, part_count
from minillm_jax.pruning.refit import (
    gathered,
    held_out_windows,
    pruned_kind,
    refitted,
    removal_order,
    resolve,
    system_at,
    with_projection,
)
from minillm_jax.pruning.system import Solver
from minillm_jax.pruning.walk import PROJECTIONS, Site, begin, walk
from minillm_jax.settings import Refit

# Kind of group, layer index, number of kept groups -> indices of the kept groups, ascending.
Choose = Callable[[str, int, int], Int[np.ndarray, " kept"]]


class Measured(NamedTuple):
    """What the levels of all sublayers cost: kind -> for each layer, one number for each level.

    Attributes:
      losses: the change of the mean cross entropy, nats; infinite where that of the pruned model is not finite.
      divergences: the mean divergence from the dense model, nats; infinite where it is not finite.
      errors: with groups chosen by structured OBS, the sums of the errors of its removals, by the number of removed
        groups, from none to as many as were asked for. None with other choices.
    """

    losses: dict[str, list[list[float]]]
    divergences: dict[str, list[list[float]]]
    errors: dict[str, list[Float[np.ndarray, " _"]]] | None


def level_losses(
    decoder: Decoder,
    batches: Batches,
    levels: Mapping[str, Sequence[Sequence[int]]],
    choose: Choose | None,
    refit: Refit,
    progress: Callable[[int, int], None] | None = None,
    fewest: Mapping[str, Sequence[int]] | None = None,
    measured: Batches | None = None,
) -> Measured:
    """The cross entropy and the divergence at every level.

    Takes one walk through the layers, and for each level but the first one forward pass over the measured windows, from
    the pruned layer on.

    Args:
      decoder: the dense model.
      batches: calibration windows, to which the kept rows are refitted.
      levels: kind -> for each layer, numbers of kept groups, descending; the first is that of the dense model.
      choose: the kept groups of a kind and layer; None for groups chosen by structured OBS.
      refit: the refit of the kept rows.
      progress: called with the number of levels measured, and of all.
      fewest: kind -> for each layer, the number of kept groups that the errors reach; the last level by default.
      measured: windows on which losses are measured; the calibration windows by default.

    Raises:
      InputError: see `slice_and_refit`; or the loss of the dense model is not finite.
    """
    settings = resolve(refit, decoder.config)
    solver, streams = Solver(settings.solver), Streams(decoder, measured or batches)
    total = sum(len(counts) - 1 for rows in levels.values() for counts in rows)
    found, errors, done = {kind: [] for kind in levels}, {kind: [] for kind in levels}, 0

    def measure(site: Site) -> Block:
        nonlocal done
        kind = pruned_kind(site.kind, levels)
        if kind is not None:
            counts, changes, of_site = levels[kind][site.layer], [(0.0, 0.0)], np.zeros(1)
            least = min(counts) if fewest is None else fewest[kind][site.layer]
            for kernel, shift, now in projections(site, kind, counts[1:], least, choose, settings, solver):
                run = with_projection(site.run, PROJECTIONS[site.kind], kernel, shift, site.mesh)
                changes.append(streams.after(site.layer, run))
                of_site, done = now, done + 1
                if progress is not None:
                    progress(done, total)
            found[kind].append(changes)
            errors[kind].append(of_site)
        if site.kind == list(PROJECTIONS)[-1]:
            streams.advance(site.run)
        return site.run

    walk(decoder, batches, measure, held_out=held_out_windows(settings, batches))
    assert all(len(rows) == layer_count(decoder) for rows in found.values())
    losses, divergences = (
        {kind: [[pair[place] for pair in row] for row in rows] for kind, rows in found.items()} for place in range(2)
    )
    return Measured(losses, divergences, errors if choose is None else None)


class Streams:
    """The residual streams of the dense model before a layer, and what a changed layer there costs the model.

    Memory: one float32 residual stream of the windows, and the top tokens of the dense model at each position.
    """

    def __init__(self, decoder: Decoder, batches: Batches) -> None:
        """Takes one forward pass over the windows.

        Args:
          decoder: the dense model.
          batches: the windows.

        Raises:
          InputError: the loss of the dense model is not finite.
        """
        self.decoder, self.batches = decoder, batches
        self.streams = [begin(decoder, batch.tokens, mesh=batches.mesh).stream for batch in batches]
        found = [_dense(decoder, x, batch.tokens) for x, batch in zip(self.streams, batches, strict=True)]
        self.top = [top for top, _ in found]
        self.dense = float(sum(sharding.gather(losses).sum(dtype=np.float64) for _, losses in found))
        check_dense_loss(self.dense, "no loss can be compared with it")

    def after(self, layer: int, run: Block) -> tuple[float, float]:
        """The change of the mean cross entropy, and the mean divergence, with another layer in the place of one.

        Args:
          layer: index of the layer before which the streams are.
          run: the layer, a run of one layer.
        """
        mesh, index = self.batches.mesh, jnp.int32(layer)
        rows = [
            sharding.gather(_after(self.decoder, run, index, x, batch.tokens, top, mesh=mesh))
            for x, batch, top in zip(self.streams, self.batches, self.top, strict=True)
        ]
        loss, divergence = np.concatenate(rows, axis=-1).sum(axis=-1, dtype=np.float64)
        changes = (float(total) / self.batches.predictions for total in (loss - self.dense, divergence))
        change, divergence = (one if np.isfinite(one) else np.inf for one in changes)
        return change, divergence

    def advance(self, run: Block) -> None:
        """Moves the streams past a layer, a run of one layer."""
        mesh = self.batches.mesh
        self.streams = [_advance(self.decoder, run, x, mesh=mesh) for x in self.streams]


def projections(
    site: Site, kind: str, counts: Sequence[int], fewest: int, choose: Choose | None, settings: Refit, solver: Solver
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each count, the refitted kernel at full width, with rows of zeros, and the change of the bias.

    With groups chosen by structured OBS, also the sums of the errors of its removals.

    Args:
      site: an output projection, as the walk shows it.
      kind: kind of the groups: that of the site, or `query`.
      counts: numbers of kept groups.
      fewest: number of kept groups that the order of structured OBS reaches, at most the least of `counts`.
      choose: the kept groups of a kind and layer; None for groups chosen by structured OBS.
      settings: from `resolve`.
      solver: solves the systems.

    Raises:
      InputError: the activations are not finite, or a system has no solution.
    """
    if not counts:
        return
    values, count, parts = gathered(site), group_count(site.run, kind), part_count(site.run, kind)
    system, order = None, None

    def at_full_width(keep: int) -> dict[str, np.ndarray]:
        nonlocal system, order
        system = system or system_at(site, settings, values)
        if choose is None and order is None:
            order = solver.run(system, lambda s, name: removal_order(s, count, fewest, parts, name))
        if choose is not None:
            kept = choose(kind, site.layer, keep)
        else:
            assert order is not None
            kept = np.delete(np.arange(count), order.groups[: count - keep])
        kernel, shift = np.zeros_like(system.kernel), np.zeros(system.kernel.shape[1])
        rows = np.arange(len(kernel)).reshape(count, -1)[kept].ravel()
        found = {"kernel": system.kernel[rows], "shift": shift} | refitted(system, kept, count, settings, solver)
        kernel[rows] = found["kernel"]
        errors = np.zeros(1) if order is None else np.cumsum([0.0, *order.errors])
        return {"kernel": kernel, "shift": found["shift"], "errors": errors}

    for keep in counts:
        found = hosts.of_first(partial(at_full_width, keep))
        yield found["kernel"], found["shift"], found["errors"]


@jax.jit
def _dense(decoder: Decoder, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> tuple[Top, Float[Array, " B"]]:
    """The top tokens of the dense model, and the summed cross entropy of every sequence, from its first stream."""
    hidden = finish(decoder, layers_from(decoder, x, jnp.int32(0), x.shape[1]))
    return top_tokens(decoder, hidden), jnp.sum(token_losses(decoder, hidden, tokens), axis=-1)


@partial(jax.jit, static_argnames="mesh")
def _advance(decoder: Decoder, run: Block, x: Float[Array, "B T D"], *, mesh: Mesh | None) -> Float[Array, "B T D"]:
    """The residual stream after a layer."""
    block, angles = jax.tree.map(lambda array: array[0], run), rotary_angles(decoder, x.shape[1])
    return sharding.spread(apply_layer(block, decoder.config, x, angles)[0], mesh)


@partial(jax.jit, static_argnames="mesh")
def _after(
    decoder: Decoder,
    run: Block,
    layer: Int[Array, ""],
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    dense: Top,
    *,
    mesh: Mesh | None,
) -> Float[Array, "2 B"]:
    """Summed cross entropy and divergence of every sequence, with `run` in the place of one layer."""
    x = layers_from(decoder, _advance(decoder, run, x, mesh=mesh), layer + 1, x.shape[1])
    sums = (jnp.sum(part, axis=-1) for part in token_divergences(decoder, finish(decoder, x), tokens, dense))
    return jnp.stack(list(sums))
