"""Windows of token ids, cut into batches once, numbered once, and spread over the mesh once."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from minillm_jax.devices import sharding

# Tokens of a batch on each device where a consumer asks for nothing else.
TOKENS_PER_BATCH = 4096


class Batch(NamedTuple):
    """Consecutive windows of one forward pass.

    Attributes:
      tokens: token ids, spread over the `data` axis of the mesh where the number of windows divides by it.
      numbers: the number of each window among all windows.
    """

    tokens: Int[Array, "B T"]
    numbers: Int[Array, " B"]


@dataclass(frozen=True)
class Batches:
    """All windows of a text, in batches. Every consumer of tokens takes this object; nothing else cuts windows.

    Attributes:
      windows: token ids on the host.
      mesh: the devices of the model that reads the batches; None for one device.
      tokens_per_batch: tokens of a batch on each device, at least one window.

    Example:
      >>> batches = Batches(windows)
      >>> losses = batches.collect(lambda batch: sequence_losses(decoder, batch.tokens))  # [B]
    """

    windows: Int[np.ndarray, "B T"]
    mesh: Mesh | None = None
    tokens_per_batch: int = TOKENS_PER_BATCH

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """The batches, in the order of the windows."""
        return iter(self._batches)

    @property
    def count(self) -> int:
        """Number of windows B."""
        return self.windows.shape[0]

    @property
    def length(self) -> int:
        """Tokens T of a window."""
        return self.windows.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens, B · T."""
        return self.windows.size

    @property
    def predictions(self) -> int:
        """Number of predicted tokens: the first token of a window is not predicted."""
        return self.count * (self.length - 1)

    def fingerprint(self) -> str:
        """SHA-256 of the token ids and of the shape of the windows; the same on every machine and mesh."""
        ids = np.ascontiguousarray(self.windows, dtype="<i4")
        return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()

    def resized(self, tokens_per_batch: int) -> "Batches":
        """The same windows in batches of another size."""
        same = tokens_per_batch == self.tokens_per_batch
        return self if same else replace(self, tokens_per_batch=tokens_per_batch)

    def first(self, count: int) -> "Batches":
        """The first `count` windows."""
        return replace(self, windows=self.windows[:count])

    def spaced(self, count: int) -> "Batches":
        """At most `count` windows, evenly spaced, the first and the last among them."""
        places = np.linspace(0, self.count - 1, min(count, self.count)).round().astype(int)
        return replace(self, windows=self.windows[places])

    def split(self, count: int) -> tuple["Batches", "Batches"]:
        """The first `count` windows, and the others."""
        return self.first(count), replace(self, windows=self.windows[count:])

    def collect(
        self, program: Callable[[Batch], Array | np.ndarray], progress: Callable[[int, int], None] | None = None
    ) -> Float[np.ndarray, "*rest B"]:
        """The results of all batches on the host, joined along their last axis, one entry a window.

        Args:
          program: batch -> [..., B].
          progress: called after each batch with the number of windows done, and of all.
        """
        results, done = [], 0
        for batch in self:
            results.append(sharding.gather(program(batch)))
            done += len(batch.numbers)
            if progress is not None:
                progress(done, self.count)
        return np.concatenate(results, axis=-1)

    def total(self, program: Callable[[Batch], Any]) -> Any:
        """The sum of the results of all batches, a pytree of arrays on the device."""
        return reduce(lambda total, part: jax.tree.map(jnp.add, total, part), map(program, self))

    @cached_property
    def _batches(self) -> tuple[Batch, ...]:
        starts = np.cumsum([0, *map(len, self._cut())])
        return tuple(
            Batch(sharding.shard_batch(part, self.mesh), jnp.arange(start, start + len(part), dtype=jnp.int32))
            for start, part in zip(starts, self._cut(), strict=False)
        )

    def _cut(self) -> list[Int[np.ndarray, "b T"]]:
        """At most two sizes of batches, multiples of the devices of `data`, and a remainder that does not divide."""
        devices = sharding.data_size(self.mesh)
        whole = self.count - self.count % devices
        per_batch = devices * max(1, self.tokens_per_batch // self.length)
        even = np.array_split(self.windows[:whole].reshape(-1, devices, self.length), max(1, -(-whole // per_batch)))
        parts = (*(part.reshape(-1, self.length) for part in even), self.windows[whole:])
        return [part for part in parts if len(part)]
