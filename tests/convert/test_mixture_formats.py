"""Mixtures of experts whose layers are unequal, in the formats that hold them: outputs, tensors and cached texts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import minillm_jax as mj
from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.errors import InputError
from minillm_jax.evaluation.generate import generate
from minillm_jax.model.axis_table import Kept
from minillm_jax.model.config import LayerSizes
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import sizes_of
from minillm_jax.pruning.slicing import slice_groups
from tests.helpers import (
    MIXTURES,
    arrays_equal,
    hugging_face_folder,
    load_stock,
    load_torch,
    logits_of,
    quickly,
    random_tokens,
    torch_logits,
)

TOKENS = np.random.default_rng(3).integers(1, 97, (2, 33))

# The families that have, together, almost all parts of routers and experts.
MOST_PARTS = ("gpt_oss", "glm4_moe")


def chosen(layers: tuple[LayerSizes, ...], experts: bool, lost: bool) -> Kept:
    """Random groups, fewer in later layers.

    Args:
      layers: the sizes of the layers.
      experts: whether the counts and widths of experts differ too.
      lost: whether the second layer loses its attention, and every second one the MLP or shared expert.
    """
    rng, kept = np.random.default_rng(0), {"head": [], "channel": [], "expert": [], "expert_channel": []}
    for number, layer in enumerate(layers):
        heads = 0 if lost and number == 1 else layer.K - number
        width = 0 if lost and number % 2 == 0 else max(layer.F - 2 * number - 1, 0)
        count = layer.X - 2 * (number // 2) if experts and layer.X else layer.X
        each = layer.W - 4 * (number % 2) if experts else layer.W
        kept["head"].append(np.sort(rng.choice(layer.K, heads, replace=False)))
        kept["channel"].append(np.sort(rng.choice(layer.F, width, replace=False)))
        # As many of each half of the experts: GLM 4.5 has groups.
        halves = [rng.choice(layer.X // 2, count // 2, replace=False) + layer.X // 2 * half for half in range(2)]
        kept["expert"].append(np.sort(np.concatenate(halves)) if count else np.arange(0))
        rows = [np.sort(rng.choice(layer.W, each, replace=False)) + layer.W * expert for expert in range(count)]
        kept["expert_channel"].append(np.concatenate(rows) if rows else np.arange(0))
    return kept if experts else {kind: kept[kind] for kind in ("head", "channel")}


def unequal(model: Model, experts: bool = False, lost: bool = False) -> Model:
    """The model with layers of unequal sizes."""
    kept = chosen(sizes_of(model.decoder).layers, experts, lost)
    return replace(model, decoder=slice_groups(model.decoder, kept))


@pytest.mark.parametrize("family", quickly(MIXTURES, MOST_PARTS))
def test_unequal_layers_are_written_per_layer(tmp_path: Path, family: str) -> None:
    """Unequal heads, dense channels, shared experts and experts: equal logits, tensors and texts with a cache."""
    smaller = unequal(read_model(hugging_face_folder(tmp_path / "dense", family)), experts=True)
    assert write_model(smaller, tmp_path / "smaller").format == "per-layer"
    assert arrays_equal(read_model(tmp_path / "smaller").decoder, smaller.decoder)
    loaded = load_torch(tmp_path / "smaller", remote_code=True)
    assert np.abs(torch_logits(loaded, TOKENS) - logits_of(smaller.decoder, TOKENS)).max() <= 1e-4
    prompt = TOKENS[:1, :9]
    expected = loaded.generate(torch.from_numpy(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert list(generate(smaller.decoder, [prompt[0].tolist()], 12)[0]) == expected[0, 9:].tolist()


@pytest.mark.parametrize("family", quickly(MIXTURES, MOST_PARTS))
def test_layers_without_attention_or_shared_expert_are_written_per_layer(tmp_path: Path, family: str) -> None:
    smaller = unequal(read_model(hugging_face_folder(tmp_path / "dense", family)), lost=True)
    assert write_model(smaller, tmp_path / "smaller").format == "per-layer"
    assert arrays_equal(read_model(tmp_path / "smaller").decoder, smaller.decoder)
    by_torch = torch_logits(load_torch(tmp_path / "smaller"), TOKENS)
    assert np.abs(by_torch - logits_of(smaller.decoder, TOKENS)).max() <= 1e-4


@pytest.mark.parametrize("family", quickly([name for name in MIXTURES if name != "olmoe"], ("glm4_moe",)))
def test_unequal_heads_and_shared_experts_are_padded(tmp_path: Path, family: str) -> None:
    """Zeros in the stock class; GLM 4.5 gets a shared expert of a multiple of an expert's channels."""
    for lost in (False, True):
        smaller = unequal(read_model(hugging_face_folder(tmp_path / f"dense-{lost}", family)), lost=lost)
        assert write_model(smaller, tmp_path / str(lost), "padded").format == "padded"
        expected = logits_of(smaller.decoder, TOKENS)
        assert np.abs(logits_of(read_model(tmp_path / str(lost)).decoder, TOKENS) - expected).max() <= 1e-5
        assert np.abs(torch_logits(load_stock(tmp_path / str(lost)), TOKENS) - expected).max() <= 1e-4


def test_experts_are_not_padded(tmp_path: Path) -> None:
    """A router would choose experts of zeros."""
    model = read_model(hugging_face_folder(tmp_path / "dense", "qwen3_moe"))
    kept = {
        kind: rows for kind, rows in chosen(sizes_of(model.decoder).layers, True, False).items() if "expert" in kind
    }
    smaller = replace(model, decoder=slice_groups(model.decoder, kept))
    for name, way in (("padded", "per-layer"), ("stock", "per-layer or padded")):
        with pytest.raises(InputError, match=rf"unequal numbers of experts \(6, 4\); use the format {way}"):
            write_model(smaller, tmp_path / "out", name)


@pytest.mark.parametrize("name", ["per-layer", "padded"])
def test_a_streamed_mixture_is_written_as_one_in_memory(tmp_path: Path, name: str) -> None:
    folder = hugging_face_folder(tmp_path / "dense", "qwen2_moe")
    for stream in (True, False):
        write_model(unequal(read_model(folder, stream=stream)), tmp_path / str(stream), name)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "True" / file).read_bytes() == (tmp_path / "False" / file).read_bytes()


def test_layers_that_lose_their_attention_keep_their_experts(tmp_path: Path) -> None:
    """A run removes heads by measured losses, and experts; the result is written as its layers demand."""
    model = read_model(hugging_face_folder(tmp_path / "dense", "mixtral"))
    options = {"structures": ("attention", "experts"), "allocation": "curves", "samples": 4, "seq_len": 16}
    pruned = mj.prune(model, random_tokens(97, 8, 16), 0.2, **options)
    layers = sizes_of(pruned.decoder).layers
    assert [layer.X for layer in layers] == [5, 5, 5]
    assert sorted(layer.K for layer in layers) == [0, 4, 4]
    assert write_model(pruned, tmp_path / "pruned").format == "per-layer"
    assert arrays_equal(read_model(tmp_path / "pruned").decoder, pruned.decoder)


def test_streamed_experts_of_a_gguf_file_are_those_in_memory(tmp_path: Path) -> None:
    """GGUF stacks the experts of a layer, for which it has rules of its own."""
    model = read_model(hugging_face_folder(tmp_path / "model", "glm4_moe"))
    write_model(model, tmp_path / "gguf", "gguf")
    streamed = read_model(tmp_path / "gguf", stream=True)
    for name in ("again", "folder"):
        write_model(streamed, tmp_path / name, "gguf" if name == "again" else None)
        assert arrays_equal(read_model(tmp_path / name).decoder, model.decoder)


def test_the_keys_of_experts_in_a_gguf_file_are_checked(tmp_path: Path) -> None:
    model = read_model(hugging_face_folder(tmp_path / "model", "mixtral"))
    write_model(model, tmp_path / "gguf", "gguf")
    content = (tmp_path / "gguf" / "model.gguf").read_bytes()
    for key, sentence in (
        ("llama.expert_used_count", "llama.expert_used_count must be a whole number, found None"),
        ("llama.expert_count", "unknown tensor 'blk.0.ffn_down_exps.weight'.*architecture llama has no place for it"),
    ):
        path = tmp_path / "changed.gguf"
        path.write_bytes(content.replace(key.encode(), key.replace("exp", "EXP").encode()))
        with pytest.raises(InputError, match=sentence):
            read_model(path)
