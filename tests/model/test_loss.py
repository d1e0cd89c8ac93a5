"""Chunked cross entropy against the plain one, and perplexity against PyTorch."""

from math import exp
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.errors import InputError
from minillm_jax.model import loss
from minillm_jax.model.decoder import final_hidden
from tests.helpers import hugging_face_folder, load_torch, random_tokens, small_decoder, torch_logits


@pytest.mark.parametrize("at_once", [1, 61 * 5, 2**23])
def test_chunked_losses_equal_the_plain_ones(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 3, 12))
    found = loss.token_losses(decoder, final_hidden(decoder, tokens), tokens)
    logits = jax.nn.log_softmax(decoder(tokens)[:, :-1])
    plain = -np.take_along_axis(np.asarray(logits), np.asarray(tokens)[:, 1:, None], axis=2)[..., 0]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


def test_perplexity_equals_pytorch(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model")
    windows = random_tokens(97, 9, 16)
    logits = torch.from_numpy(torch_logits(load_torch(folder), windows))[:, :-1]
    targets = torch.from_numpy(windows[:, 1:].astype(np.int64))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    found = loss.perplexity(read_model(folder).decoder, windows)
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(exp(expected), rel=1e-5)
    assert (found.tokens, found.window, found.windows) == (9 * 15, 16, 9)


def test_perplexity_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, windows, seen = small_decoder(), random_tokens(61, 7, 10), []
    whole = loss.perplexity(decoder, windows, lambda done, total: seen.append((done, total)))
    assert seen == [(7, 7)]
    parts = loss.batches(windows, 25)
    assert len(parts) == 4
    monkeypatch.setattr(loss, "batches", lambda _, devices: parts)
    split = loss.perplexity(decoder, windows)
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)


def test_losses_that_are_no_numbers_are_errors() -> None:
    decoder = small_decoder()
    decoder.final_norm.scale.set_value(1e5 * decoder.final_norm.scale[...])
    with pytest.raises(InputError, match="the model's loss on this text is"):
        loss.perplexity(decoder, random_tokens(61, 2, 9))
    with pytest.raises(InputError, match="windows of 1 tokens have nothing to predict"):
        loss.perplexity(decoder, random_tokens(61, 2, 1))


def test_batches_cover_all_windows_in_at_most_two_sizes() -> None:
    for count in range(1, 20):
        windows = np.arange(count * 4, dtype=np.int32).reshape(count, 4)
        for at_once in (1, 4, 9, 13, 1000):
            parts = loss.batches(windows, at_once)
            np.testing.assert_array_equal(np.concatenate(parts), windows)
            assert len({len(part) for part in parts}) <= 2
            assert max(len(part) for part in parts) * 4 <= max(at_once, 4)
            shared = loss.batches(windows, at_once, devices=3)
            np.testing.assert_array_equal(np.concatenate(shared), windows)
            assert all(len(part) % 3 == 0 for part in shared[:-1])
            assert max(len(part) for part in shared) * 4 <= 3 * max(at_once, 4)
