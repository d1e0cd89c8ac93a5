"""The evaluation of a dense model and of models made from it: tasks, perplexity, comparison, samples.

    python bench/evaluation.py dense=FOLDER pruned=FOLDER [NAME=FOLDER ...] --include-path FOLDER --tasks NAME,NAME
        --text NAME=FILE [--text NAME=FILE] [--limit 500] [--prompt TEXT] --output bench/results/evaluation-NAME.json

The first model is the dense one. A row is one model and one part: a task, `texts` (the perplexity on each), `compare`
(the changes of the next-token probabilities on the first text) or `samples` (greedy texts). Every row is measured in a
process of its own and written at once; an interrupted evaluation continues where it was. bench/local_tasks.py writes
tasks from local files.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environment import commit
from processes import FLAG, cost, end_with_parent, launch
from study import evaluation_windows, named_text, read, write

from minillm_jax import api, comparing, generating
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.evaluation import tasks
from minillm_jax.evaluation.tasks import TaskSettings
from minillm_jax.model.tree import parameter_count

TEXTS, COMPARE, SAMPLES = "texts", "compare", "samples"
PROMPTS = ("The capital of France is", "Once upon a time, there was a little", "Water boils when", "def add(a, b):")

Row = dict[str, Any]


def measure(row: Row) -> Row:
    """The result of one row."""
    model, part = api.load(row["folder"], "float32"), row["part"]
    if part == TEXTS:
        found: Row = {"perplexity": {name: _perplexity(model, path, row) for name, path in row["texts"].items()}}
    elif part == COMPARE:
        found = {"compare": _comparison(model, row)}
    elif part == SAMPLES:
        found = {"samples": dict(zip(row["prompts"], generating.generate(model, row["prompts"], 40), strict=True))}
    else:
        settings = TaskSettings((part,), limit=row["limit"], include_path=row["include_path"])
        scored = tasks.scores_of(model, tasks.questions_of(settings), settings)
        found = {"scores": [score._asdict() for score in scored.scores], "lm_eval": scored.harness}
    return {"parameters": parameter_count(model.decoder), **found, **cost()}


def _windows(model: Any, path: str, row: Row) -> Batches:
    return evaluation_windows(Path(path), model.folder, row["windows"], 128)


def _perplexity(model: Any, path: str, row: Row) -> float:
    return api.evaluate(model, _windows(model, path, row)).perplexity


def _comparison(model: Any, row: Row) -> Row:
    """The means of a comparison with the dense model."""
    dense = api.load(row["dense"], "float32")
    found = comparing.compare(dense, model, _windows(dense, next(iter(row["texts"].values())), row), draft=0)
    return {key: mean._asdict() for key, mean in found.measured.others[0].means.items()}


def rows(models: dict[str, str], parts: list[str], shared: Row, kept: list[Row]) -> Iterator[list[Row]]:
    """All rows after each new one; those of a row that fails are printed and left out."""
    dense = next(iter(models.values()))
    for part in parts:
        for name, folder in models.items():
            made = any((row["name"], row["part"]) == (name, part) for row in kept)
            if made or (part == COMPARE and folder == dense):
                continue
            try:
                found = launch(Path(__file__), shared | {"folder": folder, "dense": dense, "part": part})
            except RuntimeError as error:
                print(f"failed: {name}, {part}: {error}", file=sys.stderr, flush=True)
                continue
            kept = [*kept, {"name": name, "part": part} | found | {"commit": commit()}]
            yield kept


def main() -> None:
    """Measure one row for the flag `--row`, or all rows."""
    if sys.argv[1:2] == [FLAG]:
        end_with_parent()
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--include-path", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--text", type=named_text, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    parser.add_argument("--windows", type=int, default=93, help="windows of 128 tokens of each text")
    parser.add_argument("--prompt", action="append", help="a prompt of the samples; may be given again")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    models = dict(one.split("=", 1) for one in arguments.models)
    numbers = {"limit": arguments.limit, "windows": arguments.windows, "prompts": arguments.prompt or list(PROMPTS)}
    settings = numbers | {"texts": {name: path.name for name, path in arguments.text}}
    try:
        kept = read(arguments.output, settings)
    except InputError as error:
        sys.exit(f"error: {error}")
    shared = numbers | {
        "include_path": arguments.include_path,
        "texts": {name: str(path) for name, path in arguments.text},
    }
    for made in rows(models, [*arguments.tasks.split(","), TEXTS, COMPARE, SAMPLES], shared, kept):
        write(arguments.output, settings, made)
        print(json.dumps(made[-1])[:400], flush=True)


if __name__ == "__main__":
    main()
