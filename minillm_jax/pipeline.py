"""The job in one readable page: load, calibrate, score, prune, save.

>>> model = load("path/or/hub-id")
>>> calibration = calibrate(model, "text.txt")
>>> scores = score(model, calibration, Scoring("obs"))
>>> pruned = prune(model, scores, 0.2, restoration=Restoration(), calibration=calibration)
>>> save(pruned, "pruned")
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from convert import formats, reader, writer
from minillm_jax import __version__, allocate, costs, groups, loss, mesh
from minillm_jax import calibration as text
from minillm_jax.calibration import Calibration
from minillm_jax.decoder import (
    Decoder,
    build,
    group_counts,
    hidden_size,
    layer_count,
    parameter_count,
    part_counts,
    sizes_of,
)
from minillm_jax.errors import InputError, one_of
from minillm_jax.model import Model
from minillm_jax.progress import StageProgress, tell
from minillm_jax.scoring import Scores, Scoring, check_hidden, hidden_scores, score, summaries
from minillm_jax.select.budget import Budget, Counts, by_ratio, choose, kept_count
from minillm_jax.shrink.depth import best_layers
from minillm_jax.shrink.restore import Restoration, prune_by_obs, restore
from minillm_jax.shrink.slicing import slice_groups, slice_hidden, slice_layers, slice_sizes

RECORDED_PACKAGES = ("jax", "flax", "transformers", "numpy")


def load(model: str | Path, dtype: str | None = None, devices: Mesh | None = None) -> Model:
    """Load a Hugging Face folder, a Flax checkpoint folder, or a Hub id; see `convert.reader.read_model`."""
    return reader.read_model(model, dtype, devices)


def calibrate(model: Model, source: str | Path, samples: int = 10, length: int = 128, seed: int = 0) -> Calibration:
    """Draw calibration windows from a text, JSONL, parquet or .npy file or a Hub data set.

    The default of ten samples is LLM-Pruner's recipe.

    Raises:
      InputError: the source cannot be used, or holds too little text.
    """
    windows = text.sample(_tokens(model, source), samples, length, seed)
    return Calibration(windows, str(source), seed)


def prune(
    model: Model,
    scores: Scores,
    ratio: float | Budget,
    restoration: Restoration | None = None,
    calibration: Calibration | None = None,
    progress: StageProgress | None = None,
) -> Model:
    """Remove the groups with the lowest scores.

    Args:
      model: the dense model.
      scores: one number for every group of it.
      ratio: share of the groups that goes, in (0, 1), the same in every layer and for every kind: floor(n · ratio +
        1/2) of the n groups of a kind go, and at least one stays. Or a `Budget`, which says more.
      restoration: how what stays takes over from what goes; not at all by default.
      calibration: the windows for the restoration, for measured budgets, and for the criterion `obs`, which chooses
        while it prunes.
      progress: told how far budget and restoration are.

    Raises:
      InputError: the budget is out of its range or cannot be met, the scores belong to another model, or the
        restoration does not suit it or has no windows.
    """
    budget = ratio if isinstance(ratio, Budget) else Budget(ratio)
    decoder = model.decoder
    restoration = (restoration or Restoration("none")).resolve(decoder.config)
    final = _counts(decoder, scores, budget, restoration, calibration, progress)
    pruned, kept = _shrink(decoder, scores, final.counts, restoration, calibration, progress)
    more = {"scores": summaries(scores), "losses": final.losses}
    return _recorded(model, pruned, kept, scores, budget, restoration, more)


def prune_in_rounds(
    model: Model,
    calibration: Calibration,
    scoring: Scoring,
    budget: Budget,
    restoration: Restoration | None = None,
    rounds: int = 1,
    progress: StageProgress | None = None,
    checkpoint: str | Path | None = None,
) -> Model:
    """Score and prune, in several rounds with fresh scores of the smaller model in each.

    How many groups of every layer stay in the end is decided in the first round; each round removes its share of the
    others.

    Args:
      model: the dense model.
      calibration: the windows for everything.
      scoring: the criterion and its settings.
      budget: how much goes.
      restoration: how what stays takes over, in every round; not at all by default.
      rounds: how many; with one, this is `score` and `prune`.
      progress: told how far each stage is.
      checkpoint: see `score`; for one round only.

    Raises:
      InputError: see `score` and `prune`.
    """
    check_rounds(rounds, checkpoint)
    restoration = (restoration or Restoration("none")).resolve(model.decoder.config)
    scores = score(model, calibration, scoring, progress, checkpoint)
    final = _counts(model.decoder, scores, budget, restoration, calibration, progress)
    stock = allocate.stock_of(model.decoder, scoring.kinds, budget)
    more = {"rounds": rounds, "scores": summaries(scores), "losses": final.losses}
    decoder, kept = model.decoder, None
    for number, counts in enumerate(allocate.steps_between(stock.counts, final.counts, stock.parts, rounds)):
        if number:
            scores = score(replace(model, decoder=decoder), calibration, scoring, progress)
        decoder, stay = _shrink(decoder, scores, counts, restoration, calibration, progress)
        kept = stay if kept is None else groups.kept_of_kept(kept, stay)
    assert kept is not None, "there is at least one round"
    return _recorded(model, decoder, kept, scores, budget, restoration, more)


def check_rounds(rounds: int, checkpoint: str | Path | None = None) -> None:
    """Whether there can be so many rounds.

    Raises:
      InputError: there cannot.
    """
    if rounds < 1:
        raise InputError(f"there must be at least 1 round, found {rounds}")
    if rounds > 1 and checkpoint is not None:
        raise InputError(
            "a checkpoint holds one estimate and cannot be used with several rounds; leave out one of them"
        )


def _counts(
    decoder: Decoder,
    scores: Scores,
    budget: Budget,
    restoration: Restoration,
    calibration: Calibration | None,
    progress: StageProgress | None,
) -> allocate.Allocated:
    for kind, per_layer in scores.groups.items():
        found, expected = [len(values) for values in per_layer], group_counts(decoder, kind)
        if found != expected:
            raise InputError(f"the scores are for {found} groups of kind {kind}, the model has {expected}")
    per_cost = scores.settings.get("within") != "standardised"
    return allocate.counts_for(
        decoder, scores.groups, scores.on_the_way, per_cost, budget, restoration, calibration, progress
    )


def _shrink(
    decoder: Decoder,
    scores: Scores,
    counts: Counts,
    restoration: Restoration,
    calibration: Calibration | None,
    progress: StageProgress | None,
) -> tuple[Decoder, groups.Kept]:
    """The smaller decoder, and what it kept."""
    told = partial(tell, progress, "restoration")
    if restoration.method == "none" and not scores.on_the_way:
        kept = choose(scores.groups, counts, part_counts(decoder, scores.groups))
        return slice_groups(decoder, kept), kept
    if calibration is None:
        raise InputError("restoration and the criterion obs walk over calibration windows; give the calibration")
    if scores.on_the_way:
        return prune_by_obs(decoder, counts, calibration.windows, restoration, told)
    kept = choose(scores.groups, counts, part_counts(decoder, scores.groups))
    return restore(decoder, kept, calibration.windows, restoration, told), kept


def _recorded(
    model: Model,
    pruned: Decoder,
    kept: groups.Kept,
    scores: Scores,
    budget: Budget,
    restoration: Restoration,
    more: Mapping[str, Any],
) -> Model:
    """The pruned model, with what was done to it, and what more there is to be said of that."""
    decoder = model.decoder
    kinds = tuple(scores.groups)
    exactly = allocate.stock_of(decoder, kinds, replace(budget, round_heads_to=1, round_width_to=1))
    shared = budget.allocation == "uniform" and budget.target is None and budget.of == "groups"
    asked = by_ratio(exactly, budget.ratio or 0.0) if shared else {k: [len(rows) for rows in kept[k]] for k in kinds}
    record = {
        "ratio": budget.ratio,
        "budget": asdict(budget),
        "layers": None if budget.layers is None else [exactly.layers.start, exactly.layers.stop],
        "groups_asked": asked,
        "scoring": scores.settings,
        "restoration": asdict(restoration),
        "calibration": scores.calibration,
        "estimate": None if scores.estimate is None else scores.estimate.record(),
        "parameters_before": parameter_count(decoder),
        "parameters_after": parameter_count(pruned),
        "kept": {kind: [np.asarray(indices).tolist() for indices in rows] for kind, rows in kept.items()},
        "groups_before": {kind: group_counts(decoder, kind) for kind in kept},
        "versions": {"minillm-jax": __version__} | {name: version(name) for name in RECORDED_PACKAGES},
        "base_model": model.name,
        **more,
    }
    if model.record is not None:
        record["pruned_before"] = model.record
    return replace(model, decoder=pruned, record=record)


def drop_layers(
    model: Model,
    calibration: Calibration,
    ratio: float,
    layers: tuple[int, int] | None = None,
    progress: StageProgress | None = None,
) -> tuple[Model, list[int]]:
    """A model without a share of its layers, those whose removal leaves the least loss; and which ones stay.

    Raises:
      InputError: the ratio is not in (0, 1).
    """
    Budget(ratio).check()
    count = layer_count(model.decoder)
    among = allocate.layers_of(Budget(ratio, layers=layers), count)
    keep = count - len(among) + kept_count(len(among), ratio)
    told = partial(tell, progress, "layers")
    kept = best_layers(model.decoder, calibration.windows, keep, among, told)
    return replace(model, decoder=slice_layers(model.decoder, kept)), kept


def narrow(
    model: Model,
    calibration: Calibration,
    scoring: Scoring,
    ratio: float,
    round_to: int = 1,
    progress: StageProgress | None = None,
) -> tuple[Model, np.ndarray]:
    """A model with a share of its hidden dimensions less, those of the lowest scores; and which ones stay.

    Raises:
      InputError: the ratio is not in (0, 1), or the criterion has no scores for hidden dimensions.
    """
    Budget(ratio, round_width_to=round_to).check()
    scores = {"hidden": [hidden_scores(model, calibration, scoring, progress)]}
    count = kept_count(len(scores["hidden"][0]), ratio, round_to)
    kept = np.asarray(choose(scores, {"hidden": [count]}, {"hidden": [1]})["hidden"][0])
    return replace(model, decoder=slice_hidden(model.decoder, kept)), kept


def save(
    model: Model,
    output: str | Path,
    format: str | None = None,  # noqa: A002  the name of the option
    max_shard_size: str = writer.MAX_SHARD_SIZE,
    extra: Mapping[str, str] | None = None,
) -> writer.Written:
    """Write a folder that transformers loads, or a Flax checkpoint, with `pruning.json` beside the weights.

    Args:
      model: the model.
      output: folder to write, which must not exist.
      format: `stock`, `per-layer`, `padded` or `flax` (see `convert.formats`); by default `stock` where the family's
        own class holds the shapes, else `per-layer`.
      max_shard_size: of the weight files.
      extra: texts to write beside the weights, by file name.

    Returns:
      The format that was written, and how many parameters the files hold.

    Raises:
      InputError: the folder exists, or the format cannot hold the shapes.
    """
    return writer.write_model(model, output, format, max_shard_size, extra)


def evaluate(
    model: Model, source: str | Path, window: int = 128, bos: bool = False, progress: StageProgress | None = None
) -> loss.Perplexity:
    """Perplexity over the non-overlapping windows of a whole text, W - 1 predictions a window.

    Raises:
      InputError: the source cannot be used, or is shorter than one window.
    """
    return _perplexity(model, text.cut(_tokens(model, source, bos), window), progress)


STRUCTURES = ("heads", "channels", "hidden", "layers")


@dataclass(frozen=True)
class Job:
    """Everything `run` needs: what the command line's options become.

    Attributes:
      structures: what goes, of `STRUCTURES`; whole layers first, then hidden dimensions, then heads and channels.
      heads: what a head is: a key/value head with all its query heads (`group`), or a query head (`query`).
    """

    model: str
    calibration: str
    output: str
    budget: Budget
    structures: tuple[str, ...] = ("heads", "channels")
    heads: str = "group"
    rounds: int = 1
    samples: int = 10
    length: int = 128
    seed: int = 0
    scoring: Scoring = field(default_factory=Scoring)
    restoration: Restoration = field(default_factory=partial(Restoration, "none"))
    preset: str | None = None
    evaluation: str | None = None
    window: int = 128
    dtype: str | None = None
    format: str | None = None
    max_shard_size: str = writer.MAX_SHARD_SIZE
    checkpoint: str | None = None
    mesh: str | None = None
    hosts: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups that go inside each block."""
        found = {"heads": groups.HEADS[self.heads], "channels": "channel"}
        return tuple(kind for structure, kind in found.items() if structure in self.structures)

    def check(self) -> None:
        """Whether the settings go together, as far as that can be said without the model.

        Raises:
          InputError: they do not.
        """
        one_of("way to count heads", self.heads, groups.HEADS)
        for structure in self.structures:
            one_of("structure", structure, STRUCTURES)
        if not self.structures or len(set(self.structures)) < len(self.structures):
            raise InputError("name at least one structure, and each of them once")
        self.budget.check()
        scoring = replace(self.scoring, kinds=self.kinds)
        scoring.resolve()
        if self.budget.allocation == "global":
            allocate.check_comparable(scoring.criterion)
        check_rounds(self.rounds, self.checkpoint)
        formats.check_format(self.format)
        writer.check_shard_size(self.max_shard_size)
        self._check_together()

    def _check_together(self) -> None:
        budget = self.budget
        whole = [structure for structure in ("hidden", "layers") if structure in self.structures]
        by_share = budget.target is None and budget.of == "groups" and budget.allocation == "uniform"
        if whole and not by_share:
            raise InputError(
                f"the ratio counts groups where {' and '.join(whole)} go, the same in every layer; leave out "
                "--ratio-of, --budget and targets"
            )
        if budget.layers is not None and whole and self.structures != ("layers",):
            raise InputError("--layers cannot be used where hidden dimensions go, or layers and something else")
        if self.heads == "query" and "heads" not in self.structures:
            raise InputError("--heads query says how heads go, but no heads go; add heads to --structures")
        if "hidden" in self.structures:
            check_hidden(self.scoring)
        if budget.allocation != "uniform" and self.format == formats.STOCK:
            raise InputError(
                f"{budget.allocation} budgets keep unequal numbers in the layers, which no stock class can hold; use "
                "the format per-layer or padded"
            )


@dataclass(frozen=True)
class Result:
    """What a job came to.

    Attributes:
      job: what was asked for.
      pruned: the model that was written.
      written: in which format, and how many parameters the files hold.
      seconds: of each stage; without that of saving before it is over.
      before: perplexity of the dense model, None where none was asked for.
      after: perplexity of the pruned model.
      costs_before: what the dense model costs, by measure (`costs.MEASURES`), for a window of `job.budget.window`
        tokens.
      costs_after: what the pruned model costs.
    """

    job: Job
    pruned: Model
    written: writer.Written
    seconds: dict[str, float]
    before: loss.Perplexity | None
    after: loss.Perplexity | None
    costs_before: dict[str, int]
    costs_after: dict[str, int]


# Texts to write beside the weights, by file name, from what a job came to.
Documents = Callable[[Result], Mapping[str, str]]


def run(job: Job, progress: StageProgress | None = None, documents: Documents | None = None) -> Result:
    """Prune one model from folder to folder. Everything that can be checked early is checked before any work.

    Args:
      job: what to do.
      progress: told how far each stage is.
      documents: asked, just before saving, for texts that are written together with the weights (`report.documents`);
        by process 0 alone.

    Raises:
      InputError: see the steps above; nothing has been written then.
    """
    shape = mesh.parse_mesh(job.mesh)
    if job.hosts is not None:
        mesh.initialise_hosts(mesh.parse_hosts(job.hosts))
    writer.check_new(job.output)
    job.check()
    clock = _Clock()
    model = load(job.model, job.dtype, mesh.make(shape))
    job.restoration.resolve(model.decoder.config)
    _check_writable(model, job)
    calibration = calibrate(model, job.calibration, job.samples, job.length, job.seed)
    held_out = None if job.evaluation is None else text.cut(_tokens(model, job.evaluation), job.window)
    clock.lap("load")
    before = None if held_out is None else _perplexity(model, held_out, progress)
    clock.lap("evaluate")
    costs_before = costs.all_costs(model.decoder, job.budget.window)
    pruned = _prune_all(model, job, calibration, progress)
    del model  # the dense weights
    clock.lap("prune")
    after = None if held_out is None else _perplexity(pruned, held_out, progress)
    clock.lap("evaluate")
    costs_after = costs.all_costs(pruned.decoder, job.budget.window)
    planned = writer.planned(pruned, job.format)
    result = Result(job, pruned, planned, dict(clock.seconds), before, after, costs_before, costs_after)
    extra = documents(result) if documents is not None and mesh.is_writer() else {}
    written = save(pruned, job.output, job.format, job.max_shard_size, extra)
    clock.lap("save")
    return replace(result, written=written, seconds=clock.seconds)


def _prune_all(model: Model, job: Job, calibration: Calibration, progress: StageProgress | None) -> Model:
    """Layers, hidden dimensions, then heads and channels, as far as they are to go; with one record of all."""
    ratio, smaller, whole = job.budget.ratio or 0.0, replace(model, record=None), {}
    if "layers" in job.structures:
        smaller, kept = drop_layers(smaller, calibration, ratio, job.budget.layers, progress)
        whole["layer"] = {"before": layer_count(model.decoder), "kept": kept}
    if "hidden" in job.structures:
        smaller, dimensions = narrow(smaller, calibration, job.scoring, ratio, job.budget.round_width_to, progress)
        whole["hidden"] = {"before": hidden_size(model.decoder), "kept": dimensions.tolist()}
    if job.kinds:
        scoring = replace(job.scoring, kinds=job.kinds)
        rest = (job.restoration, job.rounds, progress, job.checkpoint)
        smaller = prune_in_rounds(smaller, calibration, scoring, job.budget, *rest)
    else:
        nothing = Scores({}, asdict(job.scoring), calibration.record())
        more = {"rounds": 1, "scores": None, "losses": None}
        smaller = _recorded(smaller, smaller.decoder, {}, nothing, job.budget, job.restoration, more)
    record = {"preset": job.preset, "structures": list(job.structures), **(smaller.record or {})}
    record |= {"whole": whole, "parameters_before": parameter_count(model.decoder)}
    record |= {} if model.record is None else {"pruned_before": model.record}
    return replace(smaller, record=record)


class _Clock:
    """Seconds of each stage, by name; a stage met twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _perplexity(model: Model, windows: np.ndarray, progress: StageProgress | None) -> loss.Perplexity:
    return loss.perplexity(model.decoder, windows, partial(tell, progress, "perplexity"))


def _tokens(model: Model, source: str | Path, bos: bool = False) -> text.Tokens:
    return text.read_tokens(source, model.folder, model.decoder.embedding.shape[0], bos)


def _check_writable(model: Model, job: Job) -> None:
    """Whether the pruned shapes can be reached and saved in the format asked for, from the shapes alone.

    What unequal budgets keep is not known yet; the format per-layer holds whatever that is.
    """
    config, sizes, budget = model.decoder.config, sizes_of(model.decoder), job.budget
    layers = allocate.layers_of(budget, len(sizes.layers))
    ratio = budget.ratio or 0.0
    if "layers" in job.structures:
        gone = len(layers) - kept_count(len(layers), ratio)
        sizes = replace(sizes, layers=sizes.layers[: len(sizes.layers) - gone])
    if "hidden" in job.structures:
        width = kept_count(sizes.D, ratio, budget.round_width_to)
        sizes = replace(sizes, D=width, E=sizes.E if config.embedding_projection else width)
    if job.kinds:
        abstract = build(config, sizes, model.decoder.embedding.dtype)
        counts = allocate.expected(abstract, job.kinds, budget)
        if counts is None:
            return
        parts = part_counts(abstract, counts)
        flat = {kind: [np.zeros(n) for n in group_counts(abstract, kind)] for kind in counts}
        sizes = slice_sizes(sizes, choose(flat, counts, parts))
    if job.format != formats.FLAX:
        formats.describe(config, sizes, model.raw_config, job.format)
