"""Pruned language models for transformers: the stock model of each family, with layers of unequal sizes.

minillm-jax copies this file beside the weights of a pruned model, and `trust_remote_code=True` runs the copy. To run no
code from a model folder, install minillm-jax and call `convert.modeling_pruned.register()` before loading.

transformers' own code computes the forward pass. This module only builds the layers: `per_layer_config` in config.json
gives the number of heads, channels and experts that each layer keeps; every other setting is that of the dense model.
"""

import copy
import sys
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel


class _Family(NamedTuple):
    """Names that transformers uses for a model family."""

    stem: str  # prefix of the class names
    text: str = ""  # what follows the stem in the names of the configuration and the base model
    layer: str = "DecoderLayer"  # class name of a layer, without the stem
    layers: str = "layers"  # path of the list of layers in the base model
    # The modules of the two sublayers, with the linear map to the hidden size in each.
    attention: tuple[str, str] = ("self_attn", "o_proj")
    mlp: tuple[str, str] = ("mlp", "down_proj")
    divides: bool = False  # whether the attention computes the head size as hidden size / heads
    own: str | None = None  # what the classes are called here, where transformers has the family under no name
    joint_norms: bool = False  # whether the norms of queries and keys have a factor for every feature of every head
    experts: bool = False  # whether the family has mixtures of experts
    shared: str = ""  # name of the shared expert in the MLP of a layer with experts

    def stock(self, kind: str) -> Any:
        """The stock class of a kind of `_KINDS`."""
        return getattr(transformers, self.stem + (self.text if kind != "ForCausalLM" else "") + kind)

    @property
    def name(self) -> str:
        """Prefix of the class names here, behind `Pruned`."""
        return self.own or self.stem

    @property
    def outputs(self) -> tuple[str, ...]:
        """The linear maps of a layer whose output has the hidden size."""
        return tuple(".".join(filter(None, names)) for names in (self.attention, self.mlp))


_FAMILIES = {
    "llama": _Family("Llama"),
    "mistral": _Family("Mistral"),
    "ministral3": _Family("Ministral3"),
    "qwen2": _Family("Qwen2"),
    "qwen3": _Family("Qwen3"),
    "gemma": _Family("Gemma"),
    "gemma2": _Family("Gemma2"),
    "gemma3_text": _Family("Gemma3", text="Text"),
    "glm": _Family("Glm"),
    "glm4": _Family("Glm4"),
    "phi": _Family("Phi", attention=("self_attn", "dense"), mlp=("mlp", "fc2")),
    "phi3": _Family("Phi3"),
    "olmo2": _Family("Olmo2", joint_norms=True),
    "olmo3": _Family("Olmo3", joint_norms=True),
    "smollm3": _Family("SmolLM3"),
    "granite": _Family("Granite"),
    "exaone4": _Family("Exaone4"),
    "cohere2": _Family("Cohere2"),
    "seed_oss": _Family("SeedOss"),
    "starcoder2": _Family("Starcoder2", mlp=("mlp", "c_proj")),
    "stablelm": _Family("StableLm", divides=True),
    "baichuan": _Family("Llama", own="Baichuan"),
    "opt": _Family("OPT", "", "DecoderLayer", "decoder.layers", ("self_attn", "out_proj"), ("", "fc2"), True),
    "bloom": _Family("Bloom", "", "Block", "h", ("self_attention", "dense"), ("mlp", "dense_4h_to_h"), True),
    "gpt_neox": _Family("GPTNeoX", "", "Layer", "layers", ("attention", "dense"), ("mlp", "dense_4h_to_h"), True),
    "mixtral": _Family("Mixtral", experts=True),
    "qwen2_moe": _Family("Qwen2Moe", experts=True, shared="shared_expert"),
    "qwen3_moe": _Family("Qwen3Moe", experts=True),
    "olmoe": _Family("Olmoe", experts=True, joint_norms=True),
    "gpt_oss": _Family("GptOss", experts=True),
    "glm4_moe": _Family("Glm4Moe", experts=True, shared="shared_experts"),
}

# Suffix of a class name, and the Auto class that loads the class.
_KINDS = {"Config": "AutoConfig", "Model": "AutoModel", "ForCausalLM": "AutoModelForCausalLM"}
_CLASSES = {
    f"Pruned{family.name}{kind}": (model_type, kind) for model_type, family in _FAMILIES.items() for kind in _KINDS
}


def _without_layer_sizes(config: Any) -> Any:
    """A copy without per-layer sizes; transformers refuses to read global sizes from a configuration that has them."""
    global_config = copy.copy(config)
    global_config.per_layer_config = None
    return global_config


class _PrunedConfig:
    """Base of the configuration classes of all families."""

    def __post_init__(self, **kwargs: Any) -> None:
        """Validate the configuration after all attributes are set, as the stock classes do."""
        cast(Any, super()).__post_init__(**kwargs)
        self.validate()

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, with the usual name of the number of layers beside the family's own name.

        AutoTokenizer reads config.json through the base class of transformers, which has no attribute map, and which
        needs the number of layers for `per_layer_config`.
        """
        return cast(Any, super()).to_dict() | {"num_hidden_layers": cast(Any, self).num_hidden_layers}

    def validate(self) -> None:
        """Run the stock checks, which assume head size = hidden size / heads, on a hidden size that satisfies this."""
        global_config = _without_layer_sizes(self)
        if getattr(global_config, "head_dim", None):
            global_config.hidden_size = global_config.num_attention_heads * global_config.head_dim
        cast(Any, super(_PrunedConfig, global_config)).validate()


class _LayerConfig:
    """View of the model's configuration with the sizes of one layer.

    All other attributes are read from the model's configuration at each access, because
    `model.set_attn_implementation` changes it after the layers are built.
    """

    def __init__(self, config: Any, sizes: dict[str, Any]) -> None:
        vars(self).update(sizes, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look these up before `_config` is set
            raise AttributeError(name)
        return getattr(vars(self)["_config"], name)


class _PrunedModel(PreTrainedModel):
    """Base of the model classes: calls the stock constructor for zero layers, then adds layers of unequal sizes."""

    family: _Family

    def __init__(self, config: Any) -> None:
        no_layers = _without_layer_sizes(config)
        no_layers.num_hidden_layers = 0
        super().__init__(no_layers)
        for name in ("_attn_implementation", "_experts_implementation"):  # the stock constructor selects them
            setattr(config, name, getattr(no_layers, name, None))
        # Rotary embeddings keep the copy, because some read the global sizes in the forward pass.
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        layers = cast(nn.ModuleList, self.base_model.get_submodule(self.family.layers))
        layers.extend(_layer(self.family, config, index) for index in range(config.num_hidden_layers))
        if getattr(config, "embedding_scale", None) is not None:
            _scale_embedding(self.get_input_embeddings(), config.embedding_scale)
        self.post_init()


def _layer(family: _Family, config: Any, index: int) -> nn.Module:
    """A stock layer with the number of heads, channels and experts that layer `index` keeps."""
    kept = config.per_layer_config[index]
    # `attribute_map` gives the attribute that the family's code reads: n_head for num_attention_heads in BLOOM. Olmoe's
    # reads the number of experts under both names.
    # The constructor of a layer needs one head and one channel, even where the whole sublayer was removed.
    sizes = {}
    for name in config.per_layer_attributes or ():
        stored = config.attribute_map.get(name, name)
        aliases = [alias for alias, target in config.attribute_map.items() if target == stored]
        sizes |= dict.fromkeys((stored, *aliases), getattr(kept, name) or 1)
    if family.divides:
        sizes["hidden_size"] = (kept.num_attention_heads or 1) * kept.head_dim
    code = sys.modules[family.stock("Model").__module__]
    layer = getattr(code, family.stem + family.layer)(_LayerConfig(config, sizes), index)
    if family.divides:
        _set_hidden_size(layer, family.outputs, kept)
    if not kept.num_attention_heads:
        _remove_attention(layer, *family.attention)
    if family.joint_norms:
        _fit_norms(layer.get_submodule(family.attention[0]))
    if hasattr(layer, "mlp") and hasattr(layer.mlp, family.shared or " "):
        _fit_shared_expert(layer.mlp, family.shared, kept)
    if 0 in (getattr(kept, "intermediate_size", None), getattr(kept, "ffn_dim", None)):
        name, output = family.mlp
        _remove_features(layer.get_submodule(name), output)
    if family.own == "Baichuan":
        dense = _without_layer_sizes(config).num_attention_heads
        heads = getattr(kept, "alibi_heads", None)
        slopes = [_alibi_slopes(dense)[head] for head in (range(dense) if heads is None else heads)]
        layer.register_forward_pre_hook(partial(_add_alibi, slopes), with_kwargs=True)
    elif getattr(kept, "alibi_heads", None) is not None:
        layer.register_forward_pre_hook(partial(_select_slopes, kept.alibi_heads), with_kwargs=True)
    return layer


def _remove_attention(layer: nn.Module, name: str, output: str) -> None:
    """Leave an attention sublayer without heads: its maps have no features, and its output is the bias."""
    attention: Any = layer.get_submodule(name)
    _remove_features(attention, output)
    if hasattr(attention, "sinks"):
        attention.sinks = nn.Parameter(attention.sinks[:0].detach())
    attention.forward = partial(_attend_without_heads, attention, getattr(attention, output))


def _fit_norms(attention: Any) -> None:
    """Give the norms of queries and keys one factor for every feature that is kept; Olmoe's would have those of all."""
    for norm, linear in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
        norm.weight = nn.Parameter(linear.weight.new_ones(linear.out_features))


def _fit_shared_expert(mlp: Any, name: str, kept: Any) -> None:
    """Rebuild the shared expert of a layer with its own number of channels, which need not be a multiple (GLM 4.5)."""
    width = kept.shared_expert_intermediate_size
    expert = type(getattr(mlp, name))(kept, intermediate_size=width or 1)
    if not width:
        _remove_features(expert, "down_proj")
    setattr(mlp, name, expert)


def _attend_without_heads(attention: Any, output: nn.Linear, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The forward pass of an attention sublayer without heads; the arguments are those of the stock class.

    transformers reads the number of past tokens from the cache of one layer, the first in most models. A layer without
    heads therefore caches one zero for each token.
    """
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    zeros = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    if cache is not None:
        zeros, _ = cache.update(zeros, zeros, attention.layer_idx)
    weights = hidden.new_zeros(hidden.shape[0], 0, hidden.shape[1], zeros.shape[2])
    update = output(hidden[..., :0])
    # BLOOM alone passes the residual stream, as the second argument, and expects the sum.
    return (update + args[1] if len(args) > 1 else update), weights


def _remove_features(sublayer: nn.Module, output: str) -> None:
    """Leave no features between the linear maps of a sublayer: `output` has no inputs, the others have no outputs."""
    for name, module in list(sublayer.named_children()):
        if isinstance(module, nn.Linear):
            inner = (0, module.out_features) if name == output else (module.in_features, 0)
            sublayer.set_submodule(name, _linear(*inner, module.bias is not None))


def _linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A linear map, which may have no inputs or outputs. PyTorch's constructor would warn of those."""
    linear = nn.Linear(max(inputs, 1), max(outputs, 1), bias)
    linear.in_features, linear.out_features = inputs, outputs
    linear.weight = nn.Parameter(linear.weight[:outputs, :inputs].detach())
    if bias:
        linear.bias = nn.Parameter(linear.bias[:outputs].detach())
    return linear


def _set_hidden_size(layer: nn.Module, outputs: tuple[str, ...], config: Any) -> None:
    """Rebuild the norms and linear maps of a layer, made for heads * head size, for the model's hidden size."""
    hidden = config.hidden_size
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.LayerNorm):
            layer.set_submodule(name, nn.LayerNorm(hidden, module.eps, module.elementwise_affine))
        elif isinstance(module, nn.Linear):
            inner = module.in_features if name in outputs else module.out_features
            if name.startswith("mlp."):  # BLOOM's constructor always builds 4 x hidden size channels
                inner = getattr(config, "intermediate_size", 4 * hidden)
            shape = (inner, hidden) if name in outputs else (hidden, inner)
            layer.set_submodule(name, _linear(*shape, module.bias is not None))


def _select_slopes(heads: list[int], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a BLOOM layer: select the ALiBi biases of the kept heads among those of all heads."""
    batch = args[0].shape[0]
    alibi = kwargs["alibi"].unflatten(0, (batch, -1))[:, heads].flatten(0, 1)
    return args, kwargs | {"alibi": alibi}


def _alibi_slopes(heads: int) -> list[float]:
    """The slope of each head: 2^(-8i/n) for the largest power of two n, then every second one of the series for 2n."""
    power = 2 ** (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (heads - power) + 1, 2)]
    return first + between


def _add_alibi(slopes: list[float], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a Llama layer: no rotary positions, and ALiBi in the mask of its attention."""
    hidden = args[0] if args else kwargs["hidden_states"]
    cos, sin = kwargs["position_embeddings"]
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    length = hidden.shape[1]
    past = 0 if cache is None else cache.get_seq_length(layer.self_attn.layer_idx)
    if mask is None:
        mask = torch.ones(length, past + length, dtype=torch.bool, device=hidden.device).tril(past)[None, None]
    if mask.dtype == torch.bool:
        floor = torch.finfo(hidden.dtype).min
        mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~mask, floor)
    keys = torch.arange(mask.shape[-1], device=hidden.device)
    queries = past + torch.arange(length, device=hidden.device)
    distances = (keys[None, :] - queries[:, None]).clamp(max=0)
    bias = torch.tensor(slopes, device=hidden.device)[:, None, None] * distances
    positions = (torch.ones_like(cos), torch.zeros_like(sin))
    return args, kwargs | {"attention_mask": mask + bias.to(mask.dtype), "position_embeddings": positions}


def _scale_embedding(embedding: Any, scale: float) -> None:
    """Set the scale of Gemma's embedding to sqrt(hidden size of the dense model) after the hidden size was pruned."""
    embedding.scalar_embed_scale = scale  # from_pretrained fills the buffer with this value
    embedding.embed_scale.fill_(scale)  # from_config keeps the value of the buffer


def _stack_experts(model_type: str) -> None:
    """Let transformers stack the tensors of single experts as it loads them, as it does for the stock class."""
    from transformers import conversion_mapping

    mapping = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(f"pruned_{model_type}", mapping, overwrite=True)


@cache
def _create_class(name: str) -> type:
    """A class of `_CLASSES`, created on first access because creation imports the code of its family."""
    model_type, kind = _CLASSES[name]
    family = _FAMILIES[model_type]
    stock = family.stock(kind)
    bases: tuple[type, ...] = (_PrunedModel, stock)
    members: dict[str, Any] = {"__module__": __name__, "__doc__": f"`{stock.__name__}` with layers of unequal sizes."}
    if kind == "Config":
        bases, members["model_type"] = (_PrunedConfig, stock), f"pruned_{model_type}"
    else:
        members |= {"family": family, "config_class": _create_class(f"Pruned{family.name}Config")}
        if family.experts:
            members["_can_set_experts_implementation"] = classmethod(
                lambda cls: stock._can_set_experts_implementation()
            )
            _stack_experts(model_type)
    if kind == "ForCausalLM":  # an Auto class would otherwise subclass the class for Phi3 to add this base
        bases += (transformers.GenerationMixin,)
    created: Any = type(name, bases, members)
    created.register_for_auto_class(_KINDS[kind])  # makes save_pretrained copy this file
    return created


def __getattr__(name: str) -> Any:
    """Create the class for `from convert.modeling_pruned import PrunedLlamaForCausalLM`."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _create_class(name)


def register() -> None:
    """Register the classes with transformers, which then loads pruned models without `trust_remote_code`."""
    for model_type, family in _FAMILIES.items():
        config, model, causal = (_create_class(f"Pruned{family.name}{kind}") for kind in _KINDS)
        transformers.AutoConfig.register(f"pruned_{model_type}", config, exist_ok=True)
        transformers.AutoModel.register(config, model, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, causal, exist_ok=True)
