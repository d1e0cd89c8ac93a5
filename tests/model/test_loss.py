"""Chunked cross entropy against plain cross entropy."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.model.decoder import final_hidden
from minillm_jax.model.loss import token_losses
from tests.helpers import random_tokens, small_decoder


@pytest.mark.parametrize("logits_at_once", [1, 61 * 5, 2**23])
def test_chunked_losses_equal_plain_losses(logits_at_once: int) -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 3, 12))
    losses = token_losses(decoder, final_hidden(decoder, tokens), tokens, logits_at_once)
    logits = jax.nn.log_softmax(decoder(tokens)[:, :-1])
    expected = -np.take_along_axis(np.asarray(logits), np.asarray(tokens)[:, 1:, None], axis=2)[..., 0]
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
