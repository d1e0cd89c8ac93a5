"""Recovery of a loaded model: the public function `recover`, and its steps.

>>> import minillm_jax as mj

>>> pruned = mj.load("path/to/pruned")
>>> better = mj.recover(pruned, "text.txt", teacher=mj.load("path/to/dense"))
>>> mj.save(better, "recovered")
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from convert import adapter as adapters
from minillm_jax.api import Text, held_out
from minillm_jax.data import text
from minillm_jax.data.examples import Examples, read_examples, whole_windows
from minillm_jax.data.mixed_examples import mixed
from minillm_jax.data.mixture import shares_of
from minillm_jax.data.tokenizer import has_vocabulary
from minillm_jax.data.windows import check_positions, check_seed
from minillm_jax.devices.store import Store
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model
from minillm_jax.model.streamed import check_in_memory
from minillm_jax.paths import local_path
from minillm_jax.progress import StageProgress, tell
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes import used_recovery
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recovery import teacher as teachers
from minillm_jax.recovery.recover import Recovered, Texts, recover_decoder
from minillm_jax.recovery.train import Teacher
from minillm_jax.stages import versions

# Most sequences of the validation, where their number is not given.
MOST_HELD_OUT = 64


def recover(
    model: Model,
    data: Text,
    recipe: str | Path | Recovery = Recovery.DEFAULT,
    teacher: Model | None = None,
    progress: StageProgress | None = None,
    **options: Any,
) -> Model:
    """A better model of the same shape: does by default what `minillm-jax recover` does by default.

    Args:
      model: the pruned model.
      data: the text to train on: a path, a Hub data set, a mixture of these with weights, `a.txt:0.7,b.jsonl:0.3`;
        texts, rows of conversations, or token ids.
      recipe: a recipe of the package, the path of a TOML file, or a `Recovery`.
      teacher: the dense model.
      progress: called with a stage's name, how much of it is done, and how much there is.
      **options: any option of `minillm-jax recover` by its name: `steps=200`, `method="full"`, `rank=16`.

    Raises:
      InputError: an option is unknown, out of its range, or would do nothing; the text or the teacher cannot be used;
        or the loss is not finite.
    """
    for one in (model, teacher):
        if one is not None:
            check_in_memory(one.decoder, "a recovery")
    loaded = recipe if isinstance(recipe, Recovery) else recipes.load_as(Recovery, recipe)
    settings, flags = recipes.with_options(loaded, options)
    if teacher is not None:
        settings = replace(settings, distillation=replace(settings.distillation, teacher=teacher.name))
        check_teacher(model, teacher)
    used_recovery.check(settings, flags)
    texts = texts_of(settings, model, data)
    recovered = recover_model(
        model, texts, settings, None if teacher is None else teachers.in_memory(teacher.decoder), None, progress
    )
    if recovered.outcome.stopped is not None:
        raise InputError(recovered.outcome.stopped)
    return replace(model, decoder=recovered.decoder, record=record_of(settings, model, recovered, texts))


def check_teacher(model: Model, teacher: Model) -> None:
    """Check that teacher and student have the same tokens.

    Raises:
      InputError: they have not.
    """
    sizes = [one.decoder.embedding.shape[0] for one in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{teacher.name}: the teacher has a vocabulary of {sizes[0]} tokens, the pruned model {sizes[1]}; give the "
            "dense model that it was pruned from"
        )
    if not all(has_vocabulary(one.folder) for one in (teacher, model)):
        return
    words = [getattr(text.tokenizer_of(one.folder)().call, "get_vocab")() for one in (teacher, model)]  # noqa: B009
    if words[0] != words[1]:
        raise InputError(
            f"{teacher.name}: the teacher has another tokenizer than the pruned model; give the dense model that it "
            "was pruned from"
        )


def texts_of(recipe: Recovery, outline: Model, given: Text) -> Texts:
    """The sequences of a recovery.

    Args:
      recipe: the settings.
      outline: the pruned model; its weights are not read and may be abstract.
      given: the text to train on, or a mixture of several.

    Raises:
      InputError: a text cannot be used, or is too short.
    """
    data, decoder = recipe.data, outline.decoder
    check_positions(decoder, data.seq_len, "--seq-len")
    check_seed(data.seed)
    read = partial(
        read_examples,
        tokenizer=text.tokenizer_of(outline.folder),
        vocabulary=decoder.embedding.shape[0],
        length=data.seq_len,
        template=data.template,
        loss_on=data.loss_on,
        packing=data.packing,
        bos=data.bos,
        family=decoder.config.family,
        field=data.field,
    )
    shares = shares_of(str(given), "--data") if isinstance(given, str | Path) else ()
    examples = mixed(shares, read, str(given), data.seed) if shares else read(given)
    held = min(MOST_HELD_OUT, examples.count // 10) if data.held_out is None else data.held_out
    training, validation = examples.split(held, data.seed)
    return Texts(training, validation if held else None, _watched(recipe, outline))


def _watched(recipe: Recovery, outline: Model) -> Examples | None:
    """Evenly spaced windows of the second text."""
    source = recipe.evaluation.watch
    if source is None:
        return None
    batches = held_out(outline, source, recipe.data.seq_len, field=recipe.data.field)
    return whole_windows(batches.spaced(recipe.evaluation.watch_windows).windows, source)


def recover_model(
    model: Model,
    texts: Texts,
    recipe: Recovery,
    teacher: Teacher | None = None,
    store: Store | None = None,
    progress: StageProgress | None = None,
) -> Recovered:
    """Trains a pruned model; see `recovery.recover.recover_decoder`.

    Raises:
      InputError: a setting is out of its range, or the adapter to start from belongs to another model.
    """
    folder = recipe.adapter.start
    start = None if folder is None else adapters.read_adapter(local_path(folder, "adapter"), model.decoder)
    told = partial(tell, progress, "train")
    return recover_decoder(model.decoder, texts, recipe.computed, recipe.data.seed, teacher, start, store, told)


def record_of(recipe: Recovery, model: Model, recovered: Recovered, texts: Texts) -> dict[str, Any]:
    """The pruning record with the recovery in it."""
    outcome = recovered.outcome
    recovery = {
        "recipe": recipe.name,
        "settings": recipes.as_table(recipe, recipes.all_keys(Recovery)),
        "sequences": texts.training.count,
        "tokens_sha256": texts.training.fingerprint(),
        "updates": outcome.update,
        "tokens": outcome.tokens,
        "points": [point._asdict() for point in outcome.points],
        "versions": versions(),
    }
    return {"base_model": model.name, **(model.record or {}), "recovery": recovery}
