"""A Hugging Face configuration of any family becomes a `DecoderConfig` and `Sizes`.

A feature that the decoder lacks raises an `InputError` here, before any weight is read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minillm_jax.errors import InputError
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.config_values import LARGEST_SIZE, MOST_LAYERS, PRUNED, check_size, is_pruned
from minillm_jax.model.family_configs import FAMILIES, NOT_SUPPORTED, SHARED_EXPERTS, SHARED_WIDTH, Family
from minillm_jax.model.ops import Rope, alibi_slopes, rotary_frequencies


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
    if config.rope is not None:
        _check_rope(config.rope, sizes.H, where)
    windowed = any(layer.window is not None for layer in sizes.layers)
    return replace(config, windowed=windowed, trained_length=_trained_length(raw, config.rope)), sizes


def _check_rope(rope: Rope, head_size: int, where: str) -> None:
    """Check the rotary positions against the head size, which the numbers of their settings must fit."""
    pairs = len(rotary_frequencies(replace(rope, kind="default"), head_size))
    if not 0 < pairs <= head_size // 2:
        raise InputError(
            f"{where}: head_dim {head_size} with partial_rotary_factor {rope.fraction:g} gives no pairs of "
            "rotated features; head_dim must be even, and partial_rotary_factor large enough for one pair"
        )
    if rope.kind == "longrope" and len(rope.short_factors) != pairs:
        raise InputError(
            f"{where}: short_factor has {len(rope.short_factors)} numbers, expected {pairs}: one for each pair of "
            "rotated features"
        )
    if rope.kind == "dynamic" and pairs < 2:
        raise InputError(
            f"{where}: rope_type 'dynamic' needs two pairs of rotated features, but head_dim gives {pairs}"
        )


def _trained_length(raw: Mapping[str, Any], rope: Rope | None) -> int | None:
    """The positions of the configuration; some scalings multiply them, others name the scaled number."""
    length = raw.get("max_position_embeddings")
    if rope is None or isinstance(length, bool) or not isinstance(length, int) or length < 1:
        return None
    if rope.kind in ("linear", "dynamic"):
        length *= rope.factor
    elif rope.kind == "yarn":
        length = max(length, rope.original_length * rope.factor)
    return int(min(length, LARGEST_SIZE))


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
        check_size(key, number, where)
    head_size = raw.get("head_dim") or raw["hidden_size"] // raw[family.heads]
    check_size("head_dim", head_size, where)
    changes, ropes = _layer_changes(raw, family, where), _ropes(raw, family, config, where)
    dense = _dense_layers(raw, family, raw[family.layers])
    layers = []
    for layer, window in enumerate(_windows(raw, family, where)):
        of_layer = {**raw, **changes.get(layer, {})}
        experts = {} if dense[layer] else _experts(of_layer, family, config, where)
        layers.append(replace(_layer_sizes(of_layer, config, window, where), rope=ropes[layer], **experts))
    positions = 0 if config.position_offset is None else checked["max_position_embeddings"] + config.position_offset
    embedding_size = checked.get("word_embed_proj_dim")
    return Sizes(raw["vocab_size"], raw["hidden_size"], head_size, tuple(layers), embedding_size, positions)


def _layer_sizes(raw: Mapping[str, Any], config: DecoderConfig, window: int | None, where: str) -> LayerSizes:
    """The sizes of one layer, from the configuration updated with the values of that layer."""
    family = FAMILIES[config.family]
    # `per_layer_config` may use the usual key in families with another key for the number of heads.
    heads = _first_given(raw.get("num_attention_heads"), raw[family.heads])
    kv_heads = _first_given(raw.get(family.kv_heads), heads) if family.kv_heads else heads
    width = _first_given(raw.get(family.width), 4 * raw["hidden_size"])
    fewest = 0 if is_pruned(raw) else 1  # a pruned layer may have lost a whole sublayer
    for key, number in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads), (family.width, width)):
        check_size(key, number, where, fewest)
    if bool(heads) != bool(kv_heads) or heads % (kv_heads or 1):
        raise InputError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    slopes = () if config.alibi_heads is None else _slopes(raw, config.alibi_heads, heads, where)
    return LayerSizes(heads, kv_heads, width, window, slopes)


def _experts(raw: Mapping[str, Any], family: Family, config: DecoderConfig, where: str) -> dict[str, int]:
    """The number and width of the experts of a layer, and the width of its shared expert; nothing without experts.

    Args:
      raw: the configuration, updated with the values of the layer.
      family: how it is read.
      config: how the decoder computes.
      where: the file of the configuration, for errors.

    Raises:
      InputError: a number is out of its range, or a token would choose more experts than there are.
    """
    if config.routing is None:
        return {}
    key, multiple = family.experts[0], family.shared == SHARED_EXPERTS and not (is_pruned(raw) and SHARED_WIDTH in raw)
    shared = SHARED_WIDTH if family.shared is not None and not multiple else family.shared
    sizes = {"X": raw[key], "W": raw[family.expert_width], "F": 0 if shared is None else raw[shared]}
    check_size(key, sizes["X"], where)
    check_size(family.expert_width, sizes["W"], where)
    check_size(str(shared), sizes["F"], where, fewest=0)
    if multiple:
        sizes["F"] *= sizes["W"]
    if config.routing.chosen > sizes["X"]:
        raise InputError(f"{where}: num_experts_per_tok {config.routing.chosen} is larger than {key} {sizes['X']}")
    if sizes["X"] % config.routing.groups:
        raise InputError(
            f"{where}: {key} {sizes['X']} of a layer must be a multiple of n_group {config.routing.groups}"
        )
    return sizes


def _dense_layers(raw: Mapping[str, Any], family: Family, count: int) -> list[bool]:
    """Whether a layer has no experts, of every layer of a model with experts."""
    match family.dense_layers:
        case "first_k_dense_replace":
            return [layer < raw["first_k_dense_replace"] for layer in range(count)]
        case "mlp_only_layers":
            listed, step = raw.get("mlp_only_layers") or [], raw.get("decoder_sparse_step") or 1
            return [layer in listed or (layer + 1) % step != 0 for layer in range(count)]
    return [False] * count


def _first_given(number: Any, default: Any) -> Any:
    """The number, or the default where it is None."""
    return default if number is None else number


def _slopes(raw: Mapping[str, Any], dense_heads: int, heads: int, where: str) -> tuple[float, ...]:
    """The ALiBi slopes of the heads of a layer; `alibi_heads` lists the kept heads of a pruned layer."""
    kept = raw["alibi_heads"] if "alibi_heads" in raw and is_pruned(raw) else list(range(dense_heads))
    integers = isinstance(kept, list) and all(isinstance(head, int) and not isinstance(head, bool) for head in kept)
    if not integers or sorted(set(kept)) != kept or len(kept) != heads or not set(kept) <= set(range(dense_heads)):
        raise InputError(f"{where}: alibi_heads must be {heads} ascending numbers below {dense_heads}, found {kept!r}")
    return tuple(float(slope) for slope in alibi_slopes(dense_heads)[np.asarray(kept, int)])


def _layer_changes(raw: Mapping[str, Any], family: Family, where: str) -> dict[int, dict[str, Any]]:
    """The values of `per_layer_config`, by layer number; layers without changes are missing."""
    listed = raw.get("per_layer_config") or {}
    if listed and not is_pruned(raw):
        raise InputError(f"{where}: per_layer_config is supported for model types {PRUNED}... only")
    try:
        changes = {int(layer): dict(values) for layer, values in listed.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: per_layer_config must map layer numbers to objects, found {listed!r}") from error
    allowed = {family.heads, "num_attention_heads", family.kv_heads, family.width, "alibi_heads"} - {None}
    if family.experts:
        allowed |= {family.experts[0], family.expert_width} | ({SHARED_WIDTH} if family.shared else set())
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
    window = raw.get("sliding_window") if family.windows != "none" and raw.get("use_sliding_window", True) else None
    if window is not None:
        check_size("sliding_window", window, where)
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


def _ropes(raw: Mapping[str, Any], family: Family, config: DecoderConfig, where: str) -> tuple[int, ...]:
    """Of every layer, which of the decoder's two kinds of rotary positions it has."""
    count = raw[family.layers]
    if config.other_rope is None:
        return (0,) * count
    if family.other_rope != "no_rope_layers":
        return tuple(int(kind == family.other_rope) for kind in raw["layer_types"])
    rotated = raw["no_rope_layers"]
    if len(rotated) < count:
        raise InputError(f"{where}: no_rope_layers has {len(rotated)} entries for {count} layers")
    return tuple(int(not one) for one in rotated[:count])
