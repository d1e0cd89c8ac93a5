"""The tokenizer of a model folder, read as transformers reads it, but never with code from the folder."""

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from minillm_jax.errors import InputError, cause
from minillm_jax.model.families import FAMILIES, PRUNED

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"

# Names of files that hold a vocabulary. Without one, some classes of transformers make an empty tokenizer.
VOCABULARIES = ("tokenizer*.json", "vocab*", "*.model", "*.model.v*", "*.tiktoken", "tekken.json", "merges.txt")

# The modules with which transformers reads a sentencepiece model.
_READERS = ("sentencepiece", "google.protobuf")

_INSTEAD = "give token ids as .npy instead"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder in any format, a `PreTrainedTokenizerBase` of transformers.

    transformers chooses the class of a tokenizer by `tokenizer_class` in tokenizer_config.json and by the model type.
    The model type of a per-layer folder, `pruned_opt`, is known to its remote code only, and here counts as `opt`.

    Raises:
      InputError: the folder has no tokenizer, or one that cannot be read without code from the folder.
    """
    if not has_vocabulary(folder):
        raise InputError(
            f"{folder}: no usable tokenizer (the folder has no tokenizer.json; add the files, or {_INSTEAD})"
        )
    try:
        with quiet():
            return _load_as_base(folder)
    except Exception as error:  # tokenizers raise errors of many types
        raise InputError(f"{folder}: no usable tokenizer ({_reason(folder, error)})") from error


def load_plainly(folder: Path) -> Any:
    """The tokenizer that `AutoTokenizer.from_pretrained(folder)` gives; raises the errors of transformers."""
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a file that may hold a vocabulary; tokenizer_config.json alone holds none."""
    try:
        names = {path.name for path in folder.iterdir()} - {TOKENIZER_CONFIG}
    except OSError:  # the folder has vanished
        return False
    return any(fnmatch(name, pattern) for name in names for pattern in VOCABULARIES)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers inside the block: its advice is for its own callers, who can act on it."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _load_as_base(folder: Path) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    raw = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
    model_type = str(raw.get("model_type"))
    base = model_type.removeprefix(PRUNED)
    if base == model_type or base not in FAMILIES:
        return load_plainly(folder)
    config = AutoConfig.for_model(FAMILIES[base].defaults or base, tokenizer_class=raw.get("tokenizer_class"))
    return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


def _reason(folder: Path, error: Exception) -> str:
    """Why a tokenizer cannot be read, and what helps; the advice of transformers often does not apply."""
    if "trust_remote_code" in str(error):
        return f"it needs Python code of that folder, which is never run; {_INSTEAD}"
    path = folder / SENTENCEPIECE
    if path.is_file() and not (folder / "tokenizer.json").is_file():
        return f"{_sentencepiece_reason(path, error)}; or {_INSTEAD}"
    if (folder / "vocab.json").is_file() and "backend tokenizer" in str(error):
        return (
            "transformers cannot tell how vocab.json is to be read; make a tokenizer.json with "
            f"transformers.GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder), or {_INSTEAD}"
        )
    return f"{cause(error)}; {_INSTEAD}"


def _sentencepiece_reason(path: Path, error: Exception) -> str:
    """The reason for a folder with tokenizer.model alone, which is in the format of sentencepiece or of tiktoken."""
    with path.open("rb") as file:
        start = file.read(200)
    if start.startswith(b"version https://git-lfs"):
        return f"{path.name} is a Git LFS pointer and not the file itself; run git lfs pull"
    words = start.split(b"\n")[0].split()  # a line of tiktoken's format is a token in base 64 and its rank
    is_tiktoken = len(words) == 2 and words[1].isdigit()
    missing = [name for name in (("tiktoken",) if is_tiktoken else _READERS) if not _is_installed(name)]
    if missing:
        packages = [name.removeprefix("google.") for name in missing]
        return f"{path.name} needs {' and '.join(packages)}: pip install {' '.join(packages)}"
    if is_tiktoken:
        return cause(error)
    return f"{path.name} is not a whole sentencepiece model; is the download complete?"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing, or an import without a specification
        return False
