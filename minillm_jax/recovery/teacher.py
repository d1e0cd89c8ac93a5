"""The dense model as teacher: in memory beside the student, or as its most probable tokens in a folder.

The folder is written once. It holds, for every training sequence and every position but the last, the `X` most probable
next tokens and the logarithms of their probabilities. Student and teacher are then never in memory together.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from minillm_jax.data.examples import Examples
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError, reason
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.digest import model_digest
from minillm_jax.model.loss import Top, top_tokens
from minillm_jax.paths import absolute_path
from minillm_jax.recovery.train import Teacher

IDENTITY, IDS, LOGS = "teacher.json", "ids.npy", "logs.npy"


def in_memory(teacher: Decoder | None) -> Teacher:
    """A teacher that computes its probabilities in every update."""
    return lambda rows: teacher


def identity_of(teacher: Decoder, examples: Examples, top: int) -> dict[str, Any]:
    """What decides the content of a folder of most probable tokens."""
    count = min(top, teacher.embedding.shape[0])
    return {"teacher": model_digest(teacher)[:16], "text": examples.fingerprint()[:16], "top": count}


def write(
    folder: Path | None,
    teacher: Decoder,
    examples: Examples,
    top: int,
    batch: int,
    progress: Callable[[int, int], None],
) -> None:
    """Writes the most probable tokens of all sequences, in float32, into an empty folder.

    With several processes, all of them call it, because all of them compute.

    Args:
      folder: exists; the caller gives it its name when it is complete. None in a process that does not write.
      teacher: the dense model.
      examples: the training sequences.
      top: number of tokens at a position, at most the vocabulary.
      batch: sequences of a forward pass.
      progress: called with the number of finished sequences, and of all.
    """
    count, mesh = min(top, teacher.embedding.shape[0]), sharding.mesh_of(teacher)
    shape, identity = (examples.count, examples.length - 1, count), identity_of(teacher, examples, top)
    ids, logs = (
        None if folder is None else np.lib.format.open_memmap(folder / name, "w+", dtype, shape)
        for name, dtype in ((IDS, np.int32), (LOGS, np.float32))
    )
    for start in range(0, examples.count, batch):
        rows = np.minimum(np.arange(start, start + batch), examples.count - 1)
        tokens, _ = examples.take(rows)
        found = _top(teacher, sharding.shard_batch(tokens, mesh), count)
        size = min(batch, examples.count - start)
        for array, part in ((ids, found.ids), (logs, found.logs)):
            values = sharding.gather(part)
            if array is not None:
                array[start : start + size] = values[:size]
        progress(start + size, examples.count)
    if folder is not None:
        (folder / IDENTITY).write_text(json.dumps(identity), encoding="utf-8")


@partial(jax.jit, static_argnames="count")
def _top(teacher: Decoder, tokens: Int[Array, "B T"], count: int) -> Top:
    return top_tokens(teacher, final_hidden(teacher, tokens), count)


def read(folder: str | Path, expected: dict[str, Any], mesh: Mesh | None = None) -> Teacher:
    """The teacher of a folder.

    Args:
      folder: that `write` has filled.
      expected: `identity_of` the teacher and the training sequences.
      mesh: that of the student.

    Raises:
      InputError: the folder is not whole, or belongs to another teacher or text.
    """
    path = absolute_path(folder, "folder of the teacher's tokens")
    try:
        found = json.loads((path / IDENTITY).read_text(encoding="utf-8"))
        ids, logs = (np.load(path / name, mmap_mode="r", allow_pickle=False) for name in (IDS, LOGS))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a whole folder of a teacher's tokens ({reason(error)})") from error
    for name, value in expected.items():
        if found.get(name) != value:
            raise InputError(
                f"{path}: holds tokens with another {name} ({found.get(name)}, not {value}); give another "
                "--teacher-logits"
            )
    return lambda rows: Top(*(sharding.shard_batch(np.asarray(array[rows]), mesh) for array in (ids, logs)))
