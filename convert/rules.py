"""The engine that reads a family's table in both directions and fails on every surprise."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding

from convert import memory
from convert.families import TABLES, FamilyTable, Part, Rule
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import depth
from minillm_jax.model.tree import named_arrays, outer_letters, run_letters


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    where: str

    def names(self) -> Iterable[str]:
        """Every stored name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def read(self, name: str, allocate: memory.Allocate) -> np.ndarray:
        """One tensor, in memory that `allocate` gives for its shape and type."""
        ...


@dataclass(frozen=True)
class Binding:
    """A rule applied to a decoder: one stored tensor, and the arrays (and the layer of them) that it holds.

    Attributes:
      rule: the rule.
      name: the stored name.
      paths: our arrays, by their paths in the decoder.
      index: the layer's place in its run, None outside the layers.
      sizes: the size of every axis letter.
    """

    rule: Rule
    name: str
    paths: tuple[str, ...]
    index: int | None
    sizes: dict[str, int]

    def stored_shape(self) -> tuple[int, ...]:
        """The stored tensor's shape: the letters of a word multiply, and parts lie below each other."""
        shapes = [self._part_shape(part) for part in self.rule.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def same_order(self) -> bool:
        """Whether our array has the numbers of the stored tensor in the same order."""
        first, *more = self.rule.parts
        return not more and _our_letters(first) == axis_table.letters(first.axes)

    def to_flax(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parts of a stored tensor in our layout (views where it is not interleaved)."""
        shapes = [self._part_shape(part) for part in self.rule.parts]
        heads = self._heads()
        split = tensor.reshape(heads, -1, *tensor.shape[1:])
        ends = np.cumsum([shape[0] // heads for shape in shapes])[:-1]
        pieces = np.split(split, ends, axis=1) if len(shapes) > 1 else [split]
        return [self._ours(piece, part) for piece, part in zip(pieces, self.rule.parts, strict=True)]

    def to_torch(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Our arrays in the stored layout, C-contiguous: safetensors writes wrong data for anything else."""
        if self.same_order():
            return np.ascontiguousarray(arrays[0].reshape(self.stored_shape()))
        stored = memory.aligned_empty(self.stored_shape(), arrays[0].dtype)
        for target, array in zip(self.to_flax(stored), arrays, strict=True):
            memory.copy_layout(target, array)
        return stored

    def _part_shape(self, part: Part) -> tuple[int, ...]:
        return tuple(int(np.prod([self.sizes[letter] for letter in word])) for word in part.axes.split())

    def _heads(self) -> int:
        """How many times the parts of an interleaved tensor follow each other."""
        return self.sizes[self.rule.parts[0].axes[0]] if self.rule.interleaved else 1

    def _ours(self, piece: np.ndarray, part: Part) -> np.ndarray:
        stored = axis_table.letters(part.axes)
        split = piece.reshape([self.sizes[letter] for letter in stored])
        return split.transpose([stored.index(letter) for letter in _our_letters(part)])


def _our_letters(part: Part) -> str:
    """Axis letters of our array, without the leading L."""
    return axis_table.letters((axis_table.BLOCK_AXES | axis_table.OUTER_AXES)[part.path])


def table_of(decoder: Decoder) -> FamilyTable:
    """The rule table of a decoder's family."""
    return TABLES[decoder.config.family]


def bindings(decoder: Decoder) -> list[Binding]:
    """Every tensor that a decoder is stored as, in the order of the layers. The decoder may be abstract."""
    table = table_of(decoder)
    found = list(_bind(table.outer, decoder, "", "", None, outer_letters(decoder)))
    layer = 0
    for position, run in enumerate(decoder.runs):
        sizes = run_letters(run)
        for index in range(depth(run)):
            found += _bind(table.block, decoder, table.layer.format(layer=layer), f"runs.{position}.", index, sizes)
            layer += 1
    return found


def _bind(
    rules: Iterable[Rule], decoder: Decoder, prefix: str, parent: str, index: int | None, sizes: dict[str, int]
) -> Iterator[Binding]:
    for rule in rules:
        if all(decoder.config.has_array(part.path) for part in rule.parts):
            paths = tuple(parent + part.path for part in rule.parts)
            yield Binding(rule, prefix + rule.name, paths, index, sizes)


def fill(
    abstract: Decoder,
    source: TensorSource,
    dtype: np.dtype | None = None,
    places: Mapping[str, NamedSharding] | None = None,
) -> Decoder:
    """An abstract decoder filled with the tensors of a source, cast to `dtype` when one is given.

    Every tensor is read once; those that go into the same stacked arrays are read one after the other. A stacked array
    is put together in the host's memory, and goes from there into the shards that `places` says, by its path.

    Raises:
      InputError: a key is unknown, missing or there twice, a shape differs, a tensor is not finite or of another type
        than its fellows in the other layers.
    """
    bound = bindings(abstract)
    stored = _match_names(bound, source, table_of(abstract))
    shapes = {path: leaf.shape for path, leaf in named_arrays(abstract)}
    together: dict[tuple[str, ...], list[Binding]] = {}
    for binding in bound:
        together.setdefault(binding.paths, []).append(binding)
    arrays: dict[str, jax.Array] = {}
    scratch = memory.Scratch()
    places = places or {}
    for paths, pieces in together.items():
        whole = _assemble(pieces, stored, source, [shapes[path] for path in paths], dtype, scratch)
        arrays |= {
            path: sharding.place(whole.pop(0), places.get(path)) for path in paths
        }  # one copy goes as another comes
    decoder = fill_tree(abstract, arrays, places)
    _check_tied_copy(decoder, stored, source)
    return decoder


def fill_tree(
    abstract: Decoder, arrays: Mapping[str, jax.Array], places: Mapping[str, NamedSharding] | None = None
) -> Decoder:
    """An abstract decoder with its arrays by path; the data of its layers it has already, and they are placed here."""
    data_places = places or {}

    def leaf(path: jax.tree_util.KeyPath, expected: Any) -> jax.Array:
        name = axis_table.array_path(path)
        return (
            sharding.place(jnp.asarray(expected), data_places.get(name)) if axis_table.is_data(name) else arrays[name]
        )

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def _match_names(bound: list[Binding], source: TensorSource, table: FamilyTable) -> dict[str, str]:
    """Canonical name → stored name; every surprise in the names or shapes is an error here, before any reading."""
    stored: dict[str, str] = {}
    for name in source.names():
        canonical = _canonical(name, table)
        if canonical in stored:
            raise InputError(f"{source.where}: {name!r} and {stored[canonical]!r} are the same tensor; remove one")
        stored[canonical] = name
    expected = {binding.name: binding for binding in bound}
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        shape = expected[missing[0]].stored_shape()
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{source.where}: tensor {missing[0]!r} of shape {shape} is missing{more}; is it complete?")
    for name in sorted(stored.keys() - expected.keys()):
        if name != table.head and not any(re.fullmatch(pattern, name) for pattern in table.harmless):
            shape = source.shape(stored[name])
            raise InputError(
                f"{source.where}: unknown tensor {stored[name]!r} of shape {shape}; "
                "the configuration has no place for it"
            )
    for name, binding in expected.items():
        found = source.shape(stored[name])
        if found != binding.stored_shape():
            raise InputError(
                f"{source.where}: tensor {stored[name]!r} has shape {found}, "
                f"but the configuration expects {binding.stored_shape()}"
            )
    return stored


def _canonical(name: str, table: FamilyTable) -> str:
    """A stored name with the family's prefix, where a checkpoint of the bare decoder leaves it out."""
    if name in (table.head, table.head_elsewhere):
        return table.head
    if name.startswith(table.prefix):
        return name
    return table.prefix + name


def _assemble(
    pieces: list[Binding],
    stored: Mapping[str, str],
    source: TensorSource,
    shapes: Sequence[tuple[int, ...]],
    dtype: np.dtype | None,
    scratch: memory.Scratch,
) -> list[np.ndarray]:
    """Arrays of the tree that are stored together, from their tensors: a single one, or one for each layer of a run.

    On the CPU the device aliases the buffers that are filled here, so that the weights are there once.
    """
    whole: list[np.ndarray] = []
    for piece in pieces:
        name = stored[piece.name]
        as_stored = dtype is None and piece.index is None and piece.same_order()
        tensor = source.read(name, memory.aligned_empty if as_stored else scratch.allocate)
        found = dtype or tensor.dtype
        whole = whole or ([tensor] if as_stored else [memory.aligned_empty(shape, found) for shape in shapes])
        if found != whole[0].dtype:
            raise InputError(
                f"{source.where}: tensor {name!r} is {found}, the same tensor of other layers "
                f"{whole[0].dtype}; load it with one dtype (float32, bfloat16, float16)"
            )
        for array, part in zip(whole, piece.to_flax(tensor), strict=True):
            target = array if piece.index is None else array[piece.index]
            if not as_stored:
                memory.copy_layout(target, part)
            memory.check_finite(target, name, source.where, "" if dtype is None else f" as {dtype}")
    return [array.reshape(shape) for array, shape in zip(whole, shapes, strict=True)]


def _check_tied_copy(decoder: Decoder, stored: Mapping[str, str], source: TensorSource) -> None:
    name = stored.get(table_of(decoder).head)
    if name is None or not decoder.config.tie_embeddings:
        return
    copy = source.read(name, memory.aligned_empty)
    ours = decoder.embedding[...]
    if copy.shape != ours.shape or not all(
        np.array_equal(copy[index].astype(ours.dtype), part) for index, part in sharding.parts(ours)
    ):
        raise InputError(f"{source.where}: {name!r} differs from the embedding, but the configuration ties them")


def tensors(decoder: Decoder, wanted: Container[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The stored tensors of a decoder whose names are wanted, one at a time, in the Hugging Face layout.

    A tensor may be a view of the decoder's own memory, and is not to be changed. In several processes all of them have
    to ask for the same tensors, since each holds a part.
    """
    arrays = dict(named_arrays(decoder))
    for binding in bindings(decoder):
        if binding.name in wanted:
            yield binding.name, binding.to_torch([_on_host(arrays[path], binding.index) for path in binding.paths])


def _on_host(array: jax.Array, index: int | None) -> np.ndarray:
    """An array, or one layer of it; a view where the array is in the host's memory in one piece."""
    if index is None:
        return sharding.gather(array)
    if [device.platform for device in array.devices()] == ["cpu"]:
        return np.asarray(array)[index]
    return sharding.gather(array[index])
