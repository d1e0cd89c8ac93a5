"""Checkpoints of an estimate: an interrupted estimate continues from the measurements in a folder."""

from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minillm_jax.data.batches import Batches
from minillm_jax.devices.store import SAVE_EVERY, State, Store
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.digest import model_digest
from minillm_jax.scoring.gradient.plan import Plan
from minillm_jax.settings import Estimation

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
    """The folder of one estimate: all measured losses or slopes (`devices.store`).

    The identity of the estimate is stored with the measurements: model, text and settings. The plan and a chosen ε are
    stored too. A resumed estimate uses both, so that it equals an uninterrupted estimate bit for bit.

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
        self._store = Store(folder, identity, "an estimate", save_every)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.__exit__(kind, error, trace)

    def load(self) -> Stored | None:
        """The measurements of the first directions, the plan and ε; None if there is no checkpoint yet.

        Raises:
          InputError: the folder holds the checkpoint of another estimate, or a damaged checkpoint.
        """
        state = self._store.load()
        if state is None:
            return None
        try:
            return Stored(
                Plan(**state.metadata["plan"]), state.metadata["epsilon"], np.asarray(state.arrays["measured"])
            )
        except (KeyError, TypeError) as error:
            raise self._store.damaged(error) from error

    def save(self, state: Stored, last: bool) -> None:
        """Saves the measurements if `save_every` seconds have passed since the last checkpoint.

        Args:
          state: what a resumed estimate needs.
          last: whether the measurements are complete; complete measurements are always saved.

        Raises:
          InputError: the checkpoint cannot be written, for example on a full disk.
        """
        if self._store.due() or last:
            metadata = {"plan": asdict(state.plan), "epsilon": state.epsilon}
            self._store.save(len(state.measured), State({"measured": state.measured}, metadata))


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
