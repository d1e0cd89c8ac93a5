"""The exact gradient by the weights, summed in place over batches."""

from pathlib import Path

import jax
import numpy as np
from jax import numpy as jnp

from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.model.build import with_runs
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.tree import kernels, replace_kernels
from minillm_jax.scoring.gradient.estimate import estimate
from minillm_jax.scoring.gradient.exact import RunGradients, add_weight_gradients, no_gradients
from minillm_jax.scoring.score import Scores, score
from minillm_jax.settings import Estimation, Scoring
from tests.helpers import random_tokens, small_decoder

WINDOWS = random_tokens(61, 3, 9)


def unequal_decoder() -> Decoder:
    """Two runs: layers with eight query heads and 12 channels, then one with four heads and five channels."""
    wide, narrow = LayerSizes(N=8, K=4, F=12), LayerSizes(N=4, K=2, F=5)
    return small_decoder(sizes=Sizes(V=61, D=16, H=4, layers=(wide, wide, narrow)))


@jax.jit
def plain_gradient(decoder: Decoder, tokens: jax.Array) -> RunGradients:
    """The gradient of the mean cross entropy of some windows, by autodiff through the whole model."""

    def loss(matrices: RunGradients) -> jax.Array:
        runs = [
            replace_kernels(run, lambda name, _, of=of: of[name])
            for run, of in zip(decoder.runs, matrices, strict=True)
        ]
        return jnp.sum(sequence_losses(with_runs(decoder, runs), tokens)) / (tokens.size - len(tokens))

    return jax.grad(loss)([{name: kernel[...] for name, kernel in kernels(run).items()} for run in decoder.runs])


def test_gradient_and_mean_squares_over_batches_are_those_of_autodiff() -> None:
    decoder, tokens = unequal_decoder(), jnp.asarray(WINDOWS)
    found = estimate(decoder, Batches(WINDOWS), Estimation("exact", "weights", curvature=True))
    each = [plain_gradient(decoder, tokens[i : i + 1]) for i in range(3)]
    mean = jax.tree.map(lambda *parts: sum(parts) / 3, *each)
    squares = jax.tree.map(lambda *parts: sum(jnp.square(part) for part in parts) / 3, *each)
    in_batches = estimate(decoder, Batches(WINDOWS, tokens_per_batch=18), Estimation("exact", "weights"))
    assert in_batches.curvature is None
    for gradients, expected in ((found.exact, mean), (found.curvature, squares), (in_batches.exact, mean)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradients, expected)


def test_gradients_of_bfloat16_weights_are_added_in_float32() -> None:
    """The second batch is not lost beside sums that are 4,096 times as large."""
    decoder, tokens = unequal_decoder(), jnp.asarray(WINDOWS)
    half, one = jax.tree.map(lambda array: array.astype(jnp.bfloat16), decoder), jnp.float32(1)
    alone = add_weight_gradients(no_gradients(half, curvature=False), half, tokens, one, one).gradient
    large = jax.tree.map(lambda total: total + 4096 * jnp.sign(total), alone)
    sums = no_gradients(half, curvature=False)._replace(gradient=jax.tree.map(jnp.copy, large))
    both = add_weight_gradients(sums, half, tokens, one, one).gradient
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(x - y, z, atol=2e-3), both, large, alone)


def test_scores_keep_no_arrays_of_the_size_of_the_model() -> None:
    model = Model(unequal_decoder(), {}, Path("none"), "none")
    scores = score(model, Calibration(Batches(WINDOWS), "random", 0), Scoring("element-2"))
    assert isinstance(scores, Scores)
    assert scores.estimate is not None
    assert (scores.estimate.exact, scores.estimate.curvature) == (None, None)
