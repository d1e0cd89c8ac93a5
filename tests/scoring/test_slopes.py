"""SPSA: the paired loss, the projected gradient, and what their mean approaches."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.errors import InputError
from minillm_jax.model.build import with_runs
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.tree import kernels
from minillm_jax.scoring.gradient import directions, plan
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.estimate import estimate
from minillm_jax.scoring.gradient.rebuild import rebuild
from minillm_jax.scoring.gradient.settings import Estimation
from minillm_jax.scoring.gradient.spaces import Weights
from tests.helpers import pairs_of, perturb, random_tokens, small_decoder

# About 400 weights, so that a few thousand directions span them several times over.
TINY = Sizes(V=11, D=4, H=2, layers=(LayerSizes(N=2, K=1, F=5),) * 3)


@partial(jax.jit, static_argnames="distribution")
def moved(decoder: Decoder, key: jax.Array, scale: jax.Array, distribution: str) -> Decoder:
    """A decoder whose every layer is really perturbed: the copy that the package never makes."""
    run = decoder.runs[0]
    layers = run.attention_norm.scale.shape[0]
    blocks = [
        perturb(jax.tree.map(lambda a, i=i: a[i], run), key, jnp.int32(i), scale, distribution) for i in range(layers)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return with_runs(decoder, [stacked])


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_paired_loss_equals_two_separate_losses(distribution: str) -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 3, 17))
    keys = directions.direction_keys(0, 0, 2)
    pairs = pairs_of(decoder, keys, tokens, 0.01, Weights(distribution))
    assert pairs.shape == (2, 2, 3)
    assert pairs.dtype == jnp.float32
    for number, key in enumerate(keys):
        for side, scale in enumerate((0.01, -0.01)):
            separate = sequence_losses(moved(decoder, key, jnp.float32(scale), distribution), tokens)
            np.testing.assert_allclose(pairs[number, side], separate, rtol=1e-6)
    assert not np.allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_rebuilt_gradient_equals_the_materialised_mean(distribution: str) -> None:
    keys, projected = directions.direction_keys(5, 0, 6), jnp.asarray([0.3, -1.2, 2.0, 0.01, -0.5, 0.7], jnp.float32)
    shape, layer = (16, 8, 4), jnp.int32(2)
    rebuilt = jax.jit(partial(rebuild, "attention.q", shape, space=Weights(distribution)))(
        layer=layer, directions=Directions.plain(keys), projected=projected
    )
    drawn = [np.asarray(directions.draw(key, layer, "attention.q", shape, distribution), np.float64) for key in keys]
    expected = np.mean([c * z for c, z in zip(np.asarray(projected, np.float64), drawn, strict=True)], axis=0)
    np.testing.assert_allclose(rebuilt, expected, rtol=0, atol=1e-6)


def flat_gradient(decoder: Decoder, tokens: jax.Array) -> np.ndarray:
    """The true gradient over all block matrices, by backward differentiation of the mean loss."""
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    slopes = jax.grad(lambda d: jnp.sum(sequence_losses(d, tokens)) / predictions)(decoder)
    return np.concatenate([np.asarray(k[...], np.float64).ravel() for k in kernels(slopes.runs[0]).values()])


def flat_estimate(decoder: Decoder, projected: np.ndarray, settings: Estimation) -> np.ndarray:
    """ĝ over all block matrices, in the order of `flat_gradient`."""
    drawn, slopes = settings.draw(decoder, 0, len(projected)), jnp.asarray(projected, jnp.float32)
    found = []
    for name, kernel in kernels(decoder.runs[0]).items():
        layers = jnp.arange(kernel.shape[0], dtype=jnp.int32)
        found.append(_every_layer(name, kernel.shape[1:], settings.distribution, layers, drawn, slopes))
    return np.concatenate([np.asarray(part, np.float64).ravel() for part in found])


@partial(jax.jit, static_argnames=("name", "shape", "distribution"))
def _every_layer(
    name: str, shape: tuple, distribution: str, layers: jax.Array, drawn: Directions, projected: jax.Array
) -> jax.Array:
    return jax.lax.map(lambda layer: rebuild(name, shape, layer, drawn, projected, Weights(distribution)), layers)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_spsa_approaches_the_true_gradient_as_theory_says(distribution: str) -> None:
    """Cosine with the true gradient: about sqrt(n / (n + d)) for n directions in d dimensions."""
    decoder, tokens = small_decoder(sizes=TINY, deviation=0.5), jnp.asarray(random_tokens(11, 4, 9))
    true = flat_gradient(decoder, tokens)
    settings = Estimation(directions=4096, epsilon=1e-3, distribution=distribution, per_step=64)
    projected = one_column(decoder, np.asarray(tokens), settings)
    for count in (16, 256, 4096):
        expected = (count / (count + len(true))) ** 0.5
        assert cosine(flat_estimate(decoder, projected[:count], settings), true) == pytest.approx(expected, abs=0.12)
    whole = flat_estimate(decoder, projected, settings)
    assert np.linalg.norm(whole) == pytest.approx(np.linalg.norm(true), rel=0.15)


def one_column(decoder: Decoder, windows: np.ndarray, settings: Estimation) -> np.ndarray:
    """The projected gradients of an estimate whose directions all sequences share."""
    projected = estimate(decoder, windows, settings).projected
    assert projected is not None
    assert projected.dtype == np.float64
    return projected.sum(axis=1)


@pytest.mark.parametrize(
    ("difference", "distribution", "tolerance"),
    [("spsa", "gaussian", 0.02), ("jvp", "gaussian", 1e-5), ("jvp", "rademacher", 1e-5), ("spsa", "sphere", 0.02)],
)
def test_projected_gradient_is_the_directional_derivative(difference: str, tolerance: float, distribution: str) -> None:
    decoder, tokens = small_decoder(sizes=TINY, deviation=0.5), random_tokens(11, 4, 9)
    settings = Estimation(difference, directions=8, epsilon=3e-4, distribution=distribution)
    projected = one_column(decoder, tokens, settings)
    true = flat_gradient(decoder, jnp.asarray(tokens))
    for number in range(8):
        one_hot = np.where(np.arange(8) == number, 8.0, 0.0)  # rebuilds 8 / 8 times the direction
        direction = flat_estimate(decoder, one_hot, settings)
        assert projected[number] == pytest.approx(true @ direction, rel=tolerance, abs=tolerance)


def test_a_direction_on_the_sphere_has_length_root_d() -> None:
    decoder, settings = small_decoder(sizes=TINY), Estimation(directions=4, distribution="sphere")
    for number in range(4):
        one_hot = np.where(np.arange(4) == number, 4.0, 0.0)
        direction = flat_estimate(decoder, one_hot, settings)
        assert np.sum(np.square(direction)) == pytest.approx(direction.size, rel=1e-5)
    assert not np.allclose(settings.draw(decoder, 0, 4).factors, 1.0, atol=1e-3)


def test_estimate_reports_progress_and_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "WORK_PER_CALL", 1.0)
    decoder, windows, seen = small_decoder(), random_tokens(61, 2, 9), []
    settings = Estimation(directions=5, per_step=2)
    first = estimate(decoder, windows, settings, lambda done, total: seen.append((done, total))).projected
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert first is not None
    np.testing.assert_array_equal(first.sum(axis=1), one_column(decoder, windows, settings))
    assert not np.allclose(first.sum(axis=1), one_column(decoder, windows, replace(settings, seed=1)))


def test_a_step_lost_in_rounding_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no direction changes the loss at --epsilon 1e-30"):
        estimate(small_decoder(), random_tokens(61, 2, 9), Estimation(directions=1, epsilon=1e-30))


def test_a_step_that_breaks_the_loss_is_an_error() -> None:
    with pytest.raises(InputError, match=r"not finite at --epsilon 1e\+38; use a smaller one"):
        estimate(small_decoder(), random_tokens(61, 2, 9), Estimation(directions=1, epsilon=1e38))
