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
"""

from collections.abc import Callable, Container, Mapping, Sequence, Sized
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices.sharding import gather, mesh_of, shard
from minillm_jax.errors import InputError, one_of
from minillm_jax.model import axis_table
from minillm_jax.model.build import with_runs
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_count, part_count
from minillm_jax.pruning import slicing, solve
from minillm_jax.pruning.refit_inputs import refit_sublayer_inputs
from minillm_jax.pruning.removal_order import greedy_removal, products_of_best
from minillm_jax.pruning.walk import PROJECTIONS, InputMoments, RefitInputs, Site, projection, walk
from minillm_jax.settings import METHODS, SOLVERS, Refit

# Default of α and β. Measured: better than 0 and 1 at a ratio of 50 %, equal to the better of both at 20 %.
HALF_WAY = 0.5


def resolve(settings: Refit, config: DecoderConfig) -> Refit:
    """The settings for a model, with α and β filled in.

    Raises:
      InputError: a name is unknown, a number out of its range, or the model lacks what the method needs.
    """
    one_of("refit", settings.method, METHODS)
    one_of("solver", settings.solver, SOLVERS)
    if settings.method == "bias" and not can_compensate(config):
        raise InputError(
            f"refit by bias needs output projections with biases, which this {config.family} model does not have; use "
            "least-squares"
        )
    if not 0 < settings.ridge < np.inf:
        raise InputError(f"the refit's ridge must be a positive number, found {settings.ridge:g}")
    return replace(settings, alpha=_alpha(settings, config), inputs=_inputs(settings))


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
) -> Decoder:
    """A decoder with only the kept groups of every layer, and with refitted output projections.

    A sublayer that keeps all its groups is not changed, bit for bit.

    Args:
      decoder: the dense model.
      kept: kind of group -> for each layer, the indices of the kept groups, ascending.
      batches: calibration windows.
      refit: the method and its settings.
      progress: called with the number of sublayers done, and of all.

    Raises:
      InputError: see `resolve`; or the activations are not finite.
    """
    settings = resolve(refit or Refit(), decoder.config)

    def replace_layer(site: Site) -> Block:
        kind = pruned_kind(site.kind, kept)
        return site.run if kind is None else slice_site(site, kind, kept[kind][site.layer], settings)

    refit_inputs = _input_refit(settings, kept, batches.tokens)
    layers = walk(decoder, batches, replace_layer, progress, refit_inputs)
    return shard(with_runs(decoder, slicing.merge(layers)), mesh_of(decoder))


def prune_by_obs(
    decoder: Decoder,
    counts: Mapping[str, Sequence[int]],
    batches: Batches,
    refit: Refit | None = None,
    progress: Callable[[int, int], None] | None = None,
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

    Returns:
      The pruned decoder, and kind of group -> for each layer, the indices of the kept groups, ascending.

    Raises:
      InputError: see `resolve`; or the activations are not finite.
    """
    settings = resolve(refit or Refit(), decoder.config)
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in counts}

    def replace_layer(site: Site) -> Block:
        kind = pruned_kind(site.kind, counts)
        if kind is None:
            return site.run
        groups, fit = _choose(site, kind, counts[kind][site.layer], settings)
        kept[kind].append(groups)
        return slice_site(site, kind, groups, settings, fit)

    kept_ranges = {kind: [range(count) for count in rows] for kind, rows in counts.items()}  # only their lengths matter
    refit_inputs = _input_refit(settings, kept_ranges, batches.tokens)
    layers = walk(decoder, batches, replace_layer, progress, refit_inputs)
    return shard(with_runs(decoder, slicing.merge(layers)), mesh_of(decoder)), kept


def _input_refit(settings: Refit, kept: Mapping[str, Sequence[Sized]], tokens: int) -> RefitInputs | None:
    """The input refit of the sublayers that lose groups; None where β is 0."""
    if not settings.inputs:
        return None

    def refit_inputs(layer: int, sublayer: str, run: Block, moments: Callable[[], InputMoments]) -> Block:
        kind = pruned_kind(sublayer, kept)
        if kind is None or len(kept[kind][layer]) == group_count(run, kind):
            return run
        beta, ridge = settings.inputs or 0.0, settings.ridge
        return refit_sublayer_inputs(sublayer, run, moments(), tokens, beta, ridge, settings.solver)

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


def removal_order(site: Site, kind: str, keep: int, fit: "Fit", solver: str = "host") -> Int[np.ndarray, " removed"]:
    """The removed groups of a site in the order of structured OBS, until `keep` groups remain.

    Args:
      site: an output projection.
      kind: kind of the groups: that of the site, or `query`.
      keep: number of kept groups.
      fit: the linear system of the projection.
      solver: `host` (float64) or `device` (float32).
    """
    inverse = solve.inverse(fit.hessian, fit.ridge, solver)
    products = products_of_best(inverse, fit.right, solver)
    count, parts = group_count(site.run, kind), part_count(site.run, kind)
    return greedy_removal(inverse, products, count, keep, parts, solver)


def _choose(site: Site, kind: str, keep: int, settings: Refit) -> tuple[np.ndarray, "Fit | None"]:
    """The groups that structured OBS keeps, and the linear system; None where all groups are kept."""
    groups = np.arange(group_count(site.run, kind))
    if keep == len(groups):
        return groups, None
    fit = fit_of(site, settings)
    return np.delete(groups, removal_order(site, kind, keep, fit, settings.solver)), fit


def slice_site(
    site: Site, kind: str, kept: Int[np.ndarray, " kept"], settings: Refit, fit: "Fit | None" = None
) -> Block:
    """The layer of a site with only the kept groups of one kind, and with a refitted output projection.

    Args:
      site: an output projection, as the walk shows it.
      kind: kind of the groups: that of the site, or `query`.
      kept: indices of the kept groups, ascending.
      settings: from `resolve`.
      fit: the linear system of the projection; computed by default.

    Raises:
      InputError: the activations are not finite.
    """
    count = group_count(site.run, kind)
    if len(kept) == count:
        return site.run
    sliced = slicing.take(site.run, {kind: jnp.asarray(kept)[None]}, 0, 1)
    if settings.method == "none":
        return sliced
    fit = fit or fit_of(site, settings)
    rows = np.arange(len(fit.kernel)).reshape(count, -1)[kept].ravel()
    kernel = fit.refitted(rows, settings)
    return _with_projection(sliced, PROJECTIONS[site.kind], kernel, fit.shift(rows, kernel))


# --------------------------------------------------------------------------------------------- the linear system


@dataclass(frozen=True)
class Fit:
    """The linear system of one output projection at full width, float64: hessian · W' = right.

    Attributes:
      hessian: G + λI, the matrix of the system.
      right: (1 − α) G W + α C + λ W, its right-hand side.
      ridge: λ.
      kernel: W, the dense kernel.
      mean: mean of the inputs A over all tokens; None for a projection without a bias.
      target: mean of the target Y over all tokens.
    """

    hessian: Float[np.ndarray, "I I"]
    right: Float[np.ndarray, "I D"]
    ridge: float
    kernel: Float[np.ndarray, "I D"]
    mean: Float[np.ndarray, " I"] | None
    target: Float[np.ndarray, " D"]

    def refitted(self, rows: Int[np.ndarray, " kept"], settings: Refit) -> Float[np.ndarray, "kept D"]:
        """The kept rows of the kernel: solved anew by least squares, the dense rows for the other methods."""
        return self.rows(rows, settings.solver) if settings.method == "least-squares" else self.kernel[rows]

    def rows(self, rows: Int[np.ndarray, " kept"], solver: str) -> Float[np.ndarray, "kept D"]:
        """The least-squares solution for the kept rows."""
        return solve.solve(self.hessian[np.ix_(rows, rows)], self.right[rows], self.ridge, solver)

    def shift(self, rows: Int[np.ndarray, " kept"], kernel: Float[np.ndarray, "kept D"]) -> np.ndarray | None:
        """The change of the bias that gives the output with these rows the mean of the target; None without a bias."""
        return None if self.mean is None else self.target - self.mean[rows] @ kernel


def fit_of(site: Site, settings: Refit) -> Fit:
    """The linear system of one output projection, float64; the solver `device` computes matrix products in float32.

    Raises:
      InputError: the activations are not finite.
    """
    linear_map = projection(site.run, site.kind)
    gram, inputs, cross, gaps = (gather(moment).astype(np.float64) for moment in site.moments())
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        raise InputError(
            f"the input of {PROJECTIONS[site.kind]} of layer {site.layer} is not finite: the model's weights are "
            "broken, or overflow their type"
        )
    kernel = gather(linear_map.kernel[...]).astype(np.float64).reshape(len(gram), -1)
    mean, gap, alpha = inputs / site.tokens, gaps / site.tokens, settings.alpha or 0.0
    biased = linear_map.bias is not None
    if biased:
        gram, cross = gram - np.outer(mean, inputs), cross - np.outer(mean, gaps)
    # Inputs of zeros have a trace of zero: any ridge keeps the dense kernel.
    ridge = settings.ridge * (np.trace(gram) / len(gram) or 1.0)
    right = (1 - alpha) * solve.product(gram, kernel, settings.solver) + alpha * cross + ridge * kernel
    target = (1 - alpha) * (mean @ kernel) + alpha * gap
    np.fill_diagonal(gram, gram.diagonal() + ridge)  # in place: for a 7B model this matrix takes a gigabyte
    return Fit(gram, right, ridge, kernel, mean if biased else None, target)


def _with_projection(
    run: Block, name: str, kernel: Float[np.ndarray, "kept D"], shift: Float[np.ndarray, " D"] | None
) -> Block:
    """The layer with a new kernel of one projection and `shift` added to its bias, rounded to the types of both."""

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        match axis_table.array_path(path).removeprefix(f"{name}."):
            case "kernel":
                return jnp.asarray(kernel.reshape(array.shape), array.dtype)
            case "bias" if shift is not None:
                return jnp.asarray(gather(array).astype(np.float64) + shift, array.dtype)
        return array

    return jax.tree_util.tree_map_with_path(leaf, run)
