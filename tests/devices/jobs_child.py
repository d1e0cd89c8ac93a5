"""The programs that test_jobs.py runs in their own processes: whole runs on meshes, and the walk's use of devices.

`python -m tests.devices.jobs_child NAME ARGUMENTS...` calls the function of that name and prints its result as JSON.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg
from jax import numpy as jnp

from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts, sharding
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder, rotary_angles
from minillm_jax.model.digest import model_digest
from minillm_jax.model.modules import Block
from minillm_jax.pruning import refit, walk
from minillm_jax.pruning.refit import prune_by_obs
from minillm_jax.recipes import recipe as recipes
from minillm_jax.run import Job, run
from minillm_jax.scoring.gradient.estimate import estimate
from minillm_jax.scoring.gradient.plan import Plan
from minillm_jax.settings import Estimation, Refit
from tests.devices.mesh_child import (
    EVEN,
    KEPT,
    batches_for,
    disable_optimizations,
    make_decoder,
    make_mesh,
    make_tokens,
)

# The options of every run, and those of each.
COMMON = {"ratio": 0.4, "samples": 8, "seq_len": 16, "structures": "heads,channels"}
# The refit multiplies the rounding of float32 sums by up to the inverse of its ridge.
RIDGE = {"ridge": 0.1}
JOBS: dict[str, dict[str, Any]] = {
    "obs": RIDGE,
    "wanda": RIDGE | {"criterion": "wanda"},
    "fms": {"criterion": "fms", "directions": 4, "epsilon": "auto", "refit": "none"},
    "flap": RIDGE | {"criterion": "flap", "allocation": "global"},
    "measured": RIDGE | {"allocation": "measured"},
    "search": RIDGE | {"allocation": "search"},
    "held-out ridge": {},
    "device": RIDGE | {"solver": "device"},
    "device, measured": RIDGE | {"solver": "device", "allocation": "measured"},
    "device, held-out ridge, streamed": {"solver": "device", "stream": True},
    "layers": {"structures": "hidden,layers", "criterion": "wanda"},
    "streamed": RIDGE | {"stream": True},
    "streamed fms": {"criterion": "fms", "directions": 4, "epsilon": 1e-2, "refit": "none", "stream": True},
    "resumed": RIDGE,
    "streamed, resumed": RIDGE | {"stream": True, "criterion": "wanda"},
}

# Runs of the quick tests; the slow ones take all.
QUICK = ("streamed, resumed",)

MESHES = {"data": "data=4,model=1", "model": "data=1,model=4", "both": "data=2,model=2", "fsdp": "fsdp=2,model=2"}


def run_job(folder: str, name: str, output: Path, mesh: str | None = None, checkpoint: bool = False) -> None:
    """One whole run, from the folder with the model and the text."""
    options = COMMON | {"calibration": f"{folder}/tokens.npy", "evaluate": f"{folder}/tokens.npy"} | JOBS[name]
    options |= {} if mesh is None else {"mesh": mesh}
    options |= {"checkpoint": f"{output} saved"} if checkpoint else {}
    recipe, given = recipes.with_options(recipes.load(recipes.DEFAULT), options)
    job = Job(f"{folder}/model", str(output), recipe, given)
    if "resumed" in name:
        with pytest.raises(InterruptedError):
            run(job, interrupt)
        assert (output.parent / f"{output.name}.checkpoint").is_dir()
    run(job)


def interrupt(stage: str, done: int, total: int) -> None:
    """Ends a run in the second of its three layers, in all processes."""
    if stage == "refit" and done == 3:
        raise InterruptedError


def joined_jobs(folder: str, out: str, meshes: str, names: str, address: str) -> dict[str, Any]:
    """Whole runs in one of two processes, of which the second would decide otherwise."""
    hosts.initialise_hosts(hosts.parse_hosts(address))
    disable_optimizations(True)
    if not hosts.is_writer():
        decide_otherwise()
    for mesh in meshes.split("+"):
        for name in names.split("+"):
            run_job(folder, name, Path(out, f"{mesh} {name}"), MESHES[mesh], checkpoint=name == "fms")
    return {
        "writer": hosts.is_writer(),
        "errors": errors_of_mixed_inputs(folder, out),
        "projected": estimate_by_two_clocks(Path(out, "two clocks")).tolist(),
    }


def decide_otherwise() -> None:
    """Gives this process wrong solutions of linear systems, and the opposite of every best choice and order."""
    patch, smallest, order = pytest.MonkeyPatch(), np.argmin, np.argsort
    patch.setattr(scipy.linalg, "cho_solve", lambda factor, right, **_: np.zeros_like(right))
    patch.setattr(np, "argmin", lambda a, *rest, **more: (np.argmax if is_score(a) else smallest)(a, *rest, **more))
    patch.setattr(np, "argsort", lambda a, *rest, **more: order(-a if is_score(a) else a, *rest, **more))


def is_score(array: Any) -> bool:
    """Whether an array holds numbers that are compared; JAX itself sorts whole numbers only, some of them as floats."""
    values = np.asarray(array) if isinstance(array, np.ndarray | list) else np.zeros(0, int)
    return values.dtype.kind == "f" and bool((values != np.rint(values)).any())


def estimate_by_two_clocks(folder: Path) -> np.ndarray:
    """A gradient estimate that process 0 wants to save at every call, and the other process only at the end."""
    decoder = sharding.shard(make_decoder(EVEN), make_mesh(2, 2))
    batches = batches_for(decoder, make_tokens(8, EVEN.V))
    settings = Estimation("spsa", directions=4, distribution="rademacher", epsilon=1e-2)
    plan, seconds = Plan(per_step=1, chunks=1, tokens=batches.tokens), 0.0 if hosts.is_writer() else 1e9
    projected = estimate(decoder, batches, settings, None, folder, plan, save_every=seconds).projected
    assert projected is not None
    return projected


def errors_of_mixed_inputs(folder: str, out: str) -> list[str]:
    """The errors of runs whose processes were given other settings, and other texts under one name."""
    return [
        error_of_a_run(folder, folder, out, {} if hosts.is_writer() else {"seed": 1}),
        error_of_a_run(folder, folder if hosts.is_writer() else f"{folder}/other", out, {}),
    ]


def error_of_a_run(folder: str, texts: str, out: str, options: dict[str, Any]) -> str:
    """The error of a run that reads the file `tokens.npy` of one folder, and the model of another."""
    options = COMMON | {"calibration": "tokens.npy", "mesh": MESHES["data"]} | options
    recipe, given = recipes.with_options(recipes.load(recipes.DEFAULT), options)
    with chdir(texts), pytest.raises(InputError) as caught:
        run(Job(f"{folder}/model", f"{out}/mixed", recipe, given))
    return str(caught.value)


# ------------------------------------------------------------------------------------------ one process, 8 devices


def devices_of_walk() -> dict[str, Any]:
    """How the walk uses eight devices: bytes on each during the walk, work of each, and the result."""
    disable_optimizations(True)
    shapes = {"data": (8, 1), "model": (1, 8), "both": (2, 4)}
    results = {name: on_mesh(*shape) for name, shape in shapes.items()}
    results = {"meshes": results, "bytes": bytes_during_the_walk(), "operations": operations(shapes)}
    single = make_decoder(EVEN)
    digests = {model_digest(sharding.shard(single, make_mesh(*shape))) for shape in shapes.values()}
    return results | {"same model": digests == {model_digest(single)}}


def on_mesh(data: int, model: int) -> dict[str, Any]:
    """Differences of a model pruned on a mesh from that pruned on one device: groups, and weights."""
    single, tokens = make_decoder(EVEN), make_tokens(64, EVEN.V)
    decoder, counts = sharding.shard(single, make_mesh(data, model)), {"head": [4, 5], "channel": [40, 40]}
    pruned, kept = prune_by_obs(decoder, counts, batches_for(decoder, tokens), Refit(ridge=0.3))
    expected, expected_kept = prune_by_obs(single, counts, Batches(tokens), Refit(ridge=0.3))
    same = all(np.array_equal(a, b) for kind in kept for a, b in zip(kept[kind], expected_kept[kind], strict=True))
    pairs = list(zip(jax.tree.leaves(pruned), jax.tree.leaves(expected), strict=True))
    largest = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) / max(1.0, float(np.abs(b).max())) for a, b in pairs]
    return {"kept": same, "difference": max(largest)}


def bytes_during_the_walk() -> dict[str, Any]:
    """The largest share of the weights of a layer on any device, as each sublayer is finished."""
    single, tokens = make_decoder(EVEN), make_tokens(8, EVEN.V)
    decoder, shares = sharding.shard(single, make_mesh(2, 4)), []
    settings = refit.resolve(Refit(), decoder.config)

    def replace(site: walk.Site) -> Block:
        layer = refit.prune_site(site, site.kind, KEPT[site.kind][site.layer], settings)
        on_device: Counter[int] = Counter()
        cut = [array for array in jax.tree.leaves(layer) if array.ndim > 2]
        for shard in (shard for array in cut for shard in array.addressable_shards):
            on_device[shard.device.id] += shard.data.nbytes
        shares.append(max(on_device.values()) / sum(array.nbytes for array in cut))
        return layer

    walk.walk(decoder, batches_for(decoder, tokens), replace)
    return {"largest share": max(shares), "sublayers": len(shares)}


def operations(shapes: dict[str, tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Floating-point operations of the walk's programs on one device, as a share of those without a mesh."""
    single, tokens = make_decoder(EVEN), make_tokens(16, EVEN.V)
    expected = programs(single, Batches(tokens))
    shares = {}
    for name, shape in shapes.items():
        decoder = sharding.shard(single, make_mesh(*shape))
        on_one = programs(decoder, batches_for(decoder, tokens))
        shares[name] = {program: on_one[program] / expected[program] for program in expected}
    return shares


def programs(decoder: Decoder, batches: Batches) -> dict[str, float]:
    """Operations of one device: to advance a batch, to find its inputs, and to sum its moments; MLP sublayer."""
    mesh, (batch,) = batches.mesh, batches
    settings = {"kind": "channel", "config": decoder.config, "mesh": mesh}
    settings |= {"angles": rotary_angles(decoder, batches.length)}
    layer, state = next(sharding.layers_of(decoder, mesh)), walk.begin(decoder, batch.tokens, mesh=mesh)
    pair = walk.inputs_and_gaps(layer, state, state.stream, **settings)
    shares = sharding.shares(len(batch.tokens), mesh)
    centers = tuple(jnp.zeros(part.shape[-1]) for part in pair)
    lowered = {
        "advance": walk.advance.lower(layer, state, **settings),
        "inputs": walk.inputs_and_gaps.lower(layer, state, state.stream, **settings),
        "moments": walk.add_pair.lower(walk.no_sums(pair, shares, mesh), pair, centers, shares=shares, mesh=mesh),
    }
    return {name: program.compile().cost_analysis()["flops"] for name, program in lowered.items()}


FUNCTIONS: dict[str, Callable[..., Any]] = {"jobs": joined_jobs, "walk": devices_of_walk}

if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(FUNCTIONS[sys.argv[1]](*sys.argv[2:])))
