"""An estimate that can be killed: what was measured so far lies in a folder, and the next run goes on from there."""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minillm_jax.errors import InputError, cause
from minillm_jax.scoring.gradient.plan import Plan
from minillm_jax.scoring.gradient.settings import Estimation

# Seconds of work that a kill may cost, beyond the call that was under way.
SAVE_EVERY = 15.0


class Checkpoint:
    """The folder of one estimate, an Orbax checkpoint of all losses or slopes that were measured.

    Whose estimate it is, is stored with it: model (by its losses), text, settings. How it was cut into chunks is too,
    and used again, so that the resumed estimate is equal to an uninterrupted one bit for bit.

    Example:
      >>> with Checkpoint("folder", identity) as checkpoint:
      ...     plan, found = checkpoint.load()
      ...     checkpoint.save(plan, found)
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]):
        from orbax.checkpoint import v1 as ocp

        self.folder, self.identity, self._last = Path(folder).expanduser().resolve(), identity, time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            policy: Any = ocp.training.preservation_policies.LatestN(1)
            self._store = ocp.training.Checkpointer(str(self.folder), preservation_policy=policy)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}: cannot hold a checkpoint ({cause(error)})") from error

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    def load(self) -> tuple[Plan | None, Float[np.ndarray, "done ..."] | None]:
        """The plan and what was measured along the first directions, or nothing yet.

        Raises:
          InputError: the folder holds another estimate, or is damaged.
        """
        if self._store.latest is None:
            return None, None
        try:
            stored: Any = self._store.metadata().custom_metadata
            found = np.asarray(self._store.load()["found"])
            plan = Plan(**stored["plan"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.folder}: not a whole checkpoint of an estimate ({cause(error)})") from error
        for name, asked in self.identity.items():
            if stored["identity"].get(name) != asked:
                raise InputError(
                    f"{self.folder}: holds an estimate with another {name} ({stored['identity'].get(name)}, not "
                    f"{asked}); give another --checkpoint"
                )
        return plan, found

    def save(self, plan: Plan, found: Float[np.ndarray, "done ..."], last: bool) -> None:
        """Keep what was measured, if it is the last or enough time has passed; it appears whole or not at all."""
        if last or time.monotonic() - self._last >= SAVE_EVERY:
            described: Any = {"identity": self.identity, "plan": asdict(plan)}
            self._store.save(len(found), {"found": found}, custom_metadata=described, overwrite=True)
            self._last = time.monotonic()


def identity(settings: Estimation, windows: Int[np.ndarray, "B T"], losses: Float[np.ndarray, " B"]) -> dict[str, Any]:
    """What an estimate is of: settings that change its figures, the text, and the model by its losses on it."""
    settled = {name: value for name, value in asdict(settings).items() if name not in ("per_step", "memory")}
    text, model = (hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (windows, losses))
    return settled | {"text": text, "model": model}
