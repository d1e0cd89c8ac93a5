"""Perplexity against PyTorch."""

from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import perplexity
from tests.helpers import hugging_face_folder, load_torch, random_tokens, small_decoder, torch_logits


def test_perplexity_equals_pytorch(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model")
    windows = random_tokens(97, 9, 16)
    logits = torch.from_numpy(torch_logits(load_torch(folder), windows))[:, :-1]
    targets = torch.from_numpy(windows[:, 1:].astype(np.int64))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    measured = perplexity(read_model(folder).decoder, Batches(windows))
    assert measured.loss == pytest.approx(expected, rel=1e-5)
    assert measured.perplexity == pytest.approx(exp(expected), rel=1e-5)
    assert (measured.tokens, measured.window, measured.windows) == (9 * 15, 16, 9)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
    assert measured.stderr == pytest.approx(exp(expected) * losses.std().item() / 3, rel=1e-4)
    assert Batches(windows).fingerprint().startswith(measured.fingerprint or "none")


def test_one_window_has_no_standard_error() -> None:
    assert perplexity(small_decoder(), Batches(random_tokens(61, 1, 10))).stderr is None


def test_perplexity_does_not_depend_on_batches() -> None:
    decoder, batches, reported = small_decoder(), Batches(random_tokens(61, 7, 10)), []
    reference = perplexity(decoder, batches, lambda done, total: reported.append((done, total)))
    assert reported == [(7, 7)]
    small_batches = batches.resized(25)
    assert len(small_batches) == 4
    assert perplexity(decoder, small_batches).loss == pytest.approx(reference.loss, rel=1e-6)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    decoder = small_decoder()
    decoder.final_norm.scale.set_value(1e5 * decoder.final_norm.scale[...])
    with pytest.raises(InputError, match="the model's loss on this text is"):
        perplexity(decoder, Batches(random_tokens(61, 2, 9)))
    with pytest.raises(InputError, match="windows of 1 tokens have nothing to predict"):
        perplexity(decoder, Batches(random_tokens(61, 2, 1)))
