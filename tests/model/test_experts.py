"""The mixture of experts of a layer: its outputs and gradients, and the router's choice."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.model import experts
from minillm_jax.model.config import Routing
from minillm_jax.model.modules import Experts

D, W = 12, 7


def random_experts(count: int, seed: int = 0, biased: bool = False) -> Experts:
    rng = np.random.default_rng(seed)
    shapes = {"router": (D, count), "gate": (count, D, W), "up": (count, D, W), "down": (count, W, D)}
    if biased:
        shapes |= {"gate_bias": (count, W), "up_bias": (count, W), "down_bias": (count, D), "choice_bias": (count,)}
    return Experts({name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()})


@pytest.mark.parametrize("choices", ["random", "all one expert"])
@pytest.mark.parametrize(("tokens", "count", "chosen"), [(1, 5, 2), (67, 9, 4)])
def test_every_chosen_expert_computes_its_tokens(tokens: int, count: int, chosen: int, choices: str) -> None:
    """In blocks of 1 to 64 rows; outputs and gradients are those of one token and one expert at a time."""
    mixture, rng = random_experts(count, biased=True), np.random.default_rng(1)
    routing = Routing(chosen, limit=1.5, slope=1.7)
    x = jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32)
    rows = np.asarray(
        [rng.permutation(count)[:chosen] if choices == "random" else range(chosen) for _ in range(tokens)]
    )
    arrays = experts.matrices(mixture)

    def reference(arrays: experts.Matrices) -> jax.Array:
        of_all = jax.vmap(lambda expert: experts.of_one(expert, x, routing, "silu"))(dict(arrays))
        return of_all[rows.T, jnp.arange(tokens)].swapaxes(0, 1)

    def blocks(arrays: experts.Matrices, largest: int) -> jax.Array:
        return experts.by_blocks(arrays, {}, x, jnp.asarray(rows), routing, "silu", largest)

    def with_gradient(outputs: Callable[[experts.Matrices], jax.Array]) -> tuple[jax.Array, experts.Matrices]:
        def total(arrays: experts.Matrices) -> tuple[jax.Array, jax.Array]:
            found = outputs(arrays)
            return jnp.sum(jnp.sin(found)), found

        gradient, found = jax.jit(jax.grad(total, has_aux=True))(arrays)
        return found, gradient

    expected, gradient = with_gradient(reference)
    for largest in (7, 64):
        found, by_blocks = with_gradient(partial(blocks, largest=largest))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        for name, of_reference in gradient.items():
            np.testing.assert_allclose(by_blocks[name], of_reference, atol=1e-4)


def test_directions_of_the_input_are_vmapped() -> None:
    mixture, routing = random_experts(4), Routing(2)
    x = jax.random.normal(jax.random.key(0), (3, 2, 9, D))
    together = jax.vmap(lambda one: experts.mixed(mixture, routing, "silu", one))(x)
    for number in range(3):
        np.testing.assert_allclose(
            together[number], experts.mixed(mixture, routing, "silu", x[number]), rtol=1e-5, atol=4e-5
        )


def test_weights_are_those_of_the_scores_and_biases_act_on_the_choice_alone() -> None:
    mixture = random_experts(6, biased=True)
    x = jax.random.normal(jax.random.key(1), (50, D))
    scores = 1 / (1 + np.exp(-np.asarray(x @ mixture.router[...], np.float64)))
    routing = Routing(3, scores="sigmoid", renormalised=True, scale=1.5, choice_bias=True)
    weights, chosen = map(np.asarray, experts.route(mixture, routing, x))
    preferred = scores + np.asarray(mixture.choice_bias[...])
    assert all(set(row) == set(np.argsort(-one)[:3]) for row, one in zip(chosen, preferred, strict=True))
    of_chosen = np.take_along_axis(scores, chosen, 1)
    np.testing.assert_allclose(weights, 1.5 * of_chosen / of_chosen.sum(1, keepdims=True), rtol=1e-5)


def test_a_token_chooses_among_the_experts_of_its_best_groups() -> None:
    mixture = random_experts(8)
    x = jax.random.normal(jax.random.key(2), (40, D))
    routing = Routing(2, scores="sigmoid", groups=4, chosen_groups=1)
    _, chosen = experts.route(mixture, routing, x)
    logits = np.asarray(x @ mixture.router[...]).reshape(40, 4, 2)
    of_group = (1 / (1 + np.exp(-logits))).sum(-1)
    assert np.array_equal(np.sort(chosen, 1), of_group.argmax(1)[:, None] * 2 + np.arange(2))


def test_a_model_with_few_experts_chooses_all() -> None:
    mixture = random_experts(2)
    weights, chosen = experts.route(mixture, Routing(4), jax.random.normal(jax.random.key(3), (5, D)))
    assert chosen.shape == (5, 2)
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-6)
