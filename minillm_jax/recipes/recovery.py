"""A recipe of a recovery: all settings of `minillm-jax recover`, and which of them a run reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from minillm_jax.data.windows import check_seed
from minillm_jax.errors import InputError
from minillm_jax.recipes.recipe import Settings
from minillm_jax.recovery.recover import Sections
from minillm_jax.recovery.settings import (
    AdapterShape,
    Distillation,
    ForwardOnly,
    RecoveryEvaluation,
    RecoveryOutput,
    Training,
    TrainingData,
)
from minillm_jax.settings import Devices

DEFAULT = "distil"


@dataclass(frozen=True)
class Recovery(Settings):
    """The settings of a recovery by section.

    Attributes:
      data, training, adapter, distillation, forward, output, devices, evaluation: the sections.
    """

    name: str = DEFAULT
    data: TrainingData = field(default_factory=TrainingData)
    training: Training = field(default_factory=Training)
    adapter: AdapterShape = field(default_factory=AdapterShape)
    distillation: Distillation = field(default_factory=Distillation)
    forward: ForwardOnly = field(default_factory=ForwardOnly)
    output: RecoveryOutput = field(default_factory=RecoveryOutput)
    devices: Devices = field(default_factory=Devices)
    evaluation: RecoveryEvaluation = field(default_factory=RecoveryEvaluation)

    FOLDER: ClassVar[Path] = Path(__file__).parent / "recover"
    DEFAULT: ClassVar[str] = DEFAULT

    @property
    def computed(self) -> Sections:
        """The sections that decide what is computed."""
        return Sections(self.training, self.adapter, self.distillation, self.forward)

    def check(self, given: Mapping[tuple[str, str], str] | None = None) -> None:
        """Check the settings as far as that is possible without the model.

        Args:
          given: section and key -> flag, of the settings that a user gave.

        Raises:
          InputError: a setting is out of its range, two do not suit each other, or a given one would do nothing.
        """
        self.computed.check()
        check_seed(self.data.seed)
        self.computed.share(self.distillation.teacher is not None)
        if self.data.seq_len < 2:
            raise InputError(f"--seq-len must be at least 2, found {self.data.seq_len}")
        if self.data.held_out is not None and self.data.held_out < 0:
            raise InputError(f"--held-out must be at least 0, found {self.data.held_out}")
        for (section, key), flag in (given or {}).items():
            why = self._idle(section, key)
            if why is not None:
                raise InputError(f"{flag} would do nothing in this run ({why}); leave it out")

    def _idle(self, section: str, key: str) -> str | None:
        """Why a run does not read a setting; None where it does."""
        method = self.training.method
        if section == "adapter" and not self.computed.trains_adapter:
            return f"method {method} trains no adapter"
        if section == "adapter" and self.adapter.start is not None and key in ("rank", "alpha", "targets"):
            return "the adapter of --adapter has its own shape"
        if (section, key) == ("adapter", "dropout") and method == "forward":
            return "method forward has no dropout"
        if section == "forward" and method != "forward":
            return f"method {method}"
        if section == "distillation" and key != "teacher":
            if self.distillation.teacher is None:
                return "no --teacher"
            if self.training.loss == "ce":
                return "loss ce"
            if key == "weight" and self.training.loss == "kd":
                return "loss kd"
            if key == "top" and self.distillation.teacher_logits is None:
                return "no --teacher-logits"
        if (section, key) == ("training", "epochs") and self.training.steps is not None:
            return "--steps"
        if (section, key) == ("training", "remat") and method == "forward":
            return "method forward has no backward pass"
        if section == "evaluation" and key == "window" and self.evaluation.text is None:
            return "no --evaluate"
        if section == "evaluation" and key == "watch_windows" and self.evaluation.watch is None:
            return "no --watch"
        return None
