"""Directions in other spaces than the weights: the same losses as a model that is really moved."""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.decoder import Decoder, final_hidden, group_count, kernels, with_runs
from minillm_jax.errors import InputError
from minillm_jax.estimate import directions, gradient
from minillm_jax.estimate.loop import Spsa, estimate
from minillm_jax.estimate.spaces import GATED, Gates, LowRank
from minillm_jax.loss import sequence_losses
from minillm_jax.scoring import Scoring
from tests.helpers import CONFIGURATIONS, hugging_face_folder, random_tokens, small_decoder

SPACES = [LowRank(1), LowRank(3, "rademacher"), Gates(), Gates("rademacher")]


@partial(jax.jit, static_argnames=("scale", "space"))
def moved(decoder: Decoder, key: jax.Array, scale: float, space: LowRank | Gates) -> Decoder:
    """A decoder whose kernels are those that the space only computes with, made here on their own."""
    runs, layer = [], 0
    for run in decoder.runs:
        run = jax.tree.map(lambda leaf: leaf, run)  # a tree of its own
        counts = {kind: group_count(run, kind) for kind in GATED}
        for name, kernel in kernels(run).items():
            layers = []
            for index in range(kernel.shape[0]):
                number = jnp.int32(layer + index)
                if isinstance(space, LowRank):
                    layers.append(space.add(kernel[index], jnp.float32(scale), key, number, name))
                    continue
                gates = {GATED[kind]: 1 + scale * z for kind, z in space.draw(key, number, counts).items()}
                factor = gates.get(name, jnp.ones(1))
                rows = jnp.repeat(factor, kernel.shape[1] // factor.shape[0])
                layers.append(kernel[index] * rows.reshape(-1, *(1,) * (kernel.ndim - 2)))
            kernel.set_value(jnp.stack(layers))
        layer += kernel.shape[0]
        runs.append(run)
    return with_runs(decoder, runs)


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("at_once", [1, 3])
def test_paired_losses_are_those_of_moved_models(space: LowRank | Gates, at_once: int) -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 2, 13))
    keys = directions.direction_keys(0, 0, 3)
    pairs = gradient.paired_losses(decoder, keys, tokens, jnp.float32(0.05), space, at_once)
    for number, key in enumerate(keys):
        for side, scale in enumerate((0.05, -0.05)):
            separate = sequence_losses(moved(decoder, key, scale, space), tokens)
            np.testing.assert_allclose(pairs[number, side], separate, rtol=2e-6)
    assert not np.allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "gemma2", "opt, projected, post norm", "glm4", "phi3"])
@pytest.mark.parametrize("space", [LowRank(2), Gates()], ids=str)
def test_every_kind_of_family(tmp_path_factory: pytest.TempPathFactory, name: str, space: LowRank | Gates) -> None:
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path_factory.mktemp("family") / "model", family, **changes)).decoder
    tokens, keys = jnp.asarray(random_tokens(97, 2, 13)), directions.direction_keys(1, 0, 1)
    pairs = gradient.paired_losses(decoder, keys, tokens, jnp.float32(0.02), space)
    for side, scale in enumerate((0.02, -0.02)):
        separate = sequence_losses(moved(decoder, keys[0], scale, space), tokens)
        np.testing.assert_allclose(pairs[0, side], separate, rtol=1e-5)


def test_low_rank_directions_have_unit_variance() -> None:
    zero, one = jnp.zeros((16, 8, 4)), jnp.float32(1)
    for rank in (1, 4):
        draw = jax.vmap(lambda key, rank=rank: LowRank(rank).add(zero, one, key, jnp.int32(0), "attention.q"))
        drawn = draw(directions.direction_keys(0, 0, 200))
        assert np.mean(np.square(drawn)) == pytest.approx(1.0, abs=0.1)
        assert np.linalg.matrix_rank(np.asarray(drawn[0]).reshape(16, 32)) == rank


def exact_gates(decoder: Decoder, tokens: jax.Array) -> dict[str, np.ndarray]:
    """The derivative of the mean loss by every gate: that by a kernel, times the kernel, summed over the group."""
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    slopes = jax.grad(lambda d: jnp.sum(sequence_losses(d, tokens)) / predictions)(decoder)
    found = {}
    for kind, name in GATED.items():
        product = np.asarray(kernels(decoder.runs[0])[name][...] * kernels(slopes.runs[0])[name][...])
        count = group_count(decoder.runs[0], kind)
        found[kind] = product.reshape(product.shape[0], count, -1).sum(-1)
    return found


@pytest.mark.parametrize("distribution", directions.DISTRIBUTIONS)
def test_gates_approach_their_exact_derivatives(distribution: str) -> None:
    """Cosine √(n / (n + d)), as theory says of n directions in d dimensions; here d is 48."""
    decoder, windows = small_decoder(), random_tokens(61, 4, 16)
    exact = exact_gates(decoder, jnp.asarray(windows))
    flat = np.concatenate([values.ravel() for values in exact.values()])
    settings = Spsa(1024, 1e-3, 0, distribution, at_once=64, space="gates")
    projected = estimate(decoder, windows, settings)
    keys = directions.direction_keys(0, 0, 1024)
    for n in (16, 256, 1024):
        counts = tuple((kind, values.shape[1]) for kind, values in exact.items())
        layers = jnp.arange(3, dtype=jnp.int32)
        slopes = jnp.asarray(projected[:n], jnp.float32)
        found = gradient.rebuild_gates(layers, keys[:n], slopes, counts, settings.make_space())
        estimated = np.concatenate([np.asarray(found[kind]).ravel() for kind in exact])
        cosine = estimated @ flat / np.linalg.norm(estimated) / np.linalg.norm(flat)
        assert cosine == pytest.approx(np.sqrt(n / (n + flat.size)), abs=0.15)


def test_gates_of_one_change_nothing() -> None:
    decoder, tokens = small_decoder(), jnp.asarray(random_tokens(61, 2, 9))
    pairs = gradient.paired_losses(decoder, directions.direction_keys(0, 0, 1), tokens, jnp.float32(0.0), Gates())
    np.testing.assert_allclose(pairs[0, 0], sequence_losses(decoder, tokens), rtol=1e-6)
    assert final_hidden(decoder, tokens).shape == (2, 9, 16)


def test_criterion_and_space_must_fit() -> None:
    with pytest.raises(InputError, match="the criterion gate takes directions in the space gates"):
        Scoring("gate", Spsa(space="weights")).resolve()
    with pytest.raises(InputError, match="the criterion fms takes directions in the space weights or low-rank"):
        Scoring("fms", Spsa(space="gates")).resolve()
    with pytest.raises(InputError, match="unknown space of directions 'heads'"):
        Scoring("fms", Spsa(space="heads")).resolve()
    assert Scoring("gate").directions().space == "gates"
    assert Scoring("fms").directions().space == "weights"
    Scoring("fms", Spsa(space="low-rank", rank=2)).resolve()
