"""The public functions: load, calibrate, score, prune, evaluate, save.

>>> import minillm_jax as mj

>>> model = mj.load("path/or/hub-id")
>>> pruned = mj.prune(model, "calibration.txt", ratio=0.2)
>>> mj.evaluate(pruned, "other.txt").perplexity
>>> mj.save(pruned, "pruned")
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

import minillm_jax.hidden  # noqa: F401  before the first import of convert
from convert import reader, writer
from minillm_jax.data import text, windows
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.devices import sharding
from minillm_jax.evaluation import perplexity
from minillm_jax.model.loaded import Model
from minillm_jax.progress import StageProgress, tell
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.recipes.used import used
from minillm_jax.scoring.score import ChosenWhilePruning, Scores, score
from minillm_jax.settings import Data, Evaluation
from minillm_jax.stages import prune_model

__all__ = ["calibrate", "evaluate", "load", "prune", "save", "score"]

# Text: a path or Hub id, texts, or an array of token ids.
Text = str | Path | Sequence[str] | np.ndarray


def load(
    model: str | Path, dtype: str | None = None, devices: Mesh | None = None, revision: str | None = None
) -> Model:
    """Load a Hugging Face folder, a Flax checkpoint folder, or a Hub id; see `convert.reader.read_model`."""
    return reader.read_model(model, dtype, devices, revision)


def calibrate(
    model: Model, data: Text, samples: int = Data.samples, length: int = Data.seq_len, seed: int = Data.seed
) -> Calibration:
    """Draw calibration windows from a text.

    Args:
      model: its tokenizer reads the text.
      data: a text, JSONL, parquet or .npy file, a Hub data set, a list of texts, or an array of token ids.
      samples: number of windows.
      length: tokens of a window.
      seed: draws the windows.

    Raises:
      InputError: the text cannot be used, or is too short.
    """
    tokens = tokens_of(model, data)
    drawn = windows.sample(tokens, samples, length, seed)
    return Calibration(Batches(drawn, sharding.mesh_of(model.decoder)), tokens.source, seed)


def prune(
    model: Model,
    data: Calibration | Text,
    ratio: float | None = None,
    recipe: str | Path | Recipe = recipes.DEFAULT,
    scores: Scores | ChosenWhilePruning | None = None,
    progress: StageProgress | None = None,
    **options: Any,
) -> Model:
    """A smaller model: does by default what `minillm-jax prune` does by default.

    Args:
      model: the dense model.
      data: calibration windows, or the text to draw them from.
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
    if isinstance(data, Calibration):
        calibration = data
    else:
        calibration = calibrate(model, data, settings.data.samples, settings.data.seq_len, settings.data.seed)
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
    data: Text,
    window: int = Evaluation.window,
    bos: bool = False,
    progress: StageProgress | None = None,
) -> perplexity.Perplexity:
    """Perplexity over the non-overlapping windows of a whole text, W - 1 predictions a window.

    Args:
      model: any model.
      data: as in `calibrate`.
      window: tokens W of a window.
      bos: put the beginning-of-sequence token before the text.
      progress: called with how many windows are done.

    Raises:
      InputError: the text cannot be used, or is shorter than one window.
    """
    held_out = windows.cut(tokens_of(model, data, bos), window)
    batches = Batches(held_out, sharding.mesh_of(model.decoder))
    return perplexity.perplexity(model.decoder, batches, partial(tell, progress, "perplexity"))


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


def tokens_of(model: Model, data: Text, bos: bool = False) -> text.Tokens:
    """All tokens of a text, by the model's tokenizer.

    Raises:
      InputError: the text cannot be used.
    """
    vocabulary = model.decoder.embedding.shape[0]
    if isinstance(data, str | Path):
        return text.read_tokens(data, model.folder, vocabulary, bos)
    return text.given_tokens(data, model.folder, vocabulary, bos)
