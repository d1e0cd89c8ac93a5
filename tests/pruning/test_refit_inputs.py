"""The input refit against independent least squares."""

import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.data.batches import Batches
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import kernels
from minillm_jax.pruning.refit import slice_and_refit
from minillm_jax.pruning.refit_inputs import INPUT_MATRICES, refit_sublayer_inputs
from minillm_jax.pruning.slicing import slice_layers
from minillm_jax.pruning.walk import Collected, InputMoments
from minillm_jax.settings import Refit
from tests.helpers import arrays_equal, random_tokens, small_decoder
from tests.pruning.test_walk import BIASED, KEPT

WINDOWS = random_tokens(61, 24, 12)


def one_layer(biased: bool) -> Block:
    return slice_layers(small_decoder(**(BIASED | {"qkv_bias": True} if biased else {})), [1]).runs[0]


def random_inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs on the pruned residual stream and on the dense one: linear maps of each other plus noise and means."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, 16)) + 0.3
    return x, x @ (np.eye(16) + 0.2 * rng.normal(size=(16, 16))) + 0.1 * rng.normal(size=(300, 16)) - 0.5


def moments_of(x: np.ndarray, dense_x: np.ndarray) -> InputMoments:
    center, target_center = x[0], dense_x[0]
    x, dense_x = x - center, dense_x - target_center
    sums = (x.T @ x, x.sum(0), x.T @ dense_x, dense_x.sum(0), center, target_center)
    return InputMoments(*(jnp.asarray(m, jnp.float32) for m in sums))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_outputs_equal_those_of_least_squares(kind: str, biased: bool, beta: float) -> None:
    """With the output of the dense model as target, or the mean of both outputs; a bias is an intercept."""
    run, (x, dense_x) = one_layer(biased), random_inputs()
    refitted = refit_sublayer_inputs(kind, run, Collected(moments_of(x, dense_x), None), (len(x), 0), beta, 1e-9)
    column = np.ones((len(x), 1))
    inputs = np.hstack([x, column]) if biased else x
    for name in INPUT_MATRICES[kind]:
        part, matrix = name.split(".")
        old, new = (getattr(getattr(block, part), matrix) for block in (run, refitted))
        kernel = np.asarray(old.kernel[...], np.float64)[0].reshape(16, -1)
        target = (1 - beta) * x @ kernel + beta * dense_x @ kernel
        expected = inputs @ np.linalg.lstsq(inputs, target, rcond=None)[0]
        output = x @ np.asarray(new.kernel[...], np.float64)[0].reshape(16, -1)
        if biased:
            output = output + (np.asarray(new.bias[...], np.float64) - np.asarray(old.bias[...], np.float64))[0].ravel()
        np.testing.assert_allclose(output, expected, atol=2e-3 * np.abs(expected).max())
    unchanged = {name for names in INPUT_MATRICES.values() for name in names} - set(INPUT_MATRICES[kind]) | {
        "attention.o",
        "mlp.down",
    }
    for name in unchanged & kernels(run).keys():
        assert arrays_equal(kernels(run)[name][...], kernels(refitted)[name][...])


def test_equal_residual_streams_keep_the_matrices() -> None:
    x, _ = random_inputs()
    run = one_layer(True)
    refitted = refit_sublayer_inputs("head", run, Collected(moments_of(x, x), None), (len(x), 0), 1.0, 1e-2)
    for name in INPUT_MATRICES["head"]:
        np.testing.assert_allclose(kernels(refitted)[name][...], kernels(run)[name][...], atol=1e-5)


def test_large_ridge_keeps_the_matrices() -> None:
    run = one_layer(False)
    refitted = refit_sublayer_inputs("channel", run, Collected(moments_of(*random_inputs()), None), (300, 0), 1.0, 1e8)
    np.testing.assert_allclose(refitted.mlp.up.kernel[...], run.mlp.up.kernel[...], atol=1e-5)


def test_input_refit_brings_the_pruned_model_nearer_to_the_dense_model() -> None:
    decoder = small_decoder(deviation=0.3)
    kept = {kind: [rows] * 3 for kind, rows in KEPT.items()}
    dense = np.asarray(sequence_losses(decoder, jnp.asarray(WINDOWS)))
    errors = {}
    for beta in (0.0, 1.0):
        pruned = slice_and_refit(decoder, kept, Batches(WINDOWS), Refit(alpha=0.0, ridge=1e-4, inputs=beta))
        errors[beta] = np.abs(np.asarray(sequence_losses(pruned, jnp.asarray(WINDOWS))) - dense).mean()
    assert errors[1.0] < errors[0.0]


def test_input_refit_skips_sublayers_that_keep_all_groups() -> None:
    decoder = small_decoder()
    kept = {"head": [np.arange(4)] * 3, "channel": [KEPT["channel"]] * 3}
    refitted = slice_and_refit(decoder, kept, Batches(WINDOWS), Refit())
    for name in INPUT_MATRICES["head"]:
        assert arrays_equal(kernels(decoder.runs[0])[name][...], kernels(refitted.runs[0])[name][...])
    assert not np.allclose(kernels(decoder.runs[0])["mlp.up"][1, :, 0], kernels(refitted.runs[0])["mlp.up"][1, :, 0])
