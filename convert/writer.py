"""Writing a model as a Hugging Face folder or a Flax checkpoint; an output folder is complete or does not exist."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert import companions, formats, gguf_metadata, gguf_read, gguf_write, multimodal, rules, tokenizers
from convert.folders import check_new, check_space, new_folder, one_sentence
from convert.reader import CONFIG, FLAX_WEIGHTS, RECORD
from convert.sources import INDEX, has_weights
from minillm_jax.devices import hosts
from minillm_jax.errors import InputError, cause, reason
from minillm_jax.model import axis_table
from minillm_jax.model.build import build
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.streamed import check_in_memory
from minillm_jax.model.tree import group_counts, named_arrays, parameter_count, sizes_of
from minillm_jax.pruning.padding import Places, pad_groups

MAX_SHARD_SIZE = "5GB"

# File name → text of a file to write beside the weights, or a function that writes a file or folder at a path.
Extra = Mapping[str, str | Callable[[Path], None]]


def check_shard_size(size: str) -> None:
    """Check that a shard size is a positive number with the unit KB, MB, GB or TB.

    Raises:
      InputError: the text is not of that form.
    """
    if not re.fullmatch(r"(?=[\d.]*[1-9])\d{1,9}(\.\d{1,9})?\s*[KMGT]B", size, re.ASCII | re.IGNORECASE):
        raise InputError(
            f"shard size {size!r} is not understood; expected a number and KB, MB, GB or TB, 5GB for example"
        )


@dataclass(frozen=True)
class Written:
    """Result of `write_model`: the format, and the number of parameters of the text model, padding included."""

    format: str
    parameters: int


def planned(model: Model, format_name: str | None = None) -> Written:
    """The result that `write_model` would return, computed from the shapes without writing.

    Raises:
      InputError: the format is unknown, or cannot hold the model's shapes.
    """
    multimodal.check_format(model.raw_config, format_name)
    if format_name == formats.GGUF:
        gguf_metadata.arch_for(model.decoder.config, sizes_of(model.decoder))
    if format_name in (formats.FLAX, formats.GGUF):
        return Written(format_name, parameter_count(model.decoder))
    described = _described(model, format_name)
    abstract = build(model.decoder.config, described.sizes, model.decoder.embedding.dtype)
    return Written(described.format, parameter_count(abstract))


def weight_bytes(model: Model, format_name: str | None = None, gguf_type: str | None = None) -> int:
    """The bytes of the weights that `write_model` would write, computed from the shapes.

    Raises:
      InputError: as for `planned`.
    """
    multimodal.check_format(model.raw_config, format_name)
    if format_name == formats.GGUF:
        return gguf_write.file_bytes(model.decoder, gguf_type)
    # A model of the Hub is described without its weights.
    rest = multimodal.rest_of(model.raw_config, model.folder) if has_weights(model.folder) else None
    carried = 0 if rest is None else sum(rest.bytes.values())
    return carried + planned(model, format_name).parameters * model.decoder.embedding.dtype.itemsize


def _described(model: Model, format_name: str | None = None) -> formats.Described:
    return formats.describe(model.decoder.config, sizes_of(model.decoder), model.raw_config, format_name)


def write_model(
    model: Model,
    output: str | Path,
    format_name: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    extra: Extra | None = None,
    gguf_type: str | None = None,
) -> Written:
    """Write a model as a folder that `transformers` loads, as a Flax checkpoint, or as a folder with a GGUF file.

    Args:
      model: the model.
      output: output folder, which must not exist.
      format_name: `stock`, `per-layer`, `padded`, `flax` or `gguf`; by default `formats.describe` chooses.
      max_shard_size: largest size of a weight file, `5GB` for example.
      extra: files to write beside the weights; only process 0 uses it.
      gguf_type: type of the matrices of a GGUF, `f32`, `f16`, `bf16` or `q8_0`; that of the weights by default.

    Raises:
      InputError: the output exists or cannot be written, the shard size has no unit, or the format is unknown or cannot
        hold the model's shapes.
    """
    check_shard_size(max_shard_size)
    multimodal.check_format(model.raw_config, format_name)
    if format_name == formats.FLAX:
        write_flax(model, output, extra)
        return Written(formats.FLAX, parameter_count(model.decoder))
    if format_name == formats.GGUF:
        write_gguf(model, output, gguf_type, extra)
        return Written(formats.GGUF, parameter_count(model.decoder))
    described = _described(model, format_name)
    decoder = model.decoder
    path, needed = check_new(output, model.folder), weight_bytes(model, format_name)
    check_space(path, needed)
    if described.format == formats.PADDED:
        decoder = pad_groups(decoder, described.sizes, _places(model, described.sizes))
    if hosts.is_writer():
        with new_folder(path, needed) as scratch:
            _write_folder(replace(model, decoder=decoder), scratch, described, max_shard_size, extra)
    else:
        _gather_tensors(decoder, max_shard_size, multimodal.rest_of(model.raw_config, model.folder))
    hosts.wait()
    return Written(described.format, parameter_count(decoder))


def _write_folder(
    model: Model, scratch: Path, described: formats.Described, max_shard_size: str, extra: Extra | None
) -> None:
    decoder = model.decoder
    _write_json(scratch / CONFIG, described.config | _dtype_keys(decoder))
    rest = multimodal.rest_of(model.raw_config, model.folder)
    _write_shards(decoder, scratch, max_shard_size, formats.renamed(decoder.config, described.format), rest)
    _write_companions(model, scratch, extra)
    if described.format == formats.PER_LAYER:
        code = f"{formats.REMOTE_CODE}.py"
        shutil.copyfile(Path(__file__).with_name(code), scratch / code)
    _write_extra(scratch, extra)


def write_flax(model: Model, output: str | Path, extra: Extra | None = None) -> Path:
    """Write a model as a Flax checkpoint: config.json, tokenizer files, and the pytree in `flax_weights` (Orbax).

    With several processes, each writes its own shards, so the output must be on a file system that all of them share.

    Args:
      model: the model.
      output: output folder, which must not exist.
      extra: files to write beside the weights; only process 0 uses it.

    Returns:
      The output folder.

    Raises:
      InputError: the output exists or cannot be written.
    """
    check_in_memory(model.decoder, "the format flax")
    multimodal.check_format(model.raw_config, formats.FLAX)
    described = _described(model)
    # `auto_map` refers to code that loads PyTorch weights, and a Flax checkpoint has none.
    config = {key: value for key, value in described.config.items() if key != "auto_map"}
    path, needed = check_new(output, model.folder), weight_bytes(model, formats.FLAX)
    check_space(path, needed)
    if hosts.is_writer():
        with new_folder(path, needed) as scratch:
            _write_json(scratch / CONFIG, config | _dtype_keys(model.decoder))
            _write_orbax(model.decoder, str((scratch / FLAX_WEIGHTS).resolve()))
            _write_companions(model, scratch, extra)
            _write_extra(scratch, extra)
    else:
        with one_sentence(path, needed):
            _write_orbax(model.decoder, "")
    hosts.wait()
    return path


def write_gguf(model: Model, output: str | Path, gguf_type: str | None = None, extra: Extra | None = None) -> Path:
    """Write a model as a folder with `model.gguf`, which holds the configuration and the tokenizer too.

    Args:
      model: the model.
      output: output folder, which must not exist.
      gguf_type: type of the matrices, `f32`, `f16`, `bf16` or `q8_0`; that of the weights by default.
      extra: files to write beside the weights; only process 0 uses it.

    Returns:
      The output folder.

    Raises:
      InputError: the output exists, is named like a file or cannot be written, or GGUF cannot hold the model.
    """
    check_gguf_folder(output)
    multimodal.check_format(model.raw_config, formats.GGUF)
    gguf_write.check(model.decoder.config, model.folder, model.decoder.embedding.shape[0])
    path, needed = check_new(output, model.folder), weight_bytes(model, formats.GGUF, gguf_type)
    check_space(path, needed)
    if hosts.is_writer():
        with new_folder(path, needed) as scratch:
            gguf_write.write(model, scratch / gguf_read.WEIGHTS, gguf_type)
            companions.copy(model.folder, scratch, reserved=(*(extra or ()), *tokenizers.FILES))
            if model.record is not None:
                _write_json(scratch / RECORD, model.record)
            _write_extra(scratch, extra)
    else:
        gguf_write.take_part(model.decoder)
    hosts.wait()
    return path


def check_gguf_folder(output: str | Path) -> None:
    """Check that an output of the format gguf is not named like a file.

    Raises:
      InputError: its name ends in `.gguf`.
    """
    if str(output).lower().endswith(".gguf"):
        raise InputError(
            f"{output}: the output is a folder, in which the weights are {gguf_read.WEIGHTS}; name it without .gguf"
        )


def _write_orbax(decoder: Decoder, path: str) -> None:
    """Write the weights with Orbax, in every process at the path of process 0.

    Raises:
      OSError: in the place of the many types of error that Orbax raises.
    """
    from orbax.checkpoint import v1 as ocp

    try:
        ocp.save(hosts.agree(path), _without_empty_arrays(nnx.to_pure_dict(nnx.state(decoder, nnx.Param))))
    except Exception as error:
        raise OSError(f"{FLAX_WEIGHTS}: {reason(error)}") from error


def _without_empty_arrays(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """The arrays with elements: Orbax refuses those of a removed sublayer. The sizes tell a reader what is missing."""
    branches = {key: _without_empty_arrays(part) if isinstance(part, Mapping) else part for key, part in tree.items()}
    return {key: part for key, part in branches.items() if (part if isinstance(part, dict) else part.size)}


def _places(model: Model, sizes: Sizes) -> Places:
    """Kind of group → per layer, the indices of the layer's groups among the padded groups.

    Heads get the indices that they had in the dense model, where the ALiBi slopes or the pruning record tell them. So
    do query heads, counted within their key/value heads.
    """
    decoder, target = model.decoder, sizes.layers[0]
    layers, record = sizes_of(decoder).layers, model.record or {}
    places: Places = {kind: [np.arange(n) for n in group_counts(decoder, kind)] for kind in axis_table.KINDS}
    places["query"] = [np.arange(layer.N) % (layer.N // max(layer.K, 1)) for layer in layers]
    if decoder.config.alibi_heads is not None:
        return places | {"head": [np.asarray(formats.kept_heads(decoder.config, layer), int) for layer in layers]}
    recorded = {
        "head": _recorded(record, "head", [layer.K for layer in layers], target.K),
        "query": _recorded_queries(record, layers, target.N // target.K),
    }
    return places | {kind: rows for kind, rows in recorded.items() if rows is not None}


def _recorded_queries(record: dict[str, Any], layers: Sequence[LayerSizes], per_group: int) -> list[np.ndarray] | None:
    """The place of every kept query head within its key/value head, or None where the record does not fit the model."""
    rows = _recorded(record, "query", [layer.N for layer in layers], per_group * max(layer.K for layer in layers))
    if rows is None:
        return None
    for row, layer in zip(rows, layers, strict=True):
        if not np.array_equal(row // per_group, np.arange(layer.N) // (layer.N // max(layer.K, 1))):
            return None
    return [row % per_group for row in rows]


def _recorded(record: dict[str, Any], kind: str, counts: list[int], before: int) -> list[np.ndarray] | None:
    """The kept groups of each layer by the pruning record, or None where the record does not fit the model.

    Args:
      record: content of the pruning record; the indices of a model that was pruned twice are not used.
      kind: kind of the groups.
      counts: number of groups of each layer of the pruned model.
      before: number of groups of a padded layer.
    """
    kept = record.get("kept")
    layers = kept.get(kind) if isinstance(kept, dict) and "pruned_before" not in record else None
    if not isinstance(layers, list) or [len(rows) if isinstance(rows, list) else None for rows in layers] != counts:
        return None
    for rows in layers:
        if not all(isinstance(row, int) and 0 <= row < before for row in rows) or sorted(set(rows)) != rows:
            return None
    return [np.asarray(rows, np.int32) for rows in layers]


def _dtype_keys(decoder: Decoder) -> dict[str, str]:
    """The type of the weights under the current and the old key of config.json."""
    name = np.dtype(decoder.embedding.dtype).name
    return {"dtype": name, "torch_dtype": name}


@dataclass(frozen=True)
class _TensorSize:
    """Stands for a tensor in the shard plan, before the tensor is created."""

    bytes: int


def _shard_plan(decoder: Decoder, max_shard_size: str, rest: multimodal.Rest | None) -> StateDictSplit:
    """The assignment of tensors to weight files: those of the decoder, and those that are carried over."""
    leaf_types = {name: leaf.dtype for name, leaf in named_arrays(decoder)}
    tensor_sizes = {
        binding.name: _TensorSize(int(np.prod(binding.stored_shape())) * leaf_types[binding.paths[0]].itemsize)
        for binding in rules.bindings(decoder)
    }
    tensor_sizes |= {name: _TensorSize(size) for name, size in (rest.bytes if rest is not None else {}).items()}
    return split_state_dict_into_shards_factory(
        tensor_sizes,
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _gather_tensors(decoder: Decoder, max_shard_size: str, rest: multimodal.Rest | None) -> None:
    """In the other processes: send the local parts of every tensor, in the order in which process 0 writes them."""
    for names in _shard_plan(decoder, max_shard_size, rest).filename_to_tensors.values():
        for _ in rules.tensors(decoder, set(names)):
            pass


def _write_shards(
    decoder: Decoder, folder: Path, max_shard_size: str, renamed: Mapping[str, str], rest: multimodal.Rest | None
) -> None:
    def stored(name: str) -> str:
        return renamed.get(name, name) if rest is None else rest.stored_name(name)

    plan = _shard_plan(decoder, max_shard_size, rest)
    for file, names in plan.filename_to_tensors.items():
        tensors = {stored(name): tensor for name, tensor in rules.tensors(decoder, set(names))}
        if rest is not None:
            tensors |= {name: rest.read(name) for name in names if name in rest.bytes}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file}: {reason(error)}") from error
        del tensors  # frees this shard before the next one is assembled
        # safetensors creates files that only their owner can read; the umask made the mode of config.json.
        (folder / file).chmod((folder / CONFIG).stat().st_mode & 0o777)
    if plan.is_sharded:
        weight_map = {stored(name): file for name, file in plan.tensor_to_filename.items()}
        _write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": weight_map})


def _write_companions(model: Model, folder: Path, extra: Extra | None) -> None:
    companions.copy(model.folder, folder, reserved=extra or ())
    if model.record is not None:
        _write_json(folder / RECORD, model.record)
    tokenizers.settle(model.folder, folder)


def _write_extra(folder: Path, extra: Extra | None) -> None:
    for name, content in (extra or {}).items():
        if not isinstance(content, str):
            content(folder / name)
            continue
        with (folder / name).open("x", encoding="utf-8") as file:  # "x" never overwrites a model file
            file.write(content)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=2)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path.name}: cannot be written as JSON ({cause(error)})") from error
    # One line per list of numbers, because lists of kept indices have thousands of entries.
    compact = re.sub(r"\[\n[\s\d,.e+-]+\]", lambda match: " ".join(match[0].split()), text)
    path.write_text(compact + "\n", encoding="utf-8")
