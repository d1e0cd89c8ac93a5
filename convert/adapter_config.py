"""adapter_config.json of PEFT: what is written for an adapter of ours, and what is read from any adapter.

PEFT adds scale · B · A to the weight of a linear module, with scale α / r, or α / √r with rank-stabilised LoRA
(arXiv 2312.03732). `rank_pattern` and `alpha_pattern` give some modules another r or α.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.sources import read_json
from minillm_jax.errors import InputError
from minillm_jax.recovery.adapter import Lora

CONFIG = "adapter_config.json"

# Settings that change what an adapter computes, or add weights that are not low-rank factors.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)

# Initialisations that also change the weights of the model, before the training.
_CHANGES_WEIGHTS = ("corda", "loftq", "lora_ga", "olora", "pissa")

_ADVICE = "merge the adapter with PEFT (merge_and_unload), save the result and read that model"


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says of an adapter.

    Attributes:
      where: path of the file, for messages.
      raw: its content.
      rank: rank r of the modules that `rank_pattern` does not name.
      alpha: numerator α of the scale of the modules that `alpha_pattern` does not name.
      dropout: share of the inputs that are set to zero in training.
    """

    where: str
    raw: dict[str, Any]
    rank: int
    alpha: float
    dropout: float

    def rank_of(self, module: str) -> int:
        """Rank of a module's factors."""
        return self._pattern("rank_pattern", module, self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of B · A of a module."""
        return self._pattern("alpha_pattern", module, self.alpha) / self._divisor(self.rank_of(module))

    @property
    def scale(self) -> float:
        """Factor of B · A of a module that no pattern names."""
        return self.alpha / self._divisor(self.rank)

    def alpha_at(self, rank: int) -> float:
        """The α for which α / rank is the scale of a module that no pattern names."""
        return self.alpha * (rank / self._divisor(self.rank))

    def expects(self, module: str) -> bool:
        """Whether the settings say that a module has factors; False where they do not say it plainly."""
        if any(self.raw.get(key) for key in ("exclude_modules", "layers_to_transform")):
            return False
        targets = self.raw.get("target_modules")
        if isinstance(targets, str):
            return targets != "all-linear" and self._matches(targets, module)
        names = targets if isinstance(targets, list) else []
        return self.names_parameter(module) or _ends_with_one(module.removesuffix(".weight"), names)

    def names_parameter(self, name: str) -> bool:
        """Whether `target_parameters` names a parameter."""
        return _ends_with_one(name, self.raw.get("target_parameters") or [])

    def _divisor(self, rank: int) -> float:
        return rank**0.5 if self.raw.get("use_rslora") else float(rank)

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        patterns = self.raw.get(key) or {}
        # A linear module of a mixture of experts is named by its weight, or by itself.
        matching = (value for name, value in patterns.items() if self._matches(rf"(.*\.)?({name})(\.weight)?", module))
        return next(matching, default)

    def _matches(self, pattern: str, module: str) -> bool:
        try:
            return re.fullmatch(pattern, module) is not None
        except re.error as error:
            raise InputError(f"{self.where}: {pattern!r} is no regular expression ({error})") from error


def _ends_with_one(name: str, ends: Sequence[str]) -> bool:
    """Whether a name is one of others, or ends so."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def read(folder: Path) -> Settings:
    """Read the settings of an adapter.

    Args:
      folder: a folder that PEFT or `write_adapter` wrote.

    Raises:
      InputError: the file is missing or damaged, is of another method than LoRA, or has a setting that this package
        cannot compute.
    """
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"{folder}: not a folder of an adapter; expected {CONFIG} in it, as PEFT saves it")
    raw, where = read_json(path), str(path)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {raw.get('peft_type')!r}, expected 'LORA'; {_ADVICE}")
    _check_supported(raw, where)
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        patterns = raw.get(key) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{where}: {key} is {patterns!r}, expected an object from names of modules to numbers")
        for name in patterns:
            _number(patterns, name, kind, f"{where}: {key}")
    rank, alpha = _number(raw, "r", int, where), _number(raw, "lora_alpha", float, where)
    dropout = raw.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{where}: lora_dropout is {dropout!r}, expected a number in [0, 1)")
    return Settings(where, raw, rank, alpha, float(dropout))


def _check_supported(raw: Mapping[str, Any], where: str) -> None:
    """Check that the adapter is nothing but low-rank factors beside the weights of its model."""
    bias = raw.get("bias", "none")
    if bias != "none":
        raise InputError(f"{where}: bias is {bias!r}, expected 'none', because the biases are trained too; {_ADVICE}")
    for key in _REFUSED:
        if raw.get(key):
            raise InputError(f"{where}: {key} is {raw[key]!r}, which is not supported; {_ADVICE}")
    initial = raw.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_WEIGHTS):
        raise InputError(
            f"{where}: init_lora_weights is {initial!r}, which changes the weights of the model too; {_ADVICE}"
        )


def _number(values: Mapping[str, Any], key: str, kind: type[int] | type[float], where: str) -> Any:
    """A positive number of a JSON object.

    Raises:
      InputError: it is missing, of another type, or not positive.
    """
    value = values.get(key)
    accepted = int if kind is int else (int, float)
    if not isinstance(value, accepted) or isinstance(value, bool) or not 0 < value < float("inf"):
        expected = "an integer of at least 1" if kind is int else "a number above 0"
        raise InputError(f"{where}: {key} is {value!r}, expected {expected}")
    return kind(value)


def document(
    lora: Lora, ranks: Mapping[str, int], base_model: str, parameters: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The content of adapter_config.json for an adapter of ours.

    Args:
      lora: rank, α and dropout of the adapter.
      ranks: name of a module, or the end of the names of equal modules → rank of its factors. Its scale is that of the
        adapter.
      base_model: folder or Hub id of the model that the adapter belongs to.
      parameters: the same of parameters. PEFT refuses dropout where it adapts parameters, so the file then has none.
    """
    parameters = parameters or {}
    others = {name: rank for name, rank in sorted({**ranks, **parameters}.items()) if rank != lora.rank}
    named = {"target_parameters": sorted(parameters)} if parameters else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "target_modules": sorted(ranks),
        **named,
        "rank_pattern": others,
        "alpha_pattern": {name: _plain(lora.alpha * rank / lora.rank) for name, rank in others.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _plain(number: float) -> int | float:
    """An integer where the number is one: PEFT declares α as an integer."""
    return int(number) if float(number).is_integer() else number
