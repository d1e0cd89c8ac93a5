"""Chunked cross entropy against plain cross entropy, perplexity against PyTorch, and the batches of both."""

import os
import subprocess
import sys
from math import exp
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model.decoder import final_hidden
from minillm_jax.model.loss import token_losses
from tests.helpers import hugging_face_folder, load_torch, random_tokens, small_decoder, torch_logits


@pytest.mark.parametrize("logits_at_once", [1, 61 * 5, 2**23])
def test_chunked_losses_equal_plain_losses(logits_at_once: int) -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 3, 12))
    losses = token_losses(decoder, final_hidden(decoder, tokens), tokens, logits_at_once)
    logits = jax.nn.log_softmax(decoder(tokens)[:, :-1])
    expected = -np.take_along_axis(np.asarray(logits), np.asarray(tokens)[:, 1:, None], axis=2)[..., 0]
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


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


def check_batches(devices: int) -> None:
    """Asserts that batches cover all windows in order, in at most two sizes, and within the limit of tokens."""
    mesh = jax.make_mesh((devices, 1), ("data", "model")) if devices > 1 else None
    for count in range(1, 20):
        windows = np.arange(count * 4, dtype=np.int32).reshape(count, 4)
        for tokens_per_batch in (1, 4, 9, 13, 1000):
            batches = list(Batches(windows, mesh, tokens_per_batch))
            np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in batches]), windows)
            np.testing.assert_array_equal(np.concatenate([batch.numbers for batch in batches]), np.arange(count))
            sizes = [len(batch.numbers) for batch in batches]
            assert max(sizes) * 4 <= devices * max(tokens_per_batch, 4)
            # On several devices, the last batch may be a remainder that does not divide by them.
            assert len({size for size in sizes if size % devices == 0}) <= 2
            assert all(size % devices == 0 for size in sizes[:-1])


def test_batches_cover_all_windows_in_at_most_two_sizes() -> None:
    check_batches(devices=1)


def test_batches_on_three_devices_divide_by_the_devices() -> None:
    """In a process with three devices of the CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": flags}
    environment |= {"JAX_PLATFORMS": "cpu"}
    program = "from tests.model.test_loss import check_batches; check_batches(3)"
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
