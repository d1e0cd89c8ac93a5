"""Adapters in the form of PEFT: PEFT computes what we compute, its own adapters are read, all others are refused."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from jax import numpy as jnp
from safetensors.numpy import load_file, save_file

from convert.adapter import WEIGHTS, read_adapter, write_adapter
from convert.adapter_config import CONFIG
from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, named_arrays
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.recovery.adapter import Adapter, Lora, initial, merge
from tests.helpers import (
    JOINT_NORMS,
    SMALL,
    edit_json,
    hugging_face_folder,
    load_torch,
    logits_of,
    quickly,
    random_tokens,
    torch_logits,
)

TOKENS = random_tokens(97, 2, 12)
LORA = Lora(rank=3, alpha=5.0, dropout=0.1)
# Some of the parts of every fused module, and some of the separate ones.
SOME = ("attention.q", "attention.v", "mlp.up", "mlp.down")
# One family of each way to store the projections: apart, one below the other, interleaved by head.
STORED = ("llama", "phi3", "gpt_neox")
# Every family in both formats that may hold a pruned model. Most run with `make test-all` only.
QUICK = {"stock": ("llama", "opt", "bloom", "gemma2", "phi3", "gpt_neox"), "per-layer": ("llama", "phi3", "bloom")}
EVERY = [
    pytest.param(family, form, marks=[] if family in quick else pytest.mark.slow)
    for form, quick in QUICK.items()
    for family in SMALL
]
A, B = "lora_A.weight", "lora_B.weight"

Folders = Callable[[str, str], Path]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT calls it


@pytest.fixture(scope="module", autouse=True)
def _separate_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code is copied to a temporary folder instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", sys.path.copy())
        yield


def unequal(model: Model) -> Model:
    """The model without the attention of its first layer, the MLP of its last, and some groups of the others."""
    counts = {kind: group_counts(model.decoder, kind) for kind in ("head", "channel")}
    kept = {
        "head": [np.arange(0), np.arange(1, counts["head"][1]), np.arange(1, counts["head"][2])],
        "channel": [np.arange(2, counts["channel"][0]), np.arange(2, counts["channel"][1]), np.arange(0)],
    }
    return dataclasses.replace(model, decoder=slice_groups(model.decoder, kept))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a family's small model in a format: `stock`, or `per-layer` and `padded` after pruning."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def folder(family: str, format_name: str) -> Path:
        path = root / f"{family}-{format_name}"
        if format_name == "stock":
            return hugging_face_folder(path, family)
        write_model(unequal(read_model(folder(family, "stock"))), path, format_name)
        return path

    return folder


@cache
def decoder_of(folder: Path) -> Decoder:
    """The decoder of a folder that no test changes."""
    return read_model(folder).decoder


def random_adapter(decoder: Decoder, lora: Lora = LORA, seed: int = 0) -> Adapter:
    """An adapter of which both factors are random."""
    rng = np.random.default_rng(seed)

    shapes = jax.eval_shape(lambda: initial(decoder, lora, seed))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)


def written(folder: Path, adapter: Adapter, lora: Lora, decoder: Decoder, base: Path | str = "base") -> Path:
    folder.mkdir()
    write_adapter(adapter, lora, decoder, folder, str(base))
    return folder


def equal(left: Any, right: Any) -> bool:
    """Whether two trees hold the same numbers in the same types; unlike `arrays_equal`, it compiles nothing."""
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right)
    return all(jax.tree.leaves(same))


def merged_logits(decoder: Decoder, adapter: Adapter, lora: Lora) -> np.ndarray:
    return logits_of(merge(decoder, adapter, lora), TOKENS)


def with_peft(model_folder: Path, adapter_folder: Path) -> Any:
    """PEFT's model, with a check that it takes exactly the tensors of the adapter's folder."""
    model = peft.PeftModel.from_pretrained(load_torch(model_folder, remote_code=True), str(adapter_folder)).eval()
    taken = {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(model).items()}
    assert taken == {name: tensor.shape for name, tensor in load_file(adapter_folder / WEIGHTS).items()}
    return model


# ------------------------------------------------------------------------------------------------------- to PEFT


@pytest.mark.parametrize(("family", "format_name"), EVERY)
def test_peft_computes_what_we_compute(folders: Folders, tmp_path: Path, family: str, format_name: str) -> None:
    folder = folders(family, format_name)
    decoder = decoder_of(folder)
    adapter = random_adapter(decoder)
    adapter_folder = written(tmp_path / "adapter", adapter, LORA, decoder, folder)
    expected = merged_logits(decoder, adapter, LORA)
    np.testing.assert_allclose(torch_logits(with_peft(folder, adapter_folder), TOKENS), expected, atol=1e-4)
    assert np.abs(expected - logits_of(decoder, TOKENS)).max() > 0.1
    assert {tensor.dtype.name for tensor in load_file(adapter_folder / WEIGHTS).values()} == {"float32"}
    assert (adapter_folder / WEIGHTS).stat().st_mode == (adapter_folder / CONFIG).stat().st_mode


@pytest.mark.parametrize("family", quickly([family for family in SMALL if family not in JOINT_NORMS], ("phi3",)))
def test_peft_computes_what_we_compute_on_padded_models(folders: Folders, tmp_path: Path, family: str) -> None:
    folder = folders(family, "padded")
    decoder = decoder_of(folder)
    adapter = random_adapter(decoder)
    model = with_peft(folder, written(tmp_path / "adapter", adapter, LORA, decoder, folder))
    np.testing.assert_allclose(torch_logits(model, TOKENS), merged_logits(decoder, adapter, LORA), atol=1e-4)


@pytest.mark.parametrize("family", STORED)
def test_peft_computes_what_we_compute_where_some_matrices_are_adapted(
    folders: Folders, tmp_path: Path, family: str
) -> None:
    folder, lora = folders(family, "stock"), dataclasses.replace(LORA, targets=SOME)
    decoder = decoder_of(folder)
    adapter = random_adapter(decoder, lora)
    adapter_folder = written(tmp_path / "adapter", adapter, lora, decoder, folder)
    expected = merged_logits(decoder, adapter, lora)
    np.testing.assert_allclose(torch_logits(with_peft(folder, adapter_folder), TOKENS), expected, atol=1e-4)
    again, read = read_adapter(adapter_folder, decoder)
    assert read == dataclasses.replace(lora, targets=tuple(name for name in SOME if name in adapter[0]))
    assert equal(again, adapter)


@pytest.mark.parametrize(("family", "format_name"), [("phi3", "stock"), ("bloom", "per-layer")])
def test_the_model_that_peft_merges_is_ours(folders: Folders, tmp_path: Path, family: str, format_name: str) -> None:
    folder = folders(family, format_name)
    decoder = decoder_of(folder)
    adapter = random_adapter(decoder)
    model = with_peft(folder, written(tmp_path / "adapter", adapter, LORA, decoder, folder))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = dict(named_arrays(merge(decoder, adapter, LORA)))
    actual = dict(named_arrays(decoder_of(tmp_path / "merged")))
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(actual[path], array, atol=1e-5, err_msg=path)


def test_a_bfloat16_model_has_a_float32_adapter(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(read_model(folders("llama", "stock"), dtype="bfloat16"), folder)
    decoder = decoder_of(folder)
    assert decoder.embedding.dtype == jnp.bfloat16
    adapter = random_adapter(decoder)
    model = with_peft(folder, written(tmp_path / "adapter", adapter, LORA, decoder, folder))
    assert equal(read_adapter(tmp_path / "adapter", decoder)[0], adapter)
    wide = read_model(folder, dtype="float32").decoder
    np.testing.assert_allclose(torch_logits(model, TOKENS), merged_logits(wide, adapter, LORA), atol=1e-4)


@pytest.mark.parametrize(("family", "format_name"), EVERY)
def test_what_is_written_is_read_again(folders: Folders, tmp_path: Path, family: str, format_name: str) -> None:
    decoder = decoder_of(folders(family, format_name))
    adapter = random_adapter(decoder)
    again, lora = read_adapter(written(tmp_path / "adapter", adapter, LORA, decoder), decoder)
    assert equal(again, adapter)
    present = tuple(name for name in axis_table.matrices() if any(name in run for run in adapter))
    assert lora == dataclasses.replace(LORA, targets=present)


@pytest.mark.parametrize("family", STORED)
def test_an_adapter_without_effect_keeps_its_first_values(folders: Folders, tmp_path: Path, family: str) -> None:
    decoder = decoder_of(folders(family, "stock"))
    adapter = initial(decoder, LORA, 0)
    again, _ = read_adapter(written(tmp_path / "adapter", adapter, LORA, decoder), decoder)
    assert equal(again, adapter)


def test_settings_are_those_of_peft(folders: Folders, tmp_path: Path) -> None:
    decoder = decoder_of(folders("phi3", "stock"))
    folder = written(tmp_path / "adapter", random_adapter(decoder), LORA, decoder, "owner/name")
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]
    assert config["rank_pattern"] == {"mlp.gate_up_proj": 6, "self_attn.qkv_proj": 9}
    assert config["alpha_pattern"] == {"mlp.gate_up_proj": 10, "self_attn.qkv_proj": 15}
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.1)
    read = peft.PeftConfig.from_pretrained(str(folder))
    assert (read.peft_type, read.task_type, read.base_model_name_or_path) == ("LORA", "CAUSAL_LM", "owner/name")
    assert config.keys() <= read.to_dict().keys()


def test_layers_without_a_sublayer_are_left_out_by_name(folders: Folders, tmp_path: Path) -> None:
    decoder = decoder_of(folders("llama", "per-layer"))
    folder = written(tmp_path / "adapter", random_adapter(decoder), LORA, decoder)
    targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    assert "model.layers.1.self_attn.q_proj" in targets
    assert not [name for name in targets if name.startswith(("model.layers.0.self_attn", "model.layers.2.mlp"))]


# ----------------------------------------------------------------------------------------------------- from PEFT


def peft_adapter(folder: Path, base: Path, **settings: Any) -> Any:
    """An adapter as PEFT trains and saves it, with random factors; returns PEFT's model."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(load_torch(base, remote_code=True), peft.LoraConfig(**options)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


FUSED = r"(qkv_proj|query_key_value|q_proj)"


@pytest.mark.parametrize(
    ("family", "format_name", "settings"),
    [
        ("llama", "stock", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 7}}),
        ("opt", "stock", {"target_modules": ["q_proj", "v_proj", "fc1"], "alpha_pattern": {"fc1": 1.5}}),
        ("phi3", "stock", {"rank_pattern": {FUSED: 6}, "alpha_pattern": {"o_proj": 3}}),
        ("gpt_neox", "stock", {"use_rslora": True, "rank_pattern": {FUSED: 9}}),
        ("glm4", "stock", {"layers_to_transform": [0, 2], "target_modules": ["gate_up_proj", "v_proj", "o_proj"]}),
        ("qwen3", "stock", {"target_modules": r".*\.[12]\..*\.(k_proj|down_proj)", "init_lora_weights": "orthogonal"}),
        ("bloom", "stock", {"use_rslora": True}),
        ("gemma2", "stock", {"exclude_modules": ["v_proj"], "fan_in_fan_out": False}),
        ("bloom", "per-layer", {"rank_pattern": {FUSED: 6}}),
        ("llama", "per-layer", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # modules of the removed sublayers
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # of the same modules
def test_adapters_of_peft_are_read(
    folders: Folders, tmp_path: Path, family: str, format_name: str, settings: dict[str, Any]
) -> None:
    base = folders(family, format_name)
    model = peft_adapter(tmp_path / "adapter", base, **settings)
    decoder = decoder_of(base)
    adapter, lora = read_adapter(tmp_path / "adapter", decoder)
    assert {factors.a.shape[-1] for run in adapter for factors in run.values()} == {lora.rank}
    expected = torch_logits(model, TOKENS)
    np.testing.assert_allclose(merged_logits(decoder, adapter, lora), expected, atol=1e-4)
    assert np.abs(expected - logits_of(decoder, TOKENS)).max() > 0.1
    # Written again and read again, it is the same.
    again, same = read_adapter(written(tmp_path / "again", adapter, lora, decoder, base), decoder)
    assert same == dataclasses.replace(lora, alpha=same.alpha)
    assert same.alpha == pytest.approx(lora.alpha)
    np.testing.assert_allclose(torch_logits(with_peft(base, tmp_path / "again"), TOKENS), expected, atol=1e-4)
    np.testing.assert_allclose(merged_logits(decoder, again, same), expected, atol=1e-4)


def test_an_adapter_of_peft_before_training_has_no_effect(folders: Folders, tmp_path: Path) -> None:
    base = folders("phi3", "stock")
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(load_torch(base, remote_code=True), options).save_pretrained(tmp_path / "adapter")
    decoder = decoder_of(base)
    adapter, lora = read_adapter(tmp_path / "adapter", decoder)
    assert equal(merge(decoder, adapter, lora), decoder)
    assert lora.targets == tuple(axis_table.matrices())
    assert all(bool(factors.a.any()) for factors in adapter[0].values())


def test_bfloat16_adapters_are_read_as_float32(small: Path, folders: Folders) -> None:
    decoder = decoder_of(folders("llama", "stock"))
    exact, _ = read_adapter(small, decoder)
    tensors = load_file(small / WEIGHTS)
    save_file({name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}, small / WEIGHTS)
    rounded, _ = read_adapter(small, decoder)
    for name, factors in rounded[0].items():
        assert factors.a.dtype == factors.b.dtype == jnp.float32
        np.testing.assert_array_equal(factors.a, exact[0][name].a.astype(jnp.bfloat16).astype(jnp.float32))


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def small(folders: Folders, tmp_path: Path) -> Path:
    """An adapter's folder that a test may change."""
    decoder = decoder_of(folders("llama", "stock"))
    return written(tmp_path / "small", random_adapter(decoder), LORA, decoder)


def refusal(folder: Path, decoder: Decoder) -> str:
    with pytest.raises(InputError) as caught:
        read_adapter(folder, decoder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'; merge the adapter with PEFT"),
        ({"peft_type": None}, "peft_type is None, expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True, which is not supported; merge the adapter"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], which is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is [1], which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the weights"),
        ({"r": "8"}, "r is '8', expected an integer of at least 1"),
        ({"r": True}, "r is True, expected an integer of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected a number above 0"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number above 0"),
        ({"lora_dropout": 1}, "lora_dropout is 1, expected a number in [0, 1)"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj'], expected an object"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj is 0, expected an integer of at least 1"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression (missing )"),
        ({"r": 4}, "has shape (3, 40), but the model and adapter_config.json expect (4, 40)"),
    ],
)
def test_settings_are_refused(folders: Folders, small: Path, changes: dict[str, Any], expected: str) -> None:
    edit_json(small / CONFIG, **changes)
    message = refusal(small, decoder_of(folders("llama", "stock")))
    assert message.startswith(str(small))
    assert expected in message


PREFIX = "base_model.model.model.layers"


def changed(folder: Path, tensors: Mapping[str, np.ndarray | None]) -> None:
    """Replaces tensors of an adapter's file; None removes one."""
    whole = {**load_file(folder / WEIGHTS), **tensors}
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, folder / WEIGHTS)


ZEROS = np.zeros((3, 64), np.float32)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (
            {f"{PREFIX}.0.self_attn.q_proj.{A}": np.zeros((3, 32), np.float32)},
            f"tensor '{PREFIX}.0.self_attn.q_proj.{A}' has shape (3, 32), but the model and adapter_config.json "
            "expect (3, 64); was the adapter trained on another model?",
        ),
        (
            {f"{PREFIX}.3.self_attn.q_proj.{A}": ZEROS},
            f"unknown tensor '{PREFIX}.3.self_attn.q_proj.{A}' of shape (3, 64); expected names such as "
            f"'{PREFIX}.0.self_attn.q_proj.{A}'; was the adapter trained on another model?",
        ),
        (
            {f"{PREFIX}.1.mlp.up_proj.{B}": None},
            f"tensor '{PREFIX}.1.mlp.up_proj.{B}' of shape (40, 3) is missing",
        ),
        (
            {f"{PREFIX}.2.mlp.up_proj.{A}": None, f"{PREFIX}.2.mlp.up_proj.{B}": None},
            f"tensor '{PREFIX}.2.mlp.up_proj.{A}' of shape (3, 64) is missing",
        ),
        (
            {f"{PREFIX}.0.mlp.up_proj.{A}": np.full((3, 64), np.nan, np.float32)},
            f"tensor '{PREFIX}.0.mlp.up_proj.{A}' holds NaN or infinite values",
        ),
        ({f"base_model.model.lm_head.{A}": ZEROS}, f"tensor 'base_model.model.lm_head.{A}' belongs to the embeddings"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 97), np.float32)},
            "belongs to the embeddings or the head, and only adapters of the layers are read; merge it with PEFT",
        ),
        ({f"{PREFIX}.0.mlp.up_proj.{A}": np.zeros((3, 64), np.int32)}, "is I32, expected one of F32, F16, BF16"),
    ],
)
def test_tensors_are_refused(folders: Folders, small: Path, tensors: dict[str, Any], expected: str) -> None:
    changed(small, tensors)
    message = refusal(small, decoder_of(folders("llama", "stock")))
    assert message.startswith(str(small))
    assert expected in message


def test_files_are_refused(folders: Folders, small: Path, tmp_path: Path) -> None:
    decoder = decoder_of(folders("llama", "stock"))
    assert "no such folder; give the folder of an adapter" in refusal(tmp_path / "none", decoder)
    assert "not a folder of an adapter; expected adapter_config.json" in refusal(folders("llama", "stock"), decoder)
    save_file({}, small / WEIGHTS)
    edit_json(small / CONFIG, target_modules="all-linear")
    assert "the file holds no tensors" in refusal(small, decoder)
    (small / WEIGHTS).write_bytes(b"no tensors")
    assert "not a whole safetensors file" in refusal(small, decoder)
    (small / WEIGHTS).unlink()
    assert "adapter_model.safetensors: the file is missing" in refusal(small, decoder)
    (small / "adapter_model.bin").write_bytes(b"")
    assert "only safetensors are read, because a PyTorch file may hold code" in refusal(small, decoder)
    (small / CONFIG).write_text("{")
    assert "cannot be read as JSON" in refusal(small, decoder)


def test_an_adapter_for_another_family_is_refused(folders: Folders, small: Path) -> None:
    message = refusal(small, decoder_of(folders("bloom", "stock")))
    assert "unknown tensor" in message
    assert "expected names such as 'base_model.model.transformer.h.0.self_attention.query_key_value" in message
