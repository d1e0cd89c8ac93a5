"""Processes of several hosts: they are joined, process 0 decides for all of them, and they wait for each other.

Processes run the same program on their own machines. Two machines can round differently or read different clocks. A
decision that is not the same everywhere would mix two models, or leave a process waiting for ever. Process 0 therefore
decides whatever depends on values, and sends its decision to the others (`of_first`, `agree`, `decide`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

from minillm_jax.errors import InputError, cause

# Fewest bytes that process 0 sends. Sizes are rounded up to powers of two, so that few programs are compiled.
FEWEST = 256


@dataclass(frozen=True)
class Hosts:
    """The address of the job. JAX reads fields that are None from the environment (a TPU pod, Slurm, Open MPI).

    Attributes:
      coordinator: address and port of process 0.
      count: number of processes.
      number: number of this process, from 0.
    """

    coordinator: str | None = None
    count: int | None = None
    number: int | None = None


def parse_hosts(text: str) -> Hosts:
    """The hosts written as `auto` or `ADDRESS:PORT,COUNT,NUMBER`.

    Raises:
      InputError: the text has another form, or the number is not below the count.
    """
    if text == "auto":
        return Hosts()
    match = re.fullmatch(r"([^\s,]+:\d{1,5}),(\d{1,6}),(\d{1,6})", text, re.ASCII)
    if match is None or int(match[3]) >= int(match[2]):
        raise InputError(
            f"hosts {text!r} is not understood; expected auto or ADDRESS:PORT,COUNT,NUMBER with the address of process "
            "0, the number of processes and the number of this process from 0, for example 10.0.0.1:1234,2,0"
        )
    return Hosts(match[1], int(match[2]), int(match[3]))


def initialise_hosts(hosts: Hosts) -> None:
    """Joins the other processes. It must be called before any use of the devices of JAX.

    Raises:
      InputError: the coordinator is unknown or does not answer, or JAX has initialised its devices already.
    """
    try:
        jax.distributed.initialize(hosts.coordinator, hosts.count, hosts.number)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes could not be joined ({cause(error)}); without a TPU pod, Slurm or Open MPI, "
            "name the processes with --hosts ADDRESS:PORT,COUNT,NUMBER"
        ) from error


def is_writer() -> bool:
    """Whether this process writes files and prints; only process 0 does."""
    return jax.process_index() == 0


def agree(text: str) -> str:
    """The text of process 0, in every process."""
    return text if jax.process_count() == 1 else _send(text.encode()).decode()


def of_first(compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Arrays by name, computed in process 0 alone, in every process bit for bit.

    They are arrays of NumPy; with one process, arrays of JAX stay on their devices.

    `compute` must not run programs on devices of other processes: these wait for its result.

    Args:
      compute: called in process 0; arrays or numbers, by name.

    Raises:
      InputError: `compute` raised it, in every process.
      RuntimeError: `compute` raised another error, in the other processes; or the arrays arrived damaged.
    """
    if jax.process_count() == 1:
        return {name: value if isinstance(value, jax.Array) else np.asarray(value) for name, value in compute().items()}
    arrays, failure = {}, None
    if is_writer():
        try:
            arrays = {name: np.asarray(value) for name, value in compute().items()}
        except Exception as error:  # sent to the other processes, which would wait for ever
            failure = error
    _raise_together(failure)
    described = {name: [array.dtype.name, array.shape] for name, array in arrays.items()}
    received = {
        name: np.frombuffer(_send(arrays[name].tobytes() if is_writer() else b""), np.dtype(dtype)).reshape(shape)
        for name, (dtype, shape) in json.loads(agree(json.dumps(described))).items()
    }
    check_same("arrays of process 0", {name: digest(array) for name, array in received.items()})
    return received


def rows_of_first(compute: Callable[[], Mapping[str, Sequence[Any]]]) -> dict[str, list[np.ndarray]]:
    """Kind of group -> for each layer, a number or indices: computed by process 0 alone, in every process."""
    arrays = of_first(
        lambda: {f"{kind} {layer}": row for kind, rows in compute().items() for layer, row in enumerate(rows)}
    )
    rows: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():  # in the order of the layers
        rows.setdefault(name.split()[0], []).append(array)
    return rows


def digest(array: np.ndarray) -> str:
    """SHA-256 of the bytes of an array."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def check_same(what: str, value: Any) -> None:
    """Checks that every process holds the same value.

    Args:
      what: names the value in the message, in the plural.
      value: any value with a `repr` that identifies it.

    Raises:
      InputError: one process holds another value, in every process.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(own))
    different = np.flatnonzero((digests != digests[0]).any(axis=1))
    if different.size:
        raise InputError(
            f"the {what} of process {different[0]} are not those of process 0; give all processes the same command, "
            "files and versions"
        )


def _broadcast(own: np.ndarray) -> np.ndarray:
    """The bytes of process 0, in every process; equally many in all."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(own))


def _send(data: bytes) -> bytes:
    """The bytes of process 0, in every process; what the others pass is ignored."""
    size = int.from_bytes(_broadcast(np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)).tobytes(), "little")
    padded = max(FEWEST, 1 << (size - 1).bit_length()) if size else FEWEST
    own = data if is_writer() else b""
    return _broadcast(np.frombuffer(own.ljust(padded, b"\0"), np.uint8)).tobytes()[:size]


def _raise_together(failure: Exception | None) -> None:
    """Raises the error of process 0 in every process."""
    message = agree("" if failure is None else f"{isinstance(failure, InputError):d}{cause(failure)}")
    if failure is not None:
        raise failure
    if message:
        kind = InputError if message[0] == "1" else RuntimeError
        raise kind(message[1:])


def decide(check: Callable[[], None]) -> None:
    """Runs a check in process 0 and raises its error in every process, so that all processes stop together.

    Raises:
      InputError: the check raised it.
    """

    def nothing() -> dict[str, Any]:
        check()
        return {}

    of_first(nothing)


def wait() -> None:
    """Waits until all processes have called it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("minillm_jax")
