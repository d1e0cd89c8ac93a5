"""SPSA: paired losses, projected gradients, and the gradient that their mean approaches."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.model.build import with_runs
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.tree import kernels
from minillm_jax.scoring.gradient import directions
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.estimate import estimate
from minillm_jax.scoring.gradient.plan import Plan, plan
from minillm_jax.scoring.gradient.rebuild import rebuild
from minillm_jax.scoring.gradient.settings import draw
from minillm_jax.scoring.gradient.spaces import Weights
from minillm_jax.settings import Estimation
from tests.helpers import pairs_of, perturb, random_tokens, small_decoder

# About 400 weights, so that a few thousand directions span them several times over.
TINY = Sizes(V=11, D=4, H=2, layers=(LayerSizes(N=2, K=1, F=5),) * 3)


@partial(jax.jit, static_argnames="distribution")
def moved(decoder: Decoder, key: jax.Array, scale: jax.Array, distribution: str) -> Decoder:
    """A decoder with perturbed weights in all layers: a copy that the package never makes."""
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
    entries = [np.asarray(directions.draw(key, layer, "attention.q", shape, distribution), np.float64) for key in keys]
    expected = np.mean([c * z for c, z in zip(np.asarray(projected, np.float64), entries, strict=True)], axis=0)
    np.testing.assert_allclose(rebuilt, expected, rtol=0, atol=1e-6)


def flat_gradient(decoder: Decoder, tokens: jax.Array) -> np.ndarray:
    """The exact gradient over all block matrices, by reverse mode through the mean loss."""
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    slopes = jax.grad(lambda d: jnp.sum(sequence_losses(d, tokens)) / predictions)(decoder)
    return np.concatenate([np.asarray(k[...], np.float64).ravel() for k in kernels(slopes.runs[0]).values()])


def flat_estimate(decoder: Decoder, projected: np.ndarray, settings: Estimation) -> np.ndarray:
    """ĝ over all block matrices, in the order of `flat_gradient`."""
    all_directions, slopes = draw(settings, decoder, 0, len(projected)), jnp.asarray(projected, jnp.float32)
    rebuilt = []
    for name, kernel in kernels(decoder.runs[0]).items():
        layers = jnp.arange(kernel.shape[0], dtype=jnp.int32)
        rebuilt.append(
            rebuild_all_layers(name, kernel.shape[1:], settings.distribution, layers, all_directions, slopes)
        )
    return np.concatenate([np.asarray(matrices, np.float64).ravel() for matrices in rebuilt])


@partial(jax.jit, static_argnames=("name", "shape", "distribution"))
def rebuild_all_layers(
    name: str, shape: tuple, distribution: str, layers: jax.Array, all_directions: Directions, projected: jax.Array
) -> jax.Array:
    return jax.lax.map(
        lambda layer: rebuild(name, shape, layer, all_directions, projected, Weights(distribution)), layers
    )


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("distribution", [pytest.param("gaussian", marks=pytest.mark.slow), "rademacher"])
def test_spsa_approaches_the_exact_gradient_as_theory_predicts(distribution: str) -> None:
    """Cosine with the exact gradient: about sqrt(n / (n + d)) for n directions in d dimensions."""
    decoder, tokens = small_decoder(sizes=TINY, deviation=0.5), jnp.asarray(random_tokens(11, 4, 9))
    exact = flat_gradient(decoder, tokens)
    settings = Estimation(directions=4096, epsilon=1e-3, distribution=distribution, directions_per_step=64)
    projected = projected_of(decoder, Batches(np.asarray(tokens)), settings)
    for count in (16, 256, 4096):
        expected = (count / (count + len(exact))) ** 0.5
        assert cosine(flat_estimate(decoder, projected[:count], settings), exact) == pytest.approx(expected, abs=0.12)
    estimated = flat_estimate(decoder, projected, settings)
    assert np.linalg.norm(estimated) == pytest.approx(np.linalg.norm(exact), rel=0.15)


def projected_of(decoder: Decoder, batches: Batches, settings: Estimation, chosen: Plan | None = None) -> np.ndarray:
    """The projected gradients of an estimate, summed over the windows."""
    projected = estimate(decoder, batches, settings, plan=chosen).projected
    assert projected is not None
    assert projected.dtype == np.float64
    return projected.sum(axis=1)


@pytest.mark.parametrize(
    ("estimator", "distribution", "tolerance"),
    [("spsa", "gaussian", 0.02), ("jvp", "gaussian", 1e-5), ("jvp", "rademacher", 1e-5), ("spsa", "sphere", 0.02)],
)
def test_projected_gradient_is_the_directional_derivative(estimator: str, tolerance: float, distribution: str) -> None:
    decoder, tokens = small_decoder(sizes=TINY, deviation=0.5), random_tokens(11, 4, 9)
    settings = Estimation(estimator, directions=8, epsilon=3e-4, distribution=distribution)
    projected = projected_of(decoder, Batches(tokens), settings)
    exact = flat_gradient(decoder, jnp.asarray(tokens))
    for number in range(8):
        one_hot = np.where(np.arange(8) == number, 8.0, 0.0)  # the mean over eight directions is this direction
        direction = flat_estimate(decoder, one_hot, settings)
        assert projected[number] == pytest.approx(exact @ direction, rel=tolerance, abs=tolerance)


def test_a_direction_on_the_sphere_has_length_root_d() -> None:
    decoder, settings = small_decoder(sizes=TINY), Estimation(directions=4, distribution="sphere")
    for number in range(4):
        one_hot = np.where(np.arange(4) == number, 4.0, 0.0)
        direction = flat_estimate(decoder, one_hot, settings)
        assert np.sum(np.square(direction)) == pytest.approx(direction.size, rel=1e-5)
    assert not np.allclose(draw(settings, decoder, 0, 4).factors, 1.0, atol=1e-3)


def test_estimate_reports_progress_and_is_deterministic() -> None:
    decoder, batches, reported = small_decoder(), Batches(random_tokens(61, 2, 9)), []
    settings = Estimation(directions=5, directions_per_step=2)
    short_calls = plan(decoder, 9, settings, work_per_call=1.0)

    def report(done: int, total: int) -> None:
        reported.append((done, total))

    projected = estimate(decoder, batches, settings, report, plan=short_calls).projected
    assert reported == [(2, 5), (4, 5), (5, 5)]
    assert projected is not None
    summed = projected.sum(axis=1)
    np.testing.assert_array_equal(summed, projected_of(decoder, batches, settings, short_calls))
    assert not np.allclose(summed, projected_of(decoder, batches, replace(settings, seed=1), short_calls))


def test_a_step_lost_in_rounding_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no direction changes the loss at --epsilon 1e-30"):
        estimate(small_decoder(), Batches(random_tokens(61, 2, 9)), Estimation(directions=1, epsilon=1e-30))


def test_a_step_with_losses_that_are_not_finite_is_an_error() -> None:
    with pytest.raises(InputError, match=r"not finite at --epsilon 1e\+38; use a smaller one"):
        estimate(small_decoder(), Batches(random_tokens(61, 2, 9)), Estimation(directions=1, epsilon=1e38))
