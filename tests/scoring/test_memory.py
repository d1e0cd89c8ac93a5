"""The memory of estimates and scores, from the compiler's account of abstract models: nothing is allocated."""

from typing import Any

import jax
import pytest
from jax import numpy as jnp

from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.modules import depth
from minillm_jax.model.ops import Rope
from minillm_jax.model.tree import kernels, parameter_count
from minillm_jax.plan import score_bytes
from minillm_jax.recipes.recipe import load, with_options
from minillm_jax.recipes.sized import sized
from minillm_jax.recipes.used import used
from minillm_jax.scoring.criteria import CRITERIA
from minillm_jax.scoring.gradient import directions, slopes
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.exact import add_weight_gradients, no_gradients, weight_gradients
from minillm_jax.scoring.gradient.spaces import Gates, LowRank, Space, Weights
from minillm_jax.scoring.score import score_structure

CONFIG = DecoderConfig("llama", 1e-5, Rope(10000.0))
MEDIUM = build(CONFIG, Sizes(V=512, D=512, H=64, layers=(LayerSizes(N=8, K=8, F=1376),) * 8))
LARGE = build(CONFIG, Sizes(V=32000, D=4096, H=128, layers=(LayerSizes(N=32, K=32, F=11008),) * 32))
TOKENS = jax.ShapeDtypeStruct((8, 128), jnp.int32)


def account(lowered: Any) -> tuple[int, int]:
    """Bytes of the arguments and of the temporary arrays of a program."""
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def layer_bytes(decoder: Decoder) -> float:
    run = decoder.runs[0]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run)) / depth(run)


def account_of_a_side(decoder: Decoder, space: Space) -> tuple[int, int]:
    direction = jax.eval_shape(lambda: Directions.plain(directions.direction_keys(0, 0, 1)))
    step, windows = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    return account(slopes.losses_at.lower(decoder, direction, TOKENS, windows, step, space))


@pytest.mark.parametrize("distribution", [pytest.param("gaussian", marks=pytest.mark.slow), "rademacher"])
def test_a_side_of_a_pair_takes_the_memory_of_a_forward_pass(distribution: str) -> None:
    """25 M parameters, 8 windows of 128 tokens: argument + temp at most 1.15 times the forward's."""
    forward = account(sequence_losses.lower(MEDIUM, TOKENS))
    assert sum(account_of_a_side(MEDIUM, Weights(distribution))) <= 1.15 * sum(forward)


@pytest.mark.parametrize("distribution", ["gaussian", pytest.param("rademacher", marks=pytest.mark.slow)])
def test_a_side_of_a_pair_of_seven_billion_parameters_adds_at_most_a_layer_and_a_quarter(distribution: str) -> None:
    _, forward = account(sequence_losses.lower(LARGE, TOKENS))
    assert account_of_a_side(LARGE, Weights(distribution))[1] - forward <= 1.25 * layer_bytes(LARGE)


@pytest.mark.parametrize("space", [LowRank(), Gates()], ids=str)
def test_directions_without_a_copy_of_the_weights_add_no_layer(space: Space) -> None:
    """The float32 residual stream: at most a tenth of a layer of seven billion parameters."""
    _, forward = account(sequence_losses.lower(LARGE, TOKENS))
    assert account_of_a_side(LARGE, space)[1] - forward <= 0.1 * layer_bytes(LARGE)


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.down"])
def test_scoring_seven_billion_parameters_takes_about_one_layer(name: str) -> None:
    """The estimate ĝ is rebuilt for one matrix of one layer at a time and never exists for the whole model."""
    kernel = kernels(LARGE.runs[0])[name].get_value()
    slopes = jax.eval_shape(
        lambda: {"directions": Directions.plain(directions.direction_keys(0, 0, 16)), "projected": jnp.zeros(16)}
    )
    norms = jax.ShapeDtypeStruct(kernel.shape[:2], jnp.float32)
    static = {"name": name, "kind": "channel", "count": 11008, "criterion": CRITERIA["fms"], "space": Weights()}
    lowered = score_structure.lower(kernel, norms, None, None, jax.ShapeDtypeStruct((32,), jnp.int32), slopes, **static)
    assert account(lowered)[1] <= layer_bytes(LARGE)


def test_no_logits_array_of_batch_length_vocabulary_exists() -> None:
    """An array of logits [B, T, V] would be twenty times the limit."""
    decoder = build(CONFIG, Sizes(V=250_000, D=64, H=16, layers=(LayerSizes(N=4, K=4, F=64),)))
    tokens = jax.ShapeDtypeStruct((16, 512), jnp.int32)
    _, temporary = account(sequence_losses.lower(decoder, tokens))
    assert temporary < 0.05 * 16 * 512 * 250_000 * 4


@pytest.mark.parametrize("program", [sequence_losses, weight_gradients], ids=["loss", "gradients"])
def test_no_float32_scores_of_all_queries_exist_at_8192_tokens(program: Any) -> None:
    """At most a tenth of one array [B, K, G, T, S]. Whole scores took three such arrays, and four in the gradients."""
    decoder = build(CONFIG, Sizes(V=512, D=64, H=8, layers=(LayerSizes(N=8, K=2, F=64),) * 2))
    _, temporary = account(program.lower(decoder, jax.ShapeDtypeStruct((1, 8192), jnp.int32)))
    assert temporary < 0.1 * 8 * 8192**2 * 4


def account_of_exact_gradients(tokens: tuple[int, int]) -> Any:
    """The compiler's account, and the bytes of the sums."""
    sums = jax.eval_shape(lambda decoder: no_gradients(decoder, curvature=False), MEDIUM)
    one = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = add_weight_gradients.lower(sums, MEDIUM, jax.ShapeDtypeStruct(tokens, jnp.int32), one, one)
    return lowered.compile().memory_analysis(), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sums))


def test_exact_gradients_take_the_memory_of_weights_and_sums() -> None:
    """The sums are overwritten. Beside them are one layer's gradient and the activations of one window."""
    memory, sums = account_of_exact_gradients((1, 128))
    assert memory.alias_size_in_bytes >= sums
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    assert memory.argument_size_in_bytes + beside <= parameter_count(MEDIUM) * 4 + sums + 2 * layer_bytes(MEDIUM)


def test_the_plan_of_llm_pruner_holds_what_the_compiler_counts() -> None:
    """Ten windows of 64 tokens in one batch: the sums and the temporaries, and at most half as much again."""
    recipe = sized(used(*with_options(load("llm-pruner"), {"ratio": 0.5, "layers": "all"})).recipe, MEDIUM)
    memory, sums = account_of_exact_gradients((10, 64))
    counted = sums + memory.temp_size_in_bytes
    assert counted <= score_bytes(MEDIUM, recipe, on_cpu=True) <= 1.5 * counted
