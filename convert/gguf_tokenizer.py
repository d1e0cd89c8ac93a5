"""The tokenizer in a GGUF file ↔ the tokenizer files of a Hugging Face folder.

transformers makes the tokenizer of a GGUF file from its metadata; this module writes it as files. In the other
direction the metadata come from the definition of the tokenizer (tokenizer.json), in the two kinds that llama.cpp
calls `gpt2` (byte pairs of bytes) and `llama` (sentencepiece's pairs of characters with bytes for the others).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.gguf_file import GgufFile
from convert.tokenizers import HARD_TEXTS
from minillm_jax.data.tokenizer import has_vocabulary, load_tokenizer, quiet
from minillm_jax.errors import InputError, cause, shortened, warn

PREFIX = "tokenizer.ggml."
KIND = f"{PREFIX}model"
CHAT_TEMPLATE = "tokenizer.chat_template"

# The kind of a file without a tokenizer; llama.cpp then takes token ids alone.
NO_TOKENIZER = "no_vocab"

# Kinds of tokens in GGUF (`gguf.TokenType`).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Special token of transformers -> its name in GGUF.
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# llama.cpp's name for any other way of splitting a text; a sentencepiece-like tokenizer splits none.
UNKNOWN_SPLIT = "default"

# The score of a token that no pair of others makes.
NO_MERGE = -1000.0

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# How a byte-level tokenizer splits a text before it joins bytes -> the name that llama.cpp has for it
# (`tokenizer.ggml.pre`). A split is a regular expression, or a name of this module.
SPLITS = {
    "gpt-2": "gpt-2",
    "digits, gpt-2": "smollm",
    f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}{_WORDS}\\p{{N}}{_REST}": "qwen2",
    f"{_CASED[0]}|{_CASED[1]}|\\p{{N}}{_CASED_REST}": "tekken",
    f"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\\p{{N}}{{1,3}}{_CASED_REST}": "gpt-4o",
}


# ---------------------------------------------------------------------------------------------- GGUF → Hugging Face


def write_files(file: GgufFile, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder, as transformers reads it, with its chat template.

    A file without a tokenizer gives no files. One that transformers cannot read is an `InputWarning`.
    """
    if f"{PREFIX}tokens" not in file.metadata:
        return
    try:
        with quiet():
            tokenizer_of(file.arch, file.metadata).save_pretrained(folder)
    except Exception as error:  # tokenizers raise errors of many types
        warn(f"{file.path}: transformers cannot make its tokenizer ({cause(error)}); give texts as token ids (.npy)")


def tokenizer_of(arch: str, metadata: Mapping[str, Any]) -> Any:
    """The tokenizer that transformers makes of the metadata of a GGUF file; raises its errors.

    Args:
      arch: the GGUF architecture, by which transformers tells some tokenizers apart.
      metadata: the metadata of the file.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    names = GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {name: metadata[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in metadata}
    backend = _without_foreign(convert_gguf_tokenizer(arch, known)[0], len(known["tokens"]))
    # Old files do not say whether the first token is added; sentencepiece models have it.
    default = metadata.get(KIND) == "llama"
    options = {
        "add_bos_token": bool(metadata.get(f"{PREFIX}add_bos_token", default)),
        "add_eos_token": bool(metadata.get(f"{PREFIX}add_eos_token", False)),
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for token, name in SPECIAL.items():
        number = metadata.get(f"{PREFIX}{name}_token_id")
        options[token] = None if number is None else known["tokens"][number]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = metadata.get(CHAT_TEMPLATE)
    return tokenizer


def _without_foreign(backend: Any, size: int) -> Any:
    """A tokenizer without the tokens that the classes of transformers add by default, which the model does not have."""
    from tokenizers import Tokenizer

    definition = json.loads(backend.to_str())
    kept = [token for token in definition["added_tokens"] if token["id"] < size]
    if len(kept) == len(definition["added_tokens"]):
        return backend
    return Tokenizer.from_str(json.dumps(definition | {"added_tokens": kept}))


# ---------------------------------------------------------------------------------------------- Hugging Face → GGUF


def metadata_of(folder: Path, size: int, arch: str) -> dict[str, Any]:
    """The metadata of the tokenizer of a model folder.

    A folder without a tokenizer gives `no_vocab`: llama.cpp then takes token ids alone. Where transformers would read
    another tokenizer from the metadata, and where llama.cpp has no name for the way of splitting a text, that is an
    `InputWarning`.

    Args:
      folder: the folder.
      size: size V of the model's vocabulary.
      arch: the GGUF architecture.

    Raises:
      InputError: GGUF has no such tokenizer, or it has more tokens than the model.
    """
    if not has_vocabulary(folder):
        return {KIND: NO_TOKENIZER}
    tokenizer = load_tokenizer(folder)
    metadata = _described(tokenizer, size, folder)
    if metadata[KIND] == "gpt2" and metadata[f"{PREFIX}pre"] == UNKNOWN_SPLIT:
        warn(
            f"{folder}: llama.cpp has no known name for the way in which this tokenizer splits a text; the GGUF says "
            f"{UNKNOWN_SPLIT}, and llama.cpp may make other tokens"
        )
    different = _difference(tokenizer, arch, metadata)
    if different is not None:
        warn(
            f"{folder}: transformers reads another tokenizer from the GGUF ({different}); in transformers, use the "
            "tokenizer of this folder"
        )
    return metadata


def check(folder: Path, size: int) -> None:
    """Check that GGUF holds the tokenizer of a model folder; a folder without one is accepted.

    Raises:
      InputError: as for `metadata_of`.
    """
    if has_vocabulary(folder):
        _described(load_tokenizer(folder), size, folder)


def _described(tokenizer: Any, size: int, folder: Path) -> dict[str, Any]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{folder}: GGUF cannot hold this tokenizer ({type(tokenizer).__name__}); use another format")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _kind(definition, folder)
    metadata = {KIND: kind} | _vocabulary(tokenizer, definition, size, folder, kind == "llama")
    if kind == "gpt2":
        merges = [" ".join(pair) for pair in _merges(definition)]
        metadata |= {f"{PREFIX}pre": pre_tokenizer(definition) or UNKNOWN_SPLIT, f"{PREFIX}merges": merges}
    else:
        metadata |= {f"{PREFIX}pre": UNKNOWN_SPLIT, f"{PREFIX}add_space_prefix": _adds_space(tokenizer)}
    return metadata | _special(tokenizer)


def _kind(definition: Mapping[str, Any], folder: Path) -> str:
    model = definition["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model["type"] == "BPE" and any(part["type"] == "ByteLevel" for part in _parts(definition.get("pre_tokenizer"))):
        return "gpt2"
    raise InputError(
        f"{folder}: GGUF holds byte-level and sentencepiece-like byte pair tokenizers, and this one is another "
        f"({model['type']}); use another format"
    )


def _parts(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    if step is None:
        return
    inner = step.get("pretokenizers") or step.get("normalizers")
    if inner is None:
        yield step
    else:
        for one in inner:
            yield from _parts(one)


def pre_tokenizer(definition: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way in which a byte-level tokenizer splits a text; None where none is known.

    Args:
      definition: the content of tokenizer.json.
    """
    words = []
    for part in _parts(definition.get("pre_tokenizer")):
        if part["type"] == "Split":
            words.append(str(next(iter(part["pattern"].values()))))
        elif part["type"] == "Digits":
            words.append("digits" if part.get("individual_digits") else "numbers")
        elif part["type"] != "ByteLevel":
            words.append(part["type"])
        elif part.get("use_regex", True):
            words.append("gpt-2")
    return SPLITS.get(", ".join(words))


def _merges(definition: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs that are joined, in order; tokenizer.json writes a pair as a list or as one text."""
    merges = definition["model"]["merges"]
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    return [(left, right) for left, right in pairs]


def _vocabulary(
    tokenizer: Any, definition: Mapping[str, Any], size: int, folder: Path, scored: bool
) -> dict[str, list[Any]]:
    """The tokens and their kinds, and the scores of a sentencepiece-like model: a token is joined in their order."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise InputError(
            f"{folder}: the tokenizer has token {max(by_id)}, but the model has {size} tokens; give the tokenizer of "
            "this model"
        )
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in definition["added_tokens"]}
    kinds = [added.get(number, NORMAL if number in by_id else UNUSED) for number in range(size)]
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    if not scored:
        return {f"{PREFIX}tokens": tokens, f"{PREFIX}token_type": kinds}
    for number, token in enumerate(tokens):
        if kinds[number] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[number] = BYTE
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(definition)):
        ranks.setdefault(left + right, rank)
    scores = [float(-ranks[token]) if token in ranks else NO_MERGE for token in tokens]
    return {f"{PREFIX}tokens": tokens, f"{PREFIX}scores": scores, f"{PREFIX}token_type": kinds}


def _special(tokenizer: Any) -> dict[str, Any]:
    """The ids of special tokens, which of them are added to a text, and the chat template."""
    ids = {name: getattr(tokenizer, f"{token}_id") for token, name in SPECIAL.items()}
    metadata: dict[str, Any] = {
        f"{PREFIX}{name}_token_id": number for name, number in ids.items() if number is not None
    }
    with quiet():
        plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    metadata[f"{PREFIX}add_bos_token"] = len(whole) > len(plain) and whole[0] == ids["bos"] != plain[0]
    metadata[f"{PREFIX}add_eos_token"] = len(whole) > len(plain) and whole[-1] == ids["eos"] != plain[-1]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return metadata if template is None else metadata | {CHAT_TEMPLATE: template}


def _adds_space(tokenizer: Any) -> bool:
    """Whether a text gets a space before its first word."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    return bool(tokens) and str(tokens[0]).startswith("▁")


def _difference(tokenizer: Any, arch: str, metadata: Mapping[str, Any]) -> str | None:
    """The first text for which transformers makes other token ids of the metadata; None where there is none."""
    try:
        with quiet():
            again = tokenizer_of(arch, metadata)
            for text in HARD_TEXTS:
                if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
                    return f"other token ids of {text!r}"
    except Exception as error:  # tokenizers raise errors of many types
        return shortened(cause(error), 200)
    return None
