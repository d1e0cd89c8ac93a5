"""One function for each family: its Hugging Face configuration becomes the `DecoderConfig` of the decoder.

`FAMILIES` lists them with the keys of their sizes. A feature that the decoder lacks raises an `InputError`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minillm_jax.errors import InputError
from minillm_jax.model.config import DecoderConfig, Routing
from minillm_jax.model.config_values import activation, cap, is_pruned, positive, read_rope, whole

# Key of the width of the shared expert as a multiple of the width of an expert.
SHARED_EXPERTS = "n_shared_experts"

# Key of the width itself; in the format per-layer, of every family with a shared expert.
SHARED_WIDTH = "shared_expert_intermediate_size"


@dataclass(frozen=True)
class Family:
    """How the configuration of a family is read.

    Attributes:
      read: configuration, its file (for errors) -> how the decoder computes.
      name: the models of the family, for people.
      heads: key of the number of query heads.
      kv_heads: key of the number of key/value heads; None for a family with one key/value head per query head.
      width: key of the MLP width, which is four times the hidden size if the key is missing.
      layers: key of the number of layers.
      windows: the layers with `sliding_window`: `none`, `all`, or `layer_types` for the layers listed under that key.
      other_rope: the layers with the decoder's `other_rope`: those of a type listed under `layer_types`, or those with
        a zero under `no_rope_layers`.
      defaults: the model type whose class in transformers knows the default values; None for the family itself.
      rope_by_type: whether `rope_parameters` lists the settings by the type of layer.
      experts: keys of the number of experts, of which transformers completes the first; none for a family without a
        mixture of experts.
      expert_width: key of the width of an expert.
      shared: key of the width of the shared expert, or of its multiple of the width of an expert; None for a family
        without a shared expert.
      dense_layers: the layers without experts: those listed by `mlp_only_layers` and `decoder_sparse_step`, or the
        first `first_k_dense_replace`.
    """

    read: Callable[[Mapping[str, Any], str], DecoderConfig]
    name: str
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    width: str = "intermediate_size"
    layers: str = "num_hidden_layers"
    windows: str = "none"
    other_rope: str | None = None
    rope_by_type: bool = False
    defaults: str | None = None
    experts: tuple[str, ...] = ()
    expert_width: str = "moe_intermediate_size"
    shared: str | None = None
    dense_layers: str = "none"


def _llama(
    raw: Mapping[str, Any], where: str, partial_rope: bool = False, layer_type: str | None = None
) -> DecoderConfig:
    bias = bool(raw.get("attention_bias"))
    return DecoderConfig(
        family="llama",
        norm_epsilon=positive(raw, "rms_norm_eps", where),
        rope=read_rope(raw, where, partial_rope, layer_type),
        activation=activation(raw["hidden_act"], where),
        tie_embeddings=bool(raw["tie_word_embeddings"]),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias")),
    )


def _mistral(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    # transformers ignores the bias keys of a Mistral configuration.
    return replace(_llama(raw, where), family="mistral", qkv_bias=False, output_bias=False, mlp_bias=False)


def _ministral3(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    mistral, parameters = _mistral(raw, where), raw["rope_parameters"]
    assert mistral.rope is not None, "_llama always sets rope"
    growth = parameters["llama_4_scaling_beta"] and positive(parameters, "llama_4_scaling_beta", where)
    length = int(positive(parameters, "original_max_position_embeddings", where))
    return replace(
        mistral, family="ministral3", rope=replace(mistral.rope, query_growth=growth, original_length=length)
    )


def _qwen2(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_mistral(raw, where), family="qwen2", qkv_bias=True)


def _qwen3(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_llama(raw, where), family="qwen3", mlp_bias=False, qk_norm=True)


def _gemma(raw: Mapping[str, Any], where: str, layer_type: str | None = None) -> DecoderConfig:
    scale = positive(raw, "embedding_scale", where) if is_pruned(raw) and "embedding_scale" in raw else None
    return replace(
        _llama(raw, where, layer_type=layer_type),
        family="gemma",
        norm="rms_plus_one",
        mlp_bias=False,
        embedding_scale=scale or raw["hidden_size"] ** 0.5,
    )


def _gemma2(raw: Mapping[str, Any], where: str, layer_type: str | None = None) -> DecoderConfig:
    return replace(
        _gemma({**raw, "hidden_act": raw["hidden_activation"]}, where, layer_type),
        family="gemma2",
        post_norms=True,
        query_scale=positive(raw, "query_pre_attn_scalar", where) ** -0.5,
        attention_cap=cap(raw, "attn_logit_softcapping", where),
        logit_cap=cap(raw, "final_logit_softcapping", where),
    )


def _gemma3(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    # transformers does not apply the cap of the attention scores of a Gemma 3 configuration.
    return replace(
        _gemma2(raw, where, "full_attention"),
        family="gemma3_text",
        other_rope=read_rope(raw, where, layer_type="sliding_attention"),
        qk_norm=True,
        attention_cap=None,
    )


def _olmo2(raw: Mapping[str, Any], where: str, layer_type: str | None = None) -> DecoderConfig:
    return replace(
        _llama(raw, where, layer_type=layer_type),
        family="olmo2",
        norm="rms_float32",
        pre_norms=False,
        post_norms=True,
        mlp_bias=False,
        joint_qk_norm=True,
    )


def _olmo3(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    olmo2, other = _olmo2(raw, where, "full_attention"), read_rope(raw, where, layer_type="sliding_attention")
    return replace(olmo2, family="olmo3", other_rope=None if other == olmo2.rope else other)


def _smollm3(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_without_rope(_llama(raw, where)), family="smollm3")


def _without_rope(llama: DecoderConfig) -> DecoderConfig:
    """With layers that have no rotary positions."""
    assert llama.rope is not None, "_llama always sets rope"
    return replace(llama, other_rope=replace(llama.rope, kind="none"))


def _exaone4(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    llama = _llama(raw, where)
    # Without sliding windows, every layer has rotary positions.
    llama = llama if raw.get("sliding_window") is None else _without_rope(llama)
    plain = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    return replace(llama, family="exaone4", pre_norms=False, post_norms=True, qk_norm=True, **plain)


def _seed_oss(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_llama(raw, where), family="seed_oss", output_bias=bool(raw["attention_out_bias"]))


def _starcoder2(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    biases = dict.fromkeys(("attention_bias", "mlp_bias"), raw["use_bias"])
    llama = _llama({**raw, **biases, "rms_norm_eps": raw["norm_epsilon"]}, where)
    return replace(llama, family="starcoder2", norm="layer", norm_bias=True, gated=False)


def _stablelm(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    if raw["qk_layernorm"]:
        raise InputError(f"{where}: qk_layernorm is not supported: every head has a norm of its own")
    llama = _llama({**raw, "rms_norm_eps": raw["layer_norm_eps"]}, where, partial_rope=True)
    parallel = bool(raw["use_parallel_residual"])
    plain = {"qkv_bias": bool(raw["use_qkv_bias"]), "output_bias": False, "mlp_bias": False}
    norms = {"norm": "layer", "norm_bias": True, "parallel": parallel, "shared_norm": parallel}
    return replace(llama, family="stablelm", **plain, **norms)


def _cohere2(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    llama = _llama({**raw, "rms_norm_eps": raw["layer_norm_eps"]}, where)
    assert llama.rope is not None, "_llama always sets rope"
    return replace(
        _without_rope(replace(llama, rope=replace(llama.rope, interleaved=True))),
        family="cohere2",
        norm="layer",
        parallel=True,
        shared_norm=True,
        mlp_bias=False,
        logit_scale=positive(raw, "logit_scale", where),
    )


def _granite(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(
        _llama(raw, where),
        family="granite",
        embedding_scale=positive(raw, "embedding_multiplier", where),
        query_scale=positive(raw, "attention_multiplier", where),
        residual_scale=positive(raw, "residual_multiplier", where),
        logit_scale=1.0 / positive(raw, "logits_scaling", where),
    )


def _baichuan(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_llama(raw, where), family="baichuan", rope=None, alibi_heads=raw["num_attention_heads"])


def _glm(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    llama = _llama(raw, where, partial_rope=True)
    assert llama.rope is not None, "_llama always sets rope"
    rope = replace(llama.rope, interleaved=True)
    return replace(llama, family="glm", rope=rope, output_bias=False, mlp_bias=False)


def _glm4(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_glm(raw, where), family="glm4", post_norms=True)


def _phi(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    if raw["qk_layernorm"]:
        raise InputError(f"{where}: qk_layernorm is not supported in a phi model")
    llama = _llama({**raw, "rms_norm_eps": raw["layer_norm_eps"]}, where, partial_rope=True)
    if llama.tie_embeddings:
        raise InputError(f"{where}: tie_word_embeddings is not supported in a phi model, whose head has a bias")
    biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "head_bias", "norm_bias"), True)
    return replace(llama, family="phi", norm="layer", gated=False, parallel=True, shared_norm=True, **biases)


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
        activation=activation(raw["activation_function"], where),
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
        norm_epsilon=positive(raw, "layer_norm_epsilon", where),
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
        norm_epsilon=positive(raw, "layer_norm_eps", where),
        rope=read_rope(raw, where, partial=True),
        norm="layer",
        norm_bias=True,
        parallel=bool(raw["use_parallel_residual"]),
        activation=activation(raw["hidden_act"], where),
        gated=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        tie_embeddings=bool(raw["tie_word_embeddings"]),
    )


def _softmax_routing(raw: Mapping[str, Any], where: str, **more: Any) -> Routing:
    renormalised = bool(raw.get("norm_topk_prob", True))
    return Routing(whole(raw, "num_experts_per_tok", where), renormalised=renormalised, **more)


def _mixtral(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_mistral(raw, where), family="mixtral", routing=_softmax_routing(raw, where))


def _qwen2_moe(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    routing = _softmax_routing(raw, where, shared_gate=True)
    return replace(_mistral(raw, where), family="qwen2_moe", qkv_bias=bool(raw["qkv_bias"]), routing=routing)


def _qwen3_moe(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    return replace(_qwen3(raw, where), family="qwen3_moe", routing=_softmax_routing(raw, where))


def _olmoe(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    if raw.get("clip_qkv") is not None:
        raise InputError(f"{where}: clip_qkv is not supported: queries, keys and values would be clipped")
    llama = replace(_llama(raw, where), family="olmoe", mlp_bias=False, joint_qk_norm=True)
    return replace(llama, routing=_softmax_routing(raw, where))


def _gpt_oss(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    # The softmax of the chosen logits is that of all logits, renormalised over the chosen ones.
    limit, slope = positive(raw, "swiglu_limit", where), positive(raw, "swiglu_alpha", where)
    routing = Routing(
        whole(raw, "num_experts_per_tok", where), router_bias=True, expert_bias=True, limit=limit, slope=slope
    )
    return replace(_llama(raw, where), family="gpt_oss", mlp_bias=False, sinks=True, routing=routing)


def _glm4_moe(raw: Mapping[str, Any], where: str) -> DecoderConfig:
    routing = Routing(
        whole(raw, "num_experts_per_tok", where),
        scores="sigmoid",
        renormalised=bool(raw["norm_topk_prob"]),
        scale=positive(raw, "routed_scaling_factor", where),
        groups=whole(raw, "n_group", where),
        chosen_groups=whole(raw, "topk_group", where),
        choice_bias=True,
    )
    if raw["n_routed_experts"] % routing.groups or routing.chosen_groups > routing.groups:
        raise InputError(
            f"{where}: n_routed_experts {raw['n_routed_experts']} must be a multiple of n_group {routing.groups}, and "
            f"topk_group {routing.chosen_groups} at most n_group"
        )
    llama = replace(_llama(raw, where, partial_rope=True), family="glm4_moe", output_bias=False, mlp_bias=False)
    return replace(llama, qk_norm=bool(raw["use_qk_norm"]), routing=routing)


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, "LLaMA 1 to 3.2, Vicuna, TinyLlama, SmolLM 1 and 2"),
    "mistral": Family(_mistral, "Mistral", windows="all"),
    "ministral3": Family(_ministral3, "Mistral 3: Ministral 3B to 14B", windows="all"),
    "qwen2": Family(_qwen2, "Qwen 2, 2.5", windows="layer_types"),
    "qwen3": Family(_qwen3, "Qwen 3", windows="layer_types"),
    "gemma": Family(_gemma, "Gemma 1"),
    "gemma2": Family(_gemma2, "Gemma 2", windows="layer_types"),
    "gemma3_text": Family(_gemma3, "Gemma 3", windows="layer_types", other_rope="sliding_attention", rope_by_type=True),
    "olmo2": Family(_olmo2, "OLMo 2"),
    "olmo3": Family(_olmo3, "OLMo 3", windows="layer_types", other_rope="sliding_attention", rope_by_type=True),
    "smollm3": Family(_smollm3, "SmolLM 3", windows="layer_types", other_rope="no_rope_layers"),
    "granite": Family(_granite, "Granite 3"),
    "exaone4": Family(_exaone4, "EXAONE 4", windows="layer_types", other_rope="full_attention"),
    "cohere2": Family(_cohere2, "Command R7B, Command A", windows="layer_types", other_rope="full_attention"),
    "seed_oss": Family(_seed_oss, "Seed-OSS"),
    "starcoder2": Family(_starcoder2, "StarCoder 2", windows="all"),
    "stablelm": Family(_stablelm, "StableLM"),
    "baichuan": Family(_baichuan, "Baichuan 1 and 2", defaults="llama"),
    "opt": Family(_opt, "OPT", kv_heads=None, width="ffn_dim"),
    "bloom": Family(_bloom, "BLOOM", heads="n_head", kv_heads=None, layers="n_layer"),
    "gpt_neox": Family(_gpt_neox, "GPT-NeoX, Pythia", kv_heads=None),
    "glm": Family(_glm, "GLM 4 of 2024, ChatGLM 2 and 3"),
    "glm4": Family(_glm4, "GLM 4 of 2025"),
    "phi": Family(_phi, "Phi 1, 1.5 and 2"),
    "phi3": Family(_phi3, "Phi 3, 3.5 and 4", windows="all"),
    "mixtral": Family(
        _mixtral, "Mixtral", windows="all", experts=("num_local_experts",), expert_width="intermediate_size"
    ),
    "qwen2_moe": Family(
        _qwen2_moe,
        "Qwen 1.5 MoE, Qwen 2 MoE",
        windows="layer_types",
        experts=("num_experts",),
        shared=SHARED_WIDTH,
        dense_layers="mlp_only_layers",
    ),
    "qwen3_moe": Family(
        _qwen3_moe,
        "Qwen 3 MoE",
        windows="all",
        experts=("num_local_experts", "num_experts"),
        dense_layers="mlp_only_layers",
    ),
    "olmoe": Family(_olmoe, "OLMoE", experts=("num_experts",), expert_width="intermediate_size"),
    "gpt_oss": Family(
        _gpt_oss, "gpt-oss", windows="layer_types", experts=("num_local_experts",), expert_width="intermediate_size"
    ),
    "glm4_moe": Family(
        _glm4_moe,
        "GLM 4.5, 4.6",
        experts=("n_routed_experts",),
        shared=SHARED_EXPERTS,
        dense_layers="first_k_dense_replace",
    ),
}

# Well-known families that are not supported, and the reason.
NOT_SUPPORTED = {
    "llama4": "mixture of experts, and attention in chunks",
    "llama4_text": "mixture of experts, and attention in chunks",
    "gpt2": "matrices stored transposed, with queries, keys and values side by side",
    "falcon": "three layouts of fused queries, keys and values by version",
    "mpt": "clipped queries, keys and values, and keys of config.json of its own",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
}
