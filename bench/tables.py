"""The rows of the README's tables, made from the committed results.

python bench/tables.py
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["rows"]


def quality(name: str = "criteria-stories260K.json") -> dict[str, dict[float, tuple[float, float, float]]]:
    """Criterion -> ratio -> perplexity as a multiple of the dense model's: mean, smallest, largest over seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in _rows(name):
        times = found.setdefault(row["criterion"], {}).setdefault(row["ratio"], [])
        times.append(row["perplexity"] / row["dense"])
    return {
        criterion: {ratio: (sum(t) / len(t), min(t), max(t)) for ratio, t in ratios.items()}
        for criterion, ratios in found.items()
    }


def quality_rows() -> list[str]:
    """One row a criterion, the best at the first ratio first."""
    table = sorted(quality().items(), key=lambda item: next(iter(item[1].values()))[0])
    return [
        f"| {criterion} | "
        + " | ".join(f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in ratios.values())
        + " |"
        for criterion, ratios in table
    ]


def demo_sentence() -> str:
    """The demo model's figures at 20 %, in the README's words."""
    table = quality("criteria-demo.json")
    means = sorted((ratios[0.2][0], criterion) for criterion, ratios in table.items())
    return ", ".join(f"{criterion} {mean:.2f}" for mean, criterion in means)


def memory_rows() -> list[str]:
    """One row for each shape and distribution."""
    return [
        f"| {row['shape']} | {row['distribution']} | {row['ratio']:.3f} | {row['extra_layers']:.2f} |"
        for row in _rows("memory.json")
    ]


def pair_sentence() -> str:
    """Time of a pair in plain forwards, in the README's words."""
    times = {row["program"].removeprefix("pair, "): row["forwards"] for row in _rows("pair.json")}
    return f"{times['rademacher']:.2f} plain forwards with signs, {times['gaussian']:.2f} with Gaussian"


def conversion_rows() -> list[str]:
    """One row for each layout and type: gigabytes per second of the plain program and of ours, and their ratio."""
    return [
        f"| {row['family']} | {row['dtype']} | "
        + " | ".join(
            f"{row[f'plain_{kind}_gigabytes_per_second']:.1f} | {row[f'{kind}_gigabytes_per_second']:.1f} "
            f"| {row[f'{kind}_ratio']:.2f}"
            for kind in ("read", "write")
        )
        + " |"
        for row in _rows("conversion.json")
    ]


def main() -> None:
    """Print everything that the README quotes."""
    for line in [*quality_rows(), demo_sentence(), *memory_rows(), pair_sentence(), *conversion_rows()]:
        print(line)


if __name__ == "__main__":
    main()
