"""A whole job, from folder to folder: what the command line's options become, checked early, and run."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np

from convert import formats, writer
from minillm_jax.api import (
    calibrate,
    check_rounds,
    drop_layers,
    load,
    narrow,
    perplexity_of,
    prune_in_rounds,
    recorded,
    save,
    tokens_of,
    with_biases,
)
from minillm_jax.budget import allocate
from minillm_jax.budget.budget import Budget, choose, kept_count
from minillm_jax.data import text as text
from minillm_jax.data import windows
from minillm_jax.data.windows import Calibration
from minillm_jax.devices import hosts, sharding
from minillm_jax.errors import InputError, one_of
from minillm_jax.evaluation import perplexity
from minillm_jax.model import axis_table, costs
from minillm_jax.model.build import build
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, hidden_size, layer_count, part_counts, sizes_of
from minillm_jax.progress import StageProgress
from minillm_jax.pruning.refit import Refit
from minillm_jax.pruning.slicing import slice_sizes
from minillm_jax.scoring.score import Scores, Scoring, check_hidden

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
    refit: Refit = field(default_factory=partial(Refit, "none"))
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
        found = {"heads": axis_table.HEADS[self.heads], "channels": "channel"}
        return tuple(kind for structure, kind in found.items() if structure in self.structures)

    def check(self) -> None:
        """Whether the settings go together, as far as that can be said without the model.

        Raises:
          InputError: they do not.
        """
        one_of("way to count heads", self.heads, axis_table.HEADS)
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
        if whole and not budget.by_share:
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
    before: perplexity.Perplexity | None
    after: perplexity.Perplexity | None
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
    shape = sharding.parse_mesh(job.mesh)
    if job.hosts is not None:
        hosts.initialise_hosts(hosts.parse_hosts(job.hosts))
    writer.check_new(job.output)
    job.check()
    clock = _Clock()
    model = load(job.model, job.dtype, sharding.make(shape))
    costs_before = costs.all_costs(model.decoder, job.budget.window)
    if job.refit.method == "bias":
        model = with_biases(model)
    job.refit.resolve(model.decoder.config)
    _check_writable(model, job)
    calibration = calibrate(model, job.calibration, job.samples, job.length, job.seed)
    held_out = None if job.evaluation is None else windows.cut(tokens_of(model, job.evaluation), job.window)
    clock.lap("load")
    before = None if held_out is None else perplexity_of(model, held_out, progress)
    clock.lap("evaluate")
    pruned = _prune_all(model, job, calibration, progress)
    pruned = replace(pruned, record={**(pruned.record or {}), "parameters_before": costs_before["parameters"]})
    del model  # the dense weights
    clock.lap("prune")
    after = None if held_out is None else perplexity_of(pruned, held_out, progress)
    clock.lap("evaluate")
    costs_after = costs.all_costs(pruned.decoder, job.budget.window)
    planned = writer.planned(pruned, job.format)
    result = Result(job, pruned, planned, dict(clock.seconds), before, after, costs_before, costs_after)
    extra = documents(result) if documents is not None and hosts.is_writer() else {}
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
        rest = (job.refit, job.rounds, progress, job.checkpoint)
        smaller = prune_in_rounds(smaller, calibration, scoring, job.budget, *rest)
    else:
        nothing = Scores({}, asdict(job.scoring), calibration.record())
        more = {"rounds": 1, "scores": None, "losses": None}
        smaller = recorded(smaller, smaller.decoder, {}, nothing, job.budget, job.refit, more)
    record = {"preset": job.preset, "structures": list(job.structures), **(smaller.record or {})}
    record |= {"whole": whole}
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
