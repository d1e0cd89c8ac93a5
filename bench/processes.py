"""Rows that are measured in a process of their own, so that seconds and peak memory are those of the whole process.

This module imports no framework: the process of a peer holds nothing of ours but these functions.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from minillm_jax.devices.memory import process_peak

# The flag with which a script measures one row, given as JSON, and prints the result as the last line.
FLAG = "--row"


def launch(script: str | Path, row: dict[str, Any]) -> dict[str, Any]:
    """The result that a script prints for a row; with the `seconds` of its process, and the load of the machine before.

    Threads of OpenMP wait passively: where other work runs, waiting ones would take most of PyTorch's processor time.

    Raises:
      RuntimeError: the process failed; the message is the last line of its errors.
    """
    load, start = os.getloadavg()[0], time.perf_counter()
    command = [sys.executable, str(script), FLAG, json.dumps(row)]
    variables = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    seconds = round(time.perf_counter() - start, 1)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{lines[-1]} (exit status {done.returncode})")
    return {"seconds": seconds, "load": round(load, 1)} | json.loads(done.stdout.splitlines()[-1])


def end_with_parent() -> None:
    """Let this process end soon after its parent, so that a study that is killed leaves no process behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cost() -> dict[str, float]:
    """The processor time of this process so far, in seconds over all threads, and its peak resident memory in bytes.

    Where the process has used an accelerator, `device_bytes` is the most memory that it had there.
    """
    spent: dict[str, float] = {"cpu_seconds": round(time.process_time(), 1), "peak_bytes": process_peak()}
    return spent | ({"device_bytes": device_bytes()} if device_bytes() else {})


def device_bytes() -> int:
    """The most memory that JAX or PyTorch, whichever had more, has taken on the first accelerator; 0 without one."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) if jax is not None else 0
    return max(used, torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else 0)
