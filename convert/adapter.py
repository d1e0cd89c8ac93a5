"""Our adapters ↔ the folder of PEFT, `adapter_model.safetensors` and `adapter_config.json`.

`adapter_modules` says which modules of PEFT hold the factors of which matrices, and how.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert import adapter_config, adapter_modules, memory, rules
from convert.adapter_config import CONFIG, Settings
from convert.adapter_modules import Module, Pair
from convert.sources import SafetensorsFolder
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError, reason
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import depth
from minillm_jax.recovery.adapter import Adapter, Factors, Lora

WEIGHTS = "adapter_model.safetensors"

# The routers of a layer in the classes of transformers 5, and the gate of a shared expert.
_OF_ROUTERS = re.compile(r"\.mlp\.(gate|router|shared_expert_gate)\.lora_")
_MERGE = "merge it with PEFT (merge_and_unload), save the result and read that model"

# The names of PEFT begin with those of its two wrappers of the model.
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

# ------------------------------------------------------------------------------------------------------------ writing


def gathered(adapter: Adapter) -> Adapter:
    """An adapter whole on a device of this process; every process must call it."""
    return jax.tree.map(lambda factor: jnp.asarray(sharding.gather(factor)), adapter)


def write_adapter(adapter: Adapter, lora: Lora, decoder: Decoder, folder: Path, base_model: str) -> None:
    """Write an adapter in the form of PEFT. With several processes, process 0 alone calls it.

    `PeftModel.from_pretrained` loads the folder on the model of the decoder, in the formats stock and per-layer. The
    file of an adapter with factors of experts has no dropout, which PEFT does not take there.

    Args:
      adapter: the factors; with several processes those of `gathered`.
      lora: rank, α and dropout.
      decoder: the model of the adapter; its configuration and its shapes alone are read.
      folder: an existing folder, as `folders.new_folder` makes it.
      base_model: folder or Hub id of the model, which PEFT reads as base_model_name_or_path.

    Raises:
      OSError: a file cannot be written.
    """
    host = [{name: tuple(map(np.asarray, factors)) for name, factors in run.items()} for run in adapter]
    adapted = {name for run in adapter for name in run}
    modules = adapter_modules.modules(decoder, lambda name, matrices: bool(adapted & set(matrices)))
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        factors = {name: (a[module.index], b[module.index]) for name, (a, b) in host[module.run].items()}
        own = [factors[name][0].shape[-1] for name in module.matrices if name in factors]
        if own:
            tensors |= zip(_names(module), module.stored(factors), strict=True)
            ranks[module.name] = sum(own)
    targets, parameters = (
        _shortened(ranks, [module for module in modules if module.parameter == kind]) for kind in (False, True)
    )
    _write_files(folder, adapter_config.document(lora, targets, base_model, parameters), tensors)


def _names(module: Module) -> tuple[str, str]:
    """The names of the A and the B of a module."""
    return f"{_PREFIX}{module.prefix}{_A}", f"{_PREFIX}{module.prefix}{_B}"


def _shortened(ranks: Mapping[str, int], modules: Sequence[Module]) -> dict[str, int]:
    """Names for the settings → rank: the name inside the layer where all layers agree, else one name per layer.

    PEFT takes a short name for every module whose name ends so. A layer that lost its attention or MLP still has the
    modules, without features, which PEFT would warn of.
    """
    layers: dict[str, list[str]] = {}
    for module in modules:
        layers.setdefault(module.short, []).append(module.name)
    names: dict[str, int] = {}
    for short, whole in layers.items():
        found = {ranks.get(name) for name in whole}
        rank = found.pop()
        if rank is not None and not found:
            names[short] = rank
        else:
            names |= {name: ranks[name] for name in whole if name in ranks}
    return names


def _write_files(folder: Path, document: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    config, weights = folder / CONFIG, folder / WEIGHTS
    config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{WEIGHTS}: {reason(error)}") from error
    # safetensors creates files that only their owner can read; the umask made the mode of the other file.
    weights.chmod(config.stat().st_mode & 0o777)


# ------------------------------------------------------------------------------------------------------------ reading


def read_adapter(folder: Path, decoder: Decoder) -> tuple[Adapter, Lora]:
    """Read an adapter that PEFT or `write_adapter` wrote.

    The product of the factors of every matrix is that of PEFT. The parts of a fused module share its A, except that a
    part does without the ranks in which its rows of B are zero. Where modules differ in rank or scale, the factors get
    zeros up to the largest rank, and B takes in the ratio of the scales. A layer that the adapter leaves out, between
    equal layers that it adapts, gets factors of zeros.

    Args:
      folder: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      decoder: the model of the adapter; it may be abstract.

    Returns:
      The factors, and rank, α, dropout and targets.

    Raises:
      InputError: a file is missing or damaged, the settings ask for more than low-rank factors of matrices in the
        layers, a tensor holds NaN or infinite values, or the adapter belongs to another model.
    """
    source, settings = _open(folder)
    modules = adapter_modules.modules(decoder, lambda name, matrices: settings.names_parameter(name))
    _check_tensors(source, settings, modules, decoder)
    stored, pairs = set(source.names()), {}
    for module in modules:
        if _names(module)[0] in stored and _has_elements(module):
            a, b = (_read_float32(source, name) for name in _names(module))
            ratio = np.float32(settings.scale_of(module.name) / settings.scale)
            for name, pair in module.separate(a, b * ratio, settings.rank).items():
                pairs.setdefault((module.run, name), {})[module.index] = pair
    return _assembled(pairs, settings, decoder)


def _open(folder: Path) -> tuple[SafetensorsFolder, Settings]:
    """The tensors and the settings of an adapter's folder."""
    if not os.path.isdir(folder):  # noqa: PTH112  Path.is_dir raises an error for a name that is too long
        raise InputError(f"{folder}: no such folder; give the folder of an adapter, with {CONFIG} and {WEIGHTS}")
    settings = adapter_config.read(folder)
    if not (folder / WEIGHTS).is_file():
        torch_file = "adapter_model.bin"
        if (folder / torch_file).exists():
            raise InputError(
                f"{folder / torch_file}: only safetensors are read, because a PyTorch file may hold code; load the "
                f"adapter with PEFT and save it again (save_pretrained), which writes {WEIGHTS}"
            )
        raise InputError(f"{folder / WEIGHTS}: the file is missing; is the download complete?")
    return SafetensorsFolder(folder, WEIGHTS), settings


def _has_elements(module: Module) -> bool:
    """Whether the weight of a module has elements."""
    (_, inputs), (outputs, _) = module.shapes(1)
    return bool(inputs * outputs)


def _check_tensors(source: SafetensorsFolder, settings: Settings, modules: Sequence[Module], decoder: Decoder) -> None:
    """Check names and shapes of all tensors before any is read."""
    file = f"{source.where}/{WEIGHTS}"
    expected: dict[str, tuple[int, int]] = {}
    for module in modules:
        expected |= zip(_names(module), module.shapes(settings.rank_of(module.name)), strict=True)
    stored = set(source.names())
    for name in sorted(stored - expected.keys()):
        raise InputError(f"{file}: {_unknown(name, source.shape(name), decoder, modules)}")
    for name in sorted(stored):
        if source.shape(name) != expected[name]:
            raise InputError(
                f"{file}: tensor {name!r} has shape {source.shape(name)}, but the model and {CONFIG} expect "
                f"{expected[name]}; was the adapter trained on another model?"
            )
    for module in modules:
        required = _has_elements(module) and settings.expects(module.name)
        missing = [name for name in _names(module) if name not in stored]
        if missing and (required or len(missing) == 1):
            raise InputError(
                f"{file}: tensor {missing[0]!r} of shape {expected[missing[0]]} is missing; is the download complete, "
                "or was the adapter trained on another model?"
            )
    if not stored:
        raise InputError(f"{file}: the file holds no tensors; save the adapter again")


def _unknown(name: str, shape: tuple[int, ...], decoder: Decoder, modules: Sequence[Module]) -> str:
    """The clause about a tensor that is no factor of a matrix in the layers."""
    table = rules.table_of(decoder)
    outer = {binding.name for binding in rules.bindings(decoder) if binding.index is None}
    outer |= {table.head} | ({table.head_alias} if table.head_alias else set())
    if any(name.startswith(f"{_PREFIX}{one.removesuffix('.weight')}.") for one in outer):
        return (
            f"tensor {name!r} belongs to the embeddings or the head, and only adapters of the layers are read; {_MERGE}"
        )
    if decoder.config.routing is not None and _OF_ROUTERS.search(name):
        return f"tensor {name!r} belongs to a router, and only adapters of attention and experts are read; {_MERGE}"
    return (
        f"unknown tensor {name!r} of shape {shape}; expected names such as "
        f"{_names(modules[0])[0]!r}; was the adapter trained on another model?"
    )


def _read_float32(source: SafetensorsFolder, name: str) -> np.ndarray:
    tensor = source.read(name).astype(np.float32)
    memory.check_finite(tensor, name, f"{source.where}/{WEIGHTS}")
    return tensor


def _assembled(
    pairs: Mapping[tuple[int, str], Mapping[int, Pair]], settings: Settings, decoder: Decoder
) -> tuple[Adapter, Lora]:
    """The adapter made of the factors of single layers: (run, matrix) → index of the layer in its run → factors."""
    rank = max((a.shape[-1] for layers in pairs.values() for a, _ in layers.values()), default=settings.rank)
    adapter: Adapter = [{} for _ in decoder.runs]
    for (run, name), layers in pairs.items():
        a, b = next(iter(layers.values()))
        count, axis = depth(decoder.runs[run]), len(axis_table.map_axes(name)[0])
        stacked_a = np.zeros((count, *a.shape[:-1], rank), np.float32)
        stacked_b = np.zeros((count, *b.shape[:axis], rank, *b.shape[axis + 1 :]), np.float32)
        for layer, (a, b) in layers.items():
            own = slice(a.shape[-1])
            stacked_a[layer, ..., own] = a
            stacked_b[(layer, *(slice(None),) * axis, own)] = b
        adapter[run][name] = Factors(jnp.asarray(stacked_a), jnp.asarray(stacked_b))
    targets = tuple(name for name in axis_table.all_matrices() if any(name in run for run in adapter))
    return adapter, Lora(rank, settings.alpha_at(rank), settings.dropout, targets)
