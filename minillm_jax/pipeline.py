"""The job in one readable page: load, calibrate, score, prune, save.

>>> model = load("path/or/hub-id")
>>> calibration = calibrate(model, "text.txt")
>>> scores = score(model, calibration, Scoring("obs"))
>>> pruned = prune(model, scores, ratio=0.2, restoration=Restoration(), calibration=calibration)
>>> save(pruned, "pruned")
"""

import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from convert import formats, reader, writer
from minillm_jax import __version__, groups, loss, mesh
from minillm_jax import calibration as text
from minillm_jax.calibration import Calibration
from minillm_jax.decoder import Decoder, group_counts, layer_count, parameter_count, sizes_of
from minillm_jax.errors import InputError
from minillm_jax.model import Model
from minillm_jax.progress import StageProgress, tell
from minillm_jax.scoring import Scores, Scoring, score
from minillm_jax.select.budget import kept_count, select_local
from minillm_jax.shrink.restore import Restoration, prune_by_obs, restore
from minillm_jax.shrink.slicing import slice_groups, slice_sizes

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
    ratio: float,
    layers: range | None = None,
    round_heads_to: int = 1,
    round_width_to: int = 1,
    restoration: Restoration | None = None,
    calibration: Calibration | None = None,
    progress: StageProgress | None = None,
) -> Model:
    """Remove the groups with the lowest scores, the same ratio in every layer and for every kind.

    In each layer floor(n · ratio + 1/2) of the n groups of a kind go; at least one stays.

    Args:
      model: the dense model.
      scores: one number for every group of it.
      ratio: share of the groups that goes, in (0, 1).
      layers: the layers to prune, `range(4, 30)` for example; all by default.
      round_heads_to: keep a multiple of this many key/value heads in a pruned layer, rounding up, where there are as
        many: tensor parallelism wants its degree.
      round_width_to: the same for MLP channels: hardware wants 64 or 128.
      restoration: how what stays takes over from what goes; not at all by default.
      calibration: the windows for the restoration, and for the criterion `obs`, which chooses while it prunes.
      progress: told how far the walk over the layers is, where there is one.

    Raises:
      InputError: the ratio is outside (0, 1), the layers are not the model's, the scores belong to another model, or
        the restoration does not suit it or has no windows.
    """
    decoder = model.decoder
    _check_layers(layers, layer_count(decoder))
    for kind, per_layer in scores.groups.items():
        found, expected = [len(values) for values in per_layer], group_counts(decoder, kind)
        if found != expected:
            raise InputError(f"the scores are for {found} groups of kind {kind}, the model has {expected}")
    rounding = {"head": round_heads_to, "channel": round_width_to}
    kept = select_local(scores.groups, ratio, layers, rounding)
    restoration = (restoration or Restoration("none")).resolve(decoder.config)
    pruned, kept = _shrink(decoder, scores, kept, restoration, calibration, progress)
    record = {
        "ratio": float(ratio),
        "rounded_to": rounding,
        "groups_asked": _asked(decoder, ratio, layers),
        "layers": None if layers is None else [layers.start, layers.stop],
        "scoring": scores.settings,
        "restoration": asdict(restoration),
        "calibration": scores.calibration,
        "estimate": None if scores.estimate is None else scores.estimate.record(),
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


def _shrink(
    decoder: Decoder,
    scores: Scores,
    kept: groups.Kept,
    restoration: Restoration,
    calibration: Calibration | None,
    progress: StageProgress | None,
) -> tuple[Decoder, groups.Kept]:
    """The smaller decoder, and what it kept."""
    on_the_way = scores.settings.get("criterion") == "obs"
    if restoration.method == "none" and not on_the_way:
        return slice_groups(decoder, kept), kept
    if calibration is None:
        raise InputError("restoration and the criterion obs walk over calibration windows; give the calibration")
    told = partial(tell, progress, "restoration")
    if on_the_way:
        counts = {kind: [len(indices) for indices in rows] for kind, rows in kept.items()}
        return prune_by_obs(decoder, counts, calibration.windows, restoration, told)
    return restore(decoder, kept, calibration.windows, restoration, told), kept


def _asked(decoder: Decoder, ratio: float, layers: range | None) -> dict[str, list[int]]:
    """How many groups of every layer the ratio keeps, before rounding."""
    counts = {kind: group_counts(decoder, kind) for kind in groups.KINDS}
    return {
        kind: [kept_count(n, ratio) if layers is None or layer in layers else n for layer, n in enumerate(row)]
        for kind, row in counts.items()
    }


def save(
    model: Model,
    output: str | Path,
    format: str | None = None,  # noqa: A002  the name of the option
    max_shard_size: str = writer.MAX_SHARD_SIZE,
) -> writer.Written:
    """Write a folder that transformers loads, or a Flax checkpoint, with `pruning.json` beside the weights.

    Args:
      model: the model.
      output: folder to write, which must not exist.
      format: `stock`, `per-layer`, `padded` or `flax` (see `convert.formats`); by default `stock` where the family's
        own class holds the shapes, else `per-layer`.
      max_shard_size: of the weight files.

    Returns:
      The format that was written, and how many parameters the files hold.

    Raises:
      InputError: the folder exists, or the format cannot hold the shapes.
    """
    return writer.write_model(model, output, format, max_shard_size)


def evaluate(
    model: Model, source: str | Path, window: int = 128, bos: bool = False, progress: StageProgress | None = None
) -> loss.Perplexity:
    """Perplexity over the non-overlapping windows of a whole text, W - 1 predictions a window.

    Raises:
      InputError: the source cannot be used, or is shorter than one window.
    """
    return _perplexity(model, text.cut(_tokens(model, source, bos), window), progress)


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
    restoration: Restoration = field(default_factory=partial(Restoration, "none"))
    preset: str | None = None
    layers: tuple[int, int] | None = None
    evaluation: str | None = None
    window: int = 128
    dtype: str | None = None
    round_heads_to: int = 1
    round_width_to: int = 1
    format: str | None = None
    max_shard_size: str = writer.MAX_SHARD_SIZE
    checkpoint: str | None = None
    mesh: str | None = None
    hosts: str | None = None


@dataclass(frozen=True)
class Result:
    """What a job came to."""

    job: Job
    pruned: Model
    written: writer.Written
    seconds: dict[str, float]
    before: loss.Perplexity | None
    after: loss.Perplexity | None


def run(job: Job, progress: StageProgress | None = None) -> Result:
    """Prune one model from folder to folder. Everything that can be checked early is checked before any work.

    Raises:
      InputError: see the steps above; nothing has been written then.
    """
    shape = mesh.parse_mesh(job.mesh)
    if job.hosts is not None:
        mesh.initialise_hosts(mesh.parse_hosts(job.hosts))
    writer.check_new(job.output)
    job.scoring.resolve()
    select_local({}, job.ratio, round_to={"head": job.round_heads_to, "channel": job.round_width_to})
    formats.check_format(job.format)
    writer.check_shard_size(job.max_shard_size)
    clock = _Clock()
    model = load(job.model, job.dtype, mesh.make(shape))
    layers = None if job.layers is None else range(*job.layers)
    job.restoration.resolve(model.decoder.config)
    _check_writable(model, job, layers)
    calibration = calibrate(model, job.calibration, job.samples, job.length, job.seed)
    held_out = None if job.evaluation is None else text.cut(_tokens(model, job.evaluation), job.window)
    clock.lap("load")
    before = None if held_out is None else _perplexity(model, held_out, progress)
    clock.lap("evaluate")
    scores = score(model, calibration, job.scoring, progress, job.checkpoint)
    clock.lap("score")
    rounding = (job.round_heads_to, job.round_width_to)
    pruned = prune(model, scores, job.ratio, layers, *rounding, job.restoration, calibration, progress)
    pruned = replace(pruned, record={"preset": job.preset, **(pruned.record or {})})
    del model  # the dense weights
    clock.lap("prune")
    after = None if held_out is None else _perplexity(pruned, held_out, progress)
    clock.lap("evaluate")
    written = save(pruned, job.output, job.format, job.max_shard_size)
    clock.lap("save")
    return Result(job, pruned, written, clock.seconds, before, after)


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


def _check_layers(layers: range | None, count: int) -> None:
    if layers is not None and (layers.step != 1 or not 0 <= layers.start < layers.stop <= count):
        raise InputError(
            f"layers {layers.start}:{layers.stop} are not a range of this model's layers; it has 0:{count}"
        )


def _check_writable(model: Model, job: Job, layers: range | None) -> None:
    """Whether the pruned shapes can be saved in the format asked for, found out from the shapes alone."""
    decoder = model.decoder
    _check_layers(layers, layer_count(decoder))
    flat = {kind: [np.zeros(n) for n in group_counts(decoder, kind)] for kind in groups.KINDS}
    kept = select_local(flat, job.ratio, layers, {"head": job.round_heads_to, "channel": job.round_width_to})
    if job.format != formats.FLAX:
        sizes = slice_sizes(sizes_of(decoder), kept)
        formats.describe(decoder.config, sizes, model.raw_config, job.format)
