"""How a decoder computes, and its sizes, as data. `families` makes both from a Hugging Face configuration.

A `DecoderConfig` says how a decoder computes and which optional arrays it has. It holds no sizes: they are read from
the arrays, so that slicing leaves the configuration true. `Sizes` is only used to build a decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minillm_jax.model.ops import Rope


@dataclass(frozen=True)
class Routing:
    """How the router of a mixture of experts chooses experts for a token, and how the experts compute.

    Attributes:
      chosen: number of experts that compute a token.
      scores: of the experts, from the logits of the router: `softmax` or `sigmoid`.
      renormalised: whether the weights of the chosen experts are divided by their sum.
      scale: factor of the weights, after that.
      groups: number of groups of consecutive experts; a token chooses among the experts of the best groups.
      chosen_groups: number of groups that a token chooses among. The score of a group is the sum of its two best.
      router_bias: whether the router has biases (GPT-OSS).
      choice_bias: whether biases are added to the scores for the choice alone (GLM 4 MoE, DeepSeek 3).
      expert_bias: whether the experts have biases.
      shared_gate: whether the shared expert is multiplied by a sigmoid of its own (Qwen 2 MoE).
      limit: bound of the gate and of the up projection; the channels are (up + 1) · gate · sigmoid(slope · gate)
        (GPT-OSS). None for the usual gated channels.
      slope: of that sigmoid.
    """

    chosen: int
    scores: str = "softmax"
    renormalised: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    router_bias: bool = False
    choice_bias: bool = False
    expert_bias: bool = False
    shared_gate: bool = False
    limit: float | None = None
    slope: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """How a decoder computes. It is hashable, as a static argument of `jax.jit` must be.

    Attributes:
      family: the Hugging Face model type.
      norm_epsilon: epsilon of every norm.
      rope: rotary positions, or None.
      other_rope: the rotary positions of some layers, which hold that as data (Gemma 3: those with a window; SmolLM 3:
        the layers without rotary positions); None where all layers have `rope`.
      norm: kind of all norms: `rms`, `rms_float32`, `rms_plus_one` or `layer`.
      norm_scale: whether norms have learned factors.
      norm_bias: whether norms have learned offsets.
      pre_norms: the norm of each sublayer's input, before its matrices; a model without them has `post_norms`.
      norm_after: the norm of each sublayer stands after its residual sum instead of before its matrices (OPT-350m).
      post_norms: a further norm of the output of each sublayer, before the residual sum (Gemma 2, GLM 4,
        OLMo 2).
      final_norm: whether there is a norm after the last layer.
      shared_norm: the MLP reads the stream through the norm of the attention sublayer (Cohere 2).
      parallel: both sublayers read the same residual stream (GPT-NeoX).
      residual_from_norm: the output of each sublayer is added to its normed input, not to its input (a BLOOM option).
      activation: activation of the MLP, a key of `ops.ACTIVATIONS`.
      gated: whether the MLP has a gate; without a gate it is down(activation(up(x))).
      qkv_bias: biases of the query, key and value projections.
      output_bias: bias of the output projection.
      mlp_bias: biases of the MLP.
      qk_norm: norms of each head's queries and keys (Qwen 3).
      joint_qk_norm: one norm of the queries of all heads together, and one of the keys (OLMo 2).
      sinks: whether every query head has a logit of its own that takes a part of the softmax (GPT-OSS).
      routing: of the layers with a mixture of experts; None for a model without experts. The MLP of such a layer is
        its shared expert, and has no channels in models without one.
      query_scale: factor of the attention scores; H^-1/2 when None.
      attention_cap: soft cap of the attention scores.
      logit_cap: soft cap of the logits.
      logit_scale: factor of the logits (Granite).
      residual_scale: factor of the output of each sublayer, before the residual sum (Granite).
      alibi_heads: number of heads of the dense model, from which the ALiBi slopes follow; each layer holds the slopes
        of its kept heads. None for a model without ALiBi.
      windowed: whether some layer has a sliding window; if so, every layer holds its window as data.
      position_offset: row of the first learned position; None for a model without learned positions.
      trained_length: positions that a model with rotary positions was trained for, scaled ones counted; None where the
        configuration does not say, or positions have no limit (ALiBi) or are learned.
      embedding_scale: factor of the embedding (Gemma: the square root of the dense model's hidden size; Granite).
      embedding_norm: whether there is a norm of the embedding (BLOOM).
      embedding_projection: whether the embedding is projected to the hidden size and back (OPT-350m).
      tie_embeddings: whether the embedding is also the head.
      head_bias: bias of a separate head (Phi 2).
      whole_layer: called with a layer before it computes, in a compiled program: brings the arrays of a layer together
        that several devices hold in parts (`devices.sharding.WholeLayer`); None where they are whole. It changes no
        number, and is no part of the text of a configuration.
    """

    family: str
    norm_epsilon: float
    rope: Rope | None
    other_rope: Rope | None = None
    norm: str = "rms"
    norm_scale: bool = True
    norm_bias: bool = False
    pre_norms: bool = True
    norm_after: bool = False
    post_norms: bool = False
    final_norm: bool = True
    shared_norm: bool = False
    parallel: bool = False
    residual_from_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    sinks: bool = False
    routing: Routing | None = None
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    logit_scale: float | None = None
    residual_scale: float | None = None
    alibi_heads: int | None = None
    windowed: bool = False
    position_offset: int | None = None
    trained_length: int | None = None
    embedding_scale: float | None = None
    embedding_norm: bool = False
    embedding_projection: bool = False
    tie_embeddings: bool = False
    head_bias: bool = False
    whole_layer: Callable[[Any], Any] | None = field(default=None, repr=False)

    def has_array(self, path: str) -> bool:
        """Whether a decoder of this configuration has the array of that name in the table of axes."""
        *parents, leaf = path.split(".")
        owner = ".".join(parents)
        present = {
            "position_embedding": self.position_offset is not None,
            "project_in": self.embedding_projection,
            "project_out": self.embedding_projection,
            "embedding_norm": self.embedding_norm,
            "final_norm": self.final_norm,
            "head": not self.tie_embeddings,
            "attention_norm": self.pre_norms,
            "mlp_norm": self.pre_norms and not self.shared_norm,
            "attention.q_norm": self.qk_norm,
            "attention.k_norm": self.qk_norm,
            "attention.q_joint_norm": self.joint_qk_norm,
            "attention.k_joint_norm": self.joint_qk_norm,
            "attention.window": self.windowed,
            "attention.rope": self.other_rope is not None,
            "attention.slopes": self.alibi_heads is not None,
            "attention.sinks": self.sinks,
            "attention_post_norm": self.post_norms,
            "mlp_post_norm": self.post_norms,
            "mlp.gate": self.gated,
        }
        if not present.get(owner, True) or not present.get(path, True):
            return False
        if owner == "experts":
            return self._has_expert_array(leaf)
        if leaf == "bias":
            return self._has_bias(owner)
        return self.norm_scale if leaf == "scale" else True

    def _has_expert_array(self, name: str) -> bool:
        routing = self.routing
        if routing is None:
            return False
        biases = dict.fromkeys(("gate_bias", "up_bias", "down_bias"), routing.expert_bias)
        optional = {"router_bias": routing.router_bias, "choice_bias": routing.choice_bias}
        return (biases | optional | {"shared_gate": routing.shared_gate}).get(name, True)

    def _has_bias(self, owner: str) -> bool:
        match owner.split("."):
            case ["attention", "q" | "k" | "v"]:
                return self.qkv_bias
            case ["attention", "o"]:
                return self.output_bias
            case ["mlp", _]:
                return self.mlp_bias
            case ["head"]:
                return self.head_bias
        return self.norm_bias and self.norm_scale


@dataclass(frozen=True)
class LayerSizes:
    """The sizes and data in which layers may differ.

    Attributes:
      N: number of query heads.
      K: number of key/value heads.
      F: MLP width; in a layer with a mixture of experts, that of its shared expert.
      window: sliding window in tokens; None for a layer without one.
      slopes: ALiBi slope of every query head; empty for a model without ALiBi.
      rope: 1 for a layer with the configuration's `other_rope`, else 0.
      X: number of experts; 0 for a layer without a mixture of experts.
      W: width of an expert.
    """

    N: int
    K: int
    F: int
    window: int | None = None
    slopes: tuple[float, ...] = ()
    rope: int = 0
    X: int = 0
    W: int = 0


@dataclass(frozen=True)
class Sizes:
    """All sizes of a decoder.

    Attributes:
      V: vocabulary.
      D: hidden size.
      H: head size.
      layers: the sizes of each layer.
      E: embedding size; None for D.
      M: number of learned positions.
    """

    V: int
    D: int
    H: int
    layers: tuple[LayerSizes, ...]
    E: int | None = None
    M: int = 0
