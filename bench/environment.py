"""Hardware, versions and commit, which every committed result holds."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from minillm_jax.devices.memory import process_peak


def environment() -> dict[str, Any]:
    """A JSON object that describes this machine and this checkout."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": device.platform,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "transformers")},
        "commit": commit(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout; `-dirty` at its end where files have changed since, other than results.

    A copy without Git's files takes it from the variable GIT_COMMIT.
    """
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    number = git("describe", "--always", "--abbrev=12")
    # A study writes its rows while it runs: they change no other row.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
    return f"{number}-dirty" if changed else number


def peak_bytes(of_torch: bool = False) -> int:
    """The peak memory of this process so far, in bytes: on the device, or resident memory if the device is a CPU."""
    if jax.default_backend() == "cpu":
        return process_peak()
    if of_torch:
        import torch

        return torch.cuda.max_memory_allocated()
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def restart_peak() -> None:
    """Reset the peak of `peak_bytes` to the resident memory of now (Linux on a CPU; elsewhere without effect)."""
    switch = Path("/proc/self/clear_refs")
    if jax.default_backend() == "cpu" and os.access(switch, os.W_OK):
        switch.write_text("5\n")
