"""The walk through the layers, against plain loops over layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from minillm_jax.pruning.system import HostMoments
from minillm_jax.pruning.walk import (
    PROJECTIONS,
    Moments,
    Site,
    State,
    advance,
    projection,
    sums_about_means,
    walk,
)
from tests.helpers import CONFIGURATIONS, arrays_equal, hugging_face_folder, logits_of, random_tokens, small_decoder

BIASED = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
KEPT = {"head": np.array([0, 2]), "channel": np.array([1, 2, 5, 6, 7, 11])}


def slice_sublayer(site: Site) -> Block:
    """The layer with the kept groups of one sublayer."""
    return slicing.take(site.run, {site.kind: jnp.asarray(KEPT[site.kind])[None]}, 0, 1)


def without_mlp(block: Block) -> Block:
    """The layer with an MLP that adds nothing, so that its output is the residual stream after its attention."""

    def leaf(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        return jnp.zeros_like(array) if axis_table.array_path(path).startswith("mlp.down") else array

    return jax.tree_util.tree_map_with_path(leaf, block)


_apply = jax.jit(apply_layer, static_argnames="config")


def sublayer_activations(
    decoder: Decoder, pruned_decoder: Decoder, windows: np.ndarray
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Activations around every output projection, by layer and kind, from a plain loop over the layers.

    Returns:
      The full-width input of the projection on the pruned residual stream [tokens, I], the pruned residual stream
      before the sublayer [tokens, D], and the dense residual stream after it [tokens, D].
    """
    dense_run, pruned_run = decoder.runs[0], pruned_decoder.runs[0]
    angles = rotary_angles(decoder, windows.shape[1])
    x_dense = x_pruned = embed(decoder, jnp.asarray(windows))
    activations = {}
    for layer in range(dense_run.attention.q.kernel.shape[0]):
        dense, pruned = (jax.tree.map(lambda array, i=layer: array[i], run) for run in (dense_run, pruned_run))
        pruned_attention = jax.tree.map(lambda array: array, dense)
        pruned_attention.attention = pruned.attention
        inputs = _apply(dense, decoder.config, x_pruned, angles)[1]
        attended = [
            _apply(without_mlp(block), decoder.config, x, angles)[0]
            for block, x in ((dense, x_dense), (pruned, x_pruned))
        ]
        activations[layer, "head"] = (inputs["attention.o"], x_pruned, attended[0])
        wide = _apply(pruned_attention, decoder.config, x_pruned, angles)[1]["mlp.down"]
        x_dense = _apply(dense, decoder.config, x_dense, angles)[0]
        activations[layer, "channel"] = (wide, attended[1], x_dense)
        x_pruned = _apply(pruned, decoder.config, x_pruned, angles)[0]
    width = decoder.embedding.shape[1]
    tokens = windows.size
    return {
        site: (np.asarray(a).reshape(tokens, -1), *(np.asarray(x).reshape(tokens, width) for x in streams))
        for site, (a, *streams) in activations.items()
    }


def collect_moments(decoder: Decoder, batches: Batches) -> dict[tuple[int, str], Moments]:
    moments = {}

    def replace(site: Site) -> Block:
        moments[site.layer, site.kind] = site.moments().total
        return slice_sublayer(site)

    walk(decoder, batches, replace)
    return moments


def walked_model(decoder: Decoder, batches: Batches, replace: Callable[[Site], Block]) -> Decoder:
    layers: list[Block] = []
    walk(decoder, batches, replace, finish=lambda index, dense, layer: layers.append(layer))
    return with_runs(decoder, slicing.merge(layers))


def test_moments_equal_those_of_a_plain_loop_over_both_residual_streams() -> None:
    decoder, windows = small_decoder(**BIASED), random_tokens(61, 5, 9)
    sliced = slicing.slice_groups(decoder, {kind: [rows] * 3 for kind, rows in KEPT.items()})
    activations = sublayer_activations(decoder, sliced, windows)
    moments = collect_moments(decoder, Batches(windows))
    assert list(moments) == list(activations) == [(layer, kind) for layer in range(3) for kind in PROJECTIONS]
    for (layer, kind), (a, before, after) in activations.items():
        bias = projection(decoder.runs[0], kind).bias
        gap = after - before - (0 if bias is None else np.asarray(bias)[layer])
        x, y = a - a.mean(axis=0), gap - gap.mean(axis=0)  # all windows are in the first batch
        expected = Moments(x.T @ x, x.sum(axis=0), x.T @ y, y.sum(axis=0), a.mean(axis=0), gap.mean(axis=0))
        for name, moment, value in zip(Moments._fields, moments[layer, kind], expected, strict=True):
            # The sums of differences from a mean are near zero.
            terms = {"inputs": np.abs(a).sum(axis=0), "gaps": np.abs(gap).sum(axis=0)}.get(name, np.abs(value))
            scale = terms.max()
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
def test_gap_of_an_unpruned_model_is_the_output_of_the_projection(tmp_path: Path, name: str) -> None:
    """For every kind of family: both residual streams are equal, so the gap is A W."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder

    def check(site: Site) -> Block:
        gram, inputs, cross, gaps, center, gap_center = (np.asarray(moment) for moment in site.moments().total)
        kernel = np.asarray(projection(site.run, site.kind).kernel).reshape(len(gram), -1)
        np.testing.assert_allclose(gap_center, center @ kernel, atol=1e-4 * np.abs(gap_center).max())
        np.testing.assert_allclose(cross, gram @ kernel, atol=1e-4 * np.abs(cross).max())
        np.testing.assert_allclose(gaps, inputs @ kernel, atol=1e-4 * np.abs(cross).max())
        return site.run

    walked = walked_model(decoder, Batches(random_tokens(97, 3, 20)), check)
    assert arrays_equal(walked, decoder)


@pytest.mark.parametrize("name", ["gemma2", "bloom", "gpt_neox"])
def test_walk_that_slices_returns_the_sliced_model(tmp_path: Path, name: str) -> None:
    """With norms after the sublayers, attention windows and ALiBi slopes."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder
    walked = walked_model(decoder, Batches(random_tokens(97, 2, 20)), slice_sublayer)
    sliced = slicing.slice_groups(decoder, {kind: [rows] * 3 for kind, rows in KEPT.items()})
    assert arrays_equal(walked, sliced)
    tokens = random_tokens(97, 2, 30)
    np.testing.assert_array_equal(logits_of(walked, tokens), logits_of(sliced, tokens))


def test_moments_do_not_depend_on_batches() -> None:
    decoder, batches = small_decoder(), Batches(random_tokens(61, 7, 9))
    assert (len(batches), len(batches.resized(18))) == (1, 4)
    expected = collect_moments(decoder, batches)
    for site, moments in collect_moments(decoder, batches.resized(18)).items():
        for moment, value in zip(about_zero(moments), about_zero(expected[site]), strict=True):
            np.testing.assert_allclose(moment, value, atol=1e-6 * np.abs(value).max())


def about_zero(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Aᵀ A and Aᵀ gap, whatever the first batch is."""
    sums = HostMoments([np.asarray(moment) for moment in moments], 7 * 9, biased=False)
    return sums.gram(slice(None)), sums.cross()


def test_moments_keep_the_digits_of_small_deviations_from_large_means() -> None:
    """Means a thousand times the deviation: squares about zero would lose six of seven digits of a float32."""
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(size=(4, 64, 8))).astype(np.float32)
    y = (x[..., :3] - 1000).astype(np.float32)
    batches = [(jnp.asarray(x[i : i + 1]), jnp.asarray(y[i : i + 1])) for i in range(4)]
    gram, inputs, cross, targets, *_ = (
        np.asarray(m, np.float64) for m in sums_about_means(lambda *b: b, batches, None)
    )
    covariance = gram - np.outer(inputs / 256, inputs)
    exact, exact_y = x.reshape(256, 8).astype(np.float64), y.reshape(256, 3).astype(np.float64)
    exact -= exact.mean(axis=0)
    np.testing.assert_allclose(covariance, exact.T @ exact, atol=1e-4 * np.abs(covariance).max())
    np.testing.assert_allclose(
        cross - np.outer(inputs / 256, targets), exact.T @ exact_y, atol=1e-4 * np.abs(cross).max()
    )


# -------------------------------------------------------------------------------------------------- compilations


@contextmanager
def compiled_programs() -> Iterator[list[str]]:
    """The names of the programs that XLA compiles inside the block, starting from empty caches."""
    programs: list[str] = []

    def listen(event: str, seconds: float, *, fun_name: str = "", **_: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(fun_name)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def programs_of_walk(layers: int, kinds_with_moments: tuple[str, ...] = ()) -> list[str]:
    """The programs compiled by a walk that collects the moments of the given kinds only, sorted."""
    decoder, batches = small_decoder(layers=layers), Batches(random_tokens(61, 5, 11))

    def replace(site: Site) -> Block:
        if site.kind in kinds_with_moments:
            site.moments()
        return slice_sublayer(site)

    with compiled_programs() as programs:
        walk(decoder, batches, replace)
    assert programs, "the listener hears of compilations"
    return sorted(programs)


def test_equal_layers_share_their_compiled_programs() -> None:
    """Every kind whose moments are collected needs compiled programs more, once for all layers."""
    without = programs_of_walk(1)
    heads, both = (programs_of_walk(layers, kinds) for layers, kinds in ((1, ("head",)), (1, ("head", "channel"))))
    assert len(without) < len(heads) < len(both)
    assert programs_of_walk(3, ("head", "channel")) == both


def test_walk_reports_every_sublayer() -> None:
    steps = []
    decoder, batches = small_decoder(layers=5), Batches(random_tokens(61, 5, 11))
    walk(decoder, batches, slice_sublayer, lambda done, total: steps.append((done, total)))
    assert steps == [(done, 10) for done in range(1, 11)]


def in_bfloat16(decoder: Decoder) -> Decoder:
    return jax.tree.map(lambda array: array.astype(jnp.bfloat16), decoder)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_products_of_a_bfloat16_stream_take_bfloat16_and_add_in_float32(kind: str) -> None:
    decoder = in_bfloat16(small_decoder(layers=1))
    settings = {"kind": kind, "config": decoder.config, "mesh": None, "angles": rotary_angles(decoder, 9)}
    lowered = advance.lower(decoder.runs[0], State(jnp.zeros((2, 9, 16))), narrow=True, **settings)
    products = [line.rsplit(" : ", 1)[1] for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) == {"head": 6, "channel": 3}[kind]
    for product in products:
        operands, result = product.split("->")
        assert operands.count("xbf16>") == 2
        assert "xf32>" in result
    assert {array.dtype for array in jax.tree.leaves(lowered.out_info)} == {jnp.dtype(jnp.float32)}


def test_a_bfloat16_model_has_a_bfloat16_dense_stream_and_float32_gram_matrices() -> None:
    """The upcast model has the same Gram matrix to the bit before anything is pruned; the gap is rounded."""
    half = in_bfloat16(small_decoder(layers=1))
    batches = Batches(random_tokens(61, 5, 9))
    upcast = jax.tree.map(lambda array: array.astype(jnp.float32), half)
    moments, exact = (collect_moments(decoder, batches)[0, "head"] for decoder in (half, upcast))
    assert arrays_equal((moments.gram, moments.inputs, moments.center), (exact.gram, exact.inputs, exact.center))
    difference, scale = np.abs(moments.cross - exact.cross).max(), np.abs(exact.cross).max()
    assert 0 < difference < 0.01 * scale
