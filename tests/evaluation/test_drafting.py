"""Speculative decoding: tokens and distribution are the dense model's, and the acceptance is the expected one."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.comparing import compare
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.evaluation import drafting
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.ops import Rope
from tests.helpers import compilations, random_tokens, small_decoder

PROMPTS = random_tokens(61, 2, 9)


def near(decoder: Decoder, seed: int, scale: float = 0.02) -> Decoder:
    """A model like another one, with some noise in its weights."""
    leaves, tree = jax.tree.flatten(decoder)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = (leaf + scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True))
    return jax.tree.unflatten(tree, moved)


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("draft", ["near", "other"])
def test_greedy_tokens_are_those_of_the_dense_model(gamma: int, draft: str) -> None:
    dense = small_decoder()
    other = near(dense, 1) if draft == "near" else small_decoder(9, layers=1)
    size = drafting.cache_size(9, 20, gamma)
    for prompt in PROMPTS:
        plain = drafting.decode_alone(dense, prompt, 20, size)
        found = drafting.decode_with_draft(dense, other, prompt, gamma, 20, size)
        assert found.tokens[:20] == plain.tokens
        assert found.drafted == gamma * found.passes
        assert len(found.tokens) == found.accepted + found.passes
        if draft == "near":
            assert 0 < found.accepted < found.drafted


def test_plain_decoding_is_that_of_whole_passes() -> None:
    dense = small_decoder()
    found = drafting.decode_alone(dense, PROMPTS[0], 6, 20).tokens
    logits = dense(jnp.asarray([[*PROMPTS[0], *found]]))[0]  # attention is causal: later tokens change nothing
    assert found == jnp.argmax(logits, axis=-1)[8:-1].tolist()


def test_a_model_accepts_all_its_own_tokens() -> None:
    (found,) = drafting.measure(small_decoder(), [small_decoder()], PROMPTS, 4, 10)
    assert found.greedy == found.sampling == (1.0, 5.0)
    assert found.same == len(PROMPTS)
    assert found.speedup == found.seconds_dense / found.seconds > 0


def test_every_program_is_compiled_once() -> None:
    dense = small_decoder(layers=2)
    with compilations("verify") as verified, compilations("propose") as proposed, compilations("prefill") as read:
        for prompt in PROMPTS:
            drafting.decode_with_draft(dense, dense, prompt, 3, 12, drafting.cache_size(9, 12, 3))
    assert (verified, proposed, read) == (["verify"], ["propose"], ["prefill"])


TINY = Sizes(V=5, D=16, H=4, layers=(LayerSizes(N=8, K=4, F=12),) * 2)
SEEDS = 8000


def first_tokens(gamma: int) -> tuple[np.ndarray, np.ndarray, Decoder, Decoder, np.ndarray]:
    """The first token of many rounds of speculative sampling and its acceptance; with both models and the prompt."""
    dense, draft, prompt = small_decoder(3, sizes=TINY), small_decoder(4, sizes=TINY), random_tokens(5, 1, 7)
    length = jnp.asarray([7])
    of_dense, of_draft = (drafting.prefill(one, jnp.asarray(prompt), 7 + 2 * gamma) for one in (dense, draft))

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jax.random.split(key)
        proposal, _ = drafting.propose(draft, of_draft, jnp.asarray(prompt[:, -2:]), length, gamma, first)
        verdict, _ = drafting.verify(dense, of_dense, jnp.asarray(prompt[:, -1]), length, proposal, second)
        return jnp.where(verdict.accepted > 0, proposal.tokens[:, 0], verdict.token)[0], verdict.accepted[0]

    tokens, accepted = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), SEEDS))
    return np.asarray(tokens), np.asarray(accepted), dense, draft, prompt


@pytest.mark.parametrize("gamma", [1, 3])
def test_sampled_tokens_have_the_distribution_of_the_dense_model(gamma: int) -> None:
    tokens, accepted, dense, draft, prompt = first_tokens(gamma)
    p, q = (np.asarray(jax.nn.softmax(one(jnp.asarray(prompt))[0, -1])) for one in (dense, draft))
    found = np.bincount(tokens, minlength=5) / SEEDS
    assert np.abs(q - p).sum() / 2 > 0.1, "the models are too alike for this test"
    assert np.abs(found - p).sum() / 2 < 0.02  # a standard error of one frequency is 0.005
    assert (accepted > 0).mean() == pytest.approx(np.minimum(p, q).sum(), abs=0.02)


LONG = Rope(100.0, "longrope", original_length=20, short_factors=(1.0, 1.0), long_factors=(3.0, 9.0))


@pytest.mark.parametrize(
    ("rope", "prompt", "size", "length"),
    [
        (LONG, 9, 20, None),
        (LONG, 9, 21, 20),
        (LONG, 21, 40, 20),
        (LONG, 22, 40, None),
        (Rope(100.0, "dynamic", factor=2.0, original_length=20), 22, 40, 20),
        (Rope(100.0, "yarn", factor=2.0, original_length=20), 9, 40, None),
    ],
)
def test_lengths_at_which_all_positions_change(rope: Rope, prompt: int, size: int, length: int | None) -> None:
    assert drafting.outgrown(small_decoder(rope=rope), prompt, size) == length
    assert drafting.outgrown(small_decoder(other_rope=rope), prompt, size) == length


@pytest.mark.parametrize(("prompt", "exact"), [(9, True), (17, False), (22, True)])
def test_decoding_is_that_of_whole_passes_where_no_position_changes(prompt: int, exact: bool) -> None:
    dense, tokens = small_decoder(deviation=1.0, rope=LONG), random_tokens(61, 1, prompt)[0]
    assert (drafting.outgrown(dense, prompt, drafting.cache_size(prompt, 8, 3)) is None) == exact
    whole = tokens.tolist()
    for _ in range(8):
        whole.append(int(jnp.argmax(dense(jnp.asarray([whole]))[0, -1])))
    found = drafting.decode_with_draft(dense, near(dense, 1), tokens, 3, 8, drafting.cache_size(prompt, 8, 3)).tokens
    assert (found[:8] == whole[prompt:]) == exact


def test_a_comparison_refuses_drafts_whose_positions_change(tmp_path: Path) -> None:
    dense = Model(small_decoder(rope=LONG), {}, tmp_path, "dense")
    windows = Batches(random_tokens(61, 2, 18))
    with pytest.raises(InputError, match=r"behind token 20 the rotary positions of all tokens change.*or --draft 0"):
        compare(dense, dense, windows, window=18, draft=4, new_tokens=12)
    assert compare(dense, dense, windows, window=18, draft=0).drafts is None
