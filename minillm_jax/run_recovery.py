"""One recovery from folder to folder: checked early, then load, evaluate, train, save, evaluate, document.

The recovered weights are saved before anything else is done with them. The state of the training lies in a folder
beside the output until then, so that the same command continues an interrupted run.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

import minillm_jax.hidden  # noqa: F401  before the first import of convert
from convert import adapter as adapters
from convert import folders, formats, gguf_write, reader, writer
from minillm_jax.api import describe, evaluate, held_out, load, save
from minillm_jax.data.batches import Batches
from minillm_jax.data.documents import check_source
from minillm_jax.data.examples import Examples
from minillm_jax.data.mixture import check_one_text, shares_of
from minillm_jax.devices import hosts, memory, sharding
from minillm_jax.devices.store import Store
from minillm_jax.errors import InputError, LastSteps
from minillm_jax.evaluation.layer_errors import LayerErrors
from minillm_jax.evaluation.perplexity import Perplexity
from minillm_jax.model.digest import model_digest
from minillm_jax.model.loaded import Model
from minillm_jax.progress import Clock, StageProgress, tell
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes import used_recovery
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recovering import check_teacher, record_of, recover_model, texts_of
from minillm_jax.recovery import teacher as teachers
from minillm_jax.recovery.adapter import Adapter, Lora
from minillm_jax.recovery.recover import Recovered, Texts
from minillm_jax.recovery.train import Point, Teacher
from minillm_jax.run import RECIPE_FILE, continuations_of, errors_of
from minillm_jax.stages import versions

ADAPTER = "adapter"


@dataclass(frozen=True)
class RecoveryJob:
    """Everything `run` needs.

    Attributes:
      model: a pruned folder, a GGUF file or a Hub id.
      output: folder to write, which must not exist.
      recipe: all settings, the text to train on among them.
      given: section and key -> flag, of the settings that a user gave beside the recipe.
      revision: branch, tag or commit of the model on the Hub.
    """

    model: str
    output: str
    recipe: Recovery = field(default_factory=Recovery)
    given: Mapping[tuple[str, str], str] = field(default_factory=dict)
    revision: str | None = None

    def check(self) -> None:
        """Check the settings as far as that is possible without the model.

        Raises:
          InputError: a setting is out of its range, two do not suit each other, or a given one would do nothing.
        """
        used_recovery.check(self.recipe, self.given)
        output = self.recipe.output
        formats.check_format(output.format)
        writer.check_shard_size(output.max_shard_size)
        gguf_write.check_type(output.gguf_type)
        if output.format == formats.GGUF:
            writer.check_gguf_folder(self.output)
        if self.recipe.data.data is None:
            raise InputError("no text to train on is given; name a file or a Hub data set with --data")


@dataclass(frozen=True)
class RecoveryResult:
    """What a recovery came to.

    Attributes:
      job: the job.
      recovered: the decoder, the adapter and the curves.
      model: the model that was written.
      written: format of the folder, and how many parameters its files hold.
      seconds: of each stage.
      teacher: perplexity of the teacher, None where none was measured.
      before: perplexity of the pruned model.
      after: perplexity of the recovered model.
      peak_bytes: most memory of the accelerator, or of the process on a CPU, until the weights were saved.
      errors_before: of every layer of the pruned model, on windows of the evaluation text; None where there is no such
        text or no teacher in memory, or the teacher is not the model that was pruned.
      errors_after: of the recovered model.
      texts: of the models behind beginnings of the evaluation text.
    """

    job: RecoveryJob
    recovered: Recovered
    model: Model
    written: writer.Written
    seconds: dict[str, float]
    teacher: Perplexity | None = None
    before: Perplexity | None = None
    after: Perplexity | None = None
    peak_bytes: int = 0
    errors_before: LayerErrors | None = None
    errors_after: LayerErrors | None = None
    texts: Sequence[Mapping[str, str]] = ()


# Texts to write beside the weights, by file name.
Documents = Callable[[RecoveryResult], Mapping[str, str]]


def run(job: RecoveryJob, progress: StageProgress | None = None, documents: Documents | None = None) -> RecoveryResult:
    """Recover one model from folder to folder.

    Args:
      job: model, output folder, settings.
      progress: called with how far each stage is.
      documents: called by process 0 after the last measurement; its texts are added to the folder.

    Raises:
      InputError: see `RecoveryJob.check`; or the model, the teacher or a text cannot be used. No folder has been
        written then. Or the training stopped, or a later measurement or document failed; the message says what is
        saved.
    """
    job.check()
    devices = job.recipe.devices
    if devices.hosts is not None:
        hosts.initialise_hosts(hosts.parse_hosts(devices.hosts))
    mesh = sharding.make_mesh(sharding.parse_mesh(devices.mesh))
    writer.check_new(job.output, job.model)
    clock, dtype = Clock(), job.recipe.output.dtype
    outline = describe(job.model, dtype, job.revision)
    job = _with_format(job, outline)
    texts, measured_on = _checked_texts(job, outline)

    def measure(model: Model) -> Perplexity | None:
        return None if measured_on is None else evaluate(model, measured_on, progress=progress)

    dense = _dense(job.recipe, mesh, texts.training, measure, progress)  # before the student needs memory
    clock.lap("teacher")
    model = load(job.model, dtype, mesh, job.revision)
    clock.lap("load")
    before = measure(model)
    clock.lap("evaluate")
    with Store(_checkpoint(job), _identity(job, model, dense, texts), "a recovery") as store:
        recovered = recover_model(model, texts, job.recipe, dense.teacher, store, progress)
    clock.lap("train")
    better = replace(model, decoder=recovered.decoder, record=record_of(job.recipe, model, recovered, texts))
    peak = memory.peak_bytes()
    written = _save(job, model, better, recovered)
    clock.lap("save")
    last = LastSteps(f"the recovered model is saved in {job.output}")
    after = last.attempt("its perplexity was not measured", lambda: measure(better))
    errors = last.attempt(
        "the errors of its layers were not measured", lambda: _errors(dense.model, (model, better), measured_on)
    )
    teacher = {} if dense.model is None else {"dense": dense.model}
    continued = last.attempt(
        "its texts were not written",
        lambda: continuations_of(
            {**teacher, "pruned": model, "recovered": better}, measured_on, job.recipe.evaluation.continuations
        ),
    )
    clock.lap("evaluate")
    measured = dense.perplexity, before, after, peak, *(errors or (None, None))
    result = RecoveryResult(job, recovered, better, written, clock.seconds, *measured, texts=continued or [])
    if documents is not None and hosts.is_writer():
        last.attempt("its report was not written", lambda: folders.add_texts(job.output, documents(result)))
    last.check()
    return result


def _errors(
    dense: Model | None, models: tuple[Model, Model], windows: Batches | None
) -> tuple[LayerErrors | None, ...] | None:
    """The errors of the layers of two models, from one dense model; None without it or without a text."""
    if dense is None or windows is None:
        return None
    return tuple(errors_of(dense, model, windows) for model in models)


def _with_format(job: RecoveryJob, outline: Model) -> RecoveryJob:
    """The job with the format of the model where no other one is asked for."""
    output = job.recipe.output
    format_name = output.format or reader.kept_format(outline.folder)
    if format_name == formats.GGUF:
        writer.check_gguf_folder(job.output)
    return replace(job, recipe=replace(job.recipe, output=replace(output, format=format_name)))


# -------------------------------------------------------------------------------------------------------------- texts


def _checked_texts(job: RecoveryJob, outline: Model) -> tuple[Texts, Batches | None]:
    """The sequences to train on, and the windows of the evaluation, before any weight is read.

    Raises:
      InputError: a text or the teacher cannot be used, or there is no room for the output.
    """
    recipe, output = job.recipe, job.recipe.output
    if recipe.distillation.teacher is not None:
        check_teacher(outline, describe(recipe.distillation.teacher, output.dtype))
    writer.check_space(job.output, writer.weight_bytes(outline, output.format, output.gguf_type))
    field_name, evaluation = recipe.data.field, recipe.evaluation
    assert recipe.data.data is not None, "checked before"
    for source in (evaluation.text, evaluation.watch):
        check_one_text(source)
    mixture = [share.source for share in shares_of(recipe.data.data, "--data")]
    for source in (evaluation.text, evaluation.watch, *mixture):
        if source is not None:
            check_source(source, field_name, most=1)  # all, before one is read as a whole
    texts = texts_of(recipe, outline, recipe.data.data)
    hosts.check_same("settings", (job.model, recipes.to_toml(recipe), versions()))
    hosts.check_same("training sequences", texts.training.fingerprint())
    if evaluation.text is None:
        return texts, None
    windows = held_out(outline, evaluation.text, evaluation.window, field=field_name)
    hosts.check_same("evaluation windows", windows.fingerprint())
    return texts, windows


# ----------------------------------------------------------------------------------------------------------- training


class _Dense(NamedTuple):
    """The dense model of a recovery; nothing without a teacher.

    Attributes:
      teacher: what the divergence is measured from.
      perplexity: on the evaluation text.
      digest: of its weights.
      model: the dense model where it stays in memory.
    """

    teacher: Teacher | None = None
    perplexity: Perplexity | None = None
    digest: str | None = None
    model: Model | None = None


def _checkpoint(job: RecoveryJob) -> str:
    """The folder of the training state."""
    return job.recipe.output.checkpoint or f"{job.output.rstrip('/')}.checkpoint"


def _identity(job: RecoveryJob, model: Model, dense: _Dense, texts: Texts) -> dict[str, Any]:
    """Whatever decides the training, as JSON holds it: settings, and hashes of text and models."""
    recipe = job.recipe
    table = recipes.as_table(recipe, recipes.all_keys(Recovery))
    sections = {name: table.get(name) for name in ("training", "adapter", "distillation", "forward", "refit")}
    return sections | {
        "seed": recipe.data.seed,
        "text": texts.training.fingerprint()[:16],
        "model": model_digest(model.decoder)[:16],
        "teacher": dense.digest,
        "state": list(Point._fields),
    }


def _dense(
    recipe: Recovery,
    mesh: Mesh | None,
    examples: Examples,
    measure: Callable[[Model], Perplexity | None],
    progress: StageProgress | None,
) -> _Dense:
    """The teacher in memory; or its most probable tokens, written where they are missing, without its weights."""
    settings = recipe.distillation
    if settings.teacher is None:
        return _Dense()
    model = load(settings.teacher, recipe.output.dtype, mesh)
    decoder = model.decoder
    known, folder = teachers.in_memory(decoder), settings.teacher_logits
    if folder is not None:
        if not hosts.of_first(lambda: {"exists": np.bool_(Path(folder).exists())})["exists"]:
            told = partial(tell, progress, "teacher")
            with folders.new_folder(folder) if hosts.is_writer() else nullcontext() as scratch:
                teachers.write(scratch, decoder, examples, settings.top, recipe.training.micro_batch, told)
            hosts.wait()
        known = teachers.read(folder, teachers.identity_of(decoder, examples, settings.top), mesh)
    return _Dense(known, measure(model), model_digest(decoder)[:16], model if folder is None else None)


# ------------------------------------------------------------------------------------------------------------- output


def _save(job: RecoveryJob, model: Model, better: Model, recovered: Recovered) -> writer.Written:
    """Writes the folder, and removes the training state.

    Raises:
      InputError: nothing was trained, or the folder cannot be written.
    """
    stopped, updates = recovered.outcome.stopped, recovered.outcome.update
    if stopped is not None and not updates:
        raise InputError(stopped)
    extra: dict[str, Any] = {RECIPE_FILE: recipes.to_toml(job.recipe, recipes.all_keys(Recovery))}
    if recovered.adapter is not None:
        # Process 0 alone writes, and could not gather what lies on the devices of others.
        extra[ADAPTER] = partial(_write_adapter, adapters.gathered(recovered.adapter), recovered.lora, model)
    output = job.recipe.output
    written = save(better, job.output, output.format, output.max_shard_size, extra, output.gguf_type)
    if output.checkpoint is None and hosts.is_writer():
        shutil.rmtree(_checkpoint(job), ignore_errors=True)
    if stopped is not None:
        raise InputError(f"{stopped}; the model after update {updates} is saved in {job.output}")
    return written


def _write_adapter(adapter: Adapter, lora: Lora, model: Model, folder: Path) -> None:
    folder.mkdir()
    adapters.write_adapter(adapter, lora, model.decoder, folder, model.name)
