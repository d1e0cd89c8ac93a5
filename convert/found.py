"""What a file or folder holds that is no model: a clause for an error message."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HTML_STARTS = (b"<!doctype html", b"<html", b"<head")
GIT_LFS = b"version https://git-lfs"

# How the weights of other formats are told by the ends of file names, and what to do.
OTHER_FORMATS = {
    ".gguf": "GGUF weights (llama.cpp); give the path of the .gguf file",
    ".ggml": "GGML weights (llama.cpp); give the Hugging Face folder that they were made from",
    ".h5": "TensorFlow weights; load them with transformers and save them as safetensors",
    ".msgpack": "Flax weights of transformers; load them with transformers and save them as safetensors",
    ".onnx": "an ONNX graph; give the Hugging Face folder that it was exported from",
    ".npz": "NumPy arrays; save the model with transformers as safetensors",
    ".ckpt": "a training checkpoint; save the model's state_dict as pytorch_model.bin or as safetensors",
    ".pth": "PyTorch weights under another name; save the model's state_dict as pytorch_model.bin",
    ".pt": "PyTorch weights under another name; save the model's state_dict as pytorch_model.bin",
    ".bin": "weights under another name; rename the file to pytorch_model.bin if it holds the model's state_dict",
    ".safetensors": "safetensors under another name; rename the file to model.safetensors if it holds the whole model",
}

# Beginnings of the names of files that a training leaves beside the weights.
TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")

# Ends of the names that quantised weights and their scales have, and the method that writes them.
QUANTISED_NAMES = {
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "float8 with one scale for a matrix or a row",
    ".weight_packed": "compressed-tensors",
    ".W_q": "hqq",
}

_METHOD = "load it with transformers, call model.dequantize() and save it"
_LOADED = "load it with transformers and quantization_config={}(dequantize=True), and save it"
_GPTQMODEL = "run dequantize_model(FOLDER, NEW_FOLDER) of gptqmodel.utils.model_dequant, of the package GPTQModel"

# What to run first: beginning of the name of a method → what multiplies the weights out.
DEQUANTISING = {
    "bitsandbytes": _METHOD,
    "higgs": _METHOD,
    "fp8": _LOADED.format("FineGrainedFP8Config"),
    "mxfp8": _LOADED.format("FineGrainedFP8Config"),
    "mxfp4": _LOADED.format("Mxfp4Config"),
    "compressed-tensors": _LOADED.format("CompressedTensorsConfig"),
    "gptq": _GPTQMODEL,
    "awq": _GPTQMODEL,
}


def file_content(path: Path) -> str | None:
    """What a file that could not be parsed holds, and what to do; None where it says nothing about itself."""
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip().lower()
    except OSError:
        return None
    if start.startswith(GIT_LFS):
        return "a pointer of git-lfs and not the file itself; run `git lfs pull` in the folder"
    if start.startswith(HTML_STARTS):
        return "a web page (HTML) and not the file itself; download the file again, with a login where the model asks"
    if start.startswith(b"gguf"):
        return OTHER_FORMATS[".gguf"]
    return None


def other_model(folder: Path) -> str | None:
    """What a folder without weights or without config.json holds instead, and what to do; None where nothing is known.

    Only names are read, and adapter_config.json.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return None
    if "adapter_config.json" in names:
        return _adapter(folder / "adapter_config.json")
    consolidated = [name for name in names if name.startswith("consolidated.")]
    if consolidated:
        return (
            f"it holds weights in the format of Meta or Mistral ({consolidated[0]}); "
            "give the Hugging Face folder of the model, or convert them with transformers"
        )
    shards = [name for name in names if name.startswith(("model-", "pytorch_model-")) and "-of-" in name]
    if shards and "config.json" in names:
        index = "model.safetensors" if shards[0].endswith(".safetensors") else "pytorch_model.bin"
        return f"it holds shards ({shards[0]}) but not their index, {index}.index.json; download the index too"
    if "zero_to_fp32.py" in names:
        return "it holds a checkpoint of DeepSpeed; run zero_to_fp32.py in it to make the weights"
    for suffix, what in OTHER_FORMATS.items():
        found = [name for name in names if name.lower().endswith(suffix) and not name.startswith(TRAINING)]
        if found and not _is_known(found[0]):
            return f"it holds {found[0]}: {what}"
    return _model_below(folder) if "config.json" not in names else None


def _is_known(name: str) -> bool:
    return name in ("model.safetensors", "pytorch_model.bin") or "-of-" in name


def _adapter(config: Path) -> str:
    base = None
    with suppress(OSError, ValueError, AttributeError):
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    named = f", {base}," if base else ""
    return (
        f"it holds an adapter of PEFT and not a whole model; merge it into its base{named} with PEFT "
        "(merge_and_unload) and save the result"
    )


def _model_below(folder: Path) -> str | None:
    """The folder of a model below a folder: of a checkpoint of a training, or of a snapshot in the Hub's cache."""
    for pattern in ("*/config.json", "snapshots/*/config.json", "*/adapter_config.json"):
        below = sorted(folder.glob(pattern))
        if below:
            return f"it holds a folder with one; give {below[-1].parent}"
    return None


def quantisation(raw: Mapping[str, Any]) -> str | None:
    """The method by which a configuration says that the weights are quantised; None where it says nothing."""
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if not isinstance(settings, Mapping):
        return None
    bits = next((f"{n}-bit" for n in (4, 8) if settings.get(f"load_in_{n}bit")), None)
    return str(settings.get("quant_method") or (f"bitsandbytes, {bits}" if bits else "an unnamed method"))


def dequantising(method: str) -> str:
    """What to do with a model that was quantised by a method: a clause for an error message."""
    run = next((words for name, words in DEQUANTISING.items() if method.startswith(name)), None)
    return "give the model that was quantised" + ("" if run is None else f", or {run}")


def quantised_tensor(names: Iterable[str]) -> tuple[str, str] | None:
    """The first tensor whose name tells that the weights are quantised, and the method; None where there is none."""
    for name in names:
        for end, method in QUANTISED_NAMES.items():
            if name.endswith(end):
                return name, method
    return None
