"""The public functions: load, calibrate, score, prune, evaluate, save.

>>> import minillm_jax as mj

>>> model = mj.load("path/or/hub-id")
>>> pruned = mj.prune(model, "calibration.txt", ratio=0.2)
>>> mj.evaluate(pruned, "other.txt").perplexity
>>> mj.save(pruned, "pruned")
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

import minillm_jax.hidden  # noqa: F401  before the first import of convert
from convert import reader, writer
from minillm_jax.data import chat, first_token, text, windows
from minillm_jax.data.batches import Batches
from minillm_jax.data.calibration_size import Size, size_for, widest_mlp
from minillm_jax.data.documents import GIVEN, Opened, open_data
from minillm_jax.data.mixture import Seed, check_one_text, counted, interleaved, shares_of
from minillm_jax.data.windows import Calibration
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError, one_of, shortened
from minillm_jax.evaluation import perplexity
from minillm_jax.model.loaded import Model
from minillm_jax.progress import StageProgress, tell
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.recipes.sized import filled, warn_of_few_tokens
from minillm_jax.recipes.used import used
from minillm_jax.scoring.score import ChosenWhilePruning, Scores
from minillm_jax.scoring.score import score as score_groups
from minillm_jax.settings import BOS, CRITERIA, EVALUATION_BOS, Data, Evaluation, Scoring, dtype_name
from minillm_jax.stages import prune_model

__all__ = ["calibrate", "evaluate", "load", "prune", "save", "score"]

# A path or Hub id; texts, or rows with a field of text; an array of token ids, or lists of token ids.
Text = str | Path | Iterable[Any]


def load(
    model: str | Path,
    dtype: str | None = None,
    devices: Mesh | None = None,
    revision: str | None = None,
    stream: bool = False,
) -> Model:
    """Load a Hugging Face folder, a Flax checkpoint folder, or a Hub id; see `convert.reader.read_model`."""
    return reader.read_model(model, dtype_name(dtype), devices, revision, stream)


def describe(model: str | Path, dtype: str | None = None, revision: str | None = None) -> Model:
    """A model without its weights, whose decoder holds shapes alone; see `convert.reader.describe_model`."""
    described = reader.describe_model(model, dtype, revision)
    return Model(described.abstract, described.raw_config, described.folder, str(model), revision=described.revision)


def calibrate(
    model: Model,
    data: Text,
    samples: int | None = Data.samples,
    length: int | None = Data.seq_len,
    seed: int = Data.seed,
    field: str = Data.field,
    bos: str = Data.bos,
) -> Calibration:
    """Draw calibration windows from a text, or from a mixture of several.

    Of a text of more than about four million characters, only the passages that are drawn are tokenised, and no more
    than its first 200 million characters are read (`data.windows.draw`).

    Args:
      model: its tokenizer reads the text.
      data: a text, .json, .jsonl, .csv, .parquet or .npy file, a Hub data set, or a mixture of these with weights,
        `a.txt:0.7,b.jsonl:0.3`; texts, rows with a field of text or a conversation, an array of token ids, or lists of
        token ids.
      samples: number of windows; None for as many as suit the model (`data.calibration_size`), or fewer where the text
        is short.
      length: tokens of a window; None for the length that suits the model and the text.
      seed: draws the windows.
      field: name of the field that holds the text of a row.
      bos: where the beginning-of-sequence token stands: `auto`, `yes` or `no` (`data.first_token`).

    Raises:
      InputError: the text cannot be used, or is too short.
    """
    samples = None if samples is None else windows.whole_number("--samples", samples)
    length = None if length is None else windows.whole_number("--seq-len", length)
    seed = windows.whole_number("--seed", seed)
    one_of("place of the token --bos", bos, BOS)
    size = size_for(widest_mlp(model.decoder), windows.positions(model.decoder), samples, length)
    windows.check_positions(model.decoder, size.length, "--seq-len")
    tokenizer, family = text.tokenizer_of(model.folder), model.decoder.config.family

    def drawn(opened: Opened, size: Size, seed: Seed) -> Batches:
        ids = windows.draw(opened, tokenizer, _vocabulary(model), size, seed, bos, family)
        return Batches(ids, sharding.mesh_of(model.decoder))

    write = chat.Templated(tokenizer)
    shares = counted(shares_of(str(data)), size.samples) if isinstance(data, str | Path) else ()
    if not shares:
        opened = open_data(data, field, write)
        return Calibration(drawn(opened, size, seed), opened.source, seed)
    parts = [
        drawn(open_data(share.source, field, write), Size(share.samples, size.length), (seed, number)).windows
        for number, share in enumerate(shares)
    ]
    return Calibration(Batches(interleaved(parts), sharding.mesh_of(model.decoder)), str(data), seed, shares)


def score(
    model: Model,
    data: Calibration | Batches | Text,
    scoring: Scoring | str | None = None,
    progress: StageProgress | None = None,
    checkpoint: str | Path | None = None,
    field: str = Data.field,
) -> Scores | ChosenWhilePruning:
    """Score every group of every layer; see `scoring.score.score`.

    Args:
      model: the dense model.
      data: calibration windows, or the text to draw them from, as in `calibrate`.
      scoring: the criterion and its settings, or the name of a criterion.
      progress: called with how far each stage is.
      checkpoint: folder from which an interrupted gradient estimate continues.
      field: name of the field that holds the text of a row.

    Raises:
      InputError: a setting is out of its range, the text cannot be used, or the estimate is not finite.
    """
    if isinstance(scoring, str):
        one_of("criterion", scoring, CRITERIA)
        scoring = Scoring(scoring)
    elif not isinstance(scoring, Scoring | None):
        raise InputError(f"expected a Scoring or the name of a criterion, found {shortened(repr(scoring))}")
    calibration = _calibration(model, data, Data(field=field))
    return score_groups(model, calibration, scoring, progress, checkpoint)


def prune(
    model: Model,
    data: Calibration | Batches | Text,
    ratio: float | None = None,
    recipe: str | Path | Recipe = recipes.DEFAULT,
    scores: Scores | ChosenWhilePruning | None = None,
    progress: StageProgress | None = None,
    **options: Any,
) -> Model:
    """A smaller model: does by default what `minillm-jax prune` does by default.

    Args:
      model: the dense model.
      data: calibration windows, or the text to draw them from, as in `calibrate`.
      ratio: share of the heads and channels of every layer to remove, in (0, 1); or give a target.
      recipe: a recipe of the package, the path of a TOML file, or a `Recipe`.
      scores: of the model, where `score` has made them; by the recipe's criterion otherwise.
      progress: called with a stage's name, how much of it is done, and how much there is.
      **options: any option of `minillm-jax prune` by its name: `criterion="wanda"`, `refit="none"`, `alpha=0.5`,
        `target_params=1e9`.

    Raises:
      InputError: an option is unknown, out of its range, or would do nothing; or the text or model cannot be used.
    """
    settings = settings_of(recipe, options if ratio is None else {**options, "ratio": ratio})
    calibration = _calibration(model, data, settings.data)
    settings = filled(settings, calibration.batches.count, calibration.batches.length)
    warn_of_few_tokens(settings, calibration.batches, model.decoder)
    return prune_model(model, calibration, settings, scores, progress)


def settings_of(recipe: str | Path | Recipe, options: Mapping[str, Any]) -> Recipe:
    """The settings of a run: those of a recipe with some options, as far as the run reads them.

    Raises:
      InputError: see `prune`.
    """
    loaded = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    chosen, flags = recipes.with_options(loaded, options)
    return used(chosen, flags).recipe


def evaluate(
    model: Model,
    data: Calibration | Batches | Text,
    window: int = Evaluation.window,
    bos: str = "auto",
    progress: StageProgress | None = None,
    field: str = Data.field,
) -> perplexity.Perplexity:
    """Perplexity over the non-overlapping windows of a whole text, W - 1 predictions a window.

    Args:
      model: any model.
      data: as in `calibrate`; or windows, which are evaluated as they are.
      window: tokens W of a window.
      bos: where the beginning-of-sequence token stands: before every window (`yes`), once before the whole text
        (`text`), or nowhere (`no`); `auto` is `yes` for Gemma and `no` for other families.
      progress: called with how many windows are done.
      field: name of the field that holds the text of a row.

    Raises:
      InputError: the text cannot be used, or is shorter than one window.
    """
    batches = held_out(model, data, windows.whole_number("--window", window), bos, field)
    batches = replace(batches, mesh=sharding.mesh_of(model.decoder))
    return perplexity.perplexity(model.decoder, batches, partial(tell, progress, "perplexity"))


def held_out(model: Model, data: Any, window: int, bos: str = "auto", field: str = Data.field) -> Batches:
    """The windows that `evaluate` runs a model on; the weights of the model are not read and may be abstract.

    Raises:
      InputError: see `evaluate`.
    """
    one_of("place of the token --bos", bos, EVALUATION_BOS)
    if isinstance(data, Calibration | Batches):
        if bos in ("yes", "text"):
            raise InputError("--bos is for text; put the token into the windows instead")
        return _checked(model, data, "--window")
    windows.check_positions(model.decoder, window, "--window")
    check_one_text(data)
    tokenizer = text.tokenizer_of(model.folder)
    opened = open_data(data, field, chat.Templated(tokenizer))
    text.check_bos(opened, bos == "yes")
    is_text = not isinstance(opened.content, np.ndarray)
    tokens = text.all_tokens(opened, tokenizer, _vocabulary(model), bos == "text")
    first = first_token.of_windows(tokenizer(), bos, model.decoder.config.family) if is_text else None
    return Batches(windows.cut(tokens, window, first))


def _calibration(model: Model, data: Any, settings: Data) -> Calibration:
    """Windows that are given, checked; or drawn from a text."""
    if isinstance(data, Calibration | Batches):
        batches = _checked(model, data, "--seq-len")
        return data if isinstance(data, Calibration) else Calibration(batches, GIVEN, settings.seed)
    return calibrate(model, data, settings.samples, settings.seq_len, settings.seed, settings.field, settings.bos)


def _checked(model: Model, data: Calibration | Batches, flag: str) -> Batches:
    """The batches of given windows, which must suit the model."""
    batches, source = (data.batches, data.source) if isinstance(data, Calibration) else (data, GIVEN)
    windows.check_windows(batches, _vocabulary(model), source)
    windows.check_positions(model.decoder, batches.length, flag)
    return batches


def _vocabulary(model: Model) -> int:
    return model.decoder.embedding.shape[0]


def save(
    model: Model,
    output: str | Path,
    format: str | None = None,  # noqa: A002  the name of the option
    max_shard_size: str = writer.MAX_SHARD_SIZE,
    extra: writer.Extra | None = None,
    gguf_type: str | None = None,
) -> writer.Written:
    """Write a folder that transformers loads, a Flax checkpoint or a GGUF file, with `pruning.json` beside the weights.

    Args:
      model: the model.
      output: folder to write, which must not exist.
      format: `stock`, `per-layer`, `padded`, `flax` or `gguf` (see `convert.formats`); by default `stock` where the
        family's own class holds the shapes, else `per-layer`.
      max_shard_size: of the weight files.
      extra: files to write beside the weights, by file name (`convert.writer.Extra`).
      gguf_type: type of the matrices of a GGUF, `f32`, `f16`, `bf16` or `q8_0`; that of the weights by default.

    Returns:
      The format that was written, and how many parameters the files hold.

    Raises:
      InputError: the folder exists, or the format cannot hold the shapes.
    """
    return writer.write_model(model, output, format, max_shard_size, extra, gguf_type)
