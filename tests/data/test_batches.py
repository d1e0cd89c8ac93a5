"""The object `Batches`: its counts, and results that do not depend on the size of the batches."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.data.batches import TOKENS_PER_BATCH, Batch, Batches
from tests.helpers import random_tokens

WINDOWS = random_tokens(61, 7, 5)


def first_tokens(batch: Batch) -> jax.Array:
    """One number a window: its first token."""
    return batch.tokens[:, 0].astype(jnp.float32)


def test_counts_are_those_of_the_windows() -> None:
    batches = Batches(WINDOWS)
    assert (batches.count, batches.length, batches.tokens, batches.predictions) == (7, 5, 35, 28)
    assert batches.tokens_per_batch == TOKENS_PER_BATCH
    assert len(batches) == 1
    np.testing.assert_array_equal(batches.windows, WINDOWS)


@pytest.mark.parametrize(("tokens_per_batch", "sizes"), [(1, [1] * 7), (10, [2, 2, 2, 1]), (20, [4, 3]), (35, [7])])
def test_results_do_not_depend_on_the_size_of_the_batches(tokens_per_batch: int, sizes: list[int]) -> None:
    batches = Batches(WINDOWS).resized(tokens_per_batch)
    assert [len(batch.numbers) for batch in batches] == sizes
    assert len(batches) == len(sizes)
    np.testing.assert_array_equal(batches.collect(first_tokens), WINDOWS[:, 0])
    stacked = batches.collect(lambda batch: jnp.stack([first_tokens(batch), batch.numbers.astype(jnp.float32)]))
    np.testing.assert_array_equal(stacked, [WINDOWS[:, 0], np.arange(7)])
    totals = batches.total(lambda batch: {"tokens": batch.tokens.sum(), "windows": jnp.int32(len(batch.numbers))})
    assert {name: int(total) for name, total in totals.items()} == {"tokens": WINDOWS.sum(), "windows": 7}


def test_progress_counts_windows() -> None:
    calls: list[tuple[int, int]] = []
    Batches(WINDOWS, tokens_per_batch=10).collect(first_tokens, lambda *call: calls.append(call))
    assert calls == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_the_first_windows_keep_their_numbers() -> None:
    batches = Batches(WINDOWS, tokens_per_batch=10).first(3)
    np.testing.assert_array_equal(batches.windows, WINDOWS[:3])
    np.testing.assert_array_equal(np.concatenate([batch.numbers for batch in batches]), [0, 1, 2])
    assert batches.tokens_per_batch == 10
    assert batches.first(9).count == 3


def test_batches_are_cut_once() -> None:
    """Two passes see the same arrays on the device, and the same size is the same object."""
    batches = Batches(WINDOWS, tokens_per_batch=10)
    assert all(first is second for first, second in zip(batches, batches, strict=True))
    assert batches.resized(10) is batches
    assert batches.resized(20) is not batches


def test_evenly_spaced_windows_hold_the_first_and_the_last() -> None:
    batches = Batches(np.arange(22, dtype=np.int32).reshape(11, 2))
    assert batches.spaced(3).windows[:, 0].tolist() == [0, 10, 20]
    assert batches.spaced(1).windows[:, 0].tolist() == [0]
    assert batches.spaced(99).windows.tolist() == batches.windows.tolist()
