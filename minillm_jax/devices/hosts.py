"""The processes of several hosts: joining them, and making them agree."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from minillm_jax.errors import InputError, cause

# Bytes of what one process tells the others: a path or a sentence.
LONGEST = 8192


@dataclass(frozen=True)
class Hosts:
    """How a process finds its fellows; what is None is taken from the environment (a TPU pod, Slurm, Open MPI)."""

    coordinator: str | None = None
    count: int | None = None
    number: int | None = None


def parse_hosts(text: str) -> Hosts:
    """What `auto` or `ADDRESS:PORT,COUNT,NUMBER` stands for.

    Raises:
      InputError: it is not written like that, or the number is not below the count.
    """
    if text == "auto":
        return Hosts()
    match = re.fullmatch(r"([^\s,]+:\d{1,5}),(\d{1,6}),(\d{1,6})", text, re.ASCII)
    if match is None or int(match[3]) >= int(match[2]):
        raise InputError(
            f"hosts {text!r} is not understood; expected auto or ADDRESS:PORT,COUNT,NUMBER with the address of process "
            "0 and the number of this process, from 0, 10.0.0.1:1234,2,0 for example"
        )
    return Hosts(match[1], int(match[2]), int(match[3]))


def initialise_hosts(hosts: Hosts) -> None:
    """Join the other processes. Comes before anything that asks JAX for a device.

    Raises:
      InputError: no coordinator is known or answers, or JAX has devices already.
    """
    try:
        jax.distributed.initialize(hosts.coordinator, hosts.count, hosts.number)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes could not be joined ({cause(error)}); where no TPU pod, Slurm or Open MPI starts them, "
            "--hosts ADDRESS:PORT,COUNT,NUMBER says which they are"
        ) from error


def is_writer() -> bool:
    """Whether this process writes files and prints: the first of them does."""
    return jax.process_index() == 0


def agree(text: str) -> str:
    """What process 0 says, in every process."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    data = text.encode()[:LONGEST]
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(data.ljust(LONGEST, b"\0"), np.uint8))
    return bytes(told).rstrip(b"\0").decode(errors="ignore")


def decide(check: Callable[[], None]) -> None:
    """A check that process 0 makes for all, so that none goes on alone.

    Raises:
      InputError: the check raised it, in every process.
    """
    said = ""
    if is_writer():
        try:
            check()
        except InputError as error:
            said = str(error)
    said = agree(said)
    if said:
        raise InputError(said)


def wait() -> None:
    """Go on when all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("minillm_jax")
