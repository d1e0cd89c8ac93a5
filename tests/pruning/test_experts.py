"""Pruning of experts: the scores by their definition, the refit's error, groups of experts."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.model import experts
from minillm_jax.model.axis_table import array_path
from minillm_jax.model.decoder import Decoder, embed, rotary_angles
from minillm_jax.model.layer import attention_sublayer, mlp_sublayer
from minillm_jax.model.modules import experts_of
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning.experts import Choice, best, prune_experts
from minillm_jax.pruning.refit import resolve
from minillm_jax.pruning.slicing import put_layer, take_layer
from minillm_jax.settings import Refit
from tests.helpers import hugging_face_folder, random_tokens

NONE = Refit("none")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return read_model(hugging_face_folder(tmp_path_factory.mktemp("model") / "dense", "mixtral")).decoder


@pytest.fixture(scope="module")
def batches() -> Batches:
    return Batches(random_tokens(97, 24, 40))


def first_inputs(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """The inputs of the router in the first layer, for every token."""
    block, config = jax.tree.map(lambda a: a[0], decoder.runs[0]), decoder.config
    x = embed(decoder, tokens)
    after = attention_sublayer(block, config, x, rotary_angles(decoder, tokens.shape[1])).stream
    return mlp_sublayer(block, config, x, after).inputs["mlp.up"].reshape(-1, x.shape[-1])


def first_layer(decoder: Decoder, tokens: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, chosen experts and norms of their outputs in the first layer, for every token."""
    block, config = jax.tree.map(lambda a: a[0], decoder.runs[0]), decoder.config
    rows = first_inputs(decoder, tokens)
    weights, chosen = experts.route(experts_of(block), config.routing, rows)
    outputs = experts.of_chosen(experts_of(block), config.routing, "silu", rows, chosen)
    return np.asarray(weights), np.asarray(chosen), np.linalg.norm(outputs, axis=-1)


@pytest.mark.parametrize("criterion", ["reap", "frequency", "expert-norm"])
def test_the_experts_of_the_highest_scores_are_kept(decoder: Decoder, batches: Batches, criterion: str) -> None:
    weights, chosen, norms = first_layer(decoder, jnp.asarray(batches.windows))
    values = {"reap": weights * norms, "frequency": np.ones_like(norms), "expert-norm": norms}[criterion]
    of_expert = [values[chosen == expert] for expert in range(6)]
    scores = [one.sum() if criterion == "frequency" else one.mean() for one in of_expert]
    pruned, all_kept = prune_experts(decoder, Choice(4, 40, criterion), batches, NONE)
    kept = all_kept["expert"]
    assert kept[0].tolist() == sorted(np.argsort(scores)[-4:])
    assert [len(rows) for rows in kept] == [4, 4, 4]
    down = np.asarray(experts_of(decoder.runs[0]).down[0])
    assert np.array_equal(experts_of(pruned.runs[0]).down[0], down[kept[0]])


def test_the_channels_of_the_highest_scores_are_kept_in_every_expert(decoder: Decoder, batches: Batches) -> None:
    """Scores by their definition in the first layer; the sliced layer is that with zeros in the other channels."""
    block, config = jax.tree.map(lambda a: a[0], decoder.runs[0]), decoder.config
    mixture, rows = experts_of(block), first_inputs(decoder, jnp.asarray(batches.windows))
    weights, chosen = map(np.asarray, experts.route(mixture, config.routing, rows))
    pruned, kept = prune_experts(decoder, Choice(6, 25), batches, NONE)
    assert [len(found) for found in kept["expert_channel"]] == [6 * 25] * 3
    for expert, found in enumerate(kept["expert_channel"][0].reshape(6, -1) - 40 * np.arange(6)[:, None]):
        gate, up, down = (np.asarray(getattr(mixture, name)[expert]) for name in ("gate", "up", "down"))
        tokens, places = np.nonzero(chosen == expert)
        a = np.asarray(jax.nn.silu(rows[tokens] @ gate)) * np.asarray(rows[tokens] @ up) * weights[tokens, places, None]
        scores = np.square(a).sum(0) * np.square(down).sum(1)
        assert set(found) == set(np.argsort(-scores)[:25])
        assert np.array_equal(experts_of(pruned.runs[0]).down[0, expert], down[found])


def test_removed_channels_of_experts_are_zeros_at_full_width(decoder: Decoder) -> None:
    rng, run = np.random.default_rng(0), jax.tree.map(lambda a: a[:1], decoder.runs[0])
    channels = np.stack([np.sort(rng.choice(40, 30, replace=False)) for _ in range(4)])
    kept = {"expert": np.array([0, 2, 3, 5]), "expert_channel": (channels + 40 * np.arange(4)[:, None]).ravel()}
    sliced = take_layer(kept, run, None)
    assert experts_of(sliced).gate.shape == (1, 4, 64, 30)
    whole = put_layer(kept, {path: np.asarray(array) for path, array in named_arrays(sliced)}, run)
    again = take_layer(kept, whole, None)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(sliced), jax.tree.leaves(again), strict=True))
    assert int(jnp.count_nonzero(experts_of(whole).down)) == 4 * 30 * 64


def test_random_experts_follow_the_seed(decoder: Decoder, batches: Batches) -> None:
    kept = [
        np.stack(prune_experts(decoder, Choice(3, 40, "random", seed), batches, NONE)[1]["expert"])
        for seed in (1, 1, 2)
    ]
    assert np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])


def outputs(decoder: Decoder, batches: Batches) -> np.ndarray:
    return np.asarray(jax.jit(lambda decoder, tokens: decoder(tokens))(decoder, jnp.asarray(batches.windows)))


def test_the_refit_brings_the_outputs_nearer_to_the_dense_ones(decoder: Decoder) -> None:
    """On the calibration windows, with the same experts kept; and on windows that the refit has not seen."""
    batches = Batches(random_tokens(97, 64, 40))
    choice, dense = Choice(4, 40, "frequency"), decoder
    plain, refitted = (
        prune_experts(decoder, choice, batches, resolve(method, decoder.config))[0] for method in (NONE, Refit())
    )
    for share, windows in ((0.93, batches), (0.98, Batches(random_tokens(97, 32, 40, seed=5)))):
        before, after = (np.mean((outputs(one, windows) - outputs(dense, windows)) ** 2) for one in (plain, refitted))
        assert after < share * before


def test_equally_many_of_each_group_are_kept_and_equal_scores_keep_the_first() -> None:
    scores = np.array([5.0, 1.0, 2.0, 9.0, 9.0, 9.0, 9.0, 0.0])
    assert best(scores, 4).tolist() == [3, 4, 5, 6]
    assert best(scores, 4, groups=2).tolist() == [0, 3, 4, 5]


def test_activations_that_are_not_finite_are_an_error(decoder: Decoder, batches: Batches) -> None:
    def leaf(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        return array * np.inf if array_path(path) == "embedding" else array

    broken = jax.tree_util.tree_map_with_path(leaf, decoder)
    with pytest.raises(InputError, match="experts of layer 0 is not finite"):
        prune_experts(broken, Choice(4, 40), batches, NONE)
