"""Criteria against NumPy, and the number and the choice of kept groups."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from minillm_jax.budget.budget import Inventory, by_ratio, choose, kept_count
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.scoring import criteria
from minillm_jax.scoring.gradient import directions
from minillm_jax.settings import ACROSS, Budget
from tests.helpers import best_of

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- criteria


def test_importance_multiplies_the_factors_along_the_input_axes() -> None:
    kernel, slope = normal(8, 4, 6), normal(8, 4, 6)
    norm = np.abs(normal(8, 4))  # an output projection: its input has two axes
    importance = criteria.importance(jnp.asarray(kernel), jnp.asarray(norm), jnp.asarray(slope))
    np.testing.assert_allclose(importance, kernel * norm[:, :, None] * slope, rtol=1e-6)
    np.testing.assert_allclose(criteria.importance(jnp.asarray(kernel)), kernel)


@pytest.mark.parametrize(
    ("within", "reference"),
    [
        ("sum", lambda x: np.abs(x).sum(axis=1)),
        ("mean", lambda x: np.abs(x).mean(axis=1)),
        ("max", lambda x: np.abs(x).max(axis=1)),
        ("l2", lambda x: np.sqrt((x**2).sum(axis=1))),
        ("vector", lambda x: np.abs(x.sum(axis=1))),
    ],
)
def test_reduction_within_a_structure(within: str, reference: object) -> None:
    """Query rows of one key/value head are one structure: heads 0-1 belong to group 0, 2-3 to group 1, ..."""
    values = normal(5, 8, 3)  # [D, N, H], four groups of two heads
    parts = np.stack([values[:, 2 * g : 2 * g + 2].ravel() for g in range(4)])
    reduced = criteria.reduce_structure(jnp.asarray(values), "D NH", "head", 4, within)
    np.testing.assert_allclose(reduced, reference(parts), rtol=1e-5)
    values = normal(7, 5)  # [F, D]
    reduced = criteria.reduce_structure(jnp.asarray(values), "F D", "channel", 7, within)
    np.testing.assert_allclose(reduced, reference(values), rtol=1e-5)


@pytest.mark.parametrize("across", ACROSS)
def test_reduction_over_the_structures_of_a_group(across: str) -> None:
    values = np.abs(normal(4, 3, 6)) * 1e-12  # their product is too small for float32
    reference = {"max": np.max, "sum": np.sum, "mean": np.mean, "prod": np.prod}.get(across)
    expected = values[-1] if reference is None else reference(values.astype(np.float64), axis=0)
    reduced = criteria.reduce_group(values, across)
    assert reduced.dtype == np.float64
    np.testing.assert_allclose(reduced, expected)
    assert (reduced > 0).all()


def test_structures_of_a_group_are_all_matrices_with_its_axis_in_forward_order() -> None:
    assert list(criteria.scored_matrices(criteria.CRITERIA["fms"], "head")) == [
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.o",
    ]
    assert list(criteria.scored_matrices(criteria.CRITERIA["fms"], "channel")) == ["mlp.gate", "mlp.up", "mlp.down"]
    assert list(criteria.scored_matrices(criteria.CRITERIA["wanda"], "head")) == ["attention.o"]
    assert list(criteria.scored_matrices(criteria.CRITERIA["wanda"], "channel")) == ["mlp.down"]


def test_random_scores_depend_on_layer_kind_and_seed_only() -> None:
    key = directions.stream_key(0, "random")
    reference = criteria.random_scores(key, 1, "head", 8)
    np.testing.assert_array_equal(reference, criteria.random_scores(key, 1, "head", 8))
    for scores in (
        criteria.random_scores(key, 2, "head", 8),
        criteria.random_scores(key, 1, "channel", 8),
        criteria.random_scores(directions.stream_key(1, "random"), 1, "head", 8),
    ):
        assert not np.array_equal(reference, scores)


# --------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("count", "ratio", "kept"),
    [(4, 0.2, 3), (5, 0.2, 4), (172, 0.2, 138), (10, 0.25, 7), (50, 0.29, 35), (1, 0.9, 1), (2, 0.99, 1), (8, 0.01, 8)],
)
def test_floor_of_n_ratio_plus_a_half_groups_are_removed_and_at_least_one_is_kept(
    count: int, ratio: float, kept: int
) -> None:
    assert kept_count(count, ratio) == kept


@settings(deadline=None)
@given(count=st.integers(1, 40), ratio=st.floats(0.01, 0.99), layers=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_groups_with_the_highest_scores_are_kept_in_ascending_order(
    count: int, ratio: float, layers: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).normal(size=(layers, count))
    kept = best_of({"channel": list(scores)}, ratio)["channel"]
    for row, indices in zip(scores, kept, strict=True):
        assert len(indices) == kept_count(count, ratio)
        assert (np.diff(indices) > 0).all()
        removed = np.delete(row, indices)
        assert not removed.size or row[indices].min() >= removed.max()


def inventory(counts: dict[str, list[int]], layers: range) -> Inventory:
    """Groups of cost 1, in a model whose other parameters cost 1000."""
    ones = {kind: [1] * len(rows) for kind, rows in counts.items()}
    whole = 1000 + sum(map(sum, counts.values()))
    return Inventory(counts, parts=ones, costs=ones, whole=whole, layers=layers)


def test_ties_keep_the_lower_index_and_layers_outside_the_range_keep_all() -> None:
    counts = by_ratio(inventory({"head": [4] * 3}, range(1, 2)), 0.5)
    kept = choose({"head": [np.zeros(4)] * 3}, counts, {"head": [1] * 3})["head"]
    assert [indices.tolist() for indices in kept] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratio_outside_its_range_is_an_error(ratio: float) -> None:
    with pytest.raises(InputError, match="ratio must lie between 0 and 1, both excluded"):
        Budget(ratio).check()


def test_scores_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(InputError, match="head scores of layer 1 are not finite"):
        best_of({"head": [np.ones(3), np.array([1.0, np.nan, 2.0])]}, 0.5)


def test_axes_of_the_table_name_each_letter_once() -> None:
    for axes in (axis_table.OUTER_AXES | axis_table.BLOCK_AXES).values():
        letters = axis_table.letters(axes)
        assert len(set(letters)) == len(letters)
        assert set(letters) <= set("DNKHFVEMXW1")
    assert jax.tree.all({kind: kind in axis_table.KINDS for kind in ("head", "channel")})
