"""A decoder's configuration and sizes → the metadata of a GGUF file; what llama.cpp cannot compute is refused."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from convert import gguf_experts
from convert.gguf_config import GEMMA2_27B_LAYERS, ROPE_PARAMETERS, TOKEN_IDS
from convert.gguf_names import DECI, LLAMA, OF_FAMILY, OTHERWISE, Arch
from minillm_jax.errors import InputError
from minillm_jax.model.config import DecoderConfig, Sizes
from minillm_jax.model.families import FAMILIES
from minillm_jax.model.ops import Rope


def arch_for(config: DecoderConfig, sizes: Sizes) -> Arch:
    """The architecture under which a decoder is written.

    Raises:
      InputError: llama.cpp has no architecture that computes this decoder.
    """
    refusal = refusal_of(config, sizes)
    if refusal is not None:
        raise InputError(f"GGUF cannot hold this model: {refusal}; use another format")
    return DECI if _unequal(sizes) else OF_FAMILY[config.family]


def check_family(config: DecoderConfig, unequal: bool = False) -> None:
    """Check that GGUF holds a family, before its pruned sizes are known.

    Args:
      config: the decoder's configuration.
      unequal: whether the layers may come to differ in size.

    Raises:
      InputError: it does not.
    """
    if config.family in OTHERWISE:
        raise InputError(f"GGUF cannot hold this model: {OTHERWISE[config.family]}; use another format")
    if config.family not in OF_FAMILY:
        raise InputError(
            f"GGUF cannot hold this model: no GGUF architecture for {config.family}, only for {', '.join(OF_FAMILY)}; "
            "use another format"
        )
    if unequal and OF_FAMILY[config.family] is not LLAMA:
        raise InputError(
            f"GGUF holds layers of unequal size for llama and mistral only, not for {config.family}; use the format "
            "per-layer, or --budget uniform"
        )


def refusal_of(config: DecoderConfig, sizes: Sizes) -> str | None:
    """Why llama.cpp cannot compute a decoder; None where it can."""
    check_family(config, _unequal(sizes))
    for number, layer in enumerate(sizes.layers):
        mixed = layer.X and FAMILIES[config.family].shared is None
        if not (layer.N and (layer.F or mixed)):
            lost = "attention sublayer" if not layer.N else "shared expert" if layer.X else "MLP"
            return f"layer {number} has lost its {lost}, and llama.cpp does not compute every such layer"
    arch, first = OF_FAMILY[config.family], sizes.layers[0]
    return next(_refusals(config, sizes, arch, first.N * sizes.H), None)


def _refusals(config: DecoderConfig, sizes: Sizes, arch: Arch, features: int) -> Iterator[str]:
    if not arch.any_heads and features != sizes.D:
        kept = f"{sizes.layers[0].N} heads of {sizes.H} are kept with a hidden size of {sizes.D}"
        yield f"llama.cpp computes the head size of {arch.name} as hidden size / heads, but {kept}"
    if arch.head != "either" and config.tie_embeddings != (arch.head == "tied"):
        yield f"llama.cpp reads only a {arch.head} head of {arch.name}"
    if config.activation not in arch.activations:
        yield f"llama.cpp computes {arch.name} with {arch.activations[0]}, but this model has {config.activation}"
    present = {"qkv": config.qkv_bias, "output": config.output_bias, "mlp": config.mlp_bias}
    for kind, has in present.items():
        if has and kind not in arch.biases:
            yield f"llama.cpp reads no {kind} biases of {arch.name}"
        if arch.needs_biases and not has:
            yield f"llama.cpp needs the {kind} biases of {arch.name}"
    if config.rope is not None and config.rope.kind == "llama3" and arch is not LLAMA:
        yield f"llama.cpp reads no Llama 3 scaling of rotary positions for {arch.name}"
    if config.rope is not None and config.rope.kind in ("dynamic", "yarn", "longrope"):
        yield f"a GGUF is written without the {config.rope.kind} scaling of rotary positions"
    if config.embedding_scale is not None and config.embedding_scale != sizes.D**0.5:
        yield f"llama.cpp scales the embedding by the square root of the hidden size {sizes.D}"
    if arch.windows == "even":
        yield from _gemma2_refusals(config, sizes)
    yield from gguf_experts.refusals(config, sizes, arch)


def _gemma2_refusals(config: DecoderConfig, sizes: Sizes) -> Iterator[str]:
    divisor = sizes.H if len(sizes.layers) != GEMMA2_27B_LAYERS else sizes.D // sizes.layers[0].N
    if config.query_scale is not None and not math.isclose(config.query_scale, divisor**-0.5, rel_tol=1e-6):
        yield f"llama.cpp divides the queries of gemma2 by the square root of {divisor}"
    if config.attention_cap is None or config.logit_cap is None:
        yield "llama.cpp caps the scores and logits of every gemma2"
    if any((layer.window is None) != bool(number % 2) for number, layer in enumerate(sizes.layers)):
        yield "llama.cpp has a sliding window in every second layer of gemma2, the first one included"


def _unequal(sizes: Sizes) -> bool:
    """Whether layers differ in their heads; or dense layers, or those with experts, in their widths."""
    heads, widths = (
        {(layer.N, layer.K) for layer in sizes.layers},
        {(layer.F, layer.X, layer.W) for layer in sizes.layers},
    )
    return len(heads) > 1 or any(sum(bool(x) == mixed for _, x, _ in widths) > 1 for mixed in (False, True))


def lost_window(config: DecoderConfig, sizes: Sizes) -> int | None:
    """The sliding window that llama.cpp will not apply; None where there is none, or it applies it."""
    windows = [layer.window for layer in sizes.layers if layer.window is not None]
    return min(windows) if windows and OF_FAMILY[config.family].windows == "none" else None


def to_gguf(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any], arch: Arch) -> dict[str, Any]:
    """The metadata of a decoder, without those of its tokenizer: whole numbers, floats, texts and lists of numbers.

    Args:
      config: the decoder's configuration.
      sizes: the decoder's sizes.
      raw: config.json that the model was read with.
      arch: the architecture, `arch_for(config, sizes)`.
    """
    counts = {"N": "attention.head_count", "K": "attention.head_count_kv", "F": "feed_forward_length"}
    values: dict[str, Any] = {"vocab_size": sizes.V, "attention.key_length": sizes.H, "attention.value_length": sizes.H}
    for letter, key in counts.items():
        listed = [getattr(layer, letter) for layer in sizes.layers]
        values[key] = listed if arch is DECI else listed[0]
    factor = config.rope.factor if config.rope is not None and config.rope.kind == "linear" else 1.0
    length = raw.get("max_position_embeddings") or int((config.trained_length or 2048) / factor)
    known = {
        "max_position_embeddings": length,
        "hidden_size": sizes.D,
        "num_hidden_layers": len(sizes.layers),
        "rms_norm_eps": config.norm_epsilon,
        "layer_norm_eps": config.norm_epsilon,
        "use_parallel_residual": config.parallel,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
    }
    values |= {key: known[ours] for key, ours in arch.keys.items() if ours in known}
    values |= gguf_experts.metadata(config, sizes, raw, arch)
    windows = [layer.window for layer in sizes.layers]
    if arch.windows == "even" or (None not in windows and arch.family in ("llama", "mixtral", "phi3")):
        values["attention.sliding_window"] = windows[0]
    metadata = {f"{arch.name}.{key}": value for key, value in values.items()}
    return metadata if config.rope is None else metadata | _rope_metadata(config.rope, sizes.H, arch)


def token_ids(raw: Mapping[str, Any]) -> dict[str, int]:
    """The metadata of the special tokens of a configuration; of several tokens that end a text, the first one."""
    ids = {name: raw.get(key) for key, name in TOKEN_IDS.items()}
    first = {name: number[0] if isinstance(number, list) and number else number for name, number in ids.items()}
    return {name: number for name, number in first.items() if type(number) is int and number >= 0}


def _rope_metadata(rope: Rope, size: int, arch: Arch) -> dict[str, Any]:
    values = {"rope.dimension_count": int(size * rope.fraction), "rope.freq_base": float(rope.theta)}
    if rope.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    metadata: dict[str, Any] = {f"{arch.name}.{key}": value for key, value in values.items()}
    if rope.kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_length")
        metadata[ROPE_PARAMETERS] = json.dumps({name: getattr(rope, name) for name in names})
    return metadata
