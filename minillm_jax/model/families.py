"""The families as data: how the Hugging Face configuration of each becomes a `DecoderConfig` and `Sizes`.

A feature that the decoder lacks raises an `InputError` here, before any weight is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minillm_jax.errors import InputError
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.ops import ROPE_KINDS, Rope, alibi_slopes, rotary_frequencies

# Far above the sizes of every known model. A larger size is an error in the configuration, and the arrays made from it
# would exhaust the memory before anything else fails.
LARGEST_SIZE = 2**24
MOST_LAYERS = 10_000

# Prefix of the model type of a checkpoint with layers of unequal size: `pruned_opt`.
PRUNED = "pruned_"


@dataclass(frozen=True)
class Family:
    """How the configuration of a family is read.

    Attributes:
      read: configuration, its file (for errors) -> how the decoder computes.
      heads: key of the number of query heads.
      kv_heads: key of the number of key/value heads; None for a family with one key/value head per query head.
      width: key of the MLP width, which is four times the hidden size if the key is missing.
      layers: key of the number of layers.
      windows: the layers with `sliding_window`: `none`, `all`, or `layer_types` for the layers listed under that key.
    """

    read: Callable[[Mapping[str, Any], str], DecoderConfig]
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    width: str = "intermediate_size"
    layers: str = "num_hidden_layers"
    windows: str = "none"


def family_of(raw: Mapping[str, Any], where: str) -> str:
    """The base family of a configuration: `opt` for both `opt` and `pruned_opt`.

    Raises:
      InputError: the family is not supported.
    """
    family = raw.get("model_type")
    base = family.removeprefix(PRUNED) if isinstance(family, str) else ""
    if base not in FAMILIES:
        reason = f" ({NOT_SUPPORTED[base]})" if base in NOT_SUPPORTED else ""
        raise InputError(
            f"{where}: model_type {family!r}{reason} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    return base


def parse(raw: Mapping[str, Any], where: str) -> tuple[DecoderConfig, Sizes]:
    """Configuration and sizes of the decoder for a Hugging Face configuration.

    Args:
      raw: the configuration as a dictionary, completed by transformers (`rope_parameters`, defaults).
      where: the file of the configuration, for errors.

    Raises:
      InputError: the family or a feature of the configuration is not supported, or a value is out of its range.
    """
    family = family_of(raw, where)
    check_layer_count(raw, where)
    if raw.get("is_causal", True) is not True or raw.get("use_bidirectional_attention"):
        raise InputError(f"{where}: only causal models are supported, but the configuration sets another attention")
    try:
        config = FAMILIES[family].read(raw, where)
        sizes = _sizes(raw, config, where)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{where}: the configuration is incomplete or malformed ({error!r}); is it a {family}?"
        ) from error
    if config.rope is not None and not 0 < len(rotary_frequencies(config.rope, sizes.H)) <= sizes.H // 2:
        raise InputError(
            f"{where}: head_dim {sizes.H} with partial_rotary_factor {config.rope.fraction:g} gives no pairs of "
            "rotated features; head_dim must be even, and partial_rotary_factor large enough for one pair"
        )
    windowed = any(layer.window is not None for layer in sizes.layers)
    return replace(config, windowed=windowed, trained_length=_trained_length(raw, config.rope)), sizes


def _trained_length(raw: Mapping[str, Any], rope: Rope | None) -> int | None:
    """The positions of the configuration; linear scaling multiplies them, and `llama3` names the scaled number."""
    length = raw.get("max_position_embeddings")
    if rope is None or isinstance(length, bool) or not isinstance(length, int) or length < 1:
        return None
    return int(min(length * rope.factor, LARGEST_SIZE)) if rope.kind == "linear" else length


def check_layer_count(raw: Mapping[str, Any], where: str) -> None:
    """Checks the number of layers, before transformers completes the configuration with lists of that length.

    Raises:
      InputError: the number of layers is not a whole number in the allowed range.
    """
    for key in {"num_hidden_layers", FAMILIES[family_of(raw, where)].layers} & raw.keys():
        number = raw[key]
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= MOST_LAYERS:
            raise InputError(f"{where}: {key} must be a whole number from 1 to {MOST_LAYERS:,}, found {number!r}")


def _sizes(raw: Mapping[str, Any], config: DecoderConfig, where: str) -> Sizes:
    family = FAMILIES[config.family]
    checked = {key: raw[key] for key in ("vocab_size", "hidden_size", family.heads)}
    if config.position_offset is not None:
        checked["max_position_embeddings"] = raw["max_position_embeddings"]
    if config.embedding_projection:
        checked["word_embed_proj_dim"] = raw["word_embed_proj_dim"]
    for key, number in checked.items():
        _check_size(key, number, where)
    head_size = raw.get("head_dim") or raw["hidden_size"] // raw[family.heads]
    _check_size("head_dim", head_size, where)
    changes = _layer_changes(raw, family, where)
    windows = _windows(raw, family, where)
    layers = tuple(
        _layer_sizes({**raw, **changes.get(layer, {})}, config, window, where) for layer, window in enumerate(windows)
    )
    positions = 0 if config.position_offset is None else checked["max_position_embeddings"] + config.position_offset
    embedding_size = checked.get("word_embed_proj_dim")
    return Sizes(raw["vocab_size"], raw["hidden_size"], head_size, layers, embedding_size, positions)


def _layer_sizes(raw: Mapping[str, Any], config: DecoderConfig, window: int | None, where: str) -> LayerSizes:
    """The sizes of one layer, from the configuration updated with the values of that layer."""
    family = FAMILIES[config.family]
    # `per_layer_config` may use the usual key in families with another key for the number of heads.
    heads = _first_given(raw.get("num_attention_heads"), raw[family.heads])
    kv_heads = _first_given(raw.get(family.kv_heads), heads) if family.kv_heads else heads
    width = _first_given(raw.get(family.width), 4 * raw["hidden_size"])
    fewest = 0 if _is_pruned(raw) else 1  # a pruned layer may have lost a whole sublayer
    for key, number in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads), (family.width, width)):
        _check_size(key, number, where, fewest)
    if bool(heads) != bool(kv_heads) or heads % (kv_heads or 1):
        raise InputError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    slopes = () if config.alibi_heads is None else _slopes(raw, config.alibi_heads, heads, where)
    return LayerSizes(heads, kv_heads, width, window, slopes)


def _first_given(number: Any, default: Any) -> Any:
    """The number, or the default where it is None."""
    return default if number is None else number


def _slopes(raw: Mapping[str, Any], dense_heads: int, heads: int, where: str) -> tuple[float, ...]:
    """The ALiBi slopes of the heads of a layer; `alibi_heads` lists the kept heads of a pruned layer."""
    kept = raw["alibi_heads"] if "alibi_heads" in raw and _is_pruned(raw) else list(range(dense_heads))
    integers = isinstance(kept, list) and all(isinstance(head, int) and not isinstance(head, bool) for head in kept)
    if not integers or sorted(set(kept)) != kept or len(kept) != heads or not set(kept) <= set(range(dense_heads)):
        raise InputError(f"{where}: alibi_heads must be {heads} ascending numbers below {dense_heads}, found {kept!r}")
    return tuple(float(slope) for slope in alibi_slopes(dense_heads)[np.asarray(kept, int)])


def _is_pruned(raw: Mapping[str, Any]) -> bool:
    return str(raw["model_type"]).startswith(PRUNED)


def _layer_changes(raw: Mapping[str, Any], family: Family, where: str) -> dict[int, dict[str, Any]]:
    """The values of `per_layer_config`, by layer number; layers without changes are missing."""
    listed = raw.get("per_layer_config") or {}
    if listed and not _is_pruned(raw):
        raise InputError(f"{where}: per_layer_config is supported for model types {PRUNED}... only")
    try:
        changes = {int(layer): dict(values) for layer, values in listed.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: per_layer_config must map layer numbers to objects, found {listed!r}") from error
    allowed = {family.heads, "num_attention_heads", family.kv_heads, family.width, "alibi_heads"} - {None}
    for layer, values in changes.items():
        if not 0 <= layer < raw[family.layers]:
            raise InputError(f"{where}: per_layer_config names layer {layer}, but there are {raw[family.layers]}")
        for key in values.keys() - allowed:
            raise InputError(
                f"{where}: per_layer_config of layer {layer} sets {key!r}, which cannot differ between layers; "
                f"expected one of {', '.join(sorted(allowed))}"
            )
    return changes


def _windows(raw: Mapping[str, Any], family: Family, where: str) -> tuple[int | None, ...]:
    """The sliding window of every layer."""
    count = raw[family.layers]
    window = raw.get("sliding_window") if family.windows != "none" else None
    if window is not None:
        _check_size("sliding_window", window, where)
    if family.windows != "layer_types":
        return (window,) * count
    kinds = raw["layer_types"]
    if len(kinds) != count:
        raise InputError(f"{where}: layer_types has {len(kinds)} entries for {count} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(f"{where}: layer type {kind!r} is not supported")
        if kind == "sliding_attention" and window is None:
            raise InputError(f"{where}: layer_types has sliding attention, but sliding_window is not set")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# ------------------------------------------------------------------------------------------------------ families


def _llama(raw: Mapping[str, Any], where: str, partial_rope: bool = False) -> DecoderConfig:
    bias = bool(raw.get("attention_bias"))
    return DecoderConfig(
        family="llama",
        norm_epsilon=_positive(raw, "rms_norm_eps", where),
        rope=_rope(raw["rope_parameters"], where, partial_rope),
        activation=_activation(raw["hidden_act"], where),
        tie_embeddings=bool(raw["tie_word_embeddings"]),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias")),
    )


def _mistral(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    # transformers ignores the bias keys of a Mistral configuration.
    return replace(_llama(raw, where), family="mistral", qkv_bias=False, output_bias=False, mlp_bias=False)


def _qwen2(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_mistral(raw, where), family="qwen2", qkv_bias=True)


def _qwen3(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_llama(raw, where), family="qwen3", mlp_bias=False, qk_norm=True)


def _gemma(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    scale = _positive(raw, "embedding_scale", where) if _is_pruned(raw) and "embedding_scale" in raw else None
    return replace(
        _llama(raw, where),
        family="gemma",
        norm="rms_plus_one",
        mlp_bias=False,
        embedding_scale=scale or raw["hidden_size"] ** 0.5,
    )


def _gemma2(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(
        _gemma({**raw, "hidden_act": raw["hidden_activation"]}, where),
        family="gemma2",
        post_norms=True,
        query_scale=_positive(raw, "query_pre_attn_scalar", where) ** -0.5,
        attention_cap=_cap(raw, "attn_logit_softcapping", where),
        logit_cap=_cap(raw, "final_logit_softcapping", where),
    )


def _glm(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    llama = _llama(raw, where, partial_rope=True)
    assert llama.rope is not None, "_llama always sets rope"
    rope = replace(llama.rope, interleaved=True)
    return replace(llama, family="glm", rope=rope, output_bias=False, mlp_bias=False)


def _glm4(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_glm(raw, where), family="glm4", post_norms=True)


def _phi3(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    llama = _llama(raw, where, partial_rope=True)
    return replace(llama, family="phi3", qkv_bias=False, output_bias=False, mlp_bias=False)


def _opt(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    bias, before = bool(raw["enable_bias"]), bool(raw["do_layer_norm_before"])
    return DecoderConfig(
        family="opt",
        norm_epsilon=1e-5,
        rope=None,
        norm="layer",
        norm_scale=bool(raw["layer_norm_elementwise_affine"]),
        norm_bias=True,
        norm_after=not before,
        final_norm=before and not raw["_remove_final_layer_norm"],
        activation=_activation(raw["activation_function"], where),
        gated=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        position_offset=2,
        embedding_projection=raw["word_embed_proj_dim"] != raw["hidden_size"],
        tie_embeddings=bool(raw["tie_word_embeddings"]),
    )


def _bloom(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return DecoderConfig(
        family="bloom",
        norm_epsilon=_positive(raw, "layer_norm_epsilon", where),
        rope=None,
        norm="layer",
        norm_bias=True,
        residual_from_norm=bool(raw["apply_residual_connection_post_layernorm"]),
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        alibi_heads=raw["n_head"],
        embedding_norm=True,
        tie_embeddings=bool(raw["tie_word_embeddings"]),
    )


def _gpt_neox(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    bias = bool(raw["attention_bias"])
    return DecoderConfig(
        family="gpt_neox",
        norm_epsilon=_positive(raw, "layer_norm_eps", where),
        rope=_rope(raw["rope_parameters"], where, partial=True),
        norm="layer",
        norm_bias=True,
        parallel=bool(raw["use_parallel_residual"]),
        activation=_activation(raw["hidden_act"], where),
        gated=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        tie_embeddings=bool(raw["tie_word_embeddings"]),
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_mistral, windows="all"),
    "qwen2": Family(_qwen2, windows="layer_types"),
    "qwen3": Family(_qwen3, windows="layer_types"),
    "gemma": Family(_gemma),
    "gemma2": Family(_gemma2, windows="layer_types"),
    "opt": Family(_opt, kv_heads=None, width="ffn_dim"),
    "bloom": Family(_bloom, heads="n_head", kv_heads=None, layers="n_layer"),
    "gpt_neox": Family(_gpt_neox, kv_heads=None),
    "glm": Family(_glm),
    "glm4": Family(_glm4),
    "phi3": Family(_phi3, windows="all"),
}

# Well-known families that are not supported, and the reason.
NOT_SUPPORTED = {
    "mixtral": "mixture of experts",
    "qwen2_moe": "mixture of experts",
    "qwen3_moe": "mixture of experts",
    "olmoe": "mixture of experts",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "baichuan": "model code outside transformers",
    "chatglm": "model code outside transformers; convert it to glm or glm4 first",
}

# Name of an activation in transformers -> key of `ops.ACTIVATIONS`.
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise InputError(f"{where}: activation {name!r} is not supported; expected one of {known}")
    return ACTIVATION_NAMES[name]


def _positive(values: Mapping[str, Any], key: str, where: str) -> float:
    number = values[key]
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise InputError(f"{where}: {key} must be a positive number, found {number!r}")
    return float(number)


def _cap(values: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if values.get(key) is None else _positive(values, key, where)


def _check_size(key: str, number: Any, where: str, fewest: int = 1) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or not fewest <= number <= LARGEST_SIZE:
        raise InputError(f"{where}: {key} must be a whole number from {fewest} to {LARGEST_SIZE:,}, found {number!r}")


def _rope(parameters: Mapping[str, Any], where: str, partial: bool = False) -> Rope:
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise InputError(f"{where}: rope_type {kind!r} is not supported; expected one of {', '.join(ROPE_KINDS)}")
    fraction = _positive({"partial_rotary_factor": 1.0, **parameters}, "partial_rotary_factor", where)
    if fraction > 1 or (fraction < 1 and not partial):
        raise InputError(f"{where}: partial_rotary_factor {fraction:g} is not supported for this family")
    theta = _positive(parameters, "rope_theta", where)
    if kind == "default":
        return Rope(theta, fraction=fraction)
    factor = _positive(parameters, "factor", where)
    if kind == "linear":
        return Rope(theta, kind, factor, fraction=fraction)
    low, high = (_positive(parameters, key, where) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise InputError(f"{where}: low_freq_factor {low:g} must be smaller than high_freq_factor {high:g}")
    length = int(_positive(parameters, "original_max_position_embeddings", where))
    return Rope(theta, kind, factor, low, high, length, fraction)
