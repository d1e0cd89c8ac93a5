"""What test_mesh.py runs in processes of their own: how many devices there are is settled when JAX starts.

`python -m tests.mesh_child NAME ARGUMENTS...` calls the function of that name and prints what it returns as JSON.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert import reader, writer
from minillm_jax import loss, mesh
from minillm_jax.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.decoder import Decoder, build, group_counts, initialise, named_arrays
from minillm_jax.estimate import directions, gradient
from minillm_jax.estimate.spaces import Gates, LowRank, Space, Weights
from minillm_jax.estimate.statistics import activation_norms
from minillm_jax.layers import Rope
from minillm_jax.loss import sequence_losses
from minillm_jax.mesh import MeshShape
from minillm_jax.shrink.slicing import slice_groups

CONFIG = DecoderConfig("llama", 1e-5, Rope(10000.0))
EVEN = Sizes(V=64, D=32, H=4, layers=(LayerSizes(N=16, K=8, F=64),) * 2)
# Neither heads nor vocabulary divide by 2, 4 or 8; the second run's channels divide by 4.
ODD = Sizes(V=61, D=32, H=4, layers=(LayerSizes(N=6, K=3, F=10), LayerSizes(N=3, K=3, F=12)))

SPACES: dict[str, Space] = {
    "gaussian": Weights(),
    "rademacher": Weights("rademacher"),
    "low-rank": LowRank(2),
    "gates": Gates(),
}


def make_decoder(sizes: Sizes) -> Decoder:
    return initialise(build(CONFIG, sizes), jax.random.key(0), 0.3)


def make_tokens(count: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (count, 9), dtype=np.int32)


def make_mesh(data: int, model: int) -> Mesh:
    made = mesh.make(MeshShape(data, model))
    assert made is not None
    return made


def paired(decoder: Decoder, tokens: np.ndarray, space: Space, at_once: int = 1) -> np.ndarray:
    """The losses of two directions, on the decoder's devices."""
    batch = mesh.shard_batch(tokens, mesh.of(decoder))
    keys = directions.direction_keys(0, 0, 2)
    return mesh.gather(gradient.paired_losses(decoder, keys, batch, jnp.float32(0.01), space, at_once))


def apart(found: Any, expected: Any) -> float:
    """The largest relative difference between two trees of arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) / np.asarray(b) - 1))) for a, b in pairs)


def quickly(quick: bool) -> None:
    """Compile without optimising, as the other tests do, or as users do."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", quick)


# -------------------------------------------------------------------------------------------- one process, 8 devices


def devices(folder: str, out: str) -> dict[str, Any]:
    """Everything that one process with eight devices has to show."""
    quickly(False)
    found: dict[str, Any] = {"directions": directions_are_equal(), "collectives": collectives()}
    quickly(True)
    meshes = {"8,1": (8, 1), "4,2": (4, 2), "2,4": (2, 4), "1,8": (1, 8)}
    found["results"] = {name: results(make_mesh(*shape), EVEN, 8) for name, shape in meshes.items()}
    found["results"]["odd sizes on 2,4"] = results(make_mesh(2, 4), ODD, 7)
    found["slices"] = slices_are_equal()
    found["directions over data"] = directions_over_data()
    found |= loading(Path(folder), Path(out))
    return found


def results(on: Mesh, sizes: Sizes, count: int) -> dict[str, float]:
    """How far the losses and statistics on a mesh are from those on one device."""
    single, tokens = make_decoder(sizes), make_tokens(count, sizes.V)
    decoder = mesh.shard(single, on)
    batch = mesh.shard_batch(tokens, on)
    found = {"sequences": apart(mesh.gather(sequence_losses(decoder, batch)), sequence_losses(single, tokens))}
    found["perplexity"] = apart(loss.perplexity(decoder, tokens).loss, loss.perplexity(single, tokens).loss)
    found["norms"] = apart(activation_norms(decoder, tokens), activation_norms(single, tokens))
    return found | {name: apart(paired(decoder, tokens, s), paired(single, tokens, s)) for name, s in SPACES.items()}


def directions_over_data() -> dict[str, float]:
    """How far losses are when each device follows directions of its own on the whole batch."""
    single, tokens, on = make_decoder(EVEN), make_tokens(3, EVEN.V), make_mesh(4, 2)
    keys = directions.direction_keys(0, 0, 4)
    decoder, spread = mesh.shard(single, on), mesh.shard_directions(keys, on)
    batch = mesh.shard_batch(tokens, on)  # three do not divide
    found = {}
    for name, space in SPACES.items():
        losses = gradient.paired_losses(decoder, spread, batch, jnp.float32(0.01), space, 4)
        expected = gradient.paired_losses(single, keys, jnp.asarray(tokens), jnp.float32(0.01), space, 4)
        found[name] = apart(mesh.gather(losses), expected)
    return found


def directions_are_equal() -> dict[str, bool]:
    """Whether a direction that devices make in shards has the bits of the one that a single device makes."""
    shapes = {"attention.q": (48, 16, 4), "attention.o": (16, 4, 48), "mlp.up": (48, 80), "mlp.down": (80, 48)}
    key, layer, on = directions.direction_keys(3, 0, 1)[0], jnp.int32(1), make_mesh(1, 8)
    found = {}
    for distribution in directions.DISTRIBUTIONS:
        for name, shape in shapes.items():
            place = mesh.spec(f"runs.0.{name}.kernel", {"D": 48, "N": 16, "K": 8, "H": 4, "F": 80, "L": 1}, 8)
            sharding = NamedSharding(on, PartitionSpec(*place[1:]))

            def draw(key: jax.Array, name: str = name, shape: tuple = shape, kind: str = distribution) -> jax.Array:
                return directions.draw(key, layer, name, shape, kind)

            sharded, alone = jax.jit(draw, out_shardings=sharding)(key), jax.jit(draw)(key)
            assert {one.data.size for one in sharded.addressable_shards} == {alone.size // 8}
            found[f"{distribution} {name}"] = np.array_equal(np.asarray(sharded), np.asarray(alone))
    return found


def slices_are_equal() -> dict[str, bool]:
    """Whether slicing gives the same bits, negative zeros included: they do not survive a sum over devices."""
    single = jax.tree.map(lambda leaf: jnp.where(leaf > 0.1, leaf, -0.0), make_decoder(EVEN))
    kept = {kind: [np.arange(0, n, 2)] * 2 for kind, n in (("head", 8), ("channel", 64))}
    sliced = slice_groups(mesh.shard(single, make_mesh(2, 4)), kept)
    assert group_counts(sliced, "head") == [4, 4]
    pairs = zip(named_arrays(sliced), named_arrays(slice_groups(single, kept)), strict=True)
    return {path: np.asarray(a).tobytes() == np.asarray(b).tobytes() for (path, a), (_, b) in pairs}


# ------------------------------------------------------------------------------------------- what crosses the devices


def collectives() -> dict[str, Any]:
    """Shapes of what the compiled programs send between devices, by name of the operation."""
    loss.LOGITS_AT_ONCE, whole = 8 * EVEN.V * 3, loss.LOGITS_AT_ONCE  # three positions: the loss takes several chunks
    found = {}
    for data, model in ((8, 1), (2, 4)):
        on = make_mesh(data, model)
        decoder, batch = mesh.shard(make_decoder(EVEN), on), mesh.shard_batch(make_tokens(8, EVEN.V), on)
        arguments = (decoder, directions.direction_keys(0, 0, 2), batch, jnp.float32(0.01))
        for name, space in SPACES.items():
            found[f"{name} on {data},{model}"] = _sent(gradient.paired_losses.lower(*arguments, space))
    gathered = jax.jit(lambda losses: losses, out_shardings=NamedSharding(make_mesh(8, 1), PartitionSpec()))
    losses = jax.ShapeDtypeStruct((2, 2, 8), jnp.float32, sharding=NamedSharding(make_mesh(8, 1), _LAST))
    found["gather on 8,1"] = _sent(gathered.lower(losses))
    loss.LOGITS_AT_ONCE = whole
    return found


_LAST = PartitionSpec(None, None, mesh.DATA)
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def _sent(lowered: Any) -> list[tuple[str, list[int]]]:
    found = []
    for line in lowered.compile().as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [(match[2], [int(size) for size in shape.split(",") if size]) for shape in shapes]
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
        "shares": {path: _shares(array) for path, array in named_arrays(model.decoder)},
        "shares from flax": {path: _shares(array) for path, array in named_arrays(flax.decoder)},
        "loaded": [_same(single.decoder, other.decoder) for other in (model, flax, alone)],
    }


def _shares(array: jax.Array) -> list[float]:
    return sorted({one.data.nbytes / array.nbytes for one in array.addressable_shards})


def _same(left: Decoder, right: Decoder) -> bool:
    same = jax.tree.map(lambda a, b: np.array_equal(mesh.gather(a), mesh.gather(b)), left, right)
    return all(jax.tree.leaves(same))


# ---------------------------------------------------------------------------------------------------- several processes


def hosts(folder: str, out: str, said: str) -> dict[str, Any]:
    """What one of several processes finds, with the batch and then the weights spread over all of them."""
    mesh.initialise_hosts(mesh.parse_hosts(said))
    quickly(True)
    tokens, count = make_tokens(8, 96), jax.device_count()
    found: dict[str, Any] = {"writer": mesh.is_writer(), "processes": jax.process_count(), "devices": count}
    for name, shape in (("batch", (count, 1)), ("weights", (1, count))):
        model = reader.read_model(folder, mesh=make_mesh(*shape))
        found[name] = paired(model.decoder, tokens, Weights()).tolist()
        found[f"{name}, perplexity"] = loss.perplexity(model.decoder, tokens).loss
        writer.write_model(model, Path(out) / name)
        writer.write_flax(model, Path(out) / f"{name} flax")
    again = reader.read_model(Path(out) / "weights flax", mesh=make_mesh(1, count))
    found["same"] = _same(model.decoder, again.decoder)
    try:
        writer.write_model(model, Path(out) / "batch")
    except ValueError as error:
        found["refused"] = str(error)
    return found


FUNCTIONS: dict[str, Callable[..., Any]] = {"devices": devices, "hosts": hosts}

if __name__ == "__main__":
    print(json.dumps(FUNCTIONS[sys.argv[1]](*sys.argv[2:])))
