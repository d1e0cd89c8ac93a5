"""The error of every layer, against the residual streams of whole forward passes."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.evaluation.layer_errors import layer_errors
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder, embed, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.pruning.slicing import slice_groups, slice_hidden, slice_layers
from tests.helpers import random_tokens, small_decoder

BATCHES = Batches(random_tokens(61, 5, 12), tokens_per_batch=24)

ALL = {"head": [np.arange(4)] * 3, "channel": [np.arange(12)] * 3}


def streams(decoder: Decoder) -> np.ndarray:
    """The residual stream after every layer, [L, B, T, D]."""
    angles = rotary_angles(decoder, BATCHES.length)

    def step(x: jax.Array, block: object, layer: jax.Array, extra: None) -> tuple[jax.Array, jax.Array]:
        x, _ = apply_layer(block, decoder.config, x, angles)
        return x, x

    _, runs = scan_layers(decoder.runs, step, embed(decoder, jnp.asarray(BATCHES.windows)))
    return np.concatenate([np.asarray(run) for run in runs])


def median(pruned: np.ndarray, dense: np.ndarray) -> float:
    return float(np.median(np.linalg.norm(pruned - dense, axis=-1) / np.linalg.norm(dense, axis=-1)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"parallel": True}, {"norm_after": True, "norm": "layer"}],
    ids=["sequential", "parallel", "norm after"],
)
def test_the_error_is_the_median_relative_distance_of_the_streams(changes: dict[str, object]) -> None:
    dense = small_decoder(**changes)
    pruned = slice_groups(dense, ALL | {"head": [np.array([0, 2]), np.arange(4), np.arange(4)]})
    found = layer_errors(dense, pruned, BATCHES)
    expected = [median(*pair) for pair in zip(streams(pruned), streams(dense), strict=True)]
    np.testing.assert_allclose(found.stream, expected, rtol=1e-4)
    assert (found.windows, found.window) == (5, 12)
    assert all(error is not None and error > 0 for error in found.attention)


def test_an_unchanged_model_has_no_error_and_an_empty_sublayer_loses_its_whole_update() -> None:
    dense = small_decoder()
    same = layer_errors(dense, dense, BATCHES)
    assert same.stream == same.attention == same.mlp == [0.0] * 3
    none = np.arange(0)
    found = layer_errors(dense, slice_groups(dense, ALL | {"channel": [np.arange(12), none, np.arange(12)]}), BATCHES)
    assert (found.stream[0], found.attention[:2], found.mlp[0]) == (0.0, [0.0, 0.0], 0.0)
    assert found.mlp[1] == pytest.approx(1, rel=1e-5)
    assert found.stream[2] > 0


def test_removed_layers_keep_their_place_and_have_no_update() -> None:
    dense = small_decoder(layers=4)
    found = layer_errors(dense, slice_layers(dense, [0, 2, 3]), BATCHES, layers=[0, 2, 3])
    assert [error is None for error in found.attention] == [error is None for error in found.mlp]
    assert [error is None for error in found.mlp] == [False, True, False, False]
    kept = streams(dense)
    assert found.stream[:2] == [0.0, pytest.approx(median(kept[0], kept[1]), rel=1e-4)]
    assert found.stream[2] > 0


def test_removed_dimensions_are_left_out_of_the_dense_stream() -> None:
    dense, dimensions = small_decoder(), [0, 1, 2, 3, 5, 7, 8, 9, 11, 15]
    pruned = slice_hidden(dense, np.asarray(dimensions))
    found = layer_errors(dense, pruned, BATCHES, dimensions=dimensions)
    expected = [median(*pair) for pair in zip(streams(pruned), streams(dense)[..., dimensions], strict=True)]
    np.testing.assert_allclose(found.stream, expected, rtol=1e-4)


def test_a_dead_update_has_an_error_only_where_the_pruned_one_lives() -> None:
    dense = small_decoder()
    (run,) = dense.runs
    silent = with_runs(dense, [jax.tree.map(lambda leaf: leaf, run)])
    silent.runs[0].mlp.down.kernel.set_value(0 * run.mlp.down.kernel[...])
    assert layer_errors(silent, silent, BATCHES).mlp == [0.0] * 3
    assert layer_errors(silent, dense, BATCHES).mlp == [float("inf")] * 3


def test_another_model_is_an_error() -> None:
    dense = small_decoder()
    with pytest.raises(InputError, match="the pruned model has 2 layers, where 3 of the dense model are kept"):
        layer_errors(dense, slice_layers(dense, [0, 1]), BATCHES)
    with pytest.raises(InputError, match="has 16 hidden dimensions, where 2"):
        layer_errors(dense, dense, replace(BATCHES, tokens_per_batch=4096), dimensions=[1, 3])
