"""The library of the allocation `search`: every sublayer of a pruned model, refitted at several numbers of kept groups.

The walk of the library prunes the model to the starting counts, as the pruning itself does: structured OBS, the refit
of the output projections towards its target, and the refit of the inputs. At each projection it also refits the other
levels, to the same inputs. A model composed of these projections equals the really pruned one at the starting counts.
At others it is near: the sublayers after a changed one were refitted to slightly different inputs.

All projections have their full width, with rows of zeros for removed groups. The composed models therefore share one
compiled program. The kept rows of all levels lie in files of a folder: for a model of billions of parameters they take
more memory than the model itself.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from minillm_jax.budget.cheapest import Levels
from minillm_jax.budget.inventory import Counts
from minillm_jax.budget.measured_losses import projections
from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts, sharding
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder, finish, layers_from
from minillm_jax.model.loss import Top, token_divergences, top_tokens
from minillm_jax.model.modules import Block, depth
from minillm_jax.model.tree import group_count, named_arrays
from minillm_jax.pruning import slicing
from minillm_jax.pruning.refit import held_out_windows, input_refit, pruned_kind, resolve, with_projection
from minillm_jax.pruning.solver import Solver
from minillm_jax.pruning.walk import PROJECTIONS, Site, begin, projection, walk
from minillm_jax.settings import Refit

# Sublayer of a kind of groups: the names of `PROJECTIONS`.
_SUBLAYERS = {"head": "head", "query": "head", "channel": "channel"}


class Dense(NamedTuple):
    """Windows, with the most probable next tokens of the dense model for each of their batches."""

    batches: Batches
    top: list[Top]


def dense_on(decoder: Decoder, batches: Batches) -> Dense:
    """What a pruned model is compared with on these windows; takes one forward pass over them.

    Args:
      decoder: the dense model.
      batches: the windows.
    """
    return Dense(batches, [_top(decoder, begin(decoder, batch.tokens, mesh=batches.mesh).stream) for batch in batches])


class Library:
    """The output projections of all levels, in files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[tuple[str, int, int], np.ndarray] = {}
        self._biases: dict[tuple[str, int, int], np.ndarray | None] = {}

    def put(
        self, place: tuple[str, int, int], kernel: Shaped[np.ndarray, "I D"], bias: Shaped[np.ndarray, " D"] | None
    ) -> None:
        """Adds a projection.

        Args:
          place: kind, layer and number of kept groups.
          kernel: at full width, in the type of the model.
          bias: in the type of the model; None without one.
        """
        rows = np.flatnonzero(kernel.any(axis=1))
        np.save(self._path(place), _bits(kernel[rows]))
        self._rows[place], self._biases[place] = rows, bias

    def get(
        self, place: tuple[str, int, int], like: Array
    ) -> tuple[Shaped[np.ndarray, "I D"], Shaped[np.ndarray, " D"] | None]:
        """Kernel and bias of a projection.

        Args:
          place: kind, layer and number of kept groups.
          like: an array with the type of the model; its last axis is D, and those before it have I entries.
        """
        kernel = np.zeros((like.size // like.shape[-1], like.shape[-1]), like.dtype)
        kernel[self._rows[place]] = np.load(self._path(place)).view(like.dtype)
        return kernel, self._biases[place]

    def _path(self, place: tuple[str, int, int]) -> Path:
        return self._folder / f"{'-'.join(map(str, place))}.npy"


def _bits(array: np.ndarray) -> np.ndarray:
    """The array as unsigned integers: NumPy's files do not know bfloat16."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


class Composed:
    """A pruned model at full width, whose sublayers change their number of kept groups without a new refit.

    Memory: the model at full width, beside the dense one.
    """

    def __init__(self, decoder: Decoder, library: Library, counts: Counts, mesh: Mesh | None) -> None:
        """Takes over the arrays of the layers, which it changes in place.

        Args:
          decoder: the model pruned to `counts`, at full width.
          library: the projections of all levels.
          counts: kind -> for each layer, the number of kept groups.
          mesh: the devices of the model; None for one device.
        """
        self._outer, self._library, self._mesh = decoder, library, mesh
        self._runs = list(decoder.runs)
        self._counts = {kind: list(row) for kind, row in counts.items()}

    def at(self, counts: Mapping[str, Sequence[int]]) -> Decoder:
        """The model with these numbers of kept groups, valid until the next call.

        Args:
          counts: kind -> for each layer, one of its levels.
        """
        starts = list(accumulate((depth(run) for run in self._runs), initial=0))
        for kind, row in counts.items():
            for layer, (now, wanted) in enumerate(zip(self._counts[kind], row, strict=True)):
                if now != wanted:
                    number = next(n for n, start in enumerate(starts[1:]) if layer < start)
                    self._runs[number] = self._changed(number, kind, layer, layer - starts[number], wanted)
            self._counts[kind] = list(row)
        return with_runs(self._outer, self._runs)

    def _changed(self, number: int, kind: str, layer: int, index: int, count: int) -> Block:
        run, sublayer = self._runs[number], _SUBLAYERS[kind]
        places = {} if self._mesh is None else dict(named_arrays(sharding.run_shardings(run, self._mesh)))
        kernel, bias = self._library.get((kind, layer, count), projection(run, sublayer).kernel[0])
        new = {f"{PROJECTIONS[sublayer]}.kernel": kernel, f"{PROJECTIONS[sublayer]}.bias": bias}

        def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
            name = axis_table.array_path(path)
            value = new.get(name)
            if value is None:
                return array
            piece = sharding.place(value.reshape(1, *array.shape[1:]), places.get(name))
            return _with_layer(array, piece, jnp.int32(index))

        return jax.tree_util.tree_map_with_path(leaf, run)

    def divergence(self, counts: Mapping[str, Sequence[int]], dense: Dense) -> float:
        """The mean KL(dense ‖ pruned) with these numbers of kept groups, nats; infinite where it is not finite.

        Args:
          counts: kind -> for each layer, one of its levels.
          dense: the windows, and the dense model on them.
        """
        decoder, mesh = self.at(counts), dense.batches.mesh
        sums = [
            sharding.gather(_divergences(decoder, begin(decoder, batch.tokens, mesh=mesh).stream, batch.tokens, top))
            for batch, top in zip(dense.batches, dense.top, strict=True)
        ]
        total = float(np.concatenate(sums).sum(dtype=np.float64)) / dense.batches.predictions
        return total if np.isfinite(total) else np.inf


def composed(
    decoder: Decoder,
    batches: Batches,
    levels: Levels,
    start: Counts,
    refit: Refit,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Composed:
    """The model pruned to the starting counts, with all levels of its sublayers in a library.

    Takes one walk through the layers, as the pruning does.

    Args:
      decoder: the dense model.
      batches: calibration windows.
      levels: kind -> for each layer, numbers of kept groups, descending.
      start: kind -> for each layer, the starting number, one of its levels.
      refit: the refit of the pruned model.
      folder: an empty folder for the files of the library.
      progress: called with the number of sublayers done, and of all.

    Raises:
      InputError: see `refit.prune_by_obs`; or the folder has no room.
    """
    settings = resolve(refit, decoder.config)
    solver, library = Solver(settings.solver), Library(folder)
    hosts.decide(partial(_check_room, folder, library_bytes(decoder, levels)))

    def replace(site: Site) -> Block:
        kind = pruned_kind(site.kind, levels)
        if kind is None:
            return site.run
        return _add_levels(library, site, kind, levels[kind][site.layer], start[kind][site.layer], settings, solver)

    ranges = {kind: [range(count) for count in row] for kind, row in start.items()}  # only their lengths matter
    refit_inputs = input_refit(settings, ranges, batches, solver)
    layers: list[Block] = []

    def finish(_: int, __: Block, layer: Block) -> None:
        layers.append(layer)

    walk(decoder, batches, replace, progress, refit_inputs, held_out_windows(settings, batches), finish=finish)
    pruned = sharding.shard(with_runs(decoder, slicing.merge(layers)), batches.mesh)
    return Composed(pruned, library, start, batches.mesh)


def _add_levels(
    library: Library, site: Site, kind: str, counts: Sequence[int], start: int, settings: Refit, solver: Solver
) -> Block:
    """Puts all levels of a sublayer into the library, and returns the layer at the starting level, at full width."""
    linear, name, whole = projection(site.run, site.kind), PROJECTIONS[site.kind], group_count(site.run, kind)
    dtype, layer = linear.kernel.dtype, site.run
    old = None if linear.bias is None else sharding.gather(linear.bias[...])[0]
    fewer = [count for count in counts if count < whole]
    if len(fewer) < len(counts):  # a sublayer with all its groups is not refitted
        kernel = sharding.gather(linear.kernel[...])
        library.put((kind, site.layer, whole), kernel.reshape(-1, kernel.shape[-1]), old)
    found = projections(site, kind, fewer, min(counts), None, settings, solver)
    for count, (kernel, shift, _) in zip(fewer, found, strict=True):
        bias = old if old is None or shift is None else (old.astype(np.float64) + np.asarray(shift)).astype(dtype)
        library.put((kind, site.layer, count), np.asarray(kernel.astype(dtype)), bias)
        if count == start:
            layer = with_projection(site.run, name, kernel, shift, site.mesh)
    return layer


def library_bytes(decoder: Decoder, levels: Levels) -> int:
    """Bytes of the files of a library.

    Args:
      decoder: the dense model; only its shapes are read.
      levels: kind -> for each layer, numbers of kept groups.
    """
    total, layer = 0, 0
    for run in decoder.runs:
        for _ in range(depth(run)):
            for kind, rows in levels.items():
                kernel = projection(run, _SUBLAYERS[kind]).kernel
                total += sum(rows[layer]) * kernel[0].size * kernel.dtype.itemsize // group_count(run, kind)
            layer += 1
    return total


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the allocation search keeps {needed / 1e9:,.1f} GB of files while it runs, but {folder.parent} has "
            f"{free / 1e9:,.1f} GB left; set TMPDIR to a folder with more room, or use --budget curves"
        )


@partial(jax.jit, donate_argnums=0)
def _with_layer(
    stack: Shaped[Array, "L ..."], layer: Shaped[Array, "1 ..."], index: Int[Array, ""]
) -> Shaped[Array, "L ..."]:
    """An array of a run with another layer at an index; the memory of the array is used again."""
    return jax.lax.dynamic_update_slice_in_dim(stack, layer, index, 0)


@jax.jit
def _top(decoder: Decoder, x: Float[Array, "B T D"]) -> Top:
    """The most probable next tokens, from the residual stream before the first layer."""
    return top_tokens(decoder, finish(decoder, layers_from(decoder, x, jnp.int32(0), x.shape[1])))


@jax.jit
def _divergences(
    decoder: Decoder, x: Float[Array, "B T D"], tokens: Int[Array, "B T"], dense: Top
) -> Float[Array, " B"]:
    """The summed divergence of every sequence, from the residual stream before the first layer."""
    hidden = finish(decoder, layers_from(decoder, x, jnp.int32(0), x.shape[1]))
    return jnp.sum(token_divergences(decoder, hidden, tokens, dense)[1], axis=-1)
