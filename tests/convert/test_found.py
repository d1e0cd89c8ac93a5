"""Folders and files that are no model: the error says what was found, and what to do."""

import builtins
import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from convert import found
from convert.reader import describe_model, locate, read_model
from convert.sources import INDEX, SINGLE, TORCH_SINGLE
from minillm_jax.errors import InputError
from tests.helpers import arrays_equal, edit_json, hugging_face_folder

UP = "model.layers.1.mlp.up_proj.weight"

Tensors = dict[str, Any]


def refusal(folder: Path) -> str:
    """The sentence with which a folder is refused, the same by its description and with its weights."""
    with pytest.raises(InputError) as caught:
        read_model(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "is the download complete" not in sentence
    assert len(sentence) < 400 + 2 * len(str(folder))
    return sentence


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / SINGLE)


def rename(folder: Path, new: Callable[[str], str]) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({new(name): tensor for name, tensor in tensors.items()}, folder / SINGLE)


# ------------------------------------------------------------------------------------------------- other contents

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>401</title></head></html>"


@pytest.mark.parametrize("name", ["config.json", SINGLE, TORCH_SINGLE])
def test_pointers_and_web_pages_are_named(folder: Path, name: str) -> None:
    if name == TORCH_SINGLE:
        (folder / SINGLE).unlink()
    (folder / name).write_text(POINTER)
    assert f"{folder / name}: a pointer of git-lfs and not the file itself; run `git lfs pull`" in refusal(folder)
    (folder / name).write_text("\n" + PAGE)
    assert f"{folder / name}: a web page (HTML) and not the file itself; download" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", SINGLE, TORCH_SINGLE])
def test_files_without_read_permission_are_named(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as a user who can read everything, so the refusal of the system is made here."""
    if name == TORCH_SINGLE:
        (folder / SINGLE).rename(folder / name)
    opened = Path.open

    def refused(path: Path, *arguments: Any, **more: Any) -> Any:
        if path == folder / name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(builtins, "open", refused)
    assert refusal(folder) == f"{folder / name}: cannot be read (Permission denied)"


def test_folders_without_permission_and_files_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = refusal(folder / SINGLE)
    assert sentence.endswith(f"a file, expected a folder with a config.json; give the folder of the model, {folder}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\1\0\0\0")
    assert "GGUF version 1, expected 2 or 3" in refusal(tmp_path / "model.gguf")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "an ONNX graph; give the Hugging Face folder" in refusal(tmp_path / "model.onnx")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert refusal(folder) == f"{folder}: the folder cannot be read (Permission denied)"


# ---------------------------------------------------------------------------------------------- other formats

# File names of a folder -> words of the sentence. The first has no config.json, the second has.
WITHOUT_CONFIG = {
    "consolidated.00.pth": "format of Meta or Mistral (consolidated.00.pth); give the Hugging Face folder",
    "consolidated.safetensors": "format of Meta or Mistral",
}
WITH_CONFIG = {
    "tf_model.h5": "no weights; it holds tf_model.h5: TensorFlow weights",
    "flax_model.msgpack": "no weights; it holds flax_model.msgpack: Flax weights of transformers",
    "model.onnx": "no weights; it holds model.onnx: an ONNX graph",
    "weights.pth": "no weights; it holds weights.pth: PyTorch weights under another name",
    "weights.safetensors": "no weights; it holds weights.safetensors: safetensors under another name",
    "model-1-of-2.safetensors": f"it holds shards (model-1-of-2.safetensors) but not their index, {INDEX}",
    "zero_to_fp32.py": "it holds a checkpoint of DeepSpeed; run zero_to_fp32.py",
}


def test_other_formats_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "optimizer.pt").write_bytes(b"")
    for name, words in WITH_CONFIG.items():
        (folder / name).write_bytes(b"")
        assert words in refusal(folder)
        (folder / name).unlink()
    for name, words in WITHOUT_CONFIG.items():
        other = tmp_path / "other"
        other.mkdir()
        (other / name).write_bytes(b"")
        sentence = refusal(other)
        assert sentence.startswith(f"{other / 'config.json'}: the file is missing; it holds ")
        assert words in sentence
        shutil.rmtree(other)


def test_adapters_are_named_with_their_base(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    adapter = {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}
    for place in (tmp_path / "adapter", folder):
        (place / "adapter_config.json").write_text(json.dumps(adapter))
        (place / SINGLE).unlink(missing_ok=True)
        sentence = refusal(place)
        assert "an adapter of PEFT and not a whole model; merge it into its base, owner/base, with PEFT" in sentence
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "merge it into its base with PEFT (merge_and_unload)" in refusal(tmp_path / "adapter")


def test_folder_of_a_model_below_is_advised(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    shutil.move(folder, cached / "snapshots" / "abc")
    assert f"it holds a folder with one; give {cached / 'snapshots' / 'abc'}" in refusal(cached)
    assert f"give {cached / 'snapshots' / 'abc'}" in refusal(cached / "snapshots")


# ------------------------------------------------------------------------------------------------------ quantised


METHOD = ", or load it with transformers, call model.dequantize() and save it"
GPTQMODEL = ", or run dequantize_model(FOLDER, NEW_FOLDER) of gptqmodel.utils.model_dequant, of the package GPTQModel"


def loaded(name: str) -> str:
    return f", or load it with transformers and quantization_config={name}(dequantize=True), and save it"


def test_the_configurations_that_messages_name_can_multiply_out() -> None:
    for words in found.DEQUANTISING.values():
        for name in re.findall(r"=(\w+)\(", words):
            assert "dequantize" in inspect.signature(getattr(transformers, name)).parameters


@pytest.mark.parametrize(
    ("settings", "name", "dtype", "words", "run"),
    [
        ({"quant_method": "gptq", "bits": 4}, UP.replace(".weight", ".qweight"), np.int32, "gptq", GPTQMODEL),
        ({"quant_method": "awq"}, UP.replace(".weight", ".qweight"), np.int32, "awq", GPTQMODEL),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, UP, np.uint8, "bitsandbytes", METHOD),
        ({"load_in_8bit": True}, UP, np.int8, "bitsandbytes, 8-bit", METHOD),
        ({"quant_method": "fp8"}, UP, ml_dtypes.float8_e4m3fn, "fp8", loaded("FineGrainedFP8Config")),
        (
            {"quant_method": "compressed-tensors"},
            *(UP + "_packed", np.int32, "compressed-tensors", loaded("CompressedTensorsConfig")),
        ),
        ({"quant_method": "mxfp4"}, UP + "_blocks", np.uint8, "mxfp4", loaded("Mxfp4Config")),
        ({"quant_method": "hqq"}, UP.replace(".weight", ".W_q"), np.uint8, "hqq", ""),
    ],
)
def test_quantised_weights_are_named_by_their_method(
    folder: Path, settings: dict[str, Any], name: str, dtype: Any, words: str, run: str
) -> None:
    edit_json(folder / "config.json", quantization_config=settings)
    read_model(folder)  # a dequantised model that kept the setting
    tensors = {key: torch.from_numpy(value) for key, value in load_file(folder / SINGLE).items() if key != UP}
    kinds = {np.int32: torch.int32, np.uint8: torch.uint8, np.int8: torch.int8}
    stored = torch.ones(4, 4).to(kinds.get(dtype, torch.float8_e4m3fn))
    save_torch_file(tensors | {name: stored}, folder / SINGLE, {"format": "pt"})
    assert refusal(folder) == f"{folder}: the weights are quantised ({words}); give the model that was quantised{run}"
    (folder / SINGLE).unlink()  # a model on the Hub is described without its weights
    with pytest.raises(InputError, match="the weights are quantised"):
        describe_model(folder)


@pytest.mark.parametrize(
    ("end", "method"),
    [
        (".qweight", "gptq or awq"),
        (".qzeros", "gptq or awq"),
        (".weight_scale_inv", "fp8"),
        (".weight_scale", "float8 with one scale for a matrix or a row"),
        (".weight.absmax", "bitsandbytes"),
        (".SCB", "bitsandbytes"),
        (".weight_packed", "compressed-tensors"),
    ],
)
def test_quantised_weights_are_named_by_their_tensors(folder: Path, end: str, method: str) -> None:
    name = UP.replace(".weight", end)
    rewrite(folder, lambda tensors: tensors.update({name: np.ones((2, 2), np.float32)}))
    assert f"tensor '{name}' belongs to quantised weights ({method}); give the model" in refusal(folder)


# ------------------------------------------------------------------------------------------------- wrapped names


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("model.layers.1.", "model.layers.1._orig_mod."),
        lambda name: name.replace("model.layers", "model._fsdp_wrapped_module.layers"),
    ],
)
def test_names_of_wrapped_modules_are_read(dense: Path, folder: Path, wrap: Callable[[str], str]) -> None:
    rename(folder, wrap)
    assert arrays_equal(read_model(folder).decoder, read_model(dense).decoder)


def test_wrapped_names_of_a_tied_model_are_read(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model", tie_word_embeddings=True)
    expected = read_model(folder).decoder
    rename(folder, lambda name: f"model.{name}")
    assert arrays_equal(read_model(folder).decoder, expected)


def test_names_of_other_models_are_shown(folder: Path) -> None:
    rename(folder, lambda name: f"student.{name}")
    sentence = refusal(folder)
    assert "none of the model's tensors is there; expected names such as 'lm_head.weight', found 'student." in sentence
    rename(folder, lambda name: name.removeprefix("student."))
    rewrite(folder, lambda tensors: tensors.update({"module.step": np.ones(1, np.float32)}))
    assert "unknown tensor 'module.step'" in refusal(folder)


def test_adapters_that_are_not_merged_are_named(folder: Path) -> None:
    name = UP.replace(".weight", ".lora_A.default.weight")
    rewrite(folder, lambda tensors: tensors.update({name: np.ones((2, 2), np.float32)}))
    assert "belongs to an adapter of PEFT that is not merged; call merge_and_unload" in refusal(folder)


def test_models_that_are_given_as_files_or_not_at_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json: the file is missing; a model folder needs it"):
        read_model(tmp_path / "empty")
    with pytest.raises(InputError, match="the model '' is no path; give a path on this machine or a Hub id"):
        locate("")
