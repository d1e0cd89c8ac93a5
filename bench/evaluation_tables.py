"""Tables of harness.py, harness_folders.py and evaluation.py as Markdown, which page.py puts into evaluation.md."""

import json
from pathlib import Path
from typing import Any

from study_tables import RESULTS, grid, table

Row = dict[str, Any]


def harness_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each task: requests a second, differences of the log-likelihoods, and their errors."""
    path = results / f"harness-{model}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())["rows"]
    rows = [
        [
            row["task"].removesuffix("_local"),
            str(row["requests"]),
            f"{row['ours']:.1f}",
            f"{row['theirs']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.1e}",
            f"{row['error']['ours']:.1e}",
            f"{row['error']['theirs']:.1e}",
            "yes" if row["same_answers"] else "no",
        ]
        for row in found
    ]
    requests = sum(row["requests"] for row in found)
    speeds = [requests / sum(row["requests"] / row[name] for row in found) for name in ("ours", "theirs")]
    rows.append(["all", str(requests), *(f"{one:.1f}" for one in speeds), f"{speeds[0] / speeds[1]:.2f}", *[""] * 4])
    heads = ["task", "requests", "ours, a second", "lm-eval's class", "ratio"]
    return table([*heads, "largest difference", "error of ours", "error of lm-eval's class", "same choices"], rows)


def folders_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each task and metric: the score by lm_eval and by this package, of a folder of every format."""
    path = results / f"harness-folders-{model}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())["rows"]
    forms = list(dict.fromkeys(row["format"] for row in found))
    lines: dict[str, dict[str, str]] = {}
    for row in found:
        scores = f"{100 * row['lm_eval']:.1f} / {100 * row['ours']:.1f}"
        lines.setdefault(f"{row['task'].removesuffix('_local')}, {row['metric']}", {})[row["format"]] = scores
    return grid("", forms, lines)


def evaluation_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each figure and a column for each model: perplexities, comparison with the dense model, tasks."""
    path = results / f"evaluation-{model}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())["rows"]
    names = list(dict.fromkeys(row["name"] for row in found))
    lines: dict[str, dict[str, str]] = {"parameters": {row["name"]: f"{row['parameters']:,}" for row in found}}
    for row in sorted(found, key=lambda row: "scores" in row):
        for figure, text in _figures(row).items():
            lines.setdefault(figure, {})[row["name"]] = text
    return grid("", names, lines)


def samples_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each prompt and model: what it writes, greedily."""
    path = results / f"evaluation-{model}.json"
    if not path.exists():
        return []
    found = [row for row in json.loads(path.read_text())["rows"] if "samples" in row]
    prompts = found[0]["samples"] if found else {}
    rows = [[_one_line(prompt), row["name"], _one_line(row["samples"][prompt])] for prompt in prompts for row in found]
    return table(["prompt", "model", "continuation"], rows)


def _one_line(text: str) -> str:
    """A text as a cell of a table."""
    return text.strip().replace("\n", " ⏎ ").replace("|", "\\|")


def _figures(row: Row) -> dict[str, str]:
    """Name of a figure -> its text, of one row."""
    if "perplexity" in row:
        return {f"perplexity, {name}": f"{value:.2f}" for name, value in row["perplexity"].items()}
    if "compare" in row:
        shown = {
            "divergence": "KL(dense ‖ model), nats",
            "agreement": "same top token",
            "acceptance": "expected acceptance",
        }
        means = row["compare"]
        return {words: f"{means[key]['value']:.3f}" for key, words in shown.items() if key in means}
    return {
        f"{score['task'].removesuffix('_local')}, {score['metric']}": f"{100 * score['value']:.1f}"
        + ("" if score["error"] is None else f" ± {100 * score['error']:.1f}")
        for score in row.get("scores", ())
    }
