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


FIDELITY_MODELS = ("stories260K", "opt-3m", "bloom-3m", "demo_model")


def fidelity_rows() -> list[str]:
    """One row for each model and estimator at its most directions: cosine, then rank correlations with removal."""
    found = []
    for model in FIDELITY_MODELS:
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
    studies = {m: json.loads((RESULTS / f"fidelity-{m}.json").read_text())["plain"] for m in FIDELITY_MODELS}
    names = dict.fromkeys(row["criterion"] for row in studies[FIDELITY_MODELS[0]])
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
    lines = [*quality_rows(), demo_sentence(), *conversion_rows(), *fidelity_rows(), *plain_rows()]
    lines += [*estimate_rows(), *estimate_torch_rows(), *estimate_memory_rows(), *process_rows()]
    lines += [*forward_rows(), *compile_rows()]
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
