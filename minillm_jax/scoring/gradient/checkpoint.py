"""Checkpoints of an estimate: an interrupted estimate continues from the measurements in a folder."""

import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts
from minillm_jax.errors import InputError, reason
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.digest import model_digest
from minillm_jax.paths import absolute_path
from minillm_jax.scoring.gradient.plan import Plan
from minillm_jax.settings import Estimation

# Least time between two checkpoints, in seconds: the work that an interruption may lose beyond the unfinished call.
SAVE_EVERY = 15.0

# Settings that change the plan of an estimate, but not the estimate.
_ONLY_SPEED = ("directions_per_step", "memory")


class Stored(NamedTuple):
    """What an interrupted estimate continues from.

    Attributes:
      plan: the plan of the estimate.
      epsilon: ε of the step; None for an estimate without a finite step.
      measured: losses or slopes of the first directions.
    """

    plan: Plan
    epsilon: float | None
    measured: Float[np.ndarray, "done ..."]


class Checkpoint:
    """The folder of one estimate: an Orbax checkpoint of all measured losses or slopes.

    The identity of the estimate is stored with the measurements: model, text and settings. The plan and a chosen ε are
    stored too. A resumed estimate uses both, so that it equals an uninterrupted estimate bit for bit.

    With several processes, all of them open, load and save together, and process 0 decides when: a process that saved
    alone, by its own clock, would wait for the others for ever.

    Args:
      folder: the folder; created if it does not exist.
      identity: the identity of the estimate (see `identity`).
      save_every: least time between two saved checkpoints, seconds.

    Raises:
      InputError: the folder cannot be created or opened.

    Example:
      >>> with Checkpoint("folder", identity(settings, batches, decoder)) as checkpoint:
      ...     stored = checkpoint.load()
      ...     checkpoint.save(Stored(plan, 1e-3, measured), last=True)
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

    def load(self) -> Stored | None:
        """The measurements of the first directions, the plan and ε; None if there is no checkpoint yet.

        Raises:
          InputError: the folder holds the checkpoint of another estimate, or a damaged checkpoint.
        """
        latest = self._store.latest
        hosts.check_same(f"checkpoints in {self.folder}", None if latest is None else latest.step)
        if latest is None:
            return None
        try:
            stored: Any = self._store.metadata().custom_metadata
            measured = np.asarray(self._store.load()["measured"])
            plan, epsilon = Plan(**stored["plan"]), stored["epsilon"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.folder}: not a whole checkpoint of an estimate ({reason(error)})") from error
        for name, expected in self.identity.items():
            if stored["identity"].get(name) != expected:
                raise InputError(
                    f"{self.folder}: holds an estimate with another {name} ({stored['identity'].get(name)}, not "
                    f"{expected}); give another --checkpoint"
                )
        return Stored(plan, epsilon, measured)

    def save(self, state: Stored, last: bool) -> None:
        """Saves the measurements if `save_every` seconds have passed since the last checkpoint, by process 0's clock.

        A checkpoint is written whole or not at all.

        Args:
          state: what a resumed estimate needs.
          last: whether the measurements are complete; complete measurements are always saved.

        Raises:
          InputError: the checkpoint cannot be written, for example on a full disk.
        """
        due = hosts.of_first(lambda: {"due": np.bool_(time.monotonic() - self._last >= self.save_every)})["due"]
        if last or due:
            metadata: Any = {"identity": self.identity, "plan": asdict(state.plan), "epsilon": state.epsilon}
            measured = {"measured": state.measured}
            try:
                self._store.save(len(state.measured), measured, custom_metadata=metadata, overwrite=True)
            except Exception as error:  # Orbax raises errors of many types
                raise InputError(f"{self.folder}: the checkpoint cannot be written ({reason(error)})") from error
            self._last = time.monotonic()


def identity(settings: Estimation, batches: Batches, decoder: Decoder) -> dict[str, Any]:
    """The identity of an estimate: settings that change its values, and hashes of the text and of the model.

    Nothing of it is computed by a forward pass: losses differ in their last digits between meshes and devices, and an
    estimate may continue on others than it began on.

    Args:
      settings: settings of the estimate; ε is None where it is chosen.
      batches: the calibration windows.
      decoder: the model.
    """
    settled = {name: value for name, value in asdict(settings).items() if name not in _ONLY_SPEED}
    return settled | {"text": batches.fingerprint()[:16], "model": model_digest(decoder)[:16]}
