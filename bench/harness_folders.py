"""The command lm_eval on written folders, beside `minillm-jax eval` on the same folders: equal scores or not.

    python bench/harness_folders.py stock=FOLDER per-layer=FOLDER padded=FOLDER --include-path FOLDER --tasks NAME,NAME
        [--limit 100] --output bench/results/harness-folders-NAME.json

A row is one folder, task and metric: the score by `lm_eval --model hf`, which loads the folder with transformers (a
per-layer folder with trust_remote_code), and by `minillm-jax eval`, both in float32. bench/local_tasks.py writes tasks
from local files.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import commit, environment

Scores = dict[tuple[str, str], float]


def by_lm_eval(folder: str, remote_code: bool, options: list[str], batch: int) -> tuple[Scores, str]:
    """Task and metric -> score, by the command of lm-eval; and its version."""
    arguments = f"pretrained={folder},dtype=float32" + (",trust_remote_code=True" if remote_code else "")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
        command += ["--batch_size", str(batch), "--output_path", scratch, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (written,) = Path(scratch).rglob("results_*.json")
        found = json.loads(written.read_text())
    scores = {
        (task, metric.removesuffix(",none")): value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if metric.endswith(",none") and not metric.endswith("_stderr,none")
    }
    return scores, found["lm_eval_version"]


def by_ours(folder: str, options: list[str]) -> Scores:
    """Task and metric -> score, by the command of this package."""
    command = [sys.executable, "-m", "minillm_jax", "eval", folder, "--dtype", "float32", "--quiet", "--json", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (model,) = json.loads(done.stdout)["models"]
    return {(score["task"], score["metric"]): score["value"] for score in model["scores"]}


def rows_of(form: str, folder: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one folder."""
    common = ["--tasks", arguments.tasks, "--limit", str(arguments.limit)]
    remote_code = "auto_map" in json.loads(Path(folder, "config.json").read_text())
    theirs, version = by_lm_eval(
        folder, remote_code, [*common, "--include_path", arguments.include_path], arguments.batch_size
    )
    ours = by_ours(folder, [*common, "--include-path", arguments.include_path])
    if ours.keys() != theirs.keys():
        raise SystemExit(f"error: {folder}: other metrics: {sorted(ours)}, not {sorted(theirs)}")
    return [
        {"format": form, "task": task, "metric": metric, "ours": ours[key], "lm_eval": theirs[key], "version": version}
        | {"remote_code": remote_code, "commit": commit()}
        for key in ours
        for task, metric in [key]
    ]


def main() -> None:
    """Measure all folders, and write the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FORMAT=FOLDER")
    parser.add_argument("--include-path", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--limit", type=int, default=100, help="questions of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval")
    parser.add_argument("--output", type=Path, required=True)
    arguments, rows = parser.parse_args(), []
    for form, _, folder in (one.partition("=") for one in arguments.folders):
        rows += rows_of(form, folder, arguments)
        settings = {"limit": arguments.limit, "tasks": arguments.tasks.split(",")}
        written = {"environment": environment(), "settings": settings, "rows": rows}
        arguments.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
