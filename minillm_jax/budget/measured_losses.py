"""What pruning one kind of groups of one layer costs, measured: the loss by forward passes, level by level.

The rest of the model stays dense. A trial needs no smaller model: rows of zeros in the output projection remove their
groups just as slicing does, and its other rows are refitted as they would be; so all trials of a kind are one compiled
program, and only one projection is made anew for each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.evaluation.perplexity import window_losses
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import token_losses
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_count, layer_count
from minillm_jax.pruning.refit import Refit, fit_of, pruned_kind, removal_order
from minillm_jax.pruning.walk import PROJECTIONS, Site, projection, walk


def level_losses(
    decoder: Decoder,
    batches: Batches,
    levels: Mapping[str, Sequence[Sequence[int]]],
    stays: Callable[[str, int, int], Int[np.ndarray, " kept"]] | None,
    refit: Refit,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[list[float]]]:
    """The change of the mean loss when only that many groups of one kind of one layer stay, nats.

    Takes one forward pass over the windows for each level but the first, and a walk over the layers.

    Args:
      decoder: the dense model.
      batches: calibration windows.
      levels: kind -> for each layer, the counts to try, most to least; the first is that of the dense model.
      stays: the groups of a kind and layer that stay when there are so many; None to choose them by structured OBS.
      refit: as they will be refitted.
      progress: called with the number of losses measured, and of all.

    Raises:
      InputError: see `slice_and_refit`.
    """
    settings = refit.resolve(decoder.config)
    predictions = batches.predictions
    dense = float(window_losses(decoder, batches).sum(dtype=np.float64))
    total = sum(len(counts) - 1 for rows in levels.values() for counts in rows)
    found: dict[str, list[list[float]]] = {kind: [] for kind in levels}
    done = 0

    def look(site: Site) -> Block:
        nonlocal done
        kind = pruned_kind(site.kind, levels)
        if kind is None:
            return site.run
        changes = [0.0]
        for kernel, bias in _trials(site, kind, levels[kind][site.layer][1:], stays, settings):
            place, name = jnp.int32(site.layer), PROJECTIONS[site.kind]
            trial = partial(_losses, place=place, kernel=kernel, shift=bias, name=name)
            loss = window_losses(decoder, batches, trial).sum(dtype=np.float64)
            changes.append(float(loss - dense) / predictions)
            done += 1
            if progress is not None:
                progress(done, total)
        found[kind].append(changes)
        return site.run

    walk(decoder, batches, look)
    assert all(len(rows) == layer_count(decoder) for rows in found.values())
    return found


def _trials(
    site: Site,
    kind: str,
    counts: Sequence[int],
    stays: Callable[[str, int, int], Int[np.ndarray, " kept"]] | None,
    settings: Refit,
) -> Iterator[tuple[Float[Array, "..."], Float[Array, " D"]]]:
    """The projection at full width with zeros for what goes, and the shift of its bias, for each count."""
    if not counts:
        return
    fit, count = fit_of(site, settings), group_count(site.run, kind)
    order = removal_order(site, kind, min(counts), fit, settings.solver) if stays is None else None
    for keep in counts:
        if order is None:
            assert stays is not None, "without an order somebody says who stays"
            stay = stays(kind, site.layer, keep)
        else:
            stay = np.delete(np.arange(count), order[: count - keep])
        rows = np.arange(len(fit.kernel)).reshape(count, -1)[stay].ravel()
        kernel = np.zeros_like(fit.kernel)
        kernel[rows] = fit.refitted(rows, settings)
        shift = None if settings.method == "none" else fit.shift(rows, kernel[rows])
        shift = np.zeros(kernel.shape[1]) if shift is None else shift
        shape = projection(site.run, site.kind).kernel.shape[1:]
        yield jnp.asarray(kernel.reshape(shape), jnp.float32), jnp.asarray(shift, jnp.float32)


@partial(jax.jit, static_argnames="name")
def _losses(
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    place: Int[Array, ""],
    kernel: Float[Array, "..."],
    shift: Float[Array, " D"],
    *,
    name: str,
) -> Float[Array, " B"]:
    """Summed cross entropy of every sequence with another kernel, and a shift of the bias, in one layer."""
    angles = rotary_angles(decoder, tokens.shape[1])

    def step(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
        def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
            here = layer == place
            match axis_table.array_path(path).removeprefix(f"{name}."):
                case "kernel" if array.shape == kernel.shape:  # layers of other sizes are not the one
                    return jnp.where(here, kernel.astype(array.dtype), array)
                case "bias":
                    return array + jnp.where(here, shift, 0).astype(array.dtype)
            return array

        block = jax.tree_util.tree_map_with_path(leaf, block)
        return apply_layer(block, decoder.config, x, angles)[0], None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens))
    return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)
