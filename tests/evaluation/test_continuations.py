"""Log-likelihoods of continuations that share a sequence with their prefix: those of each request alone."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.reader import read_model
from minillm_jax.errors import InputError
from minillm_jax.evaluation.continuations import Group, Request, batches, grouped, likelihoods, packed, padded
from minillm_jax.model.decoder import Decoder
from tests.helpers import CONFIGURATIONS, logits_of, quickly, small_decoder, torch_model


def tokens(count: int, seed: int, vocabulary: int = 61) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, vocabulary, count).tolist())


QUESTION, OTHER = tokens(23, 0), tokens(30, 1)
REQUESTS = [
    *(Request(QUESTION, tokens(count, seed)) for seed, count in enumerate((5, 1, 9, 3), 10)),
    Request(OTHER, tokens(40, 20)),
    Request(OTHER, tokens(2, 21)),
    Request((4,), tokens(12, 22)),
    Request(QUESTION, tokens(1, 23)),
]


def alone(decoder: Decoder, request: Request) -> tuple[float, bool]:
    """By the logits of the request's tokens alone."""
    ids = [*request.prefix, *request.continuation]
    logits = logits_of(decoder, np.array([ids]))[0, len(request.prefix) - 1 : -1]
    logs = np.asarray(jax.nn.log_softmax(logits))[range(len(request.continuation)), request.continuation]
    return float(logs.sum()), bool((logits.argmax(-1) == request.continuation).all())


@pytest.mark.parametrize("name", quickly(CONFIGURATIONS, ("opt", "bloom", "gemma2")))
def test_continuations_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGURATIONS[name]
    torch_model(family, **changes).save_pretrained(tmp_path / "model")
    decoder = read_model(tmp_path / "model").decoder
    for found, request in zip(likelihoods(decoder, REQUESTS), REQUESTS, strict=True):
        expected, greedy = alone(decoder, request)
        assert found.log == pytest.approx(expected, abs=1e-4)
        assert found.greedy == greedy


def test_most_probable_continuations_are_known() -> None:
    decoder, prefix = small_decoder(deviation=0.6), [3, 5, 7]
    for _ in range(4):
        prefix.append(int(logits_of(decoder, np.array([prefix]))[0, -1].argmax()))
    best, other = Request((3, 5, 7), tuple(prefix[3:])), Request((3, 5, 7), (*prefix[3:6], (prefix[6] + 1) % 61))
    assert [found.greedy for found in likelihoods(decoder, [best, other])] == [True, False]


@pytest.mark.parametrize("tokens_per_batch", [16, 100, 4096])
def test_the_size_of_the_batches_changes_nothing(tokens_per_batch: int) -> None:
    decoder = small_decoder()
    expected = [found.log for found in likelihoods(decoder, REQUESTS)]
    counts = []
    found = likelihoods(decoder, REQUESTS, tokens_per_batch, progress=lambda done, of: counts.append((done, of)))
    np.testing.assert_allclose([one.log for one in found], expected, atol=1e-5)
    assert counts[-1] == (len(REQUESTS), len(REQUESTS))


def test_equal_prefixes_share_a_sequence() -> None:
    groups = grouped(REQUESTS)
    assert [numbers_of(group) for group in groups] == [[0, 1, 2, 3, 7], [4, 5], [6]]
    assert [group.length for group in groups] == [23 + 4 + 0 + 8 + 2 + 0, 30 + 39 + 1, 1 + 11]
    many = [Request((1,), tokens(50, seed)) for seed in range(9)]
    assert [len(group.branches) for group in grouped(many)] == [3, 3, 3], "long continuations do not all share one"


def test_prefixes_that_begin_alike_share_their_beginning() -> None:
    """As where the choice stands before the continuation; the third prefix has less than half in common."""
    ends = [(7,), (8, 9), tokens(40, 5)]
    asked = [Request(QUESTION + end, (5, 6, 4)) for end in ends]
    joined, other = grouped(asked)
    assert joined.prefix == QUESTION
    assert [branch.given for branch in joined.branches] == [1, 2]
    assert (joined.predicted, joined.length) == (6, 23 + 3 + 4)
    assert numbers_of(other) == [2]
    decoder = small_decoder()
    for found, request in zip(likelihoods(decoder, asked), asked, strict=True):
        assert found.log == pytest.approx(alone(decoder, request)[0], abs=1e-4)


def numbers_of(group: Group) -> list[int]:
    return [branch.number for branch in group.branches]


@given(st.integers(1, 5000))
def test_padding_is_at_most_a_third(length: int) -> None:
    size = padded(length)
    assert length <= size
    assert size == 16 or size < 1.5 * length


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=12), st.integers(1, 300))
def test_every_request_is_packed_once(sizes: list[tuple[int, int]], tokens_per_batch: int) -> None:
    requests = [
        Request(tokens(40, 0)[:prefix], tokens(length, number)) for number, (prefix, length) in enumerate(sizes)
    ]
    seen = []
    for shape, groups in batches(requests, tokens_per_batch, devices=2):
        assert shape.sequences % 2 == 0
        arrays = packed(groups, shape)
        for row, group in enumerate(groups):
            own = [requests[number] for number in numbers_of(group)]
            targets = arrays.targets[row, : group.predicted].tolist()
            assert targets == [token for one in own for token in one.continuation]
            before = arrays.tokens[row, arrays.sources[row, : group.predicted]].tolist()
            assert before == [token for one in own for token in (one.prefix[-1], *one.continuation[:-1])]
            seen.extend(numbers_of(group))
    assert sorted(seen) == list(range(len(requests)))


def test_requests_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    torch_model("opt", max_position_embeddings=40).save_pretrained(tmp_path / "model")
    decoder = read_model(tmp_path / "model").decoder
    fits = [Request(tokens(30, 0), tokens(11, seed)) for seed in (1, 2)]  # the sequence of both is longer
    assert len(likelihoods(decoder, fits)) == 2
    with pytest.raises(InputError, match="request 1: 41 tokens are too long: the model has 40 learned positions"):
        likelihoods(decoder, [*fits[:1], Request(tokens(30, 0), tokens(12, 1))])
    with pytest.raises(InputError, match="request 0: the prefix has no tokens"):
        likelihoods(decoder, [Request((), (1,))])
    with pytest.raises(InputError, match="request 0: the continuation has no tokens"):
        likelihoods(decoder, [Request((1,), ())])
