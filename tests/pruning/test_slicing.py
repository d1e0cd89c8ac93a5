"""A sliced model equals the dense model with zeros in the removed groups, in every array and in the logits."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.model import axis_table
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.tree import group_counts, layer_count, named_arrays, sizes_of
from minillm_jax.pruning.slicing import slice_groups, slice_hidden, slice_layers, slice_sizes
from tests.helpers import (
    CONFIGURATIONS,
    SMALL,
    arrays_equal,
    hugging_face_folder,
    logits_of,
    quickly,
    random_tokens,
    small_decoder,
    torch_logits,
    torch_model,
)

BIASED = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}


def zeroed(decoder: Decoder, kept: dict[str, list[np.ndarray]]) -> Decoder:
    """The dense model with zeros in the rows of the output projections of removed groups, without the table of axes."""
    decoder = jax.tree.map(lambda leaf: leaf, decoder)
    layer = 0
    for run in decoder.runs:
        o, down = np.array(run.attention.o.kernel[...]), np.array(run.mlp.down.kernel[...])
        per_group = o.shape[1] // run.attention.k.kernel.shape[2]
        for index in range(o.shape[0]):
            heads = [h for h in range(o.shape[1]) if h // per_group not in kept["head"][layer]]
            o[index, heads] = 0
            down[index, [c for c in range(down.shape[1]) if c not in kept["channel"][layer]]] = 0
            layer += 1
        run.attention.o.kernel.set_value(jnp.asarray(o))
        run.mlp.down.kernel.set_value(jnp.asarray(down))
    return decoder


def random_kept(decoder: Decoder, seed: int, equal: bool) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    kept = {}
    for kind in axis_table.KINDS:
        counts = group_counts(decoder, kind)
        count = rng.integers(1, counts[0] + 1)
        chosen = [rng.choice(n, count if equal else rng.integers(1, n + 1), replace=False) for n in counts]
        kept[kind] = [np.sort(indices) for indices in chosen]
    return kept


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    kv_heads=st.integers(1, 4),
    per_group=st.integers(1, 3),
    width=st.integers(1, 9),
    layers=st.integers(1, 4),
    seed=st.integers(0, 999),
    equal=st.booleans(),
    tied=st.booleans(),
)
def test_slicing_equals_zeroing(
    kv_heads: int, per_group: int, width: int, layers: int, seed: int, equal: bool, tied: bool
) -> None:
    layer = LayerSizes(N=kv_heads * per_group, K=kv_heads, F=width)
    sizes = Sizes(V=23, D=8, H=4, layers=(layer,) * layers)
    decoder = small_decoder(seed, sizes=sizes, tie_embeddings=tied, **BIASED)
    kept = random_kept(decoder, seed, equal)
    tokens = random_tokens(23, 2, 7)
    np.testing.assert_allclose(
        logits_of(slice_groups(decoder, kept), tokens), logits_of(zeroed(decoder, kept), tokens), atol=1e-5, rtol=1e-5
    )


VARIANTS = ["llama, biases", "opt, projected, post norm", "bloom, residual from norm", "gpt_neox, sequential"]


@pytest.mark.parametrize("name", quickly([*SMALL, *VARIANTS], SMALL))
def test_slicing_equals_zeroing_in_every_family(tmp_path: Path, name: str) -> None:
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder
    kept = random_kept(decoder, seed=1, equal=False)
    if decoder.config.joint_qk_norm:  # the norms are over the kept heads
        kept["head"] = [np.arange(count) for count in group_counts(decoder, "head")]
    tokens = random_tokens(97, 2, 30)
    sliced, reference = logits_of(slice_groups(decoder, kept), tokens), logits_of(zeroed(decoder, kept), tokens)
    assert np.abs(sliced - reference).max() <= 1e-5 * max(1.0, np.abs(reference).max())


@pytest.mark.parametrize(
    "name",
    [
        "llama, biases",
        "qwen3",
        "gemma2",
        "olmo2",
        "opt",
        "bloom",
        "gpt_neox",
        "glm4",
        "phi3",
        "mistral, sliding window",
    ],
)
def test_every_array_is_sliced_like_by_plain_numpy_indexing(tmp_path: Path, name: str) -> None:
    """Array by array, including biases, norms and data of the layers."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder
    run = decoder.runs[0]
    per_group = run.attention.q.kernel.shape[2] // run.attention.k.kernel.shape[2]
    kept = {"head": [np.array([0, 3])] * 3, "channel": [np.array([1, 4, 5, 11])] * 3}
    heads, channels = [0, 3], [1, 4, 5, 11]
    queries = [head * per_group + i for head in heads for i in range(per_group)]
    by_hand = {
        "attention.q.kernel": lambda a: a[:, :, queries],
        "attention.q.bias": lambda a: a[:, queries],
        "attention.k.kernel": lambda a: a[:, :, heads],
        "attention.k.bias": lambda a: a[:, heads],
        "attention.v.kernel": lambda a: a[:, :, heads],
        "attention.v.bias": lambda a: a[:, heads],
        "attention.q_joint_norm.scale": lambda a: a[:, queries],
        "attention.k_joint_norm.scale": lambda a: a[:, heads],
        "attention.o.kernel": lambda a: a[:, queries],
        "attention.slopes": lambda a: a[:, queries],
        "mlp.gate.kernel": lambda a: a[:, :, channels],
        "mlp.gate.bias": lambda a: a[:, channels],
        "mlp.up.kernel": lambda a: a[:, :, channels],
        "mlp.up.bias": lambda a: a[:, channels],
        "mlp.down.kernel": lambda a: a[:, channels],
    }
    sliced = dict(named_arrays(slice_groups(decoder, kept)))
    assert sliced.keys() == dict(named_arrays(decoder)).keys()
    for path, array in named_arrays(decoder):
        expected = by_hand.get(path.removeprefix("runs.0."), lambda a: a)
        np.testing.assert_array_equal(sliced[path], expected(np.asarray(array)), err_msg=path)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "olmo2", "glm4"])
def test_hidden_dimensions_are_sliced_as_in_torch(tmp_path: Path, family: str) -> None:
    """Against a torch model of the smaller hidden size with sliced tensors. Only the hidden axes have the size 64."""
    dense = torch_model(family)
    dense.save_pretrained(tmp_path / "model")
    kept = np.sort(np.random.default_rng(0).choice(64, 48, replace=False))
    smaller = torch_model(family, hidden_size=48)
    state = dense.state_dict()
    for name, tensor in state.items():
        for axis in range(tensor.ndim):
            if tensor.shape[axis] == 64:
                state[name] = state[name].index_select(axis, torch.from_numpy(kept))
    smaller.load_state_dict(state)
    if family.startswith("gemma"):
        smaller.model.embed_tokens.embed_scale.fill_(64**0.5)  # the scale of the dense model, not of size 48
    tokens = random_tokens(97, 2, 30)
    decoder = slice_hidden(read_model(tmp_path / "model").decoder, kept)
    assert np.abs(logits_of(decoder, tokens) - torch_logits(smaller, tokens)).max() <= 1e-4


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_layers_are_removed_with_their_windows_and_slopes(tmp_path: Path, family: str) -> None:
    dense = torch_model(family)
    dense.save_pretrained(tmp_path / "model")
    decoder = slice_groups(
        read_model(tmp_path / "model").decoder,
        {"head": [np.arange(4)] * 3, "channel": [np.arange(n) for n in (40, 40, 39)]},
    )
    for kept in ([0, 1], [1, 2], [2], [0, 2], [0, 1, 2]):
        sliced = slice_layers(decoder, kept)
        assert layer_count(sliced) == len(kept)
        for kind in axis_table.KINDS:
            assert group_counts(sliced, kind) == [group_counts(decoder, kind)[layer] for layer in kept]
    tokens = random_tokens(97, 2, 30)
    del (dense.model.layers if family == "gemma2" else dense.transformer.h)[1]
    decoder = read_model(tmp_path / "model").decoder
    dense.config.num_hidden_layers = 2
    if family == "gemma2":
        dense.config.layer_types = ["sliding_attention", "sliding_attention"]
    assert np.abs(logits_of(slice_layers(decoder, [0, 2]), tokens) - torch_logits(dense, tokens)).max() <= 1e-4


def test_slice_sizes_returns_the_sizes_of_the_sliced_decoder(tmp_path: Path) -> None:
    for family in ("llama", "bloom", "mistral"):
        decoder = read_model(hugging_face_folder(tmp_path / family, family)).decoder
        kept = random_kept(decoder, seed=2, equal=False)
        assert slice_sizes(sizes_of(decoder), kept) == sizes_of(slice_groups(decoder, kept))


def test_unequal_layers_become_runs_and_equal_neighbours_one_run() -> None:
    decoder = small_decoder(layers=5)
    kept = {"head": [np.arange(4)] * 5, "channel": [np.arange(n) for n in (6, 6, 3, 6, 6)]}
    once = slice_groups(decoder, kept)
    assert [run.mlp.down.kernel.shape[:2] for run in once.runs] == [(2, 6), (1, 3), (2, 6)]
    assert layer_count(once) == 5
    again = slice_groups(once, {"head": kept["head"], "channel": [np.arange(3)] * 5})
    assert len(again.runs) == 1
    direct = slice_groups(decoder, {"head": kept["head"], "channel": [np.arange(3)] * 5})
    assert arrays_equal(again, direct)


def test_slicing_with_all_groups_kept_returns_the_same_model() -> None:
    decoder = small_decoder()
    kept = {kind: [np.arange(n) for n in group_counts(decoder, kind)] for kind in axis_table.KINDS}
    assert arrays_equal(slice_groups(decoder, kept), decoder)


@pytest.mark.parametrize("axes", ["D NH", "NH D", "NH", "KH", "F D"])
def test_take_groups_keeps_the_rows_of_split_groups(axes: str) -> None:
    kind = "channel" if "F" in axes else "head"
    sizes = {"D": 5, "N": 8, "K": 4, "H": 3, "F": 4}
    array = jnp.arange(np.prod(axis_table.shape(axes, sizes)), dtype=jnp.float32).reshape(axis_table.shape(axes, sizes))
    kept = jnp.asarray([1, 3])
    taken = axis_table.take_groups(array, axes, kind, kept, 4)
    rows = np.sort(np.asarray(axis_table.split_groups(array, axes, kind, 4))[[1, 3]].ravel())
    np.testing.assert_array_equal(np.sort(np.asarray(taken).ravel()), rows)


def test_slicing_works_on_shapes_alone() -> None:
    """A job slices shapes to check that the pruned model can be saved, before it begins."""
    decoder = small_decoder()
    kept = {"head": [np.arange(2)] * 3, "channel": [np.arange(5)] * 3}
    abstract = jax.eval_shape(lambda d: slice_groups(d, kept), decoder)
    assert group_counts(abstract, "head") == [2, 2, 2]
    assert dataclasses.is_dataclass(abstract.config)
