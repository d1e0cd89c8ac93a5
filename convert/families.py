"""Rule tables, one per family: Hugging Face tensor name and axes ↔ path of a decoder array.

A rule writes axes as `minillm_jax.model.axis_table` does, one word per axis of the stored tensor: `"NH D"` is a matrix
of N * H rows and D columns. The axis table lists the axes of the decoder array by the same letters, so a rule implies
its transposition and its reshaping. A rule with several parts describes a fused projection: the parts are concatenated
along the first axis, or, when interleaved, along the rows of each head.
"""

from dataclasses import dataclass, replace

from minillm_jax.model import axis_table


@dataclass(frozen=True)
class Part:
    """A decoder array inside a stored tensor: its axes in the tensor, and its path in the decoder."""

    axes: str
    path: str


@dataclass(frozen=True)
class Rule:
    """A stored tensor and the decoder arrays that it holds.

    Attributes:
      name: in a layer without the layer's prefix; with a field `{expert}` where every expert has a tensor of its own.
      parts: the arrays. An expert's part lacks the axis X.
      interleaved: whether the parts are concatenated along the rows of each head.
      alternating: whether the elements of the parts alternate along the last axis.
      layers: the layers with the tensor, of a family with a mixture of experts: `all`, `dense` or `experts`.
    """

    name: str
    parts: tuple[Part, ...]
    interleaved: bool = False
    alternating: bool = False
    layers: str = "all"


@dataclass(frozen=True)
class FamilyTable:
    """The rules of a family and the pruned shapes that its stock class accepts.

    Attributes:
      stem: prefix of the family's class names in transformers, `Llama` of `LlamaForCausalLM`.
      outer: rules of the arrays outside the layers.
      layer: prefix of the tensor names of a layer, with a field `{layer}` for its number.
      block: rules of the arrays of one layer.
      prefix: prefix of the decoder's tensor names; the reader accepts names without it, as some official checkpoints
        have them.
      head: name of the tensor of the language-model head.
      head_alias: second name of that tensor, where transformers renames it as it loads and saves its own classes.
      ignored: regular expressions of the full names of buffers in official checkpoints, which hold no weights.
      stock_heads: head counts that the stock class accepts: `any`; `divide`, the divisors of the hidden size; or
        `dense`, only the original count, because the class computes the head size as hidden size / heads.
      stock: whether transformers has a class of the family.
      stock_width: whether the stock class accepts every MLP width.
      stock_scale: whether the stock class scales the embedding by the square root of the hidden size.
    """

    stem: str
    outer: tuple[Rule, ...]
    layer: str
    block: tuple[Rule, ...]
    prefix: str
    head: str = "lm_head.weight"
    head_alias: str | None = None
    ignored: tuple[str, ...] = ()
    stock_heads: str = "any"
    stock: bool = True
    stock_width: bool = True
    stock_scale: bool = False


def array(name: str, axes: str, path: str) -> tuple[Rule, ...]:
    """The rule of a tensor that holds one whole array."""
    return (Rule(name, (Part(axes, path),)),)


def linear(name: str, path: str, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a `torch.nn.Linear`: its weight, stored [outputs, inputs], and its bias."""
    inputs, outputs = (axis_table.BLOCK_AXES | axis_table.OUTER_AXES)[f"{path}.kernel"].split()
    weight = array(f"{name}.weight", f"{outputs} {inputs}", f"{path}.kernel")
    return weight + (array(f"{name}.bias", outputs, f"{path}.bias") if bias else ())


def fused(name: str, *paths: str, interleaved: bool = False) -> tuple[Rule, ...]:
    """The rules of a `torch.nn.Linear` that holds several of the decoder's matrices: its weight and its bias."""
    weights, biases = zip(*(linear(name, path) for path in paths), strict=True)
    return tuple(
        Rule(rules[0].name, tuple(rule.parts[0] for rule in rules), interleaved) for rules in (weights, biases)
    )


def alternating(name: str, axes: str, *paths: str) -> tuple[Rule, ...]:
    """The rule of a tensor along whose last axis the elements of several arrays alternate."""
    return (Rule(name, tuple(Part(axes, path) for path in paths), alternating=True),)


def norm(name: str, path: str) -> tuple[Rule, ...]:
    """The rules of a norm: its weight (our scale) and its bias."""
    axes = (axis_table.BLOCK_AXES | axis_table.OUTER_AXES)[f"{path}.scale"]
    return array(f"{name}.weight", axes, f"{path}.scale") + array(f"{name}.bias", axes, f"{path}.bias")


QKV = ("attention.q", "attention.k", "attention.v")

SEPARATE_QKV = tuple(rule for letter in "qkv" for rule in linear(f"self_attn.{letter}_proj", f"attention.{letter}"))

LLAMA_MLP = (
    *linear("mlp.gate_proj", "mlp.gate"),
    *linear("mlp.up_proj", "mlp.up"),
    *linear("mlp.down_proj", "mlp.down"),
)

FUSED_MLP = (*fused("mlp.gate_up_proj", "mlp.gate", "mlp.up"), *linear("mlp.down_proj", "mlp.down"))

LLAMA_NORMS = (*norm("input_layernorm", "attention_norm"), *norm("post_attention_layernorm", "mlp_norm"))


def _llama_like(stem: str, *block: Rule, stock_heads: str = "any", stock_scale: bool = False) -> FamilyTable:
    """The table of a family whose tensor names follow Llama's."""
    return FamilyTable(
        stem=stem,
        prefix="model.",
        outer=(
            *array("model.embed_tokens.weight", "V E", "embedding"),
            *norm("model.norm", "final_norm"),
            *linear("lm_head", "head", bias=False),
        ),
        layer="model.layers.{layer}.",
        block=(*block, *linear("self_attn.o_proj", "attention.o")),
        # transformers stored the rotary frequencies as buffers until 4.32; the configuration determines them.
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
        stock_heads=stock_heads,
        stock_scale=stock_scale,
    )


LLAMA = _llama_like("Llama", *LLAMA_NORMS, *SEPARATE_QKV, *LLAMA_MLP, stock_heads="divide")

MISTRAL = _llama_like("Mistral", *LLAMA_NORMS, *SEPARATE_QKV, *LLAMA_MLP)

QK_NORMS = (
    *array("self_attn.q_norm.weight", "H", "attention.q_norm.scale"),
    *array("self_attn.k_norm.weight", "H", "attention.k_norm.scale"),
)

QWEN3 = _llama_like("Qwen3", *LLAMA_NORMS, *SEPARATE_QKV, *QK_NORMS, *LLAMA_MLP)

POST_NORMS = (
    *array("post_attention_layernorm.weight", "D", "attention_post_norm.scale"),
    *array("post_feedforward_layernorm.weight", "D", "mlp_post_norm.scale"),
)

GEMMA2 = _llama_like(
    "Gemma2",
    *norm("input_layernorm", "attention_norm"),
    *norm("pre_feedforward_layernorm", "mlp_norm"),
    *POST_NORMS,
    *SEPARATE_QKV,
    *LLAMA_MLP,
    stock_heads="divide",
    stock_scale=True,
)

GEMMA3 = replace(GEMMA2, stem="Gemma3", block=(*GEMMA2.block, *QK_NORMS))

# The norms of OLMo's queries and keys are over all heads together.
JOINT_QK_NORMS = (
    *array("self_attn.q_norm.weight", "NH", "attention.q_joint_norm.scale"),
    *array("self_attn.k_norm.weight", "KH", "attention.k_joint_norm.scale"),
)

OLMO2 = _llama_like("Olmo2", *POST_NORMS, *SEPARATE_QKV, *JOINT_QK_NORMS, *LLAMA_MLP)

GLM = _llama_like("Glm", *LLAMA_NORMS, *SEPARATE_QKV, *FUSED_MLP)

GLM4 = _llama_like(
    "Glm4",
    *LLAMA_NORMS,
    *array("post_self_attn_layernorm.weight", "D", "attention_post_norm.scale"),
    *array("post_mlp_layernorm.weight", "D", "mlp_post_norm.scale"),
    *SEPARATE_QKV,
    *FUSED_MLP,
)

PHI = FamilyTable(
    stem="Phi",
    prefix="model.",
    outer=(
        *array("model.embed_tokens.weight", "V E", "embedding"),
        *norm("model.final_layernorm", "final_norm"),
        *linear("lm_head", "head"),
    ),
    layer="model.layers.{layer}.",
    block=(
        *norm("input_layernorm", "attention_norm"),
        *SEPARATE_QKV,
        *linear("self_attn.dense", "attention.o"),
        *linear("mlp.fc1", "mlp.up"),
        *linear("mlp.fc2", "mlp.down"),
    ),
    # transformers stored the rotary frequencies as buffers until 4.32.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)

PHI3 = _llama_like("Phi3", *LLAMA_NORMS, *fused("self_attn.qkv_proj", *QKV), *FUSED_MLP)

OPT = FamilyTable(
    stem="OPT",
    prefix="model.",
    outer=(
        *array("model.decoder.embed_tokens.weight", "V E", "embedding"),
        *array("model.decoder.embed_positions.weight", "M D", "position_embedding"),
        *linear("model.decoder.project_in", "project_in", bias=False),
        *norm("model.decoder.final_layer_norm", "final_norm"),
        *linear("model.decoder.project_out", "project_out", bias=False),
        *linear("lm_head", "head", bias=False),
    ),
    layer="model.decoder.layers.{layer}.",
    block=(
        *norm("self_attn_layer_norm", "attention_norm"),
        *SEPARATE_QKV,
        *linear("self_attn.out_proj", "attention.o"),
        *norm("final_layer_norm", "mlp_norm"),
        *linear("fc1", "mlp.up"),
        *linear("fc2", "mlp.down"),
    ),
    stock_heads="dense",
)

BLOOM = FamilyTable(
    stem="Bloom",
    prefix="transformer.",
    outer=(
        *array("transformer.word_embeddings.weight", "V E", "embedding"),
        *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        *norm("transformer.ln_f", "final_norm"),
        *linear("lm_head", "head", bias=False),
    ),
    layer="transformer.h.{layer}.",
    block=(
        *norm("input_layernorm", "attention_norm"),
        *fused("self_attention.query_key_value", *QKV, interleaved=True),
        *linear("self_attention.dense", "attention.o"),
        *norm("post_attention_layernorm", "mlp_norm"),
        *linear("mlp.dense_h_to_4h", "mlp.up"),
        *linear("mlp.dense_4h_to_h", "mlp.down"),
    ),
    stock_heads="dense",
    stock_width=False,
)

GPT_NEOX = FamilyTable(
    stem="GPTNeoX",
    prefix="gpt_neox.",
    outer=(
        *array("gpt_neox.embed_in.weight", "V E", "embedding"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        *linear("embed_out", "head", bias=False),
    ),
    layer="gpt_neox.layers.{layer}.",
    block=(
        *norm("input_layernorm", "attention_norm"),
        *fused("attention.query_key_value", *QKV, interleaved=True),
        *linear("attention.dense", "attention.o"),
        *norm("post_attention_layernorm", "mlp_norm"),
        *linear("mlp.dense_h_to_4h", "mlp.up"),
        *linear("mlp.dense_4h_to_h", "mlp.down"),
    ),
    head="embed_out.weight",
    head_alias="lm_head.weight",
    # transformers stored causal masks and rotary frequencies as buffers.
    ignored=(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
    ),
    stock_heads="dense",
)

EXAONE4 = _llama_like("Exaone4", *POST_NORMS, *SEPARATE_QKV, *QK_NORMS, *LLAMA_MLP)

COHERE2 = _llama_like("Cohere2", *norm("input_layernorm", "attention_norm"), *SEPARATE_QKV, *LLAMA_MLP)

STARCODER2 = _llama_like(
    "Starcoder2", *LLAMA_NORMS, *SEPARATE_QKV, *linear("mlp.c_fc", "mlp.up"), *linear("mlp.c_proj", "mlp.down")
)

# Llama with ALiBi. transformers has no class for it; the classes of `modeling_pruned` have the tensors of Llama.
BAICHUAN = replace(LLAMA, stem="Baichuan", stock=False)

# The official layouts of models whose code stands outside transformers (`convert.official`).
OFFICIAL_BAICHUAN = _llama_like("Baichuan", *LLAMA_NORMS, *fused("self_attn.W_pack", *QKV), *LLAMA_MLP)

OFFICIAL_CHATGLM = FamilyTable(
    stem="ChatGLM",
    prefix="transformer.",
    outer=(
        *array("transformer.embedding.word_embeddings.weight", "V E", "embedding"),
        *norm("transformer.encoder.final_layernorm", "final_norm"),
        *linear("transformer.output_layer", "head", bias=False),
    ),
    layer="transformer.encoder.layers.{layer}.",
    block=(
        *LLAMA_NORMS,
        *fused("self_attention.query_key_value", *QKV),
        *linear("self_attention.dense", "attention.o"),
        *fused("mlp.dense_h_to_4h", "mlp.gate", "mlp.up"),
        *linear("mlp.dense_4h_to_h", "mlp.down"),
    ),
    head="transformer.output_layer.weight",
    ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
)


def _of_layers(layers: str, *rules: Rule) -> tuple[Rule, ...]:
    """The rules for the layers that a mixture of experts has (`experts`), or for all others (`dense`)."""
    return tuple(replace(rule, layers=layers) for rule in rules)


def _router(name: str) -> tuple[Rule, ...]:
    weight = array(f"{name}.weight", "X D", "experts.router")
    bias, choice = ("experts.router_bias", "bias"), ("experts.choice_bias", "e_score_correction_bias")
    return weight + tuple(rule for path, leaf in (bias, choice) for rule in array(f"{name}.{leaf}", "X", path))


def _each_expert(prefix: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The rules of experts with three `torch.nn.Linear` each."""
    stored = ((gate, "W D", "gate"), (up, "W D", "up"), (down, "D W", "down"))
    rules = [array(f"{prefix}.{{expert}}.{name}.weight", axes, f"experts.{path}") for name, axes, path in stored]
    return tuple(rule for one in rules for rule in one)


def _shared_expert(prefix: str) -> tuple[Rule, ...]:
    return tuple(rule for name in ("gate", "up", "down") for rule in linear(f"{prefix}.{name}_proj", f"mlp.{name}"))


def _mixture(stem: str, *block: Rule, stock_heads: str = "any") -> FamilyTable:
    """The table of a family with a mixture of experts whose other tensor names follow Llama's."""
    return _llama_like(stem, *LLAMA_NORMS, *SEPARATE_QKV, *block, stock_heads=stock_heads)


EXPERTS = _each_expert("mlp.experts", "gate_proj", "up_proj", "down_proj")

MIXTRAL = _mixture(
    "Mixtral",
    *_of_layers(
        "experts", *_router("block_sparse_moe.gate"), *_each_expert("block_sparse_moe.experts", "w1", "w3", "w2")
    ),
)

QWEN2_MOE = _mixture(
    "Qwen2Moe",
    *_of_layers("dense", *LLAMA_MLP),
    *_of_layers(
        "experts",
        *_router("mlp.gate"),
        *EXPERTS,
        *_shared_expert("mlp.shared_expert"),
        *array("mlp.shared_expert_gate.weight", "1 D", "experts.shared_gate"),
    ),
)

QWEN3_MOE = _mixture(
    "Qwen3Moe", *QK_NORMS, *_of_layers("dense", *LLAMA_MLP), *_of_layers("experts", *_router("mlp.gate"), *EXPERTS)
)

OLMOE = _mixture("Olmoe", *JOINT_QK_NORMS, *_of_layers("experts", *_router("mlp.gate"), *EXPERTS), stock_heads="dense")

GPT_OSS = _mixture(
    "GptOss",
    *array("self_attn.sinks", "N", "attention.sinks"),
    *_of_layers(
        "experts",
        *_router("mlp.router"),
        *alternating("mlp.experts.gate_up_proj", "X D W", "experts.gate", "experts.up"),
        *alternating("mlp.experts.gate_up_proj_bias", "X W", "experts.gate_bias", "experts.up_bias"),
        *array("mlp.experts.down_proj", "X W D", "experts.down"),
        *array("mlp.experts.down_proj_bias", "X D", "experts.down_bias"),
    ),
)

GLM4_MOE = replace(
    _mixture(
        "Glm4Moe",
        *QK_NORMS,
        *_of_layers("dense", *LLAMA_MLP),
        *_of_layers("experts", *_router("mlp.gate"), *EXPERTS, *_shared_expert("mlp.shared_experts")),
    ),
    # The layer that predicts a second token stands behind the last one. transformers leaves it out too.
    ignored=(r"model\.layers\.(46|92)\..*",),
)

TABLES: dict[str, FamilyTable] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral3": replace(MISTRAL, stem="Ministral3"),
    "qwen2": replace(MISTRAL, stem="Qwen2"),
    "qwen3": QWEN3,
    "gemma": replace(MISTRAL, stem="Gemma", stock_scale=True),
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, stem="Olmo3"),
    "smollm3": replace(MISTRAL, stem="SmolLM3"),
    "granite": replace(MISTRAL, stem="Granite"),
    "exaone4": EXAONE4,
    "cohere2": COHERE2,
    "seed_oss": replace(MISTRAL, stem="SeedOss"),
    "starcoder2": STARCODER2,
    "stablelm": replace(MISTRAL, stem="StableLm", stock_heads="dense"),
    "baichuan": BAICHUAN,
    "opt": OPT,
    "bloom": BLOOM,
    "gpt_neox": GPT_NEOX,
    "glm": GLM,
    "glm4": GLM4,
    "phi": PHI,
    "phi3": PHI3,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "gpt_oss": GPT_OSS,
    "glm4_moe": GLM4_MOE,
}
