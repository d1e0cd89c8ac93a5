"""Refit: new values for the kept rows of every output projection, by least squares.

The refit takes forward passes and one linear system for each output projection (attention.o, mlp.down). It follows the
walk through the layers. At each projection, the kept rows S are fitted to the target

    Y = (1 − α) · A W + α · gap

A is the input of the projection on the pruned residual stream, at full width. W is its dense kernel. `gap` is the
output that would bring the pruned residual stream back to the dense one (see `walk.Moments`). The kept rows are the
solution of a ridge regression to that target, whose ridge keeps them near their dense values:

    W'_S = (G_SS + λI)⁻¹ ((1 − α) G_S: W + α C_S + λ W_S)        G = Aᵀ A, C = Aᵀ gap, λ = ridge · mean diagonal of G

With α = 0 the target is the dense output of this projection. With α = 1 the target also corrects the error that earlier
pruned layers left in the residual stream. A projection with a bias is fitted on centred inputs and targets, and the
bias takes the difference of the means.

With several processes, process 0 chooses the groups and solves the systems. The others receive its results.
"""

from collections.abc import Callable, Container, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from minillm_jax.data.batches import Batches
from minillm_jax.devices.sharding import gather, place, run_shardings
from minillm_jax.devices.work_folder import WorkFolder
from minillm_jax.errors import InputError, one_of
from minillm_jax.model import axis_table
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_count, named_arrays, part_count
from minillm_jax.pruning.finished import FinishedLayers
from minillm_jax.pruning.refit_inputs import refit_sublayer_inputs
from minillm_jax.pruning.solver import Fit, Groups, Solver
from minillm_jax.pruning.system import HELD_OUT
from minillm_jax.pruning.walk import PROJECTIONS, Collected, InputMoments, RefitInputs, Site, projection, walk
from minillm_jax.settings import METHODS, SOLVER_CHOICES, Refit

# Default of α and β. Measured: better than 0 and 1 at a ratio of 50 %, equal to the better of both at 20 %.
HALF_WAY = 0.5


def resolve(settings: Refit, config: DecoderConfig) -> Refit:
    """The settings for a model, with α, β and the solver filled in.

    Raises:
      InputError: a name is unknown, a number out of its range, or the model lacks what the method needs.
    """
    one_of("refit", settings.method, METHODS)
    one_of("solver", settings.solver, SOLVER_CHOICES)
    if settings.method == "bias" and not can_compensate(config):
        raise InputError(
            f"refit by bias needs output projections with biases, which this {config.family} model does not have; use "
            "least-squares"
        )
    if settings.ridge is not None and not 0 < settings.ridge < np.inf:
        raise InputError(f"the refit's ridge must be a positive number, found {settings.ridge:g}")
    solver = _solver_of(settings.solver)
    return replace(settings, alpha=_alpha(settings, config), inputs=_inputs(settings), solver=solver)


def _solver_of(name: str) -> str:
    """`host` or `device`."""
    if name != "auto":
        return name
    return "host" if jax.default_backend() == "cpu" else "device"


def _alpha(settings: Refit, config: DecoderConfig) -> float:
    default = HALF_WAY if settings.method == "least-squares" and not config.post_norms else 0.0
    alpha = default if settings.alpha is None else settings.alpha
    if not 0 <= alpha <= 1 or (config.post_norms and alpha):
        allowed = "be 0 in a model with norms after its projections" if config.post_norms else "lie in [0, 1]"
        raise InputError(f"the refit's alpha must {allowed}, found {alpha:g}")
    return alpha


def _inputs(settings: Refit) -> float:
    least_squares = settings.method == "least-squares"
    default = HALF_WAY if least_squares else 0.0
    inputs = default if settings.inputs is None else settings.inputs
    if not 0 <= inputs <= 1 or (inputs and not least_squares):
        allowed = "lie in [0, 1]" if least_squares else "be 0 without least squares"
        raise InputError(f"--refit-inputs must {allowed}, found {inputs:g}")
    return inputs


def can_compensate(config: DecoderConfig) -> bool:
    """Whether both output projections have biases, to which the mean output of removed groups can be added."""
    return config.output_bias and config.mlp_bias


def slice_and_refit(
    decoder: Decoder,
    kept: axis_table.Kept,
    batches: Batches,
    refit: Refit | None = None,
    progress: Callable[[int, int], None] | None = None,
    work: WorkFolder | None = None,
) -> Decoder:
    """A decoder with only the kept groups of every layer, and with refitted output projections.

    A sublayer that keeps all its groups is not changed, bit for bit.

    Args:
      decoder: the dense model.
      kept: kind of group -> for each layer, the indices of the kept groups, ascending.
      batches: calibration windows.
      refit: the method and its settings.
      progress: called with the number of sublayers done, and of all.
      work: the folder of the finished layers, from which an interrupted walk continues.

    Raises:
      InputError: see `resolve`; or the activations are not finite, or the work folder cannot be used.
    """
    settings = resolve(refit or Refit(), decoder.config)
    solver, finished = Solver(settings.solver), FinishedLayers(decoder, work)

    def replace_layer(site: Site) -> Block:
        kind = pruned_kind(site.kind, kept)
        return site.run if kind is None else prune_site(site, kind, kept[kind][site.layer], settings, solver)

    def finish(index: int, dense: Block, layer: Block) -> None:
        finished.add(dense, layer, {kind: rows[index] for kind, rows in kept.items()})

    refit_inputs = input_refit(settings, kept, batches, solver)
    held_out = held_out_windows(settings, batches)
    hooks: dict[str, Any] = {"finish": finish, "restore": finished.restore}
    walk(decoder, batches, replace_layer, progress, refit_inputs, held_out, **hooks)
    return finished.pruned()


def prune_by_obs(
    decoder: Decoder,
    counts: Mapping[str, Sequence[int]],
    batches: Batches,
    refit: Refit | None = None,
    progress: Callable[[int, int], None] | None = None,
    work: WorkFolder | None = None,
) -> tuple[Decoder, dict[str, list[Int[np.ndarray, " _"]]]]:
    """A decoder as from `slice_and_refit`, with groups chosen by structured OBS during the walk.

    OBS measures the error towards the target of the refit, with its ridge. With α = 0 this is OBS in its original form,
    and the least-squares refit equals the update of OBS.

    Args:
      decoder: the dense model.
      counts: kind of group -> for each layer, the number of kept groups.
      batches: calibration windows.
      refit: the method and its settings.
      progress: called with the number of sublayers done, and of all.
      work: the folder of the finished layers, from which an interrupted walk continues.

    Returns:
      The pruned decoder, and kind of group -> for each layer, the indices of the kept groups, ascending.

    Raises:
      InputError: see `resolve`; or the activations are not finite, or the work folder cannot be used.
    """
    settings = resolve(refit or Refit(), decoder.config)
    solver, finished = Solver(settings.solver), FinishedLayers(decoder, work)
    kept: dict[str, np.ndarray] = {}  # of the present layer

    def replace_layer(site: Site) -> Block:
        kind = pruned_kind(site.kind, counts)
        if kind is None:
            return site.run
        kept[kind], layer = _choose_and_refit(site, kind, counts[kind][site.layer], settings, solver)
        return layer

    def finish(_: int, dense: Block, layer: Block) -> None:
        finished.add(dense, layer, dict(kept))

    kept_ranges = {kind: [range(count) for count in rows] for kind, rows in counts.items()}  # only their lengths matter
    refit_inputs = input_refit(settings, kept_ranges, batches, solver)
    held_out = held_out_windows(settings, batches)
    hooks: dict[str, Any] = {"finish": finish, "restore": finished.restore}
    walk(decoder, batches, replace_layer, progress, refit_inputs, held_out, **hooks)
    return finished.pruned(), {kind: finished.kept[kind] for kind in counts}  # files sort them by name


def input_refit(
    settings: Refit, kept: Mapping[str, Sequence[Sized]], batches: Batches, solver: Solver
) -> RefitInputs | None:
    """The input refit of the sublayers that lose groups; None where β is 0.

    Args:
      settings: from `resolve`.
      kept: kind of group -> for each layer, the kept groups, of which only the number matters.
      batches: calibration windows of the walk.
      solver: solves the systems.
    """
    if not settings.inputs:
        return None
    refit_any = any_input_refit(settings, batches, solver)

    def refit_inputs(layer: int, sublayer: str, run: Block, moments: Callable[[], Collected[InputMoments]]) -> Block:
        kind = pruned_kind(sublayer, kept)
        if kind is None or len(kept[kind][layer]) == group_count(run, kind):
            return run
        return refit_any(layer, sublayer, run, moments)

    return refit_inputs


def any_input_refit(settings: Refit, batches: Batches, solver: Solver) -> RefitInputs:
    """The input refit of all sublayers; the arguments are those of `input_refit`."""
    tokens = batches.tokens, held_out_windows(settings, batches) * batches.length

    def refit_inputs(layer: int, sublayer: str, run: Block, moments: Callable[[], Collected[InputMoments]]) -> Block:
        beta, ridge, where = settings.inputs or 0.0, settings.ridge, f" of layer {layer}"
        return refit_sublayer_inputs(sublayer, run, moments(), tokens, beta, ridge, solver, batches.mesh, where)

    return refit_inputs


def pruned_kind(sublayer: str, kinds: Container[str]) -> str | None:
    """The kind of groups that are removed from a sublayer; None for a sublayer that keeps all its groups.

    Args:
      sublayer: `head` for the attention sublayer, which holds groups of the kinds `head` and `query`; `channel` for the
        MLP sublayer.
      kinds: the pruned kinds.
    """
    candidates = ("head", "query") if sublayer == "head" else (sublayer,)
    return next((kind for kind in candidates if kind in kinds), None)


# ------------------------------------------------------------------------------------------- one output projection


def fit_at(site: Site, kind: str, settings: Refit, solver: Solver) -> Fit:
    """The solutions for one output projection. With several processes, every process must call this.

    Args:
      site: the projection.
      kind: kind of its groups: that of the site, or `query`.
      settings: from `resolve`.
      solver: solves the system.
    """
    linear = projection(site.run, site.kind)
    problem = solver.problem(
        site.moments(),
        linear.kernel[...],
        site.mesh,
        groups=Groups(group_count(site.run, kind), part_count(site.run, kind)),
        tokens=(site.tokens, site.held_tokens),
        towards=settings.alpha or 0.0,
        ridge=settings.ridge,
        biased=linear.bias is not None,
        where=f"{PROJECTIONS[site.kind]} of layer {site.layer}",
    )
    return solver.fit(problem)


def held_out_windows(settings: Refit, batches: Batches) -> int:
    """The number of windows that choose the ridge: none where it is given, or without least squares, or of too few."""
    chooses = settings.ridge is None and settings.method == "least-squares"
    return int(HELD_OUT * batches.count) if chooses else 0


def _choose_and_refit(
    site: Site, kind: str, keep: int, settings: Refit, solver: Solver
) -> tuple[Int[np.ndarray, " kept"], Block]:
    """The groups that structured OBS keeps, and the layer with zeros in the rows of all others."""
    count = group_count(site.run, kind)
    if keep == count:
        return np.arange(count), site.run
    # No name is given to the fit, so that its moments are freed as soon as the rows are found.
    kept, rows = fit_at(site, kind, settings, solver).choose_and_refit(keep, settings.method == "least-squares")
    found = {"kept": kept} | (rows.named() if settings.method != "none" else {})
    return np.flatnonzero(kept), _with_rows(site, kind, found)


def prune_site(
    site: Site, kind: str, kept: Int[np.ndarray, " kept"], settings: Refit, solver: Solver | None = None
) -> Block:
    """The layer of a site at full width with a refitted output projection: zeros in the rows of all other groups.

    Args:
      site: an output projection, as the walk shows it.
      kind: kind of the groups: that of the site, or `query`.
      kept: indices of the kept groups, ascending.
      settings: from `resolve`.
      solver: solves the system; the settings' own by default.

    Raises:
      InputError: the activations are not finite, or the system has no solution.
    """
    count = group_count(site.run, kind)
    if len(kept) == count:
        return site.run
    found: dict[str, Any] = {"kept": np.isin(np.arange(count), kept)}
    if settings.method != "none":
        fit = fit_at(site, kind, settings, solver or Solver(settings.solver))
        least_squares = settings.method == "least-squares"
        found |= fit.refit(found["kept"], least_squares).named()
    return _with_rows(site, kind, found)


def _with_rows(site: Site, kind: str, found: Mapping[str, Any]) -> Block:
    """The layer with zeros in the rows of the groups that are not kept, and with the new kernel and shift if found."""
    kernel = found.get("kernel")
    if kernel is None:
        dense = gather(projection(site.run, site.kind).kernel[...])
        kept = found["kept"].reshape(-1, 1, 1)
        kernel = np.where(kept, dense.reshape(len(kept), -1, dense.shape[-1]), 0)
    return with_projection(site.run, PROJECTIONS[site.kind], kernel, found.get("shift"), site.mesh)


def with_projection(
    run: Block,
    name: str,
    kernel: Shaped[np.ndarray, "..."] | Shaped[Array, "..."],
    shift: Float[np.ndarray, " D"] | None,
    mesh: Mesh | None,
) -> Block:
    """The layer with a new kernel of one projection and `shift` added to its bias, rounded to the types of both.

    Each device receives its shard of the kernel, whose elements are in the order of the projection. A kernel on the
    devices does not pass the host.
    """
    places = {} if mesh is None else dict(named_arrays(run_shardings(run, mesh)))

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        full_name = axis_table.array_path(path)
        match full_name.removeprefix(f"{name}."):
            case "kernel":
                new = kernel.reshape(array.shape)
            case "bias" if shift is not None:
                new = gather(array).astype(np.float64) + np.asarray(shift)
            case _:
                return array
        return place(new.astype(array.dtype), places.get(full_name))

    return jax.tree_util.tree_map_with_path(leaf, run)
