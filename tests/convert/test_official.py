"""Official layouts of models whose code stands outside transformers: Baichuan 7B and 13B, ChatGLM."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.errors import InputError
from minillm_jax.evaluation.generate import generate
from minillm_jax.model.loaded import Model
from minillm_jax.pruning.slicing import slice_groups
from tests.helpers import (
    arrays_equal,
    edit_json,
    hugging_face_folder,
    load_stock,
    load_torch,
    logits_of,
    random_tokens,
    torch_logits,
)

TOKENS = random_tokens(97, 2, 40)
HEADS = 6
BAICHUAN = {
    "model_type": "baichuan",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
}
ROTARY, ALIBI = {"max_position_embeddings": 512}, {"model_max_length": 256}


def write_official(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def baichuan(path: Path, positions: dict[str, int], vocabulary: int = 97) -> tuple[Path, Path]:
    """A Baichuan in its official layout, and the Llama with the same tensors."""
    sizes = {key: BAICHUAN[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")}
    sizes |= {"num_key_value_heads": HEADS, "vocab_size": vocabulary, "head_dim": 8}
    llama = hugging_face_folder(path / "llama", "llama", **sizes)
    tensors = load_file(llama / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{prefix}{name}_proj.weight") for name in "qkv"]
        tensors[f"{prefix}W_pack.weight"] = torch.cat(parts)
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.ones(4)
    return write_official(path / "baichuan", BAICHUAN | positions | {"vocab_size": vocabulary}, tensors), llama


def fewer(model: Model, counts: tuple[int, ...] = (5, 2, 4)) -> Model:
    """The model with random heads and channels of every layer."""
    rng = np.random.default_rng(0)
    heads = [np.sort(rng.choice(HEADS, count, replace=False)) for count in counts]
    channels = [np.sort(rng.choice(40, 6 * count, replace=False)) for count in counts]
    return dataclasses.replace(model, decoder=slice_groups(model.decoder, {"head": heads, "channel": channels}))


def test_baichuan_7b_is_a_llama(tmp_path: Path) -> None:
    official, llama = baichuan(tmp_path, ROTARY)
    model = read_model(official)
    assert arrays_equal(model.decoder, read_model(llama).decoder)
    assert np.abs(logits_of(model.decoder, TOKENS) - torch_logits(load_torch(llama), TOKENS)).max() <= 1e-4
    assert write_model(model, tmp_path / "out").format == "stock"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    written, tensors = (load_file(path / "model.safetensors") for path in (tmp_path / "out", llama))
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    load_stock(tmp_path / "out")
    smaller = fewer(model)
    write_model(smaller, tmp_path / "pruned")
    assert (
        np.abs(logits_of(smaller.decoder, TOKENS) - torch_logits(load_torch(tmp_path / "pruned"), TOKENS)).max() <= 1e-4
    )


def test_the_head_of_baichuan_2_is_normed(tmp_path: Path) -> None:
    """Its vocabulary of 125,696 tells it from Baichuan 1."""
    official, llama = baichuan(tmp_path, ROTARY, 125_696)
    head = load_file(llama / "model.safetensors")["lm_head.weight"]
    found = read_model(official).decoder.head
    assert found is not None
    np.testing.assert_allclose(found.kernel[...].T, functional.normalize(head), atol=1e-6)


def by_hand(tensors: dict[str, torch.Tensor], tokens: np.ndarray) -> np.ndarray:
    """The logits of a Baichuan with ALiBi, computed as its official code does."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * tensors[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ tensors[f"{name}.weight"].T

    # Six heads: the slopes of four, then every second one of eight.
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    length = tokens.shape[1]
    places = torch.arange(length)
    bias = slopes[:, None, None] * places[None, None, :]
    bias = bias.masked_fill(places[None, :] > places[:, None], float("-inf"))
    x = tensors["model.embed_tokens.weight"][torch.from_numpy(tokens.astype(np.int64))]
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        packed = linear(norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attn.W_pack")
        q, k, v = packed.unflatten(-1, (3, HEADS, 8)).unbind(-3)
        scores = torch.einsum("btnh,bsnh->bnts", q, k) / 8**0.5 + bias
        mixed = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), v).flatten(-2)
        x = x + linear(mixed, f"{prefix}.self_attn.o_proj")
        h = norm(x, f"{prefix}.post_attention_layernorm")
        wide = functional.silu(linear(h, f"{prefix}.mlp.gate_proj")) * linear(h, f"{prefix}.mlp.up_proj")
        x = x + linear(wide, f"{prefix}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head").numpy()


def generated(model: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    options |= {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, max_new_tokens=12, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("change", [None, fewer, lambda model: fewer(model, (0, 3, 6))])
def test_baichuan_13b_has_alibi_and_is_written_per_layer(
    tmp_path: Path, change: Callable[[Model], Model] | None
) -> None:
    """Dense; with fewer heads; and without the first attention sublayer."""
    official, _ = baichuan(tmp_path, ALIBI)
    model = read_model(official)
    tensors = load_file(official / "model.safetensors")
    assert np.abs(logits_of(model.decoder, TOKENS) - by_hand(tensors, TOKENS)).max() <= 1e-4
    model = model if change is None else change(model)
    expected = logits_of(model.decoder, TOKENS)
    assert write_model(model, tmp_path / "out").format == "per-layer"
    assert arrays_equal(read_model(tmp_path / "out").decoder, model.decoder)
    by_torch = load_torch(tmp_path / "out")
    for implementation in ("sdpa", "eager"):
        by_torch.set_attn_implementation(implementation)
        assert np.abs(torch_logits(by_torch, TOKENS) - expected).max() <= 1e-4
    prompt = TOKENS[0, :20].tolist()
    (found,) = generate(model.decoder, [prompt], 12)
    assert found == generated(by_torch, prompt) == generated(by_torch, prompt, cache_implementation="static")
    for refused in ("stock", "padded"):
        with pytest.raises(InputError, match="transformers has no class for Baichuan"):
            write_model(model, tmp_path / refused, refused)
    write_model(model, tmp_path / "flax", "flax")
    assert arrays_equal(read_model(tmp_path / "flax").decoder, model.decoder)


CHATGLM = {
    "model_type": "chatglm",
    "num_layers": 3,
    "padded_vocab_size": 97,
    "hidden_size": 64,
    "ffn_hidden_size": 40,
    "kv_channels": 12,
    "num_attention_heads": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 256,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Names in the official layout -> names of the family `glm`.
CHATGLM_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def chatglm(path: Path, **changes: Any) -> tuple[Path, Path]:
    """A ChatGLM in its official layout, and the GLM with the same tensors."""
    sizes = {"num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-5, "max_position_embeddings": 256}
    glm = hugging_face_folder(path / "glm", "glm", attention_bias=True, partial_rotary_factor=0.5, **sizes)
    tensors = load_file(glm / "model.safetensors")
    official = {"transformer.rotary_pos_emb.inv_freq": torch.ones(3)}
    for theirs, ours in CHATGLM_NAMES.items():
        if ours in ("model.embed_tokens", "model.norm", "lm_head"):
            official[f"{theirs}.weight"] = tensors[f"{ours}.weight"]
            continue
        for layer in range(3):
            official[f"transformer.encoder.layers.{layer}.{theirs}.weight"] = tensors[
                f"model.layers.{layer}.{ours}.weight"
            ]
    for layer in range(3):
        for part in ("weight", "bias"):
            fused = torch.cat([tensors[f"model.layers.{layer}.self_attn.{name}_proj.{part}"] for name in "qkv"])
            official[f"transformer.encoder.layers.{layer}.self_attention.query_key_value.{part}"] = fused
    return write_official(path / "chatglm", CHATGLM | changes, official), glm


def test_chatglm_is_a_glm(tmp_path: Path) -> None:
    official, glm = chatglm(tmp_path)
    model, expected = read_model(official), read_model(glm)
    assert arrays_equal(model.decoder, expected.decoder)
    assert model.decoder.config == expected.decoder.config
    assert np.abs(logits_of(model.decoder, TOKENS) - torch_logits(load_torch(glm), TOKENS)).max() <= 1e-4
    assert write_model(model, tmp_path / "out").format == "stock"
    assert np.abs(torch_logits(load_stock(tmp_path / "out"), TOKENS) - logits_of(model.decoder, TOKENS)).max() <= 1e-4
    written, tensors = (load_file(path / "model.safetensors") for path in (tmp_path / "out", glm))
    assert all(torch.equal(written[name], tensors[name]) for name in tensors | written)


def test_longer_contexts_of_chatglm_scale_the_base_or_the_positions(tmp_path: Path) -> None:
    official, _ = chatglm(tmp_path, rope_ratio=50)
    rope = read_model(official).decoder.config.rope
    assert rope is not None
    assert (rope.kind, rope.theta) == ("default", 500_000.0)
    edit_json(official / "config.json", _name_or_path="THUDM/chatglm2-6b-32k", rope_ratio=16)
    rope = read_model(official).decoder.config.rope
    assert rope is not None
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 10_000.0, 16.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, r"the first ChatGLM \(chatglm-6b\) is not supported"),
        ({"rmsnorm": False}, "rmsnorm must be True in a chatglm model, found False"),
        ({"multi_query_attention": False}, "multi_query_attention must be True"),
        ({"kv_channels": None}, "the configuration lacks kv_channels"),
        ({"hidden_size": 60}, r"has shape \(97, 64\), but the configuration expects \(97, 60\)"),
    ],
)
def test_other_kinds_of_chatglm_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    official, _ = chatglm(tmp_path)
    edit_json(official / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        read_model(official)
