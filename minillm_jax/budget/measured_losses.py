"""Measured losses: the loss of a model with one kind of groups of one layer pruned, at each level, by forward passes.

All other sublayers stay dense. A measurement needs no smaller model: zeros in the rows of the output projection remove
the groups just as slicing does, and the other rows are refitted as in pruning. All measurements of a kind therefore
share one compiled program, and each of them replaces one output projection only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import hosts, sharding
from minillm_jax.evaluation.perplexity import check_dense_loss, window_losses
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import token_losses
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_count, layer_count, part_count
from minillm_jax.pruning.refit import gathered, pruned_kind, refitted, removal_order, resolve, system_at
from minillm_jax.pruning.system import Solver
from minillm_jax.pruning.walk import PROJECTIONS, Site, projection, walk
from minillm_jax.settings import Refit

# Kind of group, layer index, number of kept groups -> indices of the kept groups, ascending.
Choose = Callable[[str, int, int], Int[np.ndarray, " kept"]]


class Measured(NamedTuple):
    """What the levels of all sublayers cost.

    Attributes:
      losses: the change of the mean loss at every level, nats: kind -> for each layer, one number for each level;
        infinite at a level where the loss of the pruned model is not finite.
      errors: with groups chosen by structured OBS, the sums of the errors of its removals: kind -> for each layer, one
        number for each number of removed groups, from none to as many as were asked for. None with other choices.
    """

    losses: dict[str, list[list[float]]]
    errors: dict[str, list[Float[np.ndarray, " _"]]] | None


def level_losses(
    decoder: Decoder,
    batches: Batches,
    levels: Mapping[str, Sequence[Sequence[int]]],
    choose: Choose | None,
    refit: Refit,
    progress: Callable[[int, int], None] | None = None,
    fewest: Mapping[str, Sequence[int]] | None = None,
) -> Measured:
    """The change of the mean loss at every level.

    Takes one walk through the layers, and one forward pass over the windows for each level but the first.

    Args:
      decoder: the dense model.
      batches: calibration windows.
      levels: kind -> for each layer, numbers of kept groups, descending; the first is that of the dense model.
      choose: the kept groups of a kind and layer; None for groups chosen by structured OBS.
      refit: the refit of the kept rows.
      progress: called with the number of losses measured, and of all.
      fewest: kind -> for each layer, the number of kept groups that the errors reach; the last level by default.

    Raises:
      InputError: see `slice_and_refit`; or the loss of the dense model is not finite.
    """
    settings = resolve(refit, decoder.config)
    solver = Solver(settings.solver)
    dense = float(window_losses(decoder, batches).sum(dtype=np.float64))
    check_dense_loss(dense, "no loss can be compared with it")
    total = sum(len(counts) - 1 for rows in levels.values() for counts in rows)
    losses: dict[str, list[list[float]]] = {kind: [] for kind in levels}
    errors: dict[str, list[np.ndarray]] = {kind: [] for kind in levels}
    done = 0

    def measure(site: Site) -> Block:
        nonlocal done
        kind = pruned_kind(site.kind, levels)
        if kind is None:
            return site.run
        counts, changes, of_site = levels[kind][site.layer], [0.0], np.zeros(1)
        least = min(counts) if fewest is None else fewest[kind][site.layer]
        for found in _projections(site, kind, counts[1:], least, choose, settings, solver):
            layer, name, of_site = jnp.int32(site.layer), PROJECTIONS[site.kind], found.pop("errors")
            placed = {part: sharding.replicated(array, site.mesh) for part, array in found.items()}
            program = partial(_losses, replaced=layer, name=name, **placed)
            loss = window_losses(decoder, batches, program).sum(dtype=np.float64)
            changes.append(float(loss - dense) / batches.predictions if np.isfinite(loss) else np.inf)
            done += 1
            if progress is not None:
                progress(done, total)
        losses[kind].append(changes)
        errors[kind].append(of_site)
        return site.run

    walk(decoder, batches, measure)
    assert all(len(rows) == layer_count(decoder) for rows in losses.values())
    return Measured(losses, errors if choose is None else None)


def _projections(
    site: Site, kind: str, counts: Sequence[int], fewest: int, choose: Choose | None, settings: Refit, solver: Solver
) -> Iterator[dict[str, np.ndarray]]:
    """For each count, the refitted kernel at full width, with rows of zeros, and the change of the bias.

    With groups chosen by structured OBS, also the sums of the errors of its removals.
    """
    if not counts:
        return
    values, count, parts = gathered(site), group_count(site.run, kind), part_count(site.run, kind)
    shape = projection(site.run, site.kind).kernel.shape[1:]
    system, order = None, None

    def at_full_width(keep: int) -> dict[str, np.ndarray]:
        nonlocal system, order
        system = system or system_at(site, settings, values)
        if choose is None and order is None:
            order = solver.run(system, lambda s, name: removal_order(s, count, fewest, parts, name))
        if choose is not None:
            kept = choose(kind, site.layer, keep)
        else:
            assert order is not None
            kept = np.delete(np.arange(count), order.groups[: count - keep])
        kernel, shift = np.zeros_like(system.kernel), np.zeros(system.kernel.shape[1])
        rows = np.arange(len(kernel)).reshape(count, -1)[kept].ravel()
        found = {"kernel": system.kernel[rows], "shift": shift} | refitted(system, kept, count, settings, solver)
        kernel[rows] = found["kernel"]
        errors = np.zeros(1) if order is None else np.cumsum([0.0, *order.errors])
        return {
            "kernel": kernel.reshape(shape).astype(np.float32),
            "shift": found["shift"].astype(np.float32),
            "errors": errors,
        }

    for keep in counts:
        yield hosts.of_first(partial(at_full_width, keep))


# The replaced layer is an argument of the compiled program, so that all layers share one compilation.
@partial(jax.jit, static_argnames="name")
def _losses(
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    replaced: Int[Array, ""],
    kernel: Float[Array, "..."],
    shift: Float[Array, " D"],
    *,
    name: str,
) -> Float[Array, " B"]:
    """Summed cross entropy of every sequence, with the output projection `name` of one layer replaced."""
    angles = rotary_angles(decoder, tokens.shape[1])

    def step(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
        def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
            here = layer == replaced
            match axis_table.array_path(path).removeprefix(f"{name}."):
                case "kernel" if array.shape == kernel.shape:  # a layer of another size is never the replaced one
                    return jnp.where(here, kernel.astype(array.dtype), array)
                case "bias":
                    return array + jnp.where(here, shift, 0).astype(array.dtype)
            return array

        block = jax.tree_util.tree_map_with_path(leaf, block)
        return apply_layer(block, decoder.config, x, angles)[0], None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens))
    return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)
