"""The finished layers of a walk, and the walk's continuation after an interruption.

With a work folder, every finished layer is written there. A walk that begins again restores it: the layer at full
width, with zeros in the place of the removed groups (or as it was, where removed heads act on the others), moves the
pruned residual stream by the same program to the same bits as in the first walk. No Gram matrix is summed and no system
is solved for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Int

from minillm_jax.devices.sharding import gather, mesh_of, place, run_shardings, shard
from minillm_jax.devices.work_folder import Part, WorkFolder
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.digest import tree_digest
from minillm_jax.model.modules import Block
from minillm_jax.model.streamed import StreamedDecoder, resized
from minillm_jax.model.tree import layer_count, named_arrays, sizes_of
from minillm_jax.pruning import slicing

# Kind of group -> the indices of the kept groups of one layer.
KeptOfLayer = Mapping[str, Int[np.ndarray, " _"]]

# Begins the names of the kept indices among the arrays of a layer.
KEPT = "kept."

# Begins the names of arrays at full width, of layers in which removed heads act on the others: one norm of all heads.
WHOLE = "whole."


@dataclass
class FinishedLayers:
    """The sliced layers of a walk, in the order of the model.

    Attributes:
      decoder: the dense model.
      work: where finished layers are written; None to keep them in memory alone.
      layers: the finished layers, each a run of one layer; None for those of a streamed model, which the work folder
        holds.
      kept: kind of group -> the kept groups of each finished layer.
    """

    decoder: Decoder
    work: WorkFolder | None = None
    layers: list[Block | None] = field(default_factory=list)
    kept: dict[str, list[Int[np.ndarray, " _"]]] = field(default_factory=dict)

    def pruned(self) -> Decoder:
        """The decoder of the finished layers, which must be all."""
        decoder, layers = self.decoder, [layer for layer in self.layers if layer is not None]
        assert len(self.layers) == layer_count(decoder)
        if isinstance(decoder, StreamedDecoder) and not layers:
            return resized(decoder, slicing.slice_sizes(sizes_of(decoder), self.kept), self._read)
        return shard(with_runs(decoder, slicing.merge(layers)), mesh_of(decoder))

    def add(self, dense: Block, layer: Block, kept: KeptOfLayer) -> None:
        """Slices the next layer, and writes it to the work folder.

        Args:
          dense: the layer of the dense model; the same object as `layer` where nothing has changed.
          layer: the layer at full width.
          kept: its kept groups.
        """
        sliced = slicing.take_layer(kept, layer, mesh_of(self.decoder))
        if self.work is not None:
            arrays = {} if layer is dense else {path: gather(array) for path, array in named_arrays(sliced)}
            if arrays and self.decoder.config.joint_qk_norm:
                arrays |= {f"{WHOLE}{path}": gather(array) for path, array in named_arrays(layer)}
            indices = {f"{KEPT}{kind}": np.asarray(rows, np.int64) for kind, rows in kept.items()}
            self.work.write(_name(len(self.layers)), arrays | indices, {"dense": tree_digest(dense)})
        self._append(sliced, kept)

    def restore(self, dense: Block) -> Block | None:
        """The next layer at full width from the work folder; None if it is not finished.

        Args:
          dense: the layer of the dense model.

        Raises:
          InputError: the finished layer was made from another one.
        """
        part = None if self.work is None else self.work.read(_name(len(self.layers)))
        if part is None or self.work is None:
            return None
        if part.note["dense"] != tree_digest(dense):
            raise InputError(
                f"{self.work.folder}: layer {len(self.layers)} was pruned from other weights than those of the model; "
                "remove the folder to begin anew, or choose another output"
            )
        arrays, whole, kept = _split(part)
        self._append(self._placed(arrays, dense) if arrays else dense, kept)
        if whole:
            return self._placed(whole, dense)
        return slicing.put_layer(kept, arrays, dense) if arrays else dense

    def _read(self, index: int) -> Block:
        """A finished layer of a streamed model, from the work folder."""
        assert isinstance(self.decoder, StreamedDecoder)
        part = None if self.work is None else self.work.read(_name(index))
        assert part is not None, "the layer is finished"
        arrays, _, _ = _split(part)
        return self._placed(arrays, self.decoder.runs[0]) if arrays else self.decoder.read(index)

    def _append(self, sliced: Block, kept: KeptOfLayer) -> None:
        written = self.work is not None and isinstance(self.decoder, StreamedDecoder)
        self.layers.append(None if written else sliced)
        for kind, rows in kept.items():
            self.kept.setdefault(kind, []).append(rows)

    def _placed(self, arrays: Mapping[str, np.ndarray], dense: Block) -> Block:
        """A layer of these arrays in its shards."""
        run = jax.tree_util.tree_map_with_path(lambda path, _: arrays[axis_table.array_path(path)], dense)
        mesh = mesh_of(self.decoder)
        return jax.tree.map(jnp.asarray, run) if mesh is None else jax.tree.map(place, run, run_shardings(run, mesh))


def _name(index: int) -> str:
    return f"layer-{index:05}"


def _split(part: Part) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The arrays of a layer, none for one that has not changed; those at full width; and its kept groups by kind."""
    whole, kept = (
        {name.removeprefix(first): array for name, array in part.arrays.items() if name.startswith(first)}
        for first in (WHOLE, KEPT)
    )
    return {name: part.arrays[name] for name in part.arrays if not name.startswith((WHOLE, KEPT))}, whole, kept
