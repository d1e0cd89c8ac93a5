"""The job in one readable page: load, calibrate, score, prune, save.

model = load("path/or/hub-id")
calibration = calibrate(model, "text.txt")
scores = score(model, calibration, Scoring("fms"))
pruned = prune(model, scores, ratio=0.2)
save(pruned, "pruned")
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from convert import reader, writer
from minillm_jax import __version__, groups, loss
from minillm_jax import calibration as text
from minillm_jax.calibration import Calibration
from minillm_jax.decoder import (
    Block,
    Decoder,
    depth,
    group_count,
    group_counts,
    kernels,
    layer_count,
    parameter_count,
)
from minillm_jax.errors import InputError
from minillm_jax.estimate import directions, gradient
from minillm_jax.estimate.loop import Spsa, estimate
from minillm_jax.estimate.statistics import ACTIVATION_NORMS, activation_norms
from minillm_jax.model import Model
from minillm_jax.select import criteria
from minillm_jax.select.budget import select_local
from minillm_jax.select.criteria import CRITERIA, Criterion
from minillm_jax.shrink.slicing import slice_groups

RECORDED_PACKAGES = ("jax", "flax", "transformers", "numpy")

# Called with a stage's name, how much of it is done, and how much there is.
StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Scoring:
    """How groups are scored; what is not said is the paper's.

    Attributes:
      criterion: fms, wanda, magnitude, random, or noise (fms with ĝ replaced by noise: the control).
      spsa: the gradient estimate, used by fms.
      activation_norm: l2, rms, mean-abs or none.
      within: reduction inside a structure (sum, mean, max, l2); the criterion's own by default.
      across: reduction over the structures of a group (max, sum, mean, prod, last); the criterion's own by default.
      seed: of noise and random scores.
    """

    criterion: str = "fms"
    spsa: Spsa = field(default_factory=Spsa)
    activation_norm: str = "l2"
    within: str | None = None
    across: str | None = None
    seed: int = 0

    def resolve(self) -> Criterion:
        """The criterion with its reductions.

        Raises:
          InputError: a name is unknown or a number out of its range.
        """
        _one_of("criterion", self.criterion, CRITERIA)
        _one_of("activation norm", self.activation_norm, ACTIVATION_NORMS)
        _one_of("distribution", self.spsa.distribution, directions.DISTRIBUTIONS)
        for number in (self.spsa.directions, self.spsa.at_once):
            if number < 1:
                raise InputError(f"the number of directions, and of those at once, must be at least 1, found {number}")
        if not 0 < np.float32(self.spsa.epsilon) < np.inf:
            raise InputError(f"epsilon must be a positive float32 number, found {self.spsa.epsilon:g}")
        for seed in (self.seed, self.spsa.seed):
            text.check_seed(seed)
        found = CRITERIA[self.criterion]
        within, across = self.within or found.within, self.across or found.across
        _one_of("reduction within a structure", within, criteria.WITHIN)
        _one_of("reduction across structures", across, criteria.ACROSS)
        return replace(found, within=within, across=across)


@dataclass(frozen=True)
class Scores:
    """One number for every group: kind -> layer -> [groups], higher stays.

    Attributes:
      groups: the scores.
      settings: what they were made with, for the record.
      calibration: what they were made on, for the record.
      projected_gradients: of each direction, when the criterion takes an estimated gradient.
    """

    groups: dict[str, list[np.ndarray]]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    projected_gradients: np.ndarray | None = None


def load(model: str | Path, dtype: str | None = None) -> Model:
    """Load a Hugging Face folder, a Flax checkpoint folder, or a Hub id; see `convert.reader.read_model`."""
    return reader.read_model(model, dtype)


def calibrate(model: Model, source: str | Path, samples: int = 10, length: int = 128, seed: int = 0) -> Calibration:
    """Draw calibration windows from a text, JSONL, parquet or .npy file or a Hub data set.

    The default of ten samples is LLM-Pruner's recipe.

    Raises:
      InputError: the source cannot be used, or holds too little text.
    """
    windows = text.sample(_tokens(model, source), samples, length, seed)
    return Calibration(windows, str(source), seed)


def score(
    model: Model, calibration: Calibration, scoring: Scoring | None = None, progress: StageProgress | None = None
) -> Scores:
    """Score every head (with its key/value group) and every MLP channel of every layer.

    Raises:
      InputError: a setting is out of its range, or the estimate is not finite.
    """
    scoring = scoring or Scoring()
    criterion = scoring.resolve()
    decoder, projected = model.decoder, None
    settings = asdict(scoring) | asdict(criterion)
    if not criterion.factors:
        return Scores(_random_scores(decoder, scoring.seed), settings, calibration.record())
    norms = None
    if "activation" in criterion.factors and scoring.activation_norm != "none":
        norms = activation_norms(decoder, calibration.windows, scoring.activation_norm)
        _report(progress, "activations", 1, 1)
    if "gradient" in criterion.factors:
        projected = estimate(decoder, calibration.windows, scoring.spsa, partial(_report, progress, "directions"))
    slopes = _slopes(criterion, scoring, projected)
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in groups.KINDS}
    first = 0
    for position, run in enumerate(decoder.runs):
        norms_of_run = None if norms is None else norms[position]
        for kind, values in _score_run(run, first, norms_of_run, slopes, criterion, scoring.spsa.distribution).items():
            found[kind].extend(values)
        first += depth(run)
        _report(progress, "scores", first, layer_count(decoder))
    return Scores(found, settings, calibration.record(), projected)


def prune(model: Model, scores: Scores, ratio: float, layers: range | None = None) -> Model:
    """Remove the groups with the lowest scores, the same ratio in every layer and for every kind.

    In each layer floor(n · ratio + 1/2) of the n groups of a kind go; at least one stays.

    Args:
      model: the dense model.
      scores: one number for every group of it.
      ratio: share of the groups that goes, in (0, 1).
      layers: the layers to prune, `range(4, 30)` for example; all by default.

    Raises:
      InputError: the ratio is outside (0, 1), the layers are not the model's, or the scores belong to another model.
    """
    decoder = model.decoder
    _check_layers(layers, layer_count(decoder))
    for kind, per_layer in scores.groups.items():
        found, expected = [len(values) for values in per_layer], group_counts(decoder, kind)
        if found != expected:
            raise InputError(f"the scores are for {found} groups of kind {kind}, the model has {expected}")
    kept = select_local(scores.groups, ratio, layers)
    pruned = slice_groups(decoder, kept)
    record = {
        "ratio": float(ratio),
        "layers": None if layers is None else [layers.start, layers.stop],
        "scoring": scores.settings,
        "calibration": scores.calibration,
        "parameters_before": parameter_count(decoder),
        "parameters_after": parameter_count(pruned),
        "kept": {kind: [indices.tolist() for indices in rows] for kind, rows in kept.items()},
        "groups_before": {kind: group_counts(decoder, kind) for kind in kept},
        "versions": {"minillm-jax": __version__} | {name: version(name) for name in RECORDED_PACKAGES},
        "base_model": model.name,
    }
    if model.record is not None:
        record["pruned_before"] = model.record
    return replace(model, decoder=pruned, record=record)


def save(model: Model, output: str | Path, max_shard_size: str = writer.MAX_SHARD_SIZE) -> Path:
    """Write a Hugging Face folder that stock transformers loads, with `pruning.json` beside the weights.

    Raises:
      InputError: the folder exists, or no stock class holds the shapes.
    """
    return writer.write_stock(model, output, max_shard_size)


def evaluate(
    model: Model, source: str | Path, window: int = 128, bos: bool = False, progress: StageProgress | None = None
) -> loss.Perplexity:
    """Perplexity over the non-overlapping windows of a whole text, W - 1 predictions a window.

    Raises:
      InputError: the source cannot be used, or is shorter than one window.
    """
    windows = text.cut(_tokens(model, source, bos), window)
    return loss.perplexity(model.decoder, windows, partial(_report, progress, "perplexity"))


@dataclass(frozen=True)
class Job:
    """Everything `run` needs: what the command line's options become."""

    model: str
    calibration: str
    output: str
    ratio: float
    samples: int = 10
    length: int = 128
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)
    layers: tuple[int, int] | None = None
    evaluation: str | None = None
    window: int = 128
    dtype: str | None = None


@dataclass(frozen=True)
class Result:
    """What a job came to."""

    job: Job
    pruned: Model
    seconds: dict[str, float]
    before: loss.Perplexity | None
    after: loss.Perplexity | None


def run(job: Job, progress: StageProgress | None = None) -> Result:
    """Prune one model from folder to folder. Everything that can be checked early is checked before any work.

    Raises:
      InputError: see the steps above; nothing has been written then.
    """
    writer.check_new(job.output)
    job.scoring.resolve()
    select_local({}, job.ratio)
    clock = _Clock()
    model = load(job.model, job.dtype)
    layers = None if job.layers is None else range(*job.layers)
    _check_writable(model, job.ratio, layers)
    calibration = calibrate(model, job.calibration, job.samples, job.length, job.seed)
    clock.lap("load")
    before = _evaluate_if(job, model, progress)
    clock.lap("evaluate")
    scores = score(model, calibration, job.scoring, progress)
    clock.lap("score")
    pruned = prune(model, scores, job.ratio, layers)
    del model  # the dense weights
    clock.lap("prune")
    after = _evaluate_if(job, pruned, progress)
    clock.lap("evaluate")
    save(pruned, job.output)
    clock.lap("save")
    return Result(job, pruned, clock.seconds, before, after)


# ------------------------------------------------------------------------------------- where the three wings meet


def _slopes(criterion: Criterion, scoring: Scoring, projected: np.ndarray | None) -> dict[str, Array]:
    """What ĝ is made from inside the scan: keys and projected gradients, or the key of the noise."""
    if projected is not None:
        keys = directions.direction_keys(scoring.spsa.seed, 0, len(projected))
        return {"keys": keys, "projected": jnp.asarray(projected, jnp.float32)}
    if "noise" in criterion.factors:
        return {"noise": directions.stream_key(scoring.seed, "noise")}
    return {}


def _score_run(
    run: Block, first: int, norms: dict[str, Array] | None, slopes: dict[str, Array], criterion: Criterion, how: str
) -> dict[str, np.ndarray]:
    """The scores of one run of equal layers that begins at layer `first`: kind -> [L, groups]."""
    layers = jnp.arange(first, first + depth(run), dtype=jnp.int32)
    found = {}
    for kind in groups.KINDS:
        structures = [
            _score_structure(
                kernels(run)[name][...],
                None if norms is None else norms[name],
                layers,
                slopes,
                name=name,
                kind=kind,
                count=group_count(run, kind),
                within=criterion.within,
                distribution=how,
            )
            for name in criteria.scored_matrices(criterion, kind)
        ]
        found[kind] = criteria.reduce_group(np.stack([np.asarray(part) for part in structures]), criterion.across)
    return found


@partial(jax.jit, static_argnames=("name", "kind", "count", "within", "distribution"))
def _score_structure(
    kernels: Float[Array, "L ..."],
    norms: Float[Array, "L ..."] | None,
    layers: Int[Array, " L"],
    slopes: dict[str, Array],
    *,
    name: str,
    kind: str,
    count: int,
    within: str,
    distribution: str,
) -> Float[Array, "L groups"]:
    """The score of each group's part in one matrix, for every layer of a run.

    One matrix of one layer at a time: ĝ is rebuilt, used and forgotten, so this takes the memory of the weights and a
    few times that of one matrix.
    """

    def one(layer_of: tuple[Array, Array | None, Array]) -> Array:
        kernel, norm, layer = layer_of
        slope = None
        if "keys" in slopes:
            args = (name, kernel.shape, layer, slopes["keys"], slopes["projected"], distribution)
            slope = gradient.rebuild(*args)
        elif "noise" in slopes:
            slope = directions.draw(slopes["noise"], layer, name, kernel.shape, "gaussian")
        values = criteria.importance(kernel, norm, slope)
        axes = groups.matrices()[name]
        return criteria.reduce_structure(values, axes, kind, count, within)

    return jax.lax.map(one, (kernels, norms, layers))


def _random_scores(decoder: Decoder, seed: int) -> dict[str, list[np.ndarray]]:
    key = directions.stream_key(seed, "random")
    return {
        kind: [criteria.random_scores(key, layer, kind, n) for layer, n in enumerate(group_counts(decoder, kind))]
        for kind in groups.KINDS
    }


# ------------------------------------------------------------------------------------------------------- helpers


class _Clock:
    """Seconds of each stage, by name; a stage met twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _report(progress: StageProgress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)


def _evaluate_if(job: Job, model: Model, progress: StageProgress | None) -> loss.Perplexity | None:
    return None if job.evaluation is None else evaluate(model, job.evaluation, job.window, progress=progress)


def _tokens(model: Model, source: str | Path, bos: bool = False) -> text.Tokens:
    return text.read_tokens(source, model.folder, model.decoder.embedding.shape[0], bos)


def _one_of(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise InputError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")


def _check_layers(layers: range | None, count: int) -> None:
    if layers is not None and (layers.step != 1 or not 0 <= layers.start < layers.stop <= count):
        raise InputError(
            f"layers {layers.start}:{layers.stop} are not a range of this model's layers; it has 0:{count}"
        )


def _check_writable(model: Model, ratio: float, layers: range | None) -> None:
    """Whether the pruned shapes can be saved, found out from the shapes alone."""
    decoder = model.decoder
    _check_layers(layers, layer_count(decoder))
    flat = {kind: [np.zeros(n) for n in group_counts(decoder, kind)] for kind in groups.KINDS}
    kept = select_local(flat, ratio, layers)
    writer.stock_config(jax.eval_shape(lambda dense: slice_groups(dense, kept), decoder), model.raw_config)
