"""Formats out: chosen by the shapes, exact in all of them, and read back like any other model."""

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
from minillm_jax.api import prune
from minillm_jax.budget.budget import Budget, kept_count
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import build
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, hidden_size, layer_count, named_arrays, sizes_of
from minillm_jax.pruning.slicing import slice_groups, slice_hidden, slice_layers
from minillm_jax.scoring.score import Scores
from tests.helpers import (
    CONFIGURATIONS,
    LLAMA_ROPE,
    SMALL,
    edit_json,
    hugging_face_folder,
    load_stock,
    load_torch,
    logits_of,
    random_tokens,
    torch_logits,
)

TOKENS = random_tokens(97, 2, 40)


def pruned(model: Model, seed: int = 0, equal: bool = False, kinds: tuple[str, ...] = axis_table.KINDS) -> Model:
    """A model with random groups left of the kinds given: equally many in all layers, or different numbers."""
    rng = np.random.default_rng(seed)
    kept = {}
    for kind in axis_table.KINDS:
        counts = group_counts(model.decoder, kind)
        stay = [max(1, counts[0] - 1 if equal else n - 1 - layer) for layer, n in enumerate(counts)]
        stay = stay if kind in kinds else counts
        kept[kind] = [np.sort(rng.choice(n, s, replace=False)) for n, s in zip(counts, stay, strict=True)]
    return dataclasses.replace(model, decoder=slice_groups(model.decoder, kept))


def logits(model: Model) -> np.ndarray:
    return logits_of(model.decoder, TOKENS)


def same_arrays(left: Decoder, right: Decoder) -> bool:
    """Whether two decoders, of whatever family, hold the same arrays, bit for bit."""
    ours, theirs = dict(named_arrays(left)), dict(named_arrays(right))
    return ours.keys() == theirs.keys() and all(bool(jnp.array_equal(ours[path], theirs[path])) for path in ours)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every family."""
    root = tmp_path_factory.mktemp("dense")
    return {family: hugging_face_folder(root / family, family) for family in SMALL}


@pytest.mark.parametrize("family", SMALL)
def test_unequal_layers_are_written_read_back_and_padded_exactly(
    dense: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = pruned(read_model(dense[family]))
    expected = logits(model)
    assert write_model(model, tmp_path / "per-layer").format == formats.PER_LAYER
    assert np.abs(torch_logits(load_torch(tmp_path / "per-layer"), TOKENS) - expected).max() <= 1e-4
    assert same_arrays(read_model(tmp_path / "per-layer").decoder, model.decoder)

    assert write_model(model, tmp_path / "padded", "padded").format == formats.PADDED
    assert np.abs(torch_logits(load_stock(tmp_path / "padded"), TOKENS) - expected).max() <= 1e-4
    assert np.abs(logits(read_model(tmp_path / "padded")) - expected).max() <= 1e-5

    assert write_model(model, tmp_path / "flax", "flax").format == formats.FLAX
    back = read_model(tmp_path / "flax")
    assert same_arrays(back.decoder, model.decoder)
    # Pruned again, from there: the shapes go on from those of the pruned model.
    again = pruned(back, seed=1)
    write_model(again, tmp_path / "again")
    assert np.abs(torch_logits(load_torch(tmp_path / "again"), TOKENS) - logits(again)).max() <= 1e-4


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equal_layers_are_stock_where_the_class_allows_it(tmp_path: Path, name: str) -> None:
    family, changes = CONFIGURATIONS[name]
    model = read_model(hugging_face_folder(tmp_path / "dense", family, **changes))
    by_class = {"opt": "per-layer", "bloom": "per-layer", "gpt_neox": "per-layer", "gemma2": "per-layer"}
    expected = "per-layer" if name == "llama, biases" else by_class.get(family, "stock")
    if group_counts(model.decoder, "head")[0] == 1:
        expected = "stock"  # the only head stays
    assert write_model(pruned(model, equal=True), tmp_path / "out").format == expected
    assert write_model(model, tmp_path / "same").format == "stock"
    if family != "bloom":
        assert write_model(pruned(model, equal=True, kinds=("channel",)), tmp_path / "channels").format == "stock"


@pytest.mark.parametrize("family", SMALL)
def test_hidden_size_and_layers_are_written_too(dense: dict[str, Path], tmp_path: Path, family: str) -> None:
    model = read_model(dense[family])
    kept = np.sort(np.random.default_rng(0).choice(hidden_size(model.decoder), 36, replace=False))
    fewer = slice_layers(slice_hidden(model.decoder, kept), [0, 2])
    assert (hidden_size(fewer), layer_count(fewer)) == (36, 2)
    model = dataclasses.replace(model, decoder=fewer)
    write_model(model, tmp_path / "out")
    assert np.abs(torch_logits(load_torch(tmp_path / "out"), TOKENS) - logits(model)).max() <= 1e-4
    assert same_arrays(read_model(tmp_path / "out").decoder, fewer)


def test_padded_heads_keep_their_place(dense: dict[str, Path], tmp_path: Path) -> None:
    """By their slopes (BLOOM), by the record of the pruning (OPT)."""
    kept = {"head": [np.array([1, 4])] * 3, "channel": [np.arange(192)] * 3}
    model = read_model(dense["bloom"])
    write_model(dataclasses.replace(model, decoder=slice_groups(model.decoder, kept)), tmp_path / "bloom", "padded")
    kernel = read_model(tmp_path / "bloom").decoder.runs[0].attention.o.kernel[...]
    assert [bool(kernel[0, head].any()) for head in range(6)] == [head in (1, 4) for head in range(6)]

    model = read_model(dense["opt"])
    kept = {"head": [np.array([1, 4]), np.array([0, 7]), np.array([6])], "channel": [np.arange(40)] * 3}
    record = {"kept": {kind: [rows.tolist() for rows in per_layer] for kind, per_layer in kept.items()}}
    sliced = dataclasses.replace(model, decoder=slice_groups(model.decoder, kept), record=record)
    write_model(sliced, tmp_path / "opt", "padded")
    kernel = read_model(tmp_path / "opt").decoder.runs[0].attention.o.kernel[...]
    for layer, rows in enumerate(kept["head"]):
        assert [bool(kernel[layer, head].any()) for head in range(8)] == [head in rows for head in range(8)]


@pytest.mark.parametrize("kept", [None, [], {"head": 5}, {"head": [[0], [0, 0], ["a"]]}, {"head": [[5], [1, 0], [9]]}])
def test_a_damaged_record_does_not_move_heads(dense: dict[str, Path], tmp_path: Path, kept: Any) -> None:
    model = read_model(dense["opt"])
    counts = {"head": [np.arange(1), np.arange(2), np.arange(1)], "channel": [np.arange(40)] * 3}
    sliced = dataclasses.replace(model, decoder=slice_groups(model.decoder, counts), record={"kept": kept})
    write_model(sliced, tmp_path / "out", "padded")
    np.testing.assert_allclose(logits(read_model(tmp_path / "out")), logits(sliced), atol=1e-5)


def test_old_keys_of_linear_positions_are_what_old_versions_accept(tmp_path: Path) -> None:
    """Until transformers 4.42 they had to be exactly two."""
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
def test_old_keys_alone_say_the_same(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """What older transformers and llama.cpp read, in the stock and in the per-layer format."""
    model = read_model(hugging_face_folder(tmp_path / "model", family, **changes))
    for form in ("stock", "per-layer"):
        write_model(model, tmp_path / form, form)
        edit_json(tmp_path / form / "config.json", rope_parameters=None)
        assert read_model(tmp_path / form).decoder.config == model.decoder.config


@pytest.mark.parametrize("size", ["0GB", "GB", "5", "-1GB", "0.0MB", "five GB", "1e3MB"])
def test_shard_sizes_that_are_none(size: str) -> None:
    with pytest.raises(InputError, match="is not understood"):
        check_shard_size(size)


@pytest.mark.parametrize("size", ["5GB", "0.5GB", "100 mb", "1.25TB"])
def test_shard_sizes(size: str) -> None:
    check_shard_size(size)


def test_a_flax_repository_is_fetched_whole(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the Hub that copies what the patterns ask for."""
    for form in ("flax", "per-layer"):
        write_model(read_model(dense["llama"]), tmp_path / form, form)

    def fetch(name: str, allow_patterns: list[str]) -> str:
        repository, fetched = tmp_path / name.split("/")[1], tmp_path / "fetched" / name
        paths = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
        for path in huggingface_hub.utils.filter_repo_objects(paths, allow_patterns=allow_patterns):
            (fetched / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / path, fetched / path)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for form in ("flax", "per-layer"):
        assert same_arrays(read_model(f"owner/{form}").decoder, read_model(dense["llama"]).decoder)


def test_forced_formats(dense: dict[str, Path], tmp_path: Path) -> None:
    model = read_model(dense["llama"])
    assert write_model(model, tmp_path / "forced", "per-layer").format == "per-layer"
    assert np.abs(torch_logits(load_torch(tmp_path / "forced"), TOKENS) - logits(model)).max() <= 1e-4
    with pytest.raises(InputError, match=r"unequal numbers of .*use the format per-layer or padded"):
        write_model(pruned(model), tmp_path / "stock", "stock")
    with pytest.raises(InputError, match="unknown format 'zip'; expected one of stock, per-layer, padded, flax"):
        write_model(model, tmp_path / "zip", "zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forced"]


def test_a_dense_model_is_written_as_it_was(dense: dict[str, Path], tmp_path: Path) -> None:
    """A per-layer folder whose layers are equal again becomes stock again."""
    for family in SMALL:
        model = read_model(dense[family])
        write_model(model, tmp_path / f"{family}-per-layer", "per-layer")
        back = read_model(tmp_path / f"{family}-per-layer")
        assert write_model(back, tmp_path / family).format == "stock"
        assert same_arrays(read_model(tmp_path / family).decoder, model.decoder)
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert config["model_type"] == family
        assert not config.keys() & {"auto_map", "per_layer_config", "alibi_heads"}


def test_sizes_of_a_decoder_build_it_again(dense: dict[str, Path]) -> None:
    for folder in dense.values():
        decoder = pruned(read_model(folder)).decoder
        built = build(decoder.config, sizes_of(decoder))
        assert jax.tree.structure(built) == jax.tree.structure(decoder)
        for (path, ours), (_, theirs) in zip(named_arrays(built), named_arrays(decoder), strict=True):
            assert ours.shape == theirs.shape
            if axis_table.is_data(path):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize(("family", "form"), [("llama", "stock"), ("llama", "per-layer"), ("bloom", "padded")])
def test_ten_steps_of_lora(dense: dict[str, Path], tmp_path: Path, family: str, form: str) -> None:
    """PEFT tunes what was pruned: the loss falls, and the merged model is saved and loads again."""
    model = pruned(read_model(dense[family]), equal=form == "stock")
    assert write_model(model, tmp_path / "out", form).format == form
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(load_torch(tmp_path / "out"), options)
    optimizer = torch.optim.AdamW((each for each in tuned.parameters() if each.requires_grad), lr=1e-2)
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
    # And back into this package: recovered models can be pruned further.
    np.testing.assert_allclose(logits(read_model(tmp_path / "merged")), torch_logits(merged, TOKENS), atol=1e-4)


def test_sizes_are_rounded_for_the_hardware(tmp_path: Path) -> None:
    """The record says what was asked and what was kept."""
    model = read_model(hugging_face_folder(tmp_path / "dense", intermediate_size=300, num_key_value_heads=8))
    scores = Scores(
        {kind: [np.arange(n, dtype=float) for n in group_counts(model.decoder, kind)] for kind in axis_table.KINDS},
        {},
        {},
    )
    rounded = prune(model, scores, Budget(0.4, layers=(1, 3), round_heads_to=4, round_width_to=64))
    assert group_counts(rounded.decoder, "head") == [8, 8, 8]  # 5 asked, the next multiple of 4 is 8
    assert group_counts(rounded.decoder, "channel") == [300, 192, 192]  # 180 asked
    assert rounded.record is not None
    assert rounded.record["groups_asked"] == {"head": [8, 5, 5], "channel": [300, 180, 180]}
    assert (rounded.record["budget"]["round_heads_to"], rounded.record["budget"]["round_width_to"]) == (4, 64)


@pytest.mark.parametrize(
    ("count", "ratio", "multiple", "kept"),
    [(300, 0.4, 64, 192), (300, 0.01, 64, 256), (40, 0.5, 64, 40), (8, 0.5, 4, 4), (8, 0.9, 4, 4), (6, 0.1, 4, 4)],
)
def test_kept_counts_are_rounded_up_where_there_are_as_many(count: int, ratio: float, multiple: int, kept: int) -> None:
    assert kept_count(count, ratio, multiple) == kept
