"""Recovery of a pruned model: one of the methods, from examples to a better decoder."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from minillm_jax.data.batches import Batches
from minillm_jax.data.examples import Examples
from minillm_jax.devices import sharding
from minillm_jax.devices.store import Store
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.tree import all_matrices
from minillm_jax.recovery import gradients
from minillm_jax.recovery.adapter import Adapter
from minillm_jax.recovery.optimizer import learning_rates, optimizer
from minillm_jax.recovery.refit import refit_towards
from minillm_jax.recovery.rules import ByGradient, Mezo, Rule
from minillm_jax.recovery.settings import Lora, Sections, Training
from minillm_jax.recovery.train import Outcome, Point, Task, Teacher, mean_loss, rows_of, train, updates_of
from minillm_jax.recovery.trained import Trained, TrainedAdapter, TrainedArrays, TrainedMatrices


@dataclass(frozen=True)
class Texts:
    """The sequences of a recovery.

    Attributes:
      training: to train on.
      validation: of the same text, not trained on; None for none.
      watched: of a second text; None for none.
    """

    training: Examples
    validation: Examples | None = None
    watched: Examples | None = None


@dataclass(frozen=True)
class Recovered:
    """A recovered model.

    Attributes:
      decoder: the model with everything merged, in the types of the pruned model.
      adapter: the adapter; None where other arrays were trained.
      lora: shape of the adapter.
      outcome: of the training.
    """

    decoder: Decoder
    adapter: Adapter | None
    lora: Lora
    outcome: Outcome

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.outcome.parameters))


def recover_decoder(
    decoder: Decoder,
    texts: Texts,
    sections: Sections,
    seed: int = 0,
    teacher: Teacher | None = None,
    start: tuple[Adapter, Lora] | None = None,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recovered:
    """Trains a pruned model.

    Args:
      decoder: the pruned model, which does not change.
      texts: what it is trained and measured on.
      sections: the settings.
      seed: of the order of the sequences, the first values and dropout.
      teacher: the dense model; None for the loss of the text alone.
      start: the adapter to start from, in the place of a new one.
      store: folder of the state, from which an interrupted run continues.
      progress: called with the number of finished updates, and of all.

    Raises:
      InputError: a setting is out of its range, or the folder holds another run.
    """
    sections.check()
    if sections.training.method == "refit":
        return _refitted(decoder, texts, sections, seed, teacher, progress)
    lora = sections.lora() if start is None else start[1]
    trained = _trained(sections, lora, None if start is None else start[0])
    share = sections.share(teacher is not None)
    task = Task(
        trained,
        sections.training,
        sections.distillation,
        texts.training,
        texts.validation,
        texts.watched,
        seed,
        share,
    )
    no_teacher: Teacher = lambda rows: None  # noqa: E731
    outcome = train(
        decoder, task, rule_of(task, sections), teacher if teacher and share != 0 else no_teacher, store, progress
    )
    adapter: Any = outcome.parameters if sections.trains_adapter else None
    return Recovered(trained.result(outcome.parameters, decoder), adapter, lora, outcome)


def _refitted(
    decoder: Decoder,
    texts: Texts,
    sections: Sections,
    seed: int,
    teacher: Teacher | None,
    progress: Callable[[int, int], None] | None,
) -> Recovered:
    """Refits the model, on as many sequences as the updates of the other methods read, each at most once."""
    began, training, examples = time.perf_counter(), sections.training, texts.training
    sections.share(teacher is not None)
    dense = None if teacher is None else teacher(np.arange(0))
    assert isinstance(dense, Decoder), "the settings ask for a teacher in memory"
    if not examples.counted[:, 1:].all():
        raise InputError(
            f"{examples.source}: --method refit reads whole sequences, and this text has padding or tokens that do not "
            "count; use --packing packed and --loss-on all"
        )
    updates = updates_of(training, examples.count)
    rows = rows_of(0, examples.count, min(updates * training.batch, examples.count), seed)
    windows = Batches(examples.take(np.sort(rows))[0], sharding.mesh_of(decoder))
    after = refit_towards(decoder, dense, windows, sections.refit.refit, progress)
    tokens = windows.count * (windows.length - 1)
    measured = [
        Point(update, read, None, None, *(_loss(one, text, training) for text in (texts.validation, texts.watched)))
        for update, read, one in ((0, 0, decoder), (1, tokens, after))
    ]
    matrices = [all_matrices(run) for run in after.runs]
    outcome = Outcome(matrices, measured, 1, tokens, tokens, time.perf_counter() - began)
    return Recovered(after, None, sections.lora(), outcome)


def _loss(decoder: Decoder, examples: Examples | None, training: Training) -> float | None:
    if examples is None:
        return None
    return mean_loss(decoder, TrainedArrays("norms"), {}, examples, training.micro_batch)


def rule_of(task: Task, sections: Sections) -> Rule:
    """How the updates of a task change its parameters."""
    training, forward = sections.training, sections.forward
    if isinstance(task.trained, TrainedMatrices):
        rates, calls = learning_rates(training, task.updates), training.batch // training.micro_batch
        return Mezo(rates, calls, forward.directions, forward.epsilon, task.seed)
    gradient = gradients.backward(task.trained)
    if training.method == "forward":
        gradient = gradients.forward(task.trained, forward.directions, forward.epsilon)
    return ByGradient(gradient, optimizer(training, task.updates))


def _trained(sections: Sections, lora: Lora, start: Adapter | None) -> Trained:
    kept = sections.training.activations
    if sections.trains_adapter:
        return TrainedAdapter(lora, kept, start)
    if sections.trains_matrices:
        return TrainedMatrices()
    return TrainedArrays("all" if sections.training.method == "full" else sections.forward.train, kept)
