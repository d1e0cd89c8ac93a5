"""Vision-language folders: the text model is read and pruned, everything else is carried over bit for bit.

config.json of such a folder describes the text model under `text_config`, in old files among the other keys. The output
keeps the names of the stored tensors, and all keys of config.json except the sizes of the text model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert import memory, rules, sources
from convert.families import TABLES, FamilyTable
from minillm_jax.data.tokenizer import quiet
from minillm_jax.errors import InputError, cause

TEXT = "text_config"

# The beginnings of the names of the text model's tensors: in transformers 5, before it, and in the first Qwen 2.5-VL,
# whose other tensors begin with `visual.`. The first one that fits counts.
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")

# The types of tensors that are carried over, beside those of weights.
_OTHER_TYPES = {
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Kind:
    """How a vision-language model holds its text model.

    Attributes:
      about: what is read as what, for the page of families.
      family: the family of the text model; None where `text_config` names it.
      table: the shapes that the stock class accepts; None for those of the family.
    """

    about: str
    family: str | None = None
    table: FamilyTable | None = None


KINDS = {
    "gemma3": Kind("`gemma3_text`: Gemma 3 from 4B (`Gemma3ForConditionalGeneration`)", "gemma3_text"),
    "qwen2_5_vl": Kind(
        "`qwen2`: Qwen 2.5-VL (`Qwen2_5_VLForConditionalGeneration`)",
        "qwen2",
        # The class computes the head size as hidden size / heads.
        replace(TABLES["qwen2"], stem="Qwen2_5_VL", stock_heads="dense"),
    ),
    "qwen3_vl": Kind("`qwen3`: Qwen 3-VL (`Qwen3VLForConditionalGeneration`)", "qwen3"),
    "mistral3": Kind("`mistral` or `ministral3`: Mistral Small 3.1, Ministral 3 (`Mistral3ForConditionalGeneration`)"),
}


def kind_of(raw: Mapping[str, Any]) -> Kind | None:
    """How a configuration holds a text model; None for a model of text alone."""
    model_type = raw.get("model_type")
    return KINDS.get(model_type) if isinstance(model_type, str) else None


def text_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration of the text model, as that of a model of text alone.

    Raises:
      InputError: transformers rejects the configuration.
    """
    from transformers import AutoConfig

    kind = kind_of(raw)
    assert kind is not None, "checked by the caller"
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    try:
        with quiet():
            text = AutoConfig.for_model(**plain).text_config.to_dict()
    except Exception as error:  # validation raises errors of many types
        raise InputError(f"{where}: transformers rejects the configuration ({cause(error)})") from error
    if "mrope_section" in (text.get("rope_parameters") or {}):
        # Tokens of text have equal positions in all sections, as in a model of text alone.
        text["rope_parameters"] = {k: v for k, v in text["rope_parameters"].items() if k != "mrope_section"}
    tied = raw["tie_word_embeddings"] if "tie_word_embeddings" in raw else text.get("tie_word_embeddings", False)
    return text | {"model_type": kind.family or text["model_type"], "tie_word_embeddings": tied}


def with_text(raw: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with new sizes of the text model; every other key as it was read."""
    kept = {key: value for key, value in raw.items() if key != "quantization_config"}
    return kept | ({TEXT: {**raw[TEXT], **sizes}} if isinstance(raw.get(TEXT), Mapping) else dict(sizes))


def unequal_format(raw: Mapping[str, Any]) -> str | None:
    """The format of a vision-language model whose layers keep unequal numbers; None for a model of text alone."""
    return None if kind_of(raw) is None else "padded"


def auto_class(raw: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model of this configuration."""
    return "AutoModelForCausalLM" if kind_of(raw) is None else "AutoModelForImageTextToText"


def check_format(raw: Mapping[str, Any], format_name: str | None) -> None:
    """Check that a format holds the rest of a vision-language model; all formats hold a model of text alone.

    Raises:
      InputError: it does not.
    """
    if kind_of(raw) is not None and format_name not in (None, "stock", "padded"):
        raise InputError(
            f"the format {format_name} does not hold the vision tower of a {raw['model_type']} model; "
            "use stock or padded"
        )


class TextSource:
    """A tensor source: the tensors of the text model under the names that they have in a model of text alone."""

    def __init__(self, source: rules.TensorSource):
        """The text model's tensors of a source.

        Raises:
          InputError: there are none.
        """
        self.where, self._source = source.where, source
        self.stored = _text_names(source)

    def names(self) -> Iterable[str]:
        """Names of the text model's tensors."""
        return self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(self.stored[name])

    def read(self, name: str, allocate: memory.Allocate) -> np.ndarray:
        """One tensor."""
        return self._source.read(self.stored[name], allocate)


def _text_names(source: rules.TensorSource) -> dict[str, str]:
    """Name in a model of text alone → stored name, for the tensors of the text model."""
    names = list(source.names())
    prefix = next((one for one in _PREFIXES if f"{one}embed_tokens.weight" in names), None)
    if prefix is None:
        expected = f"{_PREFIXES[0]}embed_tokens.weight"
        raise InputError(f"{source.where}: the text model's tensor {expected!r} is missing; is the download complete?")
    text = {"model." + name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    head = next((name for name in _HEADS if name in names), None)
    return text if head is None else text | {"lm_head.weight": head}


class Rest:
    """The stored tensors of a folder that are no part of the text model.

    Attributes:
      bytes: name → bytes of the tensor.
    """

    def __init__(self, folder: Path):
        """The tensors of a folder.

        Raises:
          InputError: the weight files are missing or damaged, or a tensor is of a type that is not carried over.
        """
        self._source = (
            sources.SafetensorsFolder(folder, types=sources.FLOATS | _OTHER_TYPES)
            if sources.has_safetensors(folder)
            else sources.open_folder(folder)
        )
        self._text = _text_names(self._source)
        names = sorted(set(self._source.names()) - set(self._text.values()))
        self.bytes = {name: self._bytes_of(name) for name in names}

    def _bytes_of(self, name: str) -> int:
        if isinstance(self._source, sources.SafetensorsFolder):
            size = np.dtype((sources.FLOATS | _OTHER_TYPES).get(self._source.type_of(name), "float32")).itemsize
            return int(np.prod(self._source.shape(name))) * size
        return self.read(name).nbytes

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._source.read(name, memory.aligned_empty)

    def stored_name(self, name: str) -> str:
        """The name that a tensor of the text model has in the folder."""
        return self._text.get(name, name)


def rest_of(raw: Mapping[str, Any], folder: Path) -> Rest | None:
    """What a model's folder holds beside the text model; None for a model of text alone."""
    return None if kind_of(raw) is None else Rest(folder)
