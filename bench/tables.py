"""The rows of the README's tables, made from the committed results.

python bench/tables.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["rows"]


MODELS = ("stories260K", "opt-3m", "bloom-3m", "demo_model")

# What the README shows of the study: the presets, and the controls.
SHOWN = (
    "obs + least squares, measured",
    "obs + least squares",
    "wanda + least squares",
    "noise + least squares",
    "wanda",
    "flap",
    "element-1, exact",
    "mixed, exact",
    "noise",
    "fms",
    "magnitude",
    "random",
)


def quality(model: str) -> dict[str, dict[float, tuple[float, float, float]]]:
    """Recipe -> ratio -> perplexity as a multiple of the dense model's: mean, smallest, largest over seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in _rows(f"quality-{model}.json"):
        times = found.setdefault(row["recipe"], {}).setdefault(row["ratio"], [])
        times.append(row["perplexity"] / row["dense"])
    return {
        recipe: {ratio: (sum(t) / len(t), min(t), max(t)) for ratio, t in ratios.items()}
        for recipe, ratios in found.items()
    }


def quality_rows(model: str, shown: Sequence[str] | None = None) -> list[str]:
    """One row a recipe, the best at the highest ratio first."""
    table = sorted(quality(model).items(), key=lambda item: max(item[1].items())[1][0])
    return [
        f"| {recipe} | " + " | ".join(f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in ratios.values()) + " |"
        for recipe, ratios in table
        if shown is None or recipe in shown
    ]


def cost_rows() -> list[str]:
    """One row a recipe: seconds of a pruning, median over ratios and seeds, and the highest memory, by model."""
    cells: dict[str, dict[str, str]] = {}
    for model in MODELS:
        taken: dict[str, list[dict[str, Any]]] = {}
        for row in _rows(f"quality-{model}.json"):
            taken.setdefault(row["recipe"], []).append(row)
        for recipe, rows in taken.items():
            seconds, peak = median(row["seconds"] for row in rows), max(row["peak_bytes"] for row in rows)
            cells.setdefault(recipe, {})[model] = f"{seconds:.1f} s, {peak / 1e6:,.0f} MB"
    return [f"| {recipe} | {' | '.join(found.get(model, '') for model in MODELS)} |" for recipe, found in cells.items()]


def beaten_rows(ours: str = "obs + least squares") -> list[str]:
    """Where another recipe beats the default on the mean of the seeds: both figures."""
    rows = []
    for model in MODELS:
        table = quality(model)
        for recipe, ratios in table.items():
            for ratio, (mean, _, _) in ratios.items():
                if recipe != ours and mean < table[ours][ratio][0]:
                    rows.append(f"| {model} | {ratio:.0%} | {recipe} | {mean:.3f} | {table[ours][ratio][0]:.3f} |")
    return rows


def refit_rows() -> list[str]:
    """One row for each part of a layer, then the layer: seconds by solver, median over the layers but the first."""
    cells: dict[str, list[str]] = {}
    for name in ("refit.json", "refit-device.json"):
        rows = [row for row in _rows(name) if row["kind"] == "layer"][1:]
        parts = [key for key in rows[0] if key not in ("kind", "layer", "seconds")]
        for part in [*parts, "seconds"]:
            cells.setdefault(part, []).append(f"{median(row[part] for row in rows):.1f}")
    return [f"| {'the layer' if part == 'seconds' else part} | {' | '.join(found)} |" for part, found in cells.items()]


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


def _kind(name: str, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind, without those that did not fit the device."""
    return [row for row in _rows(name) if row["kind"] == kind and "error" not in row]


def estimate_rows() -> list[str]:
    """One row for each of our estimators: plain forwards for a pair or a direction, and the aim."""
    return [
        f"| {row['shape']} | {row['program']} | {row['ratio']:.2f} | {_or_nothing(row['aim'])} |"
        for row in _kind("estimate.json", "time")
        if row["library"] == "minillm-jax" and row["program"] != "forward"
    ]


def estimate_torch_rows() -> list[str]:
    """One row for each program that both have: milliseconds of PyTorch and of ours, how many times faster, the aim."""
    times = {(row["shape"], row["program"]): row["seconds"] for row in _kind("estimate.json", "time")}
    return [
        f"| {row['shape']} | {row['program']} | {1e3 * times[row['shape'], row['torch']]:.0f} "
        f"| {1e3 * row['seconds']:.0f} | {row['times_faster']:.2f} | {_or_nothing(row['times_faster_aim'])} |"
        for row in _kind("estimate.json", "time")
        if "torch" in row
    ]


def estimate_memory_rows() -> list[str]:
    """One row for each shape, type and estimator: temporary memory beyond the forward's, in MB, layers, streams."""
    return [
        f"| {row['shape']} | {row['dtype']} | {row['program']} | {row['extra_bytes'] / 1e6:.1f} "
        f"| {row['extra_layers']:.2f} | {row['extra_streams']:.1f} | {_or_nothing(row['aim'])} |"
        for row in _kind("estimate.json", "memory")
        if row["program"] != "forward"
    ]


def process_rows() -> list[str]:
    """One row for each program run alone, in MB: of the weights, with the weights in place, and at most."""
    return [
        f"| {row['library']} | {row['program'].removeprefix('torch, ')} | "
        + " | ".join(f"{row[f'{key}_bytes'] / 1e6:.0f}" for key in ("weight", "weights_peak", "peak"))
        + " |"
        for row in _kind("estimate.json", "process")
    ]


def forward_rows() -> list[str]:
    """One row for each model, batch and length: tokens per second, and utilisation in percent."""
    return [
        f"| {row['model']} | {row['dtype']} | {row['batch']} × {row['length']} | {row['tokens_per_second']:,.0f} "
        f"| {100 * row['mfu']:.0f} % |"
        for row in _kind("forward.json", "forward")
    ]


def compile_rows() -> list[str]:
    """One row for each depth: seconds of lowering and compiling, and their ratio to the first depth."""
    return [
        f"| {row['layers']} | {row['seconds']:.2f} | {row['ratio']:.2f} |" for row in _kind("forward.json", "compile")
    ]


def fidelity_rows() -> list[str]:
    """One row for each model and estimator at its most directions: cosine, then rank correlations with removal."""
    found = []
    for model in MODELS:
        study = json.loads((RESULTS / f"fidelity-{model}.json").read_text())
        most = max(row["directions"] for row in study["estimators"])
        for name in dict.fromkeys(row["estimator"] for row in study["estimators"]):
            rows = [row for row in study["estimators"] if row["estimator"] == name]
            rows = [row for row in rows if row["directions"] in (0, most)]
            criteria = ("fms", "first order", "gate", "gate-square")
            cells = [_mean(rows, "cosine"), *(_correlation(rows, criterion) for criterion in criteria)]
            found.append(f"| {model} | {name} | {rows[0]['directions'] or ''} | {' | '.join(cells)} |")
    return found


def plain_rows() -> list[str]:
    """One row for each criterion without a gradient: its rank correlation with removal on every model."""
    studies = {m: json.loads((RESULTS / f"fidelity-{m}.json").read_text())["plain"] for m in MODELS}
    names = dict.fromkeys(row["criterion"] for row in studies[MODELS[0]])
    return [
        f"| {name} | "
        + " | ".join(_correlation([r for r in rows if r["criterion"] == name], "removal") for rows in studies.values())
        + " |"
        for name in names
    ]


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if key in row]
    return f"{sum(values) / len(values):.3f}" if values else ""


def _correlation(rows: list[dict[str, Any]], key: str) -> str:
    """Of heads and of channels, the mean over seeds."""
    found = [row[key] for row in rows if key in row]
    if not found:
        return ""
    return " / ".join(f"{sum(one[kind] for one in found) / len(found):.2f}" for kind in ("head", "channel"))


def _or_nothing(aim: float | None) -> str:
    return "" if aim is None else f"{aim:.2f}"


def main() -> None:
    """Print everything that the README quotes."""
    lines = [row for model in MODELS for row in quality_rows(model)]
    lines += [*cost_rows(), *beaten_rows(), *refit_rows(), *conversion_rows(), *fidelity_rows(), *plain_rows()]
    lines += [*estimate_rows(), *estimate_torch_rows(), *estimate_memory_rows(), *process_rows()]
    lines += [*forward_rows(), *compile_rows()]
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
