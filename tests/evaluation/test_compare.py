"""The changes of a model against a direct computation from all logits, in NumPy."""

import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.evaluation import compare
from minillm_jax.evaluation.compare import Compared, Measures
from minillm_jax.model.decoder import Decoder
from tests.helpers import random_tokens, small_decoder

# Some tokens are frequent, and others are rare.
WINDOWS = np.minimum(random_tokens(61, 7, 50, seed=1), random_tokens(61, 7, 50, seed=2))
NAMES = ("dense", "one", "two")


def log_probabilities(decoder: Decoder) -> np.ndarray:
    """Of the next tokens at every position but the last, float64 [B, P, V]."""
    logits = np.asarray(decoder(jnp.asarray(WINDOWS)), np.float64)[:, :-1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def direct(dense: Decoder, other: Decoder) -> dict[str, np.ndarray]:
    """The measures of every position, and the loss of the dense model."""
    log_p, log_q = log_probabilities(dense), log_probabilities(other)
    p, q = np.exp(log_p), np.exp(log_q)
    best, found = (np.argsort(-array, axis=-1, kind="stable")[..., :5] for array in (log_p, log_q))
    true = WINDOWS[:, 1:, None]
    return {
        "dense": -np.take_along_axis(log_p, true, -1)[..., 0],
        "loss": -np.take_along_axis(log_q, true, -1)[..., 0],
        "divergence": (p * (log_p - log_q)).sum(-1),
        "agreement": best[..., 0] == found[..., 0],
        "overlap": (best[..., :, None] == found[..., None, :]).any(-1).mean(-1),
        "acceptance": np.minimum(p, q).sum(-1),
    }


def compared(others: list[Decoder], tokens_per_batch: int = 4096) -> Compared:
    batches = Batches(WINDOWS, tokens_per_batch=tokens_per_batch)
    return compare.compare(small_decoder(0), others, NAMES[: 1 + len(others)], batches, str)


@pytest.fixture(scope="module")
def two() -> Compared:
    return compared([small_decoder(5), small_decoder(7)])


@pytest.mark.parametrize(("number", "seed"), [(0, 5), (1, 7)])
def test_means_and_standard_errors_equal_a_direct_computation(two: Compared, number: int, seed: int) -> None:
    expected = direct(small_decoder(0), small_decoder(seed))
    expected["increase"] = expected["loss"] - expected["dense"]
    means = two.others[number].means
    assert means.keys() == expected.keys() - {"dense"} == {*Measures._fields, "increase"}
    for name, mean in means.items():
        windows = expected[name].mean(axis=1)
        assert mean.value == pytest.approx(expected[name].mean(), rel=1e-4), name
        assert mean.error == pytest.approx(windows.std(ddof=1) / np.sqrt(7), rel=1e-3), name
    assert two.loss.value == pytest.approx(expected["dense"].mean(), rel=1e-5)
    assert two.others[number].perplexity == pytest.approx(np.exp(expected["loss"].mean()), rel=1e-4)
    assert (two.window, two.windows, two.tokens) == (50, 7, 7 * 49)


def test_curves_equal_a_direct_computation(two: Compared) -> None:
    expected, changes = direct(small_decoder(0), small_decoder(5)), two.others[0]
    assert len(changes.positions) == 32
    assert (changes.positions[0].first, changes.positions[-1].last) == (1, 49)
    counts = np.bincount(WINDOWS[:, 1:].ravel())[WINDOWS[:, 1:]]
    places = np.broadcast_to(np.arange(1, 50), counts.shape)
    assert 3 < len(changes.frequencies) <= 6
    for parts, numbers in ((changes.positions, places), (changes.frequencies, counts)):
        assert sum(part.tokens for part in parts) == counts.size
        for part in parts:
            inside = (numbers >= part.first) & (numbers <= part.last)
            assert part.tokens == inside.sum()
            assert part.dense == pytest.approx(expected["dense"][inside].mean(), rel=1e-4)
            for name, value in part.means.items():
                assert value == pytest.approx(expected[name][inside].mean(), rel=1e-4), name
    assert sum(part.types for part in changes.frequencies) == len(np.unique(WINDOWS[:, 1:]))


def test_the_worst_tokens_and_windows_are_those_whose_loss_grew_most(two: Compared) -> None:
    expected, changes = direct(small_decoder(0), small_decoder(5)), two.others[0]
    growth, targets = expected["loss"] - expected["dense"], WINDOWS[:, 1:]
    often = [token for token in np.unique(targets) if (targets == token).sum() >= compare.FEWEST]
    by_token = {token: growth[targets == token].mean() for token in often}
    assert [one.token for one in changes.tokens] == sorted(often, key=lambda token: -by_token[token])[:10]
    worst = changes.tokens[0]
    assert worst.text == str([worst.token])
    assert worst.occurrences == (targets == worst.token).sum()
    assert worst.loss - worst.dense == pytest.approx(by_token[worst.token], rel=1e-4)
    order = np.argsort(-growth.mean(axis=1))
    assert [one.number for one in changes.windows] == order.tolist()
    assert changes.windows[0].text == str(WINDOWS[order[0], : compare.BEGINNING].tolist())
    assert changes.windows[0].loss == pytest.approx(expected["loss"][order[0]].mean(), rel=1e-4)


def test_a_model_beside_itself_has_not_changed() -> None:
    means = compared([small_decoder(0)]).others[0].means
    exact = {"divergence": 0, "agreement": 1, "overlap": 1, "acceptance": 1, "increase": 0}
    for name, value in exact.items():
        assert means[name].value == pytest.approx(value, abs=1e-6), name


def test_results_do_not_depend_on_batches(two: Compared) -> None:
    split = compared([small_decoder(5), small_decoder(7)], tokens_per_batch=100)
    for one, other in zip(two.others, split.others, strict=True):
        for name in one.means:
            assert one.means[name].value == pytest.approx(other.means[name].value, abs=1e-6), name
        assert [token.token for token in one.tokens] == [token.token for token in other.tokens]


def test_one_window_has_no_standard_error() -> None:
    result = compare.compare(small_decoder(), [small_decoder(5)], NAMES[:2], Batches(WINDOWS[:1, :2]), str)
    assert result.loss.error is None
    assert result.others[0].tokens == []
    assert [part.tokens for part in result.others[0].positions] == [1]


def test_a_loss_that_is_not_finite_names_the_model() -> None:
    broken = small_decoder(5)
    broken.final_norm.scale.set_value(1e5 * broken.final_norm.scale[...])
    with pytest.raises(InputError, match="one's loss on this text is"):
        compared([broken])
