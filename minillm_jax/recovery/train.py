"""The training loop of a recovery: updates, validations, the best state, and continuation after an interruption."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minillm_jax.data.examples import Examples
from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.store import State, Store
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import Top
from minillm_jax.recovery import objective
from minillm_jax.recovery.gradients import Part
from minillm_jax.recovery.objective import Sequences, Weights
from minillm_jax.recovery.rules import Rule
from minillm_jax.recovery.settings import Distillation, Training
from minillm_jax.recovery.trained import Parameters, Trained
from minillm_jax.scoring.gradient import directions


class Point(NamedTuple):
    """One validation.

    Attributes:
      update: number of updates before it.
      tokens: number of counted tokens before it.
      loss: mean loss of the updates since the last validation; None before the first update. Its weights may change
        from update to update, so that two points need not compare.
      cross_entropy: mean cross entropy of the training sequences in the same updates, nats, which compares.
      validation: mean cross entropy of the validation sequences, nats; None without such sequences.
      watched: mean cross entropy of the second text, nats; None without one.
    """

    update: int
    tokens: int
    loss: float | None
    cross_entropy: float | None
    validation: float | None
    watched: float | None


@dataclass(frozen=True)
class Task:
    """Everything a training run needs beside the model.

    Attributes:
      trained: what is trained.
      training: the settings of the updates.
      distillation: the settings of the divergence.
      examples: the sequences to train on.
      validation: other sequences of the same text; None for none.
      watched: sequences of a second text, measured with every validation; None for none.
      seed: of the order of the sequences, the first values and dropout.
      share: whether the loss has a divergence: 1 for it alone, 0 for cross entropy alone, None for the course of
        `distillation.weight`.
    """

    trained: Trained
    training: Training
    distillation: Distillation
    examples: Examples
    validation: Examples | None = None
    watched: Examples | None = None
    seed: int = 0
    share: float | None = None

    @property
    def updates(self) -> int:
        """Number of all updates."""
        return updates_of(self.training, self.examples.count)


@dataclass(frozen=True)
class Outcome:
    """A finished training run.

    Attributes:
      parameters: of the best or the last state; the refitted matrices of a recovery in closed form.
      points: the validations, in order; the first is before any update.
      update: number of updates before the state.
      tokens: number of counted tokens of all updates.
      tokens_here: those of this process, without those of an interrupted one.
      seconds: of the updates and validations of this process.
      stopped: why the run ended early, a sentence; None for a whole run.
    """

    parameters: Parameters
    points: list[Point]
    update: int
    tokens: int
    tokens_here: int
    seconds: float
    stopped: str | None = None


class Progress(NamedTuple):
    """The state between two updates.

    Attributes:
      parameters: the trained parameters.
      optimizer: state of the optimiser.
      best: the parameters of the least validation loss; None where they are not asked for.
      points: the validations.
      update: number of finished updates.
      tokens: number of counted tokens of these updates.
      loss: sum of the mean losses of the updates since the last validation.
      cross_entropy: sum of their mean cross entropies.
    """

    parameters: Parameters
    optimizer: Any
    best: Parameters | None
    points: tuple[Point, ...] = ()
    update: int = 0
    tokens: int = 0
    loss: float = 0.0
    cross_entropy: float = 0.0


# Numbers of sequences -> the dense model, or its most probable tokens for these sequences; None for no teacher.
Teacher = Callable[[Int[np.ndarray, " b"]], Decoder | Top | None]


def train(
    decoder: Decoder,
    task: Task,
    rule: Rule,
    teacher: Teacher = lambda rows: None,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Trains the parameters of a task.

    The same task gives the same parameters bit for bit, whether or not it was interrupted and continued.

    Args:
      decoder: the model, which does not change.
      task: what is trained, on what, and how.
      rule: how an update changes the parameters of `task.trained`.
      teacher: what the divergence is measured from.
      store: folder of the state, from which an interrupted run continues.
      progress: called with the number of finished updates, and of all.

    Raises:
      InputError: the folder holds another run, or cannot be written.
    """
    began, loop = time.perf_counter(), _Loop(decoder, task, rule, teacher)
    state = loop.begun(store)
    stopped, before = None, state
    while state.update < task.updates and stopped is None:
        state, stopped = loop.updated(state)
        last = state.update == task.updates or stopped is not None
        if last or state.update % task.training.validate_every == 0:
            state = loop.validated(state)
        # The first state is saved at once, so that a folder that cannot be written is found early.
        if store is not None and (store.due() or last or state.update == before.update + 1):
            loop.save(store, state)
        if progress is not None:
            progress(state.update, task.updates)
    chosen, update = (state.parameters, state.update) if state.best is None else (state.best, _best(state.points))
    seconds = time.perf_counter() - began
    return Outcome(chosen, list(state.points), update, state.tokens, state.tokens - before.tokens, seconds, stopped)


def updates_of(training: Training, count: int) -> int:
    """Number of updates for `count` sequences."""
    if training.steps is not None:
        return training.steps
    return max(1, ceil(training.epochs * count / training.batch))


def rows_of(update: int, count: int, batch: int, seed: int) -> Int[np.ndarray, " batch"]:
    """The numbers of the sequences of an update: epoch after epoch, each in an order of its own.

    Args:
      update: number of the update, from 0.
      count: number of sequences.
      batch: sequences of an update.
      seed: of the orders.
    """
    places = np.arange(update * batch, (update + 1) * batch)
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in np.unique(places // count)}
    return np.asarray([orders[place // count][place % count] for place in places])


def course(first: float, last: float, update: int, updates: int) -> float:
    """A number that changes linearly from the first update to the last."""
    return first + (last - first) * update / max(updates - 1, 1)


def mean_loss(
    decoder: Decoder, trained: Trained, parameters: Parameters, examples: Examples, micro_batch: int
) -> float:
    """The mean cross entropy of the counted tokens of some sequences, nats; that of process 0 in every process."""
    mesh, totals = sharding.mesh_of(decoder), []
    for start in range(0, examples.count, micro_batch):
        rows = np.arange(start, start + micro_batch)
        tokens, counted = examples.take(np.minimum(rows, examples.count - 1))
        inside = (rows < examples.count)[:, None]
        totals.append(_measured(parameters, decoder, _placed(tokens, counted & inside, mesh), trained))
    mean = np.sum([np.float64(total) for total in totals]) / examples.targets
    # Processes whose losses differ in their last digits would keep the states of different updates as the best one.
    return float(hosts.of_first(lambda: {"mean": mean})["mean"])


@partial(jax.jit, static_argnames="trained")
def _measured(parameters: Parameters, decoder: Decoder, sequences: Sequences, trained: Trained) -> Float[Array, ""]:
    hidden = trained.hidden(parameters, decoder, sequences.tokens, None)
    return objective.sums(trained.computing(parameters, decoder), hidden, sequences).cross_entropy


def _placed(tokens: np.ndarray, counted: np.ndarray, mesh: Mesh | None) -> Sequences:
    return Sequences(sharding.shard_batch(tokens, mesh), sharding.shard_batch(counted, mesh))


def _best(points: tuple[Point, ...]) -> int:
    """The update of the least validation loss, the first of several."""
    return min((point.validation, point.update) for point in points if point.validation is not None)[1]


def _not_finite(update: int, loss: float) -> str:
    return (
        f"update {update}: the loss is {loss:g} or its gradient is not finite; use a lower --learning-rate, or "
        "--dtype float32"
    )


class _Loop:
    """The compiled programs of a training run, and what they read."""

    def __init__(self, decoder: Decoder, task: Task, rule: Rule, teacher: Teacher) -> None:
        self._decoder, self._task, self._rule, self._teacher = decoder, task, rule, teacher
        self._mesh = sharding.mesh_of(decoder)
        self._key = directions.stream_key(task.seed, "dropout")
        self._program = rule.program()

    def begun(self, store: Store | None) -> Progress:
        """The state before the first update, or that of an interrupted run."""
        parameters = self._task.trained.initial(self._decoder, self._task.seed)
        parameters = jax.tree.map(lambda leaf: sharding.with_mesh(leaf, self._mesh), parameters)
        best = jax.tree.map(jnp.copy, parameters) if self._keeps_best else None
        state = Progress(parameters, self._rule.init(parameters), best)
        stored = None if store is None else store.load()
        return self.validated(state) if stored is None else _restored(state, stored)

    @property
    def _keeps_best(self) -> bool:
        return not self._task.training.last and self._task.validation is not None

    def updated(self, state: Progress) -> tuple[Progress, str | None]:
        """The state after one more update; and why the run must stop, if it must."""
        task, training = self._task, self._task.training
        rows = rows_of(state.update, task.examples.count, training.batch, task.seed)
        tokens, counted = task.examples.take(rows)
        targets = int(counted.sum())
        weights, calls = self._weights(state.update), training.batch // training.micro_batch
        # The optimiser takes the mean of the calls' gradients, which then is that of the mean loss of a counted token.
        scale = jnp.float32(calls / targets)
        parameters, optimizer_state, found = state.parameters, state.optimizer, []
        for call in range(calls):
            part = slice(call * training.micro_batch, (call + 1) * training.micro_batch)
            key = jax.random.fold_in(self._key, state.update * calls + call)
            sequences = _placed(tokens[part], counted[part], self._mesh)
            read = Part(self._teacher(rows[part]), sequences, weights, scale, key)
            parameters, optimizer_state, sums = self._program(parameters, optimizer_state, self._decoder, read)
            found.append(sums)
        loss = sum(float(objective.loss(sums, weights)) for sums in found) / targets
        cross_entropy = sum(float(sums.cross_entropy) for sums in found) / targets
        after = state._replace(parameters=parameters, optimizer=optimizer_state)
        stopped = hosts.agree("" if self._rule.was_finite(optimizer_state) else _not_finite(state.update + 1, loss))
        if stopped:
            return after, stopped
        return (
            after._replace(
                update=state.update + 1,
                tokens=state.tokens + targets,
                loss=state.loss + loss,
                cross_entropy=state.cross_entropy + cross_entropy,
            ),
            None,
        )

    def _weights(self, update: int) -> Weights:
        settings, updates = self._task.distillation, self._task.updates
        share = course(*settings.weight, update, updates) if self._task.share is None else self._task.share
        return Weights(jnp.float32(share), jnp.float32(course(*settings.temperature, update, updates)))

    def validated(self, state: Progress) -> Progress:
        """The state with one more point, and its parameters as the best if they are."""
        before = state.points[-1].update if state.points else 0
        since = state.update - before
        loss, cross_entropy = (total / since if since else None for total in (state.loss, state.cross_entropy))
        validation, watched = (
            self._mean_loss(state, examples) for examples in (self._task.validation, self._task.watched)
        )
        best = state.best
        least = min((point.validation for point in state.points if point.validation is not None), default=None)
        if best is not None and validation is not None and least is not None and validation < least:
            best = jax.tree.map(jnp.copy, state.parameters)
        point = Point(state.update, state.tokens, loss, cross_entropy, validation, watched)
        return state._replace(points=(*state.points, point), best=best, loss=0.0, cross_entropy=0.0)

    def _mean_loss(self, state: Progress, examples: Examples | None) -> float | None:
        if examples is None:
            return None
        size = self._task.training.micro_batch
        return mean_loss(self._decoder, self._task.trained, state.parameters, examples, size)

    def save(self, store: Store, state: Progress) -> None:
        """Saves a state, without the arrays of sublayers that the model lacks: Orbax saves no empty ones."""
        leaves = enumerate(jax.tree.leaves(state[:3]))
        arrays = {str(place): sharding.gather(leaf) for place, leaf in leaves if leaf.size}
        numbers = {name: getattr(state, name) for name in ("update", "tokens", "loss", "cross_entropy")}
        store.save(state.update, State(arrays, numbers | {"points": [list(point) for point in state.points]}))


def _restored(state: Progress, stored: State) -> Progress:
    """A state with the arrays and numbers of a stored one."""
    leaves, structure = jax.tree.flatten(state[:3])
    arrays = [
        sharding.like(stored.arrays[str(place)], leaf) if leaf.size else leaf for place, leaf in enumerate(leaves)
    ]
    parameters, optimizer_state, best = jax.tree.unflatten(structure, arrays)
    numbers = stored.metadata
    points = tuple(Point(*point) for point in numbers["points"])
    counts, sums = (numbers["update"], numbers["tokens"]), (numbers["loss"], numbers["cross_entropy"])
    return Progress(parameters, optimizer_state, best, points, *counts, *sums)
