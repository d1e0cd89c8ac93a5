"""A forward pass over new tokens with the keys and values of the earlier ones gives the states of a whole pass."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.errors import InputError
from minillm_jax.model import cache
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.ops import LENGTH_DEPENDENT
from minillm_jax.pruning.slicing import slice_groups
from tests.helpers import CONFIGURATIONS, quickly, random_tokens, small_decoder, torch_model

TOKENS = random_tokens(97, 3, 40)
QUICK = ("opt", "bloom", "gemma2", "phi3, sliding window, partial rotary")

extend = jax.jit(cache.extend)
close = partial(np.testing.assert_allclose, atol=3e-5, rtol=3e-5)


def in_parts(decoder: Decoder, tokens: np.ndarray, cuts: list[int]) -> np.ndarray:
    """The hidden states of all tokens, read part by part."""
    kept, parts = cache.empty(decoder, len(tokens), 48), []
    for part in np.split(tokens, cuts, axis=1):
        hidden, kept = extend(decoder, kept, jnp.asarray(part))
        parts.append(hidden)
    assert kept.lengths.tolist() == [tokens.shape[1]] * len(tokens)
    return np.concatenate(parts, axis=1)


def whole(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(final_hidden)(decoder, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", quickly(CONFIGURATIONS, QUICK))
def test_tokens_read_in_parts_have_the_states_of_a_whole_pass(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGURATIONS[name]
    torch_model(family, **changes).save_pretrained(tmp_path / "model")
    decoder = read_model(tmp_path / "model").decoder
    rope, tokens = decoder.config.rope, TOKENS
    if rope is not None and rope.kind in LENGTH_DEPENDENT:  # longer sequences rotate the earlier tokens otherwise
        tokens = TOKENS[:, : rope.original_length]
    close(in_parts(decoder, tokens, [30, 31]), whole(decoder, tokens))


def unequal() -> Decoder:
    """A model whose layers have 4, 1 and 0 key/value heads."""
    channels = [np.arange(12), np.arange(5), np.arange(9)]
    return slice_groups(small_decoder(), {"head": [np.arange(4), np.arange(1, 2), np.arange(0)], "channel": channels})


def test_layers_of_unequal_size_have_caches_of_their_own() -> None:
    decoder, tokens = unequal(), random_tokens(61, 2, 40)
    assert [stored.keys.shape[3] for stored in cache.empty(decoder, 2, 48).runs] == [4, 1, 0]
    close(in_parts(decoder, tokens, [1, 17]), whole(decoder, tokens))


def test_padding_is_overwritten_and_never_read() -> None:
    """Sequences of 5, 16 and 11 tokens in one batch, then 3 more tokens each."""
    decoder, tokens, counts = small_decoder(), random_tokens(61, 3, 24), np.array([5, 16, 11])
    padded = np.where(np.arange(16) < counts[:, None], tokens[:, :16], 7)
    first, kept = extend(decoder, cache.empty(decoder, 3, 24), jnp.asarray(padded), jnp.asarray(counts))
    more = np.stack([row[count : count + 3] for row, count in zip(tokens, counts, strict=True)])
    second, kept = extend(decoder, kept, jnp.asarray(more))
    assert kept.lengths.tolist() == [8, 19, 14]
    for row, count in enumerate(counts):
        alone = whole(decoder, tokens[row : row + 1, : count + 3])[0]
        close(first[row, :count], alone[:count])
        close(second[row], alone[count:])


def test_selected_sequences_go_on_from_the_same_tokens() -> None:
    """Two continuations of the first sequence, and one of the second."""
    decoder, tokens = small_decoder(), random_tokens(61, 2, 10)
    _, kept = extend(decoder, cache.empty(decoder, 2, 16), jnp.asarray(tokens))
    endings = random_tokens(61, 3, 4, seed=1)
    hidden, _ = extend(decoder, cache.select(kept, jnp.array([0, 0, 1])), jnp.asarray(endings))
    joined = np.concatenate([tokens[[0, 0, 1]], endings], axis=1)
    close(hidden, whole(decoder, joined)[:, 10:])


def test_a_cache_longer_than_the_learned_positions_is_refused(tmp_path: Path) -> None:
    torch_model("opt", max_position_embeddings=40).save_pretrained(tmp_path / "model")
    decoder = read_model(tmp_path / "model").decoder
    assert cache.size_of(cache.empty(decoder, 1, 40)) == 40
    with pytest.raises(InputError, match="sequences of 41 tokens are too long: the model has 40 learned positions"):
        cache.empty(decoder, 1, 41)
