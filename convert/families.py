"""One table a family: Hugging Face name and axes ↔ our path, and what official checkpoints carry besides.

Axes are written as in `minillm_jax.model.axis_table`, one word for each axis of the stored tensor: `"NH D"` is a
matrix of N * H rows and D columns. Our own axes for the same letters stand in the table of axes, so a rule implies its
transposition and its reshaping. A rule with several parts is a fused tensor: its parts lie below each other, or,
interleaved, are so within each head.
"""

from dataclasses import dataclass, replace

from minillm_jax.model import axis_table


@dataclass(frozen=True)
class Part:
    """One of our arrays in a stored tensor: its axes there, and its path in the decoder."""

    axes: str
    path: str


@dataclass(frozen=True)
class Rule:
    """One stored tensor: its name (in a block after the prefix of the layer), and the arrays of ours that it holds."""

    name: str
    parts: tuple[Part, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class FamilyTable:
    """The rules of a family, and which pruned shapes its stock class can hold.

    Attributes:
      stem: how transformers' class names of the family begin.
      outer: rules of the arrays outside the layers.
      layer: how the names of a layer's tensors begin.
      block: rules of the arrays of one layer.
      prefix: how the names of the decoder begin; some official checkpoints leave it out, which is accepted.
      head: name of the head's tensor.
      head_elsewhere: another name of it: `transformers` renames it when it saves and loads its own classes.
      harmless: patterns of whole names that official checkpoints carry and that hold no weights.
      stock_heads: head counts of the stock class: `any`, those that `divide` the hidden size, or the `dense` one only,
        because the class computes the head size as hidden size / heads.
      stock_width: whether the stock class takes any MLP width.
    """

    stem: str
    outer: tuple[Rule, ...]
    layer: str
    block: tuple[Rule, ...]
    prefix: str
    head: str = "lm_head.weight"
    head_elsewhere: str | None = None
    harmless: tuple[str, ...] = ()
    stock_heads: str = "any"
    stock_width: bool = True


def array(name: str, axes: str, path: str) -> tuple[Rule, ...]:
    """The rule of one tensor that is one array."""
    return (Rule(name, (Part(axes, path),)),)


def linear(name: str, path: str, bias: bool = True) -> tuple[Rule, ...]:
    """Weight (and bias) of a `torch.nn.Linear`, which stores outputs before inputs."""
    inputs, outputs = (axis_table.BLOCK_AXES | axis_table.OUTER_AXES)[f"{path}.kernel"].split()
    weight = array(f"{name}.weight", f"{outputs} {inputs}", f"{path}.kernel")
    return weight + (array(f"{name}.bias", outputs, f"{path}.bias") if bias else ())


def fused(name: str, *paths: str, interleaved: bool = False) -> tuple[Rule, ...]:
    """Weight and bias of a `torch.nn.Linear` that holds several of our matrices."""
    kinds = zip(*(linear(name, path) for path in paths), strict=True)  # the weights, the biases
    return tuple(Rule(kind[0].name, tuple(rule.parts[0] for rule in kind), interleaved) for kind in kinds)


def norm(name: str, path: str) -> tuple[Rule, ...]:
    """Weight and bias of a norm."""
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


def _llama_like(stem: str, *block: Rule, stock_heads: str = "any") -> FamilyTable:
    """The many families whose model is laid out as Llama's."""
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
        # Rotary frequencies that transformers stored as buffers until 4.32; they follow from the configuration.
        harmless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
        stock_heads=stock_heads,
    )


LLAMA = _llama_like("Llama", *LLAMA_NORMS, *SEPARATE_QKV, *LLAMA_MLP, stock_heads="divide")

MISTRAL = _llama_like("Mistral", *LLAMA_NORMS, *SEPARATE_QKV, *LLAMA_MLP)

QWEN3 = _llama_like(
    "Qwen3",
    *LLAMA_NORMS,
    *SEPARATE_QKV,
    *array("self_attn.q_norm.weight", "H", "attention.q_norm.scale"),
    *array("self_attn.k_norm.weight", "H", "attention.k_norm.scale"),
    *LLAMA_MLP,
)

GEMMA2 = _llama_like(
    "Gemma2",
    *norm("input_layernorm", "attention_norm"),
    *array("post_attention_layernorm.weight", "D", "attention_post_norm.scale"),
    *norm("pre_feedforward_layernorm", "mlp_norm"),
    *array("post_feedforward_layernorm.weight", "D", "mlp_post_norm.scale"),
    *SEPARATE_QKV,
    *LLAMA_MLP,
    stock_heads="divide",
)

GLM = _llama_like("Glm", *LLAMA_NORMS, *SEPARATE_QKV, *FUSED_MLP)

GLM4 = _llama_like(
    "Glm4",
    *LLAMA_NORMS,
    *array("post_self_attn_layernorm.weight", "D", "attention_post_norm.scale"),
    *array("post_mlp_layernorm.weight", "D", "mlp_post_norm.scale"),
    *SEPARATE_QKV,
    *FUSED_MLP,
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
    head_elsewhere="lm_head.weight",
    # Causal masks and rotary frequencies that transformers stored as buffers.
    harmless=(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
    ),
    stock_heads="dense",
)

TABLES: dict[str, FamilyTable] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": replace(MISTRAL, stem="Qwen2"),
    "qwen3": QWEN3,
    "gemma": replace(MISTRAL, stem="Gemma"),
    "gemma2": GEMMA2,
    "opt": OPT,
    "bloom": BLOOM,
    "gpt_neox": GPT_NEOX,
    "glm": GLM,
    "glm4": GLM4,
    "phi3": PHI3,
}
