"""Mixtures of experts in GGUF: their rules, keys and settings, and what llama.cpp computes otherwise.

GGUF stacks the matrices of all experts of a layer in one tensor, so its rules differ from those of a Hugging Face
folder. llama.cpp (`src/models`) fixes some settings of the router by the architecture and reads others from the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from convert.families import TABLES, FamilyTable, Part, Rule
from convert.gguf_file import GgufFile
from convert.gguf_names import CORRECTION, Arch
from minillm_jax.errors import InputError
from minillm_jax.model.config import DecoderConfig, Sizes
from minillm_jax.model.families import FAMILIES

# Numbers of the router's scores (`expert_gating_func`).
GATING = {"softmax": 1, "sigmoid": 2}


def table_of(family: str) -> FamilyTable:
    """The rules of a family in GGUF: those of its folders, with one tensor for all experts of a layer."""
    table = TABLES[family]
    return replace(table, block=tuple(map(_stacked, table.block)))


def _stacked(rule: Rule) -> Rule:
    parts = rule.parts
    if "{expert}." in rule.name:
        parts = tuple(Part(f"X {part.axes}", part.path) for part in parts)
    elif parts[0].path == "experts.shared_gate":
        parts = (Part("D1", parts[0].path),)  # a vector
    name = rule.name.replace("{expert}.", "").replace("e_score_correction_bias", f"{CORRECTION}.bias")
    return replace(rule, name=name, parts=parts)


def refusals(config: DecoderConfig, sizes: Sizes, arch: Arch) -> Iterator[str]:
    """Why llama.cpp cannot compute the experts of a decoder; nothing where it can, or there are none."""
    routing, routed = config.routing, arch.experts
    if routing is None or routed is None:
        return
    dense = [number for number, layer in enumerate(sizes.layers) if not layer.X]
    mixed = next((layer for layer in sizes.layers if layer.X), None)
    if mixed is None:
        yield f"llama.cpp reads no {arch.name} without experts"
    if dense and not routed.from_file:
        yield f"llama.cpp has experts in every layer of {arch.name}, but layer {dense[0]} has none"
    if dense != list(range(len(dense))):
        yield f"llama.cpp has layers without experts before all others of {arch.name}"
    if not routed.from_file and routing.renormalised != routed.renormalised:
        does, other = ("divides", "does not") if routed.renormalised else ("does not divide", "does")
        yield f"llama.cpp {does} the weights of the chosen experts of {arch.name} by their sum, but this model {other}"
    if config.joint_qk_norm and any(layer.K != layer.N for layer in sizes.layers):
        yield f"llama.cpp has as many key/value heads as query heads of {arch.name}"
    if mixed is not None and routed.shared == SHARED_COUNT and mixed.F % mixed.W:
        kept = f"{mixed.F} are kept"
        yield f"llama.cpp has a shared expert of a multiple of {mixed.W} channels of {arch.name}, but {kept}"


# The key of the width of the shared expert as a multiple of the width of an expert.
SHARED_COUNT = "expert_shared_count"


def metadata(config: DecoderConfig, sizes: Sizes, raw: Mapping[str, Any], arch: Arch) -> dict[str, Any]:
    """The metadata of the experts of a decoder, without the name of the architecture; nothing without experts."""
    routing, routed = config.routing, arch.experts
    if routing is None or routed is None:
        return {}
    mixed = next(layer for layer in sizes.layers if layer.X)
    dense = [layer.F for layer in sizes.layers if not layer.X]
    values: dict[str, Any] = {
        "feed_forward_length": dense[0] if dense else int(raw.get("intermediate_size") or mixed.W),
        "expert_count": mixed.X,
        "expert_used_count": min(routing.chosen, mixed.X),
    }
    values[routed.width] = mixed.W
    if routed.shared is not None:
        values[routed.shared] = mixed.F // mixed.W if routed.shared == SHARED_COUNT else mixed.F
    if routed.from_file:
        values |= {
            "leading_dense_block_count": len(dense),
            "expert_gating_func": GATING[routing.scores],
            "expert_weights_norm": routing.renormalised,
            "expert_weights_scale": float(routing.scale),
            "expert_group_count": routing.groups,
            "expert_group_used_count": routing.chosen_groups,
        }
    return values


def config_keys(file: GgufFile, arch: Arch) -> dict[str, Any]:
    """The keys of config.json of the experts of a GGUF file.

    Raises:
      InputError: a key is missing, or the router computes otherwise than the family.
    """
    family, routed = FAMILIES[arch.family], arch.experts
    assert routed is not None, "the architecture has experts"
    keys = {
        name: file.value(name) for name in ("expert_count", "expert_used_count", routed.width, routed.shared) if name
    }
    for name, value in keys.items():
        if type(value) is not int:
            raise InputError(f"{file.path}: {file.arch}.{name} must be a whole number, found {value!r}")
    found: dict[str, Any] = dict.fromkeys(family.experts, keys["expert_count"])
    found |= {"num_experts_per_tok": keys["expert_used_count"], family.expert_width: keys[routed.width]}
    if routed.shared is not None:
        assert family.shared is not None, "the family has a shared expert"
        found[family.shared] = keys[routed.shared]
    scale = file.value("expert_weights_scale", 1.0) or 1.0
    if not routed.from_file:
        if scale != 1.0:
            raise InputError(f"{file.path}: {file.arch}.expert_weights_scale {scale:g} is not supported; expected 1")
        every = {"norm_topk_prob": routed.renormalised} if arch.family != "mixtral" else {}
        return found | every | ({"mlp_only_layers": [], "decoder_sparse_step": 1} if "qwen" in arch.family else {})
    if file.value("expert_gating_func", 0) not in (0, GATING["sigmoid"]):
        raise InputError(f"{file.path}: {file.arch}.expert_gating_func must be {GATING['sigmoid']} (sigmoid)")
    return found | {
        "first_k_dense_replace": file.value("leading_dense_block_count", 0),
        "norm_topk_prob": bool(file.value("expert_weights_norm", False)),
        "routed_scaling_factor": float(str(np.float32(scale))),
        "n_group": file.value("expert_group_count", 0) or 1,
        "topk_group": file.value("expert_group_used_count", 0) or 1,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in file.entries,
    }
