"""Folders of weights out: stock Hugging Face folders and Flax checkpoints, whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from convert import rules
from convert.reader import COMPANIONS, CONFIG, FLAX_WEIGHTS, INDEX, RECORD
from minillm_jax.decoder import Decoder, group_counts, layer_count, named_arrays
from minillm_jax.errors import InputError, cause
from minillm_jax.layers import Rope
from minillm_jax.model import Model

MAX_SHARD_SIZE = "5GB"


def check_new(output: str | Path) -> Path:
    """The path of an output folder that does not exist yet.

    Raises:
      InputError: something is there already, or no folder can be made there.
    """
    path = Path(output).expanduser().absolute()
    try:
        if path.exists() or path.is_symlink():
            raise InputError(f"{path}: the output folder already exists; choose another or remove it first")
        above = next(parent for parent in path.parents if parent.exists())
    except OSError as error:
        raise InputError(f"{path}: no folder can be made there ({error.strerror})") from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no folder can be made there; {above} is not a writable folder")
    return path


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A scratch folder beside `output` that becomes `output` when the block ends, and vanishes when it raises.

    Raises:
      InputError: `output` exists or cannot be written, a full disk included.
    """
    path = check_new(output)
    made = [parent for parent in path.parents if not parent.exists()]
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", dir=path.parent))
        yield scratch
        scratch.chmod(0o755)
        check_new(path)
        scratch.rename(path)
    except BaseException as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:  # the innermost first
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({cause(error)})") from error
        raise


def write_stock(model: Model, output: str | Path, max_shard_size: str = MAX_SHARD_SIZE) -> Path:
    """Write a model as a Hugging Face folder that stock `transformers` loads without remote code.

    Raises:
      InputError: the output exists, or no stock class can hold the model's shapes.
    """
    config = stock_config(model.decoder, model.raw_config)
    with new_folder(output) as scratch:
        _write_json(scratch / CONFIG, config)
        _write_shards(model.decoder, scratch, max_shard_size)
        _write_companions(model, scratch)
    return Path(output).expanduser()


def write_flax(model: Model, output: str | Path) -> Path:
    """Write a model as a Flax checkpoint: config.json, tokenizer files, and the pytree by Orbax in `flax_weights`.

    Raises:
      InputError: the output exists, or the configuration cannot express the model's shapes.
    """
    from orbax.checkpoint import v1 as ocp

    config = stock_config(model.decoder, model.raw_config)
    with new_folder(output) as scratch:
        _write_json(scratch / CONFIG, config)
        ocp.save(str((scratch / FLAX_WEIGHTS).resolve()), nnx.to_pure_dict(nnx.state(model.decoder)))
        _write_companions(model, scratch)
    return Path(output).expanduser()


def stock_config(decoder: Decoder, raw: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a decoder, from the one it was read with and the sizes of its arrays.

    `LlamaConfig` refuses a head count that does not divide the hidden size; `MistralConfig` takes any, computes the
    same, and names its parameters alike, so such a model is written as Mistral.

    Raises:
      InputError: layers have unequal sizes, or no stock class holds the shapes.
    """
    heads = decoder.runs[0].attention.q.kernel.shape[2]
    head_size = decoder.runs[0].attention.q.kernel.shape[3]
    size = decoder.embedding.shape[1]
    # What holds for other weights than those that are written.
    kept = {key: value for key, value in raw.items() if key not in ("quantization_config", "auto_map")}
    written = kept | {
        "num_hidden_layers": layer_count(decoder),
        "num_attention_heads": heads,
        "num_key_value_heads": _equal(decoder, "head", "key/value heads"),
        "head_dim": head_size,
        "intermediate_size": _equal(decoder, "channel", "MLP channels"),
        **_rope_keys(decoder.config.rope),
        **_dtype_keys(decoder),
    }
    if raw["model_type"] == "llama" and size % heads:
        written = _as_mistral(written, decoder)
    return written


def _equal(decoder: Decoder, kind: str, words: str) -> int:
    counts = group_counts(decoder, kind)
    if len(set(counts)) > 1:
        raise InputError(
            f"the layers keep unequal numbers of {words} ({', '.join(map(str, counts))}), which no stock class "
            "can hold; prune all layers by the same ratio (leave out --layers)"
        )
    return counts[0]


def _as_mistral(config: dict[str, Any], decoder: Decoder) -> dict[str, Any]:
    if decoder.config.qkv_bias or decoder.config.output_bias or decoder.config.mlp_bias:
        raise InputError(
            f"{config['num_attention_heads']} heads do not divide the hidden size {config['hidden_size']}, and the "
            "stock class that allows this has no biases; choose a ratio whose head count divides the hidden size"
        )
    llama_only = ("attention_bias", "mlp_bias", "pretraining_tp")
    kept = {key: value for key, value in config.items() if key not in llama_only}
    return kept | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def _rope_keys(rope: Rope) -> dict[str, Any]:
    """Rotary settings under today's key and under those that older versions of transformers read."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_length
    old = None if rope.kind == "default" else scaling | {"type": rope.kind}
    return {"rope_parameters": scaling | {"rope_theta": rope.theta}, "rope_theta": rope.theta, "rope_scaling": old}


def _dtype_keys(decoder: Decoder) -> dict[str, str]:
    name = np.dtype(decoder.embedding.dtype).name
    return {"dtype": name, "torch_dtype": name}


@dataclass(frozen=True)
class _Planned:
    """What shard planning needs to know of a tensor that is not made yet."""

    bytes: int


def _write_shards(decoder: Decoder, folder: Path, max_shard_size: str) -> None:
    leaf_types = {name: leaf.dtype for name, leaf in named_arrays(decoder)}
    planned = {
        binding.name: _Planned(int(np.prod(binding.stored_shape())) * leaf_types[binding.path].itemsize)
        for binding in rules.bindings(decoder)
    }
    plan = split_state_dict_into_shards_factory(
        planned,
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file(dict(rules.tensors(decoder, set(names))), folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes its files readable by their owner alone
    if plan.is_sharded:
        _write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _write_companions(model: Model, folder: Path) -> None:
    for name in COMPANIONS:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    if model.record is not None:
        _write_json(folder / RECORD, model.record)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2)
    # Lists of numbers (kept indices run to thousands) on one line.
    compact = re.sub(r"\[\n[\s\d,.e+-]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(compact + "\n", encoding="utf-8")
