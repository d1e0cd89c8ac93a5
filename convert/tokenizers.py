"""The tokenizer of a written folder: it gives the same token ids as the tokenizer of the folder that was read.

transformers chooses the class of a tokenizer by the model type of config.json as well, and every class builds another
tokenizer from the same files. Where the model type changes (a Llama written as Mistral, or per-layer), copied files may
therefore mean another tokenizer. `settle` compares both tokenizers and, where they differ, writes the tokenizer that
was read in place of the copied files.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert.sources import read_json
from minillm_jax.data.tokenizer import CONFIG, TOKENIZER_CONFIG, has_vocabulary, load_plainly, load_tokenizer, quiet
from minillm_jax.errors import InputError, cause, warn
from minillm_jax.model.families import PRUNED

# Texts in which tokenizers differ: spaces, line breaks, digits, other scripts, combining marks, emoji, code, controls.
HARD_TEXTS = (
    "",
    " ",
    "Hello world",
    " Hello",
    "  two  spaces  ",
    "\n",
    "\n\n a\n\n\nb",
    "\ttab\tand\r\nreturn",
    "end \n",
    "It's we'll DON'T",
    "1234567890 3.14 1,000,000 ٣",
    "naïve café – “quotes” … ½",
    "cafe\u0301 ﬁ Ａ №",
    "中文，日本語 한국어 العربية हिन्दी",
    "🙂 👩‍👩‍👧 🇩🇪",
    "def f(x):\n    return x**2  # ok\n",
    "<html>&amp;</html> a_b-c/d\\e @#$%^",
    "▁under Ġ Ċ \u00a0 \u200b \ufeff",
    "\x00\x07\x7f",
    "aaaaaaaaaaaaaaaaaaaa",
)

# Names of tokenizer files, which a GGUF file replaces.
FILES = (
    *("tokenizer.json", TOKENIZER_CONFIG, "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "generation_config.json"),
)

# File names that `save_pretrained` of transformers 5 no longer writes; copies beside its files would override them.
_FORMER_FILES = ("special_tokens_map.json", "added_tokens.json")

# Keys that `save_pretrained` leaves in tokenizer_config.json although they describe the folder that was read.
_LOCAL = ("vocab_file", "merges_file", "is_local", "local_files_only")

# Class names of transformers for any tokenizer.json; the second one is understood by version 4 too.
_BACKEND, _ANY = "TokenizersBackend", "PreTrainedTokenizerFast"

# Attributes that some classes set, and that tokenizer_config.json holds for every class.
_FLAGS = ("padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")


def settle(source: Path, folder: Path) -> None:
    """Make the tokenizer of a new folder equal to that of its source; issues an `InputWarning` where that fails.

    Nothing is raised for a tokenizer, because the weights in the new folder are worth more.

    Args:
      source: the folder of the model that was read.
      folder: the new folder, with its config.json and with copies of the source's tokenizer files.
    """
    if not has_vocabulary(source):
        return
    model_type, changed = _model_type(folder), True
    try:
        changed = model_type.startswith(PRUNED) or model_type != _model_type(source)
        tokenizer = load_tokenizer(source)
    except InputError as error:
        if changed:
            warn(f"{error}; its files are copied unchecked, and may mean another tokenizer in the written format")
        return
    try:
        different = _settle(tokenizer, folder, changed)
    except Exception as error:  # tokenizers raise errors of many types
        different = cause(error)
    if different:
        warn(
            f"{source}: the tokenizer beside the written weights differs from the one that was read ({different}); "
            f"use the tokenizer of {source} with the written model"
        )


def differences(tokenizer: Any, folder: Path) -> str:
    """What differs between a tokenizer and that of a folder, by our loader and by transformers; "" if nothing does."""
    loaders = (load_tokenizer, load_plainly) if _model_type(folder).startswith(PRUNED) else (load_plainly,)
    special = [str(token) for token in tokenizer.all_special_tokens]
    texts = [*HARD_TEXTS, *special, *(f"a{token} b{token}{token}\nc {token} d" for token in special[:8])]
    expected = _behaviour(tokenizer, texts)
    for load in loaders:
        try:
            found = _behaviour(load(folder), texts)
        except Exception as error:  # the class of another model type may not read the files
            return cause(error)
        for key, value in expected.items():
            if found[key] != value:
                return key
    return ""


def _settle(tokenizer: Any, folder: Path, changed: bool) -> str:
    """Try the copied files, then the files of the tokenizer as it was read; the difference that remains."""
    if changed:
        _add_keys(folder, _class_keys(tokenizer, folder))
    different = differences(tokenizer, folder)
    if not different:
        return ""
    copied = {path: path.read_bytes() for path in _tokenizer_files(folder)}
    with quiet():
        tokenizer.save_pretrained(folder)
    for name in _FORMER_FILES:
        (folder / name).unlink(missing_ok=True)
    _add_keys(folder, _class_keys(tokenizer, folder, resolved=True))
    if not differences(tokenizer, folder):
        return ""
    for path in _tokenizer_files(folder):
        path.unlink()
    for path, content in copied.items():
        path.write_bytes(content)
    return different


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that `save_pretrained` may write or that are removed after it."""
    written = ("tokenizer.json", TOKENIZER_CONFIG, "chat_template.jinja", "vocab.json", "merges.txt", *_FORMER_FILES)
    return [folder / name for name in written if (folder / name).is_file()]


def _class_keys(tokenizer: Any, folder: Path, resolved: bool = False) -> dict[str, Any]:
    """The keys of tokenizer_config.json that make transformers read the files as they were read.

    Args:
      tokenizer: the tokenizer that was read.
      folder: the folder with the files.
      resolved: whether tokenizer.json holds the whole definition of the tokenizer, written by `save_pretrained`.
    """
    name = type(tokenizer).__name__
    whole = (folder / "tokenizer.json").is_file() and (
        name == _BACKEND or (resolved and getattr(tokenizer, "is_fast", False))
    )
    keys: dict[str, Any] = {"tokenizer_class": _ANY if whole else name}
    if resolved:
        keys |= {flag: getattr(tokenizer, flag) for flag in _FLAGS if hasattr(tokenizer, flag)}
    # transformers takes every large vocabulary of model type `mistral` for one with a known fault, and warns of it.
    if _model_type(folder) == "mistral" or "fix_mistral_regex" in getattr(tokenizer, "init_kwargs", ()):
        keys["fix_mistral_regex"] = False
    return keys


def _add_keys(folder: Path, keys: dict[str, Any]) -> None:
    """Add keys to tokenizer_config.json, which is created where it is missing."""
    path = folder / TOKENIZER_CONFIG
    value = {key: item for key, item in (read_json(path) if path.is_file() else {}).items() if key not in _LOCAL}
    path.write_text(json.dumps(value | keys, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _behaviour(tokenizer: Any, texts: Iterable[str]) -> dict[str, Any]:
    """What a tokenizer does, by the words for it in a message."""
    behaviour: dict[str, Any] = {}
    with quiet():
        for text in texts:
            ids = _ids(tokenizer, text)
            behaviour[f"the token ids of {text!r}"] = ids
            behaviour[f"the inputs made of {text!r}"] = ids and dict(tokenizer(text))
            behaviour[f"the text decoded from the ids of {text!r}"] = ids and tokenizer.decode(ids)
    behaviour["the size of the vocabulary"] = len(tokenizer)
    behaviour["the special tokens"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    behaviour["the chat template"] = tokenizer.chat_template
    behaviour["the side of the padding"] = tokenizer.padding_side
    return behaviour


def _ids(tokenizer: Any, text: str) -> list[int] | None:
    """Token ids of a text; None for a text that the tokenizer refuses, as one without an unknown token may do."""
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception:  # tokenizers raise plain exceptions
        return None


def _model_type(folder: Path) -> str:
    return str(read_json(folder / CONFIG).get("model_type"))
