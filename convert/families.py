"""One table a family: Hugging Face name and axes ↔ our path, and what official checkpoints carry besides.

Axes are written as in `minillm_jax.groups`, one word for each axis of the stored tensor: `"NH D"` is a matrix of
N * H rows and D columns. Our own axes for the same letters stand in the table of groups, so a rule implies its
transposition and its reshaping.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One stored tensor: its name (`{layer}` where a layer number stands), its axes, and our array."""

    name: str
    axes: str
    path: str


@dataclass(frozen=True)
class FamilyTable:
    """The rules of a family.

    Attributes:
      outer: rules of the arrays outside the layers.
      block: rules of the arrays of one layer.
      prefix: how the names of the decoder begin; some official checkpoints leave it out, which is accepted.
      harmless: patterns of whole names that official checkpoints carry and that hold no weights.
      tied_copy: the name under which a tied checkpoint may repeat the embedding.
    """

    outer: tuple[Rule, ...]
    block: tuple[Rule, ...]
    prefix: str
    harmless: tuple[str, ...]
    tied_copy: str


LLAMA = FamilyTable(
    prefix="model.",
    outer=(
        Rule("model.embed_tokens.weight", "V D", "embedding"),
        Rule("model.norm.weight", "D", "final_norm.scale"),
        Rule("lm_head.weight", "V D", "head.kernel"),
    ),
    block=(
        Rule("model.layers.{layer}.input_layernorm.weight", "D", "attention_norm.scale"),
        Rule("model.layers.{layer}.self_attn.q_proj.weight", "NH D", "attention.q.kernel"),
        Rule("model.layers.{layer}.self_attn.q_proj.bias", "NH", "attention.q.bias"),
        Rule("model.layers.{layer}.self_attn.k_proj.weight", "KH D", "attention.k.kernel"),
        Rule("model.layers.{layer}.self_attn.k_proj.bias", "KH", "attention.k.bias"),
        Rule("model.layers.{layer}.self_attn.v_proj.weight", "KH D", "attention.v.kernel"),
        Rule("model.layers.{layer}.self_attn.v_proj.bias", "KH", "attention.v.bias"),
        Rule("model.layers.{layer}.self_attn.o_proj.weight", "D NH", "attention.o.kernel"),
        Rule("model.layers.{layer}.self_attn.o_proj.bias", "D", "attention.o.bias"),
        Rule("model.layers.{layer}.post_attention_layernorm.weight", "D", "mlp_norm.scale"),
        Rule("model.layers.{layer}.mlp.gate_proj.weight", "F D", "mlp.gate.kernel"),
        Rule("model.layers.{layer}.mlp.gate_proj.bias", "F", "mlp.gate.bias"),
        Rule("model.layers.{layer}.mlp.up_proj.weight", "F D", "mlp.up.kernel"),
        Rule("model.layers.{layer}.mlp.up_proj.bias", "F", "mlp.up.bias"),
        Rule("model.layers.{layer}.mlp.down_proj.weight", "D F", "mlp.down.kernel"),
        Rule("model.layers.{layer}.mlp.down_proj.bias", "D", "mlp.down.bias"),
    ),
    # Rotary frequencies that transformers stored as buffers until 4.32; they follow from the configuration.
    harmless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
    tied_copy="lm_head.weight",
)

TABLES: dict[str, FamilyTable] = {"llama": LLAMA, "mistral": LLAMA}
