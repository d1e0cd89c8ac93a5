"""Values of a Hugging Face configuration, checked as they are read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minillm_jax.errors import InputError
from minillm_jax.model.ops import ROPE_KINDS, Rope

# Far above the sizes of every known model. A larger size is an error in the configuration, and the arrays made from it
# would exhaust the memory before anything else fails.
LARGEST_SIZE = 2**24
MOST_LAYERS = 10_000

# Prefix of the model type of a checkpoint with layers of unequal size: `pruned_opt`.
PRUNED = "pruned_"

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


def is_pruned(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a model with layers of unequal size."""
    return str(raw["model_type"]).startswith(PRUNED)


def activation(name: str, where: str) -> str:
    """The key of `ops.ACTIVATIONS` for an activation of transformers.

    Raises:
      InputError: the decoder lacks it.
    """
    if name not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise InputError(f"{where}: activation {name!r} is not supported; expected one of {known}")
    return ACTIVATION_NAMES[name]


def positive(values: Mapping[str, Any], key: str, where: str) -> float:
    """A positive number of the configuration.

    Raises:
      InputError: it is none.
    """
    number = values[key]
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise InputError(f"{where}: {key} must be a positive number, found {number!r}")
    return float(number)


def whole(values: Mapping[str, Any], key: str, where: str) -> int:
    """A positive whole number of the configuration.

    Raises:
      InputError: it is none, or too large.
    """
    check_size(key, values[key], where)
    return values[key]


def cap(values: Mapping[str, Any], key: str, where: str) -> float | None:
    """A positive number, or None where the configuration has none."""
    return None if values.get(key) is None else positive(values, key, where)


def check_size(key: str, number: Any, where: str, fewest: int = 1) -> None:
    """Check that a size is a whole number in the allowed range.

    Raises:
      InputError: it is not.
    """
    if not isinstance(number, int) or isinstance(number, bool) or not fewest <= number <= LARGEST_SIZE:
        raise InputError(f"{where}: {key} must be a whole number from {fewest} to {LARGEST_SIZE:,}, found {number!r}")


def read_rope(raw: Mapping[str, Any], where: str, partial: bool = False, layer_type: str | None = None) -> Rope:
    """The rotary positions of a configuration.

    Args:
      raw: the configuration.
      where: its file, for errors.
      partial: whether the family's class rotates a share of the features.
      layer_type: the type of layer, in families whose layers have rotary positions by their type.

    Raises:
      InputError: the kind is not supported, or a value is out of its range.
    """
    parameters = raw["rope_parameters"] if layer_type is None else raw["rope_parameters"][layer_type]
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise InputError(f"{where}: rope_type {kind!r} is not supported; expected one of {', '.join(ROPE_KINDS)}")
    fraction = positive({"partial_rotary_factor": 1.0, **parameters}, "partial_rotary_factor", where)
    if fraction > 1 or (fraction < 1 and not partial):
        raise InputError(f"{where}: partial_rotary_factor {fraction:g} is not supported for this family")
    rope = Rope(positive(parameters, "rope_theta", where), kind, fraction=fraction)
    match kind:
        case "linear":
            return replace(rope, factor=positive(parameters, "factor", where))
        case "dynamic":
            length = int(positive(raw, "max_position_embeddings", where))
            return replace(rope, factor=positive(parameters, "factor", where), original_length=length)
        case "llama3":
            return _llama3(rope, parameters, where)
        case "yarn":
            # transformers reads this key outside the settings of a layer type.
            return _yarn(rope, parameters, raw, where, bool(raw["rope_parameters"].get("truncate", True)))
        case "longrope":
            return _longrope(rope, parameters, raw, where)
    return rope


def _llama3(rope: Rope, parameters: Mapping[str, Any], where: str) -> Rope:
    low, high = (positive(parameters, key, where) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise InputError(f"{where}: low_freq_factor {low:g} must be smaller than high_freq_factor {high:g}")
    length = int(positive(parameters, "original_max_position_embeddings", where))
    factor = positive(parameters, "factor", where)
    return replace(rope, factor=factor, low_freq_factor=low, high_freq_factor=high, original_length=length)


def _extended(parameters: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> tuple[float, int]:
    """The factor by which the context was extended, and its length before."""
    length = int(positive(parameters, "original_max_position_embeddings", where))
    if parameters.get("factor") is not None:
        return positive(parameters, "factor", where), length
    return positive(raw, "max_position_embeddings", where) / length, length


def _yarn(rope: Rope, parameters: Mapping[str, Any], raw: Mapping[str, Any], where: str, truncate: bool) -> Rope:
    factor, length = _extended(parameters, raw, where)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = cap(parameters, "attention_factor", where)
    if attention is None and parameters.get("mscale") and parameters.get("mscale_all_dim"):
        weights = (positive(parameters, key, where) for key in ("mscale", "mscale_all_dim"))
        above, below = map(magnitude, weights)
        attention = above / below
    return replace(
        rope,
        factor=factor,
        original_length=length,
        attention_factor=magnitude(1.0) if attention is None else attention,
        beta_fast=positive({"beta_fast": parameters.get("beta_fast") or 32.0}, "beta_fast", where),
        beta_slow=positive({"beta_slow": parameters.get("beta_slow") or 1.0}, "beta_slow", where),
        truncate=truncate,
    )


def _longrope(rope: Rope, parameters: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Rope:
    factor, length = _extended(parameters, raw, where)
    attention = cap(parameters, "attention_factor", where)
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    short, long = (_factors(parameters[key], key, where) for key in ("short_factor", "long_factor"))
    if len(short) != len(long):
        raise InputError(
            f"{where}: short_factor has {len(short)} numbers and long_factor {len(long)}; expected as many"
        )
    return replace(
        rope,
        factor=factor,
        original_length=length,
        attention_factor=attention,
        short_factors=short,
        long_factors=long,
    )


def _factors(numbers: Sequence[Any], key: str, where: str) -> tuple[float, ...]:
    return tuple(positive({key: number}, key, where) for number in numbers)
