"""Reading a model one layer at a time, by the rule tables of the conversion."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import NamedSharding

from convert import memory, rules
from convert.families import FamilyTable
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import assemble
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block, depth
from minillm_jax.model.streamed import StreamedDecoder, of_types
from minillm_jax.model.tree import named_arrays


def stream(
    abstract: Decoder,
    source: rules.TensorSource,
    dtype: np.dtype | None = None,
    places: Mapping[str, NamedSharding] | None = None,
    table: FamilyTable | None = None,
) -> StreamedDecoder:
    """A decoder whose layers are read from a source one at a time; the arguments and errors are those of `rules.fill`.

    The names and shapes of all tensors are checked at once. The values of a layer are checked whenever it is read.
    """
    table = table or rules.table_of(abstract)
    layers = _LayersOfSource(abstract, source, dtype, places or {}, table)
    arrays = {name: sharding.parked(array) for name, array in layers.arrays(None).items()}
    outer = assemble(abstract.config, arrays, abstract.runs)
    rules.check_tied_copy(outer, layers.stored_names.get(table.head), source)
    types = layers.types()
    return StreamedDecoder(outer, of_types(abstract.runs, types), partial(layers.read, types=types))


class _LayersOfSource:
    """Reads the arrays of one layer, or those outside the layers, from a source."""

    def __init__(
        self,
        abstract: Decoder,
        source: rules.TensorSource,
        dtype: np.dtype | None,
        places: Mapping[str, NamedSharding],
        table: FamilyTable,
    ):
        self.source, self.dtype, self.places = source, dtype, places
        self.runs, self.shapes = abstract.runs, dict(named_arrays(abstract))
        self.bound: dict[int | None, list[rules.Binding]] = {}
        bound = rules.bindings(abstract, table)
        self.stored_names = rules.match_names(bound, source, table)
        for binding in bound:
            self.bound.setdefault(binding.layer, []).append(binding)
        self.scratch = memory.Scratch()

    def read(self, index: int, types: Mapping[str, np.dtype] | None = None) -> Block:
        """A layer on its devices; `types` of its arrays, which are those of the first layer."""
        first, parent = self.bound[index][0], self._parent(index)
        arrays = self.arrays(index)
        for name, dtype in (types or {}).items():
            found = arrays.get(f"{parent}{name}")
            if found is not None and found.size and found.dtype != dtype:
                raise InputError(
                    f"{self.source.where}: {name} of layer {index} is {found.dtype}, that of the first layer {dtype}; "
                    "load the model with one dtype (float32, bfloat16 or float16)"
                )

        def leaf(path: jax.tree_util.KeyPath, expected: Any) -> jax.Array:
            name = f"{parent}{axis_table.array_path(path)}"
            if not axis_table.is_data(name):
                return arrays[name]
            assert first.index is not None
            return sharding.place(jnp.asarray(expected[first.index : first.index + 1]), self.places.get(name))

        return jax.tree_util.tree_map_with_path(leaf, self.runs[int(parent.split(".")[1])])

    def types(self) -> dict[str, np.dtype]:
        """The type of every array of a layer: that of the first layer which has elements of it."""
        empty: dict[str, np.dtype] = {}
        types: dict[str, np.dtype] = {}
        for number, first in enumerate(np.cumsum([0, *(depth(run) for run in self.runs[:-1])])):
            if number and not empty.keys() - types.keys():
                break
            for path, leaf in named_arrays(self.read(int(first))):
                (types if leaf.size else empty).setdefault(path, leaf.dtype)
        return empty | types

    def arrays(self, layer: int | None) -> dict[str, jax.Array]:
        """The arrays by their paths; those of a layer with a leading axis L of one."""
        bindings: dict[tuple[str, ...], list[rules.Binding]] = {}
        for binding in self.bound[layer]:
            bindings.setdefault(binding.paths, []).append(binding if layer is None else replace(binding, index=0))
        arrays: dict[str, jax.Array] = {}
        scratch = memory.Scratch() if layer is None else self.scratch  # that of a head would stay for the layers
        for paths, bound in bindings.items():
            shapes = [self._shape(path, layer) for path in paths]
            parts = rules.assembled(
                bound, self.stored_names, self.source, shapes, self.dtype, scratch, memory.aligned_empty
            )
            for path, part in zip(paths, parts, strict=True):
                arrays[path] = sharding.place(part, self.places.get(path))
        if layer is not None:
            parent = self._parent(layer)
            shapes = {path: self._shape(path, layer) for path in self.shapes if path.startswith(parent)}
            arrays |= rules.absent(shapes, arrays, self.places)
        return arrays

    def _shape(self, path: str, layer: int | None) -> tuple[int, ...]:
        """The shape of an array, with one layer instead of those of the run."""
        shape = self.shapes[path].shape
        return shape if layer is None else (1, *shape[1:])

    def _parent(self, layer: int) -> str:
        """What the paths of a layer's arrays begin with: `runs.0.`."""
        first = self.bound[layer][0]
        return first.paths[0].removesuffix(first.rule.parts[0].path)
