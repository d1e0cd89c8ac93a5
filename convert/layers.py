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
from minillm_jax.model.modules import Block
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
    outer = assemble(abstract.config, layers.arrays(None), abstract.runs)
    rules.check_tied_copy(outer, layers.stored_names.get(table.head), source)
    types = {path: leaf.dtype for path, leaf in named_arrays(layers.read(0))}
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
        first = self.bound[index][0]
        parent = first.paths[0].removesuffix(first.rule.parts[0].path)
        arrays = self.arrays(index)
        for name, dtype in (types or {}).items():
            found = arrays.get(f"{parent}{name}")
            if found is not None and found.dtype != dtype:
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

    def arrays(self, layer: int | None) -> dict[str, jax.Array]:
        """The arrays by their paths; those of a layer with a leading axis L of one."""
        arrays: dict[str, jax.Array] = {}
        for binding in self.bound[layer]:
            shapes = [self.shapes[path].shape for path in binding.paths]
            if binding.index is not None:
                binding, shapes = replace(binding, index=0), [(1, *shape[1:]) for shape in shapes]
            parts = rules.assembled(
                [binding], self.stored_names, self.source, shapes, self.dtype, self.scratch, memory.aligned_empty
            )
            for path, part in zip(binding.paths, parts, strict=True):
                arrays[path] = sharding.place(part, self.places.get(path))
        return arrays
