"""A pruning in memory, streamed, and killed again and again: times, peaks of memory, and whether the weights are equal.

    python bench/stream.py MODEL --calibration FILE [--kills 50] [--seed 0] --output bench/results/stream-MODEL.json
        [OPTIONS OF PRUNE]

Each way is the command `minillm-jax prune` in a process of its own. The killed way is streamed: SIGKILL ends each
process at a random moment, and the same command goes on. When the output folder is there, its weights are compared with
those of the uninterrupted runs, bit for bit, and the next job begins anew.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from environment import environment

Row = dict[str, Any]


def command(arguments: argparse.Namespace, output: Path, stream: bool) -> list[str]:
    """The command of a pruning."""
    options = [*arguments.options, *(["--stream"] if stream else [])]
    start = [sys.executable, "-m", "minillm_jax", "prune", arguments.model, "--calibration", arguments.calibration]
    return [*start, "--output", str(output), "--quiet", "--json", *options]


def run(words: list[str], kill_after: float | None = None) -> tuple[int, float, int]:
    """The status, seconds and peak of memory in bytes of a process; -9 for one that was killed."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(words, stdout=said, stderr=said)
        timer = threading.Timer(kill_after or 0.0, lambda: os.kill(child.pid, signal.SIGKILL))
        if kill_after is not None:
            timer.start()
        _, status, usage = os.wait4(child.pid, 0)
        timer.cancel()
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGKILL):
            said.seek(0)
            raise SystemExit(f"{' '.join(words)}: status {code}\n{said.read().decode()[-2000:]}")
    return code, time.monotonic() - began, usage.ru_maxrss * 1024


def digest(folder: Path) -> str:
    """SHA-256 of the weight files and of the record of the pruning."""
    total = hashlib.sha256()
    for path in sorted([*folder.glob("model*.safetensors"), folder / "pruning.json"]):
        total.update(path.read_bytes())
    return total.hexdigest()


def killed(arguments: argparse.Namespace, output: Path, seconds: float, expected: str) -> Row:
    """The row of the runs that are killed at random moments."""
    draw, kills, ends, lost, spent = random.Random(arguments.seed), 0, 0, 0, 0.0
    while kills < arguments.kills:
        code, took, _ = run(command(arguments, output, True), draw.uniform(0.0, 0.6 * seconds))
        spent += took
        kills += code != 0
        if kills == arguments.kills and not output.exists():
            run(command(arguments, output, True))
        if output.exists():  # a process may have been killed while it measured the pruned model
            ends += 1
            lost += digest(output) != expected
            shutil.rmtree(output)
        print(json.dumps({"kills": kills, "ends": ends, "lost": lost}), flush=True)
    return {"way": "streamed, killed", "kills": kills, "ends": ends, "other weights": lost, "seconds": round(spent, 1)}


def main() -> None:
    """Measures all ways and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments, options = parser.parse_known_args()
    arguments.options = options
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        digests = []
        for way in ("in memory", "streamed"):
            folder = Path(scratch) / way
            _, seconds, peak = run(command(arguments, folder, way == "streamed"))
            digests.append(digest(folder))
            row = {"way": way, "seconds": round(seconds, 1), "peak_bytes": peak, "equal": digests[-1] == digests[0]}
            rows.append(row)
            print(json.dumps(rows[-1]), flush=True)
        if arguments.kills:
            rows.append(killed(arguments, Path(scratch) / "killed", rows[-1]["seconds"], digests[0]))
    model = {"model": Path(arguments.model).name, "options": arguments.options}
    result = {"environment": environment(), **model, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
