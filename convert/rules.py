"""The engine of the conversion: applies the rule tables to a decoder, in both directions.

Reading checks the name, shape and type of every tensor, and raises an `InputError` for the first that is unexpected.
"""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding

from convert import found, memory
from convert.families import TABLES, FamilyTable, Part, Rule
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import depth, run_letters
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import named_arrays, outer_letters

# The field of a rule's name that stands for the number of an expert.
EXPERT = "{expert}"

# What wrappers of PyTorch modules add to the names of tensors: torch.compile, FSDP and activation checkpointing
# anywhere; DataParallel, DeepSpeed, PEFT and Lightning before every name.
_WRAPPED_ANYWHERE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_WRAPPERS = ("module.", "_forward_module.", "base_model.model.", "model.")


@runtime_checkable
class TensorSource(Protocol):
    """Stored tensors that are read by name, one at a time.

    Attributes:
      where: folder of the tensors, for messages.
    """

    where: str

    def names(self) -> Iterable[str]:
        """Names of all stored tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def read(self, name: str, allocate: memory.Allocate) -> np.ndarray:
        """One tensor, in the array that `allocate` returns for its shape and type."""
        ...


@dataclass(frozen=True)
class Binding:
    """A rule applied to a decoder: one stored tensor, and the decoder arrays that it holds for one layer.

    Attributes:
      rule: the rule.
      name: name of the stored tensor.
      paths: paths of the arrays in the decoder, one per part of the rule.
      index: index of the layer in its run, None for arrays outside the layers.
      sizes: axis letter → size.
      layer: index of the layer in the model, None for arrays outside the layers.
      expert: index of the expert that the tensor belongs to, None for a tensor of no single expert.
    """

    rule: Rule
    name: str
    paths: tuple[str, ...]
    index: int | None
    sizes: dict[str, int]
    layer: int | None = None
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...] | None:
        """The place in the arrays of the decoder: layer of the run, then expert; None for a whole array."""
        if self.index is None:
            return None
        return (self.index,) if self.expert is None else (self.index, self.expert)

    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor: a word is the product of its letters' sizes.

        Parts are concatenated on axis 0, or, where they alternate, on the last axis.
        """
        shapes = [self._part_shape(part) for part in self.rule.parts]
        if self.rule.alternating:
            return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def same_order(self) -> bool:
        """Whether the decoder array has the elements of the stored tensor in the same order."""
        first, *others = self.rule.parts
        return not others and _decoder_letters(first) == axis_table.letters(first.axes)

    def to_flax(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parts of a stored tensor in the decoder's layout, as views unless the rule is interleaved."""
        shapes, count = [self._part_shape(part) for part in self.rule.parts], len(self.rule.parts)
        if self.rule.alternating:
            pieces = [tensor[..., start::count] for start in range(count)]
            return [self._decoder_layout(piece, part) for piece, part in zip(pieces, self.rule.parts, strict=True)]
        heads = self._heads()
        split = tensor.reshape(heads, len(tensor) // heads, *tensor.shape[1:])
        ends = np.cumsum([shape[0] // heads for shape in shapes])[:-1]
        pieces = np.split(split, ends, axis=1) if len(shapes) > 1 else [split]
        return [self._decoder_layout(piece, part) for piece, part in zip(pieces, self.rule.parts, strict=True)]

    def to_torch(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The stored tensor made of decoder arrays. It is C-contiguous; safetensors writes other arrays wrongly."""
        if self.same_order():
            return np.ascontiguousarray(arrays[0].reshape(self.stored_shape()))
        stored = memory.aligned_empty(self.stored_shape(), arrays[0].dtype)
        for target, array in zip(self.to_flax(stored), arrays, strict=True):
            memory.copy_layout(target, array)
        return stored

    def _part_shape(self, part: Part) -> tuple[int, ...]:
        return tuple(int(np.prod([self.sizes[letter] for letter in word])) for word in part.axes.split())

    def _heads(self) -> int:
        """Number of repetitions of the sequence of parts: the head count, if any, when interleaved, else 1."""
        return max(self.sizes[self.rule.parts[0].axes[0]], 1) if self.rule.interleaved else 1

    def _decoder_layout(self, piece: np.ndarray, part: Part) -> np.ndarray:
        stored = axis_table.letters(part.axes)
        split = piece.reshape([self.sizes[letter] for letter in stored])
        return split.transpose([stored.index(letter) for letter in _decoder_letters(part)])


def _decoder_letters(part: Part) -> str:
    """Axis letters of a decoder array, without the leading L, and without X for the part of one expert."""
    letters = axis_table.letters((axis_table.BLOCK_AXES | axis_table.OUTER_AXES)[part.path])
    return "".join(letter for letter in letters if letter in part.axes)


def table_of(decoder: Decoder) -> FamilyTable:
    """The rule table of a decoder's family."""
    return TABLES[decoder.config.family]


def bindings(decoder: Decoder, table: FamilyTable | None = None) -> list[Binding]:
    """The bindings of all tensors of a decoder, in the order of the layers.

    Args:
      decoder: the decoder, which may be abstract.
      table: the rules; those of the decoder's family by default.
    """
    table = table or table_of(decoder)
    bound = list(_bind(table.outer, decoder, "", "", None, outer_letters(decoder)))
    layer = 0
    for position, run in enumerate(decoder.runs):
        sizes = run_letters(run)
        for index in range(depth(run)):
            of_layer = _bind(table.block, decoder, table.layer.format(layer=layer), f"runs.{position}.", index, sizes)
            bound += [replace(binding, layer=layer) for binding in of_layer]
            layer += 1
    return bound


def _bind(
    rules: Iterable[Rule], decoder: Decoder, prefix: str, parent: str, index: int | None, sizes: dict[str, int]
) -> Iterator[Binding]:
    for rule in rules:
        if not all(decoder.config.has_array(part.path) for part in rule.parts) or not _in_layer(rule, decoder, sizes):
            continue
        paths = tuple(parent + part.path for part in rule.parts)
        if EXPERT not in rule.name:
            yield Binding(rule, prefix + rule.name, paths, index, sizes)
            continue
        for expert in range(sizes["X"]):
            yield Binding(rule, prefix + rule.name.replace(EXPERT, str(expert)), paths, index, sizes, expert=expert)


def _in_layer(rule: Rule, decoder: Decoder, sizes: Mapping[str, int]) -> bool:
    """Whether a layer has the tensor of a rule, which may be one of dense layers or of those with experts."""
    return decoder.config.routing is None or rule.layers in ("all", "experts" if sizes.get("X") else "dense")


def fill(
    abstract: Decoder,
    source: TensorSource,
    dtype: np.dtype | None = None,
    places: Mapping[str, NamedSharding] | None = None,
    allocate: memory.Allocate = memory.aligned_empty,
    table: FamilyTable | None = None,
) -> Decoder:
    """Fill an abstract decoder with the tensors of a source.

    Every tensor is read once, and the tensors of a stacked array are read in sequence. The stacked array is assembled
    in host memory and then placed on its devices.

    Args:
      abstract: decoder whose leaves have shapes only.
      source: the stored tensors.
      dtype: type that the tensors are cast to; the stored type by default.
      places: path of an array → its sharding; one device by default.
      allocate: gives the host memory of the decoder's arrays. The CPU device aliases it where it is aligned.
      table: the rules of the stored tensors; those of the decoder's family by default.

    Raises:
      InputError: a tensor is unknown, missing or stored twice, has a wrong shape, holds NaN or infinite values, or
        differs in type from the same tensor of other layers.
    """
    table = table or table_of(abstract)
    bound = bindings(abstract, table)
    stored_names = match_names(bound, source, table)
    shapes = {path: leaf.shape for path, leaf in named_arrays(abstract)}
    bindings_of: dict[tuple[str, ...], list[Binding]] = {}
    for binding in bound:
        bindings_of.setdefault(binding.paths, []).append(binding)
    arrays: dict[str, jax.Array] = {}
    scratch = memory.Scratch()
    places = places or {}
    for paths, layers in bindings_of.items():
        array_shapes = [shapes[path] for path in paths]
        stacked = assembled(layers, stored_names, source, array_shapes, dtype, scratch, allocate)
        # `pop` frees each host array as soon as its device copy exists.
        arrays |= {path: sharding.place(stacked.pop(0), places.get(path)) for path in paths}
    arrays |= absent(shapes, arrays, places)
    decoder = fill_tree(abstract, arrays, places)
    check_tied_copy(decoder, stored_names.get(table.head), source)
    return decoder


def absent(
    shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, jax.Array], places: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """The arrays without elements that no tensor is stored for: experts of dense layers, channels of the others."""
    missing = [
        path for path, shape in shapes.items() if path not in arrays and 0 in shape and not axis_table.is_data(path)
    ]
    dtype = next(iter(arrays.values())).dtype
    return {path: sharding.place(np.zeros(shapes[path], dtype), places.get(path)) for path in missing}


def fill_tree(
    abstract: Decoder, arrays: Mapping[str, jax.Array], places: Mapping[str, NamedSharding] | None = None
) -> Decoder:
    """Replace the leaves of an abstract decoder by arrays.

    Args:
      abstract: decoder whose parameters have shapes only; the data of its layers (windows, slopes) are arrays already.
      arrays: path of a parameter → its array, already placed on its devices.
      places: path of an array → its sharding, here used for the data of the layers only.
    """
    data_places = places or {}

    def leaf(path: jax.tree_util.KeyPath, expected: Any) -> jax.Array:
        name = axis_table.array_path(path)
        return (
            sharding.place(jnp.asarray(expected), data_places.get(name)) if axis_table.is_data(name) else arrays[name]
        )

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def match_names(bound: list[Binding], source: TensorSource, table: FamilyTable) -> dict[str, str]:
    """Map name in the rule table → stored name, after a check of all names and shapes; reads no tensor."""
    _check_whole(source)
    stored: dict[str, str] = {}
    for name, plain in _unwrapped(source.names(), table).items():
        canonical = _canonical(plain, table)
        if canonical in stored:
            raise InputError(f"{source.where}: {name!r} and {stored[canonical]!r} are the same tensor; remove one")
        stored[canonical] = name
    expected = {binding.name: binding for binding in bound}
    missing = sorted(expected.keys() - stored.keys())
    if missing and len(missing) == len(expected) and stored:
        raise InputError(
            f"{source.where}: none of the model's tensors is there; expected names such as {missing[0]!r}, found "
            f"{min(stored.values())!r}; do the weights belong to the configuration?"
        )
    if missing:
        shape = expected[missing[0]].stored_shape()
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"{source.where}: tensor {missing[0]!r} of shape {shape} is missing{more}; is the download complete?"
        )
    for name in sorted(stored.keys() - expected.keys()):
        if name != table.head and not any(re.fullmatch(pattern, name) for pattern in table.ignored):
            shape = source.shape(stored[name])
            raise InputError(
                f"{source.where}: unknown tensor {stored[name]!r} of shape {shape}; "
                "the configuration has no place for it"
            )
    for name, binding in expected.items():
        shape = source.shape(stored[name])
        if shape != binding.stored_shape():
            raise InputError(
                f"{source.where}: tensor {stored[name]!r} has shape {shape}, "
                f"but the configuration expects {binding.stored_shape()}"
            )
    return stored


def _check_whole(source: TensorSource) -> None:
    """Check that the names are not those of quantised weights or of an adapter that is not merged.

    Raises:
      InputError: they are.
    """
    quantised = found.quantised_tensor(source.names())
    if quantised is not None:
        raise InputError(
            f"{source.where}: tensor {quantised[0]!r} belongs to quantised weights ({quantised[1]}); "
            f"{found.dequantising(quantised[1])}"
        )
    adapter = next((name for name in source.names() if ".lora_" in name or ".base_layer." in name), None)
    if adapter is not None:
        raise InputError(
            f"{source.where}: tensor {adapter!r} belongs to an adapter of PEFT that is not merged; "
            "call merge_and_unload and save the result"
        )


def _unwrapped(names: Iterable[str], table: FamilyTable) -> dict[str, str]:
    """Stored name → the name without what wrappers of PyTorch modules add, where they add it to every name."""
    plain = {name: _WRAPPED_ANYWHERE.sub("", name) for name in names}
    while (wrapper := next((one for one in _WRAPPERS if _wraps(one, plain.values(), table)), None)) is not None:
        plain = {name: rest.removeprefix(wrapper) for name, rest in plain.items()}
    return plain


def _wraps(wrapper: str, names: Iterable[str], table: FamilyTable) -> bool:
    """Whether every name begins with a wrapper. `model.` also begins the names of some families."""
    rests = [name.removeprefix(wrapper) for name in names if name.startswith(wrapper)]
    inner = wrapper != "model." or any(rest.startswith(table.prefix) or rest == table.head for rest in rests)
    return bool(rests) and len(rests) == len(list(names)) and inner


def _canonical(name: str, table: FamilyTable) -> str:
    """The name in the rule table for a stored name: a checkpoint of the base model lacks the family's prefix."""
    if name in (table.head, table.head_alias):
        return table.head
    if name.startswith(table.prefix) or any(name == rule.name for rule in table.outer):
        return name
    return table.prefix + name


def assembled(
    layers: list[Binding],
    stored_names: Mapping[str, str],
    source: TensorSource,
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype | None,
    scratch: memory.Scratch,
    allocate: memory.Allocate,
) -> list[np.ndarray]:
    """The decoder arrays of one rule, filled from its tensors: one tensor, or one per layer of a run.

    The CPU device aliases these host buffers, so the weights exist once.
    """
    arrays: list[np.ndarray] = []
    for binding in layers:
        name = stored_names[binding.name]
        as_stored = dtype is None and binding.index is None and binding.same_order()
        tensor = source.read(name, allocate if as_stored else scratch.allocate)
        array_dtype = dtype or tensor.dtype
        arrays = arrays or ([tensor] if as_stored else [allocate(shape, array_dtype) for shape in shapes])
        if array_dtype != arrays[0].dtype:
            raise InputError(
                f"{source.where}: tensor {name!r} is {array_dtype}, the same tensor of other layers "
                f"{arrays[0].dtype}; load the model with one dtype (float32, bfloat16 or float16)"
            )
        for array, part in zip(arrays, binding.to_flax(tensor), strict=True):
            target = array if binding.place is None else array[binding.place]
            if not as_stored:
                memory.copy_layout(target, part)
            memory.check_finite(target, name, source.where, "" if dtype is None else f" as {dtype}")
    return [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]


def check_tied_copy(decoder: Decoder, name: str | None, source: TensorSource) -> None:
    """Check that a stored head of that name equals the embedding where the configuration ties them."""
    if name is None or not decoder.config.tie_embeddings:
        return
    head = source.read(name, memory.aligned_empty)
    embedding = decoder.embedding[...]
    if head.shape != embedding.shape or not all(
        np.array_equal(head[index].astype(embedding.dtype), part) for index, part in sharding.parts(embedding)
    ):
        raise InputError(
            f"{source.where}: {name!r} differs from the embedding, but the configuration ties them; "
            "set tie_word_embeddings to false if the head is separate"
        )


def tensors(
    decoder: Decoder, names: Container[str], table: FamilyTable | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the stored tensors with the given names as (name, tensor), one at a time, in the Hugging Face layout.

    A tensor may be a view of the decoder's memory, so callers must not change it. With several processes, every process
    must request the same tensors, since each process holds only a part of them. `table` is that of `bindings`.
    """
    arrays, read = dict(named_arrays(decoder)), None
    for binding in bindings(decoder, table):
        if binding.name not in names:
            continue
        place = binding.place
        if isinstance(decoder, StreamedDecoder) and place is not None:
            if binding.layer != read:
                read = binding.layer
                assert read is not None
                prefix = ".".join(binding.paths[0].split(".")[:2])
                arrays |= {f"{prefix}.{path}": array for path, array in named_arrays(decoder.read(read))}
            place = (0, *place[1:])
        yield binding.name, binding.to_torch([_on_host(arrays[path], place) for path in binding.paths])


def _on_host(array: jax.Array | np.ndarray, place: tuple[int, ...] | None) -> np.ndarray:
    """An array, or the part at `place` of a stacked array, in host memory; a view where a CPU holds it whole."""
    if place is None:
        return sharding.gather(array)
    if isinstance(array, np.ndarray):
        return array[place]
    in_host_memory = array.is_fully_addressable and {device.platform for device in array.devices()} == {"cpu"}
    return np.asarray(array)[place] if in_host_memory else sharding.gather(array[place])
