"""A recipe of a recovery: all settings of `minillm-jax recover`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from minillm_jax.recipes.recipe import Settings
from minillm_jax.recovery.settings import (
    AdapterShape,
    ClosedForm,
    Distillation,
    ForwardOnly,
    RecoveryEvaluation,
    RecoveryOutput,
    Sections,
    Training,
    TrainingData,
)
from minillm_jax.settings import Devices

DEFAULT = "distil"


@dataclass(frozen=True)
class Recovery(Settings):
    """The settings of a recovery by section.

    Attributes:
      data, training, adapter, distillation, forward, refit, output, devices, evaluation: the sections.
    """

    name: str = DEFAULT
    data: TrainingData = field(default_factory=TrainingData)
    training: Training = field(default_factory=Training)
    adapter: AdapterShape = field(default_factory=AdapterShape)
    distillation: Distillation = field(default_factory=Distillation)
    forward: ForwardOnly = field(default_factory=ForwardOnly)
    refit: ClosedForm = field(default_factory=ClosedForm)
    output: RecoveryOutput = field(default_factory=RecoveryOutput)
    devices: Devices = field(default_factory=Devices)
    evaluation: RecoveryEvaluation = field(default_factory=RecoveryEvaluation)

    FOLDER: ClassVar[Path] = Path(__file__).parent / "recover"
    DEFAULT: ClassVar[str] = DEFAULT

    @property
    def computed(self) -> Sections:
        """The sections that decide what is computed."""
        return Sections(self.training, self.adapter, self.distillation, self.forward, self.refit)
