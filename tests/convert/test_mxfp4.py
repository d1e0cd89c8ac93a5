"""Experts of four bits with one scale per 32 numbers are read as the numbers that they stand for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from convert.reader import read_model
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

TOKENS = random_tokens(97, 2, 30)
SIZES = {"hidden_size": 64, "intermediate_size": 32}


def packed(path: Path) -> tuple[Path, Path]:
    """A gpt-oss with experts of four bits, and the model that transformers makes of these bytes."""
    plain, folder = (hugging_face_folder(path / name, "gpt_oss", **SIZES) for name in ("plain", "packed"))
    stored, exact = (load_file(one / "model.safetensors") for one in (folder, plain))
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        exact[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(stored, folder / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    return folder, plain


def test_packed_experts_are_multiplied_out(tmp_path: Path) -> None:
    folder, plain = packed(tmp_path)
    model = read_model(folder)
    assert arrays_equal(model.decoder, read_model(plain).decoder)
    write_model(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    by_torch = torch_logits(load_stock(tmp_path / "out"), TOKENS)
    assert np.abs(by_torch - logits_of(model.decoder, TOKENS)).max() <= 1e-4


def test_missing_scales_are_one_sentence(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path)
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts\.down_proj_scales' of shape .*, found none"):
        read_model(folder)
