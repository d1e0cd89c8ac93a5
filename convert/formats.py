"""Which format holds a decoder's shapes, and its config.json: from shapes alone, nothing is read or written here.

stock       the family's own class, no remote code
per-layer   layers of unequal size, or shapes the stock class refuses: `per_layer_config` and remote code
padded      zero-padded until a stock class holds it: equal, but less is saved
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert.families import TABLES
from minillm_jax.errors import InputError
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.families import FAMILIES, PRUNED, Family
from minillm_jax.model.ops import Rope, alibi_slopes

STOCK, PER_LAYER, PADDED, FLAX = FORMATS = ("stock", "per-layer", "padded", "flax")

# The module that is written beside per-layer weights; its classes can also be imported from `convert`.
REMOTE_CODE = "modeling_pruned"

# What does not hold for other weights, or is said anew by the format.
_DROPPED = ("quantization_config", "auto_map", "per_layer_config", "alibi_heads", "embedding_scale", "head_dim")


@dataclass(frozen=True)
class Described:
    """A format, the sizes that its files have (larger than the decoder's when padded), and its config.json."""

    format: str
    sizes: Sizes
    config: dict[str, Any]


def describe(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any], wanted: str | None = None) -> Described:
    """The format of a model and its configuration.

    Args:
      config: how the decoder computes.
      sizes: its sizes.
      raw: the configuration it was read with.
      wanted: `stock`, `per-layer` or `padded`; by default `stock` where a stock class holds the shapes, else
        `per-layer`.

    Raises:
      InputError: the format is unknown, or cannot hold the shapes.
    """
    check_format(wanted)
    refused = stock_refuses(config, sizes)
    if wanted == STOCK and refused is not None:
        raise InputError(f"no stock class can hold this model: {refused}; use the format per-layer or padded")
    if wanted == PADDED:
        sizes = padded_sizes(config, sizes)
        return Described(PADDED, sizes, stock_config(config, sizes, raw))
    if wanted == PER_LAYER or refused is not None:
        return Described(PER_LAYER, sizes, per_layer_config(config, sizes, raw))
    return Described(STOCK, sizes, stock_config(config, sizes, raw))


def check_format(wanted: str | None) -> None:
    """Whether there is such a format.

    Raises:
      InputError: there is not.
    """
    if wanted is not None and wanted not in FORMATS:
        raise InputError(f"unknown format {wanted!r}; expected one of {', '.join(FORMATS)}")


def stock_refuses(config: DecoderConfig, sizes: Sizes) -> str | None:
    """Why no stock class of transformers holds these shapes, or None when one does."""
    table, first = TABLES[config.family], sizes.layers[0]
    for words, counts in (
        ("query heads", [layer.N for layer in sizes.layers]),
        ("key/value heads", [layer.K for layer in sizes.layers]),
        ("MLP channels", [layer.F for layer in sizes.layers]),
    ):
        if len(set(counts)) > 1:
            return f"the layers keep unequal numbers of {words} ({', '.join(map(str, counts))})"
    if table.stock_heads == "dense" and (first.N * sizes.H != sizes.D or not _all_slopes(config, sizes)):
        kept = f"{first.N} heads of {sizes.H} are kept with a hidden size of {sizes.D}"
        return f"{table.stem} computes the head size as hidden size / heads, but {kept}"
    if table.stock_heads == "divide" and sizes.D % first.N and not _fits_mistral(config):
        return f"{first.N} heads do not divide the hidden size {sizes.D}, which {table.stem} asks for"
    if not table.stock_width and first.F != 4 * sizes.D:
        return f"{table.stem} has an MLP of four times the hidden size, but {first.F} channels are kept"
    if config.embedding_scale is not None and not _own_scale(config, sizes):
        return f"{table.stem} scales its embedding by the square root of the hidden size, which has changed"
    return None


def padded_sizes(config: DecoderConfig, sizes: Sizes) -> Sizes:
    """The least sizes, in all layers at least as large, that a stock class holds.

    Raises:
      InputError: padding heads and channels is not enough.
    """
    per_group = sizes.layers[0].N // sizes.layers[0].K
    width = max(layer.F for layer in sizes.layers) if TABLES[config.family].stock_width else 4 * sizes.D
    kv_heads = _stock_heads(config, sizes, per_group, max(layer.K for layer in sizes.layers))
    slopes = () if config.alibi_heads is None else tuple(map(float, alibi_slopes(config.alibi_heads)))
    layers = (LayerSizes(kv_heads * per_group, kv_heads, width, layer.window, slopes) for layer in sizes.layers)
    found = replace(sizes, layers=tuple(layers))
    if (refused := stock_refuses(config, found)) is not None:
        raise InputError(f"padding cannot make a stock model of this: {refused}")
    return found


def _stock_heads(config: DecoderConfig, sizes: Sizes, per_group: int, widest: int) -> int:
    """The least number of key/value heads from `widest` on that the stock class takes, if any does."""
    rule = TABLES[config.family].stock_heads
    if rule == "dense":
        return sizes.D // (sizes.H * per_group)
    if rule == "any" or _fits_mistral(config):
        return widest
    return next((n for n in range(widest, sizes.D + 1) if sizes.D % (n * per_group) == 0), widest)


def stock_config(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a stock class, from the one the model was read with and its sizes.

    `LlamaConfig` refuses a head count that does not divide the hidden size; `MistralConfig` takes any, computes the
    same, and names its parameters alike, so such a model is written as Mistral.
    """
    table, family, first = TABLES[config.family], FAMILIES[config.family], sizes.layers[0]
    written = _common(config, sizes, raw) | _counts(family, first)
    written |= {"model_type": config.family, "architectures": [f"{table.stem}ForCausalLM"]}
    if table.stock_heads != "dense":
        written["head_dim"] = sizes.H
    if not table.stock_width:
        written.pop(family.width)
    if config.family == "llama" and sizes.D % first.N:
        return _as_mistral(written)
    return written


def per_layer_config(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what each layer keeps, and the remote code that reads it.

    The values outside `per_layer_config` are those of the widest layer.
    """
    table, family = TABLES[config.family], FAMILIES[config.family]
    widest = LayerSizes(*(max(getattr(layer, letter) for layer in sizes.layers) for letter in "NKF"))
    globally = _counts(family, widest)
    if config.alibi_heads is not None:
        globally[family.heads] = config.alibi_heads  # the slopes are those of this many heads
    changes = {}
    for number, layer in enumerate(sizes.layers):
        own: dict[str, Any] = {key: value for key, value in _counts(family, layer).items() if value != globally[key]}
        if not _all_slopes(config, sizes):
            own["alibi_heads"] = kept_heads(config, layer)
        if own:
            changes[str(number)] = own
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    written = _common(config, sizes, raw) | globally | {"head_dim": sizes.H}
    if config.embedding_scale is not None and not _own_scale(config, sizes):
        written["embedding_scale"] = config.embedding_scale
    return written | {
        "model_type": PRUNED + config.family,
        "architectures": [f"Pruned{table.stem}ForCausalLM"],
        "auto_map": {auto: f"{REMOTE_CODE}.Pruned{table.stem}{end}" for auto, end in classes.items()},
        "per_layer_config": changes,
    }


def renamed(config: DecoderConfig, written: str) -> dict[str, str]:
    """Stored names that differ in a format: transformers renames some for its own classes only."""
    table = TABLES[config.family]
    if written != PER_LAYER or table.head_elsewhere is None:
        return {}
    return {table.head: table.head_elsewhere}


def kept_heads(config: DecoderConfig, layer: LayerSizes) -> list[int]:
    """The original indices of a layer's heads, found by their ALiBi slopes, which are all different."""
    assert config.alibi_heads is not None, "only called for models with slopes"
    dense = [float(slope) for slope in alibi_slopes(config.alibi_heads)]
    return [dense.index(slope) for slope in layer.slopes]


def _counts(family: Family, layer: LayerSizes) -> dict[str, int]:
    """The sizes of a layer under the family's keys."""
    found = {family.heads: layer.N, family.width: layer.F}
    return found if family.kv_heads is None else found | {family.kv_heads: layer.K}


def _common(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What every format says: the configuration as it was read, with the sizes of the whole and the rotary settings."""
    family = FAMILIES[config.family]
    aliases = {"num_attention_heads", "num_hidden_layers", "n_embed"} - {family.heads, family.layers}
    kept = {key: value for key, value in raw.items() if key not in aliases.union(_DROPPED)}
    written = kept | {"vocab_size": sizes.V, "hidden_size": sizes.D, family.layers: len(sizes.layers)}
    if config.position_offset is not None:
        written["word_embed_proj_dim"] = sizes.E
    if family.windows == "layer_types":
        kinds = {True: "sliding_attention", False: "full_attention"}
        written["layer_types"] = [kinds[layer.window is not None] for layer in sizes.layers]
    return written if config.rope is None else written | _rope_keys(config.rope, config.family)


def _rope_keys(rope: Rope, family: str) -> dict[str, Any]:
    """Rotary settings under today's key and under those that older versions of transformers and llama.cpp read."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_length
    # Until transformers 4.42 `linear` had to have just these two keys.
    linear = {"type": "linear", "factor": rope.factor}
    old = {"default": None, "linear": linear}.get(rope.kind, scaling | {"type": rope.kind})
    keys = {"rope_parameters": scaling | {"rope_theta": rope.theta}, "rope_theta": rope.theta, "rope_scaling": old}
    if family in ("glm", "glm4", "phi3", "gpt_neox"):
        keys["rope_parameters"] |= {"partial_rotary_factor": rope.fraction}
        keys["partial_rotary_factor"] = rope.fraction
    if family == "gpt_neox":
        keys |= {"rotary_pct": rope.fraction, "rotary_emb_base": rope.theta}
    return keys


def _fits_mistral(config: DecoderConfig) -> bool:
    return config.family == "llama" and not (config.qkv_bias or config.output_bias or config.mlp_bias)


def _as_mistral(config: dict[str, Any]) -> dict[str, Any]:
    llama_only = ("attention_bias", "mlp_bias", "pretraining_tp")
    kept = {key: value for key, value in config.items() if key not in llama_only}
    return kept | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def _own_scale(config: DecoderConfig, sizes: Sizes) -> bool:
    return config.embedding_scale == sizes.D**0.5


def _all_slopes(config: DecoderConfig, sizes: Sizes) -> bool:
    """Whether every layer still has all heads' slopes (or there are none)."""
    if config.alibi_heads is None:
        return True
    return all(len(layer.slopes) == config.alibi_heads for layer in sizes.layers)
