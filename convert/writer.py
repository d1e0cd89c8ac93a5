"""Folders of weights out: Hugging Face folders and Flax checkpoints, whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from convert import formats, rules
from convert.reader import COMPANIONS, CONFIG, FLAX_WEIGHTS, RECORD
from convert.sources import INDEX
from minillm_jax.devices import hosts
from minillm_jax.errors import InputError, cause
from minillm_jax.model import axis_table
from minillm_jax.model.build import build
from minillm_jax.model.config import Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, named_arrays, parameter_count, sizes_of
from minillm_jax.pruning.padding import pad_groups

MAX_SHARD_SIZE = "5GB"


def check_new(output: str | Path) -> Path:
    """The path of an output folder that does not exist yet. Process 0 looks for all, since it alone writes.

    Raises:
      InputError: something is there already, or no folder can be made there.
    """
    path = Path(output).expanduser().absolute()
    hosts.decide(lambda: _check_free(path))
    return path


def _check_free(path: Path) -> None:
    try:
        if path.exists() or path.is_symlink():
            raise InputError(f"{path}: the output folder already exists; choose another or remove it first")
        above = next(parent for parent in path.parents if parent.exists())
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r}: no folder can be made there ({cause(error)})") from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no folder can be made there; {above} is not a writable folder")


def check_shard_size(size: str) -> None:
    """Whether a shard size can be used.

    Raises:
      InputError: it is not written like `5GB`.
    """
    if not re.fullmatch(r"(?=[\d.]*[1-9])\d{1,9}(\.\d{1,9})?\s*[KMGT]B", size, re.ASCII | re.IGNORECASE):
        raise InputError(
            f"shard size {size!r} is not understood; expected a number and KB, MB, GB or TB, 5GB for example"
        )


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A scratch folder beside `output` that becomes `output` when the block ends, and vanishes when it raises.

    Raises:
      InputError: `output` exists or cannot be written, a full disk included.
    """
    path = Path(output).expanduser().absolute()
    _check_free(path)
    made = [parent for parent in path.parents if not parent.exists()]
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", dir=path.parent))
        yield scratch
        scratch.chmod(0o755)
        _check_free(path)
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


@dataclass(frozen=True)
class Written:
    """What `write_model` wrote: the format, and how many parameters the files hold (padding included)."""

    format: str
    parameters: int


def planned(model: Model, wanted: str | None = None) -> Written:
    """What `write_model` will have written, from the shapes alone.

    Raises:
      InputError: the format cannot hold the model's shapes.
    """
    if wanted == formats.FLAX:
        return Written(formats.FLAX, parameter_count(model.decoder))
    described = _described(model, wanted)
    abstract = build(model.decoder.config, described.sizes, model.decoder.embedding.dtype)
    return Written(described.format, parameter_count(abstract))


def _described(model: Model, wanted: str | None = None) -> formats.Described:
    return formats.describe(model.decoder.config, sizes_of(model.decoder), model.raw_config, wanted)


def write_model(
    model: Model,
    output: str | Path,
    wanted: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    extra: Mapping[str, str] | None = None,
) -> Written:
    """Write a model as a folder that `transformers` loads, or as a Flax checkpoint.

    Args:
      model: the model.
      output: folder to write, which must not exist.
      wanted: `stock`, `per-layer`, `padded` or `flax`; by default what `formats.describe` chooses.
      max_shard_size: of the weight files, `5GB` for example.
      extra: texts to write beside the weights, by file name; process 0 writes its own.

    Raises:
      InputError: the output exists, or the format cannot hold the model's shapes.
    """
    check_shard_size(max_shard_size)
    if wanted == formats.FLAX:
        write_flax(model, output, extra)
        return Written(formats.FLAX, parameter_count(model.decoder))
    described = _described(model, wanted)
    decoder = model.decoder
    if described.format == formats.PADDED:
        decoder = pad_groups(decoder, described.sizes, _places(model, described.sizes))
    check_new(output)
    if hosts.is_writer():
        _write_folder(replace(model, decoder=decoder), Path(output), described, max_shard_size, extra)
    else:
        _give_tensors(decoder, max_shard_size)
    hosts.wait()
    return Written(described.format, parameter_count(decoder))


def _write_folder(
    model: Model, output: Path, described: formats.Described, max_shard_size: str, extra: Mapping[str, str] | None
) -> None:
    decoder = model.decoder
    with new_folder(output) as scratch:
        _write_json(scratch / CONFIG, described.config | _dtype_keys(decoder))
        _write_shards(decoder, scratch, max_shard_size, formats.renamed(decoder.config, described.format))
        _write_companions(model, scratch)
        if described.format == formats.PER_LAYER:
            code = f"{formats.REMOTE_CODE}.py"
            shutil.copyfile(Path(__file__).with_name(code), scratch / code)
        _write_extra(scratch, extra)


def write_flax(model: Model, output: str | Path, extra: Mapping[str, str] | None = None) -> Path:
    """Write a model as a Flax checkpoint: config.json, tokenizer files, and the pytree by Orbax in `flax_weights`.

    In several processes each writes its shards, on a file system that all of them see.

    Args:
      model: the model.
      output: folder to write, which must not exist.
      extra: texts to write beside the weights, by file name; process 0 writes its own.

    Raises:
      InputError: the output exists.
    """
    described = _described(model)
    code = {"auto_map"}  # there are no PyTorch weights for it to load
    config = {key: value for key, value in described.config.items() if key not in code}
    check_new(output)
    if hosts.is_writer():
        with new_folder(output) as scratch:
            _write_json(scratch / CONFIG, config | _dtype_keys(model.decoder))
            _write_orbax(model.decoder, str((scratch / FLAX_WEIGHTS).resolve()))
            _write_companions(model, scratch)
            _write_extra(scratch, extra)
    else:
        _write_orbax(model.decoder, "")
    hosts.wait()
    return Path(output).expanduser()


def _write_orbax(decoder: Decoder, path: str) -> None:
    """The weights by Orbax, at the path that process 0 gives."""
    from orbax.checkpoint import v1 as ocp

    ocp.save(hosts.agree(path), nnx.to_pure_dict(nnx.state(decoder, nnx.Param)))


def _places(model: Model, sizes: Sizes) -> dict[str, list[np.ndarray]]:
    """Where each layer's groups stand among the padded ones: their original places where these are known."""
    decoder, target = model.decoder, sizes.layers[0]
    found: dict[str, list[np.ndarray]] = {
        kind: [np.arange(n) for n in group_counts(decoder, kind)] for kind in axis_table.KINDS
    }
    if decoder.config.alibi_heads is not None:
        layers = sizes_of(decoder).layers
        return found | {"head": [np.asarray(formats.kept_heads(decoder.config, layer)) for layer in layers]}
    recorded = _recorded_heads(model.record or {}, [len(rows) for rows in found["head"]], target.K)
    return found | {"head": recorded or found["head"]}


def _recorded_heads(record: dict[str, Any], counts: list[int], heads: int) -> list[np.ndarray] | None:
    """The heads that a record says were kept, when it can be believed: the first pruning of a model of that shape."""
    kept = record.get("kept")
    rows = kept.get("head") if isinstance(kept, dict) and "pruned_before" not in record else None
    if not isinstance(rows, list) or [len(row) if isinstance(row, list) else None for row in rows] != counts:
        return None
    for row in rows:
        if not all(isinstance(head, int) and 0 <= head < heads for head in row) or sorted(set(row)) != row:
            return None
    return [np.asarray(row, np.int32) for row in rows]


def _dtype_keys(decoder: Decoder) -> dict[str, str]:
    name = np.dtype(decoder.embedding.dtype).name
    return {"dtype": name, "torch_dtype": name}


@dataclass(frozen=True)
class _Planned:
    """What shard planning needs to know of a tensor that is not made yet."""

    bytes: int


def _plan(decoder: Decoder, max_shard_size: str) -> StateDictSplit:
    """Which file each tensor goes to."""
    leaf_types = {name: leaf.dtype for name, leaf in named_arrays(decoder)}
    planned = {
        binding.name: _Planned(int(np.prod(binding.stored_shape())) * leaf_types[binding.paths[0]].itemsize)
        for binding in rules.bindings(decoder)
    }
    return split_state_dict_into_shards_factory(
        planned,
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _give_tensors(decoder: Decoder, max_shard_size: str) -> None:
    """What the other processes do while process 0 writes: they give their parts of every tensor, in the same order."""
    for names in _plan(decoder, max_shard_size).filename_to_tensors.values():
        for _ in rules.tensors(decoder, set(names)):
            pass


def _write_shards(decoder: Decoder, folder: Path, max_shard_size: str, renamed: Mapping[str, str]) -> None:
    plan = _plan(decoder, max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        tensors = {renamed.get(name, name): tensor for name, tensor in rules.tensors(decoder, set(names))}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # else this shard would stay beside the next
        (folder / file).chmod(0o644)  # safetensors makes its files readable by their owner alone
    if plan.is_sharded:
        weight_map = {renamed.get(name, name): file for name, file in plan.tensor_to_filename.items()}
        _write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": weight_map})


def _write_companions(model: Model, folder: Path) -> None:
    for name in COMPANIONS:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    if model.record is not None:
        _write_json(folder / RECORD, model.record)


def _write_extra(folder: Path, extra: Mapping[str, str] | None) -> None:
    for name, text in (extra or {}).items():
        with (folder / name).open("x", encoding="utf-8") as file:  # never in the place of a model's file
            file.write(text)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2)
    # Lists of numbers (kept indices run to thousands) on one line.
    compact = re.sub(r"\[\n[\s\d,.e+-]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(compact + "\n", encoding="utf-8")
