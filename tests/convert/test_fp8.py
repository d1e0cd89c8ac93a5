"""Matrices of float8 with one scale per block are read as the matrices that they stand for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.reader import describe_model, read_model
from convert.writer import write_model
from minillm_jax.errors import InputError
from tests.helpers import (
    arrays_equal,
    edit_json,
    hugging_face_folder,
    load_stock,
    logits_of,
    random_tokens,
    torch_logits,
)

ROWS, COLUMNS = 16, 24
TOKENS = random_tokens(97, 2, 30)


def quantised(path: Path) -> tuple[Path, Path]:
    """A Llama with projections in blocks of float8, and the Llama that it stands for; some blocks are cut."""
    plain = hugging_face_folder(path / "plain")
    folder = hugging_face_folder(path / "float8")
    stored, exact = (load_file(one / "model.safetensors") for one in (folder, plain))
    for name in [name for name in stored if name.endswith("proj.weight")]:
        weight = stored[name]
        scales = torch.zeros(-(-weight.shape[0] // ROWS), -(-weight.shape[1] // COLUMNS))
        eight, dense = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros(weight.shape)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(i * ROWS, (i + 1) * ROWS), slice(j * COLUMNS, (j + 1) * COLUMNS))
                scales[i, j] = weight[block].abs().max() / 448
                eight[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
                dense[block] = eight[block].to(torch.float32) * scales[i, j]
        stored[name], stored[f"{name}_scale_inv"], exact[name] = eight, scales, dense
    save_file(stored, folder / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [ROWS, COLUMNS]}
    edit_json(folder / "config.json", quantization_config=settings)
    return folder, plain


def test_blocks_are_multiplied_out(tmp_path: Path) -> None:
    folder, plain = quantised(tmp_path)
    model, expected = read_model(folder), read_model(plain)
    assert arrays_equal(model.decoder, expected.decoder)
    assert str(describe_model(folder).abstract.embedding.dtype) == "float32"
    write_model(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    by_torch = torch_logits(load_stock(tmp_path / "out"), TOKENS)
    assert np.abs(by_torch - logits_of(model.decoder, TOKENS)).max() <= 1e-4


def test_the_type_is_that_of_the_configuration_or_the_one_asked_for(tmp_path: Path) -> None:
    folder, _ = quantised(tmp_path)
    assert read_model(folder, dtype="bfloat16").decoder.runs[0].mlp.up.kernel.dtype == "bfloat16"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_matrix_is_multiplied_out(tmp_path: Path, shape: tuple[int, ...]) -> None:
    plain, folder = hugging_face_folder(tmp_path / "plain"), hugging_face_folder(tmp_path / "float8")
    stored, exact = (load_file(one / "model.safetensors") for one in (folder, plain))
    for name in [name for name in stored if name.endswith("proj.weight")]:
        scale = stored[name].abs().max() / 448
        stored[name] = (stored[name] / scale).to(torch.float8_e4m3fn)
        exact[name] = stored[name].to(torch.float32) * scale
        stored |= {f"{name}_scale_inv": scale.reshape(shape)}
        stored |= {name.replace(".weight", ".activation_scale"): torch.tensor(0.5)}
    save_file(stored, folder / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    edit_json(plain / "config.json", torch_dtype="float32")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(raw))
    assert arrays_equal(read_model(folder).decoder, read_model(plain).decoder)


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder, _ = quantised(tmp_path)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 32]})
    with pytest.raises(InputError, match=r"the scales .*_scale_inv' of a float8 tensor of shape .* must have shape"):
        read_model(folder)
    settings = {"quant_method": "fp8", "weight_block_size": None}
    edit_json(folder / "config.json", quantization_config=settings)
    with pytest.raises(InputError, match=r"must have shape \(\), found \(\d, \d\)"):
        read_model(folder)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match=r"the weights are quantised \(fp8\)"):
        read_model(folder)
