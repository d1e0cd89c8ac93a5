"""The walk over blocks, against plain loops over layers."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.model import axis_table
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder, embed, rotary_angles
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.modules import Block
from minillm_jax.pruning import slicing
from minillm_jax.pruning import walk as walking
from minillm_jax.pruning.walk import PROJECTIONS, Moments, Site, projection, walk
from tests.helpers import CONFIGURATIONS, arrays_equal, hugging_face_folder, logits_of, random_tokens, small_decoder

BIASED = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
KEPT = {"head": np.array([0, 2]), "channel": np.array([1, 2, 5, 6, 7, 11])}


def slice_half(site: Site) -> Block:
    return slicing.take(site.run, {site.kind: jnp.asarray(KEPT[site.kind])[None]}, 0, 1)


def without_mlp(block: Block) -> Block:
    """A layer whose stream after it is that after its attention."""

    def leaf(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        return jnp.zeros_like(array) if axis_table.array_path(path).startswith("mlp.down") else array

    return jax.tree_util.tree_map_with_path(leaf, block)


_apply = jax.jit(apply_layer, static_argnames="config")


def halves(
    decoder: Decoder, smaller: Decoder, windows: np.ndarray
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Layer and kind -> full-width input of the projection and stream before it, both pruned; dense stream after it."""
    dense, pruned = decoder.runs[0], smaller.runs[0]
    angles = rotary_angles(decoder, windows.shape[1])
    x_dense = x_pruned = embed(decoder, jnp.asarray(windows))
    found = {}
    for layer in range(dense.attention.q.kernel.shape[0]):
        old, new = (jax.tree.map(lambda array, i=layer: array[i], run) for run in (dense, pruned))
        mixed = jax.tree.map(lambda array: array, old)
        mixed.attention = new.attention
        inputs = _apply(old, decoder.config, x_pruned, angles)[1]
        attended = [
            _apply(without_mlp(block), decoder.config, x, angles)[0] for block, x in ((old, x_dense), (new, x_pruned))
        ]
        found[layer, "head"] = (inputs["attention.o"], x_pruned, attended[0])
        wide = _apply(mixed, decoder.config, x_pruned, angles)[1]["mlp.down"]
        x_dense = _apply(old, decoder.config, x_dense, angles)[0]
        found[layer, "channel"] = (wide, attended[1], x_dense)
        x_pruned = _apply(new, decoder.config, x_pruned, angles)[0]
    flat = decoder.embedding.shape[1]
    tokens = windows.size
    return {
        site: (np.asarray(a).reshape(tokens, -1), *(np.asarray(x).reshape(tokens, flat) for x in streams))
        for site, (a, *streams) in found.items()
    }


def collect(decoder: Decoder, windows: np.ndarray) -> dict[tuple[int, str], Moments]:
    found = {}

    def replace(site: Site) -> Block:
        found[site.layer, site.kind] = site.moments()
        return slice_half(site)

    walk(decoder, windows, replace)
    return found


def test_moments_are_those_of_a_plain_loop_on_both_streams() -> None:
    decoder, windows = small_decoder(**BIASED), random_tokens(61, 5, 9)
    sliced = slicing.slice_groups(decoder, {kind: [rows] * 3 for kind, rows in KEPT.items()})
    reference, found = halves(decoder, sliced, windows), collect(decoder, windows)
    assert list(found) == list(reference) == [(layer, kind) for layer in range(3) for kind in PROJECTIONS]
    for (layer, kind), (a, before, after) in reference.items():
        bias = projection(decoder.runs[0], kind).bias
        gap = after - before - (0 if bias is None else np.asarray(bias)[layer])
        expected = Moments(a.T @ a, a.sum(axis=0), a.T @ gap, gap.sum(axis=0))
        for name, moment, value in zip(Moments._fields, found[layer, kind], expected, strict=True):
            scale = np.abs(value).max()
            np.testing.assert_allclose(moment, value, atol=1e-5 * scale, err_msg=f"{layer} {kind} {name}")


@pytest.mark.parametrize(
    "name",
    [
        "llama, biases",
        "opt, projected, post norm",
        "bloom, residual from norm",
        "gpt_neox",
        "mistral, sliding window",
    ],
)
def test_on_a_model_that_is_left_alone_the_gap_is_the_output_of_the_projection(tmp_path: Path, name: str) -> None:
    """In every kind of family: A · W + bias is what brings the stream to where it goes."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder

    def check(site: Site) -> Block:
        gram, inputs, cross, gaps = (np.asarray(moment) for moment in site.moments())
        kernel = np.asarray(projection(site.run, site.kind).kernel).reshape(len(gram), -1)
        np.testing.assert_allclose(cross, gram @ kernel, atol=1e-4 * np.abs(cross).max())
        np.testing.assert_allclose(gaps, inputs @ kernel, atol=1e-4 * np.abs(cross).max())
        return site.run

    found = with_runs(decoder, slicing.merge(walk(decoder, random_tokens(97, 3, 20), check)))
    assert arrays_equal(found, decoder)


@pytest.mark.parametrize("name", ["gemma2", "bloom", "gpt_neox"])
def test_the_pruned_stream_is_that_of_the_sliced_model(tmp_path: Path, name: str) -> None:
    """Post norms, windows and slopes included: what the walk assembles is what slicing makes."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder
    found = with_runs(decoder, slicing.merge(walk(decoder, random_tokens(97, 2, 20), slice_half)))
    expected = slicing.slice_groups(decoder, {kind: [rows] * 3 for kind, rows in KEPT.items()})
    assert arrays_equal(found, expected)
    tokens = random_tokens(97, 2, 30)
    np.testing.assert_array_equal(logits_of(found, tokens), logits_of(expected, tokens))


def test_moments_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, windows = small_decoder(), random_tokens(61, 7, 9)
    whole = collect(decoder, windows)
    monkeypatch.setattr(walking, "batches", lambda windows: Batches(windows, 18))
    for site, moments in collect(decoder, windows).items():
        for split, together in zip(moments, whole[site], strict=True):
            np.testing.assert_allclose(split, together, atol=1e-6 * float(jnp.abs(together).max()))


def test_equal_layers_share_their_programs_and_moments_nobody_asks_for_are_not_collected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, steps = small_decoder(layers=5), []
    programs = (walking._layer, walking._begin, walking._advance)
    before = [program._cache_size() for program in programs]
    monkeypatch.setattr(walking, "_moments", None)
    walk(decoder, random_tokens(61, 5, 11), slice_half, lambda done, total: steps.append((done, total)))
    after = [program._cache_size() for program in programs]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 4]
    assert steps == [(done, 10) for done in range(1, 11)]
