"""Time and memory of the estimators beside the plain forward loss, and beside PyTorch.

    python bench/estimate.py [--shapes 25M] [--rounds 15] [--per-step 1 8] [--dtype float32] [--batch 8] [--length 128]
        [--no-torch] [--memory-shapes 25M 7B] [--processes NAME ...] [--output bench/results/estimate.json]

A row of kind `time` for every estimator, on 8 windows of 128 tokens by default. All programs take turns, PyTorch's
programs included (see `timing`). The fields of a row:

    seconds             time of one run of the program, the median over rounds
    seconds_each        seconds of one pair, of one direction (if a pass has 8 directions, an eighth of its time), or of
                        one exact gradient
    ratio               `seconds_each` in plain forward passes of the same library
    aim                 the ratio this project set itself, for 2 CPU cores, the shape 25M and float32
    spread              the median round over the best round
    times_faster        PyTorch's time over ours, if PyTorch has the same program with the same distribution (see
                        `torch_pair`)
    times_faster_best   the same for the best rounds instead of the medians

PyTorch's threads spin while they wait for each other. If another job uses one of the cores, they take a hundred times
as long; set OMP_WAIT_POLICY=PASSIVE for a valid comparison. The settings record OMP_WAIT_POLICY and the load of the
machine at the start.

A row of kind `memory` for every estimator and shape holds the compiler's memory analysis for abstract weights, without
an allocation. `extra_bytes` is temp - temp(forward). `extra_layers` divides it by the size of one layer's weights,
`extra_streams` by the size of the residual stream [B, T, D] in float32. A pair runs one program for each side. The
tangents of all directions of a pass exist together. Results of a program are not in temp: `output_bytes` of the exact
gradient are the size of the weights. The type is float32, and on an accelerator bfloat16 too (the CPU compiler keeps
float32 copies of bfloat16 weights).

A row of kind `process` for the programs of --processes, each run once in its own process: the peak memory after the
imports, with the weights, and at the end, nothing subtracted. On a CPU this is resident memory, which includes the code
of both libraries and the compiler's work; on an accelerator it is the memory that the library allocated on the device.
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
from minillm_jax.scoring.gradient.settings import draw, space_of
from minillm_jax.scoring.gradient.slopes import directional_derivatives, losses_at
from minillm_jax.settings import Estimation

DTYPES = ("float32", "bfloat16")
EPSILON = 1e-3
FASTER_AIM = 1.25
MEMORY_AIMS = {"weights": 1.25, "low-rank": 0.1, "gates": 0.1}  # layers

# Programs of the rows of kind `process`: names of cases, and names of PyTorch's programs after `torch, `.
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
      settings: settings of the estimate; None for the plain forward loss.
      aim: the aim for a pair or a direction, in plain forward passes.
      torch: the name of the same program in PyTorch.
      faster: the aim for PyTorch's time over ours.
    """

    settings: Estimation | None = None
    aim: float | None = None
    torch: str | None = None
    faster: float | None = None

    @property
    def per_step(self) -> int:
        """Directions of one pass."""
        return (self.settings and self.settings.directions_per_step) or 1

    def record(self) -> dict[str, Any]:
        """The fields that describe the case in a row."""
        if self.settings is None:
            return {"difference": None}
        fields: dict[str, Any] = {"difference": self.settings.estimator, "space": self.settings.space}
        if self.settings.estimator != "exact":
            fields |= {"distribution": self.settings.distribution, "rng": self.settings.rng, "per_step": self.per_step}
        return fields | ({"rank": self.settings.rank} if self.settings.space == "low-rank" else {})


def cases(per_step: list[int]) -> dict[str, Case]:
    """All cases by name."""
    known = {"forward": Case(torch="torch, forward")}
    for distribution, aim in (("gaussian", None), ("rademacher", 2.10)):
        for rng, suffix in (("threefry2x32", ""), ("threefry4x32", ", threefry4x32")):
            settings = Estimation(
                "spsa", "weights", distribution=distribution, rng=rng, epsilon=EPSILON, directions_per_step=1
            )
            case = Case(settings, aim, f"torch, pair, {distribution}", FASTER_AIM)
            known[f"pair, weights, {distribution}{suffix}"] = case
    for space, aim in (("low-rank", 2.15), ("gates", 2.05)):
        known[f"pair, {space}"] = Case(Estimation("spsa", space, rank=1, epsilon=EPSILON, directions_per_step=1), aim)
    for name, space, distribution in (
        ("weights, rademacher", "weights", "rademacher"),
        ("low-rank", "low-rank", "gaussian"),
        ("gates", "gates", "gaussian"),
    ):
        for count in per_step:
            settings = Estimation("jvp", space, distribution=distribution, directions_per_step=count)
            known[f"jvp, {name}, {count}"] = Case(settings, 1.5 if (space, count) == ("gates", 8) else None)
    known["exact, gates"] = Case(Estimation("exact", "gates"))
    known["exact, weights"] = Case(Estimation("exact", "weights"), torch="torch, forward and backward")
    return known


# ------------------------------------------------------------------------------------------------------ programs


def chosen(arguments: argparse.Namespace) -> dict[str, Case]:
    """The cases of --programs, and the forward loss."""
    known = cases(arguments.per_step)
    return {name: case for name, case in known.items() if name in ("forward", *(arguments.programs or known))}


def inputs(case: Case, decoder: Decoder, tokens: jax.Array) -> tuple[Any, ...]:
    """The arguments of a program; for a pair those of its first side."""
    if case.settings is None or case.settings.estimator == "exact":
        return decoder, tokens
    directions = draw(case.settings, decoder, 0, case.per_step)
    windows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    step = (jnp.float32(EPSILON),) if case.settings.estimator == "spsa" else ()
    return decoder, directions, tokens, windows, *step


def compiled(case: Case, arrays: tuple[Any, ...]) -> Any:
    """The compiled program for arrays of these shapes, which may be abstract."""
    if case.settings is None:
        return sequence_losses.lower(*arrays).compile()
    if case.settings.estimator == "exact":
        function = gate_gradients if case.settings.space == "gates" else weight_gradients
        return function.lower(*arrays).compile()
    function = losses_at if case.settings.estimator == "spsa" else directional_derivatives
    return function.lower(*arrays, space=space_of(case.settings)).compile()


def program(case: Case, decoder: Decoder, tokens: jax.Array) -> Program:
    """The compiled program of a case with its arguments; a pair runs it for both sides."""
    arrays = inputs(case, decoder, tokens)
    run = compiled(case, arrays)
    if case.settings is None or case.settings.estimator != "spsa":
        return partial(run, *arrays)
    return lambda: (run(*arrays), run(*arrays[:-1], -arrays[-1]))


def torch_programs(shape: str, arguments: argparse.Namespace) -> tuple[dict[str, Program], int]:
    """PyTorch's programs by name, on the device of JAX, and the bytes of their weights."""
    import torch
    import torch_pair

    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        sys.exit(f"PyTorch does not run on JAX's device, {jax.default_backend()}; add --no-torch")
    model = torch_pair.llama(shape, device, getattr(torch, arguments.dtype))
    tokens = torch_pair.random_tokens(shape, arguments.batch, arguments.length, device)
    programs: dict[str, Program] = {"torch, forward": torch_pair.forward_program(model, tokens)}
    for name in torch_pair.DISTRIBUTIONS:
        programs[f"torch, pair, {name}"] = torch_pair.pair_program(model, tokens, EPSILON, 0, name)
    programs["torch, forward and backward"] = torch_pair.gradient_program(model, tokens)
    return programs, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------- time


def out_of_memory(program: Program) -> bool:
    """Whether a program runs out of memory on the device."""
    try:
        seconds(program)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise
        return True
    return False


def time_rows(shape: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each program of one shape."""
    selected = chosen(arguments)
    decoder = random_decoder(shape, arguments.dtype)
    tokens = random_tokens(SHAPES[shape].V, arguments.batch, arguments.length)
    programs = {name: program(case, decoder, tokens) for name, case in selected.items()}
    if arguments.torch:
        programs |= torch_programs(shape, arguments)[0]
    too_large = [name for name, run in programs.items() if out_of_memory(run)]
    times = take_turns({name: run for name, run in programs.items() if name not in too_large}, arguments.rounds)
    typical = medians(times)
    for name in programs:
        case = selected.get(name)
        row = {"kind": "time", "shape": shape, "program": name, "library": "PyTorch" if case is None else "minillm-jax"}
        row |= {"dtype": arguments.dtype, "batch": arguments.batch, "length": arguments.length}
        if case is not None:
            row |= case.record()
        if name in too_large:
            yield row | {"error": "out of memory"}
            continue
        seconds_each = typical[name] / (1 if case is None else case.per_step)
        forward = typical.get("torch, forward" if case is None else "forward")
        row |= {
            "seconds": round(typical[name], 6),
            "seconds_each": round(seconds_each, 6),
            "ratio": None if forward is None else round(seconds_each / forward, 3),
            "aim": None if case is None else case.aim,
            "spread": round(typical[name] / min(times[name]), 3),
        }
        if case is not None and case.torch in typical:
            row |= {"torch": case.torch, "times_faster": round(typical[case.torch] / typical[name], 3)}
            row |= {"times_faster_best": round(min(times[case.torch]) / min(times[name]), 3)}
            row |= {"times_faster_aim": case.faster}
        yield row | {"all_seconds": [round(value, 6) for value in times[name]]}


# -------------------------------------------------------------------------------------------------------- memory


def memory_rows(shape: str, dtype: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each program of one shape, for abstract weights."""
    decoder = build(CONFIG, SHAPES[shape], jnp.dtype(dtype))
    tokens = jax.ShapeDtypeStruct((arguments.batch, arguments.length), jnp.int32)
    layer, stream = layer_bytes(decoder), 4 * arguments.batch * arguments.length * SHAPES[shape].D
    forward = None
    for name, case in chosen(arguments).items():
        arrays = jax.eval_shape(partial(inputs, case), decoder, tokens)
        account = compiled(case, arrays).memory_analysis()
        forward = account.temp_size_in_bytes if forward is None else forward
        extra = account.temp_size_in_bytes - forward
        settings = case.settings
        aim = None if settings is None or settings.estimator == "exact" else MEMORY_AIMS[str(settings.space)]
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
    """The row of kind `process` of a program, which this process runs once."""
    shape, full = arguments.shapes[0], PROCESSES[name].format(most=max(arguments.per_step))
    of_torch = full.startswith("torch")
    if of_torch:
        import torch_pair  # noqa: F401  # counts as an import
    imports = peak_bytes(of_torch)
    if of_torch:
        programs, weights = torch_programs(shape, arguments)
        with_weights = peak_bytes(of_torch)
        seconds(programs[full])
    else:
        decoder = jax.block_until_ready(random_decoder(shape, arguments.dtype))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))
        with_weights = peak_bytes(of_torch)
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
        "weights_peak_bytes": with_weights,
        "peak_bytes": peak_bytes(of_torch),
    }


def process_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each program in its own process, before this process allocates memory on the device."""
    for name in arguments.processes:
        if name.startswith("torch") and not arguments.torch:
            continue
        command = [sys.executable, __file__, "--alone", name, "--shapes", arguments.shapes[0]]
        command += ["--per-step", *map(str, arguments.per_step), "--dtype", arguments.dtype]
        command += ["--batch", str(arguments.batch), "--length", str(arguments.length)]
        variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        yield json.loads(subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout)


# --------------------------------------------------------------------------------------------------------- output


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as tables, on standard error."""
    columns: dict[str, list[tuple[str, str, str]]] = {
        "time": [
            ("seconds", "seconds_each", ".4f"),
            ("forwards", "ratio", ".3f"),
            ("aim ≤", "aim", ".2f"),
            ("spread", "spread", ".2f"),
            ("PyTorch / ours", "times_faster", ".2f"),
            ("best rounds", "times_faster_best", ".2f"),
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
    for kind, fields in columns.items():
        table = Table("shape", "type", "program", *(title for title, _, _ in fields), title=kind)
        for row in (row for row in rows if row["kind"] == kind):
            cells = (_cell(row.get(key), key, form) for _, key, form in fields)
            table.add_row(row["shape"], row["dtype"], row["program"], *([row["error"]] if "error" in row else cells))
        if table.row_count:
            console.print(table)


def _cell(value: float | None, key: str, form: str) -> str:
    if value is None:
        return ""
    return format(value / 1e6 if key.endswith("bytes") else value, form)


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line, checked before the measurements begin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["25M"], choices=list(SHAPES), help="shapes of the time rows")
    parser.add_argument("--memory-shapes", nargs="*", default=["25M", "7B"], choices=list(SHAPES))
    parser.add_argument("--programs", nargs="+", help="names of estimators as the rows give them; all by default")
    parser.add_argument("--processes", nargs="*", default=list(PROCESSES), choices=list(PROCESSES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--per-step", nargs="+", type=int, default=[1, 8], help="directions in one pass of jvp")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="type of the time rows")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--alone", choices=list(PROCESSES), help="run only this program of --processes, in this process"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.length < 2 or min([arguments.batch, arguments.rounds, *arguments.per_step]) < 1:
        parser.error("--length must be at least 2; --batch, --rounds and --per-step must be at least 1")
    if unknown := set(arguments.programs or ()) - set(cases(arguments.per_step)):
        parser.error(f"unknown programs: {'; '.join(sorted(unknown))}")
    if (arguments.processes or arguments.alone) and not arguments.shapes:
        parser.error("--processes needs a shape; give --shapes, or leave --processes empty")
    return arguments


def all_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of kind `process`, `time` and `memory`, in this order."""
    yield from process_rows(arguments)
    for shape in arguments.shapes:
        yield from time_rows(shape, arguments)
    for dtype in DTYPES if arguments.memory_shapes and jax.default_backend() != "cpu" else DTYPES[:1]:
        for shape in arguments.memory_shapes:
            yield from memory_rows(shape, dtype, arguments)


def main() -> None:
    """Print a line for each row, then tables, and write the JSON."""
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
