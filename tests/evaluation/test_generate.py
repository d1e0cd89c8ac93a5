"""Generated tokens: those of transformers, drawn by the probabilities, and each prompt's own."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.errors import InputError
from minillm_jax.evaluation.generate import Sampling, generate, next_tokens, nucleus, sizes_for, steps
from minillm_jax.model.decoder import Decoder
from tests.helpers import (
    CONFIGURATIONS,
    compilations,
    logits_of,
    quickly,
    random_tokens,
    small_decoder,
    torch_model,
)

PROMPTS = [random_tokens(97, 21).tolist(), random_tokens(97, 5, seed=1).tolist(), [3]]
COUNT = 24


def by_transformers(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", quickly(CONFIGURATIONS, ("opt", "bloom", "gemma2")))
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGURATIONS[name]
    model = torch_model(family, **changes)
    model.save_pretrained(tmp_path / "model")
    found = generate(read_model(tmp_path / "model").decoder, PROMPTS, COUNT)
    assert found == [by_transformers(model, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return small_decoder(deviation=0.6)


SMALL_PROMPTS = [[5, 9, 2], [7] * 12, [1]]


def test_a_text_ends_with_the_token_that_stops_it(decoder: Decoder) -> None:
    whole = generate(decoder, SMALL_PROMPTS, 12)
    stop = whole[0][4]
    found = generate(decoder, SMALL_PROMPTS, 12, stops=[stop])
    for row, free in zip(found, whole, strict=True):
        assert row == (free[: free.index(stop) + 1] if stop in free else free)
    alone = list(steps(decoder, SMALL_PROMPTS[:1], 12, stops=[stop]))
    assert len(alone) == len(found[0]) < 12


def test_drawn_tokens_depend_on_the_seed_and_not_on_the_other_prompts(decoder: Decoder) -> None:
    drawn = Sampling(temperature=1.0, seed=3)
    together = generate(decoder, SMALL_PROMPTS, 10, drawn)
    assert together == generate(decoder, SMALL_PROMPTS, 10, drawn)
    assert together[:1] == generate(decoder, SMALL_PROMPTS[:1], 10, drawn)
    assert together != generate(decoder, SMALL_PROMPTS, 10, Sampling(temperature=1.0, seed=4))


def test_drawn_tokens_have_the_probabilities_of_the_model(decoder: Decoder) -> None:
    logits = logits_of(decoder, np.array([SMALL_PROMPTS[0]]))[0, -1]
    rows = 20_000
    keys = jax.random.split(jax.random.key(0), rows)
    found = next_tokens(jnp.broadcast_to(jnp.asarray(logits), (rows, len(logits))), 0, keys, Sampling(temperature=0.7))
    shares = np.bincount(np.asarray(found), minlength=len(logits)) / rows
    expected = np.asarray(jax.nn.softmax(logits / 0.7))
    assert np.abs(shares - expected).sum() / 2 < 0.03
    hot = np.asarray(jax.nn.softmax(logits))
    assert np.abs(shares - hot).sum() / 2 > 0.05, "the temperature matters here"


@pytest.mark.parametrize(
    ("top_p", "left"), [(0.05, [2]), (0.5, [2]), (0.51, [0, 2]), (0.81, [0, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_the_nucleus_is_the_fewest_tokens_that_reach_a_probability(top_p: float, left: list[int]) -> None:
    logits = jnp.log(jnp.array([0.3, 0.05, 0.5, 0.15]))
    assert np.flatnonzero(np.isfinite(nucleus(logits, jnp.float32(top_p)))).tolist() == left


def test_prompts_of_neighbouring_lengths_share_their_programs(decoder: Decoder) -> None:
    """A step has one compilation for all prompts whose cache has one size."""
    with compilations("read_token") as compiled:
        generate(decoder, [[4] * 17, [2]], 10)
        generate(decoder, [[4] * 20, [3] * 9], 12)
    assert len(compiled) == 1
    assert sizes_for(decoder, np.array([17]), 10) == sizes_for(decoder, np.array([20]), 12) == (32, 32)


def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path, decoder: Decoder) -> None:
    with pytest.raises(InputError, match="a prompt has no tokens"):
        generate(decoder, [[1], []], 4)
    torch_model("opt", max_position_embeddings=40).save_pretrained(tmp_path / "model")
    learned = read_model(tmp_path / "model").decoder
    assert len(generate(learned, [[5] * 30], 10)[0]) == 10
    with pytest.raises(InputError, match=r"a prompt of 30 tokens and 11 further ones .* the model has 40 learned"):
        generate(learned, [[5] * 30], 11)
