"""The benchmarks run, and their numbers agree with each other. No test asserts a time."""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.model.build import build
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder, finish, project_to_vocabulary, rotary_angles
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.modules import Block
from minillm_jax.pruning.refit import prune_by_obs
from minillm_jax.settings import SOLVERS, Refit
from tests.helpers import hugging_face_folder, random_tokens

ROOT = Path(__file__).parents[1]
EPSILON = 1e-3


def test_flops_equal_the_count_of_the_compiler(bench: Callable[[str], ModuleType]) -> None:
    """One block outside of any scan, and the head. The terms that the formula omits are a few percent at this size."""
    batch, length = 2, 96
    config = bench("shapes").CONFIG
    decoder = build(config, Sizes(V=4096, D=256, H=32, layers=(LayerSizes(N=8, K=4, F=704),)))
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), decoder.runs[0])
    flops = bench("flops").loss_flops(decoder, batch, length)

    def one_block(block: Block, x: jax.Array) -> jax.Array:
        return apply_layer(block, config, x, rotary_angles(decoder, length))[0]

    def head(decoder: Decoder, x: jax.Array) -> jax.Array:
        return project_to_vocabulary(decoder, finish(decoder, x))

    def counted(function: Callable[..., jax.Array], weights: object, length: int) -> float:
        x = jax.ShapeDtypeStruct((batch, length, 256), jnp.float32)
        return jax.jit(function).lower(weights, x).compile().cost_analysis()["flops"]

    assert counted(one_block, block, length) == pytest.approx(flops.blocks + flops.attention, rel=0.03)
    assert counted(head, decoder, length - 1) == pytest.approx(flops.head, rel=0.03)
    assert flops.total == flops.blocks + flops.attention + flops.head


def test_flops_add_up_over_layers_and_need_no_weights(bench: Callable[[str], ModuleType]) -> None:
    config = bench("shapes").CONFIG
    wide, narrow = LayerSizes(N=4, K=2, F=24), LayerSizes(N=2, K=1, F=8)

    def flops(*layers: LayerSizes) -> tuple[int, int, int]:
        counted = bench("flops").loss_flops(build(config, Sizes(V=61, D=16, H=4, layers=layers)), 3, 10)
        return counted.blocks, counted.attention, counted.head

    blocks, attention, head = flops(wide, wide, narrow)
    assert head == 2 * 3 * 9 * 61 * 16
    assert (blocks, attention) == tuple(2 * a + b for a, b in zip(flops(wide)[:2], flops(narrow)[:2], strict=True))
    assert flops(narrow)[:2] == (2 * 3 * 10 * (16 * 4 * (2 + 1 + 1 + 2) + 3 * 16 * 8), 4 * 3 * 100 * 2 * 4)


def test_the_peak_depends_on_device_and_type(bench: Callable[[str], ModuleType]) -> None:
    class H100:
        device_kind = "NVIDIA H100 80GB HBM3"

    flops = bench("flops")
    assert flops.known_peak(H100(), jnp.bfloat16) == 989e12
    assert flops.known_peak(H100(), jnp.float32) == 67e12
    assert flops.known_peak(jax.devices("cpu")[0], jnp.float32) is None


def test_a_study_of_some_recipes_leaves_the_other_rows(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    quality, output = bench("quality"), tmp_path / "quality.json"
    rows = [{"recipe": "fms", "ratio": 0.2}, {"recipe": "ours", "commit": "b"}, {"recipe": "obs", "commit": "b"}]
    output.write_text(json.dumps({"environment": {"commit": "a"}, "rows": rows}))
    kept = quality.kept_rows(output, ["ours"])
    assert kept == [{"commit": "a", "recipe": "fms", "ratio": 0.2}, {"commit": "b", "recipe": "obs"}]
    assert quality.kept_rows(output, []) == quality.kept_rows(tmp_path / "none", ["ours"]) == []


def test_programs_take_turns(bench: Callable[[str], ModuleType]) -> None:
    calls: list[str] = []
    timing = bench("timing")
    times = timing.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "abababab"
    assert {name: len(durations) for name, durations in times.items()} == {"a": 3, "b": 3}
    assert timing.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a benchmark as a user does, with fewer optimisations for a quick compilation."""
    variables = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_forward_bench_writes_the_rows_it_prints(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    output = tmp_path / "forward.json"
    command = [sys.executable, "bench/forward.py", "--presets", "tiny", "--models", "minillm_jax/demo_model"]
    command += ["--batches", "2", "--lengths", "16", "--depths", "1", "3", "--rounds", "2"]
    command += ["--compile-rounds", "1", "--product", "64", "--output", str(output)]
    process = _run(command)
    assert process.returncode == 0, process.stderr
    written = json.loads(output.read_text())
    assert [json.loads(line) for line in process.stdout.splitlines()] == written["rows"]
    assert {"device", "versions", "commit"} <= set(written["environment"])
    compiled, forward = ([row for row in written["rows"] if row["kind"] == kind] for kind in ("compile", "forward"))
    assert [row["layers"] for row in compiled] == [1, 3]
    assert compiled[0]["ratio"] == 1.0
    assert [(row["model"], row["batch"]) for row in forward] == [("tiny", 2), ("demo_model", 2)]
    for row in forward:
        seconds = row["milliseconds"] / 1e3
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 16 / seconds, rel=0.05)
        assert row["mfu"] == pytest.approx(row["model_flops"] / seconds / row["peak"], rel=0.05, abs=1e-4)
        assert row["compiled_bytes"] > 4 * row["parameters"]
    tables = bench("tables")
    assert (len(tables.forward_rows(tmp_path)), len(tables.compile_rows(tmp_path))) == (2, 2)


def test_forward_bench_rejects_windows_without_predictions() -> None:
    command = [sys.executable, "bench/forward.py", "--lengths", "1"]
    process = _run(command)
    assert process.returncode == 2
    assert "lengths are at least 2" in process.stderr


@pytest.mark.slow
def test_estimate_bench_writes_the_rows_it_prints(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Rows of kind time and memory for every program, PyTorch's too, and of a process; tables accepts them."""
    output = tmp_path / "estimate.json"
    command = [sys.executable, "bench/estimate.py", "--shapes", "tiny", "--memory-shapes", "tiny", "--rounds", "2"]
    command += ["--per-step", "1", "2", "--batch", "2", "--length", "8", "--processes", "forward"]
    # Without optimisations threefry4x32 takes minutes to compile.
    names = ["forward", "pair, weights, rademacher", "pair, gates", "jvp, gates, 2", "exact, weights"]
    command += ["--programs", *names[1:]]
    process = _run([*command, "--output", str(output)])
    assert process.returncode == 0, process.stderr
    written = json.loads(output.read_text())
    assert [json.loads(line) for line in process.stdout.splitlines()] == written["rows"]
    assert {"torch", "jax"} <= set(written["environment"]["versions"])
    assert written["settings"]["per_step"] == [1, 2]
    assert set(names) < set(bench("estimate").cases([1, 2]))
    time, memory, alone_rows = (
        {row["program"]: row for row in written["rows"] if row["kind"] == kind}
        for kind in ("time", "memory", "process")
    )
    assert list(time) == [*names, *(f"torch, {name}" for name in TORCH_PROGRAMS)]
    assert list(memory) == names
    assert list(alone_rows) == ["forward"]
    for row in time.values():
        forward = time["forward" if row["library"] == "minillm-jax" else "torch, forward"]["seconds"]
        assert row["seconds_each"] * row.get("per_step", 1) == pytest.approx(row["seconds"], rel=0.01)
        assert row["ratio"] == pytest.approx(row["seconds_each"] / forward, rel=0.05, abs=2e-3)
        if "torch" in row:
            assert row["times_faster"] == pytest.approx(time[row["torch"]]["seconds"] / row["seconds"], rel=0.05)
    assert time["pair, weights, rademacher"]["torch"] == "torch, pair, rademacher"
    assert (time["pair, weights, rademacher"]["aim"], time["pair, gates"]["aim"]) == (2.10, 2.05)
    assert all(row["stream_bytes"] == 4 * 2 * 8 * 64 for row in memory.values())
    assert memory["exact, weights"]["output_bytes"] == pytest.approx(2 * memory["forward"]["layer_bytes"], rel=0.01)
    (alone,) = alone_rows.values()
    assert 0 < alone["imports_peak_bytes"] <= alone["weights_peak_bytes"] <= alone["peak_bytes"]
    tables = bench("tables")
    assert len(tables.estimate_rows(tmp_path)) == len(tables.estimate_memory_rows(tmp_path)) == len(names) - 1
    assert (len(tables.estimate_torch_rows(tmp_path)), len(tables.process_rows(tmp_path))) == (3, 1)


# ------------------------------------------------------------------------------------------------------- PyTorch

TORCH_PROGRAMS = ("forward", "pair, gaussian", "pair, rademacher", "forward and backward")


def test_torch_computes_the_same_loss(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """The compared programs of PyTorch and JAX compute the same loss of the same arrays."""
    reference = bench("torch_pair")
    model, tokens = reference.llama("tiny"), reference.random_tokens("tiny", 3, 20)
    model.save_pretrained(tmp_path)
    decoder = read_model(tmp_path).decoder
    assert sum(matrix.numel() for matrix in reference.block_matrices(model)) == sum(
        kernel.size for kernel in jax.tree.leaves(decoder.runs) if kernel.ndim > 2
    )
    ours = np.asarray(sequence_losses(decoder, jnp.asarray(tokens.numpy(), jnp.int32))).sum() / (3 * 19)
    assert reference.forward_program(model, tokens)() == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_torch_pair_computes_two_losses_and_restores_the_weights(
    bench: Callable[[str], ModuleType], distribution: str
) -> None:
    reference = bench("torch_pair")
    model, tokens = reference.llama("tiny"), reference.random_tokens("tiny", 3, 20)
    original = copy.deepcopy(model)
    plus, minus = reference.pair_program(model, tokens, EPSILON, 5, distribution)()
    for before, after in zip(original.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-7)
    directions = [torch.zeros_like(matrix) for matrix in reference.block_matrices(original)]
    reference.perturber(directions, distribution)(1.0, 5)
    for scale, loss in ((EPSILON, plus), (-EPSILON, minus)):
        moved = copy.deepcopy(original)
        for matrix, z in zip(reference.block_matrices(moved), directions, strict=True):
            matrix.add_(z, alpha=scale)
        assert reference.mean_loss(moved, tokens).item() == pytest.approx(loss, rel=1e-6)
    _, gradients = reference.gradient_program(original, tokens)()
    slope = sum(float((g * z).sum()) for g, z in zip(gradients, directions, strict=True))
    assert (plus - minus) / (2 * EPSILON) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_torch_directions_are_independent_and_of_unit_variance(
    bench: Callable[[str], ModuleType], distribution: str
) -> None:
    """All 64 bits of a word are used, sizes may leave a word unfilled, and matrices and seeds have other entries."""
    perturber = bench("torch_pair").perturber
    matrices = [torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(7, 13)]
    move = perturber(matrices, distribution)
    columns = []
    for seed in range(60):
        for matrix in matrices:
            matrix.zero_()
        move(1.0, seed)
        columns += [matrix.clone() for matrix in matrices[:2]]
        assert matrices[2].abs().min() > 0
    directions = torch.stack(columns)  # [120, 64, 64]
    assert directions.mean(dim=(0, 1)).abs().max() < 5 * (120 * 64) ** -0.5
    assert directions.var() == pytest.approx(1.0, abs=0.02)
    flat = directions.flatten(1)
    overlaps = (flat @ flat.T) / flat.shape[1] - torch.diag((flat**2).mean(1))
    assert overlaps.abs().max() < 6 * flat.shape[1] ** -0.5
    if distribution == "rademacher":
        assert set(flat.unique().tolist()) == {-1.0, 1.0}


def test_refit_bench_times_every_part(bench: Callable[[str], ModuleType]) -> None:
    """The parts of a layer sum to its seconds, no part is counted twice, and the functions are restored."""
    refit = bench("refit")
    before = {part: getattr(module, name) for part, (module, name) in refit.PARTS["host"].items()}
    settings = {"preset": "tiny", "layers": 2, "dtype": "float32", "samples": 2, "length": 16, "solver": "host"}
    first, second, total = refit.layers(argparse.Namespace(ratio=0.5, **settings))
    assert before == {part: getattr(module, name) for part, (module, name) in refit.PARTS["host"].items()}
    for row in (first, second):
        assert sum(row[part] for part in (*before, "rest")) == pytest.approx(row["seconds"], abs=0.02)
        assert row["rest"] > -0.02
    assert total["layers"] == 2
    assert total["seconds"] == pytest.approx(2 * second["seconds"], abs=0.1)
    assert total["peak_bytes"] > total["layer_bytes"] > 4 * 3 * 64 * 160


@pytest.mark.parametrize("solver", SOLVERS)
def test_refit_bench_watches_the_functions_that_the_refit_calls(
    bench: Callable[[str], ModuleType], solver: str
) -> None:
    refit = bench("refit")
    decoder = bench("shapes").random_decoder("tiny")
    windows = np.asarray(bench("shapes").random_tokens(96, 8, 16))
    with refit.watched(solver) as seconds:
        prune_by_obs(decoder, {"head": [1, 1], "channel": [80, 80]}, Batches(windows), Refit(solver=solver))
    assert seconds.keys() == refit.PARTS[solver].keys()
    assert all(value > 0 for value in seconds.values()), seconds


def test_labels_of_a_plot_keep_their_distance(bench: Callable[[str], ModuleType]) -> None:
    pytest.importorskip("matplotlib")
    heights = bench("plots").spread([4.2, 4.3, 16.0, 21.0, 27.7, 31.0, 57.0], 1.2)
    assert all(above / below > 1.19 for below, above in pairwise(heights))


def test_transformers_accepts_a_pruned_model_as_a_draft(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    draft = bench("draft")
    folders = hugging_face_folder(tmp_path / "dense"), hugging_face_folder(tmp_path / "pruned", intermediate_size=24)
    dense, pruned = (draft.load(str(folder), "float32") for folder in folders)
    draft.draft_exactly(pruned, 3)
    prompts = [torch.from_numpy(random_tokens(97, 1, 6).astype(np.int64))]
    found = draft.measure(dense, pruned, prompts, 5, 1)
    assert found["accepted_by_transformers"]
    assert found["same"] == 1
    assert 1 <= found["tokens_per_pass"] <= 4
