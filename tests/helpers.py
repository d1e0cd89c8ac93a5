"""Models for the tests: small random models in both frameworks, and real models if the folder `shared` exists."""

import json
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from jax import numpy as jnp

from convert import modeling_pruned
from minillm_jax.budget.budget import choose, kept_count
from minillm_jax.model import axis_table
from minillm_jax.model.build import build, initialise
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block
from minillm_jax.model.ops import Rope
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.slopes import losses_at
from minillm_jax.scoring.gradient.spaces import Weights, finite

SHARED = Path(__file__).parents[2] / "shared"

LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = _SIZES | {"num_key_value_heads": 4, "head_dim": 10}

_MIXTURE = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}
_MIXTURE |= {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 1}

# A small configuration of every family.
SMALL: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": None},
    "ministral3": _GROUPED
    | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    "qwen2": _SIZES | {"num_key_value_heads": 4},
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED | {"sliding_window": 13, "query_pre_attn_scalar": 20},
    "gemma3_text": _GROUPED | {"sliding_window": 13, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2},
    "olmo2": _GROUPED,
    "olmo3": _SIZES | {"num_key_value_heads": 4, "sliding_window": 11},
    "smollm3": _GROUPED | {"no_rope_layer_interval": 2},
    "granite": _GROUPED
    | {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 1.6},
    "exaone4": _GROUPED | {"sliding_window": 11, "sliding_window_pattern": 2},
    "cohere2": _GROUPED | {"sliding_window": 11, "sliding_window_pattern": 2, "logit_scale": 0.6},
    "seed_oss": _GROUPED,
    "starcoder2": _GROUPED,
    "stablelm": _SIZES | {"num_key_value_heads": 4},
    "opt": _SIZES | {"ffn_dim": 40},
    "bloom": {"vocab_size": 97, "hidden_size": 48, "n_layer": 3, "n_head": 6, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": _SIZES | {"num_attention_heads": 4},
    "glm": _GROUPED,
    "glm4": _GROUPED,
    "phi": _GROUPED | {"head_dim": 12},
    "phi3": _SIZES | {"num_key_value_heads": 4},
}

# A small configuration of every family with a mixture of experts.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _GROUPED | {"num_local_experts": 6, "sliding_window": None},
    "qwen2_moe": _SIZES | _MIXTURE | {"num_key_value_heads": 4, "mlp_only_layers": [0], "norm_topk_prob": True},
    "qwen3_moe": _GROUPED | _MIXTURE | {"mlp_only_layers": [1]},
    "olmoe": _SIZES | {"num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 3},
    "gpt_oss": _GROUPED | {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 11},
    "glm4_moe": _GROUPED
    | {"moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 1}
    | {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7, "use_qk_norm": True, "n_shared_experts": 2},
}

_SLIDING = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

# Name -> family and changes of its small configuration.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in SMALL} | {
    "llama, multi-head": ("llama", {"num_key_value_heads": 8}),
    "llama, one key/value head": ("llama", {"num_key_value_heads": 1}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA_ROPE}),
    "llama, linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, dynamic rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 32,
        },
    ),
    "ministral3, sliding window, plain rope": (
        "ministral3",
        {
            "sliding_window": 19,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "phi, grouped, all features rotated": (
        "phi",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    ),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3, yarn with all settings": (
        "qwen3",
        {
            "rope_parameters": YARN
            | {"attention_factor": 0.9, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "rope_theta": 500.0}
        },
    ),
    "mistral, sliding window": ("mistral", {"sliding_window": 17}),
    "qwen2, some layers sliding": ("qwen2", _SLIDING),
    "qwen3, biases, some layers sliding, tied": (
        "qwen3",
        _SLIDING | {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "gemma, biases, untied": ("gemma", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma2, tight caps": ("gemma2", {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text, scaled rope, capped logits, untied": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            "final_logit_softcapping": 2.5,
            "tie_word_embeddings": False,
        },
    ),
    "olmo2, biases, grouped, tied": (
        "olmo2",
        {"attention_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "olmo3, yarn in the layers without a window": (
        "olmo3",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "smollm3, windows, biases, scaled rope": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        },
    ),
    "exaone4, no windows, tied": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
    ),
    "cohere2, biases, untied": ("cohere2", {"attention_bias": True, "tie_word_embeddings": False}),
    "seed_oss, output bias": ("seed_oss", {"attention_out_bias": True, "mlp_bias": True}),
    "starcoder2, window, no biases": ("starcoder2", {"sliding_window": 15, "use_bias": False}),
    "stablelm, parallel, biases": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "granite, biases, tied": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "opt, projected, post norm": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt, projected, pre norm, untied": ("opt", {"word_embed_proj_dim": 56, "tie_word_embeddings": False}),
    "opt, no final norm": ("opt", {"_remove_final_layer_norm": True, "activation_function": "gelu"}),
    "opt, no biases, plain norms": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "bloom, residual from norm": ("bloom", {"apply_residual_connection_post_layernorm": True, "n_head": 4}),
    "bloom, untied": ("bloom", {"tie_word_embeddings": False, "n_head": 12}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt_neox, full rotary, tied": (
        "gpt_neox",
        {
            "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 1.0, "rope_type": "default"},
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "glm, no biases": ("glm", {"attention_bias": False, "partial_rotary_factor": 0.75}),
    "glm4, one key/value head": ("glm4", {"num_key_value_heads": 1}),
    "phi3, sliding window, partial rotary": (
        "phi3",
        {"sliding_window": 19, "head_dim": 8, "partial_rotary_factor": 0.5},
    ),
    "phi3, longrope, partial rotary, tied": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.5],
                "long_factor": [1.0, 2.5, 9.0],
            },
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
        },
    ),
}


# The families whose norms of queries and keys are over all heads: heads of zeros would change them.
JOINT_NORMS = ("olmo2", "olmo3")

# One family of each kind of block: rotary and grouped, learned positions, ALiBi, norms after the projections.
KINDS_OF_FAMILIES = ("llama", "opt", "bloom", "gemma2")


def quickly(names: Iterable[str], quick: Container[str] = KINDS_OF_FAMILIES) -> list[Any]:
    """Names as parameters of a test, of which only the quick ones run without `make test-all`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def shared(path: str) -> Path:
    """A real model or text beside the checkout; skips the test if it is missing."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs the real {path}, which is not part of the repository")
    return SHARED / path


def torch_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A PyTorch model of a small configuration; all parameters are random, norms and biases included."""
    config = transformers.AutoConfig.for_model(family, **(SMALL | MIXTURES)[family] | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            scale = 0.4 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            centre = 1.0 if is_norm and not family.startswith("gemma") else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.4)
    return model


def hugging_face_folder(path: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with the weights of `torch_model`."""
    torch_model(family, seed, **changes).save_pretrained(path)
    return path


_forward = jax.jit(lambda decoder, tokens: decoder(tokens))


def logits_of(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits of this package, by one compiled program, which is faster than one program per operation."""
    return np.asarray(_forward(decoder, jnp.asarray(tokens)))


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of PyTorch, float32."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, dtype=np.int64)), use_cache=False).logits.float().numpy()


def load_torch(folder: Path, remote_code: bool = False) -> Any:
    """A folder loaded by transformers, with a check that it holds exactly the weights of the model.

    Without remote code, the classes of `convert.modeling_pruned` are registered beside the stock classes.
    """
    if not remote_code:
        modeling_pruned.register()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=remote_code, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def load_stock(folder: Path) -> Any:
    """A folder loaded by a stock class of transformers."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    assert not model_type.startswith("pruned_")
    return load_torch(folder)


def random_tokens(vocabulary: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Random token ids, int32."""
    return np.random.default_rng(seed).integers(0, vocabulary, shape, dtype=np.int32)


def small_decoder(
    seed: int = 0, layers: int = 3, deviation: float = 0.3, sizes: Sizes | None = None, **changes: Any
) -> Decoder:
    """A decoder with random weights, norms and biases, made without a file."""
    config = DecoderConfig(**{"family": "llama", "norm_epsilon": 1e-5, "rope": Rope(10000.0)} | changes)
    sizes = sizes or Sizes(V=61, D=16, H=4, layers=(LayerSizes(N=8, K=4, F=12),) * layers)
    decoder = initialise(build(config, sizes), jax.random.key(seed), deviation)
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(decoder))))

    def add_noise(path: Any, leaf: jax.Array) -> jax.Array:
        if axis_table.is_data(axis_table.array_path(path)):
            return leaf
        return leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)

    return jax.tree_util.tree_map_with_path(add_noise, decoder)


def perturb(block: Block, key: jax.Array, layer: jax.Array, scale: jax.Array, distribution: str) -> Block:
    """One layer with its weights moved along a direction."""
    return Weights(distribution).moved(block, key, layer, finite(scale), jnp.zeros(1, jnp.int32))


def pairs_of(
    decoder: Decoder, keys: jax.Array, tokens: jax.Array, epsilon: float, space: Any, per_step: int = 1
) -> Any:
    """The paired losses along the directions of some keys, [P, 2, B]."""
    windows = jnp.arange(len(tokens), dtype=jnp.int32)

    def pair(keys: jax.Array) -> jax.Array:
        steps = (jnp.float32(step) for step in (epsilon, -epsilon))
        return jnp.stack(
            [losses_at(decoder, Directions.plain(keys), tokens, windows, step, space) for step in steps], 1
        )

    return jnp.concatenate([pair(keys[first : first + per_step]) for first in range(0, len(keys), per_step)])


def best_of(scores: dict[str, list[np.ndarray]], ratio: float) -> axis_table.Kept:
    """The kept groups with the highest scores, the same share in every layer."""
    counts = {kind: [kept_count(len(values), ratio) for values in rows] for kind, rows in scores.items()}
    return choose(scores, counts, {kind: [1] * len(rows) for kind, rows in scores.items()})


def arrays_equal(left: Any, right: Any) -> bool:
    """Whether two trees hold the same arrays, bit for bit."""
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool(jnp.array_equal(a, b)), left, right)
    return all(jax.tree.leaves(equal))


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes a key."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


@contextmanager
def compilations(name: str) -> Iterator[list[str]]:
    """A list that grows by one entry for every compilation of a jitted function inside the block."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **details: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and details.get("fun_name") == f"jit({name})":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
