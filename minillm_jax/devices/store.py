"""A folder with the state of an interrupted job: arrays and metadata, written whole or not at all (Orbax)."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from minillm_jax.devices import hosts
from minillm_jax.errors import InputError, reason
from minillm_jax.paths import absolute_path

# Least time between two saved states, in seconds: the work that an interruption may lose beyond the unfinished step.
SAVE_EVERY = 15.0
# A large state is saved more rarely, so that saving takes at most one part in so many of the time.
WORK_PER_SAVE = 20.0


class State(NamedTuple):
    """The state of a job.

    Attributes:
      arrays: a tree of arrays on the host.
      metadata: anything that JSON holds.
    """

    arrays: Any
    metadata: dict[str, Any]


class Store:
    """The folder of one job, which holds its latest state and the identity of the job.

    With several processes, all of them open, load and save together, and process 0 decides when: a process that saved
    alone, by its own clock, would wait for the others for ever.

    Args:
      folder: the folder; created if it does not exist.
      identity: whatever decides the job's results. A folder with another identity is refused.
      job: the noun for the job in messages, `an estimate`.
      save_every: least time between two saved states, seconds; 0 saves after every step.

    Raises:
      InputError: the folder cannot be created or opened.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], job: str, save_every: float = SAVE_EVERY):
        from orbax.checkpoint import v1 as ocp

        self.folder, self.identity, self._job = absolute_path(folder, "checkpoint folder"), dict(identity), job
        self.save_every, self._last, self._took = save_every, time.monotonic(), 0.0
        try:
            self.folder = self.folder.resolve()
            self.folder.mkdir(parents=True, exist_ok=True)
            policy: Any = ocp.training.preservation_policies.LatestN(1)
            self._store = ocp.training.Checkpointer(str(self.folder), preservation_policy=policy)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.folder}: cannot hold a checkpoint ({reason(error)})") from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    def load(self) -> State | None:
        """The latest state; None if there is none yet.

        Raises:
          InputError: the folder holds the state of another job, or a damaged one.
        """
        latest = self._store.latest
        hosts.check_same(f"checkpoints in {self.folder}", None if latest is None else latest.step)
        if latest is None:
            return None
        try:
            stored: Any = self._store.metadata().custom_metadata
            identity, metadata = stored["identity"], stored["metadata"]
            arrays = self._store.load()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(error) from error
        for name, expected in self.identity.items():
            if identity.get(name) != expected:
                raise InputError(
                    f"{self.folder}: holds {self._job} with another {name} ({identity.get(name)}, not {expected}); "
                    "give another --checkpoint"
                )
        return State(arrays, metadata)

    def damaged(self, error: Exception) -> InputError:
        """The error of a state that cannot be read."""
        return InputError(f"{self.folder}: not a whole checkpoint of {self._job} ({reason(error)})")

    def due(self) -> bool:
        """Whether it is time for the next state, by the clock of process 0."""
        pause = max(self.save_every, WORK_PER_SAVE * self._took) if self.save_every else 0.0
        passed = hosts.of_first(lambda: {"due": np.bool_(time.monotonic() - self._last >= pause)})
        return bool(passed["due"])

    def save(self, step: int, state: State) -> None:
        """Saves a state in the place of the one before.

        Args:
          step: the number of finished steps, larger than that of the state before or equal to it.
          state: arrays and metadata.

        Raises:
          InputError: the state cannot be written, for example on a full disk.
        """
        metadata: Any = {"identity": self.identity, "metadata": state.metadata}
        began = time.monotonic()
        try:
            self._store.save(step, state.arrays, custom_metadata=metadata, overwrite=True)
        except Exception as error:  # Orbax raises errors of many types
            raise InputError(f"{self.folder}: the checkpoint cannot be written ({reason(error)})") from error
        self._last = time.monotonic()
        self._took = self._last - began
