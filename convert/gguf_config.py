"""The metadata of a GGUF file → config.json; an architecture or a setting that is not supported is refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from convert import formats, gguf_experts
from convert.families import TABLES
from convert.gguf_file import GgufFile
from convert.gguf_names import ARCHS, DECI, LAYER_KEYS, LLAMA, MIXTRAL, Arch
from convert.gguf_tensors import decode, stored_type
from minillm_jax.errors import InputError
from minillm_jax.model.families import MOST_LAYERS, PRUNED
from minillm_jax.model.ops import Rope, rotary_frequencies

# The tensor by which llama.cpp divides the frequencies of Llama 3.
ROPE_FACTORS = "rope_freqs.weight"

# Our own key: the parameters of the scaling that ROPE_FACTORS was computed with, as JSON.
ROPE_PARAMETERS = "minillm_jax.rope_parameters"

# The layers of Gemma 2's model of 27 billion parameters, by which llama.cpp knows it and scales its queries otherwise.
GEMMA2_27B_LAYERS = 46

# Key of config.json -> key of the metadata.
TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def arch_of(file: GgufFile) -> Arch:
    """The architecture of a file.

    Raises:
      InputError: it is not supported, or the file holds no language model.
    """
    if file.arch not in ARCHS:
        raise InputError(
            f"{file.path}: the GGUF architecture {file.arch!r} is not supported; expected one of {', '.join(ARCHS)}"
        )
    arch = ARCHS[file.arch]
    return MIXTRAL if arch is LLAMA and file.value("expert_count") else arch


def layer_count(file: GgufFile) -> int:
    """Number of layers, without those behind the last one that predict further tokens (GLM 4.5).

    Raises:
      InputError: the metadata do not say, or say a number out of the range.
    """
    count = _needed(file, "block_count")
    further = file.value("nextn_predict_layers", 0)
    if isinstance(count, int) and isinstance(further, int):
        count -= further
    if not isinstance(count, int) or not 0 < count <= MOST_LAYERS:
        raise InputError(f"{file.path}: {file.arch}.block_count must be from 1 to {MOST_LAYERS:,}, found {count!r}")
    return count


def head_size(file: GgufFile) -> int:
    """Head size, the same for queries, keys and values.

    Raises:
      InputError: it is not the same.
    """
    heads = max(_per_layer(file, "attention.head_count"))
    default = _needed(file, "embedding_length") // max(heads, 1)
    size, values = (file.value(f"attention.{kind}_length", default) for kind in ("key", "value"))
    if size != values or not isinstance(size, int) or size < 2:
        raise InputError(f"{file.path}: keys of {size!r} and values of {values!r} features are not supported")
    return size


def to_hugging_face(file: GgufFile) -> dict[str, Any]:
    """config.json of the model in a GGUF file.

    Raises:
      InputError: the architecture or one of its settings is not supported, or a key is missing.
    """
    arch = arch_of(file)
    embedding = file.entries.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{file.path}: tensor 'token_embd.weight' is missing; the file holds no whole language model")
    raw: dict[str, Any] = {
        ours: _plain(file.value(key)) for key, ours in arch.keys.items() if file.value(key) is not None
    }
    raw |= {"vocab_size": embedding.shape[0], "head_dim": head_size(file), "num_hidden_layers": layer_count(file)}
    raw |= {"tie_word_embeddings": "output.weight" not in file.entries, "dtype": stored_type(file)}
    raw |= {key: file.metadata.get(name) for key, name in TOKEN_IDS.items()}
    raw |= formats.rope_keys(_rope(file, raw["head_dim"]), arch.family)
    sizes = {ours: _per_layer(file, key) for key, ours in LAYER_KEYS.items()}
    raw |= {ours: max(counts) for ours, counts in sizes.items()}
    raw |= _family_keys(file, arch, raw)
    unequal = any(len(set(counts)) > 1 for counts in sizes.values())
    if unequal and arch is not DECI:
        raise InputError(f"{file.path}: layers of unequal size are supported for the architecture deci only")
    return _with_model_type(file, raw, arch, sizes, unequal)


def _with_model_type(
    file: GgufFile, raw: dict[str, Any], arch: Arch, sizes: Mapping[str, list[int]], unequal: bool
) -> dict[str, Any]:
    """The configuration with its model type; a Llama may need the class of Mistral, or layers of unequal size."""
    family = arch.family
    biased = raw.get("attention_bias") or raw.get("mlp_bias")
    if family == "llama" and not biased:
        divides = raw["hidden_size"] % raw["num_attention_heads"] == 0
        window = file.value("attention.sliding_window") or None
        family = "llama" if divides and window is None else "mistral"
        raw |= {"sliding_window": window} if family == "mistral" else {}
    refused = family == "llama" and raw["hidden_size"] % raw["num_attention_heads"]
    if not unequal and not refused:
        return raw | {"model_type": family, "architectures": [f"{TABLES[family].stem}ForCausalLM"]}
    changes = {
        str(layer): {key: counts[layer] for key, counts in sizes.items() if counts[layer] != raw[key]}
        for layer in range(raw["num_hidden_layers"])
    }
    per_layer = {layer: values for layer, values in changes.items() if values}
    stem = TABLES[family].stem
    return raw | {
        "model_type": PRUNED + family,
        "architectures": [f"Pruned{stem}ForCausalLM"],
        "per_layer_config": per_layer,
    }


def _family_keys(file: GgufFile, arch: Arch, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that only some families have."""
    has = {name: f"blk.0.{name}.bias" in file.entries for name in ("attn_q", "attn_output", "ffn_down")}
    activation = {"hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(arch.activations[0], arch.activations[0])}
    match arch.family:
        case "llama":
            return activation | {"attention_bias": has["attn_q"] or has["attn_output"], "mlp_bias": has["ffn_down"]}
        case "qwen2" | "qwen3":
            layers = ["full_attention"] * raw["num_hidden_layers"]
            return activation | {"use_sliding_window": False, "sliding_window": None, "layer_types": layers}
        case "qwen2_moe" | "qwen3_moe":
            layers = ["full_attention"] * raw["num_hidden_layers"]
            plain = {"use_sliding_window": False, "sliding_window": None, "layer_types": layers}
            biases = {"attention_bias": False} if arch.family == "qwen3_moe" else {"qkv_bias": has["attn_q"]}
            return activation | plain | biases | gguf_experts.config_keys(file, arch)
        case "mixtral" | "olmoe":
            window = {"sliding_window": file.value("attention.sliding_window") or None}
            return activation | (window if arch is MIXTRAL else {}) | gguf_experts.config_keys(file, arch)
        case "glm4_moe":
            return activation | {"attention_bias": has["attn_q"]} | gguf_experts.config_keys(file, arch)
        case "gemma":
            return activation
        case "gemma2":
            scale = raw["head_dim"]
            if raw["num_hidden_layers"] == GEMMA2_27B_LAYERS:
                scale = raw["hidden_size"] // raw["num_attention_heads"]
            kinds = ("sliding_attention", "full_attention")
            return {
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "sliding_window": 4096,
                **{key: raw[key] for key in arch.keys.values() if key in raw},
                "hidden_activation": activation["hidden_act"],
                "query_pre_attn_scalar": scale,
                "layer_types": [kinds[layer % 2] for layer in range(raw["num_hidden_layers"])],
            }
        case "phi3":
            window = file.value("attention.sliding_window") or None
            return activation | {
                "sliding_window": window,
                "original_max_position_embeddings": raw["max_position_embeddings"],
            }
    return activation | {"attention_bias": True}


def _rope(file: GgufFile, size: int) -> Rope:
    """The rotary positions of a file."""
    theta = float(_plain(file.value("rope.freq_base", 10000.0)))
    rotated = file.value("rope.dimension_count", size)
    fraction = rotated / size
    if int(size * fraction) < rotated:  # the division has rounded down
        fraction = math.nextafter(fraction, 2.0)
    rope, kind = Rope(theta, fraction=fraction), file.value("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise InputError(
            f"{file.path}: the scaling {kind!r} of rotary positions is not supported; expected none or linear"
        )
    factor = float(_plain(file.value("rope.scaling.factor", file.value("rope.scale_linear", 1.0))))
    if kind == "linear" and factor not in (0.0, 1.0):
        rope = replace(rope, kind="linear", factor=factor)
    return _llama3(file, rope, size) if ROPE_FACTORS in file.entries else rope


def _llama3(file: GgufFile, rope: Rope, size: int) -> Rope:
    """The scaling of Llama 3, whose parameters GGUF does not store: those that give the factors of the file."""
    factors = decode(file.entries[ROPE_FACTORS]).astype(np.float64).reshape(-1)
    lengths = (8192, file.value("context_length"))
    guesses = [replace(rope, kind="llama3", factor=float(factors.max()), original_length=length) for length in lengths]
    try:
        stored = json.loads(file.metadata.get(ROPE_PARAMETERS, "null"))
        guesses = guesses if stored is None else [replace(rope, kind="llama3", **stored), *guesses]
    except (TypeError, ValueError):
        pass  # the key of another program; the factors decide
    for guess in guesses:
        expected = rope_factors(guess, size)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-4):
            return guess
    raise InputError(
        f"{file.path}: the factors of rotary positions ({ROPE_FACTORS}) are not those of Llama 3; give the Hugging "
        "Face folder of the model"
    )


def rope_factors(rope: Rope, size: int) -> np.ndarray:
    """The factors by which llama.cpp divides the rotary frequencies, float32 [half]."""
    plain = replace(rope, kind="default")
    return (rotary_frequencies(plain, size).astype(np.float64) / rotary_frequencies(rope, size)).astype(np.float32)


def _needed(file: GgufFile, key: str) -> Any:
    value = file.value(key)
    if value is None:
        raise InputError(f"{file.path}: the key {file.arch}.{key} is missing; the file is damaged or was cut down")
    return value


def _per_layer(file: GgufFile, key: str) -> list[int]:
    """A size of every layer."""
    layers = layer_count(file)
    value = file.value(key, file.value("attention.head_count")) if key.endswith("_kv") else _needed(file, key)
    counts = value if isinstance(value, list) else [value] * layers
    if len(counts) != layers or not all(isinstance(count, int) for count in counts):
        raise InputError(f"{file.path}: {file.arch}.{key} must be a whole number, or {layers} of them, found {value!r}")
    if min(counts) < 1:
        what = "MLP" if key.startswith("feed") else "attention"
        raise InputError(
            f"{file.path}: layer {counts.index(min(counts))} has no {what}, and layers without one are not supported"
        )
    return counts


def _plain(value: Any) -> Any:
    """A number; a float32 as the shortest decimal number that it stands for: 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
