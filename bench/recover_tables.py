"""Tables of bench/recover.py and bench/recover_speed.py, as Markdown; bench/page.py puts them into docs/recovery.md."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from study_tables import RESULTS, table

Row = dict[str, Any]


def speed_table(shape: str, results: Path = RESULTS) -> list[str]:
    """A row for each program: milliseconds of a step, tokens a second, memory; and ratios to PEFT."""
    path = results / f"recover-speed-{shape}.json"
    if not path.exists():
        return []
    rows = [
        [
            row["program"],
            f"{1000 * row['seconds']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed']:.2f}",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{row['memory']:.2f}",
        ]
        for row in json.loads(path.read_text())["rows"]
    ]
    heads = ["program", "ms a step", "tokens a second", "speed, PEFT = 1", "peak memory", "memory, PEFT = 1"]
    return table(heads, rows)


def recovery_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each method and target: multiples of the dense perplexity after pruning and after recovery.

    With several seeds a cell holds the mean.
    """
    path = results / f"recover-{model}.json"
    if not path.exists():
        return []
    study = json.loads(path.read_text())
    texts, groups = list(study["settings"]["texts"]), dict[tuple[float, str], list[Row]]()
    for row in study["rows"]:
        groups.setdefault((row["target"], row["method"]), []).append(row)
    first = texts[0]
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], _multiple(item[1], "perplexity", first)))
    rows = [
        [
            _target(target),
            f"`{method}`",
            str(len(found)),
            *(f"{_multiple(found, key, text):.3f}" for text in texts for key in ("perplexity_before", "perplexity")),
            f"{mean(row['tokens'] for row in found):,.0f}",
            f"{mean(row['recovery_seconds'] for row in found):,.0f}",
        ]
        for (target, method), found in ordered
    ]
    heads = ["target", "method", "seeds", *(f"{text}, {when}" for text in texts for when in ("pruned", "recovered"))]
    return table([*heads, "tokens", "seconds"], rows)


# Results with adapters of rank 8, beside those of rank 32 with the same learning rate.
RANKS = {
    "SmolLM2-135M-rank-32": "SmolLM2-135M",
    "stories260K-rank-32": "stories260K",
    "opt-3m-rank-32": "opt-3m-rate-0.01",
}


def rank_table(_: str = "", results: Path = RESULTS) -> list[str]:
    """A row for each model, target, method and text that was measured with both ranks, of the first seed."""
    rows = []
    for larger, smaller in RANKS.items():
        before, after = (_first_seed(results / f"recover-{name}.json") for name in (smaller, larger))
        for target, method in sorted(before.keys() & after.keys()):
            pair = before[target, method], after[target, method]
            for text in pair[0]["dense"]:
                cells = (f"{_multiple([row], 'perplexity', text):.3f}" for row in pair)
                name = larger.removesuffix("-rank-32")
                rows.append([name, _target(target), f"`{method}`", text, *cells])
    return table(["model", "target", "method", "text", "rank 8", "rank 32"], rows)


def _first_seed(path: Path) -> dict[tuple[float, str], Row]:
    rows = json.loads(path.read_text())["rows"]
    return {(row["target"], row["method"]): row for row in rows if row["seed"] == 0}


def _target(target: float) -> str:
    return f"{100 * target:.0f} %" if target < 1 else f"{target / 1e6:.2f}M"


def _multiple(rows: list[Row], key: str, text: str) -> float:
    return mean(row[key][text] / row["dense"][text] for row in rows)
