"""Hardware, versions and commit, which every committed result holds."""

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax


def environment() -> dict[str, Any]:
    """A JSON object that describes this machine and this checkout."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": device.platform,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "transformers")},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def peak_bytes(of_torch: bool = False) -> int:
    """The peak memory of this process so far, in bytes: on the device, or resident memory if the device is a CPU.

    On Linux it is VmHWM and not `ru_maxrss`, which begins with the value of the parent process.
    """
    if jax.default_backend() == "cpu":
        status = Path("/proc/self/status")
        if status.exists():
            (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return 1024 * int(line.split()[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    if of_torch:
        import torch

        return torch.cuda.max_memory_allocated()
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def restart_peak() -> None:
    """Reset the peak of `peak_bytes` to the resident memory of now (Linux on a CPU; elsewhere without effect)."""
    switch = Path("/proc/self/clear_refs")
    if jax.default_backend() == "cpu" and os.access(switch, os.W_OK):
        switch.write_text("5\n")
