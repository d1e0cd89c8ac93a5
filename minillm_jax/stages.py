"""The stages of pruning a loaded model: whole layers, hidden dimensions, then heads and channels, with one record."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from convert import formats, gguf_metadata
from minillm_jax.budget import allocate, expected
from minillm_jax.budget.budget import Counts, by_ratio, choose, kept_count
from minillm_jax.budget.experts import experts_of, sizes_left, width_of
from minillm_jax.data.calibration_size import widest_mlp
from minillm_jax.data.windows import Calibration
from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.work_folder import Part, WorkFolder, computed_once
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import assemble, build
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.streamed import StreamedDecoder, as_model_of
from minillm_jax.model.tree import (
    group_counts,
    hidden_size,
    layer_count,
    named_arrays,
    outer_arrays,
    parameter_count,
    part_counts,
    sizes_of,
)
from minillm_jax.progress import StageProgress, tell
from minillm_jax.pruning.drop_layers import best_layers
from minillm_jax.pruning.experts import Choice, prune_experts
from minillm_jax.pruning.refit import can_compensate, prune_by_obs, resolve, slice_and_refit
from minillm_jax.pruning.slicing import slice_groups, slice_hidden, slice_layers
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.recipes.used import check_streamed
from minillm_jax.scoring.criteria import check_finite
from minillm_jax.scoring.score import ChosenWhilePruning, Scores, hidden_scores, score, summaries
from minillm_jax.scoring.score import resolve as resolve_scoring
from minillm_jax.settings import OF_EXPERTS, Budget, Refit, Scoring
from minillm_jax.version import __version__

RECORDED_PACKAGES = ("jax", "flax", "transformers", "numpy")


def prune_model(
    model: Model,
    calibration: Calibration,
    recipe: Recipe,
    scores: Scores | ChosenWhilePruning | None = None,
    progress: StageProgress | None = None,
    work: WorkFolder | None = None,
) -> Model:
    """A model pruned by a recipe: layers, hidden dimensions, then heads and channels, as far as the recipe names them.

    Args:
      model: the dense model.
      calibration: calibration windows.
      recipe: settings as `recipes.used` completes them.
      scores: of the heads and channels of the dense model; scored by the recipe when None.
      progress: called with how far each stage is.
      work: the folder of the finished work, from which an interrupted pruning continues.

    Raises:
      InputError: a setting does not suit the model, nothing would be removed, or an activation, score or loss is not
        finite.
    """
    budget, parameters, widest = recipe.budget, parameter_count(model.decoder), widest_mlp(model.decoder)
    if isinstance(model.decoder, StreamedDecoder):
        check_streamed(budget, resolve_scoring(recipe.scoring)[1], recipe.output.format)
    if recipe.refit.method == "bias":
        model = with_biases(model)
    shapes = model.decoder.config, sizes_of(model.decoder)
    expected.pruned_sizes(*shapes, budget, recipe.named_by("budget", "layers"))
    smaller, whole = _prune_whole_model(replace(model, record=None), calibration, recipe, progress, work)
    if budget.kinds:
        fits = output_holds(smaller.decoder, smaller.raw_config, recipe.output.format)
        stored = _folder_of_estimate(recipe, work)
        smaller = prune_in_rounds(
            smaller, calibration, recipe.scoring, budget, recipe.refit, scores, progress, stored, fits, work
        )
        smaller, whole = _without_empty_layers(smaller, whole)
    else:
        nothing = Scores({}, asdict(recipe.scoring), calibration.record())
        more = {"rounds": 1, "scores": None, "losses": None, "searched": None}
        smaller = record_pruning(smaller, smaller.decoder, {}, nothing, budget, recipe.refit, more)
    record = {"recipe": recipe.name, "structures": list(budget.structures), **(smaller.record or {}), "whole": whole}
    record |= {"parameters_before": parameters, "parameters_after": parameter_count(smaller.decoder)}
    record |= {"tokens_per_channel": calibration.batches.tokens / widest}
    record |= {} if model.record is None else {"pruned_before": model.record}
    return replace(smaller, record=record)


def _folder_of_estimate(recipe: Recipe, work: WorkFolder | None) -> str | Path | None:
    """The folder of the gradient estimate: the user's, or one in the work folder where an estimate can be resumed."""
    _, estimation = resolve_scoring(recipe.scoring)
    resumable = estimation is not None and estimation.estimator != "exact" and recipe.budget.rounds == 1
    if recipe.output.checkpoint is not None or work is None or not resumable or jax.process_count() > 1:
        return recipe.output.checkpoint
    return work.subfolder("estimate")


def _prune_whole_model(
    model: Model,
    calibration: Calibration,
    recipe: Recipe,
    progress: StageProgress | None,
    work: WorkFolder | None,
) -> tuple[Model, dict[str, Any]]:
    """The structures of which all layers keep equally many: layers, hidden dimensions, experts; and their record."""
    budget, whole = recipe.budget, {}
    ratio, smaller = budget.ratio or 0.0, model
    if "layers" in budget.structures:
        smaller, layers = drop_layers(smaller, calibration, ratio, budget.layers, progress)
        whole["layer"] = {"before": layer_count(model.decoder), "kept": layers}
    if "hidden" in budget.structures:
        smaller, dimensions = narrow(smaller, calibration, recipe.scoring, ratio, budget.round_width_to, progress)
        whole["hidden"] = {"before": hidden_size(model.decoder), "kept": dimensions.tolist()}
    if set(OF_EXPERTS) & set(budget.structures):
        smaller, of_experts = remove_experts(smaller, calibration, recipe, progress, work)
        whole |= of_experts
    return smaller, whole


def _without_empty_layers(model: Model, whole: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The model without the layers that have lost both sublayers and add nothing to the residual stream."""
    decoder, config = model.decoder, model.decoder.config
    heads, channels, experts = (group_counts(decoder, kind) for kind in (*axis_table.KINDS, "expert"))
    kept = [layer for layer, groups in enumerate(zip(heads, channels, experts, strict=True)) if any(groups)]
    adds = config.output_bias or config.mlp_bias or config.norm_after or config.residual_from_norm
    if adds or not kept or len(kept) == len(heads):
        return model, whole
    removed = {"layer": {"before": len(heads), "kept": kept}}
    return replace(model, decoder=slice_layers(decoder, kept)), whole | removed


def prune_groups(
    model: Model,
    scores: Scores | ChosenWhilePruning,
    budget: Budget,
    refit: Refit | None = None,
    calibration: Calibration | None = None,
    progress: StageProgress | None = None,
) -> Model:
    """A model without the groups of the lowest scores, in one round.

    Args:
      model: the dense model.
      scores: one number for every group of the model.
      budget: how many groups are removed, and where.
      refit: how the kept weights make up for the removed ones; not at all by default.
      calibration: the windows for the refit, for measured budgets, and for structured OBS.
      progress: called with how far budget and refit are.

    Raises:
      InputError: the budget is out of its range or cannot be met, the scores belong to another model, or the refit does
        not suit it or has no windows.
    """
    decoder = model.decoder
    refit = resolve(refit or Refit("none"), decoder.config)
    allocated = _allocate(decoder, scores, budget, refit, calibration, progress)
    pruned, kept = _remove(decoder, scores, allocated.counts, refit, calibration, progress)
    more = {"scores": summaries(scores), "losses": allocated.losses, "searched": allocated.searched}
    return record_pruning(model, pruned, kept, scores, budget, refit, more)


def prune_in_rounds(
    model: Model,
    calibration: Calibration,
    scoring: Scoring,
    budget: Budget,
    refit: Refit | None = None,
    scores: Scores | ChosenWhilePruning | None = None,
    progress: StageProgress | None = None,
    checkpoint: str | Path | None = None,
    fits: Callable[[Counts], bool] = lambda counts: True,
    work: WorkFolder | None = None,
) -> Model:
    """Score and prune, in `budget.rounds` rounds with new scores of the smaller model in each.

    The first round decides how many groups each layer keeps in the end. Each round removes its share of the others.

    Args:
      model: the dense model.
      calibration: the windows for everything.
      scoring: the criterion and its settings.
      budget: how many groups are removed, and where.
      refit: after every round; not at all by default.
      scores: of the dense model, for the first round.
      progress: called with how far each stage is.
      checkpoint: see `scoring.score.score`; for a single round.
      fits: whether the output format can hold counts of the allocation `equal`.
      work: the folder of the finished work, from which an interrupted pruning continues.

    Raises:
      InputError: see `prune_groups` and `score`; or the number of rounds does not suit the rest.
    """
    budget.check()
    if budget.rounds > 1 and checkpoint is not None:
        raise InputError(
            "a checkpoint holds one estimate and cannot be used with several rounds; leave out one of the two"
        )
    decoder, rounds = model.decoder, budget.rounds
    refit = resolve(refit or Refit("none"), decoder.config)
    scores = scores or score(model, calibration, scoring, progress, checkpoint)
    allocated = _allocate(decoder, scores, budget, refit, calibration, progress, fits, work)
    more = {"scores": summaries(scores), "losses": allocated.losses, "searched": allocated.searched}
    more |= {"rounds": rounds}
    before = {kind: group_counts(decoder, kind) for kind in scores.kinds}
    parts, kept = part_counts(decoder, scores.kinds), None
    for number, counts in enumerate(allocate.steps_between(before, allocated.counts, parts, rounds)):
        if number:
            scores = score(replace(model, decoder=decoder), calibration, scoring, progress)
        of_round = None if work is None else work.within(f"round-{number}")
        decoder, kept_now = _remove(decoder, scores, counts, refit, calibration, progress, of_round)
        kept = kept_now if kept is None else axis_table.kept_of_kept(kept, kept_now)
    assert kept is not None, "there is at least one round"
    return record_pruning(model, decoder, kept, scores, budget, refit, more)


def _allocate(
    decoder: Decoder,
    scores: Scores | ChosenWhilePruning,
    budget: Budget,
    refit: Refit,
    calibration: Calibration | None,
    progress: StageProgress | None,
    fits: Callable[[Counts], bool] = lambda counts: True,
    work: WorkFolder | None = None,
) -> allocate.Allocated:
    before = {kind: group_counts(decoder, kind) for kind in scores.kinds}
    if isinstance(scores, ChosenWhilePruning):
        groups, per_cost = None, True
    else:
        groups, per_cost = scores.groups, scores.settings.get("within") != "standardised"
        for kind, per_layer in groups.items():
            scored = [len(values) for values in per_layer]
            if scored != before[kind]:
                raise InputError(f"the scores are for {scored} groups of kind {kind}, the model has {before[kind]}")
        check_finite(groups)

    def compute() -> Part:
        arguments = scores.kinds, groups, per_cost, budget, refit, calibration, progress, fits, work
        return Part({}, asdict(allocate.counts_for(decoder, *arguments)))

    allocated = allocate.Allocated.from_note(computed_once(work, "budget", compute).note)
    expected.warn_of_idle_kinds(before, allocated.counts, budget)
    return allocated


def output_holds(decoder: Decoder, raw_config: Mapping[str, Any], format_name: str | None) -> Callable[[Counts], bool]:
    """Whether a format of the output folder can hold the shapes with given numbers of kept groups.

    Args:
      decoder: the dense model; only its shapes are read.
      raw_config: its config.json.
      format_name: of `FORMATS`; None, like `per-layer` and `flax`, holds all shapes.
    """

    def holds(counts: Counts) -> bool:
        if format_name in (None, formats.PER_LAYER, formats.FLAX):
            return True
        sizes = expected.sizes_with(decoder, counts)
        try:
            if format_name == formats.GGUF:
                gguf_metadata.arch_for(decoder.config, sizes)
            else:
                formats.describe(decoder.config, sizes, raw_config, format_name)
        except InputError:
            return False
        return True

    return holds


def _remove(
    decoder: Decoder,
    scores: Scores | ChosenWhilePruning,
    counts: Counts,
    refit: Refit,
    calibration: Calibration | None,
    progress: StageProgress | None,
    work: WorkFolder | None = None,
) -> tuple[Decoder, axis_table.Kept]:
    """The smaller decoder, and the indices of its groups."""
    layer_done = partial(tell, progress, "refit")
    chosen_while_pruning, refitted = isinstance(scores, ChosenWhilePruning), refit.method != "none"
    if calibration is None and (refitted or chosen_while_pruning):
        raise InputError("the refit and the criterion obs walk over calibration windows; give the calibration")
    if isinstance(scores, ChosenWhilePruning):
        assert calibration is not None
        return prune_by_obs(decoder, counts, calibration.batches, refit, layer_done, work)
    kept = hosts.rows_of_first(lambda: choose(scores.groups, counts, part_counts(decoder, scores.kinds)))
    if calibration is not None and refitted:
        return slice_and_refit(decoder, kept, calibration.batches, refit, layer_done, work), kept
    return slice_groups(decoder, kept), kept


def record_pruning(
    model: Model,
    pruned: Decoder,
    kept: axis_table.Kept,
    scores: Scores | ChosenWhilePruning,
    budget: Budget,
    refit: Refit,
    more: Mapping[str, Any],
) -> Model:
    """The pruned model with the record of its pruning, which is saved as pruning.json; `more` is added to it."""
    decoder = model.decoder
    exact = replace(budget, round_heads_to=1, round_width_to=1)
    inventory = allocate.inventory_of(decoder, scores.kinds, exact)
    counts = {kind: [len(rows) for rows in kept[kind]] for kind in scores.kinds}
    asked = by_ratio(inventory, budget.ratio or 0.0) if budget.by_share else counts
    record = {
        "ratio": budget.ratio,
        "budget": asdict(budget) | {"target": budget.target},
        "layers": None if budget.layers is None else [inventory.layers.start, inventory.layers.stop],
        "groups_asked": asked,
        "scoring": scores.settings,
        "refit": asdict(refit),
        "calibration": scores.calibration,
        "estimate": None if scores.estimate is None else scores.estimate.record(),
        "parameters_before": parameter_count(decoder),
        "parameters_after": parameter_count(pruned),
        "kept": {kind: [np.asarray(indices).tolist() for indices in rows] for kind, rows in kept.items()},
        "groups_before": {kind: group_counts(decoder, kind) for kind in kept},
        "versions": versions(),
        "base_model": model.name,
        **more,
    }
    if model.record is not None:
        record["pruned_before"] = model.record
    return replace(model, decoder=pruned, record=record)


def versions() -> dict[str, str]:
    """The versions of this package and of those that decide its numbers."""
    return {"minillm-jax": __version__} | {name: version(name) for name in RECORDED_PACKAGES}


def drop_layers(
    model: Model,
    calibration: Calibration,
    ratio: float,
    layers: tuple[int, int] | None = None,
    progress: StageProgress | None = None,
) -> tuple[Model, list[int]]:
    """A model without a share of its layers, those whose removal leaves the least loss; and the indices of the others.

    Raises:
      InputError: the ratio is not in (0, 1).
    """
    budget = Budget(ratio, structures=("layers",), layers=layers)
    budget.check()
    count = layer_count(model.decoder)
    removable = allocate.layers_of(budget, count)
    keep = count - len(removable) + kept_count(len(removable), ratio)
    kept = best_layers(model.decoder, calibration.batches, keep, removable, partial(tell, progress, "layers"))
    return replace(model, decoder=slice_layers(model.decoder, kept)), kept


def narrow(
    model: Model,
    calibration: Calibration,
    scoring: Scoring,
    ratio: float,
    round_to: int = 1,
    progress: StageProgress | None = None,
) -> tuple[Model, np.ndarray]:
    """A model without a share of its hidden dimensions, those of the lowest scores; and the indices of the others.

    Raises:
      InputError: the ratio is not in (0, 1), or the criterion has no scores for hidden dimensions.
    """
    Budget(ratio, structures=("hidden",), round_width_to=round_to).check()
    scores = {"hidden": [hidden_scores(model, calibration, scoring, progress)]}
    count = kept_count(len(scores["hidden"][0]), ratio, round_to)
    (kept,) = hosts.rows_of_first(lambda: choose(scores, {"hidden": [count]}, {"hidden": [1]}))["hidden"]
    return replace(model, decoder=slice_hidden(model.decoder, kept)), kept


def remove_experts(
    model: Model,
    calibration: Calibration,
    recipe: Recipe,
    progress: StageProgress | None = None,
    work: WorkFolder | None = None,
) -> tuple[Model, dict[str, Any]]:
    """A model with fewer or narrower experts in every layer that has experts; and the record of the kept ones.

    The channels that experts keep are counted in the record, and not listed.

    Raises:
      InputError: the budget does not suit the model (`budget.experts`), or an activation is not finite.
    """
    decoder, scoring = model.decoder, recipe.scoring
    sizes = sizes_of(decoder)
    smaller = sizes_left(decoder.config, sizes, recipe.budget)
    count, keep = (experts_of(decoder.config, one) for one in (sizes, smaller))
    width, kept_width = (width_of(decoder.config, one) for one in (sizes, smaller))
    method = recipe.refit if recipe.refit.method == "least-squares" else Refit("none")
    folder = None if work is None else work.within("experts")
    pruned, kept = prune_experts(
        decoder,
        Choice(keep, kept_width, scoring.expert_criterion, scoring.seed),
        calibration.batches,
        resolve(method, decoder.config),
        partial(tell, progress, "experts"),
        folder,
    )
    record = {}
    if keep < count:
        record["expert"] = {"before": count, "after": keep, "kept": [rows.tolist() for rows in kept["expert"]]}
    if kept_width < width:
        record["expert_channel"] = {"before": width, "after": kept_width}
    return replace(model, decoder=pruned), record


def with_biases(model: Model) -> Model:
    """A LLaMA with biases of zero in all its projections; other models, and models with biases, unchanged."""
    biased = biased_config(model.decoder.config)
    if biased == model.decoder.config:
        return model
    decoder = _biased(model.decoder, biased)
    raw = {**model.raw_config, "attention_bias": True, "mlp_bias": True}
    return replace(model, decoder=decoder, raw_config=raw)


def _biased(decoder: Decoder, biased: DecoderConfig) -> Decoder:
    """A decoder with zeros in the biases that a configuration adds to its own."""
    if isinstance(decoder, StreamedDecoder):
        read, outer = decoder.read, assemble(biased, outer_arrays(decoder), [])
        runs = build(biased, sizes_of(decoder), decoder.embedding.dtype).runs
        return StreamedDecoder(outer, runs, lambda index: _biased(as_model_of(decoder, read(index)), biased).runs[0])
    abstract = build(biased, sizes_of(decoder), decoder.embedding.dtype)
    arrays = dict(named_arrays(decoder))

    def leaf(path: jax.tree_util.KeyPath, shape: Any) -> jax.Array:
        name = axis_table.array_path(path)
        return arrays[name] if name in arrays else jnp.zeros(shape.shape, shape.dtype)

    return sharding.shard(jax.tree_util.tree_map_with_path(leaf, abstract), sharding.mesh_of(decoder))


def biased_config(config: DecoderConfig) -> DecoderConfig:
    """The configuration that refit by bias needs, where the family's class can have biases (LLaMA); else unchanged."""
    if config.family != "llama" or can_compensate(config):
        return config
    return replace(config, qkv_bias=True, output_bias=True, mlp_bias=True)
