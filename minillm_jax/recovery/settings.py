"""All settings of a recovery, with their defaults.

Each class is a section of a recipe of `minillm-jax recover`, as the classes of `minillm_jax.settings` are sections of a
recipe of `minillm-jax prune`. This module imports neither JAX nor transformers, so that `--help` answers at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

from minillm_jax.errors import InputError, one_of
from minillm_jax.options import WORDS, Spelling, option
from minillm_jax.settings import BOS, FORMATS, LOSS_ON, PACKINGS, SOLVER_CHOICES, STEP, TEMPLATES, Output, Refit

METHODS = ("lora", "full", "forward", "refit")
LOSSES = ("ce", "kd", "both")
ACTIVATIONS = ("stream", "products", "all")
SCHEDULES = ("linear", "cosine", "constant")
# What `--method forward` trains: low-rank adapters, norms, or norms and biases.
FORWARD_TRAINS = ("lora", "norms", "all-small", "matrices")
# Name of a matrix in the settings -> its names in the table of axes (`model.axis_table`): that of the dense MLP or the
# shared expert, and that of the experts.
TARGETS = {
    **{name: (f"attention.{name}",) for name in ("q", "k", "v", "o")},
    **{name: (f"mlp.{name}", f"experts.{name}") for name in ("gate", "up", "down")},
}


def names_of(targets: Sequence[str]) -> tuple[str, ...]:
    """The names in the table of axes of some of `TARGETS`."""
    return tuple(name for target in targets for name in TARGETS[target])


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
      data: a file, a Hub data set as `owner/name[/config][:split]`, or a mixture, `a.txt:0.7,b.jsonl:0.3`.
      seq_len: tokens of a sequence at most.
      packing: one example a sequence, `padded`, or examples one after the other, `packed`; `auto` pads conversations
        and packs plain text.
      template: how conversations are written: by the tokenizer's chat template where it has one (`auto`), or by the
        prompts of Stanford Alpaca.
      loss_on: which tokens the loss counts: those of the responses, or all; `auto` counts responses in conversations.
      held_out: number of sequences that are not trained on, for the validation loss; None for a tenth, at most 64.
      field: name of the field that holds the text of a row.
      bos: where the beginning-of-sequence token stands (`data.first_token`).
      seed: of the order, the validation sequences, the adapter's first values, and dropout.
    """

    data: str | None = option(
        None,
        str,
        "Text, .json, .jsonl, .csv, .parquet or .npy (token ids) file, or a Hub data set OWNER/NAME[:SPLIT], to train "
        "on: plain text, or rows of Alpaca, messages, prompt and response; or a mixture of these, "
        "a.txt:0.7,b.jsonl:0.3.",
        common=True,
    )
    seq_len: int = option(256, int, "Tokens of a training sequence at most.")
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
    loss_on: str = option("auto", str, "Tokens that the loss counts: of the responses, or all.", choices=LOSS_ON)
    held_out: int | None = option(
        None, int, "Sequences that are not trained on, for the validation loss; a tenth, and at most 64, if unset."
    )
    field: str = option("text", str, "Field that holds the text, in files of rows and Hub data sets.")
    bos: str = option("auto", str, "Beginning-of-sequence token of training sequences, as in prune.", choices=BOS)
    seed: int = option(0, int, "Seed of the order, the validation sequences, the adapter and dropout.")


@dataclass(frozen=True)
class Training:
    """How the model is trained.

    Attributes:
      method: what is trained, and how: `lora`, low-rank adapters; `full`, every weight; `forward`, without
        back-propagation; `refit`, all matrices of the layers in closed form, without steps.
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
      activations: what the forward pass keeps of every layer for the backward pass, which computes the rest again:
        `stream`, the residual stream; `products`, the outputs of its linear maps too; `all`. More is faster and takes
        more memory.
      last: whether the result is the last state, and not that of the least validation loss.
    """

    method: str = option("lora", str, "What is trained, and how.", choices=METHODS, common=True)
    loss: str | None = option(
        None,
        str,
        "Cross entropy (ce), divergence from the teacher (kd), or both; both if unset and there is a teacher.",
        choices=LOSSES,
        common=True,
    )
    epochs: float = option(1.0, float, "Passes over the training sequences.")
    steps: int | None = option(None, int, "Number of updates, in the place of epochs.", common=True)
    batch: int = option(16, int, "Sequences of an update.")
    micro_batch: int = option(4, int, "Sequences of a forward and backward pass; a divisor of the batch.")
    learning_rate: float = option(3e-4, float, "Learning rate of AdamW after the warm-up.", common=True)
    warmup: int = option(10, int, "Updates in which the learning rate rises from zero.")
    schedule: str = option("linear", str, "How the learning rate falls after the warm-up.", choices=SCHEDULES)
    weight_decay: float = option(0.0, float, "Weight decay of AdamW.")
    clip: float = option(1.0, float, "Largest norm of a gradient; 0 for any.")
    validate_every: int = option(25, int, "Updates between two validations.")
    activations: str = option(
        "products",
        str,
        "Activations kept for the backward pass: the residual stream, the outputs of linear maps too, or all.",
        choices=ACTIVATIONS,
    )
    last: bool = option(False, bool, "Write the last state, and not that of the least validation loss.")

    def check(self) -> None:
        """Check the ranges.

        Raises:
          InputError: a setting is out of its range.
        """
        one_of("method", self.method, METHODS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("activations", self.activations, ACTIVATIONS)
        if self.loss is not None:
            one_of("loss", self.loss, LOSSES)
        if self.batch < 1 or self.micro_batch < 1 or self.batch % self.micro_batch:
            raise InputError(f"--micro-batch must divide --batch, found {self.micro_batch} and {self.batch} sequences")
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
class Lora:
    """The shape of an adapter, and how it computes.

    Attributes:
      rank: rank r of the factors.
      alpha: numerator α of the scale α / r.
      dropout: share of the inputs of A that are set to zero in training, in [0, 1); the others are scaled up. The
        factors of experts have none.
      targets: names of the matrices with an adapter (`model.axis_table`).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = names_of(tuple(TARGETS))

    @property
    def scale(self) -> float:
        """The factor α / r of A · B."""
        return self.alpha / self.rank

    def check(self) -> None:
        """Check the ranges.

        Raises:
          InputError: a number is out of its range, or a target is no matrix.
        """
        if self.rank < 1:
            raise InputError(f"--rank must be at least 1, found {self.rank}")
        if not self.alpha > 0:
            raise InputError(f"--lora-alpha must be above 0, found {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout must lie in [0, 1), found {self.dropout:g}")


@dataclass(frozen=True)
class AdapterShape:
    """The low-rank adapters of `--method lora` and of `--method forward`.

    Attributes:
      rank: rank r.
      alpha: numerator α of the scale α / r; twice the rank by default.
      dropout: share of an adapter's inputs that are set to zero in training.
      targets: matrices with an adapter; `gate` means nothing in models without one. `gate`, `up` and `down` are those
        of every expert too.
      start: folder of an adapter to start from, whose shape replaces this one.
    """

    rank: int = option(8, int, "Rank r of the adapters.")
    alpha: float | None = option(
        None, float, "Numerator α of the scale α / r of the adapters; twice the rank by default.", flag="lora_alpha"
    )
    dropout: float = option(
        0.0, float, "Share of an adapter's inputs that are set to zero in training; not of experts."
    )
    targets: tuple[str, ...] = option(
        tuple(TARGETS),
        str,
        "Matrices with an adapter: q, k, v, o, gate, up, down; the last three of every expert too.",
        spelling=WORDS,
    )
    start: str | None = option(None, str, "Folder of a PEFT adapter to start from.", flag="adapter")


@dataclass(frozen=True)
class Distillation:
    """The dense model as teacher.

    Attributes:
      teacher: a folder or a Hub id; None for none.
      weight: share a of the divergence in the loss `both`, from the first update to the last:
        a · T² · KL + (1 - a) · CE.
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
      train: what moves: `lora`, `norms`, `all-small` (norms and biases); or `matrices`, all matrices of the layers in
        place, which is MeZO: directions that all sequences share, and no optimiser.
      directions: random directions of an update, whose estimates are averaged.
      epsilon: the step ε of a paired loss.
    """

    train: str = option("lora", str, "What --method forward trains.", choices=FORWARD_TRAINS)
    directions: int = option(8, int, "Random directions of an update of --method forward.", flag="forward_directions")
    epsilon: float = option(1e-3, float, "Step of the paired losses of --method forward.", flag="forward_epsilon")

    def check(self) -> None:
        """Check the ranges.

        Raises:
          InputError: a setting is out of its range.
        """
        one_of("part of the model that --method forward trains", self.train, FORWARD_TRAINS)
        if self.directions < 1:
            raise InputError(f"--forward-directions must be at least 1, found {self.directions}")
        if not (isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(f"--forward-epsilon must be above 0, found {self.epsilon:g}")


@dataclass(frozen=True)
class ClosedForm:
    """`--method refit`: least squares for every matrix, towards the dense residual stream, in one walk.

    Attributes:
      alpha, ridge, inputs, solver: as in the refit of a pruning (`settings.Refit`).
    """

    alpha: float | None = option(
        None, float, "Aim of --method refit: 0 for the layer's own output, 1 for the dense stream.", flag="refit_alpha"
    )
    ridge: float | None = option(
        None, str, "Ridge of --method refit, or auto: chosen by sequences that are held out.", spelling=STEP
    )
    inputs: float | None = option(
        None,
        float,
        "How far --method refit refits the matrices that read the residual stream, from 0 to 1.",
        flag="refit_inputs",
    )
    solver: str = option("auto", str, "Where --method refit solves its systems.", choices=SOLVER_CHOICES)

    @property
    def refit(self) -> Refit:
        """The settings of the walk."""
        return Refit(alpha=self.alpha, ridge=self.ridge, inputs=self.inputs, solver=self.solver)


@dataclass(frozen=True)
class RecoveryOutput(Output):
    """What is written: the settings of a pruning, with another default of two of them.

    Attributes:
      format: of the folder; None for the format of the pruned model.
      checkpoint: folder of the training state, from which an interrupted run continues; None for one beside the output,
        which is removed when the output is written.
    """

    format: str | None = option(
        None, str, "Format of the output folder; that of the model if unset.", choices=FORMATS, common=True
    )
    checkpoint: str | None = option(
        None, str, "Folder of the training state; one beside the output if unset.", recorded=False
    )


@dataclass(frozen=True)
class RecoveryEvaluation:
    """The texts that are measured and not trained on.

    Attributes:
      text: perplexity on it is measured before and after the recovery, and of the teacher.
      window: tokens of a window.
      continuations: number of texts that the models write for the report.
      watch: a second kind of text; its loss is measured with every validation, because training on one narrow text can
        make a model worse on others.
      watch_windows: number of its windows, evenly spaced.
    """

    text: str | None = option(
        None,
        str,
        "Text to measure the perplexity on, before and after the recovery.",
        flag="evaluate",
        common=True,
    )
    window: int = option(128, int, "Tokens of an evaluation window.")
    continuations: int = option(
        3, int, "Beginnings of the evaluation text that all models continue, for the report; 0 for none."
    )
    watch: str | None = option(
        None, str, "Another kind of text, whose loss is measured with every validation.", common=True
    )
    watch_windows: int = option(32, int, "Number of windows of the text of --watch.")


@dataclass(frozen=True)
class Sections:
    """The settings of a recovery that decide what is computed."""

    training: Training = field(default_factory=Training)
    adapter: AdapterShape = field(default_factory=AdapterShape)
    distillation: Distillation = field(default_factory=Distillation)
    forward: ForwardOnly = field(default_factory=ForwardOnly)
    refit: ClosedForm = field(default_factory=ClosedForm)

    def check(self) -> None:
        """Check all ranges.

        Raises:
          InputError: a setting is out of its range.
        """
        self.training.check()
        self.distillation.check()
        self.forward.check()
        self.lora().check()

    def lora(self) -> Lora:
        """The shape of the adapters.

        Raises:
          InputError: a target is no matrix.
        """
        shape = self.adapter
        unknown = [name for name in shape.targets if name not in TARGETS]
        if unknown or not shape.targets:
            found = unknown[0] if unknown else "none"
            raise InputError(f"--targets must name some of {', '.join(TARGETS)}, found {found!r}")
        alpha = 2.0 * shape.rank if shape.alpha is None else shape.alpha
        return Lora(shape.rank, alpha, shape.dropout, names_of(shape.targets))

    @property
    def trains_matrices(self) -> bool:
        """Whether MeZO moves the matrices in place."""
        return self.training.method == "forward" and self.forward.train == "matrices"

    @property
    def trains_adapter(self) -> bool:
        """Whether the result is an adapter."""
        method = self.training.method
        return method == "lora" or (method == "forward" and self.forward.train == "lora")

    def share(self, teacher: bool) -> float | None:
        """The share of the divergence in the loss; None for the course of `distillation.weight`.

        Raises:
          InputError: the loss or the method needs a teacher, and there is none, or its most probable tokens alone.
        """
        if self.training.method == "refit" and not teacher:
            raise InputError(
                "--method refit fits the layers to those of a teacher; name the dense model with --teacher"
            )
        if self.training.method == "refit" and self.distillation.teacher_logits is not None:
            raise InputError("--method refit reads the layers of the teacher; leave --teacher-logits out")
        loss = self.training.loss or ("both" if teacher else "ce")
        if loss != "ce" and not teacher:
            raise InputError(
                f"--loss {loss} measures the divergence from a teacher; name the dense model with --teacher"
            )
        return {"ce": 0.0, "kd": 1.0, "both": None}[loss]
