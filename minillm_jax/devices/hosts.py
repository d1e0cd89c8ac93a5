"""Processes of several hosts: they are joined, agree on texts and checks, and wait for each other."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from minillm_jax.errors import InputError, cause

# Largest size in bytes of a text that process 0 sends to the others: a path or a sentence.
LONGEST = 8192


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
    """The text of process 0, in every process; cut to `LONGEST` bytes with several processes."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    data = text.encode()[:LONGEST]
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(data.ljust(LONGEST, b"\0"), np.uint8))
    return bytes(received).rstrip(b"\0").decode(errors="ignore")


def decide(check: Callable[[], None]) -> None:
    """Runs a check in process 0 and raises its error in every process, so that all processes stop together.

    Raises:
      InputError: the check raised it.
    """
    message = ""
    if is_writer():
        try:
            check()
        except InputError as error:
            message = str(error)
    message = agree(message)
    if message:
        raise InputError(message)


def wait() -> None:
    """Waits until all processes have called it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("minillm_jax")
