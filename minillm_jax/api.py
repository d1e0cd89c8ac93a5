"""The job in one readable page: load, calibrate, score, prune, save.

>>> model = load("path/or/hub-id")
>>> calibration = calibrate(model, "text.txt")
>>> scores = score(model, calibration, Scoring("obs"))
>>> pruned = prune(model, scores, 0.2, refit=Refit(), calibration=calibration)
>>> save(pruned, "pruned")
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh

from convert import reader, writer
from minillm_jax import __version__
from minillm_jax.budget import allocate
from minillm_jax.budget.budget import Budget, Counts, by_ratio, choose, kept_count
from minillm_jax.data import text as text
from minillm_jax.data import windows
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.evaluation import perplexity
from minillm_jax.model import axis_table
from minillm_jax.model.build import build
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, layer_count, named_arrays, parameter_count, part_counts, sizes_of
from minillm_jax.progress import StageProgress, tell
from minillm_jax.pruning.drop_layers import best_layers
from minillm_jax.pruning.refit import Refit, can_compensate, prune_by_obs, slice_and_refit
from minillm_jax.pruning.slicing import slice_groups, slice_hidden, slice_layers
from minillm_jax.scoring.score import Scores, Scoring, hidden_scores, score, summaries

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
    drawn = windows.sample(tokens_of(model, source), samples, length, seed)
    return Calibration(Batches(drawn, sharding.of(model.decoder)), str(source), seed)


def prune(
    model: Model,
    scores: Scores,
    ratio: float | Budget,
    refit: Refit | None = None,
    calibration: Calibration | None = None,
    progress: StageProgress | None = None,
) -> Model:
    """Remove the groups with the lowest scores.

    Args:
      model: the dense model.
      scores: one number for every group of it.
      ratio: share of the groups that goes, in (0, 1), the same in every layer and for every kind: floor(n · ratio +
        1/2) of the n groups of a kind go, and at least one stays. Or a `Budget`, which says more.
      refit: how what stays takes over from what goes; not at all by default.
      calibration: the windows for the refit, for measured budgets, and for the criterion `obs`, which chooses
        while it prunes.
      progress: told how far budget and refit are.

    Raises:
      InputError: the budget is out of its range or cannot be met, the scores belong to another model, or the
        refit does not suit it or has no windows.
    """
    budget = ratio if isinstance(ratio, Budget) else Budget(ratio)
    decoder = model.decoder
    refit = (refit or Refit("none")).resolve(decoder.config)
    final = _counts(decoder, scores, budget, refit, calibration, progress)
    pruned, kept = _shrink(decoder, scores, final.counts, refit, calibration, progress)
    more = {"scores": summaries(scores), "losses": final.losses}
    return recorded(model, pruned, kept, scores, budget, refit, more)


def with_biases(model: Model) -> Model:
    """The same model with biases of zero in all its projections, where its class can have them (LLaMA); else itself."""
    config = model.decoder.config
    if config.family != "llama" or can_compensate(config):
        return model
    changed = replace(config, qkv_bias=True, output_bias=True, mlp_bias=True)
    abstract = build(changed, sizes_of(model.decoder), model.decoder.embedding.dtype)
    arrays = dict(named_arrays(model.decoder))

    def leaf(path: jax.tree_util.KeyPath, shape: Any) -> jax.Array:
        name = axis_table.array_path(path)
        return arrays[name] if name in arrays else jnp.zeros(shape.shape, shape.dtype)

    decoder = sharding.shard(jax.tree_util.tree_map_with_path(leaf, abstract), sharding.of(model.decoder))
    raw = {**model.raw_config, "attention_bias": True, "mlp_bias": True}
    return replace(model, decoder=decoder, raw_config=raw)


def prune_in_rounds(
    model: Model,
    calibration: Calibration,
    scoring: Scoring,
    budget: Budget,
    refit: Refit | None = None,
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
      refit: how what stays takes over, in every round; not at all by default.
      rounds: how many; with one, this is `score` and `prune`.
      progress: told how far each stage is.
      checkpoint: see `score`; for one round only.

    Raises:
      InputError: see `score` and `prune`.
    """
    check_rounds(rounds, checkpoint)
    refit = (refit or Refit("none")).resolve(model.decoder.config)
    scores = score(model, calibration, scoring, progress, checkpoint)
    final = _counts(model.decoder, scores, budget, refit, calibration, progress)
    stock = allocate.stock_of(model.decoder, scoring.kinds, budget)
    more = {"rounds": rounds, "scores": summaries(scores), "losses": final.losses}
    decoder, kept = model.decoder, None
    for number, counts in enumerate(allocate.steps_between(stock.counts, final.counts, stock.parts, rounds)):
        if number:
            scores = score(replace(model, decoder=decoder), calibration, scoring, progress)
        decoder, stay = _shrink(decoder, scores, counts, refit, calibration, progress)
        kept = stay if kept is None else axis_table.kept_of_kept(kept, stay)
    assert kept is not None, "there is at least one round"
    return recorded(model, decoder, kept, scores, budget, refit, more)


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
    refit: Refit,
    calibration: Calibration | None,
    progress: StageProgress | None,
) -> allocate.Allocated:
    for kind, per_layer in scores.groups.items():
        found, expected = [len(values) for values in per_layer], group_counts(decoder, kind)
        if found != expected:
            raise InputError(f"the scores are for {found} groups of kind {kind}, the model has {expected}")
    per_cost = scores.settings.get("within") != "standardised"
    return allocate.counts_for(
        decoder, scores.groups, scores.on_the_way, per_cost, budget, refit, calibration, progress
    )


def _shrink(
    decoder: Decoder,
    scores: Scores,
    counts: Counts,
    refit: Refit,
    calibration: Calibration | None,
    progress: StageProgress | None,
) -> tuple[Decoder, axis_table.Kept]:
    """The smaller decoder, and what it kept."""
    told = partial(tell, progress, "refit")
    refitted = refit.method != "none"
    if calibration is None and (refitted or scores.on_the_way):
        raise InputError("refit and the criterion obs walk over calibration windows; give the calibration")
    if calibration is not None and scores.on_the_way:
        return prune_by_obs(decoder, counts, calibration.batches, refit, told)
    kept = choose(scores.groups, counts, part_counts(decoder, scores.groups))
    if calibration is not None and refitted:
        return slice_and_refit(decoder, kept, calibration.batches, refit, told), kept
    return slice_groups(decoder, kept), kept


def recorded(
    model: Model,
    pruned: Decoder,
    kept: axis_table.Kept,
    scores: Scores,
    budget: Budget,
    refit: Refit,
    more: Mapping[str, Any],
) -> Model:
    """The pruned model, with what was done to it, and what more there is to be said of that."""
    decoder = model.decoder
    kinds = tuple(scores.groups)
    exactly = allocate.stock_of(decoder, kinds, replace(budget, round_heads_to=1, round_width_to=1))
    found = {kind: [len(rows) for rows in kept[kind]] for kind in kinds}
    asked = by_ratio(exactly, budget.ratio or 0.0) if budget.by_share else found
    record = {
        "ratio": budget.ratio,
        "budget": asdict(budget),
        "layers": None if budget.layers is None else [exactly.layers.start, exactly.layers.stop],
        "groups_asked": asked,
        "scoring": scores.settings,
        "refit": asdict(refit),
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
    kept = best_layers(model.decoder, calibration.batches, keep, among, told)
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
) -> perplexity.Perplexity:
    """Perplexity over the non-overlapping windows of a whole text, W - 1 predictions a window.

    Raises:
      InputError: the source cannot be used, or is shorter than one window.
    """
    return perplexity_of(model, windows.cut(tokens_of(model, source, bos), window), progress)


def perplexity_of(model: Model, held_out: np.ndarray, progress: StageProgress | None = None) -> perplexity.Perplexity:
    """Over windows of token ids."""
    batches = Batches(held_out, sharding.of(model.decoder))
    return perplexity.perplexity(model.decoder, batches, partial(tell, progress, "perplexity"))


def tokens_of(model: Model, source: str | Path, bos: bool = False) -> text.Tokens:
    """All tokens of a source, by the model's tokenizer.

    Raises:
      InputError: the source cannot be used.
    """
    return text.read_tokens(source, model.folder, model.decoder.embedding.shape[0], bos)
