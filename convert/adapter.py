"""Our adapters ↔ the folder of PEFT, `adapter_model.safetensors` and `adapter_config.json`, by the families' tables.

PEFT stores two matrices for a linear module W [outputs, inputs]: A [r, inputs] and B [outputs, r]. The rule of W is the
rule of A with the rank in the place of the outputs, and the rule of B with the rank in the place of the inputs.

Each matrix of ours has its own factors, even where the family stores several matrices as one fused module. The A of the
module then holds the A's of its parts, one below the other. Its B is zero where the rows of one part meet the A of
another part, so the product is that of the separate factors.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert import adapter_config, memory, rules
from convert.adapter_config import CONFIG, Settings
from convert.families import Part, Rule
from convert.rules import Binding
from convert.sources import SafetensorsFolder
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError, reason
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import depth
from minillm_jax.recovery.adapter import Adapter, Factors, Lora

WEIGHTS = "adapter_model.safetensors"

# The names of PEFT begin with those of its two wrappers of the model.
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

# A [*inputs, R] and B [R, *outputs] of one layer, in the layout of the decoder.
Pair = tuple[np.ndarray, np.ndarray]


def _modules(decoder: Decoder) -> list[Binding]:
    """The bindings of all linear modules in the layers; modules without inputs or outputs included."""
    kernels = [binding for binding in rules.bindings(decoder) if binding.index is not None]
    return [binding for binding in kernels if all(part.path.endswith(".kernel") for part in binding.rule.parts)]


def _module_name(binding: Binding) -> str:
    return binding.name.removesuffix(".weight")


def _matrix(part: Part) -> str:
    """The name of a matrix of ours, `attention.q`."""
    return part.path.removesuffix(".kernel")


def _run(binding: Binding) -> int:
    """The run of a module's layer."""
    return int(binding.paths[0].split(".")[1])


def _inputs_and_outputs(part: Part) -> list[str]:
    return axis_table.BLOCK_AXES[part.path].split()


def _with_rank(binding: Binding, letters: str, rank: int) -> Binding:
    """A binding in which some axes have the size of the rank: the first that of the rank, all others size 1."""
    return replace(binding, sizes=binding.sizes | dict.fromkeys(letters, 1) | {letters[0]: rank})


def _binding_a(binding: Binding, part: Part, rank: int) -> Binding:
    """The binding of one part's A, stored [rank, inputs]."""
    rule = Rule(binding.rule.name, (part,))
    return replace(_with_rank(binding, _inputs_and_outputs(part)[1], rank), rule=rule)


def _binding_b(binding: Binding, rank: int) -> Binding:
    """The binding of a module's B, stored [outputs of all parts, rank]. All parts have the same inputs."""
    return _with_rank(binding, _inputs_and_outputs(binding.rule.parts[0])[0], rank)


def _part_shape(binding: Binding, part: Part) -> tuple[int, ...]:
    return axis_table.shape(axis_table.BLOCK_AXES[part.path], binding.sizes)


# ------------------------------------------------------------------------------------------------------------ writing


def gathered(adapter: Adapter) -> Adapter:
    """An adapter whole on a device of this process; every process must call it."""
    return jax.tree.map(lambda factor: jnp.asarray(sharding.gather(factor)), adapter)


def write_adapter(adapter: Adapter, lora: Lora, decoder: Decoder, folder: Path, base_model: str) -> None:
    """Write an adapter in the form of PEFT. With several processes, process 0 alone calls it.

    `PeftModel.from_pretrained` loads the folder on the model of the decoder, in the formats stock and per-layer.

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
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for binding in _modules(decoder):
        factors = {name: (a[binding.index], b[binding.index]) for name, (a, b) in host[_run(binding)].items()}
        if any(_matrix(part) in factors for part in binding.rule.parts):
            a, b = _stored(binding, factors)
            module = _module_name(binding)
            tensors |= {f"{_PREFIX}{module}{_A}": a, f"{_PREFIX}{module}{_B}": b}
            ranks[module] = len(a)
    _write_files(folder, adapter_config.document(lora, _shortened(ranks, _modules(decoder)), base_model), tensors)


def _stored(binding: Binding, factors: Mapping[str, Pair]) -> Pair:
    """A [r, inputs] and B [outputs, r] of a module, made of the factors of its parts; parts may lack factors."""
    adapted = [part for part in binding.rule.parts if _matrix(part) in factors]
    ranks = [factors[_matrix(part)][0].shape[-1] for part in adapted]
    total, first, rows, blocks = sum(ranks), 0, [], {}
    for part, rank in zip(adapted, ranks, strict=True):
        a, b = factors[_matrix(part)]
        bound = _binding_a(binding, part, rank)
        rows.append(bound.to_torch([a.reshape(_part_shape(bound, part)).astype(np.float32)]))
        blocks[part] = (slice(first, first + rank), b)
        first += rank
    bound, columns = _binding_b(binding, total), []
    for part in binding.rule.parts:
        shape = _part_shape(bound, part)
        columns.append(np.zeros(shape, np.float32))
        if part in blocks:
            block, b = blocks[part]
            columns[-1][block] = b.reshape(-1, *shape[1:])
    return np.concatenate(rows), bound.to_torch(columns)


def _shortened(ranks: Mapping[str, int], modules: Sequence[Binding]) -> dict[str, int]:
    """Names for target_modules → rank: the name inside the layer where all layers agree, else one name per layer.

    PEFT takes a short name for every module whose name ends so. A layer that lost its attention or MLP still has the
    modules, without features, which PEFT would warn of.
    """
    layers: dict[str, list[str]] = {}
    for binding in modules:
        layers.setdefault(binding.rule.name.removesuffix(".weight"), []).append(_module_name(binding))
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
    modules = _modules(decoder)
    _check_tensors(source, settings, modules, decoder)
    stored, pairs = set(source.names()), {}
    for binding in modules:
        module = _module_name(binding)
        if f"{_PREFIX}{module}{_A}" in stored and np.prod(binding.stored_shape()):
            a, b = (_read_float32(source, f"{_PREFIX}{module}{end}") for end in (_A, _B))
            ratio = np.float32(settings.scale_of(module) / settings.scale)
            for name, pair in _separate(binding, a, b * ratio, settings.rank).items():
                pairs.setdefault((_run(binding), name), {})[binding.index] = pair
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


def _check_tensors(source: SafetensorsFolder, settings: Settings, modules: Sequence[Binding], decoder: Decoder) -> None:
    """Check names and shapes of all tensors before any is read."""
    file = f"{source.where}/{WEIGHTS}"
    expected: dict[str, tuple[int, int]] = {}
    for binding in modules:
        module = _module_name(binding)
        rank, (outputs, inputs) = settings.rank_of(module), binding.stored_shape()
        expected |= {f"{_PREFIX}{module}{_A}": (rank, inputs), f"{_PREFIX}{module}{_B}": (outputs, rank)}
    stored = set(source.names())
    for name in sorted(stored - expected.keys()):
        raise InputError(f"{file}: {_unknown(name, source.shape(name), decoder)}")
    for name in sorted(stored):
        if source.shape(name) != expected[name]:
            raise InputError(
                f"{file}: tensor {name!r} has shape {source.shape(name)}, but the model and {CONFIG} expect "
                f"{expected[name]}; was the adapter trained on another model?"
            )
    for binding in modules:
        module = _module_name(binding)
        names = [f"{_PREFIX}{module}{end}" for end in (_A, _B)]
        required = np.prod(binding.stored_shape()) and settings.expects(module)
        missing = [name for name in names if name not in stored]
        if missing and (required or len(missing) == 1):
            raise InputError(
                f"{file}: tensor {missing[0]!r} of shape {expected[missing[0]]} is missing; is the download complete, "
                "or was the adapter trained on another model?"
            )
    if not stored:
        raise InputError(f"{file}: the file holds no tensors; save the adapter again")


def _unknown(name: str, shape: tuple[int, ...], decoder: Decoder) -> str:
    """The clause about a tensor that is no factor of a matrix in the layers."""
    table = rules.table_of(decoder)
    outer = {binding.name for binding in rules.bindings(decoder) if binding.index is None}
    outer |= {table.head} | ({table.head_alias} if table.head_alias else set())
    if any(name.startswith(f"{_PREFIX}{one.removesuffix('.weight')}.") for one in outer):
        return (
            f"tensor {name!r} belongs to the embeddings or the head, and only adapters of the layers are read; "
            "merge it with PEFT (merge_and_unload), save the result and read that model"
        )
    return (
        f"unknown tensor {name!r} of shape {shape}; expected names such as "
        f"{_PREFIX + _module_name(_modules(decoder)[0]) + _A!r}; was the adapter trained on another model?"
    )


def _read_float32(source: SafetensorsFolder, name: str) -> np.ndarray:
    tensor = source.read(name).astype(np.float32)
    memory.check_finite(tensor, name, f"{source.where}/{WEIGHTS}")
    return tensor


def _separate(binding: Binding, a: np.ndarray, b: np.ndarray, rank: int) -> dict[str, Pair]:
    """The factors of each matrix of ours in one module.

    Args:
      binding: the module.
      a: its A, [r, inputs].
      b: its B, [outputs, r].
      rank: rank of the adapter, which `write_adapter` gives to each part of a fused module.
    """
    total, parts = len(a), binding.rule.parts
    columns = _binding_b(binding, total).to_flax(b)
    pairs = {}
    for part, column, kept in zip(parts, columns, _kept_ranks(columns, rank), strict=True):
        inputs = len(_inputs_and_outputs(part)[0])
        outputs = _part_shape(binding, part)[inputs:]
        bound = _binding_a(binding, part, total)
        whole = bound.to_flax(a)[0].reshape(*_part_shape(binding, part)[:inputs], total)
        if kept.size:
            pairs[_matrix(part)] = (whole[..., kept], column.reshape(total, *outputs)[kept])
    return pairs


def _kept_ranks(columns: Sequence[np.ndarray], rank: int) -> list[np.ndarray]:
    """The indices of the ranks that each part of a module keeps, without those in which the part's B is zero.

    Where the parts have equal ranks, one after the other, they keep all of their own, even if some are zero.
    """
    count, total = len(columns), len(columns[0])
    indices = np.arange(total)
    used = np.stack([column.reshape(total, -1).any(1) for column in columns])
    own = indices // rank == np.arange(count)[:, None]
    if total == rank * count and not (used & ~own).any():
        return [indices[row] for row in own]
    return [indices[row] for row in used] if count > 1 and used.any() else [indices] * count


def _assembled(
    pairs: Mapping[tuple[int, str], Mapping[int | None, Pair]], settings: Settings, decoder: Decoder
) -> tuple[Adapter, Lora]:
    """The adapter made of the factors of single layers: (run, matrix) → index of the layer in its run → factors."""
    rank = max((a.shape[-1] for layers in pairs.values() for a, _ in layers.values()), default=settings.rank)
    adapter: Adapter = [{} for _ in decoder.runs]
    for (run, name), layers in pairs.items():
        a, b = next(iter(layers.values()))
        count = depth(decoder.runs[run])
        stacked_a = np.zeros((count, *a.shape[:-1], rank), np.float32)
        stacked_b = np.zeros((count, rank, *b.shape[1:]), np.float32)
        for layer, (a, b) in layers.items():
            stacked_a[layer, ..., : a.shape[-1]], stacked_b[layer, : len(b)] = a, b
        adapter[run][name] = Factors(jnp.asarray(stacked_a), jnp.asarray(stacked_b))
    targets = tuple(name for name in axis_table.matrices() if any(name in run for run in adapter))
    return adapter, Lora(rank, settings.alpha_at(rank), settings.dropout, targets)
