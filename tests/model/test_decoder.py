"""Parity with transformers in float32, dense and pruned, and the scan over runs."""

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.attention import causal_mask, grouped_attention
from minillm_jax.model.build import NO_WINDOW, build
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder, final_hidden, scan_layers
from minillm_jax.model.loaded import Model
from minillm_jax.model.ops import Rope
from minillm_jax.model.tree import group_counts, parameter_count
from minillm_jax.pruning.slicing import slice_groups
from tests.helpers import (
    CONFIGURATIONS,
    SMALL,
    arrays_equal,
    best_of,
    hugging_face_folder,
    load_torch,
    logits_of,
    quickly,
    random_tokens,
    shared,
    small_decoder,
    torch_logits,
    torch_model,
)

TOLERANCE = 1e-4

# All configurations run on the same token ids, so that each compiles one dense and one pruned program.
TOKENS = random_tokens(97, 2, 130)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A model of a configuration in both frameworks, and its logits in this package."""

    torch: Any
    model: Model
    logits: np.ndarray


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Dense]:
    """Name of a configuration -> its dense model, made once for all tests of the module."""

    @cache
    def make(name: str) -> Dense:
        family, changes = CONFIGURATIONS[name]
        torch, folder = torch_model(family, **changes), tmp_path_factory.mktemp("dense") / "model"
        torch.save_pretrained(folder)
        model = read_model(folder)
        return Dense(torch, model, logits_of(model.decoder, TOKENS))

    return make


def difference(model: Model, tokens: np.ndarray) -> float:
    """Largest difference between the logits of a model and those of transformers for the model's folder."""
    return largest_difference(logits_of(model.decoder, tokens), load_torch(model.folder), tokens)


def largest_difference(logits: np.ndarray, torch: Any, tokens: np.ndarray = TOKENS) -> float:
    return float(np.abs(logits - torch_logits(torch, tokens)).max())


def pruned(model: Model, folder: Path, ratio: float) -> Model:
    """A model with random groups removed, written to a folder and read from it."""
    rng = np.random.default_rng(0)
    scores = {kind: [rng.random(n) for n in group_counts(model.decoder, kind)] for kind in axis_table.KINDS}
    write_model(dataclasses.replace(model, decoder=slice_groups(model.decoder, best_of(scores, ratio))), folder)
    return read_model(folder)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_equal_transformers_before_and_after_pruning(
    dense: Callable[[str], Dense], tmp_path: Path, name: str
) -> None:
    model, logits = dense(name).model, dense(name).logits
    assert largest_difference(logits, load_torch(model.folder)) <= TOLERANCE
    assert difference(pruned(model, tmp_path / "pruned", 0.3), TOKENS) <= TOLERANCE


def random_sizes(family: str, integer: Callable[[int, int], int]) -> dict[str, Any]:
    """Changes of a family's configuration to other sizes.

    Args:
      family: the family.
      integer: smallest and largest value -> a value, both ends included.
    """
    kv_heads, per_group, half = integer(1, 4), integer(1, 3), integer(1, 8)
    if family in ("opt", "bloom", "gpt_neox", "stablelm"):
        # Heads of even size; gpt_neox rotates a quarter of the features.
        sizes = {"hidden_size": kv_heads * 2 * (half + 7), "num_attention_heads": kv_heads}
        sizes |= {"num_key_value_heads": kv_heads} if family == "stablelm" else {}
    else:
        # A norm over very few features can divide by almost zero, which enlarges rounding errors beyond the tolerance.
        heads = kv_heads * per_group
        sizes = {
            "hidden_size": heads * (6 + 18 // heads),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }
        sizes["head_dim"] = 4 * half  # glm rotates half of the features
    names = {"bloom": {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}}.get(family, {})
    sizes["num_hidden_layers"] = integer(1, 3)
    if family != "bloom":
        sizes["ffn_dim" if family == "opt" else "intermediate_size"] = integer(1, 70)
    if family == "opt":
        sizes["word_embed_proj_dim"] = (sizes["hidden_size"], 10)[integer(0, 1)]
        sizes["do_layer_norm_before"] = bool(integer(0, 1))
    if family in (
        "mistral",
        "ministral3",
        "phi3",
        "gemma2",
        "gemma3_text",
        "olmo3",
        "exaone4",
        "cohere2",
        "starcoder2",
    ):
        sizes["sliding_window"] = integer(1, 40)
    if family != "phi":  # whose head has a bias
        sizes["tie_word_embeddings"] = bool(integer(0, 1))
    return {names.get(key, key): value for key, value in sizes.items()}


@pytest.mark.parametrize("sizes", ["smallest", "random"])
@pytest.mark.parametrize("family", quickly(SMALL))
def test_logits_equal_transformers_for_other_sizes(tmp_path: Path, family: str, sizes: str) -> None:
    rng = np.random.default_rng(list(SMALL).index(family))

    def integer(smallest: int, largest: int) -> int:
        return smallest if sizes == "smallest" else int(rng.integers(smallest, largest + 1))

    folder = hugging_face_folder(tmp_path / "model", family, **random_sizes(family, integer))
    assert difference(read_model(folder), random_tokens(97, 1, integer(1, 300))) <= TOLERANCE


DROPPED = [
    ("llama, biases", "input_layernorm.weight"),
    ("llama, biases", "q_proj.bias"),
    ("llama, biases", "down_proj.bias"),
    ("llama", "model.norm.weight"),
    ("qwen2", "v_proj.bias"),
    ("qwen3", "q_norm.weight"),
    ("qwen3", "k_norm.weight"),
    ("gemma", "post_attention_layernorm.weight"),
    ("gemma2", "pre_feedforward_layernorm.weight"),
    ("gemma2", "post_feedforward_layernorm.weight"),
    ("gemma3_text", "q_norm.weight"),
    ("gemma3_text", "pre_feedforward_layernorm.weight"),
    ("olmo2", "q_norm.weight"),
    ("olmo2", "k_norm.weight"),
    ("olmo2", "post_feedforward_layernorm.weight"),
    ("granite, biases, tied", "o_proj.bias"),
    ("cohere2", "input_layernorm.weight"),
    ("starcoder2", "c_fc.bias"),
    ("stablelm", "post_attention_layernorm.bias"),
    ("phi", "lm_head.bias"),
    ("phi", "self_attn.dense.bias"),
    ("opt", "embed_positions.weight"),
    ("opt", "fc1.bias"),
    ("opt", "self_attn_layer_norm.bias"),
    ("opt, projected, post norm", "final_layer_norm.weight"),
    ("opt, projected, post norm", "project_in.weight"),
    ("bloom", "query_key_value.bias"),
    ("bloom", "word_embeddings_layernorm.bias"),
    ("bloom", "ln_f.bias"),
    ("gpt_neox", "attention.dense.bias"),
    ("gpt_neox", "post_attention_layernorm.bias"),
    ("glm", "k_proj.bias"),
    ("glm4", "post_self_attn_layernorm.weight"),
    ("glm4", "post_mlp_layernorm.weight"),
    ("phi3", "post_attention_layernorm.weight"),
]


@pytest.mark.parametrize(("name", "dropped"), DROPPED)
def test_parity_fails_without_one_parameter(dense: Callable[[str], Dense], name: str, dropped: str) -> None:
    """The random parameters matter: parity fails if a parameter of every layer has its trivial value."""
    torch, logits = copy.deepcopy(dense(name).torch), dense(name).logits
    assert largest_difference(logits, torch) <= TOLERANCE
    parameters = [parameter for path, parameter in torch.named_parameters() if path.endswith(dropped)]
    assert parameters
    is_norm = dropped.endswith("norm.weight") and not name.startswith("gemma")
    for parameter in parameters:
        parameter.data.fill_(1.0 if is_norm else 0.0)
    assert largest_difference(logits, torch) > 100 * TOLERANCE


def copied(decoder: Decoder) -> Decoder:
    """A decoder whose modules can be changed without a change of the original."""
    return jax.tree.map(lambda leaf: leaf, decoder)


@pytest.mark.parametrize(
    ("name", "path", "trivial"),
    [
        ("bloom", "slopes", 0),
        ("mistral, sliding window", "window", NO_WINDOW),
        ("qwen2, some layers sliding", "window", NO_WINDOW),
        ("gemma2", "window", NO_WINDOW),
        ("gemma3_text", "window", NO_WINDOW),
        ("gemma3_text", "rope", 0),
        ("olmo3", "window", NO_WINDOW),
        ("smollm3", "rope", 0),
        ("exaone4", "rope", 0),
        ("cohere2", "rope", 0),
        ("olmo3, yarn in the layers without a window", "rope", 0),
    ],
)
def test_parity_fails_without_data_of_the_layers(
    dense: Callable[[str], Dense], name: str, path: str, trivial: int
) -> None:
    """ALiBi slopes and sliding windows are data, not parameters."""
    decoder = copied(dense(name).model.decoder)
    data = getattr(decoder.runs[0].attention, path)
    data.set_value(jnp.full_like(data[...], trivial))
    assert largest_difference(logits_of(decoder, TOKENS), dense(name).torch) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "setting"),
    [("gemma2, tight caps", name) for name in ("rope", "attention_cap", "logit_cap", "query_scale", "embedding_scale")]
    + [("granite", name) for name in ("query_scale", "embedding_scale", "residual_scale", "logit_scale")],
)
def test_parity_fails_without_one_setting(dense: Callable[[str], Dense], name: str, setting: str) -> None:
    decoder = copied(dense(name).model.decoder)
    decoder.config = dataclasses.replace(decoder.config, **{setting: None})
    assert largest_difference(logits_of(decoder, TOKENS), dense(name).torch) > 100 * TOLERANCE


def test_a_text_longer_than_the_learned_positions_is_an_error(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model", "opt", max_position_embeddings=16)
    decoder = read_model(folder).decoder
    assert logits_of(decoder, np.zeros((1, 16), np.int32)).shape == (1, 16, 97)
    with pytest.raises(InputError, match="sequences of 17 tokens are too long: the model has 16 learned positions"):
        logits_of(decoder, np.zeros((1, 17), np.int32))


def test_stories260k_equals_transformers_before_and_after_pruning(tmp_path: Path) -> None:
    model, tokens = read_model(shared("models/stories260K")), random_tokens(512, 2, 300)
    assert difference(model, tokens) <= TOLERANCE
    assert difference(pruned(model, tmp_path / "pruned", 0.2), tokens) <= TOLERANCE


def test_query_and_key_norms_change_the_logits() -> None:
    decoder, tokens = small_decoder(qk_norm=True), random_tokens(61, 1, 9)
    scale = decoder.runs[0].attention.q_norm.scale
    before = logits_of(decoder, tokens)
    scale.set_value(2.0 * scale[...])
    assert not np.allclose(before, logits_of(decoder, tokens), atol=1e-3)


def test_two_runs_compute_the_same_bits_as_one_run() -> None:
    decoder, cut = small_decoder(layers=4), small_decoder(layers=4)
    run = decoder.runs[0]
    first, second = (jax.tree.map(lambda a, part=part: a[part], run) for part in (slice(0, 1), slice(1, 4)))
    cut.runs[0] = first
    cut.runs.append(second)
    tokens, hidden = jnp.asarray(random_tokens(61, 2, 11)), jax.jit(final_hidden)
    assert jnp.array_equal(hidden(decoder, tokens), hidden(cut, tokens))


def test_a_scan_visits_layers_in_order() -> None:
    decoder = small_decoder(layers=3)

    def step(carry: jax.Array, block: object, layer: jax.Array, extra: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry + 1, jnp.stack([carry, layer, extra])

    carry, (out,) = scan_layers(decoder.runs, step, jnp.int32(0), [10 * jnp.arange(3, dtype=jnp.int32)])
    assert carry == 3
    np.testing.assert_array_equal(out, [[0, 0, 0], [1, 1, 10], [2, 2, 20]])


def test_bfloat16_weights_compute_in_bfloat16_and_logits_are_float32() -> None:
    decoder, tokens = small_decoder(), random_tokens(61, 1, 9)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder)
    assert jax.eval_shape(final_hidden, half, tokens).dtype == jnp.bfloat16
    logits, expected = logits_of(half, tokens), logits_of(decoder, tokens)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_float16_scores_do_not_overflow() -> None:
    """Products of queries and keys are float32 until the softmax."""
    q = jnp.full((1, 3, 2, 16), 100.0, jnp.float16)
    k = jnp.full((1, 3, 1, 16), 100.0, jnp.float16)
    mixed = grouped_attention(q, k, jnp.ones_like(k), causal_mask(3, None))
    assert mixed.dtype == jnp.float16
    np.testing.assert_allclose(mixed, 1.0)


def test_seven_billion_parameters_by_shape_alone() -> None:
    sizes = Sizes(V=32000, D=4096, H=128, layers=(LayerSizes(N=32, K=32, F=11008),) * 32)
    decoder = build(DecoderConfig("llama", 1e-5, Rope(10000.0)), sizes)
    assert parameter_count(decoder) == 6_738_415_616
    logits = jax.eval_shape(lambda d, t: d(t), decoder, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    assert logits.shape == (2, 16, 32000)


def test_equal_layers_become_one_run_and_the_config_is_static() -> None:
    decoder = small_decoder()
    assert len(decoder.runs) == 1
    assert arrays_equal(decoder, jax.tree.map(lambda leaf: leaf, decoder))
    assert jax.tree.structure(decoder) != jax.tree.structure(small_decoder(norm_epsilon=1e-6))
