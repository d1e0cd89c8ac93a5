"""All settings of a recovery, with their defaults.

Each class is a section of a recipe of `minillm-jax recover`, as the classes of `minillm_jax.settings` are sections of a
recipe of `minillm-jax prune`. This module imports neither JAX nor transformers, so that `--help` answers at once.
"""

import re
from dataclasses import dataclass
from math import isfinite

from minillm_jax.errors import InputError, one_of
from minillm_jax.options import WORDS, Spelling, option

METHODS = ("lora", "full", "forward", "refit")
LOSSES = ("ce", "kd", "both")
SCHEDULES = ("linear", "cosine", "constant")
TEMPLATES = ("auto", "alpaca")
COUNTED = ("auto", "all", "response")
PACKINGS = ("auto", "padded", "packed")
# What `--method forward` trains: low-rank adapters, norms, norms and biases, or every weight in place (MeZO).
FORWARD_TRAINS = ("lora", "norms", "all-small", "all")
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def _read_course(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"\s*([\d.eE+-]+)\s*(?::\s*([\d.eE+-]+))?\s*", text)
    try:
        if match is None:
            raise ValueError
        first = float(match[1])
        last = first if match[2] is None else float(match[2])
    except ValueError:
        raise ValueError("is not understood; expected FIRST:LAST, 0.9:0.5 for example, or one number") from None
    if not (isfinite(first) and isfinite(last)):
        raise ValueError("is not finite")
    return first, last


# A number that changes linearly from the first step to the last.
COURSE = Spelling(_read_course, lambda course: f"{course[0]:g}:{course[1]:g}", "0.9:0.5")


@dataclass(frozen=True)
class TrainingData:
    """The text to train on.

    Attributes:
      data: a file, a Hub data set as `owner/name[/config][:split]`.
      seq_len: tokens of a sequence at most.
      packing: one example a sequence, `padded`, or examples one after the other, `packed`; `auto` pads conversations
        and packs plain text.
      template: how conversations are written: by the tokenizer's chat template where it has one (`auto`), or by the
        prompts of Stanford Alpaca.
      loss_on: which tokens the loss counts: those of the responses, or all; `auto` counts responses in conversations.
      held_out: number of sequences that are not trained on, for the validation loss.
      field: name of the field that holds the text of a row.
      bos: where the beginning-of-sequence token stands (`data.first_token`).
      seed: of the order, the validation sequences, the adapter's first values, and dropout.
    """

    data: str | None = option(
        None,
        str,
        "Text, .json, .jsonl, .csv, .parquet or .npy (token ids) file, or a Hub data set OWNER/NAME[:SPLIT], to train "
        "on: plain text, or rows of Alpaca, messages, prompt and response.",
        common=True,
    )
    seq_len: int = option(256, int, "Tokens of a training sequence at most.", common=True)
    packing: str = option(
        "auto",
        str,
        "One example a sequence (padded) or examples one after the other (packed); auto pads conversations.",
        choices=PACKINGS,
    )
    template: str = option(
        "auto",
        str,
        "Write conversations by the chat template of the tokenizer, or by the prompts of Alpaca.",
        choices=TEMPLATES,
    )
    loss_on: str = option(
        "auto", str, "Tokens that the loss counts: of the responses, or all.", choices=COUNTED, common=True
    )
    held_out: int = option(64, int, "Sequences that are not trained on, for the validation loss.")
    field: str = option("text", str, "Field that holds the text, in files of rows and Hub data sets.")
    bos: str = option(
        "auto", str, "Beginning-of-sequence token of training sequences, as in prune.", choices=("auto", "yes", "no")
    )
    seed: int = option(0, int, "Seed of the order, the validation sequences, the adapter and dropout.")


@dataclass(frozen=True)
class Training:
    """How the model is trained.

    Attributes:
      method: what is trained, and how: `lora`, low-rank adapters; `full`, every weight; `forward`, without
        back-propagation; `refit`, output projections by least squares.
      loss: `ce`, the cross entropy of the text; `kd`, the divergence from the teacher; `both`. None for `both` with a
        teacher, and `ce` without.
      epochs: passes over the training sequences.
      steps: number of updates, in the place of epochs.
      batch: sequences of an update.
      micro_batch: sequences of a forward and backward pass; their gradients are added up.
      learning_rate: of AdamW, after the warm-up.
      warmup: updates in which the learning rate rises from zero.
      schedule: how the learning rate falls after the warm-up: to zero linearly or as a cosine, or not at all.
      weight_decay: of AdamW.
      clip: largest norm of a gradient; 0 for any.
      validate_every: updates between two validations; the last update is always validated.
      remat: whether a layer's activations are computed again in the backward pass, which saves their memory.
      best: whether the result is the state of the least validation loss, and not the last.
    """

    method: str = option("lora", str, "What is trained, and how.", choices=METHODS, common=True)
    loss: str | None = option(
        None,
        str,
        "Cross entropy (ce), divergence from the teacher (kd), or both; both if unset and there is a teacher.",
        choices=LOSSES,
        common=True,
    )
    epochs: float = option(1.0, float, "Passes over the training sequences.", common=True)
    steps: int | None = option(None, int, "Number of updates, in the place of epochs.", common=True)
    batch: int = option(16, int, "Sequences of an update.")
    micro_batch: int = option(4, int, "Sequences of a forward and backward pass; a divisor of the batch.")
    learning_rate: float = option(3e-4, float, "Learning rate of AdamW after the warm-up.", common=True)
    warmup: int = option(10, int, "Updates in which the learning rate rises from zero.")
    schedule: str = option("linear", str, "How the learning rate falls after the warm-up.", choices=SCHEDULES)
    weight_decay: float = option(0.0, float, "Weight decay of AdamW.")
    clip: float = option(1.0, float, "Largest norm of a gradient; 0 for any.")
    validate_every: int = option(25, int, "Updates between two validations.")
    remat: bool = option(True, bool, "Compute the activations of a layer again in the backward pass, to save memory.")
    best: bool = option(True, bool, "Keep the state of the least validation loss, and not the last.")

    def check(self) -> None:
        """Check the ranges.

        Raises:
          InputError: a setting is out of its range.
        """
        one_of("method", self.method, METHODS)
        one_of("schedule", self.schedule, SCHEDULES)
        if self.loss is not None:
            one_of("loss", self.loss, LOSSES)
        if self.batch < 1 or self.micro_batch < 1 or self.batch % self.micro_batch:
            raise InputError(
                f"--micro-batch must divide --batch, found {self.micro_batch} and {self.batch} sequences"
            )
        for flag, value in (("--epochs", self.epochs), ("--learning-rate", self.learning_rate)):
            if not (isfinite(value) and value > 0):
                raise InputError(f"{flag} must be above 0, found {value:g}")
        for flag, value in (("--weight-decay", self.weight_decay), ("--clip", self.clip)):
            if not (isfinite(value) and value >= 0):
                raise InputError(f"{flag} must be at least 0, found {value:g}")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps must be at least 1, found {self.steps}")
        if self.warmup < 0:
            raise InputError(f"--warmup must be at least 0, found {self.warmup}")
        if self.validate_every < 1:
            raise InputError(f"--validate-every must be at least 1, found {self.validate_every}")


@dataclass(frozen=True)
class AdapterShape:
    """The low-rank adapters of `--method lora` and of `--method forward`.

    Attributes:
      rank: rank r.
      alpha: numerator α of the scale α / r.
      dropout: share of an adapter's inputs that are set to zero in training.
      targets: matrices with an adapter; `gate` means nothing in models without one.
      start: folder of an adapter to start from, whose shape replaces this one.
    """

    rank: int = option(8, int, "Rank r of the adapters.", common=True)
    alpha: float = option(16.0, float, "Numerator α of the scale α / r of the adapters.", flag="lora_alpha")
    dropout: float = option(0.0, float, "Share of an adapter's inputs that are set to zero in training.")
    targets: tuple[str, ...] = option(
        MATRICES, str, "Matrices with an adapter: q, k, v, o, gate, up, down.", spelling=WORDS
    )
    start: str | None = option(None, str, "Folder of a PEFT adapter to start from.", flag="adapter")


@dataclass(frozen=True)
class Distillation:
    """The dense model as teacher.

    Attributes:
      teacher: a folder or a Hub id; None for none.
      weight: share a of the divergence in the loss `both`, from the first update to the last: a · T² · KL + (1 - a) · CE.
      temperature: T, by which the logits of teacher and student are divided.
      teacher_logits: folder with the most probable tokens of the teacher, which is written once; the teacher is then
        not in memory while the student is trained.
      top: tokens that are kept at each position; the others count as one.
    """

    teacher: str | None = option(
        None, str, "The dense model, to learn its next-token probabilities; a folder or a Hub id.", common=True
    )
    weight: tuple[float, float] = option(
        (0.9, 0.5), str, "Share of the divergence in the loss both, first:last.", flag="kd_weight", spelling=COURSE
    )
    temperature: tuple[float, float] = option(
        (2.0, 1.0), str, "Temperature of the logits in the divergence, first:last.", spelling=COURSE
    )
    teacher_logits: str | None = option(
        None, str, "Folder for the teacher's most probable tokens, written once and read again.", recorded=False
    )
    top: int = option(128, int, "Tokens of the teacher that are kept at each position.")

    def check(self) -> None:
        """Check the ranges.

        Raises:
          InputError: a setting is out of its range.
        """
        if not all(0 <= share <= 1 for share in self.weight):
            raise InputError(f"--kd-weight must lie in [0, 1], found {COURSE.write(self.weight)}")
        if not all(temperature > 0 for temperature in self.temperature):
            raise InputError(f"--temperature must be above 0, found {COURSE.write(self.temperature)}")
        if self.top < 1:
            raise InputError(f"--top must be at least 1, found {self.top}")


@dataclass(frozen=True)
class ForwardOnly:
    """`--method forward`: updates from paired losses, without back-propagation (MeZO, arXiv 2305.17333).

    Attributes:
      train: what moves: `lora`, `norms`, `all-small` (norms and biases), or `all` weights in place.
      directions: random directions of an update, whose estimates are averaged.
      epsilon: the step ε of a paired loss.
    """

    train: str = option("lora", str, "What --method forward trains.", choices=FORWARD_TRAINS)
    directions: int = option(8, int, "Random directions of an update of --method forward.", flag="forward_directions")
    epsilon: float = option(1e-3, float, "Step of the paired losses of --method forward.", flag="forward_epsilon")
