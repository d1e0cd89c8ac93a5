"""What a family is, as data; what is not supported raises here.

A `DecoderConfig` says how a decoder computes and which optional arrays it has, never how large it is: sizes are read
off the arrays, so slicing cannot make a configuration lie. `Sizes` exists only to build a decoder in the first place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minillm_jax.errors import InputError
from minillm_jax.layers import ACTIVATIONS, ROPE_KINDS, Rope

# No model is near it; a configuration that asks for more is broken, and would exhaust the memory before it is noticed.
LARGEST_SIZE = 2**24


@dataclass(frozen=True)
class DecoderConfig:
    """How a decoder computes. Hashable, so that it is part of what `jax.jit` keys on."""

    family: str
    norm_epsilon: float
    rope: Rope
    activation: str = "silu"
    sliding_window: int | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def has_array(self, path: str) -> bool:
        """Whether a decoder of this configuration has the (optional) array of that name in the table of axes."""
        match path.split("."):
            case ["head", _]:
                return not self.tie_embeddings
            case ["attention", "q" | "k" | "v", "bias"]:
                return self.qkv_bias
            case ["attention", "o", "bias"]:
                return self.output_bias
            case ["attention", "q_norm" | "k_norm", _]:
                return self.qk_norm
            case ["mlp", _, "bias"]:
                return self.mlp_bias
        return True


@dataclass(frozen=True)
class LayerSizes:
    """Sizes that may differ between layers: query heads, key/value heads, MLP width."""

    N: int
    K: int
    F: int


@dataclass(frozen=True)
class Sizes:
    """All sizes of a decoder: vocabulary, hidden size, head size, and those of each layer."""

    V: int
    D: int
    H: int
    layers: tuple[LayerSizes, ...]


def parse(raw: Mapping[str, Any], where: str) -> tuple[DecoderConfig, Sizes]:
    """Read a Hugging Face configuration, as transformers completes it (`rope_parameters`, defaults filled in).

    Args:
      raw: the configuration as a dictionary.
      where: the file it came from, named in errors.

    Raises:
      InputError: the family, or something the configuration asks for, is not supported.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"{where}: model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}")
    try:
        config = FAMILIES[family](raw, where)
        return config, _sizes(raw, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where}: the configuration is incomplete or malformed ({error!r}); is it a {family}?"
        ) from error


def _sizes(raw: Mapping[str, Any], where: str) -> Sizes:
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    head_size = raw.get("head_dim") or raw["hidden_size"] // heads
    named = {key: raw[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    named |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_size}
    for key, number in named.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= LARGEST_SIZE:
            raise InputError(f"{where}: {key} must be a whole number from 1 to {LARGEST_SIZE:,}, found {number!r}")
    if heads % kv_heads:
        raise InputError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_size % 2:
        raise InputError(f"{where}: head_dim must be even for rotary positions, found {head_size}")
    layer = LayerSizes(N=heads, K=kv_heads, F=raw["intermediate_size"])
    return Sizes(raw["vocab_size"], raw["hidden_size"], head_size, (layer,) * raw["num_hidden_layers"])


def _llama(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        norm_epsilon=_positive(raw, "rms_norm_eps", where),
        rope=_rope(raw["rope_parameters"], where),
        activation=_activation(raw["hidden_act"], where),
        tie_embeddings=bool(raw["tie_word_embeddings"]),
        qkv_bias=bool(raw.get("attention_bias")),
        output_bias=bool(raw.get("attention_bias")),
        mlp_bias=bool(raw.get("mlp_bias")),
    )


def _mistral(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_llama(raw, where), family="mistral", sliding_window=_window(raw["sliding_window"], where))


FAMILIES: dict[str, Callable[[Mapping[str, Any], str], DecoderConfig]] = {"llama": _llama, "mistral": _mistral}


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise InputError(f"{where}: activation {name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
    return name


def _positive(values: Mapping[str, Any], key: str, where: str) -> float:
    number = values[key]
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise InputError(f"{where}: {key} must be a positive number, found {number!r}")
    return float(number)


def _window(window: int | None, where: str) -> int | None:
    if window is not None and (not isinstance(window, int) or window < 1):
        raise InputError(f"{where}: sliding_window must be null or at least 1, found {window!r}")
    return window


def _rope(parameters: Mapping[str, Any], where: str) -> Rope:
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise InputError(f"{where}: rope_type {kind!r} is not supported; expected one of {', '.join(ROPE_KINDS)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"{where}: partial_rotary_factor {parameters['partial_rotary_factor']!r} is not supported")
    theta = _positive(parameters, "rope_theta", where)
    if kind == "default":
        return Rope(theta)
    factor = _positive(parameters, "factor", where)
    if kind == "linear":
        return Rope(theta, kind, factor)
    low, high = (_positive(parameters, key, where) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise InputError(f"{where}: low_freq_factor {low:g} must be smaller than high_freq_factor {high:g}")
    length = int(_positive(parameters, "original_max_position_embeddings", where))
    return Rope(theta, kind, factor, low, high, length)
