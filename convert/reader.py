"""Reading a model from a Hugging Face folder, from a Flax checkpoint (Orbax) or from the Hub."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from convert import memory, rules, sources
from convert.sources import FLOATS, read_json
from minillm_jax.devices.sharding import parts, shardings
from minillm_jax.errors import InputError, cause
from minillm_jax.model import axis_table, families
from minillm_jax.model.build import build
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import named_arrays

CONFIG = "config.json"
FLAX_WEIGHTS = "flax_weights"
RECORD = "pruning.json"

# Tokenizer files and generation settings: downloaded from the Hub, and copied beside written weights.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def read_model(model: str | Path, dtype: str | None = None, mesh: Mesh | None = None) -> Model:
    """Load a model from a local folder or a Hub id.

    Args:
      model: a Hugging Face folder, a folder written by `python -m convert to-flax`, or `owner/name` on the Hub.
      dtype: type that the weights are cast to, float32, bfloat16 or float16; the stored type by default.
      mesh: the devices that the weights are sharded over; one device by default.

    Raises:
      InputError: the folder does not exist, its configuration is not supported, or its weights are damaged or do not
        match the configuration.
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise InputError(f"dtype {dtype!r} is not supported; expected one of {', '.join(FLOATS.values())}")
    folder = locate(model)
    raw = read_json(folder / CONFIG)
    config, sizes = families.parse(_complete(raw, folder), str(folder / CONFIG))
    abstract = build(config, sizes)
    numpy_dtype = None if dtype is None else np.dtype(dtype)
    places = {} if mesh is None else shardings(abstract, mesh)
    if (folder / FLAX_WEIGHTS).is_dir():
        decoder = _read_flax(abstract, folder / FLAX_WEIGHTS, numpy_dtype, places)
    else:
        decoder = rules.fill(abstract, sources.open_folder(folder), numpy_dtype, places)
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else None
    return Model(decoder, raw, folder, str(model), record)


def locate(model: str | Path) -> Path:
    """The local folder of a model; a model that is no local folder is downloaded from the Hub.

    Raises:
      InputError: the folder does not exist, and the Hub cannot provide the model.
    """
    path, name = Path(model).expanduser(), str(model)
    if name and os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises an error for a name that is too long
        return path
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):  # noqa: PTH110
        raise InputError(f"{name}: no such folder; give a folder with a {CONFIG} or a Hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        companions = [CONFIG, RECORD, *COMPANIONS]
        weights = [*sources.SAFETENSORS_FILES, f"{FLAX_WEIGHTS}/*"]
        folder = Path(snapshot_download(name, allow_patterns=[*companions, *weights]))
        if not sources.has_safetensors(folder) and not (folder / FLAX_WEIGHTS).is_dir():
            folder = Path(snapshot_download(name, allow_patterns=[*companions, *sources.TORCH_FILES]))
        return folder
    except Exception as error:  # the Hub client raises errors of many types: offline, unknown, gated, ...
        raise InputError(f"{name}: no such folder here, and the Hub could not provide it ({cause(error)})") from error


def _complete(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with transformers' defaults, and with old keys renamed to current ones (`rope_parameters`)."""
    from transformers import AutoConfig

    base = families.family_of(raw, str(folder / CONFIG))
    families.check_layer_count(raw, str(folder / CONFIG))
    stock_keys = {key: value for key, value in raw.items() if key not in ("auto_map", "per_layer_config")}
    unchanged = {"model_type": raw["model_type"], "per_layer_config": raw.get("per_layer_config")}
    try:
        if raw["model_type"] != base:
            # The stock class only fills in defaults here, and it refuses a hidden size that the heads do not divide.
            unchanged["hidden_size"] = raw["hidden_size"]
            stock_keys["hidden_size"] = raw[families.FAMILIES[base].heads] * raw["head_dim"]
        return AutoConfig.for_model(**stock_keys | {"model_type": base}).to_dict() | unchanged
    except Exception as error:  # validation raises errors of many types
        raise InputError(f"{folder / CONFIG}: transformers rejects the configuration ({cause(error)})") from error


def _read_flax(abstract: Decoder, folder: Path, dtype: np.dtype | None, places: Mapping[str, NamedSharding]) -> Decoder:
    """Fill an abstract decoder from an Orbax checkpoint; `dtype` None keeps the stored types."""
    from orbax.checkpoint import v1 as ocp

    where = str(folder.resolve())
    try:
        stored = ocp.metadata(where).metadata
        _check_stored(abstract, stored, where)
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def target(path: jax.tree_util.KeyPath, leaf: Any) -> jax.ShapeDtypeStruct:
            place = places.get(axis_table.array_path(path), single)
            return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place)

        targets = jax.tree_util.tree_map_with_path(target, stored)
        arrays = dict(named_arrays(ocp.load(where, targets)))
    except InputError:
        raise
    except Exception as error:  # Orbax raises errors of many types for a damaged checkpoint
        raise InputError(f"{folder}: not a whole Orbax checkpoint ({cause(error)})") from error
    for path, array in arrays.items():
        for _, part in parts(array):
            memory.check_finite(part, path, where)
    return rules.fill_tree(abstract, arrays, places)


def _check_stored(abstract: Decoder, stored: Any, where: str) -> None:
    """Check that a checkpoint holds exactly the arrays of the configuration, with their shapes."""
    expected_shapes = {path: leaf.shape for path, leaf in named_arrays(abstract) if not axis_table.is_data(path)}
    stored_shapes = {path: leaf.shape for path, leaf in named_arrays(stored)}
    for path in sorted(expected_shapes.keys() | stored_shapes.keys()):
        if expected_shapes.get(path) != stored_shapes.get(path):
            raise InputError(
                f"{where}: array {path!r} has shape {stored_shapes.get(path, 'none: it is missing')}, "
                f"but the configuration expects {expected_shapes.get(path, 'no such array')}"
            )
