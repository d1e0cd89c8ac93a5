"""The memory that a process has used."""

import re
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most bytes in use so far: of the first accelerator, or of this process on a CPU."""
    import jax  # `process_peak` works without

    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))
    return process_peak()


def process_peak() -> int:
    """The most bytes of memory that this process has had.

    On Linux it is VmHWM and not `ru_maxrss`, which begins with the value of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
