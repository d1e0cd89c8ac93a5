"""Directions: drawn again from their keys bit for bit, in every program."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.model import axis_table
from minillm_jax.model.decoder import scan_layers
from minillm_jax.model.tree import kernels
from minillm_jax.scoring.gradient import directions
from minillm_jax.settings import DISTRIBUTIONS
from tests.helpers import perturb, quickly, small_decoder

SHAPES = {"attention.q": (48, 8, 4), "attention.o": (8, 4, 48), "mlp.down": (37, 48)}


def draw_without_jit(key: jax.Array, layer: int, name: str, distribution: str) -> np.ndarray:
    with jax.disable_jit():
        return np.asarray(directions.draw(key, jnp.int32(layer), name, SHAPES[name], distribution))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", quickly(SHAPES, ("attention.q",)))
def test_same_key_same_direction_bit_for_bit_in_every_program(name: str, distribution: str) -> None:
    """Programs: without jit, jitted, vmapped over directions, and inside a scan over layers."""
    keys, layers = directions.direction_keys(7, 0, 3), jnp.arange(2, dtype=jnp.int32)

    def draw(key: jax.Array, layer: jax.Array) -> jax.Array:
        return directions.draw(key, layer, name, SHAPES[name], distribution)

    vmapped = jax.jit(jax.vmap(draw, (0, None)))(keys, layers[1])
    scanned = jax.jit(lambda key: jax.lax.scan(lambda c, layer: (c, draw(key, layer)), 0, layers)[1])
    for number, key in enumerate(keys):
        expected = draw_without_jit(key, 1, name, distribution)
        np.testing.assert_array_equal(jax.jit(draw)(key, layers[1]), expected)
        np.testing.assert_array_equal(vmapped[number], expected)
        np.testing.assert_array_equal(scanned(key)[1], expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_entries_have_zero_mean_and_unit_variance_and_do_not_repeat(distribution: str) -> None:
    shape = (256, 40, 33)
    z = directions.draw(directions.direction_keys(0, 0, 1)[0], jnp.int32(0), "attention.q", shape, distribution)
    count = z.size
    assert abs(float(jnp.mean(z))) < 5 / count**0.5
    assert abs(float(jnp.mean(z**2)) - 1) < 10 / count**0.5
    halves = np.asarray(z).reshape(2, -1)
    assert abs(np.mean(halves[0] * halves[1])) < 5 / halves[0].size ** 0.5
    neighbours = np.asarray(z)[..., 1:] * np.asarray(z)[..., :-1]
    assert abs(neighbours.mean()) < 5 / neighbours.size**0.5
    if distribution == "rademacher":
        assert set(np.unique(z)) == {-1.0, 1.0}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_directions_matrices_layers_and_seeds_are_independent(distribution: str) -> None:
    shape = (64, 64)
    first, second = directions.direction_keys(0, 0, 2)
    entries = [
        directions.draw(key, jnp.int32(layer), name, shape, distribution)
        for key, layer, name in (
            (first, 0, "mlp.gate"),
            (second, 0, "mlp.gate"),
            (first, 1, "mlp.gate"),
            (first, 0, "mlp.up"),
            (directions.direction_keys(1, 0, 1)[0], 0, "mlp.gate"),
            (directions.stream_key(0, "noise"), 0, "mlp.gate"),
        )
    ]
    for i, left in enumerate(entries):
        for right in entries[i + 1 :]:
            assert abs(float(jnp.mean(left * right))) < 5 / left.size**0.5


def test_keys_do_not_depend_on_the_chunks_of_directions() -> None:
    at_once = directions.direction_keys(3, 0, 7)
    in_chunks = jnp.concatenate([directions.direction_keys(3, 0, 2), directions.direction_keys(3, 2, 7)])
    assert jnp.array_equal(jax.random.key_data(at_once), jax.random.key_data(in_chunks))


def test_keys_do_not_depend_on_the_default_random_generator_of_the_process() -> None:
    expected = jax.random.key_data(directions.direction_keys(3, 0, 2))
    with jax.default_prng_impl("rbg"):
        keys = jax.random.key_data(directions.direction_keys(3, 0, 2))
    assert jnp.array_equal(expected, keys)


@pytest.mark.parametrize(
    "distribution",
    ["rademacher", *(pytest.param(d, marks=pytest.mark.slow) for d in DISTRIBUTIONS if d != "rademacher")],
)
def test_a_step_moves_every_matrix_but_no_bias_and_no_norm(distribution: str) -> None:
    decoder = small_decoder(qkv_bias=True)
    key = directions.direction_keys(0, 0, 1)[0]

    def step(carry: None, block: object, layer: jax.Array, extra: None) -> tuple[None, tuple]:
        return None, (block, perturb(block, key, layer, jnp.float32(0.5), distribution))

    _, ((before, after),) = jax.jit(lambda runs: scan_layers(runs, step, None))(decoder.runs)
    moved, jitted = kernels(after), jax.jit(directions.draw, static_argnums=(2, 3, 4))
    for name, kernel in kernels(before).items():
        for layer in range(3):
            z = jitted(key, jnp.int32(layer), name, kernel.shape[1:], distribution)
            np.testing.assert_allclose(moved[name][layer], kernel[layer] + 0.5 * z, rtol=1e-6, atol=1e-6)
    for path in ("attention_norm.scale", "attention.q.bias"):
        assert path in axis_table.BLOCK_AXES
    np.testing.assert_array_equal(after.attention.q.bias[...], before.attention.q.bias[...])
    np.testing.assert_array_equal(after.mlp_norm.scale[...], before.mlp_norm.scale[...])


def test_perturbed_bfloat16_weights_are_not_rounded_back() -> None:
    decoder = jax.tree.map(lambda leaf: leaf[0].astype(jnp.bfloat16), small_decoder().runs[0])
    key = directions.direction_keys(0, 0, 1)[0]
    moved = perturb(decoder, key, jnp.int32(0), jnp.float32(1e-4), "rademacher")
    for name, kernel in kernels(moved).items():
        assert kernel.dtype == jnp.float32
        step = jnp.abs(kernel[...] - kernels(decoder)[name][...].astype(jnp.float32))
        np.testing.assert_allclose(step, 1e-4, rtol=2e-2)
