"""Recovery in closed form: one more least-squares walk, from the pruned model to the stream of its teacher.

Pruning has refitted the kept rows of every output projection to the calibration windows. This walk refits whole models:
it visits the sublayers of a pruned model in order, with the residual streams of the pruned model and of the dense model
on other text, and solves the systems of `pruning.refit` with all rows kept. Experts take the sweeps of
`pruning.expert_refit`. It needs no step, no learning rate and no gradient.
"""

from collections.abc import Callable

import numpy as np

from minillm_jax.data.batches import Batches
from minillm_jax.devices.sharding import mesh_of, shard
from minillm_jax.errors import InputError
from minillm_jax.model.build import with_runs
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_count, hidden_size, layer_count
from minillm_jax.pruning import expert_refit, slicing
from minillm_jax.pruning.expert_refit import Streams
from minillm_jax.pruning.refit import any_input_refit, fit_at, held_out_windows, resolve, with_projection
from minillm_jax.pruning.solver import Solver
from minillm_jax.pruning.walk import PROJECTIONS, Collected, InputMoments, Site, walk
from minillm_jax.settings import Refit


def refit_towards(
    decoder: Decoder,
    teacher: Decoder,
    batches: Batches,
    refit: Refit | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """A pruned model whose matrices are refitted to the residual stream of its teacher.

    Args:
      decoder: the pruned model.
      teacher: the dense model, with as many layers and the same hidden size.
      batches: windows of text.
      refit: α, β, ridge and solver.
      progress: called with the number of sublayers done, and of all.

    Raises:
      InputError: the models do not have the same layers or hidden size; a setting is out of its range; or the
        activations are not finite.
    """
    check_pair(decoder, teacher)
    settings = resolve(refit or Refit(), decoder.config)
    solver = Solver(settings.solver)
    refit_any = any_input_refit(settings, batches, solver)

    def refit_inputs(layer: int, kind: str, run: Block, moments: Callable[[], Collected[InputMoments]]) -> Block:
        return refit_any(layer, kind, run, moments) if group_count(run, kind) else run

    layers: list[Block] = []
    walk(
        teacher,
        batches,
        lambda site: refitted_site(site, settings, solver, decoder.config),
        progress,
        refit_inputs if settings.inputs else None,
        held_out_windows(settings, batches),
        decoder,
        lambda index, of_teacher, layer: layers.append(layer),
    )
    return shard(with_runs(decoder, slicing.merge(layers)), mesh_of(decoder))


def refitted_site(site: Site, settings: Refit, solver: Solver, config: DecoderConfig) -> Block:
    """The layer of a site with refitted output projections: that of its groups, then those of its experts."""
    layer = refitted_groups(site, settings, solver)
    if site.kind != "channel" or not group_count(layer, "expert"):
        return layer
    before, dense = (list(states) for states in site.states)
    streams = Streams(before, dense, site.held_batches, site.mesh)
    return expert_refit.refit_towards(site.layer, site.dense, layer, streams, settings, config)


def refitted_groups(site: Site, settings: Refit, solver: Solver) -> Block:
    """The layer of a site with a refitted output projection; all its groups are kept."""
    count = group_count(site.run, site.kind)
    if not count:
        return site.run
    found = fit_at(site, site.kind, settings, solver).refit(np.ones(count, bool))
    return with_projection(site.run, PROJECTIONS[site.kind], found.kernel, found.shift, site.mesh)


def check_pair(decoder: Decoder, teacher: Decoder) -> None:
    """Check that every layer of a pruned model has one of its teacher.

    Raises:
      InputError: it has not.
    """
    shapes = [(layer_count(one), hidden_size(one)) for one in (decoder, teacher)]
    for what, found, expected in zip(("layers", "hidden dimensions"), *shapes, strict=True):
        if found != expected:
            raise InputError(
                f"--method refit fits every layer to that of the teacher: the pruned model has {found} {what}, the "
                f"teacher {expected}; use --method lora or full"
            )
