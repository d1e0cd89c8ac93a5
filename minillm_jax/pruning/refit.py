"""What stays takes over from what goes: forward passes, and one linear system for each output projection.

Layer after layer, on the stream that is already pruned, the rows S that stay of attention.o and mlp.down are fitted to

    Y = (1 − α) · A W + α · gap

A is the input of the projection at full width, W its dense kernel, and `gap` what would bring the pruned stream back to
the dense one (see `stream.Moments`). A ridge holds the rows to the old ones:

    W'_S = (G_SS + λI)⁻¹ ((1 − α) G_S: W + α C_S + λ W_S)        G = Aᵀ A, C = Aᵀ gap, λ = ridge · mean diagonal of G

With α = 0 each projection keeps its output, with α = 1 it also mends what went wrong before it. With a bias, the
moments are taken about the mean, and the bias makes up for the means.
"""

from collections.abc import Callable, Container, Mapping, Sequence, Sized
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices.sharding import gather, of, shard
from minillm_jax.errors import InputError, one_of
from minillm_jax.model import axis_table
from minillm_jax.model.build import with_runs
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_count, part_count
from minillm_jax.pruning import slicing, solve
from minillm_jax.pruning.refit_inputs import align
from minillm_jax.pruning.removal_order import greedy_removal, products_of_best
from minillm_jax.pruning.walk import PROJECTIONS, InputMoments, Site, projection, walk

METHODS = ("none", "bias", "least-squares")

# Measured: better than both ends where much goes (50 %), level with the better one where little goes (20 %).
HALF_WAY = 0.5


@dataclass(frozen=True)
class Refit:
    """How what stays takes over from what goes.

    Attributes:
      method: `none`; `bias`, the mean output of what goes is added to the bias (FLAP, arXiv 2312.11983); or
        `least-squares`, which also fits the bias where there is one.
      alpha: α, how far the target lies from the projection's own output towards the dense stream. By default half-way
        for least squares, but 0 in models with a norm between the projection and the stream (Gemma 2, GLM 4), where
        no output of the projection is known to close the gap; and 0 for `bias`.
      ridge: λ as a share of the mean diagonal.
      solver: `host` (NumPy, float64) or `device` (JAX, float32).
      inner: β, how far the inner matrices of a half are turned towards what they read on the dense stream (see
        `align`). By default half-way for least squares, and 0, not at all, for the others.
    """

    method: str = "least-squares"
    alpha: float | None = None
    ridge: float = 1e-2
    solver: str = "host"
    inner: float | None = None

    def resolve(self, config: DecoderConfig) -> "Refit":
        """The settings for a model, with its α.

        Raises:
          InputError: a name is unknown, a number out of its range, or the model lacks what the method needs.
        """
        one_of("refit", self.method, METHODS)
        one_of("solver", self.solver, solve.SOLVERS)
        if self.method == "bias" and not can_compensate(config):
            raise InputError(
                f"refit by bias needs output projections with biases, which this {config.family} model does not "
                "have; use least-squares"
            )
        own = HALF_WAY if self.method == "least-squares" and not config.post_norms else 0.0
        alpha = own if self.alpha is None else self.alpha
        if not 0 <= alpha <= 1 or (config.post_norms and alpha):
            allowed = "be 0 in a model with norms after its projections" if config.post_norms else "lie in [0, 1]"
            raise InputError(f"the refit's alpha must {allowed}, found {alpha:g}")
        if not 0 < self.ridge < np.inf:
            raise InputError(f"the refit's ridge must be a positive number, found {self.ridge:g}")
        inner = self.inner
        if inner is None:
            inner = HALF_WAY if self.method == "least-squares" else 0.0
        if not 0 <= inner <= 1 or (inner and self.method != "least-squares"):
            allowed = "lie in [0, 1]" if self.method == "least-squares" else "be 0 without least squares"
            raise InputError(f"how far inner matrices are turned must {allowed}, found {inner:g}")
        return replace(self, alpha=alpha, inner=inner)


def can_compensate(config: DecoderConfig) -> bool:
    """Whether both output projections have biases, which can take over the mean of what goes."""
    return config.output_bias and config.mlp_bias


def slice_and_refit(
    decoder: Decoder,
    kept: axis_table.Kept,
    batches: Batches,
    refit: Refit | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """A decoder with only the kept groups of every layer, whose output projections make up for the others.

    A half of a layer that keeps all its groups is left alone, bit for bit.

    Args:
      decoder: the dense model.
      kept: kind of group -> for each layer, the indices that stay, ascending.
      batches: calibration windows.
      refit: the method and its settings.
      progress: called with the number of halves of layers done, and of all.

    Raises:
      InputError: see `Refit.resolve`; or the activations are not finite.
    """
    settings = (refit or Refit()).resolve(decoder.config)

    def shrink(site: Site) -> Block:
        kind = pruned_kind(site.kind, kept)
        return site.run if kind is None else _shrink(site, kind, kept[kind][site.layer], settings)

    aligned = _aligner(settings, kept, batches.tokens)
    return shard(with_runs(decoder, slicing.merge(walk(decoder, batches, shrink, progress, aligned))), of(decoder))


def prune_by_obs(
    decoder: Decoder,
    counts: Mapping[str, Sequence[int]],
    batches: Batches,
    refit: Refit | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Decoder, dict[str, list[Int[np.ndarray, " _"]]]]:
    """As `slice_and_refit`, with the groups chosen on the way by structured OBS, and which ones stay.

    What is measured is the error towards the target of the refit, with its ridge; with α = 0 that is OBS proper,
    and least squares is its update.

    Args:
      decoder: the dense model.
      counts: kind of group -> for each layer, how many stay.
      batches: calibration windows.
      refit: the method and its settings.
      progress: called with the number of halves of layers done, and of all.

    Raises:
      InputError: see `Refit.resolve`; or the activations are not finite.
    """
    settings = (refit or Refit()).resolve(decoder.config)
    kept: dict[str, list[np.ndarray]] = {kind: [] for kind in counts}

    def shrink(site: Site) -> Block:
        kind = pruned_kind(site.kind, counts)
        if kind is None:
            return site.run
        stay, fit = _choose(site, kind, counts[kind][site.layer], settings)
        kept[kind].append(stay)
        return _shrink(site, kind, stay, settings, fit)

    left = {kind: [range(count) for count in rows] for kind, rows in counts.items()}
    aligned = _aligner(settings, left, batches.tokens)
    pruned = with_runs(decoder, slicing.merge(walk(decoder, batches, shrink, progress, aligned)))
    return shard(pruned, of(decoder)), kept


def _aligner(
    settings: Refit, kept: Mapping[str, Sequence[Sized]], tokens: int
) -> Callable[[int, str, Block, Callable[[], InputMoments]], Block] | None:
    """What turns the inner matrices of the halves that lose groups."""
    if not settings.inner:
        return None

    def aligned(layer: int, half: str, run: Block, moments: Callable[[], InputMoments]) -> Block:
        kind = pruned_kind(half, kept)
        if kind is None or len(kept[kind][layer]) == group_count(run, kind):
            return run
        return align(half, run, moments(), tokens, settings.inner or 0.0, settings.ridge, settings.solver)

    return aligned


def pruned_kind(half: str, kinds: Container[str]) -> str | None:
    """The kind of groups that go in a half, of those that are pruned; query heads are heads of another kind."""
    own = ("head", "query") if half == "head" else (half,)
    return next((kind for kind in own if kind in kinds), None)


def removal_order(site: Site, kind: str, keep: int, fit: "Fit", solver: str = "host") -> Int[np.ndarray, " gone"]:
    """The groups that structured OBS removes, first to last, until `keep` are left."""
    inverse = solve.inverse(fit.hessian, fit.ridge, solver)
    products = products_of_best(inverse, fit.right, solver)
    count, parts = group_count(site.run, kind), part_count(site.run, kind)
    return greedy_removal(inverse, products, count, keep, parts, solver)


def _choose(site: Site, kind: str, keep: int, settings: Refit) -> tuple[np.ndarray, "Fit | None"]:
    """The groups that structured OBS leaves, and the linear system that said so, if one was needed."""
    everything = np.arange(group_count(site.run, kind))
    if keep == len(everything):
        return everything, None
    fit = fit_of(site, settings)
    return np.delete(everything, removal_order(site, kind, keep, fit, settings.solver)), fit


def _shrink(site: Site, kind: str, stay: Int[np.ndarray, " kept"], settings: Refit, fit: "Fit | None" = None) -> Block:
    """The layer with only the groups of one kind that stay, refitted."""
    count = group_count(site.run, kind)
    if len(stay) == count:
        return site.run
    smaller = slicing.take(site.run, {kind: jnp.asarray(stay)[None]}, 0, 1)
    if settings.method == "none":
        return smaller
    fit = fit or fit_of(site, settings)
    rows = np.arange(len(fit.kernel)).reshape(count, -1)[stay].ravel()
    kernel = fit.refitted(rows, settings)
    return _with_projection(smaller, PROJECTIONS[site.kind], kernel, fit.shift(rows, kernel))


# --------------------------------------------------------------------------------------------- the linear system


@dataclass(frozen=True)
class Fit:
    """The linear system of one output projection at full width, float64: hessian · W' = right.

    Attributes:
      hessian: G + λI.
      right: (1 − α) G W + α C + λ W.
      ridge: λ.
      kernel: W.
      mean: of the inputs; None without a bias.
      target: mean of Y.
    """

    hessian: Float[np.ndarray, "I I"]
    right: Float[np.ndarray, "I D"]
    ridge: float
    kernel: Float[np.ndarray, "I D"]
    mean: Float[np.ndarray, " I"] | None
    target: Float[np.ndarray, " D"]

    def refitted(self, rows: Int[np.ndarray, " kept"], settings: Refit) -> Float[np.ndarray, "kept D"]:
        """The kernel with only those rows, as the method makes it."""
        return self.rows(rows, settings.solver) if settings.method == "least-squares" else self.kernel[rows]

    def rows(self, rows: Int[np.ndarray, " kept"], solver: str) -> Float[np.ndarray, "kept D"]:
        """The best kernel with only those rows."""
        return solve.solve(self.hessian[np.ix_(rows, rows)], self.right[rows], self.ridge, solver)

    def shift(self, rows: Int[np.ndarray, " kept"], kernel: Float[np.ndarray, "kept D"]) -> np.ndarray | None:
        """What the bias has to change by for a kernel with only those rows to keep the mean of the target."""
        return None if self.mean is None else self.target - self.mean[rows] @ kernel


def fit_of(site: Site, settings: Refit) -> Fit:
    """The linear system of one output projection, in float64; with the solver `device` products are of float32.

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
    # Inputs that are all zero leave the old kernel, whatever the ridge.
    ridge = settings.ridge * (np.trace(gram) / len(gram) or 1.0)
    right = (1 - alpha) * solve.product(gram, kernel, settings.solver) + alpha * cross + ridge * kernel
    target = (1 - alpha) * (mean @ kernel) + alpha * gap
    np.fill_diagonal(gram, gram.diagonal() + ridge)  # in place: at 7B this is a gigabyte
    return Fit(gram, right, ridge, kernel, mean if biased else None, target)


def _with_projection(
    run: Block, name: str, kernel: Float[np.ndarray, "kept D"], shift: Float[np.ndarray, " D"] | None
) -> Block:
    """A layer with another kernel of one projection, and its bias shifted; rounded to the types they have."""

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        match axis_table.array_path(path).removeprefix(f"{name}."):
            case "kernel":
                return jnp.asarray(kernel.reshape(array.shape), array.dtype)
            case "bias" if shift is not None:
                return jnp.asarray(gather(array).astype(np.float64) + shift, array.dtype)
        return array

    return jax.tree_util.tree_map_with_path(leaf, run)
