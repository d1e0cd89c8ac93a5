"""Directions in the spaces low-rank and gates: the same losses as a model with moved kernels."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.modules import depth
from minillm_jax.model.tree import group_count, kernels
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.scoring.gradient import directions
from minillm_jax.scoring.gradient.estimate import estimate, gate_slopes
from minillm_jax.scoring.gradient.exact import gate_gradients, gated_losses, weight_gradients
from minillm_jax.scoring.gradient.settings import draw
from minillm_jax.scoring.gradient.slopes import directional_derivatives
from minillm_jax.scoring.gradient.spaces import GATED, Gates, LowRank, Weights
from minillm_jax.scoring.score import resolve
from minillm_jax.settings import DISTRIBUTIONS, Estimation, Scoring
from tests.helpers import CONFIGURATIONS, hugging_face_folder, pairs_of, random_tokens, small_decoder

SPACES = [LowRank(1), LowRank(3, "rademacher"), Gates(), Gates("rademacher")]

# Families with ALiBi slopes, norms behind the sublayers and caps, norms after the sum, and parallel sublayers.
FAMILIES = ["bloom", "gemma2", "opt, projected, post norm", "gpt_neox"]


@partial(jax.jit, static_argnames=("scale", "space"))
def moved(decoder: Decoder, key: jax.Array, scale: float, space: LowRank | Gates) -> Decoder:
    """A decoder with the moved kernels that the space computes with but never stores."""
    runs, layer = [], 0
    for run in decoder.runs:
        run = jax.tree.map(lambda leaf: leaf, run)  # a copy of the tree
        counts = {kind: group_count(run, kind) for kind in GATED}
        for name, kernel in kernels(run).items():
            layers = []
            for index in range(kernel.shape[0]):
                number = jnp.int32(layer + index)
                if isinstance(space, LowRank):
                    layers.append(space.add(kernel[index], jnp.float32(scale), key, number, name))
                    continue
                gates = {
                    GATED[kind]: 1 + scale * z
                    for kind, z in space.draw(key, number, counts, jnp.zeros(1, jnp.int32)).items()
                }
                factor = gates.get(name, jnp.ones((1, 1)))[0]
                rows = jnp.repeat(factor, kernel.shape[1] // factor.shape[0])
                layers.append(kernel[index] * rows.reshape(-1, *(1,) * (kernel.ndim - 2)))
            kernel.set_value(jnp.stack(layers))
        layer += kernel.shape[0]
        runs.append(run)
    return with_runs(decoder, runs)


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("per_step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_paired_losses_are_those_of_moved_models(space: LowRank | Gates, per_step: int) -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 2, 13))
    keys = directions.direction_keys(0, 0, 3)
    pairs = pairs_of(decoder, keys, tokens, 0.05, space, per_step)
    for number, key in enumerate(keys):
        for side, scale in enumerate((0.05, -0.05)):
            separate = sequence_losses(moved(decoder, key, scale, space), tokens)
            np.testing.assert_allclose(pairs[number, side], separate, rtol=2e-6)
    assert not np.allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES[:3])
@pytest.mark.parametrize("space", [LowRank(2), Gates()], ids=str)
def test_every_kind_of_family(tmp_path_factory: pytest.TempPathFactory, name: str, space: LowRank | Gates) -> None:
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path_factory.mktemp("family") / "model", family, **changes)).decoder
    tokens, keys = jnp.asarray(random_tokens(97, 2, 13)), directions.direction_keys(1, 0, 1)
    pairs = pairs_of(decoder, keys, tokens, 0.02, space)
    for side, scale in enumerate((0.02, -0.02)):
        separate = sequence_losses(moved(decoder, keys[0], scale, space), tokens)
        np.testing.assert_allclose(pairs[0, side], separate, rtol=1e-5)


def test_low_rank_directions_have_unit_variance() -> None:
    zero, one = jnp.zeros((16, 8, 4)), jnp.float32(1)
    for rank in (1, 4):
        draw_all = jax.vmap(lambda key, rank=rank: LowRank(rank).add(zero, one, key, jnp.int32(0), "attention.q"))
        entries = draw_all(directions.direction_keys(0, 0, 200))
        assert np.mean(np.square(entries)) == pytest.approx(1.0, abs=0.1)
        assert np.linalg.matrix_rank(np.asarray(entries[0]).reshape(16, 32)) == rank


def gate_gradients_from_kernels(decoder: Decoder, tokens: jax.Array) -> list[dict[str, np.ndarray]]:
    """The gradient of the summed loss by every gate: kernel · gradient by the kernel, summed over the group."""
    slopes = jax.grad(lambda d: jnp.sum(sequence_losses(d, tokens)), allow_int=True)(decoder)
    gradients = []
    for run, slope in zip(decoder.runs, slopes.runs, strict=True):
        by_kind = {}
        for kind, name in GATED.items():
            product = np.asarray(kernels(run)[name][...] * kernels(slope)[name][...])
            by_kind[kind] = product.reshape(product.shape[0], group_count(run, kind), -1).sum(-1)
        gradients.append(by_kind)
    return gradients


# One family in the quick suite; the others compile for half a minute each.
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_forward_and_reverse_mode_agree_in_every_kind_of_family(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """The exact gradient equals plain autodiff; the directional derivatives equal gradient · direction."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path_factory.mktemp("family") / "model", family, **changes)).decoder
    tokens = jnp.asarray(random_tokens(97, 2, 13))
    gates = gate_gradients(decoder, tokens)
    for gradients, expected in zip(gates, gate_gradients_from_kernels(decoder, tokens), strict=True):
        for kind, values in expected.items():
            np.testing.assert_allclose(np.asarray(gradients[kind]).sum(1), values, rtol=1e-3, atol=1e-3)
    weights = weight_gradients(decoder, tokens)
    key, windows = directions.direction_keys(1, 0, 1), jnp.arange(2, dtype=jnp.int32)
    direction = directions.Directions.plain(key)
    for space in (Weights(), LowRank(2), Gates()):
        slope = float(jnp.sum(directional_derivatives(decoder, direction, tokens, windows, space)))
        assert slope == pytest.approx(along(decoder, key[0], space, weights, gates), rel=2e-4, abs=2e-3)


def along(decoder: Decoder, key: jax.Array, space: Any, weights: list, gates: list) -> float:
    """The inner product of the exact gradient and a direction."""
    total, layer = 0.0, 0
    for run, by_weight, by_gate in zip(decoder.runs, weights, gates, strict=True):
        counts = {kind: group_count(run, kind) for kind in GATED}
        for index in range(depth(run)):
            number = jnp.int32(layer + index)
            if isinstance(space, Gates):
                direction = space.draw(key, number, counts, jnp.zeros(1, jnp.int32))
                total += sum(float(jnp.sum(z * by_gate[kind][index])) for kind, z in direction.items())
                continue
            for name, slope in by_weight.items():
                z = space.add(jnp.zeros(slope.shape[1:]), jnp.float32(1), key, number, name)
                total += float(jnp.sum(z * slope[index]))
        layer += depth(run)
    return total


@pytest.mark.parametrize("estimator", ["spsa", "jvp"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_gate_slopes_approach_the_exact_gradient(distribution: str, estimator: str) -> None:
    """Theory predicts the cosine √(n / (n + d)) for n directions in d dimensions; here d is 48."""
    decoder, batches = small_decoder(), Batches(random_tokens(61, 4, 16))
    exact = flat(gate_slopes(decoder, estimate(decoder, batches, Estimation("exact", "gates"))))
    settings = Estimation(estimator, "gates", 1024, distribution=distribution, directions_per_step=64)
    gradient = estimate(decoder, batches, settings)
    assert gradient.projected is not None
    for n in (16, 256, 1024):
        estimated = flat(gate_slopes(decoder, replace(gradient, projected=gradient.projected[:n])))
        cosine = estimated @ exact / np.linalg.norm(estimated) / np.linalg.norm(exact)
        assert cosine == pytest.approx(np.sqrt(n / (n + exact.size)), abs=0.15)


def flat(runs: list[dict[str, jax.Array]]) -> np.ndarray:
    """∂L/∂gate of all gates, summed over the windows."""
    return np.concatenate([np.asarray(values).sum(axis=1).ravel() for run in runs for values in run.values()])


def test_per_sequence_directions_differ_between_windows() -> None:
    """Each slope belongs to one window and its direction; the estimate does not depend on the directions per step."""
    decoder, windows = small_decoder(), random_tokens(61, 3, 16)
    batches = Batches(windows)
    settings = Estimation("jvp", "gates", 2048, per_sequence=True, directions_per_step=64)
    gradient = estimate(decoder, batches, settings)
    assert gradient.projected is not None
    assert gradient.projected.shape == (2048, 3)
    space, counts = Gates(per_sequence=True), {kind: group_count(decoder.runs[0], kind) for kind in GATED}
    by_window = gate_gradients(decoder, jnp.asarray(windows))[0]
    key = draw(settings, decoder, 5, 6).keys[0]
    for window in range(3):
        number = jnp.asarray([window], jnp.int32)
        direction = [space.draw(key, jnp.int32(layer), counts, number) for layer in range(3)]
        slope = sum(
            float(jnp.sum(direction[layer][kind][0] * by_window[kind][layer, window]))
            for layer in range(3)
            for kind in GATED
        )
        assert gradient.projected[5, window] * 3 * 15 == pytest.approx(slope, rel=1e-3, abs=1e-3)
    one_per_step = estimate(decoder, batches, replace(settings, directions=4, directions_per_step=1)).projected
    np.testing.assert_allclose(one_per_step, gradient.projected[:4], rtol=1e-4, atol=1e-5)
    exact = flat(gate_slopes(decoder, estimate(decoder, batches, Estimation("exact", "gates"))))
    estimated = flat(gate_slopes(decoder, gradient))
    assert estimated @ exact / np.linalg.norm(estimated) / np.linalg.norm(exact) > 0.9


def test_gates_of_one_do_not_change_the_loss() -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 2, 9))
    pairs = pairs_of(decoder, directions.direction_keys(0, 0, 1), tokens, 0.0, Gates())
    np.testing.assert_allclose(pairs[0, 0], sequence_losses(decoder, tokens), rtol=1e-6)
    assert final_hidden(decoder, tokens).shape == (2, 9, 16)


def test_a_gate_of_zero_removes_its_group() -> None:
    """The loss equals that of the model without the group."""
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 2, 13))
    changes = {kind: np.zeros((3, 1, group_count(decoder.runs[0], kind)), np.float32) for kind in GATED}
    changes["head"][1, 0, 2], changes["channel"][2, 0, 5] = -1.0, -1.0
    kept = {
        "head": [np.arange(4), np.asarray([0, 1, 3]), np.arange(4)],
        "channel": [np.arange(12), np.arange(12), np.delete(np.arange(12), 5)],
    }
    expected = sequence_losses(slice_groups(decoder, kept), tokens)
    np.testing.assert_allclose(gated_losses(decoder, tokens, [jax.tree.map(jnp.asarray, changes)]), expected, rtol=1e-5)
    assert not np.allclose(expected, sequence_losses(decoder, tokens), rtol=1e-4)


def test_criterion_and_space_must_fit() -> None:
    with pytest.raises(InputError, match="the criterion gate takes directions in the space gates"):
        resolve(Scoring("gate", Estimation(space="weights")))
    with pytest.raises(InputError, match="the criterion fms takes directions in the space weights or low-rank"):
        resolve(Scoring("fms", Estimation(space="gates")))
    assert resolve(Scoring("gate"))[1].space == "gates"
    assert resolve(Scoring("fms"))[1].space == "weights"
    low_rank = resolve(Scoring("fms", Estimation(space="low-rank", rank=2)))[1]
    assert (low_rank.space, low_rank.rank) == ("low-rank", 2)
