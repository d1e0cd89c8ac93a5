"""The programs that test_sharding.py runs in their own processes, because JAX fixes the number of devices at its start.

`python -m tests.devices.mesh_child NAME ARGUMENTS...` calls the function of that name and prints its result as JSON.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert import reader, writer
from minillm_jax.data.batches import Batch, Batches
from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.sharding import MeshShape
from minillm_jax.evaluation.perplexity import perplexity, window_losses
from minillm_jax.model import axis_table
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, LayerSizes, Routing, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.ops import Rope
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning.experts import Choice, prune_experts
from minillm_jax.pruning.refit import resolve as resolve_refit
from minillm_jax.pruning.refit import slice_and_refit
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.scoring.activations import activation_norms
from minillm_jax.scoring.gradient import directions, slopes
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.estimate import estimate, measure_call
from minillm_jax.scoring.gradient.plan import Plan
from minillm_jax.scoring.gradient.settings import resolve
from minillm_jax.scoring.gradient.spaces import Gates, LowRank, Space, Weights
from minillm_jax.settings import Estimation, Refit
from tests.helpers import compilations

CONFIG = DecoderConfig("llama", 1e-5, Rope(10000.0))
EVEN = Sizes(V=64, D=32, H=4, layers=(LayerSizes(N=16, K=8, F=64),) * 2)
# Neither key/value heads nor vocabulary divide by 4, but query heads and channels do.
ODD = Sizes(V=61, D=32, H=4, layers=(LayerSizes(N=12, K=3, F=20),) * 2)

EPSILON = np.float32(0.01)

# Three positions of eight sequences: the loss takes several chunks.
LOGITS_AT_ONCE = 8 * EVEN.V * 3

SPACES: dict[str, Space] = {
    "gaussian": Weights(),
    "rademacher": Weights("rademacher"),
    "low-rank": LowRank(2),
    "gates": Gates(),
}


# Shape of the mesh (`data`, `model`, `fsdp`) -> the spaces whose paired losses are measured on it.
MESHES = {
    (8, 1): ("gaussian",),
    (4, 2): ("rademacher",),
    (2, 4): tuple(SPACES),
    (1, 8): ("gates",),
    (1, 2, 4): ("rademacher", "gates"),
}

# Half of the groups of the decoder of size `EVEN`.
KEPT = {kind: [np.arange(0, count, 2)] * 2 for kind, count in (("head", 8), ("channel", 64))}

_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@cache
def make_decoder(sizes: Sizes, config: DecoderConfig = CONFIG) -> Decoder:
    random = np.random.default_rng(0)  # NumPy compiles nothing
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), build(config, sizes))


def make_tokens(count: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (count, 9), dtype=np.int32)


def make_mesh(data: int, model: int, fsdp: int = 1) -> Mesh:
    mesh = sharding.make_mesh(MeshShape(data, model, fsdp))
    assert mesh is not None
    return mesh


def batches_for(decoder: Decoder, tokens: np.ndarray) -> Batches:
    """Windows in batches on the devices of a decoder."""
    return Batches(tokens, sharding.mesh_of(decoder))


def relative_difference(values: Any, expected: Any) -> float:
    """The largest relative difference between two trees of arrays."""
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) / np.asarray(b) - 1))) for a, b in pairs)


def communication(compiled: Any) -> list[tuple[str, list[int]]]:
    """Name and shape of every collective operation in a compiled program."""
    operations = []
    for line in compiled.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            operations += [(match[2], [int(size) for size in shape.split(",") if size]) for shape in shapes]
    return operations


def disable_optimizations(disable: bool) -> None:
    """Compiles without optimizations, as conftest.py does in most modules, or with them, as users do."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", disable)


def paired_losses(decoder: Decoder, tokens: np.ndarray, space: Space) -> tuple[np.ndarray, Any]:
    """The losses of both sides of two directions on the decoder's devices, [2, 2, B], and a program."""
    programs, single = [], [jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], plain(2)) for n in range(2)]

    def program(batch: Batch) -> np.ndarray:
        shared = (batch.tokens, batch.numbers)
        run = slopes.losses_at.lower(decoder, single[0], *shared, EPSILON, space, LOGITS_AT_ONCE).compile()
        programs.append(run)
        sides = [run(decoder, direction, *shared, step) for direction in single for step in (EPSILON, -EPSILON)]
        return np.concatenate([sharding.gather(side) for side in sides]).reshape(2, 2, -1)

    return batches_for(decoder, tokens).collect(program), programs[0]


def plain(count: int) -> Directions:
    return Directions.plain(directions.direction_keys(0, 0, count))


# Settings of the estimates on several devices.
ESTIMATES = {
    "spsa": Estimation("spsa", directions=4, distribution="rademacher", epsilon=1e-2),
    "jvp": Estimation("jvp", "gates", 4, per_sequence=True, directions_per_step=2),
}


def estimates(decoder: Decoder, tokens: np.ndarray, checkpoint: Path | None = None) -> dict[str, np.ndarray]:
    """The projected gradients of `ESTIMATES`, [P, B], and the exact gate gradients summed over channels, [L, B]."""
    gradients, batches = {}, batches_for(decoder, tokens)
    for name, settings in ESTIMATES.items():
        folder = None if checkpoint is None else checkpoint / name
        gradients[name] = estimate(decoder, batches, settings, checkpoint=folder).projected
        assert gradients[name] is not None
    exact = estimate(decoder, batches, Estimation("exact", "gates")).exact
    assert exact is not None
    return gradients | {"exact": sharding.gather(exact[0]["channel"]).sum(-1)}


@cache
def paired_losses_on_one_device(sizes: Sizes, count: int, name: str) -> np.ndarray:
    return paired_losses(make_decoder(sizes), make_tokens(count, sizes.V), SPACES[name])[0]


# -------------------------------------------------------------------------------------------- one process, 8 devices


def devices(folder: str, out: str) -> dict[str, Any]:
    """The results of one process with eight devices."""
    disable_optimizations(False)
    results: dict[str, Any] = {"directions": directions_are_equal()}
    disable_optimizations(True)
    meshes = {"odd": on_mesh((2, 4), ODD, 7, ("rademacher",))}
    meshes |= {",".join(map(str, shape)): on_mesh(shape, EVEN, 8, names) for shape, names in MESHES.items()}
    results["differences"] = {name: differences for name, (differences, _) in meshes.items()}
    results["communication"] = {name: operations for name, (_, operations) in meshes.items()}
    results["communication"]["gather"] = communication_of_gather()
    results |= {"directions over data": directions_over_data(), "slices": slices_are_equal()}
    results["estimates"], results["refitted"] = differences_of_estimates(), refitted()
    return results | loading(Path(folder), Path(out))


def fewer_experts() -> dict[str, Any]:
    """A mixture of experts on a mesh, compared with one device: losses, kept experts, refitted experts, shards."""
    disable_optimizations(True)
    config = replace(CONFIG, family="mixtral", routing=Routing(2))
    sizes = replace(EVEN, layers=(LayerSizes(N=4, K=4, F=0, X=6, W=8),) * 2)
    single, tokens = make_decoder(sizes, config), make_tokens(16, sizes.V)
    spread = sharding.shard(single, make_mesh(2, 4))
    both = single, spread
    losses = [window_losses(one, batches_for(one, tokens)) for one in both]
    settings = resolve_refit(Refit(ridge=0.1), config)
    pruned = [prune_experts(one, Choice(4, 6), batches_for(one, tokens), settings) for one in both]
    (first, kept), (second, kept_on_mesh) = pruned
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    down = spread.runs[0].experts.down
    return {
        "losses": relative_difference(*reversed(losses)),
        "kept": _lists(kept) == _lists(kept_on_mesh),
        "weights": max(float(np.max(np.abs(sharding.gather(a) - sharding.gather(b)), initial=0.0)) for a, b in pairs),
        "shard": list(down.addressable_shards[0].data.shape),
    }


def _lists(kept: axis_table.Kept) -> dict[str, list[list[int]]]:
    return {kind: [np.asarray(rows).tolist() for rows in layers] for kind, layers in kept.items()}


def on_mesh(shape: tuple[int, ...], sizes: Sizes, count: int, names: Sequence[str]) -> tuple[dict, dict]:
    """Differences of losses and statistics on a mesh from those on one device; communication of the paired losses."""
    single, tokens = make_decoder(sizes), make_tokens(count, sizes.V)
    decoder = sharding.shard(single, make_mesh(*shape))
    in_chunks = partial(sequence_losses, logits_at_once=LOGITS_AT_ONCE)
    functions = {
        "sequences": partial(window_losses, losses=in_chunks),
        "perplexity": lambda decoder, batches: perplexity(decoder, batches).loss,
        "norms": activation_norms,
    }
    differences = {
        name: relative_difference(function(decoder, batches_for(decoder, tokens)), function(single, Batches(tokens)))
        for name, function in functions.items()
    }
    programs = {}
    for name in names:
        losses, compiled = paired_losses(decoder, tokens, SPACES[name])
        differences[name] = relative_difference(losses, paired_losses_on_one_device(sizes, count, name))
        programs[name] = communication(compiled)
    return differences, programs


def communication_of_gather() -> list[tuple[str, list[int]]]:
    """The communication that replicates the paired losses of two directions."""
    mesh = make_mesh(8, 1)
    over_data, replicated = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(None, None, sharding.DATA), PartitionSpec())
    )
    losses = jax.ShapeDtypeStruct((2, 2, 8), jnp.float32, sharding=over_data)
    return communication(jax.jit(lambda losses: losses, out_shardings=replicated).lower(losses).compile())


def directions_over_data() -> dict[str, Any]:
    """Three windows do not divide by four devices, so each device measures one of four directions on all windows.

    The estimate calls the compiled program with directions spread over `data`: a call with directions that are spread
    here compiles nothing again.
    """
    single, tokens, mesh = make_decoder(EVEN), make_tokens(3, EVEN.V), make_mesh(4, 1)
    decoder, batches = sharding.shard(single, mesh), Batches(tokens, mesh)
    settings = resolve(Estimation("spsa", directions=4, distribution="rademacher", epsilon=float(EPSILON)))
    plan = Plan(per_step=4, chunks=1, tokens=batches.tokens_per_batch)
    expected = measure_call(single, Batches(tokens), settings, plan, 0, 4)
    (batch,) = batches
    spread = jax.device_put(plain(4), NamedSharding(mesh, PartitionSpec(sharding.DATA)))
    arguments = (decoder, spread, batch.tokens, batch.numbers, jnp.float32(EPSILON), SPACES["rademacher"])
    with compilations("losses_at") as compiled:
        losses = measure_call(decoder, batches, settings, plan, 0, 4)
        slopes.losses_at(*arguments)
    return {
        "difference": relative_difference(losses, expected),
        "compilations": len(compiled),
        "communication": communication(slopes.losses_at.lower(*arguments).compile()),
    }


def differences_of_estimates() -> dict[str, float]:
    """Differences of estimates on a mesh from those on one device, relative to the largest; 7 windows, 2 devices."""
    single, tokens = make_decoder(EVEN), make_tokens(7, EVEN.V)
    expected = estimates(single, tokens)
    gradients = estimates(sharding.shard(single, make_mesh(2, 4)), tokens)
    return {name: float(np.abs(gradients[name] - e).max() / np.abs(e).max()) for name, e in expected.items()}


def refitted() -> dict[str, Any]:
    """Difference of the loss of a model refitted on a mesh from that on one device; shares of its arrays."""
    single, tokens = make_decoder(EVEN), make_tokens(8, EVEN.V)
    decoder = sharding.shard(single, make_mesh(2, 4))
    pruned = slice_and_refit(decoder, KEPT, batches_for(decoder, tokens))
    expected = slice_and_refit(single, KEPT, Batches(tokens))
    loss, expected_loss = (perplexity(model, batches_for(model, tokens)).loss for model in (pruned, expected))
    return {"difference": relative_difference(loss, expected_loss), "shares": shares(pruned)}


def directions_are_equal() -> dict[str, bool]:
    """Whether the shards of a direction have the same bits as the direction drawn on one device."""
    letters = {"D": 48, "N": 16, "K": 8, "H": 4, "F": 80}
    key, layer, mesh = directions.direction_keys(3, 0, 1)[0], jnp.int32(1), make_mesh(1, 8)
    equal = {}
    for distribution, name in product(("gaussian", "rademacher"), ("attention.q", "mlp.up")):
        axes = axis_table.matrices()[name]
        shape = axis_table.shape(axes, letters)
        draw = partial(directions.draw, layer=layer, name=name, shape=shape, distribution=distribution)
        sharded = jax.jit(draw, out_shardings=NamedSharding(mesh, sharding.spec(axes, letters, 8)))(key)
        expected = jax.jit(draw)(key)
        assert {shard.data.size for shard in sharded.addressable_shards} == {expected.size // 8}
        equal[f"{distribution} {name}"] = np.array_equal(np.asarray(sharded), np.asarray(expected))
    return equal


def slices_are_equal() -> dict[str, Any]:
    """Whether slicing gives the same bits on a mesh, negative zeros included; shares of the sliced arrays."""
    results = {}
    for dtype in ("float32", "bfloat16"):
        single = jax.tree.map(
            lambda leaf, dtype=dtype: jnp.where(leaf > 0.1, leaf, -0.0).astype(dtype), make_decoder(EVEN)
        )
        sliced = slice_groups(sharding.shard(single, make_mesh(2, 4)), KEPT)
        pairs = zip(named_arrays(sliced), named_arrays(slice_groups(single, KEPT)), strict=True)
        results[dtype] = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for (_, a), (_, b) in pairs)
        results["shares"] = shares(sliced)
    return results


# -------------------------------------------------------------------------------------------------------------- files


def loading(folder: Path, out: Path) -> dict[str, Any]:
    """Shares of the arrays of loaded models, and whether all folders hold the same arrays."""
    mesh = make_mesh(2, 4)
    single, model = reader.read_model(folder), reader.read_model(folder, mesh=mesh)
    writer.write_model(single, out / "single")
    writer.write_model(model, out / "sharded")
    writer.write_flax(model, out / "flax")
    flax, flax_single = reader.read_model(out / "flax", mesh=mesh), reader.read_model(out / "flax")
    return {
        "shares": [shares(model.decoder), shares(flax.decoder)],
        "loaded": [arrays_equal(single.decoder, loaded.decoder) for loaded in (model, flax, flax_single)],
    }


def shares(decoder: Decoder) -> dict[str, list[float]]:
    """For each array, the shares of its bytes that the devices hold."""
    return {
        path: sorted({shard.data.nbytes / array.nbytes for shard in array.addressable_shards})
        for path, array in named_arrays(decoder)
    }


def arrays_equal(left: Decoder, right: Decoder) -> bool:
    equal = jax.tree.map(lambda a, b: np.array_equal(sharding.gather(a), sharding.gather(b)), left, right)
    return all(jax.tree.leaves(equal))


# ---------------------------------------------------------------------------------------------------- several processes


def losses(decoder: Decoder) -> list[float]:
    """The paired losses of two directions and the mean loss."""
    tokens = make_tokens(8, 96)
    pairs, _ = paired_losses(decoder, tokens, SPACES["rademacher"])
    return [*pairs.ravel().tolist(), perplexity(decoder, batches_for(decoder, tokens)).loss]


def two_hosts(folder: str, out: str, address: str) -> dict[str, Any]:
    """The results of one of several processes, with the windows and then the weights spread over all processes."""
    hosts.initialise_hosts(hosts.parse_hosts(address))
    disable_optimizations(True)
    count = jax.device_count()
    results: dict[str, Any] = {"writer": hosts.is_writer(), "processes": jax.process_count(), "devices": count}
    for name, shape in (("batch", (count, 1)), ("weights", (1, count))):
        model = reader.read_model(folder, mesh=make_mesh(*shape))
        results[name] = losses(model.decoder)
        gradients = estimates(model.decoder, make_tokens(8, 96), Path(out) / f"{name} saved")
        results[f"{name} estimates"] = {name: values.tolist() for name, values in gradients.items()}
        writer.write_model(model, Path(out) / name)
        writer.write_flax(model, Path(out) / f"{name} flax")
    reloaded = reader.read_model(Path(out) / "weights flax", mesh=make_mesh(1, count))
    results["reloaded"] = arrays_equal(model.decoder, reloaded.decoder)
    try:
        writer.write_model(model, Path(out) / "batch")
    except ValueError as error:
        results["error"] = str(error)
    return results


FUNCTIONS: dict[str, Callable[..., Any]] = {"devices": devices, "experts": fewer_experts, "hosts": two_hosts}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(FUNCTIONS[sys.argv[1]](*sys.argv[2:])))
