"""Rows of the Markdown tables in docs/ and in the README, made from the committed results.

    python bench/tables.py

docs/quality.md, docs/benchmarks.md and docs/fidelity.md hold most of the tables. The README holds the quality table of
stories260K. `tests/test_readme.py` compares the pages with these rows. Every function takes the folder of the results.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _rows(results: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((results / name).read_text())["rows"]


MODELS = ("stories260K", "opt-3m", "bloom-3m", "demo_model")

# The recipes of the README's quality table: those of the package and the controls.
SHOWN = (
    "ours",
    "noise + least squares",
    "wanda",
    "flap",
    "element-1, exact",
    "noise",
    "fms",
    "random",
)


def quality(model: str, results: Path = RESULTS) -> dict[str, dict[float, tuple[float, float, float]]]:
    """Recipe -> ratio -> perplexity as a multiple of the dense model's: mean, smallest, largest over seeds."""
    multiples: dict[str, dict[float, list[float]]] = {}
    for row in _rows(results, f"quality-{model}.json"):
        by_ratio = multiples.setdefault(row["recipe"], {})
        by_ratio.setdefault(row["ratio"], []).append(row["perplexity"] / row["dense"])
    return {
        recipe: {ratio: (sum(m) / len(m), min(m), max(m)) for ratio, m in by_ratio.items()}
        for recipe, by_ratio in multiples.items()
    }


def quality_rows(model: str, shown: Sequence[str] | None = None, results: Path = RESULTS) -> list[str]:
    """One row a recipe, in ascending order of perplexity at the highest ratio."""
    table = sorted(quality(model, results).items(), key=lambda item: max(item[1].items())[1][0])
    return [
        f"| {recipe} | " + " | ".join(f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in ratios.values()) + " |"
        for recipe, ratios in table
        if shown is None or recipe in shown
    ]


def cost_rows(results: Path = RESULTS) -> list[str]:
    """One row a recipe: by model, the seconds of a pruning (median over ratios and seeds) and the highest memory."""
    cells: dict[str, dict[str, str]] = {}
    for model in MODELS:
        by_recipe: dict[str, list[dict[str, Any]]] = {}
        for row in _rows(results, f"quality-{model}.json"):
            by_recipe.setdefault(row["recipe"], []).append(row)
        for recipe, rows in by_recipe.items():
            seconds, peak = median(row["seconds"] for row in rows), max(row["peak_bytes"] for row in rows)
            cells.setdefault(recipe, {})[model] = f"{seconds:.1f} s, {peak / 1e6:,.0f} MB"
    return [f"| {recipe} | {' | '.join(row.get(model, '') for model in MODELS)} |" for recipe, row in cells.items()]


def beaten_rows(default: str = "ours", results: Path = RESULTS) -> list[str]:
    """One row for each model, ratio and recipe with a lower mean perplexity than the default: both perplexities.

    Models on which the default was not measured have no rows.
    """
    rows = []
    for model in MODELS:
        table = quality(model, results)
        for recipe, ratios in table.items() if default in table else ():
            for ratio, (mean, _, _) in ratios.items():
                if recipe != default and mean < table[default][ratio][0]:
                    rows.append(f"| {model} | {ratio:.0%} | {recipe} | {mean:.3f} | {table[default][ratio][0]:.3f} |")
    return rows


def refit_rows(results: Path = RESULTS) -> list[str]:
    """One row for each part of a layer, then the total: seconds by solver, median over all layers but the first."""
    cells: dict[str, list[str]] = {}
    for name in ("refit.json", "refit-device.json"):
        rows = [row for row in _rows(results, name) if row["kind"] == "layer"][1:]
        parts = [key for key in rows[0] if key not in ("kind", "layer", "seconds")]
        for part in [*parts, "seconds"]:
            cells.setdefault(part, []).append(f"{median(row[part] for row in rows):.1f}")
    return [f"| {'total' if part == 'seconds' else part} | {' | '.join(row)} |" for part, row in cells.items()]


def conversion_rows(results: Path = RESULTS) -> list[str]:
    """One row for each layout and type: gigabytes per second of the plain program and of minillm-jax, and the ratio."""
    return [
        f"| {row['family']} | {row['dtype']} | "
        + " | ".join(
            f"{row[f'plain_{kind}_gigabytes_per_second']:.1f} | {row[f'{kind}_gigabytes_per_second']:.1f} "
            f"| {row[f'{kind}_ratio']:.2f}"
            for kind in ("read", "write")
        )
        + " |"
        for row in _rows(results, "conversion.json")
    ]


def _kind(results: Path, name: str, kind: str) -> list[dict[str, Any]]:
    """The rows of a kind, without the programs that ran out of memory."""
    return [row for row in _rows(results, name) if row["kind"] == kind and "error" not in row]


def estimate_rows(results: Path = RESULTS) -> list[str]:
    """One row for each estimator of minillm-jax: plain forwards for a pair or a direction, and the aim."""
    return [
        f"| {row['shape']} | {row['program']} | {row['ratio']:.2f} | {_or_nothing(row['aim'])} |"
        for row in _kind(results, "estimate.json", "time")
        if row["library"] == "minillm-jax" and row["program"] != "forward"
    ]


def estimate_torch_rows(results: Path = RESULTS) -> list[str]:
    """One row for each program in both libraries: milliseconds of PyTorch and of minillm-jax, times faster, aim."""
    times = {(row["shape"], row["program"]): row["seconds"] for row in _kind(results, "estimate.json", "time")}
    return [
        f"| {row['shape']} | {row['program']} | {1e3 * times[row['shape'], row['torch']]:.0f} "
        f"| {1e3 * row['seconds']:.0f} | {row['times_faster']:.2f} | {_or_nothing(row['times_faster_aim'])} |"
        for row in _kind(results, "estimate.json", "time")
        if "torch" in row
    ]


def estimate_memory_rows(results: Path = RESULTS) -> list[str]:
    """One row for each shape, type and estimator: temporary memory beyond the forward's, in MB, layers, streams."""
    return [
        f"| {row['shape']} | {row['dtype']} | {row['program']} | {row['extra_bytes'] / 1e6:.1f} "
        f"| {row['extra_layers']:.2f} | {row['extra_streams']:.1f} | {_or_nothing(row['aim'])} |"
        for row in _kind(results, "estimate.json", "memory")
        if row["program"] != "forward"
    ]


def process_rows(results: Path = RESULTS) -> list[str]:
    """One row for each process, in MB: size of the weights, peak memory with the weights loaded, peak at the end."""
    return [
        f"| {row['library']} | {row['program'].removeprefix('torch, ')} | "
        + " | ".join(f"{row[f'{key}_bytes'] / 1e6:.0f}" for key in ("weight", "weights_peak", "peak"))
        + " |"
        for row in _kind(results, "estimate.json", "process")
    ]


def forward_rows(results: Path = RESULTS) -> list[str]:
    """One row for each model, batch and length: tokens per second, and utilisation in percent."""
    return [
        f"| {row['model']} | {row['dtype']} | {row['batch']} × {row['length']} | {row['tokens_per_second']:,.0f} "
        f"| {100 * row['mfu']:.0f} % |"
        for row in _kind(results, "forward.json", "forward")
    ]


def compile_rows(results: Path = RESULTS) -> list[str]:
    """One row for each depth: seconds of lowering and compiling, and their ratio to the first depth."""
    return [
        f"| {row['layers']} | {row['seconds']:.2f} | {row['ratio']:.2f} |"
        for row in _kind(results, "forward.json", "compile")
    ]


def plan_rows(results: Path = RESULTS) -> list[str]:
    """One row for each model and recipe: the memory that `plan` predicts, the measured peak, and their ratio."""
    lines = []
    for path in sorted(results.glob("plan-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            predicted, peak = row["predicted_bytes"], row["peak_bytes"]
            name, million = path.stem.removeprefix("plan-"), 1e6
            cells = [
                name,
                row["recipe"],
                f"{predicted / million:,.0f}",
                f"{peak / million:,.0f}",
                f"{predicted / peak:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def gguf_rows(results: Path = RESULTS) -> list[str]:
    """One row for each GGUF file: perplexity here and in llama.cpp; then the differences of logits of small models."""
    study = json.loads((results / "gguf.json").read_text())
    lines = [
        f"| {row['model']} | `{row['arch']}` | {row['type']} | {row['minillm_jax']:.4f} | {row['llama.cpp']:.4f} | "
        f"{100 * row['difference']:+.4f} % |"
        for row in study["perplexity"]
    ]
    return lines + [f"| {row['model']} | `{row['arch']}` | {row['difference']:.1e} |" for row in study["logits"]]


def parity_rows(results: Path = RESULTS) -> list[str]:
    """One row for each family: its configurations, and their largest differences of logits, dense and pruned."""
    rows = json.loads((results / "parity.json").read_text())["rows"]
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        dense, pruned, logit = (max(row[key] for row in own) for key in ("dense", "pruned", "largest_logit"))
        lines.append(f"| `{family}` | {len(own)} | {dense:.1e} | {pruned:.1e} | {logit:.1f} |")
    return lines


def fidelity_rows(results: Path = RESULTS) -> list[str]:
    """One row for each model and estimator at its most directions: cosine, then rank correlations with removal."""
    lines = []
    for model in MODELS:
        study = json.loads((results / f"fidelity-{model}.json").read_text())
        most = max(row["directions"] for row in study["estimators"])
        for name in dict.fromkeys(row["estimator"] for row in study["estimators"]):
            rows = [row for row in study["estimators"] if row["estimator"] == name]
            rows = [row for row in rows if row["directions"] in (0, most)]
            criteria = ("fms", "first order", "gate", "gate-square")
            cells = [_mean(rows, "cosine"), *(_correlation(rows, criterion) for criterion in criteria)]
            lines.append(f"| {model} | {name} | {rows[0]['directions'] or ''} | {' | '.join(cells)} |")
    return lines


def plain_rows(results: Path = RESULTS) -> list[str]:
    """One row for each criterion without a gradient: its rank correlation with removal on every model."""
    studies = {m: json.loads((results / f"fidelity-{m}.json").read_text())["plain"] for m in MODELS}
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
    """The mean over seeds for heads and for channels; empty if no row has the key."""
    by_kind = [row[key] for row in rows if key in row]
    if not by_kind:
        return ""
    return " / ".join(f"{sum(row[kind] for row in by_kind) / len(by_kind):.2f}" for kind in ("head", "channel"))


def _or_nothing(aim: float | None) -> str:
    return "" if aim is None else f"{aim:.2f}"


def main() -> None:
    """Print all rows that docs/ and the README quote."""
    lines = [row for model in MODELS for row in quality_rows(model)]
    lines += [*cost_rows(), *beaten_rows(), *refit_rows(), *conversion_rows(), *fidelity_rows(), *plain_rows()]
    lines += [*estimate_rows(), *estimate_torch_rows(), *estimate_memory_rows(), *process_rows()]
    lines += [*forward_rows(), *compile_rows(), *plan_rows(), *gguf_rows()]
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
