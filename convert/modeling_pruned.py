"""Pruned language models for transformers: the stock model of each family, with layers of unequal sizes.

This file stands beside the weights of a pruned model, and `trust_remote_code=True` runs it. Whoever would rather not
run code out of a model folder can install minillm-jax and call `register()` of its `convert.modeling_pruned` instead.

All that computes is transformers' own code. What is written here is how the layers are built: `per_layer_config` in
config.json says what each keeps of its heads and channels, and everything else is as in the dense model.
"""

import copy
import sys
from functools import cache, partial
from typing import Any, NamedTuple, cast

import transformers
from torch import nn
from transformers import PreTrainedModel


class _Family(NamedTuple):
    """How transformers spells a model family."""

    stem: str  # the first part of its class names
    layer: str = "DecoderLayer"  # the class of a layer, after the stem
    layers: str = "layers"  # where the layers are in the model
    # Where transformers takes the size of a head to be hidden size / heads: the linear maps of a layer that lead from
    # the heads and from the channels back to the hidden size.
    outputs: tuple[str, ...] = ()


_FAMILIES = {
    "llama": _Family("Llama"),
    "mistral": _Family("Mistral"),
    "qwen2": _Family("Qwen2"),
    "qwen3": _Family("Qwen3"),
    "gemma": _Family("Gemma"),
    "gemma2": _Family("Gemma2"),
    "glm": _Family("Glm"),
    "glm4": _Family("Glm4"),
    "phi3": _Family("Phi3"),
    "opt": _Family("OPT", layers="decoder.layers", outputs=("self_attn.out_proj", "fc2")),
    "bloom": _Family("Bloom", "Block", "h", outputs=("self_attention.dense", "mlp.dense_4h_to_h")),
    "gpt_neox": _Family("GPTNeoX", "Layer", outputs=("attention.dense", "mlp.dense_4h_to_h")),
}

# What a class is made for, and the Auto class that finds it.
_KINDS = {"Config": "AutoConfig", "Model": "AutoModel", "ForCausalLM": "AutoModelForCausalLM"}
_CLASSES = {
    f"Pruned{family.stem}{kind}": (model_type, kind) for model_type, family in _FAMILIES.items() for kind in _KINDS
}


def _without_layers(config: Any) -> Any:
    """A copy of a configuration in which the global sizes can be read: as they were in the dense model."""
    plain = copy.copy(config)
    plain.per_layer_config = None
    return plain


class _PrunedConfig:
    """What the configurations of all families have in common."""

    def __post_init__(self, **kwargs: Any) -> None:
        """Validate once everything is set, as the stock configurations do."""
        cast(Any, super()).__post_init__(**kwargs)
        self.validate()

    def validate(self) -> None:
        """The stock checks, which all take the size of a head to be hidden size / heads, where that is so."""
        plain = _without_layers(self)
        if getattr(plain, "head_dim", None):
            plain.hidden_size = plain.num_attention_heads * plain.head_dim
        cast(Any, super(_PrunedConfig, plain)).validate()


class _LayerConfig:
    """The configuration as a layer sees it: its own sizes, and the rest as the model has it at the time of reading.

    A copy would not notice `model.set_attn_implementation`.
    """

    def __init__(self, config: Any, sizes: dict[str, Any]) -> None:
        vars(self).update(sizes, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these before there is a `_config`
            raise AttributeError(name)
        return getattr(vars(self)["_config"], name)


class _PrunedModel(PreTrainedModel):
    """The stock constructors make a model without layers; this adds them, each of its own size."""

    family: _Family

    def __init__(self, config: Any) -> None:
        empty = _without_layers(config)
        empty.num_hidden_layers = 0
        super().__init__(empty)
        config._attn_implementation = empty._attn_implementation  # chosen by the constructor
        # Rotary embeddings keep the copy: some read the global sizes again while they run.
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        layers = cast(nn.ModuleList, self.base_model.get_submodule(self.family.layers))
        layers.extend(_layer(self.family, config, index) for index in range(config.num_hidden_layers))
        if getattr(config, "embedding_scale", None) is not None:
            _scale_embedding(self.get_input_embeddings(), config.embedding_scale)
        self.post_init()


def _layer(family: _Family, config: Any, index: int) -> nn.Module:
    """A stock layer of the sizes that are left of it."""
    own = config.per_layer_config[index]
    # `attribute_map`: BLOOM's code says n_head where everybody else says num_attention_heads.
    sizes = {config.attribute_map.get(name, name): getattr(own, name) for name in config.per_layer_attributes or ()}
    if family.outputs:
        sizes["hidden_size"] = own.num_attention_heads * own.head_dim
    code = sys.modules[getattr(transformers, f"{family.stem}Model").__module__]
    layer = getattr(code, family.stem + family.layer)(_LayerConfig(config, sizes), index)
    if family.outputs:
        _set_hidden_size(layer, family.outputs, own)
    if getattr(own, "alibi_heads", None) is not None:
        layer.register_forward_pre_hook(partial(_select_slopes, own.alibi_heads), with_kwargs=True)
    return layer


def _set_hidden_size(layer: nn.Module, outputs: tuple[str, ...], config: Any) -> None:
    """Join a layer that was built as wide as its heads to the hidden size of the model."""
    hidden = config.hidden_size
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.LayerNorm):
            layer.set_submodule(name, nn.LayerNorm(hidden, module.eps, module.elementwise_affine))
        elif isinstance(module, nn.Linear):
            inner = module.in_features if name in outputs else module.out_features
            if name.startswith("mlp."):  # BLOOM's constructor knows 4 x hidden size only
                inner = getattr(config, "intermediate_size", 4 * hidden)
            shape = (inner, hidden) if name in outputs else (hidden, inner)
            layer.set_submodule(name, nn.Linear(*shape, bias=module.bias is not None))


def _select_slopes(heads: list[int], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give a BLOOM layer the ALiBi biases of the heads it has left, out of those of the dense model's heads."""
    batch = args[0].shape[0]
    alibi = kwargs["alibi"].unflatten(0, (batch, -1))[:, heads].flatten(0, 1)
    return args, kwargs | {"alibi": alibi}


def _scale_embedding(embedding: Any, scale: float) -> None:
    """Gemma multiplies its embedding by sqrt(hidden size): that of the dense model, when it was pruned."""
    embedding.scalar_embed_scale = scale  # from_pretrained fills the buffer from this,
    embedding.embed_scale.fill_(scale)  # from_config does not


@cache
def _make(name: str) -> type:
    """One of the classes of `_CLASSES`: made when first asked for, as that imports the code of its family."""
    model_type, kind = _CLASSES[name]
    family = _FAMILIES[model_type]
    stock = getattr(transformers, family.stem + kind)
    bases: tuple[type, ...] = (_PrunedModel, stock)
    members: dict[str, Any] = {"__module__": __name__, "__doc__": f"`{stock.__name__}` with layers of unequal sizes."}
    if kind == "Config":
        bases, members["model_type"] = (_PrunedConfig, stock), f"pruned_{model_type}"
    else:
        members |= {"family": family, "config_class": _make(f"Pruned{family.stem}Config")}
    if kind == "ForCausalLM":  # named once more, or the Auto class would derive a class of its own from Phi3's
        bases += (transformers.GenerationMixin,)
    made: Any = type(name, bases, members)
    made.register_for_auto_class(_KINDS[kind])  # so that save_pretrained copies this file
    return made


def __getattr__(name: str) -> Any:
    """The classes of this module: `from convert.modeling_pruned import PrunedLlamaForCausalLM`."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _make(name)


def register() -> None:
    """Make transformers load pruned models with this module's classes, without `trust_remote_code`."""
    for model_type, family in _FAMILIES.items():
        config, model, causal = (_make(f"Pruned{family.stem}{kind}") for kind in _KINDS)
        transformers.AutoConfig.register(f"pruned_{model_type}", config, exist_ok=True)
        transformers.AutoModel.register(config, model, exist_ok=True)
        transformers.AutoModelForCausalLM.register(config, causal, exist_ok=True)
