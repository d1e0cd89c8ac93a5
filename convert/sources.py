"""Where stored tensors come from: a folder of safetensors or of PyTorch files, single or sharded."""

import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from convert import memory, rules
from minillm_jax.errors import InputError, cause

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

# What is fetched from the Hub: safetensors, and PyTorch files of a model that has nothing else.
SAFETENSORS_FILES = ("model*.safetensors", INDEX)
TORCH_FILES = (TORCH_SINGLE, "pytorch_model-*.bin", TORCH_INDEX)

# The types of weights: safetensors' names and NumPy's (which are PyTorch's).
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_folder(folder: Path) -> rules.TensorSource:
    """The tensors of a folder, from the files that transformers would take of it.

    Raises:
      InputError: there are no weights, or they are damaged, incomplete, or no plain tensors.
    """
    if has_safetensors(folder):
        return SafetensorsFolder(folder)
    if (folder / TORCH_SINGLE).is_file() or (folder / TORCH_INDEX).is_file():
        return TorchFolder(folder)
    raise InputError(
        f"{folder}: no weights; expected {SINGLE} or {TORCH_SINGLE}, or the index of either and its shards"
    )


def has_safetensors(folder: Path) -> bool:
    """Whether a folder has safetensors, which go before PyTorch files."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


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


# ---------------------------------------------------------------------------------------------------------- index


def _files(folder: Path, single: str, index: str) -> tuple[list[str], dict[str, str] | None]:
    """Names of a folder's weight files, and the index's tensor name → file, None for a single file.

    In the order of transformers, which does not look at an index beside a single file.
    """
    if (folder / single).is_file():
        return [single], None
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / index}: expected an object weight_map from tensor names to shard files")
    names = sorted({str(file) for file in weight_map.values()})
    for name in names:
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise InputError(
                f"{folder / index}: shard {name!r} is not a plain file name in the same folder; not followed"
            )
    return names, weight_map


def _owners(inside: Mapping[str, Iterable[str]], weight_map: Mapping[str, str] | None, where: Path) -> dict[str, str]:
    """Tensor name → file name, where the files and the index agree.

    Args:
      inside: file name → the names of the tensors in it.
      weight_map: what the index says, None for a single file.
      where: path of the index, for errors.

    Raises:
      InputError: a tensor is in two files, or not where the index says it is, or not in the index.
    """
    owner: dict[str, str] = {}
    for file, keys in inside.items():
        for key in keys:
            if key in owner:
                raise InputError(f"{where}: tensor {key!r} is in {owner[key]!r} and in {file!r}; remove one of them")
            owner[key] = file
    if weight_map is None:
        return owner
    for key, file in weight_map.items():
        if owner.get(key) != file:
            raise InputError(f"{where}: tensor {key!r} is not in {file!r}, where the index says it is")
    extra = sorted(owner.keys() - weight_map.keys())
    if extra:
        raise InputError(f"{where}: tensor {extra[0]!r} of {owner[extra[0]]!r} is not listed in the index")
    return owner


def _check_type(found: str, known: Iterable[str], name: str, where: str) -> None:
    if found not in known:
        raise InputError(
            f"{where}: tensor {name!r} is {found}, expected one of {', '.join(known)}; "
            "save the model in one of these first"
        )


# ---------------------------------------------------------------------------------------------------- safetensors


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: its file, the offset of its first byte there, and what a header says of it."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFolder:
    """The tensors of a folder with `model.safetensors`, or with an index and shards; each is read by itself."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        files, weight_map = _files(folder, SINGLE, INDEX)
        entries = {file: _safetensors_entries(folder / file) for file in files}
        owner = _owners(entries, weight_map, folder / INDEX)
        self._entries = {key: entries[file][key] for key, file in owner.items()}

    def names(self) -> Iterable[str]:
        """Every stored name."""
        return self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header.

        Raises:
          InputError: the tensor is of a type that holds no plain floating-point weights.
        """
        entry = self._entries[name]
        _check_type(entry.dtype, FLOATS, name, self.where)
        return entry.shape

    def read(self, name: str, allocate: memory.Allocate = memory.aligned_empty) -> np.ndarray:
        """One tensor.

        Raises:
          InputError: the file has changed since it was opened.
        """
        entry = self._entries[name]
        _check_type(entry.dtype, FLOATS, name, self.where)
        tensor = allocate(entry.shape, np.dtype(FLOATS[entry.dtype]))
        data = memory.as_bytes(tensor)
        try:
            memory.share_work(lambda start, stop: _read_part(entry, data, start, stop), tensor.nbytes, tensor.nbytes)
        except OSError as error:
            raise InputError(f"{entry.path}: tensor {name!r} cannot be read ({cause(error)})") from error
        return tensor


def _read_part(entry: _Entry, data: np.ndarray, start: int, stop: int) -> None:
    """Bytes start to stop of a tensor into their place in `data`.

    Neither by safetensors' own read, which takes its memory in small pages, nor by a mapping of the file, whose pages
    would count as the process's memory.
    """
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset + start)
        while start < stop:
            count = file.readinto(data[start:stop].data)
            if not count:
                raise OSError("the file has become shorter while it was read")
            start += count


def _safetensors_entries(path: Path) -> dict[str, _Entry]:
    """Tensor name → where it lies. The header is checked by safetensors before its offsets are used."""
    try:
        safe_open(path, framework="numpy", backend="pread")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise InputError(f"{path}: the file is missing; is the download complete?") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); is the download complete?") from error
    header.pop("__metadata__", None)
    return {
        name: _Entry(path, 8 + length + found["data_offsets"][0], found["dtype"], tuple(found["shape"]))
        for name, found in header.items()
    }


# -------------------------------------------------------------------------------------------------------- PyTorch


class TorchFolder:
    """The tensors of a folder with `pytorch_model.bin`, or with an index and shards, read by PyTorch.

    Files of today's format are mapped, not read: their pages are the system's cache and not held.
    """

    def __init__(self, folder: Path):
        self.where = str(folder)
        files, weight_map = _files(folder, TORCH_SINGLE, TORCH_INDEX)
        loaded = {file: _load_torch(folder / file) for file in files}
        owner = _owners(loaded, weight_map, folder / TORCH_INDEX)
        self._tensors = {key: loaded[file][key] for key, file in owner.items()}

    def names(self) -> Iterable[str]:
        """Every stored name."""
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
          InputError: the tensor is sparse, quantised, without data, or of a type that holds no plain weights.
        """
        tensor = self._tensors[name]
        layout = str(tensor.layout).removeprefix("torch.")
        if layout != "strided" or tensor.is_nested or tensor.device.type != "cpu":
            kind = layout if layout != "strided" else "nested" if tensor.is_nested else "without data"
            raise InputError(f"{self.where}: tensor {name!r} is {kind}, expected a dense one; save the model so first")
        _check_type(str(tensor.dtype).removeprefix("torch."), FLOATS.values(), name, self.where)
        return tuple(tensor.shape)

    def read(self, name: str, allocate: memory.Allocate = memory.aligned_empty) -> np.ndarray:
        """One tensor, in memory of its own: it must not change when the mapped file does.

        Raises:
          InputError: as `shape`.
        """
        import torch

        shape, tensor = self.shape(name), self._tensors[name].detach()
        half = tensor.dtype == torch.bfloat16  # which NumPy does not take from PyTorch
        stored = tensor.view(torch.int16).numpy().view("bfloat16") if half else tensor.numpy()
        own = allocate(shape, stored.dtype)
        memory.copy_layout(own, stored)
        return own


def _load_torch(path: Path) -> dict[str, Any]:
    """The dictionary of tensors in a file of `torch.save`; code in it is never run."""
    torch = _import_torch(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\3\4"  # the format since PyTorch 1.6; only that can be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is wrong with a file, InputError says
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError as error:
        raise InputError(f"{path}: the file is missing; is the download complete?") from error
    except Exception as error:  # damaged files raise many kinds
        raise InputError(f"{path}: {_refusal(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a dictionary of tensors, found {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path}: expected a dictionary of tensors, found {type(value).__name__} under {name!r}; "
                "save the model's state_dict alone"
            )
    return found


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'{path}: only PyTorch reads this file; pip install "minillm-jax[torch]", or save the model as safetensors'
        ) from error
    return torch


def _refusal(error: Exception) -> str:
    """What is wrong with a file that PyTorch did not load; its own messages are pages that advise to run the code."""
    code = re.search(r"GLOBAL:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
    if isinstance(error, pickle.UnpicklingError) and code:
        return (
            f"holds more than tensors ({code[1]}) and is not loaded; save the model as safetensors where you trust it"
        )
    said = "" if isinstance(error, pickle.UnpicklingError) else f" ({cause(error).split('. ')[0]})"
    return f"not a whole PyTorch file of tensors{said}; is the download complete?"
