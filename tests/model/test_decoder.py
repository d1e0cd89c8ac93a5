"""Parity with transformers in float32, dense and pruned, and the scan over runs."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table, ops
from minillm_jax.model.build import NO_WINDOW, build
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.decoder import final_hidden, scan_layers
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
    random_tokens,
    shared,
    small_decoder,
    torch_logits,
    torch_model,
)

TOLERANCE = 1e-4


def difference(folder: Path, tokens: np.ndarray) -> float:
    """Largest difference of logits between this package and transformers, both reading the same folder."""
    ours = logits_of(read_model(folder).decoder, tokens)
    return float(np.abs(ours - torch_logits(load_torch(folder), tokens)).max())


def pruned_folder(folder: Path, output: Path, ratio: float, seed: int = 0) -> Path:
    model = read_model(folder)
    rng = np.random.default_rng(seed)
    scores = {kind: [rng.random(n) for n in group_counts(model.decoder, kind)] for kind in axis_table.KINDS}
    decoder = slice_groups(model.decoder, best_of(scores, ratio))
    write_model(dataclasses.replace(model, decoder=decoder), output)
    return output


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_equal_transformers_before_and_after_pruning(tmp_path: Path, name: str) -> None:
    family, changes = CONFIGURATIONS[name]
    folder = hugging_face_folder(tmp_path / "dense", family, **changes)
    assert difference(folder, random_tokens(97, 2, 130)) <= TOLERANCE
    pruned = pruned_folder(folder, tmp_path / "pruned", 0.3)
    assert difference(pruned, random_tokens(97, 2, 130)) <= TOLERANCE


@st.composite
def any_sizes(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """A configuration of a family with sizes drawn at random."""
    kv_heads, per_group, half = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    layers, width = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    if family in ("opt", "bloom", "gpt_neox"):
        # Even heads, of which gpt_neox turns a quarter of the features.
        sizes = {"hidden_size": kv_heads * 2 * (half + 1), "num_attention_heads": kv_heads}
    else:
        heads = kv_heads * per_group
        sizes = {"hidden_size": heads * 6, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        sizes["head_dim"] = 4 * half  # glm turns half of the features
    names = {"bloom": {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}}.get(family, {})
    sizes |= {"num_hidden_layers": layers, "ffn_dim" if family == "opt" else "intermediate_size": width}
    if family == "opt":
        sizes["word_embed_proj_dim"] = draw(st.sampled_from([sizes["hidden_size"], 10]))
        sizes["do_layer_norm_before"] = draw(st.booleans())
    if family == "bloom":
        del sizes["intermediate_size"]
    if family in ("mistral", "phi3", "gemma2"):
        sizes["sliding_window"] = draw(st.integers(1, 40))
    sizes["tie_word_embeddings"] = draw(st.booleans())
    return {names.get(key, key): value for key, value in sizes.items()}


@pytest.mark.parametrize("family", SMALL)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data(), length=st.integers(1, 300))
def test_logits_equal_transformers_for_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject, length: int
) -> None:
    folder = hugging_face_folder(tmp_path_factory.mktemp("any") / "model", family, **data.draw(any_sizes(family)))
    assert difference(folder, random_tokens(97, 1, length)) <= TOLERANCE


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
def test_parity_notices_a_dropped_parameter(tmp_path: Path, name: str, dropped: str) -> None:
    """The randomised parameters matter: with one kind of them set to its trivial value, parity fails."""
    family, changes = CONFIGURATIONS[name]
    twin = torch_model(family, **changes)
    twin.save_pretrained(tmp_path / "model")
    tokens = random_tokens(97, 1, 20)
    ours = logits_of(read_model(tmp_path / "model").decoder, tokens)
    assert np.abs(ours - torch_logits(twin, tokens)).max() <= TOLERANCE
    found = [parameter for name, parameter in twin.named_parameters() if name.endswith(dropped)]
    assert found
    for parameter in found:
        is_norm = dropped.endswith("norm.weight") and not family.startswith("gemma")
        parameter.data.fill_(1.0 if is_norm else 0.0)
    assert np.abs(ours - torch_logits(twin, tokens)).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "path", "trivial"),
    [
        ("bloom", "slopes", 0),
        ("mistral, sliding window", "window", NO_WINDOW),
        ("qwen2, some layers sliding", "window", NO_WINDOW),
        ("gemma2", "window", NO_WINDOW),
    ],
)
def test_parity_notices_dropped_data_of_the_layers(tmp_path: Path, name: str, path: str, trivial: int) -> None:
    """ALiBi slopes and sliding windows, which are no parameters."""
    family, changes = CONFIGURATIONS[name]
    folder = hugging_face_folder(tmp_path / "model", family, **changes)
    decoder, tokens = read_model(folder).decoder, random_tokens(97, 1, 40)
    data = getattr(decoder.runs[0].attention, path)
    data.set_value(jnp.full_like(data[...], trivial))
    assert np.abs(logits_of(decoder, tokens) - torch_logits(load_torch(folder), tokens)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("change", ["rope", "attention_cap", "logit_cap", "query_scale", "embedding_scale"])
def test_parity_notices_a_dropped_setting(tmp_path: Path, change: str) -> None:
    """Gemma 2 has them all, at values that matter."""
    family, changes = CONFIGURATIONS["gemma2, tight caps"]
    folder = hugging_face_folder(tmp_path / "model", family, **changes)
    decoder, tokens = read_model(folder).decoder, random_tokens(97, 1, 40)
    decoder.config = dataclasses.replace(decoder.config, **{change: None})
    assert np.abs(logits_of(decoder, tokens) - torch_logits(load_torch(folder), tokens)).max() > 100 * TOLERANCE


def test_too_long_for_learned_positions_is_an_error(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model", "opt", max_position_embeddings=16)
    decoder = read_model(folder).decoder
    assert decoder(jnp.zeros((1, 16), jnp.int32)).shape == (1, 16, 97)
    with pytest.raises(InputError, match="sequences of 17 tokens are too long: the model has 16 learned positions"):
        decoder(jnp.zeros((1, 17), jnp.int32))


def test_stories260k_equals_transformers_before_and_after_pruning(tmp_path: Path) -> None:
    folder = shared("models/stories260K")
    tokens = random_tokens(512, 2, 300)
    assert difference(folder, tokens) <= TOLERANCE
    assert difference(pruned_folder(folder, tmp_path / "pruned", 0.2), tokens) <= TOLERANCE


def test_query_and_key_norms_change_the_result() -> None:
    """Needed by later families: present when the configuration asks for them, and used."""
    decoder = small_decoder(qk_norm=True)
    tokens = jnp.asarray(random_tokens(61, 1, 9))
    scale = decoder.runs[0].attention.q_norm.scale
    before = decoder(tokens)
    scale.set_value(2.0 * scale[...])
    assert not np.allclose(before, decoder(tokens), atol=1e-3)


def test_runs_of_unequal_layers_compute_as_one_run_does() -> None:
    """A run cut in two is the same model, bit for bit."""
    decoder = small_decoder(layers=4)
    whole = decoder.runs[0]
    cut = small_decoder(layers=4)
    first, second = (jax.tree.map(lambda a, part=part: a[part], whole) for part in (slice(0, 1), slice(1, 4)))
    cut.runs[0] = first
    cut.runs.append(second)
    tokens = jnp.asarray(random_tokens(61, 2, 11))
    assert jnp.array_equal(final_hidden(decoder, tokens), final_hidden(cut, tokens))


def test_scan_visits_layers_in_order_as_often_as_asked() -> None:
    decoder = small_decoder(layers=3)

    def step(carry: jax.Array, block: object, layer: jax.Array, extra: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry + 1, jnp.stack([carry, layer, extra])

    for visits in (1, 2, 3):
        carry, (out,) = scan_layers(decoder.runs, step, jnp.int32(0), [10 * jnp.arange(3, dtype=jnp.int32)], visits)
        expected = np.repeat(np.arange(3), visits)
        assert carry == 3 * visits
        np.testing.assert_array_equal(out, np.stack([np.arange(3 * visits), expected, 10 * expected], axis=1))


def test_bfloat16_weights_stay_bfloat16_and_logits_are_float32() -> None:
    decoder = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small_decoder())
    tokens = jnp.asarray(random_tokens(61, 1, 9))
    assert final_hidden(decoder, tokens).dtype == jnp.bfloat16
    logits = decoder(tokens)
    assert logits.dtype == jnp.float32
    exact = small_decoder()(tokens)
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_half_precision_scores_do_not_overflow() -> None:
    """Products of queries and keys stay float32 until the softmax."""
    q = jnp.full((1, 3, 2, 16), 100.0, jnp.float16)
    k = jnp.full((1, 3, 1, 16), 100.0, jnp.float16)
    mixed = ops.attend(q, k, jnp.ones_like(k), ops.causal_mask(3, None))
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
