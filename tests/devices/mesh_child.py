"""What test_sharding.py runs in processes of their own: how many devices there are is settled when JAX starts.

`python -m tests.mesh_child NAME ARGUMENTS...` calls the function of that name and prints what it returns as JSON.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert import reader, writer
from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.sharding import MeshShape
from minillm_jax.model import axis_table, loss
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.ops import Rope
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning.refit import slice_and_refit
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.scoring.activations import activation_norms
from minillm_jax.scoring.gradient import directions, slopes
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.estimate import estimate
from minillm_jax.scoring.gradient.spaces import Gates, LowRank, Space, Weights
from minillm_jax.settings import Estimation

CONFIG = DecoderConfig("llama", 1e-5, Rope(10000.0))
EVEN = Sizes(V=64, D=32, H=4, layers=(LayerSizes(N=16, K=8, F=64),) * 2)
# Neither key/value heads nor vocabulary divide by 4, but query heads and channels do.
ODD = Sizes(V=61, D=32, H=4, layers=(LayerSizes(N=12, K=3, F=20),) * 2)

EPSILON = np.float32(0.01)

SPACES: dict[str, Space] = {
    "gaussian": Weights(),
    "rademacher": Weights("rademacher"),
    "low-rank": LowRank(2),
    "gates": Gates(),
}


# Mesh -> which spaces are followed on it.
MESHES = {
    (8, 1): ("gaussian",),
    (4, 2): ("rademacher",),
    (2, 4): tuple(SPACES),
    (1, 8): ("gates",),
}

_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@cache
def make_decoder(sizes: Sizes) -> Decoder:
    random = np.random.default_rng(0)  # NumPy's: there is nothing to compile
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), build(CONFIG, sizes))


def make_tokens(count: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (count, 9), dtype=np.int32)


def make_mesh(data: int, model: int) -> Mesh:
    made = sharding.make(MeshShape(data, model))
    assert made is not None
    return made


def apart(found: Any, expected: Any) -> float:
    """The largest relative difference between two trees of arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) / np.asarray(b) - 1))) for a, b in pairs)


def sent(compiled: Any) -> list[tuple[str, list[int]]]:
    """What a compiled program sends between devices: the name of the operation, and the shape of what it gives."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [(match[2], [int(size) for size in shape.split(",") if size]) for shape in shapes]
    return found


def quickly(quick: bool) -> None:
    """Compile without optimising, as the other tests do, or as users do."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", quick)


def paired(decoder: Decoder, tokens: np.ndarray, space: Space) -> tuple[np.ndarray, Any]:
    """The losses of two directions on the decoder's devices, and the program that found them."""
    batch, drawn = sharding.shard_batch(tokens, sharding.of(decoder)), plain(2).stacked(1)
    windows = jnp.arange(len(tokens), dtype=jnp.int32)
    compiled = slopes.paired_losses.lower(decoder, drawn, batch, windows, EPSILON, space).compile()
    return sharding.gather(compiled(decoder, drawn, batch, windows, EPSILON)), compiled


def plain(count: int) -> Directions:
    return Directions.plain(directions.direction_keys(0, 0, count))


# What whole estimates are made with on several devices.
ESTIMATES = {
    "spsa": Estimation(directions=4, distribution="rademacher", epsilon=1e-2),
    "jvp": Estimation("jvp", "gates", 4, per_sequence=True, directions_per_step=2),
}


def estimates(decoder: Decoder, tokens: np.ndarray, checkpoint: Path | None = None) -> dict[str, np.ndarray]:
    """Projected gradients of whole estimates, [P, B], and the sums of exact gate gradients, [L, B]."""
    found = {}
    for name, settings in ESTIMATES.items():
        made = estimate(decoder, tokens, settings, checkpoint=None if checkpoint is None else checkpoint / name)
        assert made.projected is not None
        found[name] = made.projected
    exact = estimate(decoder, tokens, Estimation("exact", "gates")).exact
    assert exact is not None
    return found | {"exact": sharding.gather(exact[0]["channel"]).sum(-1)}


@cache
def paired_alone(sizes: Sizes, count: int, name: str) -> np.ndarray:
    """The same on one device."""
    return paired(make_decoder(sizes), make_tokens(count, sizes.V), SPACES[name])[0]


# -------------------------------------------------------------------------------------------- one process, 8 devices


def devices(folder: str, out: str) -> dict[str, Any]:
    """Everything that one process with eight devices has to show."""
    quickly(False)
    found: dict[str, Any] = {"directions": directions_are_equal()}
    quickly(True)
    loss.LOGITS_AT_ONCE = 8 * EVEN.V * 3  # three positions: the loss takes several chunks
    results = {"odd": on_mesh((2, 4), ODD, 7, ("rademacher",))}
    results |= {f"{a},{b}": on_mesh((a, b), EVEN, 8, names) for (a, b), names in MESHES.items()}
    found["apart"] = {name: result[0] for name, result in results.items()}
    found["sent"] = {name: result[1] for name, result in results.items()} | {"gather": gathering()}
    found |= {"directions over data": directions_over_data(), "slices": slices_are_equal()}
    found["estimates"], found["refitted"] = estimates_apart(), refitted()
    return found | loading(Path(folder), Path(out))


def on_mesh(shape: tuple[int, int], sizes: Sizes, count: int, names: Sequence[str]) -> tuple[dict, dict]:
    """How far losses and statistics on a mesh are from those on one device, and what is sent for the losses."""
    single, tokens, made = make_decoder(sizes), make_tokens(count, sizes.V), make_mesh(*shape)
    decoder, batch = sharding.shard(single, made), sharding.shard_batch(tokens, made)
    found = {
        "sequences": apart(sharding.gather(loss.sequence_losses(decoder, batch)), loss.sequence_losses(single, tokens)),
        "perplexity": apart(loss.perplexity(decoder, tokens).loss, loss.perplexity(single, tokens).loss),
        "norms": apart(activation_norms(decoder, tokens), activation_norms(single, tokens)),
    }
    programs = {}
    for name in names:
        losses, compiled = paired(decoder, tokens, SPACES[name])
        found[name], programs[name] = apart(losses, paired_alone(sizes, count, name)), sent(compiled)
    return found, programs


def gathering() -> list[tuple[str, list[int]]]:
    """What is sent when the losses of two directions come together."""
    made = make_mesh(8, 1)
    spread, everywhere = (
        NamedSharding(made, spec) for spec in (PartitionSpec(None, None, sharding.DATA), PartitionSpec())
    )
    losses = jax.ShapeDtypeStruct((2, 2, 8), jnp.float32, sharding=spread)
    return sent(jax.jit(lambda losses: losses, out_shardings=everywhere).lower(losses).compile())


def directions_over_data() -> dict[str, Any]:
    """Each device follows directions of its own on the whole batch: how far the losses are, and what is sent."""
    single, tokens, made = make_decoder(EVEN), make_tokens(3, EVEN.V), make_mesh(4, 1)
    stacked, windows, space = plain(4).stacked(4), jnp.arange(3, dtype=jnp.int32), SPACES["rademacher"]
    decoder, spread = sharding.shard(single, made), sharding.shard_directions(stacked, made)
    batch = sharding.shard_batch(tokens, made)  # three do not divide
    compiled = slopes.paired_losses.lower(decoder, spread, batch, windows, EPSILON, space).compile()
    expected = slopes.paired_losses(single, stacked, jnp.asarray(tokens), windows, EPSILON, space)
    found = sharding.gather(compiled(decoder, spread, batch, windows, EPSILON))
    return {"apart": apart(found, expected), "sent": sent(compiled)}


def estimates_apart() -> dict[str, float]:
    """How far whole estimates on a mesh are from those of one device, relative to the largest; seven do not divide."""
    single, tokens = make_decoder(EVEN), make_tokens(7, EVEN.V)
    decoder = sharding.shard(single, make_mesh(2, 4))
    expected, found = estimates(single, tokens), estimates(decoder, tokens)
    return {name: float(np.abs(found[name] - one).max() / np.abs(one).max()) for name, one in expected.items()}


def refitted() -> dict[str, Any]:
    """How far the loss of a model that was pruned and refitted on a mesh is from that on one device; its shares."""
    single, tokens = make_decoder(EVEN), make_tokens(8, EVEN.V)
    kept = {kind: [np.arange(0, n, 2)] * 2 for kind, n in (("head", 8), ("channel", 64))}
    on_mesh = slice_and_refit(sharding.shard(single, make_mesh(2, 4)), kept, tokens)
    alone, together = (loss.perplexity(one, tokens).loss for one in (slice_and_refit(single, kept, tokens), on_mesh))
    return {"apart": apart(together, alone), "shares": shares(on_mesh)}


def directions_are_equal() -> dict[str, bool]:
    """Whether a direction that devices make in shards has the bits of the one that a single device makes."""
    letters = {"D": 48, "N": 16, "K": 8, "H": 4, "F": 80}
    key, layer, made = directions.direction_keys(3, 0, 1)[0], jnp.int32(1), make_mesh(1, 8)
    found = {}
    for kind, name in product(("gaussian", "rademacher"), ("attention.q", "mlp.up")):
        axes = axis_table.matrices()[name]
        draw = partial(
            directions.draw, layer=layer, name=name, shape=axis_table.shape(axes, letters), distribution=kind
        )
        sharded = jax.jit(draw, out_shardings=NamedSharding(made, sharding.spec(axes, letters, 8)))(key)
        alone = jax.jit(draw)(key)
        assert {one.data.size for one in sharded.addressable_shards} == {alone.size // 8}
        found[f"{kind} {name}"] = np.array_equal(np.asarray(sharded), np.asarray(alone))
    return found


def slices_are_equal() -> dict[str, Any]:
    """Whether slicing gives the same bits, negative zeros included; and the devices' shares of what is left."""
    kept = {kind: [np.arange(0, n, 2)] * 2 for kind, n in (("head", 8), ("channel", 64))}
    found = {}
    for dtype in ("float32", "bfloat16"):
        single = jax.tree.map(
            lambda leaf, dtype=dtype: jnp.where(leaf > 0.1, leaf, -0.0).astype(dtype), make_decoder(EVEN)
        )
        sliced = slice_groups(sharding.shard(single, make_mesh(2, 4)), kept)
        pairs = zip(named_arrays(sliced), named_arrays(slice_groups(single, kept)), strict=True)
        found[dtype] = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for (_, a), (_, b) in pairs)
        found["shares"] = shares(sliced)
    return found


# -------------------------------------------------------------------------------------------------------------- files


def loading(folder: Path, out: Path) -> dict[str, Any]:
    """Shares of the devices after loading, and whether what is written is the same as from one device."""
    on = make_mesh(2, 4)
    single, model = reader.read_model(folder), reader.read_model(folder, mesh=on)
    writer.write_model(single, out / "single")
    writer.write_model(model, out / "sharded")
    writer.write_flax(model, out / "flax")
    flax, alone = reader.read_model(out / "flax", mesh=on), reader.read_model(out / "flax")
    return {
        "shares": [shares(model.decoder), shares(flax.decoder)],
        "loaded": [same(single.decoder, other.decoder) for other in (model, flax, alone)],
    }


def shares(decoder: Decoder) -> dict[str, list[float]]:
    """What share of each array the devices hold."""
    return {
        path: sorted({one.data.nbytes / array.nbytes for one in array.addressable_shards})
        for path, array in named_arrays(decoder)
    }


def same(left: Decoder, right: Decoder) -> bool:
    same = jax.tree.map(lambda a, b: np.array_equal(sharding.gather(a), sharding.gather(b)), left, right)
    return all(jax.tree.leaves(same))


# ---------------------------------------------------------------------------------------------------- several processes


def losses(decoder: Decoder) -> list[float]:
    """The losses of two directions and the mean loss."""
    tokens = make_tokens(8, 96)
    pairs, _ = paired(decoder, tokens, SPACES["rademacher"])
    return [*pairs.ravel().tolist(), loss.perplexity(decoder, tokens).loss]


def two_hosts(folder: str, out: str, said: str) -> dict[str, Any]:
    """What one of several processes finds, with the batch and then the weights spread over all of them."""
    hosts.initialise_hosts(hosts.parse_hosts(said))
    quickly(True)
    count = jax.device_count()
    found: dict[str, Any] = {"writer": hosts.is_writer(), "processes": jax.process_count(), "devices": count}
    for name, shape in (("batch", (count, 1)), ("weights", (1, count))):
        model = reader.read_model(folder, mesh=make_mesh(*shape))
        found[name] = losses(model.decoder)
        found[f"{name} estimates"] = {
            name: values.tolist()
            for name, values in estimates(model.decoder, make_tokens(8, 96), Path(out) / f"{name} saved").items()
        }
        writer.write_model(model, Path(out) / name)
        writer.write_flax(model, Path(out) / f"{name} flax")
    again = reader.read_model(Path(out) / "weights flax", mesh=make_mesh(1, count))
    found["same"] = same(model.decoder, again.decoder)
    try:
        writer.write_model(model, Path(out) / "batch")
    except ValueError as error:
        found["refused"] = str(error)
    return found


FUNCTIONS: dict[str, Callable[..., Any]] = {"devices": devices, "hosts": two_hosts}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(FUNCTIONS[sys.argv[1]](*sys.argv[2:])))
