"""Refit against independent least squares and brute force."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_counts, named_arrays, sizes_of
from minillm_jax.pruning import refit as refitting
from minillm_jax.pruning import removal_order, solve
from minillm_jax.pruning.refit import Refit, can_compensate, prune_by_obs, slice_and_refit
from minillm_jax.pruning.slicing import slice_groups, slice_sizes
from minillm_jax.pruning.walk import Site, projection, walk
from tests.helpers import (
    CONFIGURATIONS,
    arrays_equal,
    hugging_face_folder,
    random_tokens,
    small_decoder,
)
from tests.pruning.test_walk import BIASED, KEPT, halves

WINDOWS = random_tokens(61, 6, 11)


def kept_in(decoder: Decoder) -> dict[str, list[np.ndarray]]:
    return {kind: [rows] * len(group_counts(decoder, kind)) for kind, rows in KEPT.items()}


def feature_rows(kind: str, features: int) -> np.ndarray:
    """The kept input features of an output projection of `small_decoder`."""
    count = {"head": 4, "channel": 12}[kind]
    return np.arange(features).reshape(count, -1)[KEPT[kind]].ravel()


def of_layer(decoder: Decoder, layer: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [I, D] and bias of an output projection."""
    linear_map = projection(decoder.runs[0], kind)
    kernel = np.asarray(linear_map.kernel, np.float64)[layer]
    kernel = kernel.reshape(-1, kernel.shape[-1])
    return kernel, np.zeros(1) if linear_map.bias is None else np.asarray(linear_map.bias, np.float64)[layer]


# ------------------------------------------------------------------------------------------------- least squares


@pytest.mark.parametrize(("alpha", "biased"), [(0.0, False), (0.5, False), (0.5, True)])
def test_refit_is_the_least_squares_solution_on_collected_activations(alpha: float, biased: bool) -> None:
    """Grouped-query attention, every layer: rows for the ridge below, a column of ones for the bias."""
    decoder, ridge = small_decoder(**(BIASED if biased else {})), 0.02
    refitted = slice_and_refit(decoder, kept_in(decoder), WINDOWS, Refit(alpha=alpha, ridge=ridge, inner=0.0))
    for (layer, kind), collected in halves(decoder, refitted, WINDOWS).items():
        a, before, after = (x.astype(np.float64) for x in collected)
        old, bias = of_layer(decoder, layer, kind)
        rows = feature_rows(kind, len(old))
        weight = np.sqrt(ridge * np.square(a - a.mean(axis=0) * biased).sum() / len(old))
        target = (1 - alpha) * a @ old + alpha * (after - before - bias)
        left = np.concatenate([a[:, rows], np.full((len(a), 1), float(biased))], axis=1)
        left = np.concatenate([left, weight * np.eye(len(rows), len(rows) + 1)])
        solution = np.linalg.lstsq(left, np.concatenate([target, weight * old[rows]]), rcond=None)[0]
        kernel, shifted = of_layer(refitted, layer, kind)
        np.testing.assert_allclose(kernel, solution[:-1], atol=1e-4 * np.abs(solution).max())
        if biased:
            np.testing.assert_allclose(shifted - bias, solution[-1], atol=1e-4 * np.abs(solution).max())


def test_what_removes_nothing_changes_nothing() -> None:
    decoder = small_decoder(**BIASED)
    everything = {kind: [np.arange(n) for n in group_counts(decoder, kind)] for kind in axis_table.KINDS}
    assert arrays_equal(slice_and_refit(decoder, everything, WINDOWS), decoder)
    counts = {kind: group_counts(decoder, kind) for kind in axis_table.KINDS}
    pruned, kept = prune_by_obs(decoder, counts, WINDOWS)
    assert arrays_equal(pruned, decoder)
    assert [len(rows) for rows in kept["head"]] == counts["head"]


@pytest.mark.parametrize("settings", [Refit(), Refit("bias"), Refit("none")])
def test_removing_groups_of_zeros_changes_nothing(settings: Refit) -> None:
    """And structured OBS finds them."""
    decoder = small_decoder(**BIASED)
    for kind in axis_table.KINDS:
        kernel = projection(decoder.runs[0], kind).kernel
        old = np.asarray(kernel)
        stays = np.isin(np.arange(old[0].size // 16), feature_rows(kind, old[0].size // 16))
        kernel.set_value(jnp.asarray(old * stays.reshape(old.shape[1:-1])[None, ..., None]))
    refitted = slice_and_refit(decoder, kept_in(decoder), WINDOWS, settings)
    assert sizes_of(refitted) == slice_sizes(sizes_of(decoder), kept_in(decoder))
    np.testing.assert_allclose(hidden(refitted, WINDOWS), hidden(decoder, WINDOWS), atol=1e-5)
    counts = {kind: [len(rows)] * 3 for kind, rows in KEPT.items()}
    pruned, kept = prune_by_obs(decoder, counts, WINDOWS, settings)
    assert all((rows == KEPT[kind]).all() for kind in axis_table.KINDS for rows in kept[kind])
    np.testing.assert_allclose(hidden(pruned, WINDOWS), hidden(decoder, WINDOWS), atol=1e-5)


def hidden(decoder: Decoder, windows: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(final_hidden)(decoder, jnp.asarray(windows)), np.float32)


@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        "opt, projected, post norm",
        "bloom, residual from norm",
        "gpt_neox",
    ],
)
def test_refitted_models_of_every_kind_of_family_are_nearer_to_the_dense_one(tmp_path: Path, name: str) -> None:
    """Unequal layers, one of them untouched; each projection's target is met better than by its old rows."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder
    kept = kept_in(decoder)
    kept["channel"][1] = np.arange(20)
    kept["head"][2] = np.arange(group_counts(decoder, "head")[2])
    windows = random_tokens(97, 8, 20)
    refitted, sliced = slice_and_refit(decoder, kept, windows), slice_groups(decoder, kept)
    assert sizes_of(refitted) == sizes_of(sliced)
    assert {path: a.shape for path, a in named_arrays(refitted)} == {p: a.shape for p, a in named_arrays(sliced)}
    errors = [np.square(hidden(model, windows) - hidden(decoder, windows)).mean() for model in (refitted, sliced)]
    assert errors[0] < 0.8 * errors[1]


def test_each_projection_comes_nearer_to_its_target() -> None:
    decoder, settings = small_decoder(**BIASED), Refit().resolve(small_decoder(**BIASED).config)

    def shrink(site: Site) -> Block:
        fit, old_bias = refitting.fit_of(site, settings), of_run(site.run, site.kind)[1]
        smaller = refitting._shrink(site, site.kind, KEPT[site.kind], settings)
        kernel, bias = of_run(smaller, site.kind)
        rows = feature_rows(site.kind, len(fit.kernel))
        hessian, right = fit.hessian[np.ix_(rows, rows)], fit.right[rows]

        def error(kernel: np.ndarray) -> float:  # but for a constant
            return float(np.sum(kernel * (hessian @ kernel)) - 2 * np.sum(kernel * right))

        assert error(kernel) < error(fit.kernel[rows])
        assert fit.mean is not None
        np.testing.assert_allclose(fit.mean[rows] @ kernel + bias - old_bias, fit.target, atol=1e-5)
        return smaller

    walk(decoder, WINDOWS, shrink)


def of_run(run: Block, kind: str) -> tuple[np.ndarray, np.ndarray]:
    linear_map = projection(run, kind)
    kernel = np.asarray(linear_map.kernel, np.float64)[0]
    assert linear_map.bias is not None
    return kernel.reshape(-1, kernel.shape[-1]), np.asarray(linear_map.bias, np.float64)[0]


def test_bias_compensation_keeps_the_mean_output_of_every_projection() -> None:
    decoder = small_decoder(**BIASED)
    refitted = slice_and_refit(decoder, kept_in(decoder), WINDOWS, Refit("bias"))
    for (layer, kind), (a, _, _) in halves(decoder, refitted, WINDOWS).items():
        old, bias = of_layer(decoder, layer, kind)
        kernel, shifted = of_layer(refitted, layer, kind)
        rows = feature_rows(kind, len(old))
        np.testing.assert_array_equal(kernel, old[rows])
        np.testing.assert_allclose((a[:, rows] @ kernel + shifted).mean(0), (a @ old + bias).mean(0), atol=1e-5)


def test_features_that_are_never_used_keep_their_rows() -> None:
    """Channels whose inputs are zero: their diagonal of the Gram matrix is zero but for the ridge."""
    decoder = small_decoder()
    dead = np.array([1, 5])
    up = decoder.runs[0].mlp.up.kernel
    up.set_value(up[...].at[:, :, dead].set(0.0))
    refitted = slice_and_refit(decoder, kept_in(decoder), WINDOWS)
    places = np.flatnonzero(np.isin(KEPT["channel"], dead))
    for layer in range(3):
        kernel, old = of_layer(refitted, layer, "channel")[0], of_layer(decoder, layer, "channel")[0]
        np.testing.assert_allclose(kernel[places], old[dead], rtol=1e-6)
    up.set_value(jnp.zeros_like(up[...]))
    silent = slice_and_refit(decoder, kept_in(decoder), WINDOWS, Refit(alpha=0.0))
    np.testing.assert_allclose(of_layer(silent, 0, "channel")[0], of_layer(decoder, 0, "channel")[0][KEPT["channel"]])


def test_half_precision_weights_stay_what_they_are() -> None:
    def half(decoder: Decoder) -> Decoder:
        return jax.tree.map(lambda array: array.astype(jnp.bfloat16), decoder)

    decoder = half(small_decoder(**BIASED))
    refitted = slice_and_refit(decoder, kept_in(decoder), WINDOWS)
    assert {array.dtype for _, array in named_arrays(refitted)} == {jnp.dtype(jnp.bfloat16)}
    whole = jax.tree.map(lambda array: array.astype(jnp.float32), decoder)
    expected = slice_and_refit(whole, kept_in(whole), WINDOWS)
    np.testing.assert_array_equal(of_layer(half(expected), 0, "head")[0], of_layer(refitted, 0, "head")[0])
    errors = [
        hidden(model, WINDOWS) - hidden(decoder, WINDOWS)
        for model in (refitted, slice_groups(decoder, kept_in(decoder)))
    ]
    assert np.square(errors[0]).mean() < 0.8 * np.square(errors[1]).mean()


# -------------------------------------------------------------------------------------------------- the solvers


def test_device_and_host_agree() -> None:
    decoder = small_decoder(**BIASED)
    host, device = (slice_and_refit(decoder, kept_in(decoder), WINDOWS, Refit(solver=s)) for s in solve.SOLVERS)
    for (path, left), (_, right) in zip(named_arrays(host), named_arrays(device), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4 * float(jnp.abs(left).max()), err_msg=path)


@pytest.mark.parametrize("solver", solve.SOLVERS)
def test_what_rounding_made_indefinite_is_solved_with_the_ridge_as_least_eigenvalue(solver: str) -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    right = np.arange(10.0).reshape(5, 2)
    found = solve.solve(vectors @ np.diag([-1e-3, 1.0, 2.0, 3.0, 4.0]) @ vectors.T, right, 0.5, solver)
    np.testing.assert_allclose(found, vectors @ np.diag([2.0, 1, 1 / 2, 1 / 3, 1 / 4]) @ vectors.T @ right)


# ------------------------------------------------------------------------------------------------ structured OBS


def updated(inverse: np.ndarray, weights: np.ndarray, gone: np.ndarray, count: int) -> np.ndarray:
    """The rows of W that stay after the update of OBS for one group after the other, in that order."""
    inverse, weights, all_rows = inverse.copy(), weights.copy(), np.arange(len(weights)).reshape(count, -1)
    for group in gone:
        rows = all_rows[group]
        step = np.linalg.solve(inverse[np.ix_(rows, rows)], np.hstack([weights[rows], inverse[rows]]))
        weights -= inverse[:, rows] @ step[:, : weights.shape[1]]
        inverse -= inverse[:, rows] @ step[:, weights.shape[1] :]
        inverse[rows] = inverse[:, rows] = 0.0
        inverse[rows, rows] = 1.0
    return weights[np.delete(all_rows, gone, axis=0).ravel()]


@pytest.mark.parametrize("solver", solve.SOLVERS)
@pytest.mark.parametrize("gathered", [128, 3])
@pytest.mark.parametrize("width", [1, 3])
def test_greedy_removal_equals_brute_force(width: int, gathered: int, solver: str) -> None:
    """Errors, order and weights: every candidate is tried by solving for what would be left."""
    rng = np.random.default_rng(width)
    count, size = 8, 8 * width
    a, weights = rng.normal(size=(60, size)) @ rng.normal(size=(size, size)), rng.normal(size=(size, 4))
    hessian = a.T @ a + 0.1 * np.eye(size)
    inverse, products = np.linalg.inv(hessian), weights @ weights.T

    def best(stay: list[int]) -> tuple[float, np.ndarray]:
        rows = np.arange(size).reshape(count, width)[stay].ravel()
        left = np.linalg.solve(hessian[np.ix_(rows, rows)], hessian[rows] @ weights)
        delta = weights.copy()
        delta[rows] -= left
        return float(np.trace(delta.T @ hessian @ delta)), left

    def blocks(matrix: np.ndarray) -> np.ndarray:
        return np.stack([matrix[i : i + width, i : i + width] for i in range(0, size, width)])

    alone = [best([g for g in range(count) if g != gone])[0] for gone in range(count)]
    np.testing.assert_allclose(removal_order.removal_errors(blocks(inverse), blocks(products)), alone)
    stay, order = list(range(count)), []
    for keep in range(count - 1, 0, -1):
        order.append(min(stay, key=lambda gone, stay=stay: best([g for g in stay if g != gone])[0]))
        stay.remove(order[-1])
        if solver == "host" or keep == 1:
            found = removal_order.greedy_removal(inverse.copy(), products.copy(), count, keep, 1, solver, gathered)
            assert found.tolist() == order
            np.testing.assert_allclose(updated(inverse, weights, found, count), best(stay)[1], rtol=1e-9, atol=1e-12)


def test_equally_many_groups_go_of_each_part() -> None:
    """Although those of the second part cost nothing."""
    products = np.diag([4.0, 3.0, 2.0, 1.0, 0.4, 0.3, 0.2, 0.1])
    assert removal_order.greedy_removal(np.eye(8), products.copy(), 8, 4).tolist() == [7, 6, 5, 4]
    for solver in solve.SOLVERS:
        assert removal_order.greedy_removal(np.eye(8), products.copy(), 8, 4, 2, solver).tolist() == [7, 6, 3, 2]


def test_what_float32_cannot_order_is_ordered_on_the_host() -> None:
    inverse, products = np.diag([1e-60, 1e-60, 1e-60]), np.diag([3.0, 1.0, 2.0])
    assert removal_order.greedy_removal(inverse, products, 3, 1, 1, "device").tolist() == [1, 2]


@pytest.mark.parametrize("solver", solve.SOLVERS)
def test_inverses_are_symmetric_and_mended_like_other_systems(solver: str) -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    for values, inverses in (
        ([1, 2, 3, 4, 5], [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]),
        ([-1e-3, 1, 2, 4, 5], [2, 1, 1 / 2, 1 / 4, 1 / 5]),
    ):
        found = solve.inverse(vectors @ np.diag(values) @ vectors.T, 0.5, solver)
        np.testing.assert_allclose(found, vectors @ np.diag(inverses) @ vectors.T, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_update_of_obs_is_the_refit_of_what_stays(alpha: float) -> None:
    """With the ridge in H and towards the old weights, OBS from the best full-width weights ends in least squares."""
    decoder, settings = small_decoder(**BIASED), Refit(alpha=alpha, inner=0.0)
    counts = {kind: [len(rows)] * 3 for kind, rows in KEPT.items()}
    pruned, kept = prune_by_obs(decoder, counts, WINDOWS, settings)
    assert group_counts(pruned, "head") == counts["head"]
    assert group_counts(pruned, "channel") == counts["channel"]
    assert arrays_equal(pruned, slice_and_refit(decoder, kept, WINDOWS, settings))

    def check(site: Site) -> Block:
        fit = refitting.fit_of(site, settings.resolve(decoder.config))
        inverse = np.linalg.inv(fit.hessian)
        full = inverse @ fit.right
        if alpha == 0:
            np.testing.assert_allclose(full, fit.kernel, rtol=1e-6, atol=1e-9)
        count = {"head": 4, "channel": 12}[site.kind]
        gone = removal_order.greedy_removal(inverse.copy(), full @ full.T, count, counts[site.kind][0])
        stay = np.delete(np.arange(count), gone)
        assert (stay == kept[site.kind][site.layer]).all()
        rows = np.arange(len(full)).reshape(count, -1)[stay].ravel()
        left = updated(inverse, full, gone, count)
        np.testing.assert_allclose(left, fit.rows(rows, "host"), rtol=1e-6, atol=1e-9)
        return refitting._shrink(site, site.kind, stay, settings.resolve(decoder.config))

    walk(decoder, WINDOWS, check)


def test_obs_on_the_device_chooses_and_refits_as_on_the_host() -> None:
    decoder, counts = small_decoder(**BIASED), {kind: [len(rows)] * 3 for kind, rows in KEPT.items()}
    (host, kept), (device, stayed) = (
        prune_by_obs(decoder, counts, WINDOWS, Refit(solver=solver)) for solver in solve.SOLVERS
    )
    assert {kind: np.asarray(rows).tolist() for kind, rows in kept.items()} == {
        kind: np.asarray(rows).tolist() for kind, rows in stayed.items()
    }
    for (path, left), (_, right) in zip(named_arrays(host), named_arrays(device), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-3 * float(jnp.abs(left).max()), err_msg=path)


# ------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        (Refit("nothing"), {}, "unknown refit 'nothing'"),
        (Refit(solver="moon"), {}, "unknown solver 'moon'"),
        (Refit("bias"), {"output_bias": True}, "use least-squares"),
        (Refit(alpha=1.5), {}, "found 1.5"),
        (Refit(alpha=0.5), {"post_norms": True}, "must be 0 in a model with norms after"),
        (Refit(ridge=0.0), {}, "positive number, found 0"),
        (Refit(inner=1.5), {}, r"inner matrices are turned must lie in \[0, 1\], found 1.5"),
        (Refit("bias", inner=0.5), {"output_bias": True, "mlp_bias": True}, "must be 0 without least squares"),
    ],
)
def test_settings_that_cannot_be_used(settings: Refit, changes: dict[str, bool], sentence: str) -> None:
    decoder = small_decoder(**changes)
    with pytest.raises(InputError, match=sentence):
        slice_and_refit(decoder, kept_in(decoder), WINDOWS, settings)


def test_the_target_goes_half_way_where_the_projection_adds_to_the_stream() -> None:
    for changes, alpha in (({}, 0.5), ({"parallel": True}, 0.5), ({"post_norms": True}, 0.0)):
        assert Refit().resolve(small_decoder(**changes).config).alpha == alpha
    biased = small_decoder(**BIASED).config
    assert Refit("bias").resolve(biased).alpha == 0
    assert can_compensate(biased)


def test_activations_that_are_not_finite() -> None:
    decoder = small_decoder()
    up = decoder.runs[0].mlp.up.kernel
    up.set_value(up[...].at[1].set(jnp.nan))
    with pytest.raises(InputError, match=r"mlp\.down of layer 1 is not finite"):
        slice_and_refit(decoder, kept_in(decoder), WINDOWS)
