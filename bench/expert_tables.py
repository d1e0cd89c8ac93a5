"""The table of bench/experts.py, as Markdown; bench/page.py puts it into docs/experts.md."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from study_tables import RESULTS, table

Row = dict[str, Any]


def experts_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each ratio, criterion and refit: multiples of the dense perplexity, mean and range over the seeds."""
    path = results / f"experts-{model}.json"
    if not path.exists():
        return []
    study = json.loads(path.read_text())
    texts, groups = list(study["settings"]["texts"]), dict[tuple[float, str, str], list[Row]]()
    dense = next(row for row in study["rows"] if row["criterion"] == "dense")["perplexity"]
    for row in study["rows"]:
        if row["criterion"] != "dense":
            groups.setdefault((row["ratio"], row["criterion"], row["refit"]), []).append(row)
    rows = [
        [
            f"{100 * ratio:.0f} %",
            f"`{criterion}`",
            refit,
            *(_span([row["perplexity"][text] / dense[text] for row in found]) for text in texts),
            *(_recovered(found, text, dense[text]) for text in texts),
        ]
        for (ratio, criterion, refit), found in sorted(groups.items(), key=lambda item: _order(*item, texts[0]))
    ]
    heads = ["experts removed", "criterion", "refit", *texts, *(f"{text}, recovered" for text in texts)]
    return table(heads, rows)


def _order(key: tuple[float, str, str], found: list[Row], text: str) -> tuple[float, float]:
    return key[0], mean(row["perplexity"][text] for row in found)


def _span(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _recovered(found: list[Row], text: str, dense: float) -> str:
    values = [row["recovered"][text] / dense for row in found if row["recovered"]]
    return _span(values) if values else ""
