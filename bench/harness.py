"""Requests of lm-eval, answered by this package and by lm-eval's own model class of transformers: agreement and speed.

    python bench/harness.py MODEL [MODEL ...] --include-path FOLDER --tasks NAME,NAME [--limit 100]
        --output bench/results/harness-NAME.json

MODEL is a folder that transformers loads without remote code. bench/local_tasks.py writes tasks from local files. Both
answer the same requests of each task in turn: first once, with all compilation, then `--rounds` times. lm-eval's class
runs with each of `--batch-sizes`, and its best one counts. A row is one model and task:

    requests, difference    number of requests; largest difference of a log-likelihood, nats
    same_answers            whether the accuracies are equal
    ours, theirs            requests a second, the median round
    first                   requests a second of our first round, with compilation
    ratio                   ours / theirs
    error                   for the first `--exact` requests, the largest difference of each from lm-eval's class in
                            float64, nats
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from environment import commit, environment
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from minillm_jax import api
from minillm_jax.errors import shortened
from minillm_jax.evaluation.harness import Harness
from minillm_jax.evaluation.tasks import TaskSettings, questions_of

Answer = Callable[[list[Instance]], list[tuple[float, bool]]]


def requests_of(task: Any, limit: int) -> list[Instance]:
    """The log-likelihood requests of the first questions of a task."""
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [request for request in task.instances if request.request_type == "loglikelihood"]


def timed(answer: Answer, requests: list[Instance]) -> tuple[float, list[float]]:
    """Requests a second, and the log-likelihoods."""
    started = time.perf_counter()
    found = answer(requests)
    return len(requests) / (time.perf_counter() - started), [log for log, _ in found]


def choices(requests: Sequence[Instance], logs: Sequence[float]) -> list[int]:
    """The most probable choice of every question."""
    by_question: dict[int, list[float]] = {}
    for request, log in zip(requests, logs, strict=True):
        by_question.setdefault(int(request.doc_id or 0), []).append(log)
    return [int(np.argmax(values)) for values in by_question.values()]


def measure(folder: str, task: Any, arguments: argparse.Namespace, ours: Harness, theirs: Any) -> dict[str, Any]:
    """One row."""
    requests = requests_of(task, arguments.limit)
    first, logs = timed(ours.loglikelihood, requests)
    speeds: dict[str, list[float]] = {"ours": []} | {str(size): [] for size in arguments.batch_sizes}
    expected: list[float] = []
    for _ in range(arguments.rounds):
        speeds["ours"].append(timed(ours.loglikelihood, requests)[0])
        for size in arguments.batch_sizes:
            theirs.batch_size_per_gpu = size
            speed, expected = timed(partial(theirs.loglikelihood, disable_tqdm=True), requests)
            speeds[str(size)].append(speed)
    medians = {name: float(np.median(values)) for name, values in speeds.items()}
    theirs.model.double()
    exact = theirs.loglikelihood(requests[: arguments.exact], disable_tqdm=True)
    theirs.model.float()
    error = {
        name: float(np.max(np.abs(np.subtract(found[: len(exact)], [log for log, _ in exact]))))
        for name, found in (("ours", logs), ("theirs", expected))
    }
    best = max(arguments.batch_sizes, key=lambda size: medians[str(size)])
    return {
        "model": Path(folder).name,
        "task": task.config.task,
        "requests": len(requests),
        "difference": float(np.max(np.abs(np.subtract(logs, expected)))),
        "error": error,
        "same_answers": choices(requests, logs) == choices(requests, expected),
        "first": round(first, 3),
        "ours": round(medians["ours"], 3),
        "theirs": round(medians[str(best)], 3),
        "batch_size": best,
        "ratio": round(medians["ours"] / medians[str(best)], 3),
    }


def main() -> None:
    """Measure all rows, and write them after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--include-path", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--limit", type=int, default=100, help="questions of each task")
    parser.add_argument("--exact", type=int, default=32, help="requests that are answered in float64 too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens-per-batch", type=int, help="of our batches")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    names = tuple(arguments.tasks.split(","))
    settings, rows = TaskSettings(names, limit=arguments.limit, include_path=arguments.include_path), []
    tasks = questions_of(settings)
    for folder in arguments.models:
        ours = Harness(api.load(folder, "float32"), arguments.tokens_per_batch)
        theirs = cast(Any, HFLM)(folder, device="cpu", dtype=torch.float32, batch_size=1)
        for task in tasks:
            row = measure(folder, task, arguments, ours, theirs) | {"commit": commit()}
            print(shortened(json.dumps(row), 500), flush=True)
            rows.append(row)
            written = {"environment": environment(), "settings": {"limit": arguments.limit}, "rows": rows}
            arguments.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
