"""Time and compilation of a pruning by the default recipe: seconds of every stage, and the programs that XLA compiled.

    python bench/compilation.py MODEL --calibration FILE (--ratio 0.2 | --target-params 110M) [--output FILE]

The pruning runs once, in this process, with empty caches. The JSON holds the seconds of loading and pruning, the number
of compiled programs and their compile time by name, the largest memory of the device (on a CPU, of the process), and
the XLA flags. The number of programs must not depend on the number of layers, nor on how many groups each layer keeps.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
from environment import environment, peak_bytes

from minillm_jax import api
from minillm_jax.model.tree import layer_count, parameter_count
from minillm_jax.options import COUNT

COMPILED = "/jax/core/compile/backend_compile_duration"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of one pruning."""
    compiled: dict[str, list[float]] = defaultdict(list)

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == COMPILED:
            compiled[str(details.get("fun_name")).removeprefix("jit(").removesuffix(")")].append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    started = time.perf_counter()
    model = api.load(arguments.model)
    loaded = time.perf_counter()
    size = {"ratio": arguments.ratio} if arguments.target_params is None else {"target_params": arguments.target_params}
    pruned = api.prune(model, arguments.calibration, **size)
    done = time.perf_counter()
    longest = sorted(compiled.items(), key=lambda item: -sum(item[1]))
    return {
        "model": Path(arguments.model).name,
        "layers": layer_count(model.decoder),
        "parameters": [parameter_count(one.decoder) for one in (model, pruned)],
        "seconds": {"load": round(loaded - started, 1), "prune": round(done - loaded, 1)},
        "programs": sum(len(times) for times in compiled.values()),
        "compile_seconds": round(sum(sum(times) for times in compiled.values()), 1),
        "longest": {name: [len(times), round(sum(times), 2)] for name, times in longest[:8]},
        "peak_bytes": peak_bytes(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of Hugging Face")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--target-params", type=COUNT.read, help="parameters that are left, in place of the ratio")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    row = measure(arguments)
    print(json.dumps(row), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"environment": environment(), "rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
