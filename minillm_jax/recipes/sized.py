"""The number and length of the calibration windows in the settings of a run, once the model is known."""

from dataclasses import replace

from minillm_jax.data import calibration_size
from minillm_jax.data.batches import Batches
from minillm_jax.data.calibration_size import size_for, widest_mlp
from minillm_jax.data.windows import positions
from minillm_jax.errors import warn
from minillm_jax.model.decoder import Decoder
from minillm_jax.recipes.recipe import Recipe


def sized(recipe: Recipe, decoder: Decoder) -> Recipe:
    """A recipe with the number and length of windows that suit a model, as far as the recipe does not name them.

    Args:
      recipe: settings as `recipes.used` completes them.
      decoder: the dense model, which may be abstract.
    """
    size = size_for(widest_mlp(decoder), positions(decoder), recipe.data.samples, recipe.data.seq_len)
    return filled(recipe, size.samples, size.length)


def filled(recipe: Recipe, samples: int, length: int) -> Recipe:
    """A recipe with these numbers in the place of those that it does not name; costs are for a window of its length."""
    data = recipe.data
    data = replace(
        data,
        samples=samples if data.samples is None else data.samples,
        seq_len=length if data.seq_len is None else data.seq_len,
    )
    assert data.seq_len is not None, "filled in above"
    return replace(recipe, data=data, budget=replace(recipe.budget, window=data.seq_len))


def few_tokens(recipe: Recipe, samples: int, length: int, per_channel: float) -> str:
    """A sentence about too few calibration tokens for the systems that a run solves; the empty text where they suffice.

    Criteria and refits that solve no system, such as wanda without a refit, take means of the activations, which need
    fewer tokens.

    Args:
      recipe: settings of the run.
      samples: number of windows.
      length: tokens of a window.
      per_channel: calibration tokens for each channel of the widest MLP.
    """
    solves = recipe.scoring.criterion == "obs" or recipe.refit.method == "least-squares"
    return calibration_size.few_tokens(samples, length, per_channel) if solves and recipe.budget.kinds else ""


def warn_of_few_tokens(recipe: Recipe, batches: Batches, decoder: Decoder) -> None:
    """Warns where the calibration tokens are too few for the systems that a run solves; see `few_tokens`."""
    sentence = few_tokens(recipe, batches.count, batches.length, batches.tokens / widest_mlp(decoder))
    if sentence:
        warn(sentence)
