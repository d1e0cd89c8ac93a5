"""Inner matrices turned towards what they read on the dense stream."""

import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import kernels
from minillm_jax.pruning.refit import Refit, slice_and_refit
from minillm_jax.pruning.refit_inputs import INNER, align
from minillm_jax.pruning.slicing import slice_layers
from minillm_jax.pruning.walk import InputMoments
from tests.helpers import arrays_equal, random_tokens, small_decoder
from tests.pruning.test_walk import BIASED, KEPT

WINDOWS = random_tokens(61, 24, 12)


def one_layer(biased: bool) -> Block:
    return slice_layers(small_decoder(**(BIASED | {"qkv_bias": True} if biased else {})), [1]).runs[0]


def read(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What matrices read on the pruned and on the dense stream: a linear map of each other, nearly; with means."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, 16)) + 0.3
    return x, x @ (np.eye(16) + 0.2 * rng.normal(size=(16, 16))) + 0.1 * rng.normal(size=(300, 16)) - 0.5


def moments_of(x: np.ndarray, goal: np.ndarray) -> InputMoments:
    return InputMoments(*(jnp.asarray(m, jnp.float32) for m in (x.T @ x, x.sum(0), x.T @ goal, goal.sum(0))))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_outputs_come_as_near_as_least_squares_can_bring_them(kind: str, biased: bool, beta: float) -> None:
    """To what the matrices made of the dense stream, or half-way there; with a bias as an intercept."""
    run, (x, goal) = one_layer(biased), read()
    found = align(kind, run, moments_of(x, goal), len(x), beta, 1e-9)
    column = np.ones((len(x), 1))
    inputs = np.hstack([x, column]) if biased else x
    for name in INNER[kind]:
        part, matrix = name.split(".")
        old, new = (getattr(getattr(block, part), matrix) for block in (run, found))
        kernel = np.asarray(old.kernel[...], np.float64)[0].reshape(16, -1)
        target = (1 - beta) * x @ kernel + beta * goal @ kernel
        best = inputs @ np.linalg.lstsq(inputs, target, rcond=None)[0]
        made = x @ np.asarray(new.kernel[...], np.float64)[0].reshape(16, -1)
        if biased:
            made = made + (np.asarray(new.bias[...], np.float64) - np.asarray(old.bias[...], np.float64))[0].ravel()
        np.testing.assert_allclose(made, best, atol=2e-3 * np.abs(best).max())
    others = {name for names in INNER.values() for name in names} - set(INNER[kind]) | {"attention.o", "mlp.down"}
    for name in others & kernels(run).keys():
        assert arrays_equal(kernels(run)[name][...], kernels(found)[name][...])


def test_equal_streams_leave_the_matrices_alone() -> None:
    x, _ = read()
    run = one_layer(True)
    found = align("head", run, moments_of(x, x), len(x), 1.0, 1e-2)
    for name in INNER["head"]:
        np.testing.assert_allclose(kernels(found)[name][...], kernels(run)[name][...], atol=1e-5)


def test_a_large_ridge_leaves_the_matrices_alone() -> None:
    run = one_layer(False)
    found = align("channel", run, moments_of(*read()), 300, 1.0, 1e8)
    np.testing.assert_allclose(found.mlp.up.kernel[...], run.mlp.up.kernel[...], atol=1e-5)


def test_a_restored_model_is_nearer_to_the_dense_one_with_it() -> None:
    decoder = small_decoder(deviation=0.3)
    kept = {kind: [rows] * 3 for kind, rows in KEPT.items()}
    dense = np.asarray(sequence_losses(decoder, jnp.asarray(WINDOWS)))
    errors = {}
    for inner in (0.0, 1.0):
        pruned = slice_and_refit(decoder, kept, WINDOWS, Refit(alpha=0.0, ridge=1e-4, inner=inner))
        errors[inner] = np.abs(np.asarray(sequence_losses(pruned, jnp.asarray(WINDOWS))) - dense).mean()
    assert errors[1.0] < errors[0.0]


def test_halves_that_lose_nothing_keep_their_inner_matrices() -> None:
    decoder = small_decoder()
    kept = {"head": [np.arange(4)] * 3, "channel": [KEPT["channel"]] * 3}
    refitted = slice_and_refit(decoder, kept, WINDOWS, Refit())
    for name in INNER["head"]:
        assert arrays_equal(kernels(decoder.runs[0])[name][...], kernels(refitted.runs[0])[name][...])
    assert not np.allclose(kernels(decoder.runs[0])["mlp.up"][1, :, 0], kernels(refitted.runs[0])["mlp.up"][1, :, 0])
