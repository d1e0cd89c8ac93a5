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
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.work_folder import Part, WorkFolder, computed_once
from minillm_jax.evaluation.layerwise import Stream, advance
from minillm_jax.evaluation.perplexity import check_dense_loss
from minillm_jax.model.decoder import Decoder, finish
from minillm_jax.model.loss import Top, token_divergences, token_losses, top_tokens
from minillm_jax.model.modules import Block
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import group_count, layer_count
from minillm_jax.pruning.refit import fit_at, held_out_windows, pruned_kind, resolve, with_projection
from minillm_jax.pruning.solver import Matrix, Solver
from minillm_jax.pruning.walk import PROJECTIONS, Site, begin, walk
from minillm_jax.settings import Refit

# Kind of group, layer index, number of kept groups -> indices of the kept groups, ascending.
Choose = Callable[[str, int, int], Int[np.ndarray, " kept"]]

# The residual stream of a trial on its devices, or in the memory of the host.
Parked = Stream | Float[np.ndarray, "B T D"]


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
    work: WorkFolder | None = None,
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
      work: the folder of the measured sublayers, from which an interrupted measurement continues.

    Raises:
      InputError: see `slice_and_refit`; or the loss of the dense model is not finite.
    """
    settings = resolve(refit, decoder.config)
    solver, trials = Solver(settings.solver), trials_of(decoder, measured or batches)
    total = sum(len(counts) - 1 for rows in levels.values() for counts in rows)
    found, errors, done = {kind: [] for kind in levels}, {kind: [] for kind in levels}, 0

    def measure_site(site: Site, kind: str) -> Part:
        """The losses of the levels of a sublayer, and the errors of structured OBS."""
        counts, started, of_site = levels[kind][site.layer], [], np.zeros(1)
        least = min(counts) if fewest is None else fewest[kind][site.layer]
        for kernel, shift, now in projections(site, kind, counts[1:], least, choose, settings, solver):
            run = with_projection(site.run, PROJECTIONS[site.kind], kernel, shift, site.mesh)
            started.append(trials.start(site.layer, run))
            of_site = now
            if progress is not None:
                progress(done + len(started), total)
        arrays, note = trials.to_part(started)
        return Part(arrays | {"errors": of_site}, note)

    def measure(site: Site) -> Block:
        nonlocal done
        kind = pruned_kind(site.kind, levels)
        if kind is not None:
            part = computed_once(work, f"{trials.NAME}-{kind}-{site.layer:05}", lambda: measure_site(site, kind))
            found[kind].append(trials.from_part(part))
            errors[kind].append(part.arrays["errors"])
            done += len(found[kind][-1])
        if site.kind == list(PROJECTIONS)[-1]:
            trials.advance(site.run)
        return site.run

    walk(decoder, batches, measure, held_out=held_out_windows(settings, batches))
    assert all(len(rows) == layer_count(decoder) for rows in found.values())
    changes = {kind: [[(0.0, 0.0), *map(trials.changes, row)] for row in rows] for kind, rows in found.items()}
    losses, divergences = (
        {kind: [[pair[place] for pair in row] for row in rows] for kind, rows in changes.items()} for place in range(2)
    )
    return Measured(losses, divergences, errors if choose is None else None)


# The change of the mean cross entropy, and the mean divergence, nats.
Changes = tuple[float, float]


class Trials:
    """What a changed layer costs the model: forward passes from the residual stream of the dense model on.

    A trial of a model in memory ends when it starts. Memory: one float32 residual stream of the windows, and the top
    tokens of the dense model at each position.
    """

    NAME = "losses"  # of the parts in a work folder

    def __init__(self, decoder: Decoder, batches: Batches) -> None:
        """Takes one forward pass over the windows.

        Args:
          decoder: the dense model.
          batches: the windows.

        Raises:
          InputError: the loss of the dense model is not finite.
        """
        self.decoder, self.batches, self.outer = decoder, batches, sharding.outer_of(decoder, batches.mesh)
        self.streams = [begin(self.outer, batch.tokens, mesh=batches.mesh).stream for batch in batches]
        self._measure_dense(self._through(0, self.streams))

    def start(self, layer: int, run: Block) -> Any:
        """A trial of another layer in the place of one.

        Args:
          layer: index of the layer before which the streams are.
          run: the layer, a run of one layer.
        """
        return self._changes(self._through(layer + 1, self._advanced(run, self.streams)))

    def changes(self, trial: Any) -> Changes:
        """The result of a trial, when all layers are done."""
        change, divergence = trial
        return change, divergence

    def to_part(self, trials: list[Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Trials as the work folder holds them."""
        return {}, {"trials": trials}

    def from_part(self, part: Part) -> list[Any]:
        """Trials from the work folder."""
        return part.note["trials"]

    def advance(self, run: Block) -> None:
        """Moves the streams past a layer, a run of one layer."""
        self.streams = self._advanced(run, self.streams)

    def _advanced(self, run: Block, streams: list[Stream]) -> list[Stream]:
        return [advance(self.outer, run, x, mesh=self.batches.mesh) for x in streams]

    def _through(self, first: int, streams: list[Stream]) -> list[Stream]:
        """The residual streams after the last layer, from those before layer `first`."""
        for layer in sharding.layers_of(self.decoder, self.batches.mesh, first):
            streams = self._advanced(layer, streams)
        return streams

    def _measure_dense(self, last: list[Stream]) -> None:
        """The top tokens and the loss of the dense model, from its last streams."""
        found = [_dense(self.outer, x, batch.tokens) for x, batch in zip(last, self.batches, strict=True)]
        self.top = [top for top, _ in found]
        self.dense = float(sum(sharding.gather(losses).sum(dtype=np.float64) for _, losses in found))
        check_dense_loss(self.dense, "no loss can be compared with it")

    def _changes(self, last: list[Stream]) -> Changes:
        """The result of a trial from its last streams."""
        rows = [
            sharding.gather(_both(self.outer, x, batch.tokens, top))
            for x, batch, top in zip(last, self.batches, self.top, strict=True)
        ]
        loss, divergence = np.concatenate(rows, axis=-1).sum(axis=-1, dtype=np.float64)
        changes = (float(total) / self.batches.predictions for total in (loss - self.dense, divergence))
        change, divergence = (one if np.isfinite(one) else np.inf for one in changes)
        return change, divergence


class StreamedTrials(Trials):
    """The same for a model whose layers are read one at a time: all trials pass a layer before the next one is read.

    The programs are those of `Trials`, so that the results are the same to the bit. A trial is the number of its
    residual streams, which lie in the memory of the host while the devices work on others.
    """

    NAME = "streams"

    def __init__(self, decoder: Decoder, batches: Batches) -> None:
        self.decoder, self.batches, self.outer = decoder, batches, sharding.outer_of(decoder, batches.mesh)
        self.streams = [begin(self.outer, batch.tokens, mesh=batches.mesh).stream for batch in batches]
        self.trials: list[list[Parked]] = []
        self.before = 0  # the trials of earlier layers; those of the present one are past it
        self.top = []

    def start(self, layer: int, run: Block) -> list[Parked]:
        """The streams of the trial after the layer."""
        return self._parked(self._advanced(run, self.streams))

    def changes(self, trial: Any) -> Changes:
        """The result of a trial, when its streams have passed all layers."""
        if not self.top:
            self._measure_dense(self.streams)
        return self._changes(self._unparked(self.trials[trial]))

    def to_part(self, trials: list[Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The streams of trials after their layer."""
        arrays = {
            f"trial.{number}.{place}": sharding.gather(x) if isinstance(x, jax.Array) else x
            for number, streams in enumerate(trials)
            for place, x in enumerate(streams)
        }
        return arrays, {"trials": len(trials)}

    def from_part(self, part: Part) -> list[Any]:
        """The numbers of trials whose streams stand after their layer."""
        first, count = len(self.trials), part.note["trials"]
        for number in range(count):
            streams = [part.arrays[f"trial.{number}.{place}"] for place in range(len(self.batches))]
            self.trials.append(self._parked(self._unparked(streams)))
        return list(range(first, first + count))

    def advance(self, run: Block) -> None:
        """Moves the streams of the dense model and of all trials of earlier layers past a layer."""
        for number in range(self.before):
            self.trials[number] = self._parked(self._advanced(run, self._unparked(self.trials[number])))
        self.before = len(self.trials)
        super().advance(run)

    def _parked(self, streams: list[Stream]) -> list[Parked]:
        return [sharding.parked(x) for x in streams]

    def _unparked(self, streams: Sequence[Parked]) -> list[Stream]:
        return [sharding.unparked(x, self.batches.mesh) for x in streams]


def trials_of(decoder: Decoder, batches: Batches) -> Trials:
    """The trials of a model in memory, or of one whose layers are read one at a time."""
    return (StreamedTrials if isinstance(decoder, StreamedDecoder) else Trials)(decoder, batches)


def projections(
    site: Site, kind: str, counts: Sequence[int], fewest: int, choose: Choose | None, settings: Refit, solver: Solver
) -> Iterator[tuple[Matrix, Any | None, np.ndarray]]:
    """For each count, the refitted kernel at full width, with rows of zeros, and the change of the bias, None without.

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
    fit, of_all = fit_at(site, kind, settings, solver), np.arange(group_count(site.run, kind))
    order = fit.order(fewest) if choose is None else None
    errors = np.zeros(1) if order is None else np.cumsum([0.0, *order.errors])

    def kept_groups(keep: int) -> Bool[np.ndarray, " count"]:
        if order is not None:
            return ~np.isin(of_all, order.groups[: len(of_all) - keep])
        assert choose is not None
        return np.isin(of_all, hosts.of_first(lambda choose=choose: {"kept": choose(kind, site.layer, keep)})["kept"])

    for keep in counts:
        rows = fit.refit(kept_groups(keep), settings.method == "least-squares")
        yield rows.kernel, None if settings.method == "none" else rows.shift, errors


@jax.jit
def _dense(outer: Decoder, x: Stream, tokens: Int[Array, "B T"]) -> tuple[Top, Float[Array, " B"]]:
    """The top tokens of the dense model, and the summed cross entropy of every sequence, from its last stream."""
    hidden = finish(outer, x)
    return top_tokens(outer, hidden), jnp.sum(token_losses(outer, hidden, tokens), axis=-1)


@jax.jit
def _both(outer: Decoder, x: Stream, tokens: Int[Array, "B T"], dense: Top) -> Float[Array, "2 B"]:
    """Summed cross entropy and divergence of every sequence, from the last stream."""
    sums = (jnp.sum(part, axis=-1) for part in token_divergences(outer, finish(outer, x), tokens, dense))
    return jnp.stack(list(sums))
