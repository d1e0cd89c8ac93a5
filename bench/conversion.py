"""Speed of reading a folder into a decoder and of writing it, compared with plain reads and writes of the same bytes.

    python bench/conversion.py [--gigabytes 1] [--rounds 7] [--output bench/results/conversion.json]

A random model is written to a scratch folder and remains in the page cache. Each round runs four programs in turn, so
that a change of the machine's speed affects all four: a plain sequential read of the weight files into new memory, the
read of minillm-jax, a plain write of the same bytes to new files, and the write of minillm-jax. Neither write waits for
the disk. The best round of each program counts, because other jobs, and memory that a virtual machine must first get
from its host, only make a round slower. A ratio of 1 means the speed of the plain program.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import environment
from transformers import AutoConfig

from convert import memory, rules
from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.model.build import build
from minillm_jax.model.families import parse
from minillm_jax.model.loaded import Model

# About 200 MB of float32 for each layer.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_hidden_layers": 1,
    },
    "bloom": {"vocab_size": 32000, "hidden_size": 2048, "n_head": 32, "n_layer": 1},
}
LAYERS = {"llama": "num_hidden_layers", "bloom": "n_layer"}


class RandomWeights:
    """Stored tensors of any shape, all filled with the same random numbers."""

    where = "random weights"

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str):
        self._shapes = shapes
        self._numbers = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32).astype(dtype)

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._shapes[name]

    def read(self, name: str, allocate: memory.Allocate) -> np.ndarray:
        """A tensor, in memory from `allocate`."""
        tensor = allocate(self._shapes[name], self._numbers.dtype)
        tensor[...] = np.resize(self._numbers, tensor.shape)
        return tensor


def random_model(family: str, dtype: str, size: float) -> Model:
    """A model of about `size` bytes."""

    def abstract(layers: int) -> tuple[dict[str, Any], Any, dict[str, tuple[int, ...]]]:
        raw = AutoConfig.for_model(family, **CONFIGS[family] | {LAYERS[family]: layers}).to_dict()
        decoder = build(*parse(raw, "bench"))
        return raw, decoder, {binding.name: binding.stored_shape() for binding in rules.bindings(decoder)}

    bytes_of = [
        sum(int(np.prod(shape)) for shape in abstract(layers)[2].values()) * np.dtype(dtype).itemsize
        for layers in (1, 2)
    ]
    layers = 1 + max(0, round((size - bytes_of[0]) / (bytes_of[1] - bytes_of[0])))
    raw, decoder, shapes = abstract(layers)
    return Model(rules.fill(decoder, RandomWeights(shapes, dtype)), raw, Path("none"), family)


def plain_read(files: Iterable[Path]) -> None:
    """Read every byte into new memory, because a reader needs new memory too."""
    for file in files:
        memory = np.empty(file.stat().st_size, np.uint8).data
        with file.open("rb", buffering=0) as opened:
            while memory and (count := opened.readinto(memory)):
                memory = memory[count:]


def plain_write(files: Iterable[tuple[Path, np.ndarray]]) -> None:
    """Write bytes from memory to new files."""
    for file, data in files:
        with file.open("wb", buffering=0) as opened:
            left = data.data
            while left and (count := opened.write(left)):
                left = left[count:]


def seconds(program: Callable[[], object]) -> float:
    """Seconds of one run, until the arrays of the result are ready."""
    started = time.perf_counter()
    result = program()
    if isinstance(result, Model):
        jax.block_until_ready(jax.tree.leaves(result.decoder))
    return time.perf_counter() - started


def measure(family: str, dtype: str, size: float, rounds: int, scratch: Path) -> dict[str, Any]:
    """The row of one layout and type: all four programs."""
    source, copy, ours = (scratch / name for name in ("source", "copy", "ours"))
    model = random_model(family, dtype, size)
    write_model(model, source)
    files = sorted(source.glob("*.safetensors"))
    data = [(copy / file.name, np.fromfile(file, np.uint8)) for file in files]
    total = sum(array.size for _, array in data)
    programs: dict[str, Callable[[], object]] = {
        "plain_read": lambda: plain_read(files),
        "read": lambda: read_model(source),
        "plain_write": lambda: plain_write(data),
        "write": lambda: write_model(model, ours),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            # The folder of the previous write is removed, so that each write reuses its memory.
            if name == "plain_write":
                shutil.rmtree(copy, ignore_errors=True)
                copy.mkdir()
            if name == "write":
                shutil.rmtree(ours, ignore_errors=True)
            duration = seconds(program)
            if turn:  # the first round fills caches
                times[name].append(duration)
    assert all((ours / file.name).read_bytes() == file.read_bytes() for file in files)
    shutil.rmtree(source)
    shutil.rmtree(copy)
    shutil.rmtree(ours)
    speeds = {name: total / min(durations) for name, durations in times.items()}
    return {
        "family": family,
        "dtype": dtype,
        "layers": model.raw_config[LAYERS[family]],
        "bytes": total,
        **{f"{name}_gigabytes_per_second": round(speed / 1e9, 2) for name, speed in speeds.items()},
        "read_ratio": round(speeds["read"] / speeds["plain_read"], 3),
        "write_ratio": round(speeds["write"] / speeds["plain_write"], 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| layout | type | GB | plain read | read | ratio | plain write | write | ratio |", "|---" * 9 + "|"]
    for row in rows:
        cells = [row["family"], row["dtype"], f"{row['bytes'] / 1e9:.2f}"]
        for kind in ("read", "write"):
            cells += [f"{row[f'{name}_gigabytes_per_second']:.2f} GB/s" for name in (f"plain_{kind}", kind)]
            cells.append(f"{row[f'{kind}_ratio']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--families", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--scratch", type=Path, help="folder for the scratch files; the system's temporary folder by default"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for family in arguments.families:
        for dtype in arguments.dtypes:
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
                rows.append(measure(family, dtype, arguments.gigabytes * 1e9, arguments.rounds, Path(scratch)))
    print(table(rows))
    if arguments.output is not None:
        result = {"environment": environment(), "rounds": arguments.rounds, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
