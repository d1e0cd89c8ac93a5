"""The engine that reads a family's table in both directions and fails on every surprise."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from convert.families import TABLES, FamilyTable, Rule
from minillm_jax import groups
from minillm_jax.decoder import Block, Decoder, depth, named_arrays
from minillm_jax.errors import InputError


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

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        ...


@dataclass(frozen=True)
class Binding:
    """A rule applied to a decoder: one stored tensor and the array (and layer of it) that it is."""

    rule: Rule
    name: str
    path: str
    index: int | None
    sizes: dict[str, int]

    def stored_shape(self) -> tuple[int, ...]:
        """The stored tensor's shape: the letters of a word multiply."""
        return tuple(int(np.prod([self.sizes[letter] for letter in word])) for word in self.rule.axes.split())

    def our_letters(self) -> str:
        """Axis letters of our array, without the leading L."""
        table = groups.BLOCK_AXES if self.index is not None else groups.OUTER_AXES
        return groups.letters(table[self.rule.path])

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """A stored tensor in our layout (a view)."""
        stored = groups.letters(self.rule.axes)
        split = tensor.reshape([self.sizes[letter] for letter in stored])
        return split.transpose([stored.index(letter) for letter in self.our_letters()])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Our array in the stored layout, C-contiguous: safetensors writes wrong data for anything else."""
        ours = self.our_letters()
        ordered = array.transpose([ours.index(letter) for letter in groups.letters(self.rule.axes)])
        return np.ascontiguousarray(ordered.reshape(self.stored_shape()))


def table_of(decoder: Decoder) -> FamilyTable:
    """The rule table of a decoder's family."""
    return TABLES[decoder.config.family]


def bindings(decoder: Decoder) -> list[Binding]:
    """Every tensor that a decoder is stored as, in the order of the layers. The decoder may be abstract."""
    table, config = table_of(decoder), decoder.config
    vocabulary, size = decoder.embedding.shape
    found = [
        Binding(rule, rule.name, rule.path, None, {"V": vocabulary, "D": size})
        for rule in table.outer
        if config.has_array(rule.path)
    ]
    layer = 0
    for position, run in enumerate(decoder.runs):
        sizes = _run_sizes(run)
        for index in range(depth(run)):
            for rule in table.block:
                if config.has_array(rule.path):
                    name = rule.name.format(layer=layer)
                    found.append(Binding(rule, name, f"runs.{position}.{rule.path}", index, sizes))
            layer += 1
    return found


def _run_sizes(run: Block) -> dict[str, int]:
    d, n, h = run.attention.q.kernel.shape[1:]
    return {"D": d, "N": n, "H": h, "K": run.attention.k.kernel.shape[2], "F": run.mlp.down.kernel.shape[1]}


def fill(abstract: Decoder, source: TensorSource, dtype: np.dtype | None = None) -> Decoder:
    """An abstract decoder filled with the tensors of a source, cast to `dtype` when one is given.

    One stacked array is assembled at a time, from one tensor at a time.

    Raises:
      InputError: a key is unknown, missing or there twice, a shape differs, a tensor is not finite or of another type
        than its fellows in the other layers.
    """
    bound = bindings(abstract)
    stored = _match_names(bound, source, table_of(abstract))
    by_path: dict[str, list[Binding]] = {}
    for binding in bound:
        by_path.setdefault(binding.path, []).append(binding)

    def leaf(path: jax.tree_util.KeyPath, expected: jax.ShapeDtypeStruct) -> jax.Array:
        pieces = by_path.pop(groups.array_path(path))
        return _assemble(pieces, stored, source, expected.shape, dtype)

    decoder = jax.tree_util.tree_map_with_path(leaf, abstract)
    _check_tied_copy(decoder, stored, source)
    return decoder


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
        if name != table.tied_copy and not any(re.fullmatch(pattern, name) for pattern in table.harmless):
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
    if name.startswith(table.prefix) or name == table.tied_copy:
        return name
    return table.prefix + name


def _assemble(
    pieces: list[Binding],
    stored: Mapping[str, str],
    source: TensorSource,
    shape: tuple[int, ...],
    dtype: np.dtype | None,
) -> jax.Array:
    """One array of the tree from its tensors: a single one, or one for each layer of a run."""
    whole: np.ndarray | None = None
    for piece in pieces:
        tensor = source.read(stored[piece.name])
        tensor = finite(tensor, dtype, stored[piece.name], source.where)
        if whole is None:
            whole = np.empty(shape, tensor.dtype)
        if tensor.dtype != whole.dtype:
            raise InputError(
                f"{source.where}: tensor {stored[piece.name]!r} is {tensor.dtype}, the same tensor of other layers "
                f"{whole.dtype}; load it with one dtype (float32, bfloat16, float16)"
            )
        whole[... if piece.index is None else piece.index] = piece.to_flax(tensor)
    return jax.device_put(whole)


def finite(array: np.ndarray, dtype: np.dtype | None, name: str, where: str) -> np.ndarray:
    """An array cast to `dtype` when one is given.

    Raises:
      InputError: it holds NaN or infinite values, in itself or in that type.
    """
    with np.errstate(over="ignore"):
        found = array if dtype is None else array.astype(dtype)
    if not np.isfinite(found).all():
        kind = "" if found is array else f" as {found.dtype}"
        raise InputError(f"{where}: tensor {name!r} holds NaN or infinite values{kind}")
    return found


def _check_tied_copy(decoder: Decoder, stored: Mapping[str, str], source: TensorSource) -> None:
    name = stored.get(table_of(decoder).tied_copy)
    if name is None or not decoder.config.tie_embeddings:
        return
    copy = source.read(name)
    ours = np.asarray(decoder.embedding[...])
    if copy.shape != ours.shape or not np.array_equal(copy.astype(ours.dtype), ours):
        raise InputError(f"{source.where}: {name!r} differs from the embedding, but the configuration ties them")


def tensors(decoder: Decoder, wanted: Container[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The stored tensors of a decoder whose names are wanted, one at a time, in the Hugging Face layout."""
    arrays = dict(named_arrays(decoder))
    for binding in bindings(decoder):
        if binding.name in wanted:
            array = arrays[binding.path]
            piece = array if binding.index is None else array[binding.index]
            yield binding.name, binding.to_torch(np.asarray(piece))
