"""Gradient estimates of models whose layers are read one at a time are those of models in memory."""

from pathlib import Path

import jax
import numpy as np
import pytest

from minillm_jax.data.batches import Batches
from minillm_jax.devices import sharding
from minillm_jax.evaluation.layerwise import STREAMS
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.digest import model_digest
from minillm_jax.model.modules import Block
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import kernels, layer_count
from minillm_jax.scoring.gradient import layerwise, passes
from minillm_jax.scoring.gradient.estimate import estimate
from minillm_jax.scoring.gradient.plan import plan_of_streams
from minillm_jax.scoring.gradient.settings import draw, resolve, space_of
from minillm_jax.settings import Estimation
from tests.helpers import random_tokens, small_decoder

BATCHES = Batches(random_tokens(61, 5, 9), tokens_per_batch=18)


def streamed(decoder: Decoder, reads: list[int] | None = None) -> StreamedDecoder:
    """The same decoder with layers that are read one at a time; `reads` gets their numbers."""
    layers = list(sharding.layers_of(decoder, None))
    runs = [jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), layer) for layer in layers]

    def read(index: int) -> Block:
        if reads is not None:
            reads.append(index)
        return layers[index]

    return StreamedDecoder(decoder, runs, read)


@pytest.mark.parametrize(
    "settings",
    [
        Estimation("spsa", "weights", 4, epsilon=1e-2, distribution="sphere"),
        Estimation("spsa", "low-rank", 4, epsilon=1e-2, rank=2),
        Estimation("spsa", "gates", 4, epsilon=1e-2, per_sequence=True),
        Estimation("jvp", "weights", 4),
        Estimation("jvp", "gates", 4, per_sequence=True),
    ],
    ids=lambda settings: f"{settings.estimator}-{settings.space}",
)
def test_measurements_are_those_of_a_model_in_memory(settings: Estimation) -> None:
    settings, decoder, reads = resolve(settings), small_decoder(), []
    epsilon, layers = settings.epsilon if settings.estimator == "spsa" else None, streamed(decoder, reads)
    drawn = draw(settings, layers, 0, 4)
    np.testing.assert_allclose(drawn.factors, draw(settings, decoder, 0, 4).factors, rtol=1e-6)
    assert reads == []
    directions = drawn.stacked(2)
    expected = passes.measure(decoder, BATCHES, directions, space_of(settings), epsilon)
    measured = passes.measure(layers, BATCHES, directions, space_of(settings), epsilon)
    assert measured.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(measured / scale, expected / scale, rtol=0, atol=1e-6 if epsilon else 1e-5)
    assert reads == list(range(layer_count(decoder)))  # once for all windows and directions


def test_streams_that_do_not_fit_take_further_passes() -> None:
    """By windows in a measurement, by directions in the plan of an estimate."""
    decoder, reads, settings = small_decoder(), [], resolve(Estimation(directions=6, epsilon=1e-2))
    layers, directions = streamed(decoder, reads), draw(settings, decoder, 0, 6).stacked(1)
    whole = layerwise.measure(layers, BATCHES, directions, space_of(settings), 1e-2)
    few = layerwise.measure(layers, BATCHES, directions, space_of(settings), 1e-2, most_bytes=6 * 18 * 16 * 8)
    np.testing.assert_array_equal(few, whole)
    assert reads == 4 * [0, 1, 2]  # once, and once for each of three batches
    most = STREAMS // (16 * 8)  # tokens whose pairs fit
    assert plan_of_streams(layers, 9, settings, most // 6).chunks == 6
    assert plan_of_streams(layers, 9, settings, most // 3).chunks == 3
    assert plan_of_streams(layers, 9, settings, 2 * most).chunks == 1


def test_an_estimate_of_a_streamed_model_chooses_its_step_and_continues(tmp_path: Path) -> None:
    settings = Estimation("spsa", directions=3)
    expected = estimate(small_decoder(), BATCHES, settings)
    found = estimate(streamed(small_decoder()), BATCHES, settings, checkpoint=tmp_path / "saved")
    assert found.projected is not None
    assert expected.projected is not None
    assert found.settings.epsilon == expected.settings.epsilon
    np.testing.assert_allclose(
        found.projected, expected.projected, rtol=0, atol=1e-3 * np.abs(expected.projected).max()
    )
    reads: list[int] = []
    again = estimate(streamed(small_decoder(), reads), BATCHES, settings, checkpoint=tmp_path / "saved")
    np.testing.assert_array_equal(again.projected, found.projected)
    assert reads == 2 * [0, 1, 2]  # for the identity of the model, and for the loss without a step


def test_the_digest_of_a_streamed_model_knows_every_layer() -> None:
    decoder = small_decoder()
    other = small_decoder()
    kernels(other.runs[0])["mlp.up"][...] = kernels(other.runs[0])["mlp.up"][...].at[2, 0, 0].add(1.0)
    assert model_digest(streamed(decoder)) == model_digest(streamed(small_decoder()))
    assert model_digest(streamed(decoder)) != model_digest(streamed(other))
    assert model_digest(streamed(decoder)) != model_digest(streamed(small_decoder(post_norms=True)))
