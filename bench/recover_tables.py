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
            f"{100 * target:.0f} %" if target < 1 else f"{target / 1e6:.2f}M",
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


def _multiple(rows: list[Row], key: str, text: str) -> float:
    return mean(row[key][text] / row["dense"][text] for row in rows)
