"""Peak memory of reading and writing a gigabyte of weights.

Beyond the weights themselves, the peak stays below two of the largest tensors and one shard.
"""

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

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

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

# Freed memory that the allocators keep, and pages of libraries that are loaded on first use, in bytes.
NOISE = 32_000_000

CHILD = """
import gc, json, sys
from pathlib import Path
import jax, numpy as np
from convert import memory, reader, rules, sources, writer
from minillm_jax.model.build import build
from minillm_jax.model.families import parse
from minillm_jax.model.tree import named_arrays

small, folder, scratch, shard = sys.argv[1:]

def resident(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

def measure(program):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    result = program()
    return result, resident("VmHWM") - before

def read(dtype=None):
    model = reader.read_model(folder, dtype)
    jax.block_until_ready(jax.tree.leaves(model.decoder))
    return model

def unaligned(shape, dtype):
    return memory.aligned_empty((int(np.prod(shape)) + 1,), dtype)[1:].reshape(shape)

def read_unaligned():
    abstract = build(*parse(sources.read_json(Path(folder) / "config.json"), folder))
    decoder = rules.fill(abstract, sources.open_folder(Path(folder)), allocate=unaligned)
    return jax.block_until_ready(decoder)

def size(decoder):
    return sum(leaf.nbytes for _, leaf in named_arrays(decoder))

writer.write_model(reader.read_model(small), scratch + "/small")  # loads the modules that are imported on first use
peaks = {}
model, peak = measure(read)
peaks["read"] = peak - size(model.decoder)
_, peaks["write"] = measure(lambda: writer.write_model(model, scratch + "/shards", max_shard_size=shard))
_, peaks["write without shards"] = measure(lambda: writer.write_model(model, scratch + "/whole"))
peaks["weights"] = size(model.decoder)
del model
model, peak = measure(lambda: read("bfloat16"))
peaks["read as bfloat16"] = peak - size(model.decoder)
del model
decoder, peak = measure(read_unaligned)
peaks["read unaligned"] = peak - size(decoder)
print(json.dumps(peaks))
"""


def write_shards(folder: Path) -> int:
    """Write a model whose tensors share the memory of one shard; returns the size of the largest tensor in bytes."""
    config = AutoConfig.for_model("llama", **SIZES, dtype="float32", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    shapes = {b.name: b.stored_shape() for b in rules.bindings(build(*parse(config.to_dict(), "test")))}
    numbers = np.random.default_rng(0).standard_normal(SHARD // 4, dtype=np.float32)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in shapes.items():
        tensor = numbers[: int(np.prod(shape))].reshape(shape)
        if sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor  # a view of the shared numbers
    names = [f"model-{number:05}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return max(4 * int(np.prod(shape)) for shape in shapes.values())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Peak memory of each program beyond the weights, in bytes, measured in a child process."""
    root = tmp_path_factory.mktemp("scale")
    try:
        small = hugging_face_folder(root / "small")
        largest = write_shards(root / "model")
        (root / "out").mkdir()
        places = [str(path) for path in (small, root / "model", root / "out")]
        child = [sys.executable, "-c", CHILD, *places, f"{SHARD // 10**6}MB"]
        done = subprocess.run(child, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks = json.loads(done.stdout.splitlines()[-1])
        assert peaks["weights"] > 9e8
        yield peaks | {"bound": 2 * largest + SHARD + NOISE}
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("program", ["read", "read as bfloat16", "write"])
def test_peak_memory_is_bounded(measured: dict[str, Any], program: str) -> None:
    assert measured[program] < measured["bound"], measured


@pytest.mark.parametrize("program", ["read unaligned", "write without shards"])
def test_measurement_detects_excess_memory(measured: dict[str, Any], program: str) -> None:
    """JAX copies unaligned weights, and a single shard holds the whole model."""
    assert measured[program] > measured["bound"], measured
