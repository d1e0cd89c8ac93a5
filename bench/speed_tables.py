"""Tables of bench/speed.py, bench/tpu.py, bench/stream.py and of the runs on a GPU, as Markdown."""

import json
from pathlib import Path
from typing import Any

from study_tables import RESULTS, table

Row = dict[str, Any]


def speed_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each model and library: parameters, memory, load time, speeds with the ratio to the dense model."""
    path = results / f"speed-{model}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    batches = [str(batch) for batch in found["load"]["batches"]]
    rows = [
        [
            row["model"],
            row["library"],
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['disk'] / 1e6:,.0f} MB",
            f"{row['load_seconds']:.1f}",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            _with_ratio(1000 * row["speed"]["first_token"], row["ratio"]["first_token"]),
            *(_with_ratio(row["speed"]["prefill"][b], row["ratio"]["prefill"][b]) for b in batches),
            *(_with_ratio(row["speed"]["decoding"][b], row["ratio"]["decoding"][b]) for b in batches),
        ]
        for row in sorted(found["models"], key=lambda row: row["library"])
    ]
    heads = ["model", "library", "parameters", "on disk", "load, s", "peak memory", "first token, ms"]
    prompts, tokens = ([f"{what} × {b}, tokens/s" for b in batches] for what in ("prompts", "decoding"))
    return table([*heads, *prompts, *tokens], rows)


def _with_ratio(value: float, ratio: float) -> str:
    return f"{value:,.0f} (× {ratio:.2f})"


def tpu_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each model: operations and traffic; compile time and memory with a scan of every run, and padded."""
    path = results / f"tpu-{model}.json"
    if not path.exists():
        return []
    found: dict[str, dict[str, Row]] = {}
    for row in json.loads(path.read_text())["rows"]:
        found.setdefault(row["model"], {})[row["way"]] = row
    dense = next(iter(found.values()))["runs"]
    rows = [
        [
            name,
            f"{ways['runs']['parameters'] / 1e6:.1f}M",
            f"{ways['runs']['flops'] / 1e12:.2f} (× {ways['runs']['flops'] / dense['flops']:.2f})",
            f"{ways['runs']['traffic'] / 1e9:.1f} GB (× {ways['runs']['traffic'] / dense['traffic']:.2f})",
            *(
                f"{ways[way]['compile_seconds']:.0f} s, {ways[way]['bytes'] / 1e6:,.0f} MB"
                for way in ("runs", "padded")
            ),
        ]
        for name, ways in found.items()
    ]
    heads = ["model", "parameters", "TFLOP", "memory traffic", "every run scanned: compilation, memory", "padded"]
    return table(heads, rows)


def flags_table(device: str, results: Path = RESULTS) -> list[str]:
    """A row for each setting of XLA_FLAGS: the first training step, and a later one."""
    names = {
        "default": "none",
        "notriton": "`--xla_gpu_enable_triton_gemm=false`",
        "autotune0": "`--xla_gpu_autotune_level=0`",
        "both": "both",
    }
    found = json.loads((results / f"compilation-{device}.json").read_text())["training_step"]["rows"]
    by_name = {row["flags"]: row for row in found}
    rows = [[words, f"{by_name[n]['first_s']:.1f} s", f"{by_name[n]['step_ms']:.0f} ms"] for n, words in names.items()]
    return table(["XLA_FLAGS", "first step, with compilation", "a step"], rows)


def memory_table(name: str, results: Path = RESULTS) -> list[str]:
    """A row for each program of bench/estimate.py that ran in a process of its own."""
    found = json.loads((results / f"memory-{name}.json").read_text())["rows"]
    rows = [[row["program"], row["library"], f"{row['peak_bytes'] / 1e9:.2f} GB"] for row in found]
    return table(["program", "library", "peak on the device"], rows)


def stream_table(model: str, results: Path = RESULTS) -> list[str]:
    """A row for each way to prune: time, peak of memory, whether the weights are those of the first."""
    path = results / f"stream-{model}.json"
    if not path.exists():
        return []
    rows = []
    for row in json.loads(path.read_text())["rows"]:
        if "kills" in row:
            says = f"{row['kills']} times; {row['ends']} jobs ended, {row['other weights']} with other weights"
            rows.append([row["way"], f"{row['seconds']:,.0f} in all", "", says])
        else:
            says = "equal" if row["equal"] else "other weights"
            rows.append([row["way"], f"{row['seconds']:,.0f}", f"{row['peak_bytes'] / 1e6:,.0f} MB", says])
    return table(["way", "seconds", "peak memory", "weights"], rows)


def tpu_job_table(chip: str, results: Path = RESULTS) -> list[str]:
    """A row for each program of a streamed pruning: compile time and memory at every shape."""
    return _by_shape(results / f"tpu-job-{chip}.json", ["program"])


def tpu_slices_table(name: str, results: Path = RESULTS) -> list[str]:
    """A row for each slice and program: compile time, memory of a chip and collectives at every shape."""
    return _by_shape(results / f"tpu-{name}.json", ["slice", "program"])


def _by_shape(path: Path, heads: list[str]) -> list[str]:
    """A row for each value of some fields, with a column for every shape."""
    if not path.exists():
        return []
    found, cells = json.loads(path.read_text())["rows"], dict[tuple[str, ...], dict[str, str]]()
    for row in found:
        cells.setdefault(tuple(row[head] for head in heads), {})[row["shape"]] = _compiled(row)
    shapes = list(dict.fromkeys(row["shape"] for row in found))
    rows = [[*names, *(row.get(shape, "") for shape in shapes)] for names, row in cells.items()]
    return table([*heads, *shapes], rows)


def _compiled(row: Row) -> str:
    """Compile time and memory of a program, and the bytes of its collectives where they were counted."""
    if "bytes" not in row:
        return "does not fit"
    sent = sum(size for _, size in row.get("collectives", {}).values()) / 1e6
    return _seconds_and_memory(row) + (f"; {sent:,.0f} MB" if "collectives" in row else "")


def _seconds_and_memory(row: Row) -> str:
    whole = (row["bytes"] + row["resident"]) / 1e9
    return f"{row['compile_seconds']:.0f} s, {whole:.1f} GB{'' if row['fits'] else ': does not fit'}"


def large_table(shape: str, results: Path = RESULTS) -> list[str]:
    """The first eight pruned layers of a large model, and every fourth: seconds, memory after it, peak until then."""
    path = results / f"large-{shape}.json"
    if not path.exists():
        return []
    rows = []
    for row in json.loads(path.read_text())["rows"]:
        if row["done"] > 8 and row["done"] % 4:
            continue
        sizes = (f"{row[key] / 1e9:.1f} GB" for key in ("resident", "peak_bytes"))
        rows.append([row["stage"], f"{row['done']} of {row['of']}", f"{row['seconds']:,.0f}", *sizes])
    return table(["stage", "layer", "seconds", "memory after it", "peak so far"], rows)
