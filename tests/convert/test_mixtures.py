"""Mixtures of experts: the outputs of transformers before and after experts are removed, and the stored tensors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.budget.expected import pruned_sizes
from minillm_jax.errors import InputError
from minillm_jax.evaluation.generate import generate
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, parameter_count, sizes_of
from minillm_jax.pruning.slicing import slice_groups, slice_layers
from minillm_jax.settings import Budget
from tests.helpers import MIXTURES, arrays_equal, hugging_face_folder, load_stock, logits_of, quickly, torch_logits

TOKENS = np.random.default_rng(3).integers(1, 97, (2, 33))

# The families that have, together, all parts of routers and experts.
ALL_PARTS = ("qwen2_moe", "gpt_oss", "glm4_moe")


def with_fewer_experts(model: Model, keep: int) -> Model:
    """The model with `keep` random experts in every layer, equally many of each group of experts."""
    groups, rng = model.decoder.config.routing.groups, np.random.default_rng(0)
    kept = []
    for count in group_counts(model.decoder, "expert"):
        each = count // groups
        rows = [rng.choice(each, min(keep, count) // groups, replace=False) + each * group for group in range(groups)]
        kept.append(np.sort(np.concatenate(rows)))
    return replace(model, decoder=slice_groups(model.decoder, {"expert": kept}))


@pytest.mark.parametrize("family", quickly(MIXTURES, ALL_PARTS))
def test_outputs_and_files_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """Dense and without two experts: logits to 1e-4, greedy tokens equal, tensors bit-equal after a round trip."""
    folder = hugging_face_folder(tmp_path / "dense", family)
    model = read_model(folder)
    assert np.abs(torch_logits(load_stock(folder), TOKENS) - logits_of(model.decoder, TOKENS)).max() <= 1e-4
    assert write_model(model, tmp_path / "again").format == "stock"
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)

    smaller = with_fewer_experts(model, 6 if family == "glm4_moe" else 4)
    assert write_model(smaller, tmp_path / "smaller").format == "stock"
    loaded = load_stock(tmp_path / "smaller")
    assert sum(one.numel() for one in loaded.parameters()) == _trained(smaller)
    assert np.abs(torch_logits(loaded, TOKENS) - logits_of(smaller.decoder, TOKENS)).max() <= 1e-4
    assert arrays_equal(read_model(tmp_path / "smaller").decoder, smaller.decoder)

    prompt = TOKENS[:1, :9]
    expected = loaded.generate(torch.from_numpy(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None)
    continued = generate(smaller.decoder, [prompt[0].tolist()], 12)
    assert list(continued[0]) == expected[0, 9:].tolist()


@pytest.mark.parametrize("family", quickly(MIXTURES, ("qwen2_moe",)))
def test_narrower_experts_load_in_transformers(tmp_path: Path, family: str) -> None:
    """Other channels in every expert; the shared expert of GLM stays a multiple of their number."""
    model = read_model(hugging_face_folder(tmp_path / "dense", family))
    rng, kept = np.random.default_rng(0), []
    for layer in sizes_of(model.decoder).layers:
        few = max(8, layer.W // 16 * 8)  # PyTorch multiplies by experts whose rows are multiples of 16 bytes
        rows = [np.sort(rng.choice(layer.W, few, replace=False)) + layer.W * expert for expert in range(layer.X)]
        kept.append(np.concatenate(rows) if rows else np.arange(0))
    smaller = replace(model, decoder=slice_groups(model.decoder, {"expert_channel": kept}))
    assert write_model(smaller, tmp_path / "smaller").format == "stock"
    by_torch = torch_logits(load_stock(tmp_path / "smaller"), TOKENS)
    assert np.abs(by_torch - logits_of(smaller.decoder, TOKENS)).max() <= 1e-4


def _trained(model: Model) -> int:
    """Parameters without the biases of choices, which transformers keeps as buffers."""
    biases = [run.experts.choice_bias for run in model.decoder.runs]
    return parameter_count(model.decoder) - sum(one.size for one in biases if one is not None)


@pytest.mark.parametrize("family", quickly(MIXTURES, ("qwen3_moe",)))
def test_only_the_number_of_experts_changes_in_the_configuration(tmp_path: Path, family: str) -> None:
    folder = hugging_face_folder(tmp_path / "dense", family)
    model = read_model(folder)
    write_model(model, tmp_path / "again")
    write_model(with_fewer_experts(model, 6 if family == "glm4_moe" else 4), tmp_path / "smaller")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "smaller"))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"num_experts", "num_local_experts", "n_routed_experts"}
    assert changed


@pytest.mark.parametrize(("family", "kept"), [("qwen2_moe", [1, 2]), ("qwen3_moe", [1, 2]), ("glm4_moe", [0, 2])])
def test_removed_layers_leave_the_dense_ones_where_they_were(tmp_path: Path, family: str, kept: list[int]) -> None:
    model = read_model(hugging_face_folder(tmp_path / "dense", family))
    fewer = replace(model, decoder=slice_layers(model.decoder, kept))
    write_model(fewer, tmp_path / "fewer")
    assert np.abs(torch_logits(load_stock(tmp_path / "fewer"), TOKENS) - logits_of(fewer.decoder, TOKENS)).max() <= 1e-4


@pytest.mark.parametrize("family", quickly(MIXTURES, ("qwen2_moe",)))
def test_a_streamed_mixture_has_the_arrays_of_one_in_memory(tmp_path: Path, family: str) -> None:
    folder = hugging_face_folder(tmp_path / "dense", family)
    streamed, whole = read_model(folder, stream=True), read_model(folder)
    write_model(streamed, tmp_path / "streamed")
    write_model(whole, tmp_path / "whole")
    name = "model.safetensors"
    assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_channels_of_a_model_without_any_are_refused(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "dense", "mixtral")
    budget = Budget(0.5, structures=("channels",), allocation="uniform")
    with pytest.raises(InputError, match="this model has no channels that can be removed; use --structures experts"):
        pruned_sizes(read_model(folder).decoder.config, sizes_of(read_model(folder).decoder), budget)


def test_a_mixture_is_written_as_flax(tmp_path: Path) -> None:
    """Dense layers have no experts, and the others no channels: Orbax saves no empty arrays."""
    model = read_model(hugging_face_folder(tmp_path / "dense", "qwen2_moe"))
    assert write_model(model, tmp_path / "flax", "flax").format == "flax"
    assert arrays_equal(read_model(tmp_path / "flax").decoder, model.decoder)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 is larger than num_local_experts 6"),
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv is not supported"),
        ("glm4_moe", {"n_group": 3, "topk_group": 1}, "n_routed_experts 8 must be a multiple of n_group 3"),
    ],
)
def test_a_configuration_that_cannot_be_computed_is_refused(
    tmp_path: Path, family: str, changes: dict[str, float], message: str
) -> None:
    folder = hugging_face_folder(tmp_path / "dense", family)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        read_model(folder)
