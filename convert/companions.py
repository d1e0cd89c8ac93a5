"""Companions of a model: the files beside its weights that are downloaded with it and copied beside written weights.

Every file of a model folder is a companion (tokenizer, chat templates, licence, generation settings, notes) unless a
list of this module says that it is replaced, or is no part of the model.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from minillm_jax.errors import reason as reason_of
from minillm_jax.errors import warn

# The patterns are matched to paths relative to the folder, in lower case; `*` matches `/` too, as for the Hub client.

# Weights and the state of their training, in any framework. The writer writes the weights anew.
WEIGHTS = (
    *("*.safetensors", "*.safetensors.*", "*.bin", "*.bin.*", "*.pt", "*.pth", "*.ckpt", "*.ckpt.*", "*.h5", "*.keras"),
    *("*.msgpack", "*.msgpack.*", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data*", "*.npz", "*.npy", "*.pkl", "*.pickle"),
    *("*.tflite", "*.mlmodel", "*.mlpackage/*", "*.nemo", "*.index.json", "*.distcp", "flax_weights/*", "adapter_*"),
    *("*/adapter_*", "quantize_config.json", "quant_config.json", "optimizer*", "scheduler*", "rng_state*"),
    *("trainer_state.json", "checkpoint-*/*", "global_step*", "runs/*", "wandb/*", "logs/*", "*.tfevents.*", "*.log"),
)

# Files that the writer and the command line write themselves. The code of a model (`modeling_*.py`) belongs to the
# weights of the input; code of a tokenizer is copied, because tokenizer_config.json refers to it.
WRITTEN = (
    *("config.json", "pruning.json", "recipe.toml", "report.json", "report.html", "readme.md"),
    *("modeling_*.py", "configuration_*.py", "*/modeling_*.py", "*/configuration_*.py"),
)

# Hidden files and caches.
HIDDEN = (".*", "*/.*", "*__pycache__/*", "*.pyc", "*.lock")

# Archives, data sets and films may be as large as the weights. Those of a local folder are named as left out.
LARGE = (
    *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.gz", "*.bz2", "*.xz", "*.zst", "*.7z", "*.parquet", "*.arrow"),
    *("*.mp4", "*.mov", "*.webm", "*.mp3", "*.wav"),
)

# Files that the Hub client leaves out. It fetches config.json and pruning.json, which are read but not copied.
NOT_FETCHED = (*WEIGHTS, *HIDDEN, *LARGE, "README.md", *(pattern for pattern in WRITTEN if pattern.endswith(".py")))

# A tokenizer has tens of megabytes at most. Files in subfolders are templates and notes.
LARGEST_FILE = 200 * 2**20
LARGEST_IN_SUBFOLDER = 10 * 2**20
MOST_FILES = 500
MOST_NAMED = 5


def copy(source: Path, target: Path, reserved: Iterable[str] = ()) -> None:
    """Copy the companions of a model folder into a new folder, which keeps the files that it has.

    A file that cannot be copied is left out, and one `InputWarning` names all of them: no companion is worth the loss
    of the weights beside it. A link is followed only to a file inside the model folder, or inside the folder of the
    model's repository in the Hub's cache.

    Args:
      source: the folder of the model that was read.
      target: the folder that is being written.
      reserved: names of files that are written into `target` later.
    """
    taken, left_out = {name.lower() for name in reserved}, {}
    for number, path in enumerate(_files(source, left_out)):
        name = path.relative_to(source)
        if number == MOST_FILES:
            left_out[f"{name.as_posix()} and all further files"] = f"there are more than {MOST_FILES} files"
            break
        if name.as_posix().lower() in taken or (target / name).exists():
            continue
        reason = _refusal(path, source) or _copy_file(path, target / name)
        if reason is not None:
            left_out[name.as_posix()] = reason
    if left_out:
        listed = [f"{name} ({reason})" for name, reason in list(left_out.items())[:MOST_NAMED]]
        more = [f"{len(left_out) - MOST_NAMED} more"] if len(left_out) > MOST_NAMED else []
        warn(
            f"{source}: not copied beside the weights: {', '.join(listed + more)}; "
            "copy by hand what the written model needs"
        )


def is_replaced(name: str) -> bool:
    """Whether a file is no companion, by its path relative to the model folder."""
    return _matches(name, (*WEIGHTS, *WRITTEN, *HIDDEN))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _files(source: Path, left_out: dict[str, str]) -> Iterator[Path]:
    """The companions of a folder, its own files first. A subfolder with a config.json is another model."""

    def note(error: OSError) -> None:
        left_out[os.path.relpath(error.filename or source, source)] = _cause(error)

    for place, folders, names in os.walk(source, onerror=note):
        here = Path(place)
        if here != source and "config.json" in names:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not is_replaced(f"{_relative(here / name, source)}/"))
        for name in folders:
            if (here / name).is_symlink():  # os.walk lists links to folders, but does not follow them
                left_out[_relative(here / name, source)] = "a link to a folder"
        yield from (here / name for name in sorted(names) if not is_replaced(_relative(here / name, source)))


def _relative(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix()


def _refusal(path: Path, source: Path) -> str | None:
    """Why a file is not copied; None for a file that is."""
    nested = path.parent != source
    try:
        real, folder = path.resolve(strict=True), source.resolve()
        if path.is_symlink() and not any(real.is_relative_to(root) for root in _roots(folder)):
            return "a link to a file outside the model folder"
        if not real.is_file():
            return "not a regular file"
        size = real.stat().st_size
        if size > (LARGEST_IN_SUBFOLDER if nested else LARGEST_FILE) or _matches(path.name, LARGE):
            return f"{size / 1e6:,.1f} MB"
        if nested and not _is_text(real):
            return "not a text file"
    except (OSError, RuntimeError) as error:  # a RuntimeError says that links form a loop
        return _cause(error)
    return None


def _roots(folder: Path) -> list[Path]:
    """The folders that a link may lead to. In the Hub's cache the files of a snapshot are links to `blobs`."""
    return [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _copy_file(path: Path, copied: Path) -> str | None:
    """Copy a file; the reason why not, where that fails."""
    try:
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    except OSError as error:
        with suppress(OSError):
            copied.unlink(missing_ok=True)
        return _cause(error)
    return None


def _cause(error: Exception) -> str:
    """The reason of a failed file operation without the paths, which the message names already."""
    return reason_of(error).lower()
