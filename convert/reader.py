"""Folders of weights in: Hugging Face folders (safetensors) and our Flax checkpoints (Orbax)."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  teaches NumPy (and through it safetensors) bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from convert import rules
from minillm_jax import config as decoder_config
from minillm_jax import groups
from minillm_jax.decoder import Decoder, build, named_arrays
from minillm_jax.errors import InputError, cause
from minillm_jax.model import Model

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLAX_WEIGHTS = "flax_weights"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
RECORD = "pruning.json"

# Everything of a model that is no weights: what is fetched from the Hub, and copied beside written weights.
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


def read_model(model: str | Path, dtype: str | None = None) -> Model:
    """Load a model from a local folder or a Hub id.

    Args:
      model: a Hugging Face folder, a folder written by `python -m convert to-flax`, or `owner/name` on the Hub.
      dtype: float32, bfloat16 or float16; the stored type by default.

    Raises:
      InputError: the folder, its configuration or its weights cannot be used.
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise InputError(f"dtype {dtype!r} is not supported; expected one of {', '.join(FLOATS.values())}")
    folder = locate(model)
    raw = read_json(folder / CONFIG)
    config, sizes = decoder_config.parse(_complete(raw, folder), str(folder / CONFIG))
    abstract = build(config, sizes)
    numpy_dtype = None if dtype is None else np.dtype(dtype)
    if (folder / FLAX_WEIGHTS).is_dir():
        decoder = _read_flax(abstract, folder / FLAX_WEIGHTS, numpy_dtype)
    else:
        decoder = rules.fill(abstract, SafetensorsFolder(folder), numpy_dtype)
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else None
    return Model(decoder, raw, folder, str(model), record)


def locate(model: str | Path) -> Path:
    """The local folder of a model, fetched from the Hub when `model` is no local path.

    Raises:
      InputError: there is no such folder, and no such model can be fetched.
    """
    path, name = Path(model).expanduser(), str(model)
    if name and os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises for a name that is too long
        return path
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):  # noqa: PTH110
        raise InputError(f"{name}: no such folder; give a folder with a {CONFIG} or a Hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        wanted = [CONFIG, RECORD, *COMPANIONS, "model*.safetensors", INDEX]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the Hub client raises many kinds: offline, unknown, gated, ...
        raise InputError(f"{name}: no such folder here, and the Hub could not provide it ({cause(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: the file is missing or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: the file is missing; a model folder needs it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _complete(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with transformers' defaults and present-day names (`rope_parameters`) filled in."""
    if str(raw.get("model_type")) not in decoder_config.FAMILIES:
        return raw  # `parse` says what is wrong with it
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**raw).to_dict()
    except Exception as error:  # validation raises many kinds
        raise InputError(f"{folder / CONFIG}: transformers rejects the configuration ({cause(error)})") from error


class SafetensorsFolder:
    """The tensors of a folder with `model.safetensors`, or with an index and shards; one is read at a time."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._folder = folder
        self._file_of = self._locate_tensors()

    def names(self) -> Iterable[str]:
        """Every stored name."""
        return self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header.

        Raises:
          InputError: the tensor is of a type that holds no plain floating-point weights.
        """
        found = self._file_of[name].get_slice(name)
        if found.get_dtype() not in FLOATS:
            raise InputError(
                f"{self.where}: tensor {name!r} is {found.get_dtype()}, expected one of {', '.join(FLOATS)}; "
                "save the model in one of these first"
            )
        return tuple(found.get_shape())

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._file_of[name].get_tensor(name)

    def _locate_tensors(self) -> dict[str, Any]:
        # In the order of transformers, which does not look at an index beside a single file.
        if (self._folder / SINGLE).exists():
            file = _open(self._folder / SINGLE)
            return dict.fromkeys(file.keys(), file)
        if (self._folder / INDEX).exists():
            return self._locate_shards()
        if list(self._folder.glob("pytorch_model*.bin*")):
            raise InputError(
                f"{self.where}: only pytorch_model.bin weights, which are pickles and are not read; "
                "save the model with safe_serialization=True first"
            )
        raise InputError(f"{self.where}: no weights; expected {SINGLE}, or {INDEX} and its shards")

    def _locate_shards(self) -> dict[str, Any]:
        path = self._folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{path}: expected an object weight_map from tensor names to shard files")
        files: dict[str, Any] = {}
        for name in sorted({str(file) for file in weight_map.values()}):
            if Path(name).name != name:
                raise InputError(f"{path}: shard {name!r} is not a plain file name in the same folder; not followed")
            files[name] = _open(self._folder / name)
        inside = {key: name for name, file in files.items() for key in file.keys()}  # noqa: SIM118
        for key, name in weight_map.items():
            if inside.get(key) != name:
                raise InputError(f"{path}: tensor {key!r} is not in {name!r}, where the index says it is")
        extra = sorted(inside.keys() - weight_map.keys())
        if extra:
            raise InputError(f"{path}: tensor {extra[0]!r} of {inside[extra[0]]!r} is not listed in the index")
        return {key: files[name] for key, name in weight_map.items()}


def _open(path: Path) -> Any:
    try:
        # pread instead of mmap: the memory of the process stays at one tensor, not at the page cache of the file.
        return safe_open(path, framework="numpy", backend="pread")
    except FileNotFoundError as error:
        raise InputError(f"{path}: the file is missing; is the download complete?") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); is the download complete?") from error


def _read_flax(abstract: Decoder, folder: Path, dtype: np.dtype | None) -> Decoder:
    """An abstract decoder filled from an Orbax checkpoint, in the types stored there unless one is asked for."""
    from orbax.checkpoint import v1 as ocp

    where = str(folder.resolve())
    try:
        stored = ocp.metadata(where).metadata
        _check_stored(abstract, stored, where)
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place), stored
        )
        arrays = dict(named_arrays(ocp.load(where, wanted)))
    except InputError:
        raise
    except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
        raise InputError(f"{folder}: not a whole Orbax checkpoint ({cause(error)})") from error
    for path, array in arrays.items():
        rules.finite(np.asarray(array), None, path, where)
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[groups.array_path(path)], abstract)


def _check_stored(abstract: Decoder, stored: Any, where: str) -> None:
    """Whether a checkpoint holds just the arrays that the configuration has a place for."""
    expected = {path: leaf.shape for path, leaf in named_arrays(abstract)}
    found = {path: leaf.shape for path, leaf in named_arrays(stored)}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise InputError(
                f"{where}: array {path!r} has shape {found.get(path, 'none: it is missing')}, "
                f"but the configuration expects {expected.get(path, 'no such array')}"
            )
