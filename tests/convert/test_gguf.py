"""GGUF: every architecture comes back bit for bit, and transformers' own reader computes the same logits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from convert import formats, gguf_file
from convert.gguf_names import CHANGES
from convert.reader import describe_model, read_model
from convert.writer import write_model
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model import axis_table
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, named_arrays, sizes_of
from minillm_jax.pruning.slicing import slice_groups, slice_hidden
from tests.helpers import LLAMA_ROPE, hugging_face_folder, load_torch, logits_of, quickly, random_tokens, torch_logits

TOKENS = random_tokens(97, 2, 24)

# Name -> family, and the changes of its small configuration with which llama.cpp computes it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA_ROPE}),
    "llama, linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 10}),
    "phi3": ("phi3", {}),
    "phi3, partial rotary": ("phi3", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
}
QUICK = ("llama, biases", "llama, llama3 rope", "gemma2", "gpt_neox", "qwen3", "phi3, partial rotary")


def model_of(folder: Path, name: str, **changes: Any) -> Model:
    family, given = MODELS[name]
    return read_model(hugging_face_folder(folder, family, **given | changes))


def ragged(model: Model, kinds: tuple[str, ...] = axis_table.KINDS) -> Model:
    """Each layer keeps other numbers of heads and channels."""
    rng, kept = np.random.default_rng(3), {}
    for kind in axis_table.KINDS:
        counts = group_counts(model.decoder, kind)
        fewer = [max(1, n - 1 - layer) if kind in kinds else n for layer, n in enumerate(counts)]
        kept[kind] = [np.sort(rng.choice(n, k, replace=False)) for n, k in zip(counts, fewer, strict=True)]
    return dataclasses.replace(model, decoder=slice_groups(model.decoder, kept))


def assert_same_arrays(left: Model, right: Model) -> None:
    """Bit for bit; but for the norms of Gemma, which GGUF stores as 1 + w in float32."""
    first, second = dict(named_arrays(left.decoder)), dict(named_arrays(right.decoder))
    assert first.keys() == second.keys()
    for path, array in first.items():
        if left.decoder.config.norm == "rms_plus_one" and path.endswith("scale"):
            assert np.abs(np.asarray(array) - np.asarray(second[path])).max() <= 2**-23
        else:
            assert np.array_equal(array, second[path]), path


# --------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", quickly(MODELS, QUICK))
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    model = model_of(tmp_path / "model", name)
    written = write_model(model, tmp_path / "out", "gguf")
    assert written.format == formats.GGUF
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.gguf"]
    for path in (tmp_path / "out", tmp_path / "out" / "model.gguf"):
        back = read_model(path)
        assert_same_arrays(model, back)
    assert sizes_of(back.decoder) == sizes_of(model.decoder)
    expected, found = (dataclasses.replace(one.decoder.config, family="") for one in (model, back))
    assert found == expected
    assert np.abs(logits_of(back.decoder, TOKENS) - logits_of(model.decoder, TOKENS)).max() <= 1e-5


# transformers reads no GGUF of gemma and gptneox. It takes the head size of Llama from the rotary features, and that of
# Qwen 3 and the scale of the queries of Gemma 2 from its own defaults.
READ_BY_TRANSFORMERS = {
    "llama": {"head_dim": 8},
    "llama, tied": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 128, "num_attention_heads": 4},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "phi3": {},
}


@pytest.mark.parametrize("name", quickly(READ_BY_TRANSFORMERS, ("llama", "gemma2")))
def test_transformers_reads_the_same_model(tmp_path: Path, name: str) -> None:
    model = model_of(tmp_path / "model", name, **READ_BY_TRANSFORMERS[name])
    write_model(model, tmp_path / "out", "gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    assert np.abs(torch_logits(theirs, TOKENS) - logits_of(model.decoder, TOKENS)).max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_unequal_layers_are_deci(tmp_path: Path, family: str) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = ragged(read_model(hugging_face_folder(tmp_path / "model", family, **changes)))
    write_model(model, tmp_path / "out", "gguf")
    file = gguf_file.open_gguf(tmp_path / "out" / "model.gguf")
    layers = sizes_of(model.decoder).layers
    assert file.arch == "deci"
    assert file.value("attention.head_count") == [layer.N for layer in layers]
    assert file.value("attention.head_count_kv") == [layer.K for layer in layers]
    assert file.value("feed_forward_length") == [layer.F for layer in layers]
    assert [file.value(f"attention.{one}_length") for one in ("key", "value")] == [10, 10]
    assert file.value("rope.dimension_count") == 10
    back = read_model(tmp_path / "out")
    assert_same_arrays(model, back)
    assert sizes_of(back.decoder) == sizes_of(model.decoder)
    # A GGUF becomes a folder for transformers.
    write_model(back, tmp_path / "folder")
    assert np.abs(torch_logits(load_torch(tmp_path / "folder"), TOKENS) - logits_of(model.decoder, TOKENS)).max() <= 1e-4
    write_model(back, tmp_path / "again", "gguf")
    same = (tmp_path / "again" / "model.gguf").stat().st_size - (tmp_path / "out" / "model.gguf").stat().st_size
    assert abs(same) < 64  # the names of the models differ in length
