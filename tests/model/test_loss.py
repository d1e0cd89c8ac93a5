"""Chunked cross entropy and divergence against plain ones."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.devices.sharding import layers_of
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import embed, final_hidden, finish, layers_from
from minillm_jax.model.loss import token_divergences, token_losses, top_tokens
from minillm_jax.pruning.slicing import slice_groups
from tests.helpers import random_tokens, small_decoder


@pytest.mark.parametrize("logits_at_once", [1, 61 * 5, 2**23])
def test_chunked_losses_equal_plain_losses(logits_at_once: int) -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 3, 12))
    losses = token_losses(decoder, final_hidden(decoder, tokens), tokens, logits_at_once)
    logits = jax.nn.log_softmax(decoder(tokens)[:, :-1])
    expected = -np.take_along_axis(np.asarray(logits), np.asarray(tokens)[:, 1:, None], axis=2)[..., 0]
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [61, 8])
def test_divergence_is_that_of_all_probabilities_or_less_with_the_top_tokens_alone(kept: int) -> None:
    tokens = jnp.asarray(random_tokens(61, 3, 12))
    dense, other = small_decoder(), small_decoder(seed=1)
    top = top_tokens(dense, final_hidden(dense, tokens), kept)
    assert top.ids.shape == (3, 11, kept)
    losses, divergences = token_divergences(other, final_hidden(other, tokens), tokens, top)
    np.testing.assert_allclose(losses, token_losses(other, final_hidden(other, tokens), tokens), rtol=1e-6)
    p, q = (np.asarray(jax.nn.log_softmax(model(tokens)[:, :-1]), np.float64) for model in (dense, other))
    whole = np.sum(np.exp(p) * (p - q), axis=-1)
    if kept == 61:
        np.testing.assert_allclose(divergences, whole, rtol=1e-3, atol=1e-4)
    else:
        assert (np.asarray(divergences) <= whole + 1e-5).all()
        assert (np.asarray(divergences) > 0.1 * whole).all()


def test_a_model_does_not_diverge_from_itself() -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 2, 9))
    hidden = final_hidden(decoder, tokens)
    _, divergences = token_divergences(decoder, hidden, tokens, top_tokens(decoder, hidden, 8))
    np.testing.assert_allclose(divergences, 0, atol=1e-6)


def test_layers_from_any_layer_continue_the_stream() -> None:
    """Also across runs of unequal layers."""
    decoder, tokens = small_decoder(layers=4), jnp.asarray(random_tokens(61, 2, 9))
    kept = {"channel": [np.arange(n) for n in (12, 12, 5, 5)]}
    for model in (decoder, slice_groups(decoder, kept)):
        x, whole = embed(model, tokens), final_hidden(model, tokens)
        for first, layer in enumerate(layers_of(model, None)):
            np.testing.assert_allclose(finish(model, layers_from(model, x, jnp.int32(first), 9)), whole, atol=1e-5)
            x = layers_from(with_runs(model, [layer]), x, jnp.int32(0), 9)
        np.testing.assert_allclose(finish(model, x), whole, atol=1e-5)
        np.testing.assert_array_equal(layers_from(model, x, jnp.int32(4), 9), x)
