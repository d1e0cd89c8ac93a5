"""Writing GGUF: the metadata of a model, then its tensors one at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert import (
    gguf_config,
    gguf_experts,
    gguf_file,
    gguf_metadata,
    gguf_read,
    gguf_tensors,
    gguf_tokenizer,
    rules,
)
from convert.families import FamilyTable
from convert.gguf_names import CHANGES, Arch
from minillm_jax.errors import one_of, warn
from minillm_jax.model.config import DecoderConfig, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import sizes_of

# Number of the type of most tensors (`general.file_type`).
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}

_DEFAULTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def check_type(gguf_type: str | None) -> None:
    """Check that a type of matrices is known; None is accepted.

    Raises:
      InputError: it is not.
    """
    if gguf_type is not None:
        one_of("type of a GGUF", gguf_type, gguf_tensors.WRITTEN)


def type_name(dtype: np.dtype, gguf_type: str | None) -> str:
    """The type of the matrices: the one asked for, else that of the weights; a name in GGUF."""
    check_type(gguf_type)
    return gguf_tensors.WRITTEN[gguf_type or _DEFAULTS[np.dtype(dtype).name]]


def check(config: DecoderConfig, folder: Path, vocabulary: int, unequal: bool = False) -> None:
    """Check what can be checked before the pruned shapes are known: the package, the family and the tokenizer.

    Args:
      config: the decoder's configuration.
      folder: the folder of the model.
      vocabulary: size V of the vocabulary.
      unequal: whether the layers may come to differ in size.

    Raises:
      InputError: `gguf` is not installed, or GGUF cannot hold the family or the tokenizer.
    """
    gguf_file.import_gguf("the format gguf")
    gguf_metadata.check_family(config, unequal)
    if not (folder / gguf_read.WEIGHTS).is_file():  # the tokenizer of a GGUF is copied
        gguf_tokenizer.check(folder, vocabulary)


def file_bytes(decoder: Decoder, gguf_type: str | None = None) -> int:
    """Bytes of the tensors of a decoder, which may be abstract."""
    wanted = type_name(decoder.embedding.dtype, gguf_type)
    return sum(gguf_tensors.size_of(shape, kind) for _, shape, kind, _ in _plan(decoder, wanted))


def write(model: Model, path: Path, gguf_type: str | None = None) -> None:
    """Write a model as one GGUF file.

    A tensor is made, encoded and written before the next one is made. With several processes, process 0 calls this,
    and the others call `take_part`.

    Args:
      model: the model.
      path: the new file.
      gguf_type: type of the matrices, a key of `gguf_tensors.WRITTEN`; that of the weights by default.

    Raises:
      InputError: GGUF cannot hold the model or its tokenizer, or a value is out of the range of the type.
      OSError: the file cannot be written.
    """
    gguf, decoder = gguf_file.import_gguf("the format gguf"), model.decoder
    sizes, wanted = sizes_of(decoder), type_name(decoder.embedding.dtype, gguf_type)
    arch = gguf_metadata.arch_for(decoder.config, sizes)
    _warn_of_losses(model, wanted, sizes)
    writer = gguf.GGUFWriter(path, arch.name)
    try:
        for key, value in _metadata(model, sizes, arch, wanted).items():
            _add(gguf, writer, key, value)
        for name, shape, kind, _ in _plan(decoder, wanted):
            writer.add_tensor_info(
                name, shape, np.dtype(np.float32), gguf_tensors.size_of(shape, kind), gguf.GGMLQuantizationType[kind]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in _tensors(decoder, wanted, sizes.H, path.name):
            writer.write_tensor_data(tensor)
    finally:
        writer.close()


def take_part(decoder: Decoder) -> None:
    """In the other processes: send the local parts of every tensor, in the order in which process 0 writes them."""
    for _ in _stored(decoder):
        pass


def _stored(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors before they are changed and encoded."""
    table = _table(decoder)
    yield from rules.tensors(decoder, {binding.name for binding in rules.bindings(decoder, table)}, table)


def _table(decoder: Decoder) -> FamilyTable | None:
    """The rules of a model with experts; None for those of the family's folders."""
    return None if decoder.config.routing is None else gguf_experts.table_of(decoder.config.family)


def _plan(decoder: Decoder, wanted: str) -> Iterator[tuple[str, tuple[int, ...], str, str | None]]:
    """GGUF name, shape, type and change of every tensor, in the order of the file."""
    sizes = sizes_of(decoder)
    arch = gguf_metadata.arch_for(decoder.config, sizes)
    if decoder.config.rope is not None and decoder.config.rope.kind == "llama3":
        shape = gguf_config.rope_factors(decoder.config.rope, sizes.H).shape
        yield gguf_config.ROPE_FACTORS, shape, "F32", None
    names = {name: (stored, change) for stored, (name, change) in arch.names(len(sizes.layers)).items()}
    for binding in rules.bindings(decoder, _table(decoder)):
        stored, change = names[binding.name]
        shape = binding.stored_shape()
        yield stored, shape, gguf_tensors.type_of(shape, wanted), change


def _tensors(decoder: Decoder, wanted: str, head_size: int, where: str) -> Iterator[np.ndarray]:
    """The encoded tensors in the order of `_plan`."""
    plan = _plan(decoder, wanted)
    if decoder.config.rope is not None and decoder.config.rope.kind == "llama3":
        next(plan)
        yield gguf_config.rope_factors(decoder.config.rope, head_size)
    for (stored, _, kind, change), (_, tensor) in zip(plan, _stored(decoder), strict=True):
        changed = tensor if change is None else CHANGES[change][0](tensor, head_size)
        yield gguf_tensors.encode(changed, kind, stored, where)


def _metadata(model: Model, sizes: Sizes, arch: Arch, wanted: str) -> dict[str, Any]:
    """All metadata but the architecture, which the writer adds itself."""
    config = gguf_metadata.to_gguf(model.decoder.config, sizes, model.raw_config, arch)
    carried = gguf_read.carried_metadata(model.folder)
    if carried is None:
        carried = gguf_tokenizer.metadata_of(model.folder, sizes.V, arch.name)
        if carried[gguf_tokenizer.KIND] == gguf_tokenizer.NO_TOKENIZER:
            carried = gguf_metadata.token_ids(model.raw_config) | carried
    general: dict[str, Any] = {
        "general.type": "model",
        "general.name": Path(model.name).name,
        "general.file_type": FILE_TYPES[wanted],
        "general.quantization_version": gguf_file.import_gguf("the format gguf").GGML_QUANT_VERSION,
    }
    return general | config | carried


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    """Add one key, in the type that llama.cpp expects of it."""
    kinds = gguf.GGUFValueType
    by_type = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    if isinstance(value, list):
        inner = type(value[0]) if value else str
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=kinds.INT32 if inner is int else by_type[inner])
    elif type(value) is int and not 0 <= value < 2**32:
        writer.add_key_value(key, value, kinds.INT64)
    else:
        writer.add_key_value(key, value, by_type[type(value)])


def _warn_of_losses(model: Model, wanted: str, sizes: Sizes) -> None:
    """Issues an `InputWarning` for what llama.cpp computes otherwise, and for matrices in another type."""
    decoder = model.decoder
    window = gguf_metadata.lost_window(decoder.config, sizes)
    if window is not None:
        warn(
            f"{model.name}: llama.cpp has no sliding window for {decoder.config.family}; tokens more than {window} "
            "apart see each other there"
        )
    other = [name for name, shape, kind, _ in _plan(decoder, wanted) if len(shape) > 1 and kind != wanted]
    if other:
        warn(
            f"{model.name}: {len(other)} matrices such as {other[0]} are F16, because Q8_0 has blocks of 32 values "
            "in a row; --round-width-to 32 keeps multiples of 32 channels"
        )
