"""The stages of pruning a loaded model: groups, query heads, hidden dimensions, layers, rounds, biases."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import perplexity, window_losses
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, hidden_size, layer_count
from minillm_jax.pruning.drop_layers import best_layers
from minillm_jax.pruning.slicing import slice_groups, slice_layers
from minillm_jax.scoring.score import score
from minillm_jax.settings import Budget, Refit, Scoring
from minillm_jax.stages import drop_layers, narrow, prune_groups, prune_in_rounds, with_biases
from tests.helpers import arrays_equal, logits_of, random_tokens, small_decoder

BATCHES = Batches(random_tokens(61, 24, 12))
CALIBRATION = Calibration(BATCHES, "random", 0)


def small_model() -> Model:
    return Model(small_decoder(), {"model_type": "llama", "hidden_size": 16}, Path("nowhere"), "small")


# --------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("criterion", ["obs", "wanda"])
def test_pruning_with_refit_walks_over_the_calibration(criterion: str) -> None:
    """The numbers of groups are those without refit, and the loss is nearer to the dense loss."""
    model, calibration = small_model(), Calibration(Batches(random_tokens(61, 32, 12)), "random", 0)
    scores = score(model, calibration, Scoring(criterion))
    with pytest.raises(InputError, match="give the calibration"):
        prune_groups(model, scores, Budget(0.5), Refit())
    refitted = prune_groups(model, scores, Budget(0.5), Refit(), calibration)
    plain = prune_groups(model, score(model, calibration, Scoring("wanda")), Budget(0.5))
    for kind in ("head", "channel"):
        assert group_counts(refitted.decoder, kind) == group_counts(plain.decoder, kind)
    dense, with_refit, without = (perplexity(m.decoder, calibration.batches).loss for m in (model, refitted, plain))
    assert abs(with_refit - dense) < abs(without - dense)
    assert refitted.record is not None
    assert refitted.record["refit"]["alpha"] == 0.5
    assert [len(rows) for rows in refitted.record["kept"]["channel"]] == [6, 6, 6]


def test_pruning_twice_keeps_the_first_record_and_a_range_of_layers_prunes_only_those() -> None:
    model = small_model()
    once = prune_groups(model, score(model, CALIBRATION, Scoring("wanda")), Budget(0.25))
    twice = prune_groups(once, score(once, CALIBRATION, Scoring("wanda")), Budget(0.25, layers=(1, 3)))
    assert group_counts(once.decoder, "channel") == [9, 9, 9]
    assert group_counts(twice.decoder, "channel") == [9, 7, 7]
    assert twice.record is not None
    assert twice.record["pruned_before"] == once.record
    with pytest.raises(InputError, match=r"the scores are for \[4, 4, 4\] groups of kind head"):
        prune_groups(once, score(model, CALIBRATION, Scoring("wanda")), Budget(0.25))


@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_several_rounds_remove_as_many_groups_as_one(criterion: str) -> None:
    """The kept indices of all rounds together are those of the dense model: slicing it once gives the same arrays."""
    model, scoring = small_model(), Scoring(criterion)
    once = prune_in_rounds(model, CALIBRATION, scoring, Budget(0.5))
    thrice = prune_in_rounds(model, CALIBRATION, scoring, Budget(0.5, rounds=3))
    for kind in ("head", "channel"):
        assert group_counts(thrice.decoder, kind) == group_counts(once.decoder, kind)
    assert thrice.record is not None
    assert thrice.record["rounds"] == 3
    kept = {kind: [np.asarray(row) for row in rows] for kind, rows in thrice.record["kept"].items()}
    assert arrays_equal(slice_groups(model.decoder, kept), thrice.decoder)


def test_biases_of_zero_change_no_output() -> None:
    model = small_model()
    biased = with_biases(model)
    assert biased.decoder.config.mlp_bias
    assert biased.raw_config["attention_bias"]
    tokens = BATCHES.windows[:3]
    np.testing.assert_array_equal(logits_of(biased.decoder, tokens), logits_of(model.decoder, tokens))
    assert with_biases(biased) is biased


# ---------------------------------------------------------------------------------------------------- query heads


def test_query_heads_are_sliced_as_if_they_were_zero() -> None:
    decoder, tokens = small_decoder(), BATCHES.windows[:3]
    kept = {"query": [np.array([1, 2, 4, 7]), np.array([0, 3, 5, 6]), np.array([1, 3, 5, 7])]}

    def leaf(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        if not axis_table.array_path(path).endswith("attention.o.kernel"):
            return array
        mask = np.zeros((3, 8, 1, 1), np.float32)
        for layer, heads in enumerate(kept["query"]):
            mask[layer, heads] = 1
        return array * jnp.asarray(jnp.broadcast_to(mask, array.shape))

    zeroed = jax.tree_util.tree_map_with_path(leaf, decoder)
    sliced = slice_groups(decoder, kept)
    assert group_counts(sliced, "query") == [4, 4, 4]
    assert group_counts(sliced, "head") == [4, 4, 4]
    expected = logits_of(zeroed, tokens)
    assert np.abs(expected - logits_of(decoder, tokens)).max() > 1e-2
    np.testing.assert_allclose(logits_of(sliced, tokens), expected, atol=1e-4)


@pytest.mark.parametrize(("criterion", "refitted"), [("wanda", False), ("obs", True), ("fms", True), ("random", False)])
def test_every_key_value_head_keeps_as_many_query_heads(criterion: str, refitted: bool) -> None:
    model = small_model()
    scores = score(model, CALIBRATION, Scoring(criterion, kinds=("query", "channel")))
    refit = Refit() if refitted else None
    pruned = prune_groups(model, scores, Budget(0.5), refit, CALIBRATION)
    assert group_counts(pruned.decoder, "query") == [4, 4, 4]
    assert group_counts(pruned.decoder, "head") == [4, 4, 4]
    for heads in (pruned.record or {})["kept"]["query"]:
        assert [head // 2 for head in heads] == [0, 1, 2, 3]


def test_the_scores_of_query_heads_are_those_of_their_rows() -> None:
    """The structures of a query head are its columns of q and its rows of o; keys and values do not count."""
    model = small_model()
    scores = score(model, CALIBRATION, Scoring("magnitude", kinds=("query",))).groups["query"]
    attention = model.decoder.runs[0].attention
    q, o = np.asarray(attention.q.kernel[...]), np.asarray(attention.o.kernel[...])
    for layer in range(3):
        norms = np.linalg.norm(q[layer], axis=(0, 2)), np.linalg.norm(o[layer], axis=(1, 2))
        np.testing.assert_allclose(scores[layer], np.maximum(*norms), rtol=1e-5)


# --------------------------------------------------------------------------------- layers and hidden dimensions


def test_the_removed_layers_are_those_whose_removal_leaves_the_least_loss() -> None:
    decoder = small_decoder(layers=5, deviation=0.4)

    def loss_without(removed: set[int]) -> float:
        return perplexity(slice_layers(decoder, [n for n in range(5) if n not in removed]), BATCHES).loss

    first = min(range(5), key=lambda n: loss_without({n}))
    second = min({*range(5)} - {first}, key=lambda n: loss_without({first, n}))
    assert best_layers(decoder, BATCHES, 3) == sorted({*range(5)} - {first, second})
    assert best_layers(decoder, BATCHES, 4, range(2, 3)) == [0, 1, 3, 4]
    model = Model(decoder, {}, Path("nowhere"), "small")
    pruned, kept = drop_layers(model, CALIBRATION, 0.4)
    assert (layer_count(pruned.decoder), kept) == (3, best_layers(decoder, BATCHES, 3))


def with_biases_of(decoder: Decoder, biases: Sequence[float]) -> Decoder:
    """The decoder with every entry of the bias of mlp.down set to one number in each layer."""

    def leaf(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        if not axis_table.array_path(path).endswith("mlp.down.bias"):
            return array
        return jnp.broadcast_to(jnp.asarray(biases, array.dtype)[:, None], array.shape)

    return jax.tree_util.tree_map_with_path(leaf, decoder)


def test_a_layer_whose_removal_leaves_no_finite_loss_is_never_the_best() -> None:
    """Layers 0 and 1 add opposites, and so do 2 and 3: without layer 1, or without layer 3, the stream overflows."""
    large = 3e38
    decoder = with_biases_of(small_decoder(layers=5, mlp_bias=True), [large, -large, large, -large, 0.0])

    def loss_without(layer: int) -> float:
        sliced = slice_layers(decoder, [n for n in range(5) if n != layer])
        return float(window_losses(sliced, BATCHES).sum())

    finite = [np.isfinite(loss_without(layer)) for layer in range(5)]
    assert not all(finite), "the example has a candidate without a loss"
    assert any(finite)
    kept = best_layers(decoder, BATCHES, 4)
    (removed,) = {*range(5)} - {*kept}
    assert finite[removed]


def test_losses_without_a_finite_candidate_are_an_error() -> None:
    large = 3e38
    decoder = with_biases_of(small_decoder(layers=4, mlp_bias=True), [large, -large, large, 0.0])
    with pytest.raises(InputError, match=r"not finite whichever of the layers 1 is removed: .*other --layers"):
        best_layers(decoder, BATCHES, 3, range(1, 2))
    broken = with_biases_of(small_decoder(layers=3, mlp_bias=True), [0.0, np.nan, 0.0])
    with pytest.raises(InputError, match="the loss of the dense model on the calibration windows is nan"):
        best_layers(broken, BATCHES, 2)


def test_hidden_dimensions_are_scored_over_the_whole_model() -> None:
    """Magnitude: the largest norm of a dimension's rows and columns, over all matrices of all layers."""
    model = small_model()
    pruned, kept = narrow(model, CALIBRATION, Scoring("magnitude"), 0.25)
    assert hidden_size(pruned.decoder) == 12
    (run,) = model.decoder.runs
    readers = [run.attention.q, run.attention.k, run.attention.v, run.mlp.gate, run.mlp.up]
    norms = []
    for linear in readers:
        array = np.asarray(linear.kernel[...])
        norms += list(np.sqrt(np.square(array.reshape(3, 16, -1)).sum(-1)))
    for linear in (run.attention.o, run.mlp.down):
        array = np.asarray(linear.kernel[...])
        norms += list(np.sqrt(np.square(array.reshape(3, -1, 16)).sum(1)))
    expected = np.sort(np.argsort(-np.max(norms, axis=0))[:12])
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("criterion", ["wanda", "random", "element-1", "fms"])
def test_criteria_that_score_hidden_dimensions(criterion: str) -> None:
    pruned, kept = narrow(small_model(), CALIBRATION, Scoring(criterion), 0.5, round_to=6)
    assert hidden_size(pruned.decoder) == len(kept) == 12
    assert np.isfinite(perplexity(pruned.decoder, BATCHES).loss)


@pytest.mark.parametrize("criterion", ["obs", "gate", "flap"])
def test_criteria_without_scores_for_hidden_dimensions(criterion: str) -> None:
    with pytest.raises(InputError, match="has no scores for hidden dimensions"):
        narrow(small_model(), CALIBRATION, Scoring(criterion), 0.5)
