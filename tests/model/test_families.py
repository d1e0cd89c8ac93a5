"""Configurations of every family; an unsupported feature is an error that names it."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from convert.reader import read_model
from minillm_jax.errors import InputError
from minillm_jax.model.families import parse
from tests.helpers import SMALL, edit_json, hugging_face_folder


def raw(family: str, **changes: Any) -> dict[str, Any]:
    """A configuration completed by transformers, with changes."""
    return transformers.AutoConfig.for_model(family, **SMALL[family]).to_dict() | changes


@pytest.mark.parametrize("family", SMALL)
def test_small_configurations_are_read_with_their_sizes(family: str) -> None:
    config, sizes = parse(raw(family), "here")
    assert config.family == family
    assert (sizes.V, len(sizes.layers), sizes.E or sizes.D) == (97, 3, sizes.D)


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | changes}


def longrope(short: list[float], long: list[float]) -> dict[str, Any]:
    factors = {"short_factor": short, "long_factor": long}
    return rope(rope_type="longrope", original_max_position_embeddings=64, **factors)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "deepseek_v3"}, r"'deepseek_v3' \(multi-head latent attention\) is not supported"),
        ("llama", {"model_type": "pruned_mamba"}, "'pruned_mamba' is not supported"),
        ("llama", {"model_type": "gpt2"}, r"'gpt2' \(matrices stored transposed, .*\) is not supported"),
        ("llama", {"model_type": "falcon"}, r"'falcon' \(three layouts of fused queries, .*\) is not supported"),
        ("llama", {"model_type": "mpt"}, r"'mpt' \(clipped queries, keys and values, .*\) is not supported"),
        ("llama", {"model_type": "llama4"}, r"'llama4' \(mixture of experts, and attention in chunks\)"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is not supported in a phi model"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings is not supported in a phi model"),
        ("llama", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
        ("llama", rope(rope_type="proportional", factor=2.0), "rope_type 'proportional' is not supported"),
        ("llama", rope(rope_type="dynamic", factor=-1), "factor must be a positive number, found -1"),
        ("llama", rope(partial_rotary_factor=0.5), r"partial_rotary_factor 0\.5 is not supported for this family"),
        ("phi3", longrope([1.0] * 4, [2.0] * 3), "short_factor has 4 numbers and long_factor 3"),
        ("phi3", longrope([1.0] * 3, [2.0] * 3), "short_factor has 3 numbers, expected 4"),
        ("phi3", longrope([1.0, 0, 1.0, 1.0], [2.0] * 4), "short_factor must be a positive number, found 0"),
        ("glm", rope(partial_rotary_factor=1.5), r"partial_rotary_factor 1\.5 is not supported"),
        ("glm", rope(partial_rotary_factor=-1), "partial_rotary_factor must be a positive number, found -1"),
        ("llama", {"head_dim": 9}, "head_dim 9 with partial_rotary_factor 1 gives no pairs"),
        ("gpt_neox", rope(partial_rotary_factor=0.01), r"head_dim 16 with partial_rotary_factor 0\.01 gives no pairs"),
        ("llama", {"is_causal": False}, "only causal models are supported"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 10,000"),
        ("bloom", {"n_layer": 10_001}, "n_layer must be a whole number from 1 to 10,000, found 10001"),
        ("llama", {"per_layer_config": {"1": {"intermediate_size": 5}}}, r"model types pruned_\.\.\. only"),
        ("mistral", {"sliding_window": 2**31}, "sliding_window must be a whole number from 1 to"),
        ("gpt_neox", {"hidden_act": "relu6"}, "activation 'relu6' is not supported"),
        ("opt", {"activation_function": "tanh"}, "activation 'tanh' is not supported"),
        ("gemma", {"use_bidirectional_attention": True}, "only causal models are supported"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, r"attn_logit_softcapping must be a positive number, found -1\.0"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "layer type 'linear_attention' is not supported"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            "layer_types has sliding attention, but",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a whole number from 1 to .*, found 0"),
        ("bloom", {"n_head": 0}, "n_head must be a whole number from 1 to"),
        ("opt", {"ffn_dim": "wide"}, "ffn_dim must be a whole number from 1 to .*, found 'wide'"),
        ("opt", {"word_embed_proj_dim": -4}, "word_embed_proj_dim must be a whole number from 1"),
        ("opt", {"max_position_embeddings": None}, "max_position_embeddings must be a whole number from 1"),
        ("phi3", {"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
    ],
)
def test_an_unsupported_feature_is_an_error_that_names_it(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(raw(family, **changes), "here/config.json")
    assert "malformed" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("llama", ["no object"], "per_layer_config must map layer numbers to objects"),
        ("llama", {"one": {}}, "per_layer_config must map layer numbers to objects"),
        ("llama", {"0": 3}, "per_layer_config must map layer numbers to objects"),
        ("llama", {"3": {}}, "per_layer_config names layer 3, but there are 3"),
        ("llama", {"0": {"num_key_value_heads": 3}}, "8 is not a multiple of num_key_value_heads 3"),
        ("llama", {"0": {"intermediate_size": 1.5}}, r"intermediate_size must be a whole number .*found 1\.5"),
        ("bloom", {"0": {"alibi_heads": [0, 1]}}, r"alibi_heads must be 6 ascending numbers below 6, found \[0, 1\]"),
        ("bloom", {"0": {"n_head": 2, "alibi_heads": [3, 1]}}, "alibi_heads must be 2 ascending numbers below 6"),
        ("bloom", {"0": {"n_head": 1, "alibi_heads": [6]}}, "alibi_heads must be 1 ascending numbers below 6"),
        ("bloom", {"0": {"n_head": 2, "alibi_heads": ["a", 1]}}, "alibi_heads must be 2 ascending numbers"),
        ("bloom", {"0": {"n_head": 2, "alibi_heads": [0.0, 1.0]}}, "alibi_heads must be 2 ascending numbers"),
        ("bloom", {"0": {"n_head": 2, "alibi_heads": 7}}, "alibi_heads must be 2 ascending numbers"),
        ("bloom", {"0": {"n_head": 2, "alibi_heads": []}}, "alibi_heads must be 2 ascending numbers"),
        ("bloom", {"0": {"n_head": 2}}, "alibi_heads must be 2 ascending numbers"),
        ("llama", {"0": {"rms_norm_eps": 0.5}}, "per_layer_config of layer 0 sets 'rms_norm_eps', which cannot differ"),
    ],
)
def test_malformed_layer_changes_are_errors(tmp_path: Path, family: str, layers: Any, message: str) -> None:
    folder = hugging_face_folder(tmp_path / "model", family)
    heads = {"n_head": 6, "head_dim": 8} if family == "bloom" else {}
    edit_json(folder / "config.json", model_type=f"pruned_{family}", per_layer_config=layers, **heads)
    with pytest.raises(InputError, match=message) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)


def test_gemma_reads_the_same_activation_key_as_transformers() -> None:
    assert parse(raw("gemma", hidden_activation="relu"), "here")[0].activation == "gelu_tanh"
    assert parse(raw("gemma2", hidden_act="relu"), "here")[0].activation == "gelu_tanh"
    assert parse(raw("gemma2", hidden_activation="relu"), "here")[0].activation == "relu"


def test_embedding_scale_is_read_from_a_pruned_gemma_only() -> None:
    assert parse(raw("gemma", embedding_scale=3.0), "here")[0].embedding_scale == 8.0
    pruned = raw("gemma", embedding_scale=3.0, model_type="pruned_gemma")
    assert parse(pruned, "here")[0].embedding_scale == 3.0
    with pytest.raises(InputError, match=r"embedding_scale must be a positive number, found -1"):
        parse(pruned | {"embedding_scale": -1}, "here")
