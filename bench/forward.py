"""Throughput of the forward loss, and its compile time against depth.

    python bench/forward.py [--presets 25M 1B] [--models FOLDER ...] [--dtype float32] [--batches 1 4 8]
        [--lengths 128 512] [--depths 4 8 16 32] [--rounds 15] [--peak FLOPS] [--output bench/results/forward.json]

A row of kind `forward` for every model, batch and length holds the median time of `sequence_losses` (the summed cross
entropy of every sequence) over rounds, the tokens per second (batch · length / time), and the model-FLOPs utilisation:

    mfu = model FLOPs / time / peak
    model FLOPs = 2 B T (parameters of all block matrices) + 4 B T² H (query heads of all layers) + 2 B (T - 1) V E

The model FLOPs are those of matrix products only, with attention over the full square T × T (see `flops`);
`attention_share` is the share of attention. The peak is `--peak`, or that of the data sheet for the device and type
(`flops.PEAKS`). On a CPU or an unknown device it is the FLOP/s of the best round of a large square product in the same
type and run, which takes turns with the loss; every row holds it as `product_flops_per_second`.

`compiled_bytes` is the compiler's memory analysis, argument + output + temp - alias (on a CPU it includes float32
copies of bfloat16 weights). `peak_bytes` is the highest memory use of the device since the process began, if the device
reports it; the value never decreases from row to row, so run the largest case alone.

A row of kind `compile` for every depth (with `--depths`) holds the median seconds of tracing and lowering and of
compiling the loss of that many layers of the first preset's shape, with empty caches, and the ratio of the total to
that of the first depth.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
from environment import environment
from flops import known_peak, loss_flops, square_product
from jax import numpy as jnp
from shapes import CONFIG, SHAPES, random_decoder, random_tokens
from timing import medians, take_turns

from convert.reader import read_model
from minillm_jax.model.build import build
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.tree import layer_count, parameter_count

DTYPES = ("float32", "bfloat16")


def makers(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Decoder]]]:
    """Name and maker of every model of the command line. A maker runs after the previous model is freed."""
    for name in arguments.presets:
        yield name, partial(random_decoder, name, arguments.dtype or "float32")
    for folder in arguments.models:
        yield folder.name, lambda folder=folder: jax.device_put(read_model(folder, arguments.dtype).decoder)


def compiled_bytes(compiled: Any) -> int:
    """Memory of a compiled program by the compiler's memory analysis."""
    memory = compiled.memory_analysis()
    kinds = ("argument", "output", "temp")
    return sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds) - memory.alias_size_in_bytes


def measure(decoder: Decoder, batch: int, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The measurements of one batch and length."""
    device, dtype = jax.devices()[0], decoder.runs[0].attention.q.kernel.dtype
    tokens = random_tokens(decoder.embedding.shape[0], batch, length)
    compiled = sequence_losses.lower(decoder, tokens).compile()
    product, product_flops = square_product(arguments.product, dtype)
    times = take_turns({"loss": partial(compiled, decoder, tokens), "product": product}, arguments.rounds)
    seconds, flops = medians(times)["loss"], loss_flops(decoder, batch, length)
    attained = product_flops / min(times["product"])
    peak = arguments.peak or known_peak(device, dtype) or attained
    return {
        "dtype": str(dtype),
        "milliseconds": round(1e3 * seconds, 2),
        "tokens_per_second": round(batch * length / seconds, 1),
        "model_flops": flops.total,
        "attention_share": round(flops.attention / flops.total, 4),
        "mfu": round(flops.total / seconds / peak, 4),
        "peak": round(peak),
        "peak_from": "option" if arguments.peak else "data sheet" if known_peak(device, dtype) else "product",
        "product_flops_per_second": round(attained),
        "compiled_bytes": compiled_bytes(compiled),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "all_milliseconds": [round(1e3 * value, 2) for value in times["loss"]],
    }


def forward_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for every model, batch and length."""
    for name, make in makers(arguments):
        yield from model_rows(name, make(), arguments)


def model_rows(name: str, decoder: Decoder, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for every batch and length; the row of a case that runs out of memory has the field `error`."""
    for length in arguments.lengths:
        for batch in arguments.batches:
            row = {"kind": "forward", "model": name, "parameters": parameter_count(decoder)}
            row |= {"layers": layer_count(decoder), "batch": batch, "length": length}
            try:
                yield row | measure(decoder, batch, length, arguments)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                yield row | {"error": "out of memory"}


def compile_seconds(name: str, depth: int, dtype: str, batch: int, length: int) -> tuple[float, float]:
    """Seconds of lowering and of compiling the loss of `depth` layers, without an allocation."""
    sizes = SHAPES[name]
    abstract = build(CONFIG, replace(sizes, layers=sizes.layers[:1] * depth), jnp.dtype(dtype))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    jax.clear_caches()
    started = time.perf_counter()
    lowered = sequence_losses.lower(abstract, tokens)
    between = time.perf_counter()
    lowered.compile()
    return between - started, time.perf_counter() - between


def compile_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for every depth. The depths take turns, after an uncounted first run that imports modules."""
    name, dtype = arguments.presets[0], arguments.dtype or "float32"
    batch, length = arguments.batches[0], arguments.lengths[0]
    times: dict[int, list[tuple[float, float]]] = {depth: [] for depth in arguments.depths}
    compile_seconds(name, arguments.depths[0], dtype, batch, length)
    for _ in range(arguments.compile_rounds):
        for depth, pairs in times.items():
            pairs.append(compile_seconds(name, depth, dtype, batch, length))
    total = {depth: median(sum(pair) for pair in pairs) for depth, pairs in times.items()}
    for depth, pairs in times.items():
        lower, compile_ = (median(column) for column in zip(*pairs, strict=True))
        yield {
            "kind": "compile",
            "model": name,
            "dtype": dtype,
            "batch": batch,
            "length": length,
            "layers": depth,
            "lower_seconds": round(lower, 3),
            "compile_seconds": round(compile_, 3),
            "seconds": round(total[depth], 3),
            "ratio": round(total[depth] / total[arguments.depths[0]], 3),
        }


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line, checked before the measurements begin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", choices=list(SHAPES), help="25M by default without --models")
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="folders of models")
    parser.add_argument("--dtype", choices=DTYPES, help="by default float32 for presets, the stored type for folders")
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128])
    parser.add_argument("--depths", nargs="+", type=int, default=[])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile-rounds", type=int, default=5)
    parser.add_argument("--product", type=int, help="size of the square product: 2048 on a CPU, 8192 elsewhere")
    parser.add_argument("--peak", type=float, help="peak of the device, in FLOP/s")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.presets is None:
        arguments.presets = [] if arguments.models and not arguments.depths else ["25M"]
    if arguments.depths and not arguments.presets:
        parser.error("--depths needs a preset")
    if (
        min(arguments.lengths) < 2
        or min([*arguments.batches, *arguments.depths, arguments.rounds, arguments.compile_rounds]) < 1
    ):
        parser.error("lengths are at least 2; batches, depths and rounds are at least 1")
    if arguments.product is None:
        arguments.product = 2048 if jax.devices()[0].platform == "cpu" else 8192
    return arguments


def main() -> None:
    """Print a line for each case, and write the JSON."""
    arguments = parse_arguments()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = []
    for kind in (compile_rows, forward_rows):
        if kind is compile_rows and not arguments.depths:
            continue
        for row in kind(arguments):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
