"""Conversion in both directions: round trips are bit for bit equal, and bad input raises an `InputError`."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from safetensors.numpy import load_file, save_file

from convert import formats
from convert.__main__ import convert
from convert.families import TABLES
from convert.reader import FLAX_WEIGHTS, read_model
from convert.rules import bindings
from convert.sources import INDEX, SINGLE
from convert.writer import new_folder, write_flax, write_model
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.families import FAMILIES
from minillm_jax.model.tree import named_arrays, sizes_of
from tests.helpers import (
    CONFIGURATIONS,
    SMALL,
    arrays_equal,
    edit_json,
    hugging_face_folder,
    load_stock,
    quickly,
    shared,
)


def stored(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, in one file or in shards, read by safetensors."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_bit_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Apply a change to the tensors of `model.safetensors`."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / SINGLE)


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", quickly(CONFIGURATIONS, SMALL))
def test_to_flax_and_back_is_bit_equal(tmp_path: Path, name: str) -> None:
    """Every tensor of every family keeps its name and its bits, in one file and in shards."""
    family, changes = CONFIGURATIONS[name]
    folder = hugging_face_folder(tmp_path / "model", family, **changes)
    convert("to-flax", str(folder), str(tmp_path / "flax"))
    assert (tmp_path / "flax" / FLAX_WEIGHTS).is_dir()
    convert("to-torch", str(tmp_path / "flax"), str(tmp_path / "torch"))
    assert_bit_equal(stored(folder), stored(tmp_path / "torch"))
    convert("to-torch", str(folder), str(tmp_path / "sharded"), max_shard_size="9KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert_bit_equal(stored(folder), stored(tmp_path / "sharded"))
    load_stock(tmp_path / "sharded")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_weights_are_converted_bit_for_bit(folder: Path, tmp_path: Path, dtype: type) -> None:
    rewrite(folder, lambda t: t.update({name: tensor.astype(dtype) for name, tensor in t.items()}))
    model = read_model(folder)
    assert {leaf.dtype for _, leaf in named_arrays(model.decoder)} == {jnp.dtype(dtype)}
    write_flax(model, tmp_path / "flax")
    write_model(read_model(tmp_path / "flax"), tmp_path / "back")
    assert_bit_equal(stored(folder), stored(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == np.dtype(dtype).name


def test_dtype_option_casts_the_weights(folder: Path, tmp_path: Path) -> None:
    convert("to-flax", str(folder), str(tmp_path / "flax"), dtype="bfloat16")
    decoder = read_model(tmp_path / "flax").decoder
    assert {leaf.dtype for _, leaf in named_arrays(decoder)} == {jnp.dtype("bfloat16")}
    with pytest.raises(InputError, match="dtype 'int8' is not supported"):
        read_model(folder, dtype="int8")


def test_shards_are_written_with_an_index_and_read_back(folder: Path, tmp_path: Path) -> None:
    write_model(read_model(folder), tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert_bit_equal(stored(folder), stored(tmp_path / "sharded"))
    assert arrays_equal(read_model(folder).decoder, read_model(tmp_path / "sharded").decoder)
    load_stock(tmp_path / "sharded")


def test_real_model_round_trip(tmp_path: Path) -> None:
    folder = shared("models/stories260K")
    convert("to-flax", str(folder), str(tmp_path / "flax"))
    convert("to-torch", str(tmp_path / "flax"), str(tmp_path / "torch"))
    assert_bit_equal(stored(folder), stored(tmp_path / "torch"))
    tokenizer = "tokenizer.json"
    assert (tmp_path / "torch" / tokenizer).read_bytes() == (folder / tokenizer).read_bytes()


@pytest.mark.parametrize("name", quickly(CONFIGURATIONS, SMALL))
def test_rules_cover_every_array_once_and_name_every_axis(tmp_path: Path, name: str) -> None:
    """The rules are compared with the arrays of the decoder and with the axis table."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder
    bound = bindings(decoder)
    assert len({binding.name for binding in bound}) == len(bound)
    filled = [(path, binding.index) for binding in bound for path in binding.paths]
    assert len(set(filled)) == len(filled)
    assert {path for path, _ in filled} == {p for p, _ in named_arrays(decoder) if not axis_table.is_data(p)}
    axes = axis_table.BLOCK_AXES | axis_table.OUTER_AXES
    for part in (part for binding in bound for part in binding.rule.parts):
        assert sorted(axis_table.letters(part.axes)) == sorted(axis_table.letters(axes[part.path]))


def test_every_array_of_the_axis_table_has_a_rule() -> None:
    """Only the data of the layers, which are not stored, have no rule."""
    in_rules = {part.path for table in TABLES.values() for rule in (*table.outer, *table.block) for part in rule.parts}
    in_axis_table = axis_table.BLOCK_AXES.keys() | axis_table.OUTER_AXES.keys()
    assert in_axis_table - in_rules == set(axis_table.DATA)
    assert TABLES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", ["llama", "bloom", "phi3"])
def test_tensors_to_write_are_contiguous(tmp_path: Path, family: str) -> None:
    """safetensors silently writes wrong data for an array that is not C-contiguous."""
    decoder = read_model(hugging_face_folder(tmp_path / "model", family)).decoder
    arrays = {path: np.asarray(array) for path, array in named_arrays(decoder)}
    for binding in bindings(decoder):
        layer = [arrays[path] if binding.index is None else arrays[path][binding.index] for path in binding.paths]
        tensor = binding.to_torch(layer)
        assert tensor.flags.c_contiguous
        for array, converted_back in zip(layer, binding.to_flax(tensor), strict=True):
            np.testing.assert_array_equal(converted_back, array)


# ------------------------------------------------------------------------------------------ official checkpoints


# Buffers that official checkpoints hold besides the weights.
BUFFERS = {
    "llama": ["model.layers.1.self_attn.rotary_emb.inv_freq"],
    "gpt_neox": [
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.2.attention.rotary_emb.inv_freq",
    ],
}


@pytest.mark.parametrize("family", SMALL)
def test_base_model_names_and_buffers_of_official_checkpoints_are_accepted(tmp_path: Path, family: str) -> None:
    """Names without the prefix (BLOOM, OPT), buffers, and the alias of GPT-NeoX's head; other names are refused."""
    folder = hugging_face_folder(tmp_path / "model", family)
    expected = read_model(folder).decoder
    table = TABLES[family]

    def as_official(tensors: dict[str, np.ndarray]) -> None:
        for name in BUFFERS.get(family, []):
            tensors[name] = np.ones((1, 2), np.uint8)
        for name in list(tensors):
            alias = table.head_alias if name == table.head and table.head_alias else name
            tensors[alias.removeprefix(table.prefix)] = tensors.pop(name)

    rewrite(folder, as_official)
    assert not any(name.startswith(table.prefix) for name in load_file(folder / SINGLE))
    assert arrays_equal(read_model(folder).decoder, expected)
    write_model(read_model(folder), tmp_path / "out")
    others = {table.head, "lm_head.bias"}
    assert all(name.startswith(table.prefix) or name in others for name in stored(tmp_path / "out"))
    rewrite(folder, lambda t: t.update({"layers.0.attention.bias_of_another_kind": np.ones(2, np.float32)}))
    with pytest.raises(InputError, match="unknown tensor"):
        read_model(folder)


def test_stored_head_must_equal_a_tied_embedding(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model", tie_word_embeddings=True)
    embedding = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    rewrite(folder, lambda t: t.update({"lm_head.weight": embedding.copy()}))
    assert read_model(folder).decoder.head is None
    rewrite(folder, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(InputError, match=r"'lm_head\.weight' differs from the embedding"):
        read_model(folder)


# ------------------------------------------------------------------------------------------------------ bad input


SHARD = "model-00001-of-00001.safetensors"


def only_shard(folder: Path) -> dict[str, str]:
    """Rename the single file to a shard; returns the correct weight map for an index file."""
    (folder / SINGLE).rename(folder / SHARD)
    return dict.fromkeys(load_file(folder / SHARD), SHARD)


def damage(change: str, folder: Path) -> None:
    """Damage a folder in one of the ways of `DAMAGES`."""
    match change:
        case "missing config":
            (folder / "config.json").unlink()
        case "broken config":
            (folder / "config.json").write_text("{")
        case "config is a list":
            (folder / "config.json").write_text("[]")
        case "truncated":
            data = (folder / SINGLE).read_bytes()
            (folder / SINGLE).write_bytes(data[: len(data) // 2])
        case "empty file":
            (folder / SINGLE).write_bytes(b"")
        case "no weights":
            (folder / SINGLE).unlink()
        case "no PyTorch file":
            (folder / SINGLE).rename(folder / "pytorch_model.bin")
        case "wrong shape":
            rewrite(folder, lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)}))
        case "unknown tensor":
            rewrite(folder, lambda t: t.update({"model.layers.0.extra.weight": np.ones((2, 3), np.float32)}))
        case "missing tensor":
            rewrite(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
        case "tensor stored twice":
            rewrite(folder, lambda t: t.update({"norm.weight": np.ones(64, np.float32)}))
        case "nan":
            rewrite(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), np.nan))
        case "integers":
            rewrite(folder, lambda t: t.update({"model.norm.weight": np.ones(64, np.int8)}))
        case "mixed types":
            name = "model.layers.1.mlp.up_proj.weight"
            rewrite(folder, lambda t: t.update({name: t[name].astype(np.float16)}))
        case "unknown family":
            edit_json(folder / "config.json", model_type="mamba")
        case "no family":
            edit_json(folder / "config.json", model_type=None)
        case "unknown activation":
            edit_json(folder / "config.json", hidden_act="tanh")
        case "unknown rope":
            rope = {"rope_type": "proportional", "factor": 2.0, "rope_theta": 10000.0}
            edit_json(folder / "config.json", rope_parameters=rope)
        case "wrong type":
            edit_json(folder / "config.json", intermediate_size="wide")
        case "family is a list":
            edit_json(folder / "config.json", model_type=["llama"])
        case "rope base is text":
            edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": "10000"})
        case "rope factor is zero":
            rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0}
            edit_json(folder / "config.json", rope_parameters=rope)
        case "partial rotary":
            rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
            edit_json(folder / "config.json", rope_parameters=rope)
        case "too many layers":
            edit_json(folder / "config.json", num_hidden_layers=10**13)
        case "no layers":
            edit_json(folder / "config.json", num_hidden_layers=0)
        case "empty window":
            edit_json(folder / "config.json", model_type="mistral", sliding_window=0)
        case "heads not a multiple of key/value heads":
            edit_json(folder / "config.json", num_key_value_heads=3)
        case "index leaves folder":
            (folder / SINGLE).unlink()
            (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../../file.safetensors"}}))
        case "index without map":
            (folder / SINGLE).unlink()
            (folder / INDEX).write_text("{}")
        case "index names missing shard":
            (folder / SINGLE).unlink()
            (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "lost.safetensors"}}))
        case "index lists absent tensor":
            weight_map = only_shard(folder)
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"model.other": SHARD}}))
        case "index omits tensor":
            weight_map = only_shard(folder)
            weight_map.pop("model.norm.weight")
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# Name of a damage → pattern of the error message.
DAMAGES = {
    "missing config": r"config\.json: the file is missing",
    "broken config": r"config\.json: cannot be read as JSON",
    "config is a list": r"expected a JSON object, found list",
    "truncated": r"model\.safetensors: not a whole safetensors file",
    "empty file": r"model\.safetensors: not a whole safetensors file",
    "no weights": r"no weights; expected model\.safetensors",
    "no PyTorch file": r"pytorch_model\.bin: not a whole PyTorch file of tensors",
    "wrong shape": r"'model\.norm\.weight' has shape \(63,\), but the configuration expects \(64,\)",
    "unknown tensor": r"unknown tensor 'model\.layers\.0\.extra\.weight' of shape \(2, 3\)",
    "missing tensor": r"'model\.layers\.2\.mlp\.up_proj\.weight' of shape \(40, 64\) is missing",
    "tensor stored twice": r"'norm\.weight' and 'model\.norm\.weight' are the same tensor|"
    r"'model\.norm\.weight' and 'norm\.weight' are the same tensor",
    "nan": r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN",
    "integers": r"'model\.norm\.weight' is I8, expected one of F32, F16, BF16",
    "mixed types": r"'model\.layers\.1\.mlp\.up_proj\.weight' is float16, the same tensor of other layers float32",
    "unknown family": r"model_type 'mamba' is not supported; expected one of llama, mistral",
    "no family": r"model_type None is not supported",
    "unknown activation": r"activation 'tanh' is not supported",
    "unknown rope": r"rope_type 'proportional' is not supported",
    "wrong type": r"config\.json: .*intermediate_size",
    "family is a list": r"model_type \['llama'\] is not supported",
    "rope base is text": r"config\.json: .*rope_theta|rope_theta must be a positive number, found '10000'",
    "rope factor is zero": r"factor must be a positive number, found 0|config\.json: .*factor",
    "partial rotary": r"partial_rotary_factor 0\.5 is not supported for this family",
    "too many layers": r"num_hidden_layers must be a whole number from 1 to",
    "no layers": r"num_hidden_layers must be a whole number from 1 to .*, found 0",
    "empty window": r"sliding_window must be a whole number from 1 to .*, found 0",
    "heads not a multiple of key/value heads": r"num_attention_heads 8 is not a multiple of num_key_value_heads 3",
    "index leaves folder": r"shard '\.\./\.\./file\.safetensors' is not a plain file name",
    "index without map": r"expected an object weight_map",
    "index names missing shard": r"lost\.safetensors: the file is missing",
    "index lists absent tensor": r"the index places tensor 'model\.other' in 'model-00001.*file does not hold it",
    "index omits tensor": r"tensor 'model\.norm\.weight' of 'model-00001-of-00001\.safetensors' is not listed",
}


@pytest.mark.parametrize("change", DAMAGES)
def test_damaged_folder_raises_a_one_line_error(folder: Path, change: str) -> None:
    damage(change, folder)
    with pytest.raises(InputError, match=DAMAGES[change]) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)


def test_values_out_of_range_of_the_dtype_option_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), 1e9))
    read_model(folder, dtype="bfloat16")
    with pytest.raises(InputError, match="holds NaN or infinite values as float16"):
        read_model(folder, dtype="float16")


def test_arrays_of_a_model_may_have_different_types(folder: Path) -> None:
    """A bfloat16 embedding with float32 projections, then bfloat16 projections too."""
    tokens = jnp.zeros((1, 5), jnp.int32)
    exact = read_model(folder).decoder(tokens)

    def to_bfloat16(*suffixes: str) -> Callable[[dict[str, np.ndarray]], None]:
        return lambda t: t.update({n: x.astype(ml_dtypes.bfloat16) for n, x in t.items() if n.endswith(suffixes)})

    rewrite(folder, to_bfloat16("embed_tokens.weight"))
    np.testing.assert_allclose(read_model(folder).decoder(tokens), exact, atol=0.1 * float(jnp.abs(exact).max()))
    rewrite(folder, to_bfloat16("proj.weight"))
    assert read_model(folder).decoder(tokens).dtype == jnp.float32


def test_pruning_record_is_copied(folder: Path, tmp_path: Path) -> None:
    record = {"ratio": 0.2, "kept": {"head": [[0, 1, 2]]}}
    (folder / "pruning.json").write_text(json.dumps(record))
    convert("to-flax", str(folder), str(tmp_path / "flax"))
    convert("to-torch", str(tmp_path / "flax"), str(tmp_path / "torch"))
    assert read_model(tmp_path / "torch").record == record


def test_json_writes_lists_of_numbers_on_one_line_and_keeps_text(folder: Path, tmp_path: Path) -> None:
    record = {"kept": [[0, 1], [2, 3]], "slopes": [-1.5e-07, 2.0], "note": "kept [1,  2]  of 3", "none": []}
    write_model(dataclasses.replace(read_model(folder), record=record), tmp_path / "out")
    text = (tmp_path / "out" / "pruning.json").read_text()
    assert json.loads(text) == record
    assert "[ 2, 3 ]" in text
    assert "[ -1.5e-07, 2.0 ]" in text


def test_quantisation_and_remote_code_settings_are_not_written(folder: Path) -> None:
    """The written weights are neither quantised nor in need of the input's remote code."""
    model = read_model(folder)
    raw = model.raw_config | {"quantization_config": {"bits": 4}, "auto_map": {"AutoConfig": "code.Config"}}
    sizes = sizes_of(model.decoder)
    written = formats.describe(model.decoder.config, sizes, raw).config
    assert not written.keys() & {"quantization_config", "auto_map"}


def test_models_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for name in ("./nowhere", str(tmp_path / "nowhere"), "a b c", "long" * 100):
        with pytest.raises(InputError, match="no such folder"):
            read_model(name)
    with pytest.raises(InputError, match="the Hub could not provide it"):
        read_model("no-such-owner/no-such-model")


def test_damaged_flax_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    write_flax(read_model(folder), tmp_path / "flax")
    edit_json(tmp_path / "flax" / "config.json", intermediate_size=39)
    with pytest.raises(InputError, match=r"has shape \(3, 40, 64\), but the configuration expects \(3, 39, 64\)"):
        read_model(tmp_path / "flax")
    edit_json(tmp_path / "flax" / "config.json", intermediate_size=40, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"'head\.kernel' has shape .* expects no such array"):
        read_model(tmp_path / "flax")
    edit_json(tmp_path / "flax" / "config.json", tie_word_embeddings=False)
    broken = read_model(tmp_path / "flax")
    broken.decoder.embedding.set_value(broken.decoder.embedding[...].at[3, 4].set(jnp.nan))
    write_flax(broken, tmp_path / "broken")
    with pytest.raises(InputError, match="'embedding' holds NaN"):
        read_model(tmp_path / "broken")
    shutil.rmtree(tmp_path / "flax" / FLAX_WEIGHTS)
    (tmp_path / "flax" / FLAX_WEIGHTS).mkdir()
    with pytest.raises(InputError, match="not a whole Orbax checkpoint"):
        read_model(tmp_path / "flax")


# ------------------------------------------------------------------------------------------------------- writing


def test_output_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    def interrupted_write() -> None:
        with new_folder(tmp_path / "out") as scratch:
            (scratch / "file").write_text("incomplete")
            assert not (tmp_path / "out").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "deeper" / "out") as scratch:
        (scratch / "file").write_text("complete")
    assert (tmp_path / "deeper" / "out" / "file").read_text() == "complete"
    with pytest.raises(InputError, match="already exists"), new_folder(tmp_path / "deeper" / "out"):
        pytest.fail("the block must not run")


def test_outputs_that_cannot_be_created_are_refused_before_writing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", tmp_path / ("long" * 100), Path("/proc/no/out")):
        with pytest.raises(InputError, match=r"no folder can be made there|cannot be written"), new_folder(output):
            pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_disk_is_reported_and_leaves_no_files(tmp_path: Path) -> None:
    def write_on_full_disk() -> None:
        with new_folder(tmp_path / "new" / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot be written .*No space left"):
        write_on_full_disk()
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_before_reading(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="already exists"):
        convert("to-flax", "./nowhere", str(tmp_path / "out"))


def test_llama_is_written_as_mistral_where_heads_do_not_divide_the_hidden_size(folder: Path) -> None:
    model = read_model(folder)
    sizes = sizes_of(model.decoder)
    six_heads = dataclasses.replace(sizes, layers=(dataclasses.replace(sizes.layers[0], N=6, K=3),) * 3)
    raw = model.raw_config | {"pretraining_tp": 1}
    config = formats.describe(model.decoder.config, six_heads, raw).config
    assert config["model_type"] == "mistral"
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (6, 3, 10)
    assert "pretraining_tp" not in config
    assert formats.describe(model.decoder.config, sizes, raw).config["model_type"] == "llama"


def test_rope_settings_are_written_under_old_and_new_keys(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = hugging_face_folder(tmp_path / "model", rope_parameters=rope)
    write_model(read_model(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == rope
    assert config["rope_theta"] == rope["rope_theta"]
    assert config["rope_scaling"]["rope_type"] == config["rope_scaling"]["type"] == "llama3"
    # Old checkpoints have only the old keys.
    edit_json(tmp_path / "out" / "config.json", rope_parameters=None)
    assert read_model(tmp_path / "out").decoder.config.rope == read_model(folder).decoder.config.rope


def test_decoders_read_twice_have_the_same_tree_structure(folder: Path) -> None:
    """jit compiles a function once for both."""
    first, second = read_model(folder).decoder, read_model(folder).decoder
    assert jax.tree.structure(first) == jax.tree.structure(second)
