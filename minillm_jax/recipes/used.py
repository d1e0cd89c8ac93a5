"""The settings that a run reads: everything else is left out, and a setting that a user gave in vain is an error.

`used` goes through the same decisions as the run, on sections that note which of their fields are read. It builds the
settings of the run from these reads alone, so a field that is not read cannot change the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from minillm_jax.budget.allocate import check_comparable, check_curves
from minillm_jax.data.windows import check_seed
from minillm_jax.errors import InputError, one_of, shortened
from minillm_jax.paths import local_path
from minillm_jax.recipes.recipe import SECTIONS, Recipe
from minillm_jax.scoring import criteria
from minillm_jax.scoring.criteria import Criterion
from minillm_jax.scoring.score import check_hidden, resolve_gradient
from minillm_jax.settings import (
    BOS,
    BY_CURVES,
    EXPERT_CRITERIA,
    MEASURED,
    METHODS,
    OF_EXPERTS,
    SAME_IN_LAYERS,
    SOLVER_CHOICES,
    Budget,
    Data,
    Estimation,
    Evaluation,
    Output,
    Refit,
    Scoring,
    check_continuations,
)

Section = TypeVar("Section")


@dataclass(frozen=True)
class Used:
    """The settings of a run.

    Attributes:
      recipe: the settings, each at its default where the run does not read it.
      keys: section -> the keys that the run reads.
    """

    recipe: Recipe
    keys: Mapping[str, set[str]]


def watched(section: Section, reads: set[str]) -> Section:
    """A copy of a section that adds the name of every field that is read to `reads`."""
    kind, names = type(section), {one.name for one in fields(section)}  # pyright: ignore[reportArgumentType]

    class Watched(kind):
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                reads.add(name)
            return super().__getattribute__(name)

    copy: Any = object.__new__(Watched)
    vars(copy).update(vars(section))
    return copy


def used(recipe: Recipe, given: Mapping[tuple[str, str], str] | None = None) -> Used:
    """The settings that a run of a recipe reads, checked as far as that is possible without the model.

    Args:
      recipe: the recipe.
      given: section and key -> flag, of the settings that a user gave.

    Raises:
      InputError: a setting is out of its range, two do not suit each other, or a given one would do nothing.
    """
    keys: dict[str, set[str]] = {section: set() for section in SECTIONS}
    scored = replace(recipe.scoring, kinds=recipe.budget.kinds or Scoring.kinds)
    recipe = replace(recipe, scoring=scored, budget=replace(recipe.budget, allocation=_allocation(recipe)))
    watch = replace(recipe, **{name: watched(getattr(recipe, name), keys[name]) for name in SECTIONS})
    budget = _budget(watch.budget, recipe)
    criterion, scoring, gradient = _scoring(watch, budget)
    refit = _refit(watch.refit, budget, criterion)
    chosen = replace(
        recipe,
        data=_data(watch.data, criterion, _reads_text(budget, criterion, refit)),
        budget=budget if watch.data.seq_len is None else replace(budget, window=watch.data.seq_len),
        scoring=scoring,
        gradient=gradient or Estimation(),
        refit=refit,
        output=_output(watch.output, budget, gradient),
        devices=replace(recipe.devices, mesh=watch.devices.mesh, hosts=watch.devices.hosts),
        evaluation=_evaluation(watch.evaluation),
    )
    _check_idle(recipe, chosen, criterion, keys, given or {})
    return Used(chosen, keys)


def _budget(budget: Budget, recipe: Recipe) -> Budget:
    budget.check()
    both = [structure for structure in (*OF_EXPERTS, "hidden", "layers") if structure in budget.structures]
    # Experts leave heads and channels their own allocation, of the share of them that the ratio removes.
    shared = budget.counts_groups and budget.kinds and set(both) <= set(OF_EXPERTS)
    if both and not budget.by_share and not shared and budget.structures != ("experts",):
        chosen = recipe.named_by("budget", "allocation")
        named = not budget.uniform and chosen is not None
        way = (
            f"the recipe {shortened(str(chosen))} names another; give --budget uniform"
            if named
            else ("leave out --ratio-of, --budget and targets")
        )
        raise InputError(
            f"the ratio counts groups, the same share in every layer, where {' and '.join(both)} are removed; {way}"
        )
    if budget.layers is not None and both and budget.structures != ("layers",):
        named_by = recipe.named_by("budget", "layers")
        if named_by is not None:
            raise InputError(
                f"the recipe {shortened(named_by)} prunes some layers only, which cannot be done where hidden "
                "dimensions or experts are removed, or layers and another structure; give --layers all"
            )
        raise InputError(
            "--layers cannot be used where hidden dimensions or experts are removed, or layers and another structure"
        )
    heads, width = (
        "heads" in budget.structures,
        bool({"channels", "expert-channels", "hidden"} & set(budget.structures)),
    )
    kept = not budget.by_share and (heads or "channels" in budget.structures)
    return Budget(
        budget.ratio,
        ratio_of="groups" if budget.ratio is None else budget.ratio_of,
        target_params=budget.target_params,
        target_macs=budget.target_macs,
        target_memory=budget.target_memory,
        allocation=budget.allocation if budget.kinds else "uniform",
        structures=budget.structures,
        heads=budget.heads if heads or "attention" in budget.structures else "group",
        layers=budget.layers,
        rounds=budget.rounds if budget.kinds else 1,
        round_heads_to=budget.round_heads_to if heads else 1,
        round_width_to=budget.round_width_to if width else 1,
        round_experts_to=budget.round_experts_to if "experts" in budget.structures else 1,
        keep_at_least=budget.keep_at_least if kept else Budget.keep_at_least,
    )


def _allocation(recipe: Recipe) -> str:
    """The allocation that a user chose, or the one that suits criterion, structures and format."""
    budget = recipe.budget
    if budget.allocation is not None:
        return budget.allocation
    if recipe.scoring.criterion != "obs" or {"hidden", "layers"} & set(budget.structures) or not budget.kinds:
        return "uniform"
    if recipe.output.format not in ("stock", "gguf"):
        return "curves"
    return "equal" if budget.layers is None else "uniform"  # which the shapes alone refuse where they must be equal


def _scoring(recipe: Recipe, budget: Budget) -> tuple[Criterion | None, Scoring, Estimation | None]:
    """The criterion, and its settings; no criterion where only whole layers are removed."""
    hidden, settings = "hidden" in budget.structures, recipe.scoring
    experts = _expert_scoring(recipe, budget)
    if not budget.kinds and not hidden:
        return None, experts, None
    criterion = criteria.resolve(settings, hidden)
    if hidden:
        check_hidden(settings.criterion, criterion)
    if budget.allocation == "global":
        check_comparable(settings.criterion)
    if budget.allocation in BY_CURVES:
        check_curves(settings.criterion, budget.allocation)
    gradient = resolve_gradient(settings.criterion, criterion, recipe.gradient)
    if gradient is not None:
        gradient = replace(gradient, seed=recipe.data.seed)
    by_weights = criterion.by_weights
    scoring = Scoring(
        settings.criterion,
        gradient or Estimation(),
        activation_norm=criterion.norm if by_weights and "activation" in criterion.factors else None,
        within=criterion.within if by_weights else None,
        across=criterion.across if by_weights else None,
        seed=recipe.data.seed if criterion.draws else Scoring.seed,
        factors=criterion.factors if settings.criterion == "fms" else None,
        expert_criterion=experts.expert_criterion,
        kinds=settings.kinds,
    )
    if experts.seed != Scoring.seed:
        scoring = replace(scoring, seed=experts.seed)
    return criterion, scoring, gradient


def _expert_scoring(recipe: Recipe, budget: Budget) -> Scoring:
    """The settings by which experts are chosen; the defaults where none are removed."""
    if "experts" not in budget.structures:
        return Scoring()
    name = recipe.scoring.expert_criterion
    one_of("criterion of experts", name, EXPERT_CRITERIA)
    return Scoring(expert_criterion=name, seed=recipe.data.seed if name == "random" else Scoring.seed)


def _refit(refit: Refit, budget: Budget, criterion: Criterion | None) -> Refit:
    """What each method reads; structured OBS reads target, ridge and solver whatever is refitted afterwards."""
    if not budget.kinds:
        return _refit_of_experts(refit) if set(OF_EXPERTS) & set(budget.structures) else Refit("none")
    one_of("refit", refit.method, METHODS)
    least_squares, obs = refit.method == "least-squares", criterion is not None and criterion.while_pruning
    solves = least_squares or obs
    if solves:
        one_of("solver", refit.solver, SOLVER_CHOICES)
    return Refit(
        refit.method,
        alpha=refit.alpha if solves or refit.method == "bias" else None,
        ridge=refit.ridge if solves else Refit.ridge,
        inputs=refit.inputs if least_squares else None,
        solver=refit.solver if solves else Refit.solver,
    )


def _refit_of_experts(refit: Refit) -> Refit:
    """What the refit of experts reads."""
    one_of("refit", refit.method, METHODS)
    if refit.method == "bias":
        raise InputError("--refit bias is a refit of heads and channels; use least-squares or none for experts")
    if refit.method == "none":
        return Refit("none")
    return Refit(refit.method, alpha=refit.alpha, ridge=refit.ridge)


def _reads_text(budget: Budget, criterion: Criterion | None, refit: Refit) -> bool:
    if criterion is None or "layers" in budget.structures or budget.allocation in MEASURED:
        return True
    return criterion.reads_text or refit.method != "none"


def _data(data: Data, criterion: Criterion | None, reads_text: bool) -> Data:
    """Every run draws windows, but their number and seed matter only where something is computed on them."""
    seed = Data.seed
    if reads_text or (criterion is not None and criterion.draws):
        seed = data.seed
        check_seed(seed)
    one_of("place of the token --bos", data.bos, BOS)
    return Data(data.calibration, data.samples if reads_text else 1, data.seq_len, seed, data.field, data.bos)


def _output(output: Output, budget: Budget, gradient: Estimation | None) -> Output:
    if gradient is None or not budget.kinds:  # hidden dimensions are scored without a checkpoint
        checkpoint = None
    else:
        checkpoint = output.checkpoint
        if checkpoint is not None:
            local_path(checkpoint, "checkpoint folder")
        if checkpoint is not None and gradient.estimator == "exact":
            raise InputError("the exact gradient is one pass and cannot be resumed; leave out --checkpoint")
        if checkpoint is not None and budget.rounds > 1:
            raise InputError(
                "a checkpoint holds one estimate and cannot be used with several rounds; leave out one of the two"
            )
    some_layers = budget.allocation == "equal" and budget.layers is not None
    if output.format == "stock" and (budget.allocation not in SAME_IN_LAYERS or some_layers):
        raise InputError(
            f"{budget.allocation} budgets keep unequal numbers in the layers, which no stock class can hold; use the "
            "format per-layer or padded, or --budget equal"
        )
    size = Output.max_shard_size if output.format in ("flax", "gguf") else output.max_shard_size
    gguf_type = output.gguf_type if output.format == "gguf" else None
    if output.stream:
        check_streamed(budget, gradient, output.format)
    return Output(output.format, size, output.dtype, checkpoint, gguf_type, output.stream)


def check_streamed(budget: Budget, gradient: Estimation | None, format_name: str | None) -> None:
    """Check that a run needs one layer of the model at a time, and never all of its weights.

    Args:
      budget: of the run.
      gradient: the gradient estimate; None for a criterion that reads none.
      format_name: of the output.

    Raises:
      InputError: it needs all weights.
    """
    whole = [structure for structure in ("hidden", "layers") if structure in budget.structures]
    if gradient is not None and gradient.estimator == "exact":
        what = "the exact gradient needs"
    elif whole:
        what = f"the removal of {' and '.join(whole)} needs"
    elif budget.allocation in ("search", "measured"):
        what = f"--budget {budget.allocation} needs"
    elif format_name == "flax":
        what = "the format flax needs"
    else:
        return
    raise InputError(
        f"{what} all weights of the model in memory, and --stream reads one layer at a time; use --estimator spsa or "
        "jvp, --structures heads,channels, --budget curves, equal or uniform, and another format"
    )


def _evaluation(evaluation: Evaluation) -> Evaluation:
    if evaluation.text is None:
        return Evaluation()
    check_continuations(evaluation.continuations)
    return Evaluation(evaluation.text, evaluation.window, evaluation.continuations)


def _check_idle(
    recipe: Recipe,
    chosen: Recipe,
    criterion: Criterion | None,
    keys: Mapping[str, set[str]],
    given: Mapping[tuple[str, str], str],
) -> None:
    """Whether the run reads every setting that a user gave, and keeps its value."""
    for (section, key), flag in given.items():
        value, kept = (getattr(getattr(settings, section), key) for settings in (recipe, chosen))
        if key not in keys[section] or value != kept:
            raise InputError(
                f"{flag} would do nothing in this run ({_reason(recipe, section, criterion)}); leave it out"
            )


def _reason(recipe: Recipe, section: str, criterion: Criterion | None) -> str:
    """The choices that decide whether a section's settings are read."""
    structures = f"structures {','.join(recipe.budget.structures)}"
    if criterion is None and section in ("scoring", "gradient", "refit"):
        return structures
    scoring = recipe.scoring
    reasons = {
        "data": f"criterion {scoring.criterion}, refit {recipe.refit.method}",
        "budget": f"{structures}, budget {recipe.budget.allocation}",
        "scoring": f"criterion {scoring.criterion}",
        "gradient": _gradient_reason(recipe, criterion),
        "refit": f"refit {recipe.refit.method}, criterion {scoring.criterion}, {structures}",
        "output": f"{structures}, criterion {scoring.criterion}"
        + (f", format {recipe.output.format}" if recipe.output.format is not None else ""),
        "evaluation": "no --evaluate",
    }
    return reasons.get(section, "it is not read")


def _gradient_reason(recipe: Recipe, criterion: Criterion | None) -> str:
    scoring, gradient = recipe.scoring, recipe.gradient
    words = [f"criterion {scoring.criterion}"]
    if scoring.factors is not None:
        words.append(f"factors {','.join(scoring.factors)}")
    if criterion is not None and criterion.takes_gradient:
        words.append(f"estimator {gradient.estimator or criterion.estimator}")
        words.append(f"space {gradient.space or ('gates' if criterion.by_gates else 'weights')}")
    return ", ".join(words)
