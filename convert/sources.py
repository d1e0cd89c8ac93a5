"""Tensor sources: folders with safetensors or PyTorch files, as one file or as an index file and shards."""

import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from safetensors import SafetensorError, safe_open

from convert import found, gguf_file, gguf_read, gguf_tensors, memory, rules
from minillm_jax.errors import InputError, cause, reason

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

# Patterns of the weight files that are downloaded from the Hub. PyTorch files are downloaded only where a model has no
# other weights.
SAFETENSORS_FILES = ("model*.safetensors", INDEX)
TORCH_FILES = (TORCH_SINGLE, "pytorch_model-*.bin", TORCH_INDEX)

# Accepted types of weights: name in a safetensors header → name in NumPy and PyTorch.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_folder(folder: Path) -> rules.TensorSource:
    """The tensors of a folder, from the same weight files that transformers would load.

    Raises:
      InputError: the weight files are missing, damaged or incomplete, or hold something else than tensors.
    """
    if has_safetensors(folder):
        return SafetensorsFolder(folder)
    if _has(folder, TORCH_SINGLE, TORCH_INDEX):
        return TorchFolder(folder)
    if _has(folder, gguf_read.WEIGHTS):
        return gguf_read.GgufSource(gguf_read.weights_of(folder))
    other = found.other_model(folder)
    raise InputError(
        f"{folder}: no weights; "
        + (other or f"expected {SINGLE} or {TORCH_SINGLE}, or the index of either and its shards")
    )


def has_safetensors(folder: Path) -> bool:
    """Whether a folder has safetensors files, which take precedence over PyTorch files."""
    return _has(folder, SINGLE, INDEX)


def has_weights(folder: Path) -> bool:
    """Whether a folder has weight files that `open_folder` opens."""
    return _has(folder, SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX, gguf_read.WEIGHTS)


def _has(folder: Path, *names: str) -> bool:
    return any(os.path.isfile(folder / name) for name in names)  # noqa: PTH113  Path.is_file raises without permission


def holds_floats(folder: Path) -> bool:
    """Whether all tensors of a folder's weight files are of types in `FLOATS`, by the headers.

    Raises:
      InputError: as for `open_folder`.
    """
    source = open_folder(folder)
    try:
        for name in source.names():
            source.shape(name)
    except InputError:
        return False
    return True


def stored_type(folder: Path) -> str | None:
    """The type of a folder's weights from the headers of safetensors and GGUF files; None where there are none.

    Of safetensors files, it is the type of the first tensor.

    Raises:
      InputError: the header or the index file is damaged.
    """
    if not has_safetensors(folder):
        is_gguf = not _has(folder, TORCH_SINGLE, TORCH_INDEX) and _has(folder, gguf_read.WEIGHTS)
        return gguf_tensors.stored_type(gguf_file.open_gguf(gguf_read.weights_of(folder))) if is_gguf else None
    files, _ = _files(folder, SINGLE, INDEX)
    if not (folder / files[0]).is_file():
        return None
    entries = _safetensors_entries(folder / files[0])
    return next((FLOATS.get(entry.dtype) for entry in entries.values()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      InputError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: the file is missing; a model folder needs it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    except (ValueError, RecursionError) as error:
        content = found.file_content(path)
        raise InputError(f"{path}: {content or f'cannot be read as JSON ({cause(error)})'}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------------------------- index files


def _files(folder: Path, single: str, index: str) -> tuple[list[str], dict[str, str] | None]:
    """Names of a folder's weight files, and the index file's map tensor name → file name, None for a single file.

    As in transformers, a single file takes precedence over an index file.
    """
    if _has(folder, single):
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


def _file_of_tensor(
    contents: Mapping[str, Iterable[str]], weight_map: Mapping[str, str] | None, index: Path
) -> dict[str, str]:
    """Map tensor name → file name, after a check that the index file agrees with the contents of the files.

    Args:
      contents: file name → names of the tensors in the file.
      weight_map: map of the index file, tensor name → file name; None for a single file.
      index: path of the index file, for messages.

    Raises:
      InputError: a tensor is in two files, is not in the file that the index names, or is not listed in the index.
    """
    file_of: dict[str, str] = {}
    for file, names in contents.items():
        for name in names:
            if name in file_of:
                raise InputError(
                    f"{index}: tensor {name!r} is in {file_of[name]!r} and in {file!r}; remove it from one of the files"
                )
            file_of[name] = file
    if weight_map is None:
        return file_of
    for name, file in weight_map.items():
        if file_of.get(name) != file:
            raise InputError(
                f"{index}: the index places tensor {name!r} in {file!r}, but the file does not hold it; "
                "is the download complete?"
            )
    unlisted = sorted(file_of.keys() - weight_map.keys())
    if unlisted:
        raise InputError(
            f"{index}: tensor {unlisted[0]!r} of {file_of[unlisted[0]]!r} is not listed in the index; "
            "does the index belong to these files?"
        )
    return file_of


def _check_type(dtype: str, accepted: Iterable[str], name: str, where: str) -> None:
    if dtype not in accepted:
        raise InputError(
            f"{where}: tensor {name!r} is {dtype}, expected one of {', '.join(accepted)}; "
            "save the model in one of these types first"
        )


# ---------------------------------------------------------------------------------------------------- safetensors


@dataclass(frozen=True)
class _Entry:
    """A tensor in a safetensors file: its file, the offset of its first byte, and its type and shape by the header."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFolder:
    """A tensor source: one safetensors file, or an index file and shards. Tensors are read one at a time."""

    def __init__(self, folder: Path, single: str = SINGLE, types: Mapping[str, str] | None = None):
        self.where, self._types = str(folder), types or FLOATS
        files, weight_map = _files(folder, single, INDEX)
        entries = {file: _safetensors_entries(folder / file) for file in files}
        file_of = _file_of_tensor(entries, weight_map, folder / INDEX)
        self._entries = {name: entries[file][name] for name, file in file_of.items()}

    def names(self) -> Iterable[str]:
        """Names of all stored tensors."""
        return self._entries

    def type_of(self, name: str) -> str:
        """Type of a tensor, as the header writes it."""
        return self._entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the safetensors header.

        Raises:
          InputError: the type of the tensor is not accepted, which are those in `FLOATS` by default.
        """
        entry = self._entries[name]
        _check_type(entry.dtype, self._types, name, self.where)
        return entry.shape

    def read(self, name: str, allocate: memory.Allocate = memory.aligned_empty) -> np.ndarray:
        """Read one tensor.

        Args:
          name: name of the tensor.
          allocate: gives the array that the tensor is read into.

        Raises:
          InputError: the type of the tensor is not accepted, or the file has changed since its header was read.
        """
        entry = self._entries[name]
        _check_type(entry.dtype, self._types, name, self.where)
        tensor = allocate(entry.shape, np.dtype(self._types[entry.dtype]))
        data = memory.as_bytes(tensor)
        try:
            memory.share_work(lambda start, stop: _read_part(entry, data, start, stop), tensor.nbytes, tensor.nbytes)
        except OSError as error:
            raise InputError(f"{entry.path}: tensor {name!r} cannot be read ({cause(error)})") from error
        return tensor


def _read_part(entry: _Entry, data: np.ndarray, start: int, stop: int) -> None:
    """Read the bytes from `start` to `stop` of a tensor into the same range of `data`.

    safetensors' own read allocates memory in small pages, which is slow; the pages of a mapped file would count as
    memory of the process.
    """
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset + start)
        while start < stop:
            count = file.readinto(data[start:stop].data)
            if not count:
                raise OSError("the file has become shorter while it was read")
            start += count


def _safetensors_entries(path: Path) -> dict[str, _Entry]:
    """Tensor name → entry of the header. safetensors checks the header before its offsets are used."""
    try:
        with path.open("rb") as file:  # safe_open says of every file that it cannot open that it is missing
            length = int.from_bytes(file.read(8), "little")
            safe_open(path, framework="numpy", backend="pread")
            header = json.loads(file.read(length))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (SafetensorError, ValueError) as error:
        content = found.file_content(path) or f"not a whole safetensors file ({error}); is the download complete?"
        raise InputError(f"{path}: {content}") from error
    header.pop("__metadata__", None)
    return {
        name: _Entry(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _unreadable(path: Path, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: the file is missing; is the download complete?")
    return InputError(f"{path}: cannot be read ({reason(error)})")


# -------------------------------------------------------------------------------------------------------- PyTorch


class TorchFolder:
    """A tensor source: `pytorch_model.bin`, or an index file and shards, loaded by PyTorch.

    Files in the format of PyTorch 1.6 and later are mapped, so their pages belong to the system's cache.
    """

    def __init__(self, folder: Path):
        self.where = str(folder)
        files, weight_map = _files(folder, TORCH_SINGLE, TORCH_INDEX)
        tensors = {file: _load_torch(folder / file) for file in files}
        file_of = _file_of_tensor(tensors, weight_map, folder / TORCH_INDEX)
        self._tensors = {name: tensors[file][name] for name, file in file_of.items()}

    def names(self) -> Iterable[str]:
        """Names of all stored tensors."""
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
          InputError: the tensor is sparse, nested or without data, or its type is not in `FLOATS`.
        """
        tensor = self._tensors[name]
        layout = str(tensor.layout).removeprefix("torch.")
        if layout != "strided" or tensor.is_nested or tensor.device.type != "cpu":
            kind = layout if layout != "strided" else "nested" if tensor.is_nested else "without data"
            raise InputError(
                f"{self.where}: tensor {name!r} is {kind}, expected a dense tensor; save the model with dense tensors"
            )
        _check_type(str(tensor.dtype).removeprefix("torch."), FLOATS.values(), name, self.where)
        return tuple(tensor.shape)

    def read(self, name: str, allocate: memory.Allocate = memory.aligned_empty) -> np.ndarray:
        """Copy one tensor out of the mapped file, so that later changes of the file do not change the copy.

        Args:
          name: name of the tensor.
          allocate: gives the array that the tensor is copied into.

        Raises:
          InputError: as for `shape`.
        """
        import torch

        shape, tensor = self.shape(name), self._tensors[name].detach()
        is_bfloat16 = tensor.dtype == torch.bfloat16  # PyTorch cannot export bfloat16 to NumPy
        mapped = tensor.view(torch.int16).numpy().view("bfloat16") if is_bfloat16 else tensor.numpy()
        copied = allocate(shape, mapped.dtype)
        memory.copy_layout(copied, mapped)
        return copied


def _load_torch(path: Path) -> dict[str, Any]:
    """The dictionary of tensors in a file of `torch.save`. Code in the file is never run."""
    torch = _import_torch(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\3\4"  # the format since PyTorch 1.6; older files cannot be mapped
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # InputError reports what is wrong with the file
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged files raise many kinds
        raise InputError(f"{path}: {found.file_content(path) or _refusal(error)}") from error
    if not isinstance(tensors, dict):
        raise InputError(
            f"{path}: expected a dictionary of tensors, found {type(tensors).__name__}; "
            "save the model's state_dict alone"
        )
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path}: expected a dictionary of tensors, found {type(value).__name__} under {name!r}; "
                "save the model's state_dict alone"
            )
    return tensors


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'{path}: only PyTorch reads this file; pip install "minillm-jax[torch]", or save the model as safetensors'
        ) from error
    return torch


def _refusal(error: Exception) -> str:
    """A sentence for a file that PyTorch refuses; its own messages are long and advise to run the code in the file."""
    code = re.search(r"GLOBAL:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
    if isinstance(error, pickle.UnpicklingError) and code:
        return f"holds more than tensors ({code[1]}) and is not loaded; if you trust it, save it as safetensors first"
    reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({cause(error).split('. ')[0]})"
    return f"not a whole PyTorch file of tensors{reason}; is the download complete?"
