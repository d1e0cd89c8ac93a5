"""One run from folder to folder: checked early, then load, calibrate, evaluate, prune, save, evaluate, document.

The pruned weights are saved before anything else is done with them. A failure of the evaluation or of the report then
costs nothing but the figures. Finished layers lie in a work folder beside the output until then, so that the same
command continues an interrupted run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

import minillm_jax.hidden  # noqa: F401  before the first import of convert
from convert import folders, formats, gguf_write, multimodal, reader, writer
from minillm_jax import plan as plans
from minillm_jax.api import calibrate, evaluate, held_out, load, save
from minillm_jax.budget import allocate
from minillm_jax.budget.expected import sizes_with
from minillm_jax.data.batches import Batches
from minillm_jax.data.documents import check_source
from minillm_jax.data.mixture import check_one_text, shares_of
from minillm_jax.data.windows import Calibration
from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.work_folder import WorkFolder
from minillm_jax.errors import InputError, LastSteps, size_text, warn
from minillm_jax.evaluation.layer_errors import WINDOWS, LayerErrors, layer_errors
from minillm_jax.evaluation.perplexity import Perplexity
from minillm_jax.generating import continuations
from minillm_jax.model import costs
from minillm_jax.model.build import build, without_layers
from minillm_jax.model.digest import tree_digest
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import hidden_size, layer_count
from minillm_jax.progress import Clock, StageProgress
from minillm_jax.pruning.refit import resolve
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.recipes.sized import filled, sized, warn_of_few_tokens
from minillm_jax.recipes.used import Used, check_streamed, used
from minillm_jax.scoring.score import resolve as resolve_scoring
from minillm_jax.settings import SAME_IN_LAYERS
from minillm_jax.stages import biased_config, output_holds, prune_model, versions

RECIPE_FILE = "recipe.toml"


@dataclass(frozen=True)
class Job:
    """Everything `run` needs.

    Attributes:
      model: a folder or a Hub id.
      output: folder to write, which must not exist.
      recipe: all settings, the calibration text among them.
      given: section and key -> flag, of the settings that a user gave beside the recipe.
      revision: branch, tag or commit of the model on the Hub.
    """

    model: str
    output: str
    recipe: Recipe = field(default_factory=Recipe)
    given: Mapping[tuple[str, str], str] = field(default_factory=dict)
    revision: str | None = None

    def check(self) -> Used:
        """The settings that the run reads, checked as far as that is possible without the model.

        Raises:
          InputError: a setting is out of its range, two do not suit each other, or a given one would do nothing.
        """
        settings = used(self.recipe, self.given)
        formats.check_format(settings.recipe.output.format)
        writer.check_shard_size(settings.recipe.output.max_shard_size)
        gguf_write.check_type(settings.recipe.output.gguf_type)
        if settings.recipe.output.format == formats.GGUF and self.output:
            writer.check_gguf_folder(self.output)
        if settings.recipe.data.calibration is None:
            raise InputError("no calibration text is given; name a file or a Hub data set with --calibration")
        return settings


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
      job: the job, with the settings that the run read.
      pruned: the model that was written.
      written: format of the folder, and how many parameters its files hold.
      seconds: of each stage.
      before: perplexity of the dense model, None where none was measured.
      after: perplexity of the pruned model.
      costs_before: costs of the dense model, by measure (`costs.MEASURES`), for a window of `budget.window` tokens.
      costs_after: costs of the pruned model.
      texts: of both models behind beginnings of the evaluation text, see `generating.continuations`.
      errors: of every layer, on windows of the evaluation text, or else of the calibration text.
    """

    job: Job
    pruned: Model
    written: writer.Written
    seconds: dict[str, float]
    before: Perplexity | None
    after: Perplexity | None
    costs_before: dict[str, int]
    costs_after: dict[str, int]
    errors: LayerErrors | None = None
    texts: Sequence[Mapping[str, str]] = ()


# Texts to write beside the weights, by file name.
Documents = Callable[[Result], Mapping[str, str]]


def run(job: Job, progress: StageProgress | None = None, documents: Documents | None = None) -> Result:
    """Prune one model from folder to folder.

    Args:
      job: model, output folder, settings.
      progress: called with how far each stage is.
      documents: called by process 0 after the last measurement; its texts are added to the folder.

    Raises:
      InputError: see `Job.check`; or the model or a text cannot be used. No folder has been written then. Or the pruned
        model is saved, but a later measurement or document failed; the message says so.
    """
    settings = job.check()
    recipe = settings.recipe
    shape = sharding.parse_mesh(recipe.devices.mesh)
    if recipe.devices.hosts is not None:
        hosts.initialise_hosts(hosts.parse_hosts(recipe.devices.hosts))
    writer.check_new(job.output, job.model)
    clock = Clock()
    described = reader.describe_model(job.model, recipe.output.dtype, job.revision)
    recipe = sized(settings.recipe, described.abstract)
    needed = check_model(described, recipe)
    hosts.check_same("settings", (job.model, recipes.to_toml(recipe, settings.keys), versions()))
    calibration, measured_on = _texts(described, job, settings.recipe)
    recipe = _of_windows(described, settings.recipe, calibration.batches)
    if needed is not None:
        writer.check_space(job.output, needed)
    stream, mesh = streams(described, settings.recipe), sharding.make_mesh(shape)
    model = load(job.model, recipe.output.dtype, mesh, job.revision, stream)
    calibration = replace(calibration, batches=replace(calibration.batches, mesh=sharding.mesh_of(model.decoder)))
    costs_before = costs.all_costs(model.decoder, recipe.budget.window)
    warn_of_few_tokens(recipe, calibration.batches, model.decoder)
    clock.lap("load")
    before = _measured(model, measured_on, progress)
    clock.lap("evaluate")
    work = WorkFolder.of(
        f"{job.output.rstrip('/')}.checkpoint", _identity(settings, recipe, model, calibration), "a pruning"
    )
    pruned = prune_model(model, calibration, recipe, progress=progress, work=work)
    clock.lap("prune")
    repeats = {RECIPE_FILE: _written_recipe(job, replace(settings, recipe=recipe), pruned, calibration)}
    output = recipe.output
    written = save(pruned, job.output, output.format, output.max_shard_size, repeats, output.gguf_type)
    work.remove()
    if stream:  # its layers were in the work folder
        pruned = replace(pruned, decoder=load(job.output, output.dtype, mesh, stream=True).decoder)
    clock.lap("save")
    last = LastSteps(f"the pruned model is saved in {job.output}")
    seen = calibration.batches if measured_on is None else measured_on
    errors = last.attempt("the errors of its layers were not measured", partial(errors_of, model, pruned, seen))
    written_texts = last.attempt(
        "its texts were not written",
        lambda: continuations_of(
            {"dense": model, "pruned": pruned}, measured_on, 0 if stream else recipe.evaluation.continuations
        ),
    )
    del model  # the dense weights
    clock.lap("evaluate")
    costs_after = costs.all_costs(pruned.decoder, recipe.budget.window)
    done = replace(job, recipe=recipe)
    result = Result(
        done, pruned, written, clock.seconds, before, None, costs_before, costs_after, errors, written_texts or []
    )
    after = last.attempt("its perplexity was not measured", partial(_measured, pruned, measured_on, progress))
    clock.lap("evaluate")
    result = replace(result, after=after)
    if documents is not None and hosts.is_writer():
        last.attempt("its report was not written", lambda: folders.add_texts(job.output, documents(result)))
    last.check()
    return result


def streams(described: reader.Description, recipe: Recipe) -> bool:
    """Whether the layers are read one at a time: if that is asked for, or if the model would not fit and it can be.

    All processes must call it.
    """
    if recipe.output.stream:
        return True
    _, gradient = resolve_scoring(recipe.scoring)
    try:
        check_streamed(recipe.budget, gradient, recipe.output.format)
    except InputError:
        return False
    plan = plans.plan(described, described.folder.name, recipe)
    stored = (described.folder / reader.FLAX_WEIGHTS).is_dir()
    larger = hosts.of_first(lambda: {"than the memory": np.bool_(plan.fits is False and not stored)})
    if larger["than the memory"]:
        memory = size_text(plan.device_memory or 0)
        warn(
            f"the run needs {size_text(plan.device_bytes)} of memory and there are {memory}; one layer is read at a "
            "time, as with --stream"
        )
    return bool(larger["than the memory"])


def _identity(settings: Used, recipe: Recipe, model: Model, calibration: Calibration) -> dict[str, Any]:
    """Whatever decides the pruned weights, by name; each finished layer knows the weights that it was made from."""
    table = recipes.as_table(recipe, settings.keys)
    sections = ("budget", "scoring", "gradient", "refit")
    flat = {f"{name}.{key}": value for name in sections for key, value in table.get(name, {}).items()}
    outer = tree_digest(without_layers(model.decoder), repr(model.decoder.config))
    return flat | versions() | {"calibration text": calibration.fingerprint()[:16], "model": outer[:16]}


def _measured(model: Model, windows: Batches | None, progress: StageProgress | None) -> Perplexity | None:
    return None if windows is None else evaluate(model, windows, progress=progress)


def continuations_of(models: Mapping[str, Model], windows: Batches | None, count: int) -> list[dict[str, str]]:
    """`generating.continuations`; none without an evaluation text."""
    return [] if windows is None else continuations(models, windows, count)


def errors_of(dense: Model, pruned: Model, windows: Batches) -> LayerErrors | None:
    """The error of every layer, on the first windows of a text; None for a model that is not pruned from the dense one.

    Both models are in memory already when a run measures it, and two residual streams of a few windows take less memory
    than the walk of a refit over all calibration windows.

    Args:
      dense: the dense model.
      pruned: the pruned model, whose record says which layers and hidden dimensions are kept.
      windows: of the text.
    """
    record = pruned.record or {}
    whole, counts = record.get("whole", {}), {"layer": layer_count, "hidden": hidden_size}
    for kind, count in counts.items():
        before = whole[kind]["before"] if kind in whole else count(pruned.decoder)
        if before != count(dense.decoder):
            return None
    layers, dimensions = (whole[kind]["kept"] if kind in whole else None for kind in counts)
    batches = replace(windows.first(WINDOWS), mesh=sharding.mesh_of(dense.decoder))
    return layer_errors(dense.decoder, pruned.decoder, batches, layers, dimensions)


def check_model(described: reader.Description, recipe: Recipe) -> int | None:
    """Check that the pruned shapes can be reached and saved, from the shapes of the dense model alone.

    The counts of unequal budgets are not known yet; the format per-layer holds them all.

    Returns:
      The bytes of the weight files; None where scores or losses decide the shapes.

    Raises:
      InputError: they cannot.
    """
    multimodal.check_format(described.raw_config, recipe.output.format)
    config = described.abstract.config
    if recipe.refit.method == "bias":
        config = biased_config(config)
    if recipe.budget.kinds:
        resolve(recipe.refit, config)
    if recipe.output.format == formats.GGUF:
        gguf_write.check(config, described.folder, described.sizes.V, recipe.budget.allocation not in SAME_IN_LAYERS)
    sizes = plans.pruned_sizes(config, described.sizes, recipe)
    if sizes is not None:
        return plans.output_format(config, sizes, described, recipe.output)[1]
    abstract = build(config, described.sizes)
    choices = list(allocate.possible(abstract, recipe.budget.kinds, recipe.budget))
    if not any(map(output_holds(abstract, described.raw_config, recipe.output.format), choices)):
        plans.output_format(config, sizes_with(abstract, choices[0]), described, recipe.output)  # says why not
    return None


def _texts(described: reader.Description, job: Job, recipe: Recipe) -> tuple[Calibration, Batches | None]:
    """The windows of both texts, before the weights are read; those of a recipe that is run again must be the same.

    Raises:
      InputError: a text cannot be used, or has changed since the recipe was written.
    """
    data, text = recipe.data, recipe.evaluation.text
    assert data.calibration is not None, "checked before"
    check_one_text(text)
    calibrated_on = [share.source for share in shares_of(data.calibration)] or [data.calibration]
    for source in (*calibrated_on, text):
        if source is not None:
            check_source(source, data.field, most=1)  # all, before one is read as a whole
    outline = Model(described.abstract, described.raw_config, described.folder, job.model)
    calibration = calibrate(outline, data.calibration, data.samples, data.seq_len, data.seed, data.field, data.bos)
    hosts.check_same("calibration windows", calibration.fingerprint())
    again = job.model == recipe.origin.get("model") and not any(section == "data" for section, _ in job.given)
    if again and recipe.origin.get("tokens_sha256", calibration.fingerprint()) != calibration.fingerprint():
        raise InputError(
            f"{data.calibration}: the calibration windows are not those of the recipe {recipe.name}; the text or the "
            "tokenizer has changed since. Give --calibration to run the recipe on other text"
        )
    if text is None:
        return calibration, None
    windows = held_out(outline, text, recipe.evaluation.window, field=data.field)
    hosts.check_same("evaluation windows", windows.fingerprint())
    return calibration, windows


def _of_windows(described: reader.Description, recipe: Recipe, batches: Batches) -> Recipe:
    """The settings with the number and length of the drawn windows; a short text gives shorter ones than was expected.

    Raises:
      InputError: a target in multiply-accumulates or memory cannot be met for windows of that length.
    """
    drawn = filled(recipe, batches.count, batches.length)
    if drawn.budget.window != sized(recipe, described.abstract).budget.window:
        check_model(described, drawn)
    return drawn


def _written_recipe(job: Job, settings: Used, pruned: Model, calibration: Calibration) -> str:
    """The recipe of this run as TOML: every setting that it read, and what repeats it."""
    origin = {"model": job.model, "tokens_sha256": calibration.fingerprint(), "versions": versions()}
    if pruned.revision is not None:
        origin["revision"] = pruned.revision
    recipe = replace(settings.recipe, origin=origin)
    return recipes.to_toml(recipe, settings.keys)
