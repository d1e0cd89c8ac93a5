"""The table of bench/experts.py, as Markdown; bench/page.py puts it into docs/experts.md."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from study_tables import RESULTS, table

Row = dict[str, Any]


def experts_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each ratio, criterion and refit: multiples of the dense perplexity, mean and range over the seeds."""
    study = _study(model, results)
    if study is None:
        return []
    texts, groups = list(study["settings"]["texts"]), dict[tuple[float, str, str], list[Row]]()
    dense = _dense(study)
    for row in study["rows"]:
        if row["criterion"] != "dense" and "recovery" not in row:
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


def adapters_table(model: str, results: Path = RESULTS) -> list[str]:
    """Each row that adapters recovered, below that of all weights: multiples of the dense perplexity."""
    study = _study(model, results)
    if study is None:
        return []
    texts, dense, rows = list(study["settings"]["texts"]), _dense(study), []
    for row in study["rows"]:
        if "recovery" in row:
            same = [
                one
                for one in study["rows"]
                if one is not row and all(one[key] == row[key] for key in ("ratio", "criterion", "refit", "seed"))
            ]
            for one, trained in ((*same, "all weights"), (row, "adapters")):
                count = one.get("trained", one["parameters"])
                after = [f"{one['recovered'][text] / dense[text]:.3f}" for text in texts]
                rows.append([f"{100 * row['ratio']:.0f} %", trained, f"{count:,}", *after])
    return table(["experts removed", "trained", "parameters trained", *texts], rows)


def _study(model: str, results: Path) -> dict[str, Any] | None:
    path = results / f"experts-{model}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _dense(study: dict[str, Any]) -> dict[str, float]:
    """The perplexity of the dense model on each text."""
    return next(row for row in study["rows"] if row["criterion"] == "dense")["perplexity"]


def _order(key: tuple[float, str, str], found: list[Row], text: str) -> tuple[float, float]:
    return key[0], mean(row["perplexity"][text] for row in found)


def _span(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _recovered(found: list[Row], text: str, dense: float) -> str:
    values = [row["recovered"][text] / dense for row in found if row["recovered"]]
    return _span(values) if values else ""
