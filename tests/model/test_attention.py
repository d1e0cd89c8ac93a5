"""Attention in blocks of queries has the values and derivatives of whole scores (memory: `test_memory`)."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.model.attention import (
    SCORES_AT_ONCE,
    WHOLE_SCORES,
    Mask,
    branch_mask,
    cached_mask,
    causal_mask,
    grouped_attention,
    rows_at_once,
)
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.ops import alibi_slopes
from tests.helpers import logits_of, random_tokens, small_decoder

# Two sequences of 30 tokens, four query heads on two key/value heads.
LENGTH = 30
CONTINUATIONS = np.repeat([0, 1, 2], 10)[None].repeat(2, 0)
PLACES = np.concatenate([np.arange(20), np.arange(10, 20)])[None].repeat(2, 0)
NEW = np.stack([np.arange(30), np.arange(12, 42)])

VARIANTS: dict[str, tuple[Mask, dict[str, Any]]] = {
    "causal": (causal_mask(LENGTH, None), {}),
    "window, cap, scale": (causal_mask(LENGTH, 7), {"cap": 0.8, "scale": 0.4}),
    "cache, window, alibi": (cached_mask(jnp.asarray(NEW), 45, 9), {"keys": 45, "slopes": alibi_slopes(4)}),
    "continuations, window, alibi": (
        branch_mask(jnp.asarray(PLACES), jnp.asarray(CONTINUATIONS), 5),
        {"positions": PLACES, "slopes": alibi_slopes(4)},
    ),
}


def mixed_and_derivatives(name: str, rows: int = LENGTH, parts: int = 1) -> list[np.ndarray]:
    """The mixed values, their gradients by queries, keys and values, and a derivative along a direction."""
    mask, options = VARIANTS[name]
    others = {key: jnp.asarray(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    keys = others.pop("keys", LENGTH)
    shapes = (2, LENGTH, 4, 6), (2, keys, 2, 6), (2, keys, 2, 6)
    point, way, (weights, *_) = (
        tuple(jax.random.normal(jax.random.key(seed + i), shape) for i, shape in enumerate(shapes))
        for seed in (0, 10, 20)
    )

    def mix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return grouped_attention(q, k, v, mask, rows=rows, parts=parts, **others)

    @jax.jit
    def everything() -> Any:
        values, along = jax.jvp(mix, point, way)
        return values, along, jax.grad(lambda *at: jnp.sum(weights * mix(*at)), argnums=(0, 1, 2))(*point)

    return [np.asarray(array) for array in jax.tree.leaves(everything())]


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_of_queries_give_the_values_and_derivatives_of_whole_scores(name: str) -> None:
    """Four blocks of eight queries, of which the last two are no queries of the sequence."""
    found, whole = mixed_and_derivatives(name, rows=8), mixed_and_derivatives(name)
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rows", [LENGTH, 5])
def test_parts_of_a_sequence_give_the_values_and_derivatives_of_the_whole(name: str, rows: int) -> None:
    """Four parts of seven or eight queries, whole or in blocks of four or fewer queries."""
    found, whole = mixed_and_derivatives(name, rows, parts=4), mixed_and_derivatives(name)
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_causal_mask_needs_no_later_keys() -> None:
    """What grouped attention leaves out: in every variant that says so, query t attends to no key after key t."""
    for mask, options in VARIANTS.values():
        allowed = np.asarray(mask.rows(jnp.arange(LENGTH)))
        keys = np.arange(options.get("keys", LENGTH))
        later = keys[None, :] > np.arange(LENGTH)[:, None]
        assert mask.is_causal == (not (allowed & later).any())


# Decoders with each kind of score: norms of queries and keys, sliding windows in one layer, soft caps, ALiBi.
SCORES = {
    "norms of queries and keys": ({"qk_norm": True}, {}),
    "windows, cap, scale": ({"windowed": True, "attention_cap": 1.5, "query_scale": 0.3}, {"window": 9}),
    "alibi": ({"rope": None, "alibi_heads": 2}, {"slopes": tuple(alibi_slopes(2).tolist())}),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_long_window_has_the_logits_of_the_short_one_that_it_begins_with(name: str) -> None:
    """A window of 2,048 tokens has whole scores, and one of 2,049 tokens has blocks."""
    config, data = SCORES[name]
    layer = LayerSizes(N=2, K=1, F=12, slopes=data.get("slopes", ()))
    sizes = Sizes(V=61, D=16, H=4, layers=(layer, replace(layer, window=data.get("window"))))
    decoder, tokens = small_decoder(sizes=sizes, **config), random_tokens(61, 1, 2049)
    assert rows_at_once(2048, 2048) == 2048
    assert rows_at_once(2049, 2049) < 2049
    short, long = logits_of(decoder, tokens[:, :2048]), logits_of(decoder, tokens)
    # ALiBi adds numbers of up to 500, so that the scores themselves are rounded.
    np.testing.assert_allclose(long[:, :2048], short, atol=1e-5 * np.abs(short).max())


def test_a_block_holds_a_bounded_number_of_scores() -> None:
    for queries, keys in ((1, 10**6), (8192, 8192), (300, 65_536), (2, 10**7)):
        rows = rows_at_once(queries, keys)
        assert rows == 1 or rows * keys <= max(SCORES_AT_ONCE, WHOLE_SCORES if rows == queries else 0)
