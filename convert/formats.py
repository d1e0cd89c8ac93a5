"""Output formats: the choice of a format for a decoder's shapes, and the config.json of that format.

Formats depend on shapes only; this module reads and writes no files.

    stock       the family's class in transformers, without remote code
    per-layer   `per_layer_config` and remote code: holds unequal layers and shapes that the stock class refuses
    padded      stock, after padding with zeros to a shape that the stock class holds: same outputs, larger files
    flax        Orbax checkpoint of the Flax pytree
    gguf        one GGUF file for llama.cpp (`convert.gguf_config` says which shapes it holds)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert import multimodal
from convert.families import TABLES, FamilyTable
from minillm_jax.errors import InputError
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.families import FAMILIES, PRUNED, Family
from minillm_jax.model.family_configs import SHARED_EXPERTS, SHARED_WIDTH
from minillm_jax.model.ops import Rope, alibi_slopes

STOCK, PER_LAYER, PADDED, FLAX, GGUF = FORMATS = ("stock", "per-layer", "padded", "flax", "gguf")

# What sentences call the MLP channels of a layer with experts; families without a shared expert have none.
SHARED = "channels of the shared expert"

# Name of the module that is copied beside per-layer weights; `convert.modeling_pruned` is the same module.
REMOTE_CODE = "modeling_pruned"

# Keys of the input's config.json that are not copied: they describe the input's weight files, or the output format
# sets them itself.
_DROPPED = (
    *("quantization_config", "auto_map", "per_layer_config", "alibi_heads", "embedding_scale", "head_dim"),
    SHARED_WIDTH,
)


@dataclass(frozen=True)
class Described:
    """An output format for a model.

    Attributes:
      format: `stock`, `per-layer` or `padded`.
      sizes: sizes of the stored tensors, which are larger than the decoder's when padded.
      config: content of config.json, without the dtype.
    """

    format: str
    sizes: Sizes
    config: dict[str, Any]


def describe(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any], format_name: str | None = None) -> Described:
    """Choose the format of a model and make its config.json.

    Args:
      config: the decoder's configuration.
      sizes: the decoder's sizes.
      raw: config.json that the model was read with.
      format_name: `stock`, `per-layer` or `padded`; by default `stock` where a stock class holds the shapes, else
        `per-layer`.

    Raises:
      InputError: the format is unknown, or cannot hold the shapes.
    """
    check_format(format_name)
    if multimodal.kind_of(raw) is not None:
        return _describe_text(config, sizes, raw, format_name)
    refusal = stock_refusal(config, sizes)
    if format_name == STOCK and refusal is not None:
        raise InputError(f"no stock class can hold this model: {refusal}; use the format per-layer or padded")
    if format_name == PADDED:
        sizes = padded_sizes(config, sizes)
        return Described(PADDED, sizes, stock_config(config, sizes, raw))
    if format_name == PER_LAYER or refusal is not None:
        return Described(PER_LAYER, sizes, per_layer_config(config, sizes, raw))
    return Described(STOCK, sizes, stock_config(config, sizes, raw))


def _describe_text(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any], format_name: str | None) -> Described:
    """The format of a vision-language model with another text model: stock, or padded where the layers are unequal."""
    multimodal.check_format(raw, format_name)
    kind, text = multimodal.kind_of(raw), multimodal.text_config(raw, "config.json")
    assert kind is not None, "checked by the caller"
    if text["hidden_size"] != sizes.D:
        raise InputError(
            f"a {raw['model_type']} model projects its images to the {text['hidden_size']} hidden dimensions of its "
            "text model, which therefore cannot be pruned; use heads, channels or layers"
        )
    table = kind.table or TABLES[config.family]
    refusal = stock_refusal(config, sizes, table)
    if format_name == STOCK and refusal is not None:
        raise InputError(f"no stock class can hold this model: {refusal}; use the format padded")
    name = PADDED if format_name == PADDED or refusal is not None else STOCK
    if name == PADDED:
        sizes = padded_sizes(config, sizes, table)
    family = FAMILIES[config.family]
    keys: dict[str, Any] = _size_keys(family, sizes.layers[0]) | {family.layers: len(sizes.layers)}
    named = config.windowed or "layer_types" in raw.get(multimodal.TEXT, raw)
    if family.windows == "layer_types" and named:
        keys["layer_types"] = _layer_types(sizes)
    if table.stock_heads != "dense":
        keys["head_dim"] = sizes.H
    return Described(name, sizes, multimodal.with_text(raw, keys))


def check_format(format_name: str | None) -> None:
    """Check that a format exists; None is accepted.

    Raises:
      InputError: the format is unknown.
    """
    if format_name is not None and format_name not in FORMATS:
        raise InputError(f"unknown format {format_name!r}; expected one of {', '.join(FORMATS)}")


def stock_refusal(config: DecoderConfig, sizes: Sizes, table: FamilyTable | None = None) -> str | None:
    """The reason why no stock class of transformers holds these shapes, or None where one does.

    Args:
      config: the decoder's configuration.
      sizes: the decoder's sizes.
      table: what the stock class accepts; that of the decoder's family by default.
    """
    table, first = table or TABLES[config.family], sizes.layers[0]
    if not table.stock:
        return f"transformers has no class for {table.stem}"
    dense, mixed = _dense_layers(sizes), [layer for layer in sizes.layers if layer.X]
    for counted, counts in (
        ("query heads", [layer.N for layer in sizes.layers]),
        ("key/value heads", [layer.K for layer in sizes.layers]),
        ("MLP channels", [layer.F for layer in dense]),
        ("experts", [layer.X for layer in mixed]),
        ("channels of the experts", [layer.W for layer in mixed]),
        (SHARED, [layer.F for layer in mixed]),
    ):
        if len(set(counts)) > 1:
            return f"the layers keep unequal numbers of {counted} ({', '.join(map(str, counts))})"
        if 0 in counts and (counted != SHARED or FAMILIES[config.family].shared is not None):
            return f"the layers keep no {counted}"
    if FAMILIES[config.family].shared == SHARED_EXPERTS and mixed and mixed[0].F % mixed[0].W:
        return f"{table.stem} has a shared expert of a multiple of {mixed[0].W} channels, but {mixed[0].F} are kept"
    if table.stock_heads == "dense" and (first.N * sizes.H != sizes.D or not _keeps_all_slopes(config, sizes)):
        kept = f"{first.N} heads of {sizes.H} are kept with a hidden size of {sizes.D}"
        return f"{table.stem} computes the head size as hidden size / heads, but {kept}"
    if table.stock_heads == "divide" and sizes.D % first.N and not _fits_mistral(config):
        return f"{table.stem} needs a head count that divides the hidden size, but {first.N} does not divide {sizes.D}"
    if not table.stock_width and first.F != 4 * sizes.D:
        kept = f"{first.F} channels are kept with a hidden size of {sizes.D}"
        return f"{table.stem} has an MLP of four times the hidden size, but {kept}"
    if config.embedding_scale is not None and not _has_stock_scale(config, sizes):
        scales = f"the square root of the hidden size {sizes.D}, but this model's scale is {config.embedding_scale:g}"
        return f"{table.stem} scales its embedding by {scales}"
    return None


def _dense_layers(sizes: Sizes) -> list[LayerSizes]:
    """The layers without a mixture of experts."""
    return [layer for layer in sizes.layers if not layer.X]


def padded_sizes(config: DecoderConfig, sizes: Sizes, table: FamilyTable | None = None) -> Sizes:
    """The smallest sizes that a stock class holds and that are, in every layer, at least those given.

    Args:
      config: the decoder's configuration.
      sizes: the decoder's sizes.
      table: what the stock class accepts; that of the decoder's family by default.

    Raises:
      InputError: no number of padded heads and channels gives a shape that a stock class holds.
    """
    table = table or TABLES[config.family]
    kv_heads, per_group = _stock_heads(config, sizes, table)
    slopes = () if config.alibi_heads is None else tuple(map(float, alibi_slopes(config.alibi_heads)))
    heads = kv_heads * per_group
    if config.joint_qk_norm and any(heads != layer.N for layer in sizes.layers):
        raise InputError(
            f"heads of zeros would change the norms of {table.stem}, which are over the queries and "
            "the keys of all heads; use the format per-layer"
        )
    widths = {mixed: _padded_width(config, sizes, table, mixed) for mixed in (False, True)}
    layers = (replace(layer, N=heads, K=kv_heads, F=widths[layer.X > 0], slopes=slopes) for layer in sizes.layers)
    padded = replace(sizes, layers=tuple(layers))
    if (refusal := stock_refusal(config, padded, table)) is not None:
        raise InputError(f"padding cannot fit this model into a stock class: {refusal}; use the format per-layer")
    return padded


def _padded_width(config: DecoderConfig, sizes: Sizes, table: FamilyTable, mixed: bool) -> int:
    """The MLP width of all dense layers, or of the shared experts of all `mixed` layers."""
    layers, shared = [layer for layer in sizes.layers if bool(layer.X) == mixed], FAMILIES[config.family].shared
    if not table.stock_width:
        return 4 * sizes.D
    if mixed and shared is None:
        return 0
    width = max((layer.F for layer in layers if layer.F), default=1)
    multiple = layers[0].W if mixed and layers and shared == SHARED_EXPERTS else 1
    return -(-width // multiple) * multiple


def _stock_heads(config: DecoderConfig, sizes: Sizes, table: FamilyTable) -> tuple[int, int]:
    """The fewest key/value heads, and query heads of each, that hold all layers and that the stock class accepts.

    Where no number is accepted, the numbers of the widest layers.
    """
    # Query heads may have been removed from some layers only.
    widest, per_group = (
        max(layer.K for layer in sizes.layers),
        max(layer.N // max(layer.K, 1) for layer in sizes.layers),
    )
    rule = table.stock_heads
    if rule == "any" or _fits_mistral(config):
        return widest, per_group
    dense = sizes.D // sizes.H
    heads = [dense] if rule == "dense" else [n for n in range(widest * per_group, sizes.D + 1) if sizes.D % n == 0]
    # The fewest query heads of each first: a class without key/value heads of its own has one of each.
    pairs = ((n // g, g) for n in heads for g in range(per_group, n // widest + 1) if n % g == 0)
    return next(pairs, (widest, per_group))


def stock_config(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a stock class, with layers of equal sizes.

    `LlamaConfig` refuses a head count that does not divide the hidden size. `MistralConfig` accepts every head count,
    and its model has the same forward pass and parameter names, so such a Llama is written as Mistral.
    """
    table, family, first = TABLES[config.family], FAMILIES[config.family], sizes.layers[0]
    keys = _common_keys(config, sizes, raw) | _size_keys(family, first) | _expert_keys(family, sizes, raw)
    keys |= {"model_type": config.family, "architectures": [f"{table.stem}ForCausalLM"]}
    if table.stock_heads != "dense":
        keys["head_dim"] = sizes.H
    if not table.stock_width:
        keys.pop(family.width)
    if config.family == "llama" and sizes.D % first.N:
        return _as_mistral(keys)
    return keys


def per_layer_config(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the sizes of each layer and a reference to the remote code that reads them.

    The keys outside `per_layer_config` hold the sizes of the widest layer. `per_layer_config` maps the number of a
    layer to the keys whose values differ from those.
    """
    table, family = TABLES[config.family], FAMILIES[config.family]
    global_keys = _widest(family, sizes)
    if config.alibi_heads is not None:
        # The slopes are computed from this head count.
        global_keys[family.heads] = config.alibi_heads
        if family.kv_heads is not None:
            global_keys[family.kv_heads] = config.alibi_heads
    layers: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(sizes.layers):
        layer_keys: dict[str, Any] = {
            key: value for key, value in _layer_keys(family, layer).items() if value != global_keys[key]
        }
        if not _keeps_all_slopes(config, sizes):
            layer_keys["alibi_heads"] = kept_heads(config, layer)
        if layer_keys:
            layers[str(number)] = layer_keys
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    keys = _common_keys(config, sizes, raw) | _expert_keys(family, sizes, raw) | global_keys | {"head_dim": sizes.H}
    # Where remote code is not allowed, AutoTokenizer reads the configuration through the base class of transformers.
    # That class has no attribute map, so it needs the usual name of the number of layers, and it warns of
    # `rope_scaling`. The old versions that read `rope_scaling` cannot load unequal layers.
    keys["num_hidden_layers"] = len(sizes.layers)
    keys.pop("rope_scaling", None)
    if config.embedding_scale is not None and not _has_stock_scale(config, sizes):
        keys["embedding_scale"] = config.embedding_scale
    return keys | {
        "model_type": PRUNED + config.family,
        "architectures": [f"Pruned{table.stem}ForCausalLM"],
        "auto_map": {auto: f"{REMOTE_CODE}.Pruned{table.stem}{suffix}" for auto, suffix in classes.items()},
        "per_layer_config": layers,
    }


def renamed(config: DecoderConfig, format_name: str) -> dict[str, str]:
    """Tensor name in the rule table → tensor name in a format, for the tensors that the format renames.

    transformers renames the head of some families, but for its own classes only.
    """
    table = TABLES[config.family]
    if format_name != PER_LAYER or table.head_alias is None:
        return {}
    return {table.head: table.head_alias}


def kept_heads(config: DecoderConfig, layer: LayerSizes) -> list[int]:
    """The indices that a layer's heads had in the dense model; the ALiBi slopes, all different, identify them."""
    assert config.alibi_heads is not None, "the model has no ALiBi slopes"
    dense = [float(slope) for slope in alibi_slopes(config.alibi_heads)]
    return [dense.index(slope) for slope in layer.slopes]


def _size_keys(family: Family, layer: LayerSizes) -> dict[str, int]:
    """The sizes of a layer under the family's configuration keys."""
    keys = {family.heads: layer.N, family.width: layer.F}
    return keys if family.kv_heads is None else keys | {family.kv_heads: layer.K}


def _layer_keys(family: Family, layer: LayerSizes) -> dict[str, int]:
    """The sizes of a layer under the keys of the format per-layer, where one with experts has no width of its own."""
    keys = _size_keys(family, layer)
    if not layer.X:
        return keys
    del keys[family.width]
    keys |= {family.experts[0]: layer.X, family.expert_width: layer.W}
    return keys if family.shared is None else keys | {SHARED_WIDTH: layer.F}


def _widest(family: Family, sizes: Sizes) -> dict[str, int]:
    """The largest value of every key of `_layer_keys`: one at least, with which classes of transformers are made."""
    each = [_layer_keys(family, layer) for layer in sizes.layers]
    widest = {key: max(1, *(keys.get(key, 1) for keys in each)) for key in {key: None for keys in each for key in keys}}
    experts = widest.get(family.experts[0]) if family.experts else None
    return widest if experts is None else widest | dict.fromkeys(family.experts, experts)


def _expert_keys(family: Family, sizes: Sizes, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the experts and of the dense layers, and which layers those are, in a model with experts."""
    mixed, dense = next((layer for layer in sizes.layers if layer.X), None), _dense_layers(sizes)
    if not family.experts:
        return {}
    keys: dict[str, Any] = {family.width: dense[0].F if dense else raw.get(family.width)}
    if family.dense_layers == "first_k_dense_replace":
        keys[family.dense_layers] = len(dense)
    if family.dense_layers == "mlp_only_layers":
        keys |= {family.dense_layers: [n for n, layer in enumerate(sizes.layers) if not layer.X]}
        keys |= {"decoder_sparse_step": 1}
    if mixed is None:
        return keys
    keys |= dict.fromkeys(family.experts, mixed.X) | {family.expert_width: mixed.W}
    if family.shared is None:
        return keys
    return keys | {family.shared: mixed.F // mixed.W if family.shared == SHARED_EXPERTS else mixed.F}


def _common_keys(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of every format: config.json as it was read, with the current global sizes and rotary settings."""
    family = FAMILIES[config.family]
    aliases = {"num_attention_heads", "num_hidden_layers", "n_embed"} - {family.heads, family.layers}
    keys = {key: value for key, value in raw.items() if key not in aliases.union(_DROPPED)}
    keys |= {"vocab_size": sizes.V, "hidden_size": sizes.D, family.layers: len(sizes.layers)}
    if config.position_offset is not None:
        keys["word_embed_proj_dim"] = sizes.E
    if family.windows == "layer_types":
        keys["layer_types"] = _layer_types(sizes)
    if family.other_rope == "no_rope_layers":
        keys["no_rope_layers"] = [1 - layer.rope for layer in sizes.layers]
    if config.rope is None:
        return keys
    keys |= rope_keys(config.rope, config.family, raw.get("rope_scaling"))
    if family.rope_by_type:
        other = config.other_rope or config.rope
        by_type = {"full_attention": config.rope, "sliding_attention": other}
        keys["rope_parameters"] = {kind: _rope_parameters(rope) for kind, rope in by_type.items()}
        if "rope_local_base_freq" in raw:
            keys["rope_local_base_freq"] = other.theta
    return keys


def _layer_types(sizes: Sizes) -> list[str]:
    return ["full_attention" if layer.window is None else "sliding_attention" for layer in sizes.layers]


def _rope_parameters(rope: Rope) -> dict[str, Any]:
    """The rotary settings under the key `rope_parameters`, without the share of rotated features."""
    scaling: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    match rope.kind:
        case "llama3":
            scaling["low_freq_factor"] = rope.low_freq_factor
            scaling["high_freq_factor"] = rope.high_freq_factor
        case "yarn":
            scaling |= {"attention_factor": rope.attention_factor, "truncate": rope.truncate}
            scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        case "longrope":
            scaling |= {"attention_factor": rope.attention_factor}
            scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.query_growth:
        scaling["llama_4_scaling_beta"] = rope.query_growth
    if rope.kind in ("llama3", "yarn", "longrope") or rope.query_growth:
        scaling["original_max_position_embeddings"] = rope.original_length
    return scaling


def rope_keys(rope: Rope, family: str, read: Any = None) -> dict[str, Any]:
    """Rotary settings under the current key and under the keys that old versions of transformers and llama.cpp read.

    Args:
      rope: the rotary positions.
      family: the family.
      read: `rope_scaling` of the config.json that was read. It is kept for the kinds of scaling whose keys differ
        between versions.
    """
    parameters = _rope_parameters(rope)
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    # transformers up to version 4.42 accepts a `linear` entry only with exactly these two keys.
    linear = {"type": "linear", "factor": rope.factor}
    old = {"default": None, "linear": linear, "llama3": scaling | {"type": rope.kind}}.get(rope.kind, read)
    keys = {"rope_parameters": parameters, "rope_theta": rope.theta, "rope_scaling": old}
    if family in ("glm", "glm4", "glm4_moe", "phi", "phi3", "gpt_neox", "stablelm"):
        keys["rope_parameters"] |= {"partial_rotary_factor": rope.fraction}
        keys["partial_rotary_factor"] = rope.fraction
    if family == "gpt_neox":
        keys |= {"rotary_pct": rope.fraction, "rotary_emb_base": rope.theta}
    return keys


def _fits_mistral(config: DecoderConfig) -> bool:
    """Whether a model is a Llama without biases, which Mistral's class can hold."""
    return config.family == "llama" and not (config.qkv_bias or config.output_bias or config.mlp_bias)


def _as_mistral(llama_keys: dict[str, Any]) -> dict[str, Any]:
    """config.json of a Llama as a Mistral of the same shapes."""
    llama_only = ("attention_bias", "mlp_bias", "pretraining_tp")
    keys = {key: value for key, value in llama_keys.items() if key not in llama_only}
    return keys | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def _has_stock_scale(config: DecoderConfig, sizes: Sizes) -> bool:
    """Whether the embedding scale is the one that the stock class computes from the hidden size, or reads."""
    return not TABLES[config.family].stock_scale or config.embedding_scale == sizes.D**0.5


def _keeps_all_slopes(config: DecoderConfig, sizes: Sizes) -> bool:
    """Whether every layer keeps the ALiBi slopes of all heads; True for a model without slopes."""
    if config.alibi_heads is None:
        return True
    return all(len(layer.slopes) == config.alibi_heads for layer in sizes.layers)
