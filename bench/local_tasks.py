"""Tasks of lm-eval from local files of questions, for machines without a connection to the Hub.

    python bench/local_tasks.py OUTPUT NAME=FILE.jsonl [NAME=FILE.jsonl ...]

Writes a folder for `minillm-jax eval --include-path OUTPUT --tasks NAME,...`. A file holds one question a line, in one
of three forms: `query`, `choices`, `gold`; `context_options`, `continuation`, `gold` (Winogrande's, where the choice
stands before the continuation); or `sentence_good`, `sentence_bad` (BLiMP's). Prompts are those of the file, so that
figures compare within one folder of tasks, and not with the tasks of the same name on the Hub.
"""

import argparse
import json
from pathlib import Path
from typing import Any

METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]

# Fields of a form -> keys of the task.
FORMS: dict[tuple[str, ...], dict[str, Any]] = {
    ("choices", "gold", "query"): {
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": METRICS,
    },
    ("context_options", "continuation", "gold"): {
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": METRICS[:1],
    },
    ("sentence_bad", "sentence_good"): {
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": METRICS[:1],
    },
}


def task(name: str, file: Path) -> dict[str, Any]:
    """The keys of a task whose questions stand in a file."""
    with file.open(encoding="utf-8") as lines:
        fields = set(json.loads(next(lines)))
    form = next((keys for names, keys in FORMS.items() if fields.issuperset(names)), None)
    if form is None:
        raise SystemExit(f"error: {file}: no known form of questions, found the fields {', '.join(sorted(fields))}")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        **form,
        "metadata": {"version": 1.0},
    }


def write(output: Path, files: dict[str, Path]) -> None:
    """Write a file for each task. JSON is YAML."""
    output.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        (output / f"{name}.yaml").write_text(json.dumps(task(name, file), indent=2), encoding="utf-8")


def main() -> None:
    """Write the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    arguments = parser.parse_args()
    write(arguments.output, {name: Path(file) for name, _, file in (one.partition("=") for one in arguments.files)})


if __name__ == "__main__":
    main()
