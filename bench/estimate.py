"""Time and memory of the estimators beside the plain forward loss, and beside PyTorch.

    python bench/estimate.py [--shapes 25M] [--rounds 15] [--per-step 1 8] [--dtype float32] [--batch 8] [--length 128]
        [--no-torch] [--memory-shapes 25M 7B] [--processes NAME ...] [--output bench/results/estimate.json]

A row of kind `time` for every estimator, 8 windows of 128 tokens unless asked otherwise. All programs take turns, those
of PyTorch among them (see `timing`). `ratio` is the time of one pair, of one direction (of the 8, say, that share a
pass) or of one exact gradient, in plain forwards of the same library; `aim` is the ratio that was aimed for on two CPU
cores at 25M in float32. `times_faster` is PyTorch's time over ours where PyTorch has the same program with the same
distribution (see `torch_pair`); `times_faster_best` is of the best rounds, not the medians. `spread` is the median over
the best round. PyTorch's threads spin while they wait for each other: where another job has one of the cores they take
a hundred times as long, so there only a run with OMP_WAIT_POLICY=PASSIVE compares anything. The record says how it was
set, and the load of the machine when the run began.

A row of kind `memory` for every estimator and shape, from the compiler's account for abstract weights: nothing is
allocated. `extra_bytes` is temp - temp(forward); also in layers of the model and in streams, [B, T, D] in float32.
Streams of the two sides of a pair, or the tangents of all directions of a pass, exist together. What a program returns
is not in temp: `output_bytes`, the size of the weights for their exact gradient. float32, and where the device is not a
CPU bfloat16 too (compiling for a CPU keeps float32 copies of bfloat16 weights).

A row of kind `process` for some programs, each run once in a process of its own: the highest memory after imports, with
the weights, and in the end, nothing subtracted. On a CPU that is resident memory, which holds both libraries' code and
the compiler's work; on an accelerator what the library has allocated on the device.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from environment import environment, peak_bytes
from jax import numpy as jnp
from rich.console import Console
from rich.table import Table
from shapes import CONFIG, SHAPES, layer_bytes, random_decoder, random_tokens
from timing import Program, medians, seconds, take_turns

from minillm_jax.model.build import build
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.tree import parameter_count
from minillm_jax.scoring.gradient.exact import gate_gradients, weight_gradients
from minillm_jax.scoring.gradient.settings import Estimation
from minillm_jax.scoring.gradient.slopes import directional_derivatives, paired_losses

DTYPES = ("float32", "bfloat16")
EPSILON = 1e-3
FASTER_AIM = 1.25
MEMORY_AIMS = {"weights": 1.25, "low-rank": 0.1, "gates": 0.1}  # layers
CHUNKS = 2  # for the account of memory, so that chunks are scanned

# What is run alone: ours by the names of cases, PyTorch's after `torch, `.
PROCESSES = {
    "forward": "forward",
    "pair": "pair, weights, rademacher",
    "jvp-gates": "jvp, gates, {most}",
    "exact": "exact, weights",
    "torch-forward": "torch, forward",
    "torch-pair": "torch, pair, rademacher",
    "torch-backward": "torch, forward and backward",
}


@dataclass(frozen=True)
class Case:
    """One program: the forward loss, or an estimator.

    Attributes:
      settings: of the estimate; None for the plain forward loss.
      aim: plain forwards that a pair or a direction may take.
      torch: the name of the same program in PyTorch.
      faster: times that it should be faster than PyTorch.
    """

    settings: Estimation | None = None
    aim: float | None = None
    torch: str | None = None
    faster: float | None = None

    @property
    def per_step(self) -> int:
        """Directions of one pass."""
        return (self.settings and self.settings.per_step) or 1

    def record(self) -> dict[str, Any]:
        """What a row says of it."""
        if self.settings is None:
            return {"difference": None}
        found: dict[str, Any] = {"difference": self.settings.difference, "space": self.settings.space}
        if self.settings.difference != "exact":
            found |= {"distribution": self.settings.distribution, "rng": self.settings.rng, "per_step": self.per_step}
        return found | ({"rank": self.settings.rank} if self.settings.space == "low-rank" else {})


def cases(per_step: list[int]) -> dict[str, Case]:
    """All of them by name."""
    found = {"forward": Case(torch="torch, forward")}
    for distribution, aim in (("gaussian", None), ("rademacher", 2.10)):
        for rng, suffix in (("threefry2x32", ""), ("threefry4x32", ", threefry4x32")):
            settings = Estimation("spsa", "weights", distribution=distribution, rng=rng, epsilon=EPSILON, per_step=1)
            case = Case(settings, aim, f"torch, pair, {distribution}", FASTER_AIM)
            found[f"pair, weights, {distribution}{suffix}"] = case
    for space, aim in (("low-rank", 2.15), ("gates", 2.05)):
        found[f"pair, {space}"] = Case(Estimation("spsa", space, rank=1, epsilon=EPSILON, per_step=1), aim)
    for name, space, distribution in (
        ("weights, rademacher", "weights", "rademacher"),
        ("low-rank", "low-rank", "gaussian"),
        ("gates", "gates", "gaussian"),
    ):
        for count in per_step:
            settings = Estimation("jvp", space, distribution=distribution, per_step=count)
            found[f"jvp, {name}, {count}"] = Case(settings, 1.5 if (space, count) == ("gates", 8) else None)
    found["exact, gates"] = Case(Estimation("exact", "gates"))
    found["exact, weights"] = Case(Estimation("exact", "weights"), torch="torch, forward and backward")
    return found


# ------------------------------------------------------------------------------------------------------ programs


def chosen(arguments: argparse.Namespace) -> dict[str, Case]:
    """Those that were asked for, and the forward loss."""
    found = cases(arguments.per_step)
    return {name: case for name, case in found.items() if name in ("forward", *(arguments.programs or found))}


def inputs(case: Case, chunks: int, decoder: Decoder, tokens: jax.Array) -> tuple[Any, ...]:
    """The arrays that a program takes."""
    if case.settings is None or case.settings.difference == "exact":
        return decoder, tokens
    drawn = case.settings.draw(decoder, 0, chunks * case.per_step).stacked(case.per_step)
    windows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    step = (jnp.float32(EPSILON),) if case.settings.difference == "spsa" else ()
    return decoder, drawn, tokens, windows, *step


def compiled(case: Case, arrays: tuple[Any, ...]) -> Any:
    """The program for arrays of those shapes, which may be abstract."""
    if case.settings is None:
        return sequence_losses.lower(*arrays).compile()
    if case.settings.difference == "exact":
        function = gate_gradients if case.settings.space == "gates" else weight_gradients
        return function.lower(*arrays).compile()
    function = paired_losses if case.settings.difference == "spsa" else directional_derivatives
    return function.lower(*arrays, space=case.settings.make_space()).compile()


def program(case: Case, decoder: Decoder, tokens: jax.Array) -> Program:
    """It compiled, with its arrays; one chunk of directions."""
    arrays = inputs(case, 1, decoder, tokens)
    return partial(compiled(case, arrays), *arrays)


def torch_programs(shape: str, arguments: argparse.Namespace) -> tuple[dict[str, Program], int]:
    """PyTorch's programs by name, on the device that JAX uses, and the bytes of their weights."""
    import torch
    import torch_pair

    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        sys.exit(f"PyTorch does not run on the device that JAX uses, {jax.default_backend()}: add --no-torch")
    model = torch_pair.llama(shape, device, getattr(torch, arguments.dtype))
    tokens = torch_pair.random_tokens(shape, arguments.batch, arguments.length, device)
    found: dict[str, Program] = {"torch, forward": torch_pair.forward_program(model, tokens)}
    for name in torch_pair.DISTRIBUTIONS:
        found[f"torch, pair, {name}"] = torch_pair.pair_program(model, tokens, EPSILON, 0, name)
    found["torch, forward and backward"] = torch_pair.gradient_program(model, tokens)
    return found, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------- time


def out_of_memory(program: Program) -> bool:
    """Whether the device is too small for a program."""
    try:
        seconds(program)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise
        return True
    return False


def time_rows(shape: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each program of one shape."""
    known = chosen(arguments)
    decoder = random_decoder(shape, arguments.dtype)
    tokens = random_tokens(SHAPES[shape].V, arguments.batch, arguments.length)
    programs = {name: program(case, decoder, tokens) for name, case in known.items()}
    if arguments.torch:
        programs |= torch_programs(shape, arguments)[0]
    too_large = [name for name, each in programs.items() if out_of_memory(each)]
    times = take_turns({name: each for name, each in programs.items() if name not in too_large}, arguments.rounds)
    middle = medians(times)
    for name in programs:
        case = known.get(name)
        row = {"kind": "time", "shape": shape, "program": name, "library": "PyTorch" if case is None else "minillm-jax"}
        row |= {"dtype": arguments.dtype, "batch": arguments.batch, "length": arguments.length}
        if case is not None:
            row |= case.record()
        if name in too_large:
            yield row | {"error": "out of memory"}
            continue
        taken = middle[name] / (1 if case is None else case.per_step)
        forward = middle.get("torch, forward" if case is None else "forward")
        row |= {
            "seconds": round(middle[name], 6),
            "seconds_each": round(taken, 6),
            "ratio": None if forward is None else round(taken / forward, 3),
            "aim": None if case is None else case.aim,
            "spread": round(middle[name] / min(times[name]), 3),
        }
        if case is not None and case.torch in middle:
            row |= {"torch": case.torch, "times_faster": round(middle[case.torch] / middle[name], 3)}
            row |= {"times_faster_best": round(min(times[case.torch]) / min(times[name]), 3)}
            row |= {"times_faster_aim": case.faster}
        yield row | {"all_seconds": [round(each, 6) for each in times[name]]}


# -------------------------------------------------------------------------------------------------------- memory


def memory_rows(shape: str, dtype: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each program of one shape, for abstract weights."""
    decoder = build(CONFIG, SHAPES[shape], jnp.dtype(dtype))
    tokens = jax.ShapeDtypeStruct((arguments.batch, arguments.length), jnp.int32)
    layer, stream = layer_bytes(decoder), 4 * arguments.batch * arguments.length * SHAPES[shape].D
    forward = None
    for name, case in chosen(arguments).items():
        arrays = jax.eval_shape(partial(inputs, case, CHUNKS), decoder, tokens)
        account = compiled(case, arrays).memory_analysis()
        forward = account.temp_size_in_bytes if forward is None else forward
        extra = account.temp_size_in_bytes - forward
        settings = case.settings
        aim = None if settings is None or settings.difference == "exact" else MEMORY_AIMS[str(settings.space)]
        row = {"kind": "memory", "shape": shape, "program": name, "parameters": parameter_count(decoder)}
        row |= {"dtype": dtype, "batch": arguments.batch, "length": arguments.length}
        yield (
            row
            | case.record()
            | {
                "argument_bytes": account.argument_size_in_bytes,
                "temp_bytes": account.temp_size_in_bytes,
                "output_bytes": account.output_size_in_bytes,
                "layer_bytes": layer,
                "stream_bytes": stream,
                "extra_bytes": extra,
                "extra_layers": round(extra / layer, 4),
                "extra_streams": round(extra / stream, 2),
                "aim": aim,
            }
        )


# ----------------------------------------------------------------------------------------------------- processes


def alone(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of a program that this process runs once, and nothing else."""
    shape, full = arguments.shapes[0], PROCESSES[name].format(most=max(arguments.per_step))
    of_torch = full.startswith("torch")
    if of_torch:
        import torch_pair  # noqa: F401  # counts as an import
    imports = peak_bytes(of_torch)
    if of_torch:
        programs, weights = torch_programs(shape, arguments)
        made = peak_bytes(of_torch)
        seconds(programs[full])
    else:
        decoder = jax.block_until_ready(random_decoder(shape, arguments.dtype))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
        made = peak_bytes(of_torch)
        tokens = random_tokens(SHAPES[shape].V, arguments.batch, arguments.length)
        seconds(program(cases(arguments.per_step)[full], decoder, tokens))
    return {
        "kind": "process",
        "shape": shape,
        "program": full,
        "library": "PyTorch" if of_torch else "minillm-jax",
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "length": arguments.length,
        "memory": "resident" if jax.default_backend() == "cpu" else "device",
        "weight_bytes": weights,
        "imports_peak_bytes": imports,
        "weights_peak_bytes": made,
        "peak_bytes": peak_bytes(of_torch),
    }


def process_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each program in a process of its own; before this one has taken the device."""
    for name in arguments.processes:
        if name.startswith("torch") and not arguments.torch:
            continue
        command = [sys.executable, __file__, "--alone", name, "--shapes", arguments.shapes[0]]
        command += ["--per-step", *map(str, arguments.per_step), "--dtype", arguments.dtype]
        command += ["--batch", str(arguments.batch), "--length", str(arguments.length)]
        own = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        yield json.loads(subprocess.run(command, env=own, stdout=subprocess.PIPE, text=True, check=True).stdout)


# --------------------------------------------------------------------------------------------------------- output


def show(rows: list[dict[str, Any]]) -> None:
    """Tables for people, where the lines of JSON are not."""
    columns: dict[str, list[tuple[str, str, str]]] = {
        "time": [
            ("seconds", "seconds_each", ".4f"),
            ("forwards", "ratio", ".3f"),
            ("aim ≤", "aim", ".2f"),
            ("spread", "spread", ".2f"),
            ("PyTorch / ours", "times_faster", ".2f"),
            ("of the best", "times_faster_best", ".2f"),
            ("aim ≥", "times_faster_aim", ".2f"),
        ],
        "memory": [
            ("extra MB", "extra_bytes", ".1f"),
            ("layers", "extra_layers", ".3f"),
            ("aim ≤", "aim", ".2f"),
            ("streams", "extra_streams", ".2f"),
            ("output MB", "output_bytes", ".1f"),
        ],
        "process": [
            ("weights MB", "weight_bytes", ".1f"),
            ("imports MB", "imports_peak_bytes", ".1f"),
            ("with weights MB", "weights_peak_bytes", ".1f"),
            ("peak MB", "peak_bytes", ".1f"),
        ],
    }
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    for kind, wanted in columns.items():
        table = Table("shape", "type", "program", *(title for title, _, _ in wanted), title=kind)
        for row in (row for row in rows if row["kind"] == kind):
            cells = (_cell(row.get(key), key, form) for _, key, form in wanted)
            table.add_row(row["shape"], row["dtype"], row["program"], *([row["error"]] if "error" in row else cells))
        if table.row_count:
            console.print(table)


def _cell(value: float | None, key: str, form: str) -> str:
    if value is None:
        return ""
    return format(value / 1e6 if key.endswith("bytes") else value, form)


def parse_arguments() -> argparse.Namespace:
    """The command line; wrong numbers are refused before anything is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["25M"], choices=list(SHAPES), help="what is timed")
    parser.add_argument("--memory-shapes", nargs="*", default=["25M", "7B"], choices=list(SHAPES))
    parser.add_argument("--programs", nargs="+", help="names of estimators as the rows give them; all by default")
    parser.add_argument("--processes", nargs="*", default=list(PROCESSES), choices=list(PROCESSES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--per-step", nargs="+", type=int, default=[1, 8], help="directions that share a pass of jvp")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of what is timed")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--alone", choices=list(PROCESSES), help="only this program of --processes, in this process")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.length < 2 or min([arguments.batch, arguments.rounds, *arguments.per_step]) < 1:
        parser.error("the length is at least 2, batch, rounds and directions per step at least 1")
    if unknown := set(arguments.programs or ()) - set(cases(arguments.per_step)):
        parser.error(f"no such program: {'; '.join(sorted(unknown))}")
    if (arguments.processes or arguments.alone) and not arguments.shapes:
        parser.error("--processes need a shape; leave them empty too")
    return arguments


def all_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Processes, times, memory."""
    yield from process_rows(arguments)
    for shape in arguments.shapes:
        yield from time_rows(shape, arguments)
    for dtype in DTYPES if arguments.memory_shapes and jax.default_backend() != "cpu" else DTYPES[:1]:
        for shape in arguments.memory_shapes:
            yield from memory_rows(shape, dtype, arguments)


def main() -> None:
    """Print a line for each row and tables at the end, and write the JSON."""
    arguments = parse_arguments()
    jax.config.update("jax_enable_compilation_cache", False)
    if arguments.alone is not None:
        print(json.dumps(alone(arguments.alone, arguments)))
        return
    load = os.getloadavg()[0]
    rows = []
    for row in all_rows(arguments):
        rows.append(row)
        print(json.dumps(row), flush=True)
    show(rows)
    if arguments.output is not None:
        record = environment()
        if arguments.torch:
            record["versions"]["torch"] = version("torch")
        settings = {name: value for name, value in vars(arguments).items() if name not in ("alone", "output")}
        settings |= {"load": round(load, 2), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY")}
        text = json.dumps({"environment": record, "settings": settings, "rows": rows}, indent=2, ensure_ascii=False)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
