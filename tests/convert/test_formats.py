"""Output formats: the shapes determine the format, and every format keeps the model's outputs."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import peft
import pytest
import torch
from jax import numpy as jnp

from convert import formats
from convert.reader import read_model
from convert.writer import check_shard_size, write_model
from minillm_jax.budget.budget import kept_count
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import build
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, hidden_size, layer_count, named_arrays, sizes_of
from minillm_jax.pruning.slicing import slice_groups, slice_hidden, slice_layers
from minillm_jax.scoring.score import Scores
from minillm_jax.settings import Budget
from minillm_jax.stages import prune_groups
from tests.helpers import (
    CONFIGURATIONS,
    LLAMA_ROPE,
    SMALL,
    edit_json,
    hugging_face_folder,
    load_stock,
    load_torch,
    logits_of,
    quickly,
    random_tokens,
    torch_logits,
)

TOKENS = random_tokens(97, 2, 40)


def pruned(model: Model, seed: int = 0, equal: bool = False, kinds: tuple[str, ...] = axis_table.KINDS) -> Model:
    """Slice a model to random groups of the given kinds: equal numbers in all layers, or unequal numbers."""
    rng = np.random.default_rng(seed)
    kept = {}
    for kind in axis_table.KINDS:
        counts = group_counts(model.decoder, kind)
        fewer = [max(1, counts[0] - 1 if equal else n - 1 - layer) for layer, n in enumerate(counts)]
        kept_counts = fewer if kind in kinds else counts
        kept[kind] = [np.sort(rng.choice(n, k, replace=False)) for n, k in zip(counts, kept_counts, strict=True)]
    return dataclasses.replace(model, decoder=slice_groups(model.decoder, kept))


def logits(model: Model) -> np.ndarray:
    return logits_of(model.decoder, TOKENS)


def same_arrays(left: Decoder, right: Decoder) -> bool:
    """Whether two decoders of any family hold equal arrays."""
    first, second = dict(named_arrays(left)), dict(named_arrays(right))
    return first.keys() == second.keys() and all(bool(jnp.array_equal(first[path], second[path])) for path in first)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → folder of a dense model."""
    root = tmp_path_factory.mktemp("dense")
    return {family: hugging_face_folder(root / family, family) for family in SMALL}


@pytest.mark.parametrize("family", quickly(SMALL))
def test_unequal_layers_keep_their_outputs_in_every_format(dense: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = pruned(read_model(dense[family]))
    expected = logits(model)
    assert write_model(model, tmp_path / "per-layer").format == formats.PER_LAYER
    assert np.abs(torch_logits(load_torch(tmp_path / "per-layer"), TOKENS) - expected).max() <= 1e-4
    assert same_arrays(read_model(tmp_path / "per-layer").decoder, model.decoder)

    if model.decoder.config.joint_qk_norm:
        with pytest.raises(InputError, match=r"heads of zeros would change the norms .*use the format per-layer"):
            write_model(model, tmp_path / "padded", "padded")
        padded = pruned(read_model(dense[family]), kinds=("channel",))
    else:
        padded = model
    assert write_model(padded, tmp_path / "padded", "padded").format == formats.PADDED
    assert np.abs(torch_logits(load_stock(tmp_path / "padded"), TOKENS) - logits(padded)).max() <= 1e-4
    assert np.abs(logits(read_model(tmp_path / "padded")) - logits(padded)).max() <= 1e-5

    assert write_model(model, tmp_path / "flax", "flax").format == formats.FLAX
    back = read_model(tmp_path / "flax")
    assert same_arrays(back.decoder, model.decoder)
    # A pruned model can be pruned again.
    again = pruned(back, seed=1)
    write_model(again, tmp_path / "again")
    assert np.abs(torch_logits(load_torch(tmp_path / "again"), TOKENS) - logits(again)).max() <= 1e-4


@pytest.mark.parametrize("name", quickly(CONFIGURATIONS, SMALL))
def test_equal_layers_are_stock_where_the_class_accepts_them(tmp_path: Path, name: str) -> None:
    family, changes = CONFIGURATIONS[name]
    model = read_model(hugging_face_folder(tmp_path / "dense", family, **changes))
    by_class = dict.fromkeys(("opt", "bloom", "gpt_neox", "stablelm", "gemma2", "gemma3_text"), "per-layer")
    expected = "per-layer" if name == "llama, biases" else by_class.get(family, "stock")
    if group_counts(model.decoder, "head")[0] == 1:
        expected = "stock"  # a layer always keeps one head
    assert write_model(pruned(model, equal=True), tmp_path / "out").format == expected
    assert write_model(model, tmp_path / "same").format == "stock"
    if family != "bloom":
        assert write_model(pruned(model, equal=True, kinds=("channel",)), tmp_path / "channels").format == "stock"


@pytest.mark.parametrize("family", quickly(SMALL))
def test_pruned_hidden_size_and_layers_are_written(dense: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = read_model(dense[family])
    kept = np.sort(np.random.default_rng(0).choice(hidden_size(model.decoder), 36, replace=False))
    fewer = slice_layers(slice_hidden(model.decoder, kept), [0, 2])
    assert (hidden_size(fewer), layer_count(fewer)) == (36, 2)
    model = dataclasses.replace(model, decoder=fewer)
    write_model(model, tmp_path / "out")
    assert np.abs(torch_logits(load_torch(tmp_path / "out"), TOKENS) - logits(model)).max() <= 1e-4
    assert same_arrays(read_model(tmp_path / "out").decoder, fewer)


def test_padded_heads_keep_their_original_indices(dense: dict[str, Path], tmp_path: Path) -> None:
    """The ALiBi slopes (BLOOM) or the pruning record (OPT) tell the indices."""
    kept = {"head": [np.array([1, 4])] * 3, "channel": [np.arange(192)] * 3}
    model = read_model(dense["bloom"])
    write_model(dataclasses.replace(model, decoder=slice_groups(model.decoder, kept)), tmp_path / "bloom", "padded")
    kernel = read_model(tmp_path / "bloom").decoder.runs[0].attention.o.kernel[...]
    assert [bool(kernel[0, head].any()) for head in range(6)] == [head in (1, 4) for head in range(6)]

    model = read_model(dense["opt"])
    kept = {"head": [np.array([1, 4]), np.array([0, 7]), np.array([6])], "channel": [np.arange(40)] * 3}
    record = {"kept": {kind: [indices.tolist() for indices in layers] for kind, layers in kept.items()}}
    sliced = dataclasses.replace(model, decoder=slice_groups(model.decoder, kept), record=record)
    write_model(sliced, tmp_path / "opt", "padded")
    kernel = read_model(tmp_path / "opt").decoder.runs[0].attention.o.kernel[...]
    for layer, heads in enumerate(kept["head"]):
        assert [bool(kernel[layer, head].any()) for head in range(8)] == [head in heads for head in range(8)]


@pytest.mark.parametrize("kept", [None, [], {"head": 5}, {"head": [[0], [0, 0], ["a"]]}, {"head": [[5], [1, 0], [9]]}])
def test_a_damaged_record_does_not_move_heads(dense: dict[str, Path], tmp_path: Path, kept: Any) -> None:
    model = read_model(dense["opt"])
    groups = {"head": [np.arange(1), np.arange(2), np.arange(1)], "channel": [np.arange(40)] * 3}
    sliced = dataclasses.replace(model, decoder=slice_groups(model.decoder, groups), record={"kept": kept})
    write_model(sliced, tmp_path / "out", "padded")
    np.testing.assert_allclose(logits(read_model(tmp_path / "out")), logits(sliced), atol=1e-5)


def test_old_rope_keys_are_accepted_by_old_transformers(tmp_path: Path) -> None:
    """transformers up to version 4.42 accepts a `linear` entry only with exactly two keys."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    write_model(read_model(hugging_face_folder(tmp_path / "model", rope_parameters=rope)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert config["rope_parameters"] == rope
    edit_json(tmp_path / "out" / "config.json", rope_parameters=None)
    assert read_model(tmp_path / "out").decoder.config.rope == read_model(tmp_path / "model").decoder.config.rope


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
        ("glm", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75}}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
        ("gemma2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen3", {"rope_parameters": LLAMA_ROPE}),
    ],
)
def test_old_rope_keys_alone_give_the_same_configuration(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Old versions of transformers and llama.cpp read only the old keys."""
    model = read_model(hugging_face_folder(tmp_path / "model", family, **changes))
    write_model(model, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", rope_parameters=None)
    assert read_model(tmp_path / "out").decoder.config == model.decoder.config


@pytest.mark.parametrize("size", ["0GB", "GB", "5", "-1GB", "0.0MB", "five GB", "1e3MB"])
def test_bad_shard_sizes_are_refused(size: str) -> None:
    with pytest.raises(InputError, match="is not understood"):
        check_shard_size(size)


@pytest.mark.parametrize("size", ["5GB", "0.5GB", "100 mb", "1.25TB"])
def test_shard_sizes_are_accepted(size: str) -> None:
    check_shard_size(size)


def test_flax_repository_is_downloaded_complete(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake Hub client copies the files that match the patterns of the download."""
    for format_name in ("flax", "per-layer"):
        write_model(read_model(dense["llama"]), tmp_path / format_name, format_name)

    revisions = []

    def fetch(name: str, revision: str | None, **patterns: list[str]) -> str:
        revisions.append(revision)
        repository, fetched = tmp_path / name.split("/")[1], tmp_path / "fetched" / name / ("0a" * 20)
        paths = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        for path in huggingface_hub.utils.filter_repo_objects(paths, **patterns):
            (fetched / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / path, fetched / path)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for format_name in ("flax", "per-layer"):
        model = read_model(f"owner/{format_name}", revision="main")
        assert same_arrays(model.decoder, read_model(dense["llama"]).decoder)
        assert model.revision == "0a" * 20, "the Hub's cache names a snapshot by its commit"
    assert revisions == ["main", "0a" * 20] * 2, "the weights come from the commit of the configuration"
    assert read_model(dense["llama"]).revision is None
    with pytest.raises(InputError, match="a local folder has no revisions; leave out --revision main"):
        read_model(dense["llama"], revision="main")


def test_chosen_format_is_written_or_refused(dense: dict[str, Path], tmp_path: Path) -> None:
    model = read_model(dense["llama"])
    assert write_model(model, tmp_path / "chosen", "per-layer").format == "per-layer"
    assert np.abs(torch_logits(load_torch(tmp_path / "chosen"), TOKENS) - logits(model)).max() <= 1e-4
    with pytest.raises(InputError, match=r"unequal numbers of .*use the format per-layer or padded"):
        write_model(pruned(model), tmp_path / "stock", "stock")
    with pytest.raises(InputError, match="unknown format 'zip'; expected one of stock, per-layer, padded, flax"):
        write_model(model, tmp_path / "zip", "zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chosen"]


def test_dense_model_in_a_per_layer_folder_is_written_as_stock(dense: dict[str, Path], tmp_path: Path) -> None:
    """The format follows from the shapes, not from the input's format."""
    for family in SMALL:
        model = read_model(dense[family])
        write_model(model, tmp_path / f"{family}-per-layer", "per-layer")
        back = read_model(tmp_path / f"{family}-per-layer")
        assert write_model(back, tmp_path / family).format == "stock"
        assert same_arrays(read_model(tmp_path / family).decoder, model.decoder)
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert config["model_type"] == family
        assert not config.keys() & {"auto_map", "per_layer_config", "alibi_heads"}


def test_build_inverts_sizes_of(dense: dict[str, Path]) -> None:
    for folder in dense.values():
        decoder = pruned(read_model(folder)).decoder
        built = build(decoder.config, sizes_of(decoder))
        assert jax.tree.structure(built) == jax.tree.structure(decoder)
        for (path, abstract), (_, array) in zip(named_arrays(built), named_arrays(decoder), strict=True):
            assert abstract.shape == array.shape
            if axis_table.is_data(path):
                np.testing.assert_array_equal(abstract, array)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT calls it
@pytest.mark.parametrize(("family", "format_name"), [("llama", "stock"), ("llama", "per-layer"), ("bloom", "padded")])
def test_lora_trains_a_pruned_model(dense: dict[str, Path], tmp_path: Path, family: str, format_name: str) -> None:
    """Ten steps with PEFT lower the loss; the merged model is saved, and both packages load it."""
    model = pruned(read_model(dense[family]), equal=format_name == "stock")
    assert write_model(model, tmp_path / "out", format_name).format == format_name
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(load_torch(tmp_path / "out"), options)
    optimizer = torch.optim.AdamW((parameter for parameter in tuned.parameters() if parameter.requires_grad), lr=1e-2)
    batch, losses = torch.from_numpy(TOKENS.astype(np.int64)), []
    for _ in range(10):
        losses.append(tuned(batch, labels=batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    merged = tuned.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    again = load_torch(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(again, TOKENS), torch_logits(merged, TOKENS), atol=1e-5)
    # This package reads the recovered model, which can be pruned further.
    np.testing.assert_allclose(logits(read_model(tmp_path / "merged")), torch_logits(merged, TOKENS), atol=1e-4)


def test_kept_counts_are_rounded_to_multiples_for_the_hardware(tmp_path: Path) -> None:
    """The pruning record holds the counts before rounding."""
    model = read_model(hugging_face_folder(tmp_path / "dense", intermediate_size=300, num_key_value_heads=8))
    scores = Scores(
        {kind: [np.arange(n, dtype=float) for n in group_counts(model.decoder, kind)] for kind in axis_table.KINDS},
        {},
        {},
    )
    rounded = prune_groups(model, scores, Budget(0.4, layers=(1, 3), round_heads_to=4, round_width_to=64))
    assert group_counts(rounded.decoder, "head") == [8, 8, 8]  # 5 before rounding, and the next multiple of 4 is 8
    assert group_counts(rounded.decoder, "channel") == [300, 192, 192]  # 180 before rounding
    assert rounded.record is not None
    assert rounded.record["groups_asked"] == {"head": [8, 5, 5], "channel": [300, 180, 180]}
    assert (rounded.record["budget"]["round_heads_to"], rounded.record["budget"]["round_width_to"]) == (4, 64)


@pytest.mark.parametrize(
    ("count", "ratio", "multiple", "kept"),
    [(300, 0.4, 64, 192), (300, 0.01, 64, 256), (40, 0.5, 64, 40), (8, 0.5, 4, 4), (8, 0.9, 4, 4), (6, 0.1, 4, 4)],
)
def test_kept_count_is_rounded_up_to_a_multiple(count: int, ratio: float, multiple: int, kept: int) -> None:
    assert kept_count(count, ratio, multiple) == kept
