"""Memory while a gigabyte is read and written: under two of the largest tensors and one shard, beyond the weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig

from convert import rules
from convert.sources import INDEX
from minillm_jax.model.build import build
from minillm_jax.model.families import parse
from tests.helpers import hugging_face_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SIZES = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SHARD = 100_000_000

# What the allocators keep of memory that was given back, and pages of libraries that are used for the first time.
NOISE = 32_000_000

CHILD = """
import gc, json, sys
from pathlib import Path
import jax, numpy as np
from convert import memory, reader, writer
from minillm_jax.decoder import named_arrays

small, folder, scratch, shard = sys.argv[1:]

def resident(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

def measure(program):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    result = program()
    return result, resident("VmHWM") - before

def read(dtype=None):
    model = reader.read_model(folder, dtype)
    jax.block_until_ready(jax.tree.leaves(model.decoder))
    return model

def size(model):
    return sum(leaf.nbytes for _, leaf in named_arrays(model.decoder))

writer.write_model(reader.read_model(small), scratch + "/small")  # imports what is imported on first use
found = {}
model, peak = measure(read)
found["read"] = peak - size(model)
_, found["write"] = measure(lambda: writer.write_model(model, scratch + "/shards", max_shard_size=shard))
_, found["write without shards"] = measure(lambda: writer.write_model(model, scratch + "/whole"))
found["weights"] = size(model)
del model
model, peak = measure(lambda: read("bfloat16"))
found["read as bfloat16"] = peak - size(model)
del model
# Memory that JAX has to copy, since it does not start at the right place.
aligned = memory.aligned_empty
memory.aligned_empty = lambda shape, dtype: aligned((int(np.prod(shape)) + 1,), dtype)[1:].reshape(shape)
model, peak = measure(read)
found["read twice"] = peak - size(model)
print(json.dumps(found))
"""


def write_by_hand(folder: Path) -> int:
    """A model with as many numbers in memory as one shard has; returns the bytes of the largest tensor."""
    config = AutoConfig.for_model("llama", **SIZES, dtype="float32", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    shapes = {b.name: b.stored_shape() for b in rules.bindings(build(*parse(config.to_dict(), "test")))}
    numbers = np.random.default_rng(0).standard_normal(SHARD // 4, dtype=np.float32)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in shapes.items():
        tensor = numbers[: int(np.prod(shape))].reshape(shape)
        if sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor  # views of the same numbers: a shard is made by writing it
    names = [f"model-{number:05}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return max(4 * int(np.prod(shape)) for shape in shapes.values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Bytes beyond the weights at the worst moment of each program, in a process of its own."""
    root = tmp_path_factory.mktemp("scale")
    try:
        small = hugging_face_folder(root / "small")
        largest = write_by_hand(root / "model")
        (root / "out").mkdir()
        places = [str(path) for path in (small, root / "model", root / "out")]
        child = [sys.executable, "-c", CHILD, *places, f"{SHARD // 10**6}MB"]
        done = subprocess.run(child, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["weights"] > 9e8
        yield found | {"bound": 2 * largest + SHARD + NOISE}
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("program", ["read", "read as bfloat16", "write"])
def test_memory_beyond_the_weights(measured: dict[str, Any], program: str) -> None:
    assert measured[program] < measured["bound"], measured


@pytest.mark.parametrize("program", ["read twice", "write without shards"])
def test_bound_is_exceeded_where_it_should_be(measured: dict[str, Any], program: str) -> None:
    """Weights that JAX copies, and a model in one shard: the measure sees both."""
    assert measured[program] > measured["bound"], measured
