"""Vision-language folders: the text model is pruned, the rest is carried over, and the stock class loads the whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from convert.multimodal import auto_class
from convert.reader import describe_model, read_model
from convert.writer import weight_bytes, write_model
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts
from minillm_jax.pruning.slicing import slice_groups, slice_hidden, slice_layers
from minillm_jax.report.model_card import loading
from tests.helpers import edit_json, logits_of, quickly, random_tokens

IMAGE = 96  # the token that stands for an image
TOKENS = random_tokens(90, 2, 40)

_TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT
        | {"head_dim": 8, "sliding_window": 13, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": 94,
        "eoi_token_index": 95,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 7,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": IMAGE,
        "video_token_id": 95,
        "vision_start_token_id": 94,
        "vision_end_token_id": 93,
    },
    "qwen3_vl": {
        "text_config": _TEXT | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 7,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": IMAGE,
        "video_token_id": 95,
        "vision_start_token_id": 94,
        "vision_end_token_id": 93,
    },
    "mistral3": {
        "text_config": _TEXT
        | {
            "model_type": "ministral3",
            "head_dim": 10,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 28,
            "patch_size": 7,
        },
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    },
}
KINDS = list(CONFIGURATIONS)

# The image of a prompt, as the processor of each kind gives it: four tokens.
IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {"pixel_values": torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)},
    "qwen2_5_vl": {
        "pixel_values": torch.linspace(-1, 1, 16 * 3 * 2 * 49).reshape(16, 3 * 2 * 49),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    },
    "qwen3_vl": {
        "pixel_values": torch.linspace(-1, 1, 16 * 3 * 2 * 49).reshape(16, 3 * 2 * 49),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    },
    "mistral3": {
        "pixel_values": torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 28]]),
    },
}

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folders of tiny models of each kind, with random parameters and the files of a processor."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = path = tmp_path_factory.mktemp(kind) / "dense"
            config = transformers.AutoConfig.for_model(kind, **CONFIGURATIONS[kind])
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
                for parameter in model.parameters():
                    torch.nn.init.normal_(
                        parameter, std=0.4 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
                    )
            model.save_pretrained(path)
            for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
                (path / name).write_text(f"{name} of {kind}")
        return made[kind]

    return make


def by_transformers(path: Path, image: dict[str, Any] | None = None) -> np.ndarray:
    """Logits of the stock class, which must load exactly the tensors of the folder; with an image, if any."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == json.loads((path / "config.json").read_text())["architectures"][0]
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    if image is not None:
        tokens = torch.cat([tokens[:1, :3], torch.full((1, 4), IMAGE), tokens[:1, 3:9]], dim=1)
        types = {"gemma3": "token_type_ids", "mistral3": None}.get(model.config.model_type, "mm_token_type_ids")
        image = image if types is None else image | {types: (tokens == IMAGE).long()}
    with torch.no_grad():
        return model.eval()(tokens, **image or {}).logits.float().numpy()


def pruned(model: Model, unequal: bool = False) -> Model:
    """The model without a random half of the heads and channels of every layer; unequal numbers on request."""
    rng, kept = np.random.default_rng(0), {}
    for kind in axis_table.KINDS:
        counts = group_counts(model.decoder, kind)
        fewer = [max(1, count // 2 + unequal * layer) for layer, count in enumerate(counts)]
        kept[kind] = [np.sort(rng.choice(n, few, replace=False)) for n, few in zip(counts, fewer, strict=True)]
    return replace(model, decoder=slice_groups(model.decoder, kept))


def rest_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder outside the text model."""
    tensors = {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}
    return {name: array for name, array in tensors.items() if "vis" in name or "projector" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_model_is_read(folder: Folder, kind: str) -> None:
    difference = np.abs(logits_of(read_model(folder(kind)).decoder, TOKENS) - by_transformers(folder(kind)))
    assert difference.max() < 1e-4


@pytest.mark.parametrize("unequal", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", quickly(KINDS, ("gemma3", "qwen2_5_vl")))
def test_a_pruned_folder_loads_stock_with_its_vision_tower(
    folder: Folder, kind: str, unequal: bool, tmp_path: Path
) -> None:
    dense = folder(kind)
    smaller = pruned(read_model(dense), unequal)
    written = write_model(smaller, tmp_path / "pruned", max_shard_size="20KB")
    # The class of Qwen 2.5-VL computes the head size as hidden size / heads, so that the lost heads become zeros.
    assert written.format == ("padded" if unequal or kind == "qwen2_5_vl" else "stock")
    assert np.abs(logits_of(smaller.decoder, TOKENS) - by_transformers(tmp_path / "pruned")).max() < 1e-4
    before, after = rest_of(dense), rest_of(tmp_path / "pruned")
    assert before.keys() == after.keys()
    assert len(before) > 8
    assert all(np.array_equal(array, after[name]) for name, array in before.items())
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "pruned" / name).read_text() == (dense / name).read_text()
    with_image = by_transformers(tmp_path / "pruned", IMAGES[kind])
    other = by_transformers(tmp_path / "pruned", IMAGES[kind] | {"pixel_values": -IMAGES[kind]["pixel_values"]})
    assert np.isfinite(with_image).all()
    assert np.abs(with_image - other).max() > 1e-3
    again = read_model(tmp_path / "pruned").decoder
    assert np.abs(logits_of(again, TOKENS) - logits_of(smaller.decoder, TOKENS)).max() < 1e-4


def test_the_model_card_names_the_class_that_loads_the_whole(folder: Folder) -> None:
    for kind, name in (("gemma3", "AutoModelForImageTextToText"), (None, "AutoModelForCausalLM")):
        raw = {"model_type": "llama"} if kind is None else read_model(folder(kind)).raw_config
        assert f"{name}.from_pretrained(" in loading({"format": "padded", "auto_class": auto_class(raw)})


@pytest.mark.parametrize("kind", KINDS)
def test_config_changes_in_the_sizes_of_the_text_model_alone(folder: Folder, kind: str, tmp_path: Path) -> None:
    model = read_model(folder(kind))
    written = replace(model, decoder=slice_layers(pruned(model).decoder, [0, 2]))
    write_model(written, tmp_path / "pruned")
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder(kind), tmp_path / "pruned"))
    text, smaller = before.pop("text_config"), after.pop("text_config")
    assert after == before | {"torch_dtype": "float32"}
    changed = {key for key in text | smaller if text.get(key) != smaller.get(key)}
    sizes = {"num_hidden_layers", "intermediate_size"} | ({"layer_types"} if "layer_types" in text else set())
    assert changed == sizes | ({"num_attention_heads", "num_key_value_heads"} if kind != "qwen2_5_vl" else set())
    assert smaller["num_hidden_layers"] == len(smaller.get("layer_types", "12")) == 2


@pytest.mark.parametrize("kind", quickly(KINDS, ("gemma3", "qwen2_5_vl")))
def test_every_layout_of_the_names_is_read_and_kept(folder: Folder, kind: str, tmp_path: Path) -> None:
    model = read_model(folder(kind))
    # Tensors of any type are carried over.
    other = {"model.vision_tower.position_ids": np.arange(4), "model.vision_tower.half": np.ones(3, np.float16)}
    tensors = {_renamed(name): array for name, array in load_file(folder(kind) / "model.safetensors").items()}
    (tmp_path / "new").mkdir()
    save_file(tensors | other, tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text((folder(kind) / "config.json").read_text())
    again = read_model(tmp_path / "new")
    assert np.array_equal(logits_of(again.decoder, TOKENS), logits_of(model.decoder, TOKENS))
    write_model(again, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == (tensors | other).keys()
    assert all(np.array_equal(array, written[name]) for name, array in (tensors | other).items())
    assert written["model.vision_tower.half"].dtype == np.float16


def _renamed(name: str) -> str:
    """The name of a tensor in the classes of transformers 5."""
    if name.startswith(("model.language_model.", "model.visual.")):
        return name
    for old in ("language_model.model.", "model."):
        if name.startswith(old):
            return "model.language_model." + name.removeprefix(old)
    return "lm_head.weight" if name.endswith("lm_head.weight") else f"model.{name}"


def test_the_flat_configuration_of_qwen_is_read_and_kept(folder: Folder, tmp_path: Path) -> None:
    dense, path = folder("qwen2_5_vl"), tmp_path / "flat"
    path.mkdir()
    raw = json.loads((dense / "config.json").read_text())
    text = {key: value for key, value in raw.pop("text_config").items() if key not in ("model_type", "rope_parameters")}
    text |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
    (path / "config.json").write_text(json.dumps(raw | text))
    (path / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    model = read_model(path)
    assert np.array_equal(logits_of(model.decoder, TOKENS), logits_of(read_model(dense).decoder, TOKENS))
    smaller = pruned(model)
    write_model(smaller, tmp_path / "pruned")
    assert "text_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert np.abs(logits_of(smaller.decoder, TOKENS) - by_transformers(tmp_path / "pruned")).max() < 1e-4


def test_text_models_of_float8_are_multiplied_out(folder: Folder, tmp_path: Path) -> None:
    dense = folder("mistral3")
    path = tmp_path / "float8"
    path.mkdir()
    tensors = load_file(dense / "model.safetensors")
    for name in [name for name in tensors if name.startswith("language_model") and name.endswith("proj.weight")]:
        tensors[f"{name}_scale_inv"] = np.array(0.01, np.float32)
        tensors[name.replace(".weight", ".activation_scale")] = np.array(1, np.float32)
        tensors[name] = (tensors[name] / 0.01).astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, path / "model.safetensors")
    raw = json.loads((dense / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    (path / "config.json").write_text(json.dumps(raw))
    smaller = pruned(read_model(path))
    write_model(smaller, tmp_path / "pruned")
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert np.abs(logits_of(smaller.decoder, TOKENS) - by_transformers(tmp_path / "pruned")).max() < 1e-4
    before, after = rest_of(dense), rest_of(tmp_path / "pruned")
    assert all(np.array_equal(array, after[name]) for name, array in before.items())
    changed = next(name for name in before if name.startswith("vision"))
    save_file(tensors | {changed: before[changed].astype(ml_dtypes.float8_e4m3fn)}, path / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor '{changed}' is F8_E4M3, expected one of"):
        read_model(path)


@pytest.mark.parametrize("name", ["per-layer", "flax", "gguf"])
def test_formats_without_a_vision_tower_are_refused(folder: Folder, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"the format {name} does not hold the vision tower of a gemma3 model"):
        write_model(read_model(folder("gemma3")), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_what_the_stock_class_cannot_hold_is_one_sentence(folder: Folder, tmp_path: Path) -> None:
    model = read_model(folder("gemma3"))
    with pytest.raises(InputError, match="projects its images to the 32 hidden dimensions of its text model"):
        write_model(replace(model, decoder=slice_hidden(model.decoder, np.arange(16))), tmp_path / "out")
    with pytest.raises(InputError, match=r"unequal numbers of query heads .*; use the format padded"):
        write_model(pruned(model, unequal=True), tmp_path / "out", "stock")


def test_the_bytes_of_a_folder_count_what_is_carried_over(folder: Folder, tmp_path: Path) -> None:
    model = read_model(folder("gemma3"))
    carried = sum(array.nbytes for array in rest_of(folder("gemma3")).values())
    (tmp_path / "config.json").write_text((folder("gemma3") / "config.json").read_text())
    assert weight_bytes(model) == weight_bytes(replace(model, folder=tmp_path)) + carried


def test_folders_without_a_text_model_are_one_sentence(folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "rest"
    path.mkdir()
    (path / "config.json").write_text((folder("gemma3") / "config.json").read_text())
    save_file(rest_of(folder("gemma3")), path / "model.safetensors")
    with pytest.raises(InputError, match=r"'model.language_model.embed_tokens.weight' is missing"):
        read_model(path)
    edit_json(path / "config.json", text_config={"hidden_size": "wide"})
    with pytest.raises(InputError, match="transformers rejects the configuration"):
        describe_model(path)
