"""Fill the made parts of docs/families.md from the code: python docs/make_families.py.

The parts lie between the comments `<!-- made: ... -->` and `<!-- end -->`. What a family supports is found by trying:
its default configuration in transformers is read as the package reads that of a model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, logging

from convert.families import TABLES, FamilyTable
from convert.multimodal import KINDS
from convert.official import LAYOUTS
from minillm_jax.errors import InputError
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.families import FAMILIES, Family, parse
from minillm_jax.model.ops import ROPE_KINDS, Rope, rotary_frequencies
from minillm_jax.settings import OF_EXPERTS

PAGE = Path(__file__).with_name("families.md")

# Field of `DecoderConfig` -> its value in a plain LLaMA, and what another value means.
FEATURES: dict[str, tuple[Any, str]] = {
    "gated": (True, "MLP without a gate"),
    "parallel": (False, "parallel sublayers"),
    "shared_norm": (False, "one norm for both sublayers"),
    "pre_norms": (True, "norms after the sublayers only"),
    "qk_norm": (False, "norms of each head's queries and keys"),
    "joint_qk_norm": (False, "norms of the queries and keys of all heads"),
    "windowed": (False, "sliding windows"),
    "attention_cap": (None, "capped attention scores"),
    "logit_cap": (None, "capped logits"),
    "logit_scale": (None, "scaled logits"),
    "residual_scale": (None, "scaled sublayers"),
    "embedding_scale": (None, "scaled embedding"),
    "embedding_norm": (False, "norm of the embedding"),
    "position_offset": (None, "learned positions"),
    "sinks": (False, "attention sinks"),
    "routing": (None, "mixture of experts"),
}

FACTORS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


def page(text: str) -> str:
    """The page with its made parts filled."""
    parts = {"families": families_table(), "official": official_table(), "vision": vision_table()}

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n" + "\n".join(parts[match[2]]) + f"\n\n{match[3]}"

    return re.sub(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def families_table() -> list[str]:
    """One row for each family."""
    rows = [_row(model_type, family) for model_type, family in FAMILIES.items()]
    heads = ("family", "`model_type`", "features", "positions", "structures", "stock after pruning of")
    return ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|", *rows]


def _row(model_type: str, family: Family) -> str:
    config, table = _parsed(model_type), TABLES[model_type]
    assert config is not None, f"the default configuration of {model_type} cannot be read"
    cells = [family.name, f"`{model_type}`", _features(config), _positions(config, model_type)]
    return "| " + " | ".join([*cells, _structures(family), _stock(table, family)]) + " |"


def _features(config: DecoderConfig) -> str:
    found = [words for name, (plain, words) in FEATURES.items() if getattr(config, name) != plain]
    if config.norm == "layer":
        found.insert(0, "layer norms")
    if config.post_norms and config.pre_norms:
        found.insert(0, "norms before and after the sublayers")
    return ", ".join(found)


def _positions(config: DecoderConfig, model_type: str) -> str:
    if config.rope is None:
        return "ALiBi" if config.alibi_heads is not None else "learned"
    kinds = [kind for kind in ROPE_KINDS if _parsed(model_type, config.rope, kind) is not None]
    words = "RoPE"
    if config.other_rope is not None:
        words += ", none in some layers" if config.other_rope.kind == "none" else ", two kinds by layer"
    if config.rope.fraction < 1:
        words += " of some features"
    return f"{words}: {', '.join(kinds)}"


def _structures(family: Family) -> str:
    heads = ["heads"] if family.kv_heads is None else ["heads", "query heads"]
    channels = ["channels"] * (not family.experts or family.shared is not None or family.dense_layers != "none")
    return ", ".join([*heads, *channels, *[*OF_EXPERTS] * bool(family.experts), "hidden", "layers"])


def _stock(table: FamilyTable, family: Family) -> str:
    if not table.stock:
        return "nothing"
    heads = {"any": "any heads", "divide": "heads that divide the hidden size", "dense": ""}[table.stock_heads]
    if heads and family.name.startswith("LLaMA"):
        heads = "any heads (as `mistral`)"
    hidden = table.stock_heads != "dense" and table.stock_width and not table.stock_scale
    channels = table.stock_width and "channels" in _structures(family)
    kinds = {"channels": channels, **dict.fromkeys(OF_EXPERTS, bool(family.experts)), "hidden": hidden, "layers": True}
    return ", ".join([heads] * bool(heads) + [kind for kind, holds in kinds.items() if holds])


def _parsed(model_type: str, rope: Rope | None = None, kind: str = "default") -> DecoderConfig | None:
    """The decoder of a family's default configuration, with rotary positions of a kind; None where it is refused."""
    stock, changes = FAMILIES[model_type].defaults or model_type, {}
    if rope is not None:
        changes["rope_parameters"] = _rope_parameters(model_type, rope, kind)
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        raw = AutoConfig.for_model(stock, **changes).to_dict() | {"model_type": model_type}
        config = parse(raw, model_type)[0]
    except (InputError, ValueError, KeyError, TypeError):
        return None
    except Exception as error:
        if "Validation" in type(error).__name__:
            return None
        raise
    finally:
        logging.set_verbosity(level)
    return config if rope is None or (config.rope is not None and config.rope.kind == kind) else None


def _rope_parameters(model_type: str, rope: Rope, kind: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.theta}
    if rope.fraction < 1:
        parameters["partial_rotary_factor"] = rope.fraction
    pairs = len(rotary_frequencies(rope, _head_size(model_type)))
    factors = FACTORS | {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    parameters |= {} if kind == "default" else factors
    if not FAMILIES[model_type].rope_by_type:
        return parameters
    return {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": rope.theta}}


def _head_size(model_type: str) -> int:
    raw: Mapping[str, Any] = AutoConfig.for_model(FAMILIES[model_type].defaults or model_type).to_dict()
    return parse({**raw, "model_type": model_type}, model_type)[1].H


def official_table() -> list[str]:
    """One row for each official layout that is read without its code."""
    rows = [f"| `{model_type}` | {layout.about} |" for model_type, layout in LAYOUTS.items()]
    return ["| `model_type` | read as |", "| --- | --- |", *rows]


def vision_table() -> list[str]:
    """One row for each kind of vision-language model."""
    return [
        "| `model_type` | text model |",
        "| --- | --- |",
        *(f"| `{name}` | {kind.about} |" for name, kind in KINDS.items()),
    ]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
