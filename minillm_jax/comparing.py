"""Comparison of loaded models: the public function `compare`, and its steps.

>>> import minillm_jax as mj

>>> dense, pruned = mj.load("path/to/dense"), mj.load("path/to/pruned")
>>> mj.compare(dense, pruned, "other.txt").measured.others[0].means["acceptance"]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from minillm_jax.api import Text, held_out
from minillm_jax.data.batches import Batches
from minillm_jax.data.documents import GIVEN
from minillm_jax.data.text import tokenizer_of
from minillm_jax.data.tokenizer import has_vocabulary
from minillm_jax.data.windows import Calibration, whole_number
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.evaluation import compare as changes
from minillm_jax.evaluation import drafting
from minillm_jax.model.decoder import learned_positions
from minillm_jax.model.loaded import Model
from minillm_jax.model.streamed import check_in_memory
from minillm_jax.model.tree import parameter_count
from minillm_jax.progress import StageProgress, tell
from minillm_jax.settings import Comparing, Data
from minillm_jax.stages import versions


@dataclass(frozen=True)
class Comparison:
    """A dense model, and other models beside it.

    Attributes:
      names: of the dense model, and of every other one.
      parameters: number of parameters of each of these models.
      source: path or Hub id of the text.
      settings: what was measured.
      measured: the changes of the next-token probabilities.
      prompts: number of prompts of the drafting.
      drafts: every other model as the draft of the dense one; None without drafting.
      device: the kind of device, on which the seconds depend.
      versions: of the libraries.
      fingerprint: the first digits of that of the windows, as in `evaluation.perplexity.Perplexity`.
    """

    names: tuple[str, ...]
    parameters: tuple[int, ...]
    source: str
    settings: Comparing
    measured: changes.Compared
    prompts: int
    drafts: tuple[drafting.Drafting, ...] | None
    device: str
    versions: dict[str, str]
    fingerprint: str


def compare(
    dense: Model,
    pruned: Model | Sequence[Model],
    data: Calibration | Batches | Text,
    window: int = Comparing.window,
    windows: int | None = Comparing.windows,
    bos: str = "auto",
    field: str = Data.field,
    draft: int = Comparing.draft,
    prompts: int = Comparing.prompts,
    new_tokens: int = Comparing.new_tokens,
    progress: StageProgress | None = None,
) -> Comparison:
    """What pruning changed in a model's next-token probabilities, and what the pruned model is worth as its draft.

    Args:
      dense: the dense model.
      pruned: one other model of the same vocabulary, or several.
      data: as in `evaluate`.
      window: tokens of a window.
      windows: most windows, evenly spaced over the text; None for all.
      bos: where the beginning-of-sequence token stands, as in `evaluate`.
      field: name of the field that holds the text of a row.
      draft: number of tokens that a pruned model drafts for one pass of the dense model; 0 for no drafting.
      prompts: most prompts of the drafting: the first halves of evenly spaced windows.
      new_tokens: tokens that are decoded behind each prompt.
      progress: called with a stage's name, how much of it is done, and how much there is.

    Raises:
      InputError: a number is out of its range; the text cannot be used; the models have different vocabularies or
        tokenizers; or the loss of one is not finite.
    """
    numbers = {"window": window, "draft": draft, "prompts": prompts, "new_tokens": new_tokens}
    numbers |= {} if windows is None else {"windows": windows}
    settings = Comparing(**{n: whole_number(f"--{n.replace('_', '-')}", value) for n, value in numbers.items()})
    others = [pruned] if isinstance(pruned, Model) else list(pruned)
    for model in (dense, *others):
        check_in_memory(model.decoder, "a comparison")
    batches = windows_of(dense, others, data, settings, bos, field)
    source = data.source if isinstance(data, Calibration) else str(data) if isinstance(data, str | Path) else GIVEN
    return measure(dense, others, batches, source, settings, progress)


def windows_of(
    dense: Model, others: Sequence[Model], data: Any, settings: Comparing, bos: str = "auto", field: str = Data.field
) -> Batches:
    """The windows on which models are compared, after all checks; the weights are not read and may be abstract.

    Raises:
      InputError: see `compare`.
    """
    settings.check()
    if not others:
        raise InputError(f"{dense.name}: no other model is given; name at least one that was pruned from it")
    for other in others:
        _check_vocabulary(dense, other)
    if not isinstance(data, Calibration | Batches | str | Path | np.ndarray):
        data = list(data)  # read once for each tokenizer
    batches = held_out(dense, data, settings.window, bos, field)
    for other in others:
        _check_tokens(dense, other, data, batches, bos, field)
    batches = batches if settings.windows is None else batches.spaced(settings.windows)
    if settings.draft:
        for model in (dense, *others):
            _check_positions(model, batches.length, settings)
    return batches


def _check_vocabulary(dense: Model, other: Model) -> None:
    sizes = [one.decoder.embedding.shape[0] for one in (dense, other)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{other.name}: the model has a vocabulary of {sizes[1]} tokens, but {dense.name} has {sizes[0]}; compare "
            "a model with the one that it was pruned from"
        )


def _check_tokens(dense: Model, other: Model, data: Any, batches: Batches, bos: str, field: str) -> None:
    """Checks that another model's tokenizer gives the same windows, and that these suit the model."""
    if isinstance(data, Calibration | Batches) or not has_vocabulary(other.folder):
        held_out(other, batches, batches.length)
        return
    found = held_out(other, data, batches.length, bos, field)
    if found.fingerprint() != batches.fingerprint():
        raise InputError(
            f"{other.name}: its tokenizer gives other token ids for the text than that of {dense.name}; compare a "
            "model with the one that it was pruned from"
        )


def _check_positions(model: Model, window: int, settings: Comparing) -> None:
    """Checks that the positions of a model hold for all lengths of a drafted continuation of a prompt."""
    prompt = _prompt_length(window)
    needed = drafting.cache_size(prompt, settings.new_tokens, settings.draft)
    learned = learned_positions(model.decoder)
    outgrown = drafting.outgrown(model.decoder, prompt, needed)
    if outgrown is not None:
        raise InputError(
            f"{model.name}: half a window, --new-tokens {settings.new_tokens} and --draft {settings.draft} are "
            f"{needed} tokens, but behind token {outgrown} the rotary positions of all tokens change, which "
            "speculative decoding does not follow; use a shorter --window, fewer --new-tokens, or --draft 0"
        )
    if learned is not None and needed > learned:
        raise InputError(
            f"{model.name}: half a window, --new-tokens {settings.new_tokens} and --draft {settings.draft} are "
            f"{needed} tokens, but the model has {learned} learned positions; use fewer --new-tokens, or --draft 0"
        )


def measure(
    dense: Model,
    others: Sequence[Model],
    batches: Batches,
    source: str,
    settings: Comparing,
    progress: StageProgress | None = None,
) -> Comparison:
    """The comparison of loaded models on the windows of `windows_of`.

    Args:
      dense: the dense model.
      others: the other models, on the same mesh.
      batches: the windows.
      source: path or Hub id of the text.
      settings: what is measured.
      progress: called with how far each stage is.

    Raises:
      InputError: the loss of a model is not finite.
    """
    models = (dense, *others)
    names = tuple(model.name for model in models)
    decoders = [model.decoder for model in others]
    batches = replace(batches, mesh=sharding.mesh_of(dense.decoder))
    told = partial(tell, progress, "compare")
    measured = changes.compare(dense.decoder, decoders, names, batches, _decoder_of(dense), told)
    prompts, drafts = _prompts(batches, settings.prompts), None
    if settings.draft:
        told = partial(tell, progress, "draft")
        drafts = tuple(
            drafting.measure(dense.decoder, decoders, prompts, settings.draft, settings.new_tokens, progress=told)
        )
    parameters = tuple(parameter_count(model.decoder) for model in models)
    device = jax.devices()[0].device_kind
    found = (names, parameters, source, settings, measured, len(prompts), drafts, device, versions())
    return Comparison(*found, fingerprint=batches.fingerprint()[:16])


def _prompts(batches: Batches, count: int) -> Int[np.ndarray, "N T"]:
    """The first halves of evenly spaced windows."""
    return batches.spaced(count).windows[:, : _prompt_length(batches.length)]


def _prompt_length(window: int) -> int:
    return max(drafting.SHORTEST_PROMPT, window // 2)


def _decoder_of(model: Model) -> changes.Decode:
    """Token ids → text by the tokenizer of a model; the ids themselves where it has none."""
    if not has_vocabulary(model.folder):
        return lambda ids: " ".join(map(str, ids))
    tokenizer = tokenizer_of(model.folder)().call
    return lambda ids: str(getattr(tokenizer, "decode")(ids))  # noqa: B009  a tokenizer of transformers
