"""Official layouts of models whose code stands outside transformers, read as families that the decoder knows.

A layout translates config.json, and has a rule table of its own for the stored tensors. Remote code is never run.

    baichuan    Baichuan 1 and 2: 7B is a Llama with a fused projection (`W_pack`); 13B has ALiBi
    chatglm     ChatGLM 2 and 3, GLM 4 in the layout of its first release: the family `glm`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax import numpy as jnp

from convert.families import OFFICIAL_BAICHUAN, OFFICIAL_CHATGLM, FamilyTable
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder

# Baichuan 2 divides each row of its head by the row's length; its vocabulary tells it from Baichuan 1, as in vLLM.
NORMED_HEAD_VOCABULARY = 125_696

# The base of the rotary frequencies in the code of both families.
THETA = 10_000.0


@dataclass(frozen=True)
class Layout:
    """How the official layout of a model type is read.

    Attributes:
      config: config.json, its file (for errors) -> the config.json of one of our families.
      table: rules of the stored tensors.
      about: what it is read as, for the page of families.
    """

    config: Callable[[Mapping[str, Any], str], dict[str, Any]]
    table: FamilyTable
    about: str


def layout_of(raw: Mapping[str, Any]) -> Layout | None:
    """The layout of a configuration; None for a model type of transformers."""
    model_type = raw.get("model_type")
    return LAYOUTS.get(model_type) if isinstance(model_type, str) else None


def finish(decoder: Decoder, raw: Mapping[str, Any]) -> Decoder:
    """The decoder with what the official code computes from its weights: the normed head of Baichuan 2.

    Args:
      decoder: read from the official layout.
      raw: the configuration in the official layout.
    """
    if raw["model_type"] == "baichuan" and raw["vocab_size"] == NORMED_HEAD_VOCABULARY and decoder.head is not None:
        decoder.head.kernel.set_value(_normed(decoder.head.kernel[...]))
    return decoder


@jax.jit
def _normed(kernel: jax.Array) -> jax.Array:
    """The head [E, V] with columns of length one."""
    wide = kernel.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(wide), axis=0, keepdims=True))
    return (wide / jnp.maximum(length, 1e-12)).astype(kernel.dtype)


def _baichuan(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    rotary = "max_position_embeddings" in raw
    keys = {**raw, "num_key_value_heads": raw["num_attention_heads"], "attention_bias": False, "mlp_bias": False}
    if rotary:
        return keys | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": THETA}
    return keys | {"max_position_embeddings": raw.get("model_max_length", 4096)}


# Settings of ChatGLM's code, and the values that the family `glm` has.
_GLM_SETTINGS = {
    "rmsnorm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "original_rope": True,
}


def _chatglm(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "num_layers" not in raw or "ffn_hidden_size" not in raw:
        raise InputError(f"{where}: the first ChatGLM (chatglm-6b) is not supported; give ChatGLM 2 or 3, or GLM 4")
    for key, value in _GLM_SETTINGS.items():
        if raw.get(key, value) != value:
            raise InputError(f"{where}: {key} must be {value} in a chatglm model, found {raw[key]!r}")
    ratio, scaling = float(raw.get("rope_ratio", 1)), {}
    # The code of chatglm2-6b-32k divides the positions by the ratio; later code multiplies the base.
    if ratio != 1 and "chatglm2" in str(raw.get("_name_or_path")):
        ratio, scaling = 1.0, {"rope_scaling": {"type": "linear", "factor": ratio}}
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "tie_word_embeddings")
    return {key: raw[key] for key in kept if key in raw} | {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "vocab_size": raw["padded_vocab_size"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["ffn_hidden_size"],
        "num_hidden_layers": raw["num_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "num_key_value_heads": raw["multi_query_group_num"],
        "head_dim": raw["kv_channels"],
        "hidden_act": "silu",
        "rms_norm_eps": raw["layernorm_epsilon"],
        "max_position_embeddings": raw["seq_length"],
        "attention_bias": bool(raw.get("add_qkv_bias", False)),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "partial_rotary_factor": 0.5,
        "rope_theta": THETA * ratio,
        **scaling,
    }


LAYOUTS = {
    "baichuan": Layout(
        _baichuan, OFFICIAL_BAICHUAN, "`llama` (7B); `baichuan` with ALiBi (13B), whose output is always per-layer"
    ),
    "chatglm": Layout(_chatglm, OFFICIAL_CHATGLM, "`glm`: ChatGLM 2 and 3, GLM 4 in the layout of its first release"),
}
