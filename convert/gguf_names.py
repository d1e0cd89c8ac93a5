"""The table of GGUF architectures: GGUF tensor ↔ Hugging Face tensor, GGUF key ↔ key of config.json, and the changes.

GGUF stores the tensors of a Hugging Face folder under other names, and some of their rows in another order. The table
is read in both directions. The names are those of the `gguf` package; the orders are those that llama.cpp computes
with (https://github.com/ggml-org/llama.cpp, `src/models`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

# A tensor of Hugging Face's layout and the head size -> GGUF's layout; or the other way round.
Change = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Stored:
    """A module whose tensors (weight, bias) both layouts hold.

    Attributes:
      gguf: name in GGUF, without `.weight` or `.bias`.
      hugging_face: name in a Hugging Face folder, without them.
      change: name of the change of the values, a key of `CHANGES`; None where both layouts hold the same values.
    """

    gguf: str
    hugging_face: str
    change: str | None = None


@dataclass(frozen=True)
class Routed:
    """What llama.cpp computes in the layers with experts of an architecture, and the keys of their sizes.

    Attributes:
      renormalised: whether it divides the weights of the chosen experts by their sum.
      width: GGUF key of the width of an expert.
      shared: GGUF key of the width of the shared expert, or of its multiple of that width; None without one.
      from_file: whether it reads from the file how the router computes, and how many first layers have no experts.
    """

    renormalised: bool = True
    width: str = "expert_feed_forward_length"
    shared: str | None = None
    from_file: bool = False


@dataclass(frozen=True)
class Arch:
    """An architecture of GGUF (`general.architecture`).

    Attributes:
      name: its name.
      family: the model type of Hugging Face.
      outer: the modules outside the layers.
      layer: prefix of the Hugging Face names of a layer, with a field `{layer}`; in GGUF it is `blk.{layer}.`.
      block: the modules of one layer.
      keys: GGUF key without the prefix `name.` -> key of config.json, for plain numbers.
      any_heads: whether llama.cpp reads a number of heads for which heads · head size is not the hidden size.
      head: whether llama.cpp reads a head that is `tied` to the embedding, a `separate` one, or `either`.
      activations: the activations (keys of `ops.ACTIVATIONS`) that the architecture stands for; the first one is read.
      biases: the biases that llama.cpp reads: of `qkv`, `output` and `mlp`.
      needs_biases: whether llama.cpp cannot read a model without them.
      windows: the layers in which llama.cpp applies a sliding window: none of them, or `even`.
      experts: of an architecture with mixtures of experts.
    """

    name: str
    family: str
    outer: tuple[Stored, ...]
    layer: str
    block: tuple[Stored, ...]
    keys: dict[str, str]
    any_heads: bool = True
    head: str = "either"
    activations: tuple[str, ...] = ("silu",)
    biases: tuple[str, ...] = ()
    needs_biases: bool = False
    windows: str = "none"
    experts: Routed | None = None

    def names(self, layers: int) -> dict[str, tuple[str, str | None]]:
        """GGUF tensor -> Hugging Face tensor and change, for a number of layers; absent tensors are listed too."""
        pairs = [(one.gguf, one) for one in self.outer]
        named = {gguf: (one.hugging_face, one.change) for gguf, one in pairs}
        for layer in range(layers):
            prefix = self.layer.format(layer=layer)
            named |= {f"blk.{layer}.{one.gguf}": (prefix + one.hugging_face, one.change) for one in self.block}
        return {
            f"{gguf}.{leaf}": (f"{name}.{leaf}", change)
            for gguf, (name, change) in named.items()
            for leaf in ("weight", "bias")
        }


# --------------------------------------------------------------------------------------------------------- changes


def pair_halves(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """Rows of each head from the order (half, pair) to the order (pair, half), for rotary positions by pairs.

    Hugging Face rotates row i of a head with row i + H/2; llama.cpp's `llama` and `deci` rotate row 2i with row 2i + 1.
    """
    split = tensor.reshape(-1, 2, head_size // 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def halve_pairs(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """The inverse of `pair_halves`."""
    split = tensor.reshape(-1, head_size // 2, 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def gather_kinds(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """Rows of a fused projection from the order (head, q k v) to the order (q k v, head)."""
    return tensor.reshape(-1, 3, head_size, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)


def gather_heads(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """The inverse of `gather_kinds`."""
    return tensor.reshape(3, -1, head_size, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)


def add_one(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """The factor of a norm from its difference to 1: float32."""
    return tensor.astype(np.float32) + np.float32(1)


def subtract_one(tensor: np.ndarray, head_size: int) -> np.ndarray:
    """The inverse of `add_one`, exact for the factors from 1/2 to 2."""
    return tensor.astype(np.float32) - np.float32(1)


# Name -> the change from Hugging Face's layout to GGUF's, and back.
CHANGES: dict[str, tuple[Change, Change]] = {
    "pairs": (pair_halves, halve_pairs),
    "fused heads": (gather_kinds, gather_heads),
    "plus one": (add_one, subtract_one),
}


# ----------------------------------------------------------------------------------------------------------- table

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}

# The keys of the sizes that may differ between the layers.
LAYER_KEYS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
}

_QKV = tuple(Stored(f"attn_{letter}", f"self_attn.{letter}_proj") for letter in "qkv")
_OUTPUT = Stored("attn_output", "self_attn.o_proj")
_MLP = tuple(Stored(f"ffn_{name}", f"mlp.{name}_proj") for name in ("gate", "up", "down"))
_NORMS = (Stored("attn_norm", "input_layernorm"), Stored("ffn_norm", "post_attention_layernorm"))
_OUTER = (
    Stored("token_embd", "model.embed_tokens"),
    Stored("output_norm", "model.norm"),
    Stored("output", "lm_head"),
)

LLAMA = Arch(
    name="llama",
    family="llama",
    outer=_OUTER,
    layer="model.layers.{layer}.",
    block=(*_NORMS, replace(_QKV[0], change="pairs"), replace(_QKV[1], change="pairs"), _QKV[2], _OUTPUT, *_MLP),
    keys=_KEYS | _RMS,
    biases=("qkv", "output", "mlp"),
)

QWEN2 = replace(
    LLAMA, name="qwen2", family="qwen2", block=(*_NORMS, *_QKV, _OUTPUT, *_MLP), any_heads=False, biases=("qkv",)
)

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    family="qwen3",
    block=(*QWEN2.block, Stored("attn_q_norm", "self_attn.q_norm"), Stored("attn_k_norm", "self_attn.k_norm")),
    any_heads=True,
    biases=(),
)


def _plus_one(stored: tuple[Stored, ...]) -> tuple[Stored, ...]:
    """The modules with the change of the norms of Gemma."""
    return tuple(replace(one, change="plus one") if "norm" in one.gguf else one for one in stored)


GEMMA = replace(
    QWEN2,
    name="gemma",
    family="gemma",
    outer=_plus_one(_OUTER),
    block=_plus_one(QWEN2.block),
    any_heads=True,
    head="tied",
    activations=("gelu_tanh",),
    biases=(),
)

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    family="gemma2",
    block=_plus_one(
        (
            Stored("attn_norm", "input_layernorm"),
            Stored("post_attention_norm", "post_attention_layernorm"),
            Stored("ffn_norm", "pre_feedforward_layernorm"),
            Stored("post_ffw_norm", "post_feedforward_layernorm"),
            *_QKV,
            _OUTPUT,
            *_MLP,
        )
    ),
    keys=GEMMA.keys
    | {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "attention.sliding_window": "sliding_window",
    },
    windows="even",
)

PHI3 = replace(
    LLAMA,
    name="phi3",
    family="phi3",
    block=(
        *_NORMS,
        Stored("attn_qkv", "self_attn.qkv_proj"),
        _OUTPUT,
        Stored("ffn_up", "mlp.gate_up_proj"),
        Stored("ffn_down", "mlp.down_proj"),
    ),
    any_heads=False,
    biases=(),
)

GPT_NEOX = Arch(
    name="gptneox",
    family="gpt_neox",
    outer=(
        Stored("token_embd", "gpt_neox.embed_in"),
        Stored("output_norm", "gpt_neox.final_layer_norm"),
        Stored("output", "embed_out"),
    ),
    layer="gpt_neox.layers.{layer}.",
    block=(
        Stored("attn_norm", "input_layernorm"),
        Stored("ffn_norm", "post_attention_layernorm"),
        Stored("attn_qkv", "attention.query_key_value", "fused heads"),
        Stored("attn_output", "attention.dense"),
        Stored("ffn_up", "mlp.dense_h_to_4h"),
        Stored("ffn_down", "mlp.dense_4h_to_h"),
    ),
    keys=_KEYS | {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    any_heads=False,
    head="separate",
    activations=("gelu", "gelu_tanh"),
    biases=("qkv", "output", "mlp"),
    needs_biases=True,
)

# The architecture whose layers may differ in size; every other one is sized by its first layer.
DECI = replace(LLAMA, name="deci")


def _experts(prefix: str, gate: str, up: str, down: str) -> tuple[Stored, ...]:
    """The router and the experts, each of whose matrices is one tensor of all experts."""
    named = {"gate": gate, "up": up, "down": down}
    stacked = (Stored(f"ffn_{name}_exps", f"{prefix}.experts.{stored}") for name, stored in named.items())
    return (Stored("ffn_gate_inp", f"{prefix}.gate"), *stacked)


def _shared(name: str) -> tuple[Stored, ...]:
    return tuple(Stored(f"ffn_{one}_shexp", f"mlp.{name}.{one}_proj") for one in ("gate", "up", "down"))


_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_QK_NORMS = tuple(Stored(f"attn_{letter}_norm", f"self_attn.{letter}_norm") for letter in "qk")

# The name that `gguf_experts` gives the biases of the choice of experts, behind that of the router.
CORRECTION = "e_score_correction"

# llama.cpp computes Mixtral as a `llama` with experts.
MIXTRAL = replace(
    LLAMA,
    family="mixtral",
    block=(*LLAMA.block[: -len(_MLP)], *_experts("block_sparse_moe", "w1", "w3", "w2")),
    biases=(),
    experts=Routed(width="feed_forward_length"),
)

QWEN2_MOE = replace(
    QWEN2,
    name="qwen2moe",
    family="qwen2_moe",
    block=(
        *(*_NORMS, *_QKV, _OUTPUT, *_EXPERTS),
        *_shared("shared_expert"),
        Stored("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ),
    head="separate",
    experts=Routed(renormalised=False, shared="expert_shared_feed_forward_length"),
)

QWEN3_MOE = replace(
    QWEN3, name="qwen3moe", family="qwen3_moe", block=(*_NORMS, *_QKV, _OUTPUT, *_QK_NORMS, *_EXPERTS), experts=Routed()
)

OLMOE = replace(
    QWEN3_MOE,
    name="olmoe",
    family="olmoe",
    any_heads=False,
    head="separate",
    experts=Routed(renormalised=False, width="feed_forward_length"),
)

GLM4_MOE = replace(
    QWEN3_MOE,
    name="glm4moe",
    family="glm4_moe",
    block=(
        *(Stored("attn_norm", "input_layernorm"), Stored("post_attention_norm", "post_attention_layernorm")),
        *(*_QKV, _OUTPUT, *_QK_NORMS, *_MLP, *_EXPERTS, *_shared("shared_experts")),
        Stored("exp_probs_b", f"mlp.gate.{CORRECTION}"),
    ),
    biases=("qkv",),
    experts=Routed(shared="expert_shared_count", from_file=True),
)

_ALL = (LLAMA, DECI, QWEN2, QWEN3, GEMMA, GEMMA2, PHI3, GPT_NEOX, QWEN2_MOE, QWEN3_MOE, OLMOE, GLM4_MOE)
ARCHS: dict[str, Arch] = {arch.name: arch for arch in _ALL}

# Model type of Hugging Face -> the architecture of layers of equal size.
OF_FAMILY = {arch.family: arch for arch in (*_ALL, MIXTRAL) if arch is not DECI} | {"mistral": LLAMA}

# Model type of Hugging Face -> why llama.cpp's architecture of that family computes another model.
OTHERWISE = {"gpt_oss": "llama.cpp rounds the range of frequencies that the yarn scaling changes, and gpt-oss does not"}
