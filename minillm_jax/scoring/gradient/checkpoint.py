"""Checkpoints of an estimate: an interrupted estimate continues from the measurements in a folder."""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minillm_jax.errors import InputError, reason
from minillm_jax.paths import absolute_path
from minillm_jax.scoring.gradient.plan import Plan
from minillm_jax.settings import Estimation

# Least time between two checkpoints, in seconds: the work that an interruption may lose beyond the unfinished call.
SAVE_EVERY = 15.0

# Settings that change the plan of an estimate, but not the estimate.
_ONLY_SPEED = ("directions_per_step", "memory")


class Checkpoint:
    """The folder of one estimate: an Orbax checkpoint of all measured losses or slopes.

    The identity of the estimate is stored with the measurements: model, text and settings. The plan is stored too. A
    resumed estimate uses the stored plan, so that it equals an uninterrupted estimate bit for bit.

    Args:
      folder: the folder; created if it does not exist.
      identity: the identity of the estimate (see `identity`).
      save_every: least time between two saved checkpoints, seconds.

    Raises:
      InputError: the folder cannot be created or opened.

    Example:
      >>> with Checkpoint("folder", identity(settings, windows, losses)) as checkpoint:
      ...     plan, measured = checkpoint.load()
      ...     checkpoint.save(plan, measured, last=True)
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], save_every: float = SAVE_EVERY):
        from orbax.checkpoint import v1 as ocp

        self.folder, self.identity = absolute_path(folder, "checkpoint folder"), identity
        self.save_every, self._last = save_every, time.monotonic()
        try:
            self.folder = self.folder.resolve()
            self.folder.mkdir(parents=True, exist_ok=True)
            policy: Any = ocp.training.preservation_policies.LatestN(1)
            self._store = ocp.training.Checkpointer(str(self.folder), preservation_policy=policy)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.folder}: cannot hold a checkpoint ({reason(error)})") from error

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    def load(self) -> tuple[Plan | None, Float[np.ndarray, "done ..."] | None]:
        """The plan and the measurements of the first directions; None and None if there is no checkpoint yet.

        Raises:
          InputError: the folder holds the checkpoint of another estimate, or a damaged checkpoint.
        """
        if self._store.latest is None:
            return None, None
        try:
            stored: Any = self._store.metadata().custom_metadata
            measured = np.asarray(self._store.load()["measured"])
            plan = Plan(**stored["plan"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.folder}: not a whole checkpoint of an estimate ({reason(error)})") from error
        for name, expected in self.identity.items():
            if stored["identity"].get(name) != expected:
                raise InputError(
                    f"{self.folder}: holds an estimate with another {name} ({stored['identity'].get(name)}, not "
                    f"{expected}); give another --checkpoint"
                )
        return plan, measured

    def save(self, plan: Plan, measured: Float[np.ndarray, "done ..."], last: bool) -> None:
        """Saves the measurements if `save_every` seconds have passed since the last checkpoint.

        A checkpoint is written whole or not at all.

        Args:
          plan: the plan of the estimate.
          measured: losses or slopes of the first directions.
          last: whether the measurements are complete; complete measurements are always saved.

        Raises:
          InputError: the checkpoint cannot be written, for example on a full disk.
        """
        if last or time.monotonic() - self._last >= self.save_every:
            metadata: Any = {"identity": self.identity, "plan": asdict(plan)}
            try:
                self._store.save(len(measured), {"measured": measured}, custom_metadata=metadata, overwrite=True)
            except Exception as error:  # Orbax raises errors of many types
                raise InputError(f"{self.folder}: the checkpoint cannot be written ({reason(error)})") from error
            self._last = time.monotonic()


def identity(settings: Estimation, windows: Int[np.ndarray, "B T"], losses: Float[np.ndarray, " B"]) -> dict[str, Any]:
    """The identity of an estimate: settings that change its values, a hash of the text, and a hash of the losses.

    Args:
      settings: settings of the estimate, with the chosen ε.
      windows: token ids of the calibration windows.
      losses: the dense model's loss of every window; their hash identifies the model.
    """
    settled = {name: value for name, value in asdict(settings).items() if name not in _ONLY_SPEED}
    text, model = (hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (windows, losses))
    return settled | {"text": text, "model": model}
