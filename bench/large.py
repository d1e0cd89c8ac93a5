"""A pruning of a model that is larger than the memory, from disk to disk: seconds and memory after every layer.

    python bench/large.py --shape 7B --folder FOLDER [--layers 4] [--samples 8] [--seq-len 128]
        --output bench/results/large-7B.json [OPTIONS OF PRUNE]

FOLDER gets a Hugging Face model of the shape with random bfloat16 weights, written a layer at a time, unless it is
there. `minillm-jax prune --stream` prunes it in a process of its own and prints a line for every layer. A row holds

    stage, done     what is finished
    seconds         since the line before
    peak_bytes      the most resident memory of the process until then
    resident        resident memory at that time, without the pages of files that are mapped

With `--layers` the process is ended after so many pruned layers. The same command goes on from there, and adds the rows
of the further layers; `process` says which process measured a row.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from environment import commit
from jax import numpy as jnp
from shapes import CONFIG, SHAPES
from study import read, write
from transformers import LlamaConfig

from convert.writer import write_model
from minillm_jax.errors import InputError
from minillm_jax.model.build import build, without_layers
from minillm_jax.model.config import Sizes
from minillm_jax.model.loaded import Model
from minillm_jax.model.streamed import StreamedDecoder

LINE = re.compile(r"^(\w+)\s+(?:layer )?(\d+)/(\d+)\s+([\d.,]+) (s|min|h)")
Row = dict[str, Any]


def write_random(folder: Path, sizes: Sizes) -> None:
    """A folder of a LLaMA with random weights, of which one layer at a time is in memory."""
    abstract, first = build(CONFIG, sizes, ml_dtypes.bfloat16), sizes.layers[0]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), abstract.runs[0])
    outer = drawn(jax.eval_shape(without_layers, abstract), len(sizes.layers))
    decoder = StreamedDecoder(outer, [shapes] * len(sizes.layers), partial(drawn, shapes))
    raw = LlamaConfig(
        vocab_size=sizes.V,
        hidden_size=sizes.D,
        intermediate_size=first.F,
        num_hidden_layers=len(sizes.layers),
        num_attention_heads=first.N,
        num_key_value_heads=first.K,
        head_dim=sizes.H,
        rms_norm_eps=CONFIG.norm_epsilon,
        architectures=["LlamaForCausalLM"],
    ).to_dict()
    with tempfile.TemporaryDirectory() as nothing:  # beside the weights
        write_model(Model(decoder, raw, Path(nothing), "random"), folder)


def drawn(shapes: Any, seed: int) -> Any:
    """A tree of random arrays of these shapes."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape, np.float32) * 0.02, leaf.dtype), shapes
    )


def resident_bytes(pid: int) -> tuple[int, int]:
    """The peak of the resident memory of a process so far, and its resident memory that is not mapped from files."""
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    return 1024 * int(lines["VmHWM"]), 1024 * int(lines["RssAnon"])


def rows(words: list[str], layers: int | None) -> Iterator[Row]:
    """A row for each line of progress of the pruning; ends the process after some layers."""
    before = time.monotonic()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None, "it is a pipe"
        said = []
        for line in child.stderr:
            said.append(line)
            if match := LINE.match(line):
                stage, done, total = match[1], int(match[2]), int(match[3])
                peak, resident = resident_bytes(child.pid)
                now = time.monotonic()
                row, before = {"stage": stage, "done": done, "of": total, "seconds": round(now - before, 1)}, now
                yield row | {"peak_bytes": peak, "resident": resident}
                if stage == "refit" and layers is not None and done >= layers:
                    child.kill()
                    return
        if child.wait() != 0:
            raise SystemExit(f"{' '.join(words)}: status {child.returncode}\n{''.join(said)[-2000:]}")


def main() -> None:
    """Write the model, prune it, and write the JSON after every line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B", choices=list(SHAPES))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="pruned layers after which the process is ended; all by default")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True)
    arguments, options = parser.parse_known_args()
    sizes = SHAPES[arguments.shape]
    if not arguments.folder.exists():
        write_random(arguments.folder, sizes)
    tokens = arguments.folder.with_name(f"{arguments.folder.name}-tokens.npy")
    shape = (arguments.samples, arguments.seq_len)
    np.save(tokens, np.random.default_rng(0).integers(0, sizes.V, shape, dtype=np.int32))
    words = [sys.executable, "-m", "minillm_jax", "prune", str(arguments.folder), "--stream", "--ratio", "0.2"]
    words += ["--calibration", str(tokens), "--samples", str(shape[0]), "--seq-len", str(shape[1])]
    words += ["--output", str(arguments.folder.with_name(f"{arguments.folder.name}-pruned")), *options]
    settings = {"shape": arguments.shape, "windows": list(shape), "options": options}
    try:
        found = read(arguments.output, settings)
    except InputError as error:
        sys.exit(f"error: {error}")
    known = {(row["stage"], row["done"]) for row in found}
    process = 1 + max((row["process"] for row in found), default=0)
    for row in rows(words, arguments.layers):
        if (row["stage"], row["done"]) in known:
            continue  # an earlier process has pruned this layer
        found.append(row | {"process": process, "commit": commit()})
        print(json.dumps(found[-1]), flush=True)
        write(arguments.output, settings, found)


if __name__ == "__main__":
    main()
