"""Recipes as data: what the options of `prune` are where nothing is said."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillm_jax.errors import one_of

# Whatever no preset says otherwise.
COMMON = {
    "samples": 10,
    "seq_len": 128,
    "difference": None,
    "directions": 16,
    "epsilon": "1e-3",
    "distribution": "gaussian",
    "activation_norm": None,
    "refit": "none",
    "alpha": None,
    "ridge": 1e-2,
    "inner": None,
    "solver": "host",
    "structures": "heads,channels",
    "heads": "group",
    "ratio_of": "groups",
    "budget": "uniform",
    "layers": "all",
    "rounds": 1,
}


@dataclass(frozen=True)
class Preset:
    """A recipe: in a sentence, and as options."""

    words: str
    options: Mapping[str, Any]


def _preset(words: str, criterion: str, **changes: Any) -> Preset:
    return Preset(words, {"criterion": criterion, **COMMON, **changes})


PRESETS = {
    "ours": _preset(
        "Structured OBS on the pruned stream, the rest refitted half-way to the dense one: the best that was measured.",
        "obs",
        refit="least-squares",
        samples=64,
    ),
    "mini-llm": _preset(
        "The paper: FMS with the gradient estimated by SPSA over all weights, no refit (arXiv 2407.11681).", "fms"
    ),
    "llm-pruner": _preset(
        "LLM-Pruner: weights times their exact gradients, by back-propagation; the first four and the last two "
        "layers are left alone (arXiv 2305.11627).",
        "element-1",
        seq_len=64,
        layers="4:-2",
    ),
    "flap": _preset(
        "FLAP: fluctuation of input features, compared between layers; biases take over means (arXiv 2312.11983).",
        "flap",
        samples=1024,
        refit="bias",
        budget="global",
    ),
    "wanda-sp": _preset(
        "Weights times activations of the output projections, no refit (FLAP's baseline, arXiv 2312.11983).",
        "wanda",
    ),
}

DEFAULT = "ours"


def options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset, overridden by those that are given (not None).

    Raises:
      InputError: there is no preset of that name.
    """
    one_of("preset", name, PRESETS)
    return {**PRESETS[name].options, **{option: value for option, value in given.items() if value is not None}}
