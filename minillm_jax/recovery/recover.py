"""Recovery of a pruned model: one of the methods, from examples to a better decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from minillm_jax.data.examples import Examples
from minillm_jax.devices.store import Store
from minillm_jax.model.decoder import Decoder
from minillm_jax.recovery import gradients
from minillm_jax.recovery.adapter import Adapter
from minillm_jax.recovery.settings import Lora, Sections
from minillm_jax.recovery.train import Outcome, Task, Teacher, train
from minillm_jax.recovery.trained import Trained, TrainedAdapter, TrainedArrays


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
    lora = sections.lora() if start is None else start[1]
    trained = _trained(sections, lora, None if start is None else start[0])
    forward = sections.forward
    gradient = gradients.backward(trained)
    if sections.training.method == "forward":
        gradient = gradients.forward(trained, forward.directions, forward.epsilon)
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
    outcome = train(decoder, task, gradient, teacher if teacher and share != 0 else no_teacher, store, progress)
    adapter: Any = outcome.parameters if sections.trains_adapter else None
    return Recovered(trained.result(outcome.parameters, decoder), adapter, lora, outcome)


def _trained(sections: Sections, lora: Lora, start: Adapter | None) -> Trained:
    kept = sections.training.activations
    if sections.trains_adapter:
        return TrainedAdapter(lora, kept, start)
    return TrainedArrays("all" if sections.training.method == "full" else sections.forward.train, kept)
