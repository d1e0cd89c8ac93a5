"""Processes of their own for the tests of several devices, because JAX fixes the number of devices at its start."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds, after which the processes of a job are stopped


def start(devices: int, module: str, name: str, *arguments: object) -> subprocess.Popen[str]:
    """A process with a number of devices that runs a function of a module of this folder."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", f"tests.devices.{module}", name, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(children: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """The results of the processes; all are stopped after the timeout."""
    try:
        outputs = [child.communicate(timeout=TIMEOUT) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    errors = "\n".join(error[-5000:] for child, (_, error) in zip(children, outputs, strict=True) if child.returncode)
    assert not errors, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def two_hosts(devices: int, module: str, name: str, *arguments: object) -> list[dict[str, Any]]:
    """The results of two joined processes, each with a number of devices; the last argument is the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return finish([start(devices, module, name, *arguments, f"{address},2,{number}") for number in (0, 1)])
