"""GGUF: every architecture comes back bit for bit, and transformers' own reader computes the same logits."""

import dataclasses
import json
import sys
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
from tests.helpers import (
    LLAMA_ROPE,
    YARN,
    hugging_face_folder,
    load_torch,
    logits_of,
    quickly,
    random_tokens,
    torch_logits,
)

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
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": []}),
    "olmoe": ("olmoe", {"num_key_value_heads": 8}),
    "glm4_moe": ("glm4_moe", {}),
}
QUICK = ("llama, biases", "llama, llama3 rope", "gemma2", "gpt_neox", "qwen3", "phi3, partial rotary")
QUICK += ("mixtral", "qwen2_moe", "glm4_moe")


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
# Qwen 3, the widths of experts and the scale of the queries of Gemma 2 from its own defaults.
READ_BY_TRANSFORMERS = {
    "llama": {"head_dim": 8},
    "llama, tied": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 128, "num_attention_heads": 4},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "phi3": {},
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"moe_intermediate_size": 768},
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
    assert (
        np.abs(torch_logits(load_torch(tmp_path / "folder"), TOKENS) - logits_of(model.decoder, TOKENS)).max() <= 1e-4
    )
    write_model(back, tmp_path / "again", "gguf")
    same = (tmp_path / "again" / "model.gguf").stat().st_size - (tmp_path / "out" / "model.gguf").stat().st_size
    assert abs(same) < 64  # the names of the models differ in length


# --------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-7)])
def test_matrices_are_written_in_the_type_asked_for(tmp_path: Path, kind: str, tolerance: float) -> None:
    model = model_of(tmp_path / "model", "llama, biases", intermediate_size=64, head_dim=8)
    write_model(model, tmp_path / "out", "gguf", gguf_type=kind)
    entries = gguf_file.open_gguf(tmp_path / "out" / "model.gguf").entries
    assert {entry.type for entry in entries.values() if len(entry.shape) > 1} == {kind.upper()}
    assert {entry.type for entry in entries.values() if len(entry.shape) == 1} == {"F32"}
    back = read_model(tmp_path / "out")
    stored = {"f16": "float16", "bf16": "bfloat16", "q8_0": "float32"}[kind]
    assert describe_model(tmp_path / "out").abstract.embedding.dtype == back.decoder.embedding.dtype == stored
    arrays = dict(named_arrays(back.decoder))
    for path, array in named_arrays(model.decoder):
        expected, found = np.asarray(array, np.float32), np.asarray(arrays[path], np.float32)
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), path
    write_model(back, tmp_path / "again", "gguf", gguf_type=kind)
    again = read_model(tmp_path / "again")
    assert all(np.array_equal(array, dict(named_arrays(again.decoder))[path]) for path, array in arrays.items())


def test_rows_without_blocks_are_f16_and_named(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "llama", head_dim=8)  # 40 channels
    with pytest.warns(InputWarning, match=r"3 matrices such as blk\.0\.ffn_down\.weight are F16.*--round-width-to 32"):
        write_model(model, tmp_path / "out", "gguf", gguf_type="q8_0")
    entries = gguf_file.open_gguf(tmp_path / "out" / "model.gguf").entries
    assert (entries["blk.0.ffn_down.weight"].type, entries["blk.0.ffn_up.weight"].type) == ("F16", "Q8_0")


def stored_as(source: Path, target: Path, kind: str) -> dict[str, np.ndarray]:
    """Write a GGUF file again with matrices of another type; the values that the `gguf` package decodes."""
    reader, quantised = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    writer, values = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents()), {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if data.ndim > 1 and kind not in ("F32", "F16"):
            data = gguf.quantize(data, quantised)
            writer.add_tensor(tensor.name, data, raw_dtype=quantised)
            values[tensor.name] = gguf.dequantize(data, quantised)
        else:
            writer.add_tensor(tensor.name, data)
            values[tensor.name] = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_quantised_weights_are_decoded(tmp_path: Path, kind: str) -> None:
    model = model_of(tmp_path / "model", "qwen2", intermediate_size=64)
    write_model(model, tmp_path / "plain", "gguf")
    (tmp_path / "small").mkdir()
    path = tmp_path / "small" / f"a-{kind}.gguf"
    values = stored_as(tmp_path / "plain" / "model.gguf", path, kind)
    if kind.startswith("Q4"):
        with pytest.warns(InputWarning, match=rf"rounded to about four bits \({kind}\), and a refit fits the noise"):
            back = read_model(path)
    else:
        back = read_model(path.parent)  # the folder of one GGUF file
    down = np.asarray(dict(named_arrays(back.decoder))["runs.0.mlp.down.kernel"])
    assert np.array_equal(down[1].T, values["blk.1.ffn_down.weight"])


# ---------------------------------------------------------------------------------------------------- the layout


def test_heads_are_stored_in_the_order_of_llama_cpp(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "llama, biases")
    write_model(model, tmp_path / "out", "gguf")
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    theirs = load_torch(tmp_path / "model").state_dict()
    for letter, heads in (("q", 8), ("k", 4)):
        for leaf in ("weight", "bias"):
            matrix = theirs[f"model.layers.1.self_attn.{letter}_proj.{leaf}"].numpy()
            rows = matrix.reshape(heads, 2, 5, -1)
            found = stored[f"blk.1.attn_{letter}.{leaf}"].reshape(heads, 5, 2, -1)
            assert np.array_equal(found[2, 3, 1], rows[2, 1, 3])
            assert np.array_equal(found[0, 4, 0], rows[0, 0, 4])
    assert np.array_equal(stored["blk.1.attn_v.bias"], theirs["model.layers.1.self_attn.v_proj.bias"].numpy())


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_has_its_inverse(name: str) -> None:
    there, back = CHANGES[name]
    for shape in ((24, 5), (24,)):
        tensor = np.random.default_rng(0).uniform(-0.5, 1.0, shape).astype(np.float32)
        assert there(tensor, 4).shape == shape
        assert np.abs(back(there(tensor, 4), 4) - tensor).max() <= (2**-23 if name == "plus one" else 0)
        assert not np.array_equal(there(tensor, 4), tensor)


# ---------------------------------------------------------------------------------------------------- refusals

# Family and changes -> words of the refusal, for a model of equal layers.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "opt": ("opt", {}, "no GGUF architecture for opt, only for llama, qwen2"),
    "qwen3, biases": ("qwen3", {"attention_bias": True}, "llama.cpp reads no qkv biases of qwen3"),
    "gemma, untied": ("gemma", {"tie_word_embeddings": False}, "llama.cpp reads only a tied head of gemma"),
    "gemma2, scale": ("gemma2", {}, "divides the queries of gemma2 by the square root of 10"),
    "gemma2, no caps": (
        "gemma2",
        {"query_pre_attn_scalar": 10, "final_logit_softcapping": None},
        "caps the scores and logits",
    ),
    "gpt_neox, no biases": ("gpt_neox", {"attention_bias": False}, "llama.cpp needs the qkv biases of gptneox"),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}, "without the yarn scaling of rotary positions"),
    "qwen2_moe, renormalised": (
        "qwen2_moe",
        {"mlp_only_layers": []},
        "llama.cpp does not divide the weights of the chosen experts of qwen2moe by their sum, but this model does",
    ),
    "qwen3_moe, a dense layer": (
        "qwen3_moe",
        {"norm_topk_prob": True},
        "llama.cpp has experts in every layer of qwen3moe, but layer 1 has none",
    ),
    "olmoe, grouped": ("olmoe", {}, "llama.cpp has as many key/value heads as query heads of olmoe"),
    "gpt_oss": (
        "gpt_oss",
        {},
        "llama.cpp rounds the range of frequencies that the yarn scaling changes, and gpt-oss does",
    ),
    "qwen3, llama3": ("qwen3", {"rope_parameters": LLAMA_ROPE}, "no Llama 3 scaling of rotary positions for qwen3"),
}


@pytest.mark.parametrize("name", quickly(REFUSED, ("opt", "gemma2, scale")))
def test_what_llama_cpp_cannot_compute_is_refused(tmp_path: Path, name: str) -> None:
    family, changes, words = REFUSED[name]
    model = read_model(hugging_face_folder(tmp_path / "model", family, **changes))
    with pytest.raises(InputError, match=r"GGUF cannot hold this model: .*; use another format") as refusal:
        write_model(model, tmp_path / "out", "gguf")
    assert words in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_shapes_that_llama_cpp_cannot_hold_are_refused(tmp_path: Path) -> None:
    qwen = model_of(tmp_path / "qwen2", "qwen2")
    kept = {"head": [np.arange(3)] * 3}
    fewer = dataclasses.replace(qwen, decoder=slice_groups(qwen.decoder, kept))
    with pytest.raises(InputError, match="6 heads of 8 are kept with a hidden size of 64"):
        write_model(fewer, tmp_path / "out", "gguf")
    with pytest.raises(InputError, match="unequal size for llama and mistral only, not for qwen2"):
        write_model(ragged(qwen, ("channel",)), tmp_path / "out", "gguf")
    gemma = model_of(tmp_path / "gemma", "gemma")
    narrow = dataclasses.replace(gemma, decoder=slice_hidden(gemma.decoder, np.arange(36)))
    with pytest.raises(InputError, match="square root of the hidden size 36"):
        write_model(narrow, tmp_path / "out", "gguf")
    with pytest.raises(InputError, match=r"the output is a folder, in which the weights are model\.gguf"):
        write_model(gemma, tmp_path / "out.gguf", "gguf")
    with pytest.raises(InputError, match="unknown type of a GGUF 'q4_k'; expected one of f32, f16, bf16, q8_0"):
        write_model(gemma, tmp_path / "out", "gguf", gguf_type="q4_k")
    assert not list(tmp_path.glob("out*"))


def test_a_lost_window_is_a_warning_and_comes_back(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "mistral", sliding_window=7)
    with pytest.warns(InputWarning, match="no sliding window for mistral; tokens more than 7 apart see each other"):
        write_model(model, tmp_path / "out", "gguf")
    back = read_model(tmp_path / "out")
    assert [layer.window for layer in sizes_of(back.decoder).layers] == [7, 7, 7]


# ---------------------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of a small Llama."""
    root = tmp_path_factory.mktemp("whole")
    write_model(model_of(root / "model", "llama, llama3 rope"), root / "out", "gguf")
    return root / "out" / "model.gguf"


def refusal_of(path: Path, content: bytes | None = None) -> str:
    """The sentence with which a file is refused."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_model(path)
    return str(refusal.value)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0005, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(whole: Path, tmp_path: Path, share: float) -> None:
    content = whole.read_bytes()
    sentence = refusal_of(tmp_path / "cut.gguf", content[: int(share * len(content))])
    assert sentence.startswith(f"{tmp_path / 'cut.gguf'}: ")
    assert "is the download complete?" in sentence


def test_other_content_is_named(whole: Path, tmp_path: Path) -> None:
    content, path = whole.read_bytes(), tmp_path / "a.gguf"
    assert "a pointer of git-lfs" in refusal_of(path, b"version https://git-lfs.github.com/spec/v1\n")
    assert "not a GGUF file" in refusal_of(path, b"something else")
    assert "GGUF version 1, expected 2 or 3" in refusal_of(path, b"GGUF\1\0\0\0" + content[8:])
    assert "big-endian" in refusal_of(path, b"GGUF\0\0\0\3" + content[8:])
    assert "the GGUF architecture 'lxama' is not supported; expected one of llama, deci" in refusal_of(
        path, content.replace(b"llama", b"lxama")
    )
    assert "unknown tensor 'blk.1.ffn_xown.weight' of shape (64, 40)" in refusal_of(
        path, content.replace(b"blk.1.ffn_down", b"blk.1.ffn_xown")
    )
    assert "llama.block_count is missing" in refusal_of(
        path, content.replace(b"llama.block_count", b"llama.block_cxunt")
    )


def changed(source: Path, target: Path, drop: str = "", add: dict[str, tuple[Any, Any]] | None = None) -> Path:
    """A GGUF file without some tensors, and with other metadata (value and type)."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    given = add or {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in given:
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for key, (value, kind) in given.items():
        writer.add_key_value(key, value, kind, None if not isinstance(value, list) else gguf.GGUFValueType.INT32)
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


KINDS = gguf.GGUFValueType
# What is dropped, what is set -> words of the refusal.
DAMAGED: dict[str, tuple[str, dict[str, tuple[Any, Any]], str]] = {
    "missing": ("blk.2.attn_q.weight", {}, "'model.layers.2.self_attn.q_proj.weight' of shape (80, 64) is missing"),
    "no embedding": ("token_embd.weight", {}, "'token_embd.weight' is missing"),
    "yarn": ("", {"llama.rope.scaling.type": ("yarn", KINDS.STRING)}, "the scaling 'yarn' of rotary positions"),
    "key and value": ("", {"llama.attention.value_length": (8, KINDS.UINT32)}, "keys of 10 and values of 8 features"),
    "unequal": ("", {"llama.feed_forward_length": ([40, 40, 30], KINDS.ARRAY)}, "for the architecture deci only"),
    "no attention": ("", {"llama.attention.head_count_kv": ([4, 0, 4], KINDS.ARRAY)}, "layer 1 has no attention"),
    "other count": ("", {"llama.attention.head_count_kv": ([4, 4], KINDS.ARRAY)}, "a whole number, or 3 of them"),
    "width": ("", {"llama.feed_forward_length": (41, KINDS.UINT32)}, "shape (40, 64), but the configuration expects"),
    "no layers": ("", {"llama.block_count": (0, KINDS.UINT32)}, "llama.block_count must be from 1 to 10,000, found 0"),
    "other theta": ("", {"llama.rope.freq_base": (77.0, KINDS.FLOAT32)}, "are not those of Llama 3"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_one_sentence(whole: Path, tmp_path: Path, name: str) -> None:
    drop, add, words = DAMAGED[name]
    assert words in refusal_of(changed(whole, tmp_path / "damaged.gguf", drop, add))


def test_other_factors_of_llama3_are_recognised(whole: Path, tmp_path: Path) -> None:
    """Files of llama.cpp's converter do not store the parameters of the scaling."""
    plain = changed(whole, tmp_path / "plain.gguf", add={"minillm_jax.rope_parameters": ("null", KINDS.STRING)})
    assert "are not those of Llama 3" in refusal_of(plain)  # an original length of 64 is not known
    rope = LLAMA_ROPE | {"original_max_position_embeddings": 8192}
    write_model(model_of(tmp_path / "model", "llama", rope_parameters=rope), tmp_path / "out", "gguf")
    path = changed(
        tmp_path / "out" / "model.gguf", tmp_path / "b.gguf", add={"minillm_jax.rope_parameters": ("x", KINDS.STRING)}
    )
    found = read_model(path).decoder.config.rope
    assert (found.kind, found.factor, found.original_length) == ("llama3", 8.0, 8192)


def test_models_in_several_files_are_read(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", "llama")
    write_model(model, tmp_path / "out", "gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    (tmp_path / "split").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "split" / "m.gguf", "llama", split_max_tensors=12)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted((tmp_path / "split").iterdir())
    assert [path.name for path in paths] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for path in (paths[0], paths[2], tmp_path / "split"):
        assert_same_arrays(model, read_model(path))
    paths[1].rename(tmp_path / "split" / "b.gguf")
    assert "one of 3 files of a model, and m-00002-of-00003.gguf is not beside it" in refusal_of(paths[0])
    assert "but it is not named like model-00001-of-00003.gguf" in refusal_of(tmp_path / "split" / "b.gguf")


def test_the_licence_and_the_name_are_kept(whole: Path, tmp_path: Path) -> None:
    given = {"general.license": ("apache-2.0", KINDS.STRING), "general.name": ("A model", KINDS.STRING)}
    other = {"general.size_label": ("135M", KINDS.STRING), "general.parameter_count": (5, KINDS.UINT64)}
    write_model(read_model(changed(whole, tmp_path / "a.gguf", add=given | other)), tmp_path / "out", "gguf")
    metadata = gguf_file.open_gguf(tmp_path / "out" / "model.gguf").metadata
    assert {key: metadata.get(key) for key in given | other} == {
        "general.license": "apache-2.0",
        "general.name": "A model",
        "general.size_label": None,
        "general.parameter_count": None,
    }


def test_of_several_models_in_a_folder_one_must_be_named(whole: Path, tmp_path: Path) -> None:
    for name in ("a-f32.gguf", "b-f32.gguf"):
        (tmp_path / name).write_bytes(whole.read_bytes())
    with pytest.raises(
        InputError, match=r"it holds a-f32\.gguf: GGUF weights \(llama\.cpp\); give the path of the \.gguf"
    ):
        read_model(tmp_path)
    assert describe_model(tmp_path / "b-f32.gguf").sizes.D == 64


def test_the_missing_package_is_named(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(whole.read_bytes())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal_of(copy) == f'{copy}: GGUF needs the package gguf; pip install "minillm-jax[gguf]"'


def test_a_record_is_read_beside_the_weights(tmp_path: Path) -> None:
    model = dataclasses.replace(model_of(tmp_path / "model", "llama"), record={"kept": {"head": [[0]]}})
    write_model(model, tmp_path / "out", "gguf", extra={"README.md": "a card"})
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == model.record
    assert read_model(tmp_path / "out").record == read_model(tmp_path / "out" / "model.gguf").record == model.record
