"""The refit against independent least squares, structured OBS against brute force."""

from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import group_counts, named_arrays, sizes_of
from minillm_jax.pruning import removal_order
from minillm_jax.pruning.refit import can_compensate, fit_at, prune_by_obs, prune_site, resolve, slice_and_refit
from minillm_jax.pruning.slicing import slice_groups, slice_sizes
from minillm_jax.pruning.solver import HostFit, Solver
from minillm_jax.pruning.system import System
from minillm_jax.pruning.walk import Site, projection, walk
from minillm_jax.settings import SOLVERS, Refit
from tests.helpers import (
    CONFIGURATIONS,
    arrays_equal,
    compilations,
    hugging_face_folder,
    quickly,
    random_tokens,
    small_decoder,
)
from tests.pruning.test_walk import BIASED, KEPT, sublayer_activations

WINDOWS = random_tokens(61, 6, 11)
BATCHES = Batches(WINDOWS)


def kept_in(decoder: Decoder) -> dict[str, list[np.ndarray]]:
    return {kind: [rows] * len(group_counts(decoder, kind)) for kind, rows in KEPT.items()}


def feature_rows(kind: str, features: int) -> np.ndarray:
    """The kept input features of an output projection of `small_decoder`."""
    count = {"head": 4, "channel": 12}[kind]
    return np.arange(features).reshape(count, -1)[KEPT[kind]].ravel()


def kernel_and_bias(decoder: Decoder, layer: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [I, D] and bias [D] of an output projection of a decoder; the bias is [0] where there is none."""
    linear_map = projection(decoder.runs[0], kind)
    kernel = np.asarray(linear_map.kernel, np.float64)[layer]
    kernel = kernel.reshape(-1, kernel.shape[-1])
    return kernel, np.zeros(1) if linear_map.bias is None else np.asarray(linear_map.bias, np.float64)[layer]


# ------------------------------------------------------------------------------------------------- least squares


@pytest.mark.parametrize(("alpha", "biased"), [(0.0, False), (0.5, False), (0.5, True)])
def test_refit_is_the_least_squares_solution_on_collected_activations(alpha: float, biased: bool) -> None:
    """With grouped-query attention, in every layer: rows for the ridge, a column of ones for the bias."""
    decoder, ridge = small_decoder(**(BIASED if biased else {})), 0.02
    refitted = slice_and_refit(decoder, kept_in(decoder), BATCHES, Refit(alpha=alpha, ridge=ridge, inputs=0.0))
    for (layer, kind), collected in sublayer_activations(decoder, refitted, WINDOWS).items():
        a, before, after = (x.astype(np.float64) for x in collected)
        old, bias = kernel_and_bias(decoder, layer, kind)
        rows = feature_rows(kind, len(old))
        weight = np.sqrt(ridge * np.square(a - a.mean(axis=0) * biased).sum() / len(old))
        target = (1 - alpha) * a @ old + alpha * (after - before - bias)
        design = np.concatenate([a[:, rows], np.full((len(a), 1), float(biased))], axis=1)
        design = np.concatenate([design, weight * np.eye(len(rows), len(rows) + 1)])
        solution = np.linalg.lstsq(design, np.concatenate([target, weight * old[rows]]), rcond=None)[0]
        kernel, shifted = kernel_and_bias(refitted, layer, kind)
        np.testing.assert_allclose(kernel, solution[:-1], atol=1e-4 * np.abs(solution).max())
        if biased:
            np.testing.assert_allclose(shifted - bias, solution[-1], atol=1e-4 * np.abs(solution).max())


def test_sublayers_that_keep_all_groups_are_unchanged() -> None:
    decoder = small_decoder(**BIASED)
    all_groups = {kind: [np.arange(n) for n in group_counts(decoder, kind)] for kind in axis_table.KINDS}
    assert arrays_equal(slice_and_refit(decoder, all_groups, BATCHES), decoder)
    counts = {kind: group_counts(decoder, kind) for kind in axis_table.KINDS}
    pruned, kept = prune_by_obs(decoder, counts, BATCHES)
    assert arrays_equal(pruned, decoder)
    assert [len(rows) for rows in kept["head"]] == counts["head"]


@pytest.mark.parametrize("settings", [Refit(), Refit("bias"), Refit("none")])
def test_removal_of_groups_of_zeros_keeps_the_outputs(settings: Refit) -> None:
    """With given groups; and with those that structured OBS chooses, which are the groups of zeros."""
    decoder = small_decoder(**BIASED)
    for kind in axis_table.KINDS:
        kernel = projection(decoder.runs[0], kind).kernel
        old = np.asarray(kernel)
        is_kept = np.isin(np.arange(old[0].size // 16), feature_rows(kind, old[0].size // 16))
        kernel.set_value(jnp.asarray(old * is_kept.reshape(old.shape[1:-1])[None, ..., None]))
    refitted = slice_and_refit(decoder, kept_in(decoder), BATCHES, settings)
    assert sizes_of(refitted) == slice_sizes(sizes_of(decoder), kept_in(decoder))
    np.testing.assert_allclose(hidden(refitted, WINDOWS), hidden(decoder, WINDOWS), atol=1e-5)
    counts = {kind: [len(rows)] * 3 for kind, rows in KEPT.items()}
    pruned, kept = prune_by_obs(decoder, counts, BATCHES, settings)
    assert all((rows == KEPT[kind]).all() for kind in axis_table.KINDS for rows in kept[kind])
    np.testing.assert_allclose(hidden(pruned, WINDOWS), hidden(decoder, WINDOWS), atol=1e-5)


def hidden(decoder: Decoder, windows: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(final_hidden)(decoder, jnp.asarray(windows)), np.float32)


@pytest.mark.parametrize(
    "name",
    quickly(
        [
            "gemma2",
            "opt, projected, post norm",
            "bloom, residual from norm",
            "gpt_neox",
            "granite, biases, tied",
            "olmo2",
        ],
        ("gemma2", "gpt_neox", "granite, biases, tied"),
    ),
)
def test_refitted_model_is_nearer_to_the_dense_model_than_the_sliced_model(tmp_path: Path, name: str) -> None:
    """For every kind of family, with layers of unequal size and sublayers that keep all groups."""
    family, changes = CONFIGURATIONS[name]
    decoder = read_model(hugging_face_folder(tmp_path / "model", family, **changes)).decoder
    kept = kept_in(decoder)
    kept["channel"][1] = np.arange(20)
    kept["head"][2] = np.arange(group_counts(decoder, "head")[2])
    windows = random_tokens(97, 8, 20)
    refitted, sliced = slice_and_refit(decoder, kept, Batches(windows)), slice_groups(decoder, kept)
    assert sizes_of(refitted) == sizes_of(sliced)
    assert {path: a.shape for path, a in named_arrays(refitted)} == {p: a.shape for p, a in named_arrays(sliced)}
    errors = [np.square(hidden(model, windows) - hidden(decoder, windows)).mean() for model in (refitted, sliced)]
    assert errors[0] < 0.8 * errors[1]


def test_refitted_projection_is_nearer_to_its_target_than_the_sliced_one() -> None:
    decoder, settings = small_decoder(**BIASED), resolve(Refit(), small_decoder(**BIASED).config)

    def check(site: Site) -> Block:
        fit, old_bias = host_system(site, settings), run_kernel_and_bias(site.run, site.kind)[1]
        smaller = prune_site(site, site.kind, KEPT[site.kind], settings)
        kernel, bias = run_kernel_and_bias(smaller, site.kind)
        rows = feature_rows(site.kind, len(fit.kernel))
        assert not np.delete(kernel, rows, axis=0).any()
        kernel = kernel[rows]
        hessian, right = fit.hessian[np.ix_(rows, rows)], fit.right[rows]

        def error(kernel: np.ndarray) -> float:  # up to a constant
            return float(np.sum(kernel * (hessian @ kernel)) - 2 * np.sum(kernel * right))

        assert error(kernel) < error(fit.kernel[rows])
        assert fit.mean is not None
        np.testing.assert_allclose(fit.mean[rows] @ kernel + bias - old_bias, fit.target, atol=1e-5)
        return smaller

    walk(decoder, BATCHES, check)


def host_system(site: Site, settings: Refit) -> System:
    """The linear system of an output projection, float64."""
    fit = fit_at(site, site.kind, settings, Solver())
    assert isinstance(fit, HostFit)
    return fit.system


def run_kernel_and_bias(run: Block, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel [I, D] and bias [D] of an output projection of a run of one layer."""
    linear_map = projection(run, kind)
    kernel = np.asarray(linear_map.kernel, np.float64)[0]
    assert linear_map.bias is not None
    return kernel.reshape(-1, kernel.shape[-1]), np.asarray(linear_map.bias, np.float64)[0]


def test_refit_by_bias_keeps_the_mean_output_of_every_projection() -> None:
    decoder = small_decoder(**BIASED)
    refitted = slice_and_refit(decoder, kept_in(decoder), BATCHES, Refit("bias"))
    for (layer, kind), (a, _, _) in sublayer_activations(decoder, refitted, WINDOWS).items():
        old, bias = kernel_and_bias(decoder, layer, kind)
        kernel, shifted = kernel_and_bias(refitted, layer, kind)
        rows = feature_rows(kind, len(old))
        np.testing.assert_array_equal(kernel, old[rows])
        np.testing.assert_allclose((a[:, rows] @ kernel + shifted).mean(0), (a @ old + bias).mean(0), atol=1e-5)


def test_channels_with_inputs_of_zero_keep_their_rows() -> None:
    """Their diagonal of the Gram matrix is zero, so that the ridge alone determines their rows."""
    decoder = small_decoder()
    dead = np.array([1, 5])
    up = decoder.runs[0].mlp.up.kernel
    up.set_value(up[...].at[:, :, dead].set(0.0))
    refitted = slice_and_refit(decoder, kept_in(decoder), BATCHES)
    places = np.flatnonzero(np.isin(KEPT["channel"], dead))
    for layer in range(3):
        kernel, old = kernel_and_bias(refitted, layer, "channel")[0], kernel_and_bias(decoder, layer, "channel")[0]
        np.testing.assert_allclose(kernel[places], old[dead], rtol=1e-6)
    up.set_value(jnp.zeros_like(up[...]))
    silent = slice_and_refit(decoder, kept_in(decoder), BATCHES, Refit(alpha=0.0))
    np.testing.assert_allclose(
        kernel_and_bias(silent, 0, "channel")[0], kernel_and_bias(decoder, 0, "channel")[0][KEPT["channel"]]
    )


def test_refit_of_bfloat16_weights_is_that_of_float32_weights_but_for_their_rounding() -> None:
    """The dense stream runs in bfloat16, and the new weights are rounded once; everything else is float32."""

    def rounded(decoder: Decoder) -> Decoder:
        return jax.tree.map(lambda array: array.astype(jnp.bfloat16), decoder)

    decoder = rounded(small_decoder(**BIASED))
    refitted = slice_and_refit(decoder, kept_in(decoder), BATCHES)
    assert {array.dtype for _, array in named_arrays(refitted)} == {jnp.dtype(jnp.bfloat16)}
    same_in_float32 = jax.tree.map(lambda array: array.astype(jnp.float32), decoder)
    expected = slice_and_refit(same_in_float32, kept_in(same_in_float32), BATCHES)
    right, found = (kernel_and_bias(model, 0, "head")[0].astype(np.float32) for model in (expected, refitted))
    assert np.abs(found - right).max() < 2**-8 * np.abs(right).max()
    errors = [
        hidden(model, WINDOWS) - hidden(decoder, WINDOWS)
        for model in (refitted, slice_groups(decoder, kept_in(decoder)))
    ]
    assert np.square(errors[0]).mean() < 0.8 * np.square(errors[1]).mean()


# ----------------------------------------------------------------------------------------------------- solvers


def test_device_and_host_solvers_agree() -> None:
    decoder = small_decoder(**BIASED)
    host, device = (slice_and_refit(decoder, kept_in(decoder), BATCHES, Refit(solver=s)) for s in SOLVERS)
    for (path, left), (_, right) in zip(named_arrays(host), named_arrays(device), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4 * float(jnp.abs(left).max()), err_msg=path)


def test_structured_obs_with_fewer_tokens_than_channels_and_hardly_a_ridge() -> None:
    decoder, counts = small_decoder(), {kind: [len(rows)] * 3 for kind, rows in KEPT.items()}
    with pytest.warns(InputWarning, match="the ridge is raised"):
        pruned, _ = prune_by_obs(decoder, counts, Batches(WINDOWS[:1, :4]), Refit(ridge=1e-300, inputs=0.0))
    assert all(np.isfinite(array).all() for _, array in named_arrays(pruned))


# ------------------------------------------------------------------------------------------------ structured OBS


def obs_update(inverse: np.ndarray, weights: np.ndarray, removed: np.ndarray, count: int) -> np.ndarray:
    """The kept rows of W after the update of OBS for each removed group, in the order of removal."""
    inverse, weights, all_rows = inverse.copy(), weights.copy(), np.arange(len(weights)).reshape(count, -1)
    for group in removed:
        rows = all_rows[group]
        step = np.linalg.solve(inverse[np.ix_(rows, rows)], np.hstack([weights[rows], inverse[rows]]))
        weights -= inverse[:, rows] @ step[:, : weights.shape[1]]
        inverse -= inverse[:, rows] @ step[:, weights.shape[1] :]
        inverse[rows] = inverse[:, rows] = 0.0
        inverse[rows, rows] = 1.0
    return weights[np.delete(all_rows, removed, axis=0).ravel()]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_update_of_obs_equals_the_least_squares_refit(alpha: float) -> None:
    """OBS starts from the least-squares weights before any removal, with the ridge in H."""
    decoder, settings = small_decoder(**BIASED), Refit(alpha=alpha, ridge=0.01, inputs=0.0)
    counts = {kind: [len(rows)] * 3 for kind, rows in KEPT.items()}
    pruned, kept = prune_by_obs(decoder, counts, BATCHES, settings)
    assert group_counts(pruned, "head") == counts["head"]
    assert group_counts(pruned, "channel") == counts["channel"]
    assert arrays_equal(pruned, slice_and_refit(decoder, kept, BATCHES, settings))

    def check(site: Site) -> Block:
        fit = host_system(site, resolve(settings, decoder.config))
        inverse = np.linalg.inv(fit.hessian)
        weights = inverse @ fit.right
        if alpha == 0:
            np.testing.assert_allclose(weights, fit.kernel, rtol=1e-6, atol=1e-9)
        count = {"head": 4, "channel": 12}[site.kind]
        order = removal_order.greedy_removal(inverse.copy(), weights @ weights.T, count, counts[site.kind][0]).groups
        groups = np.delete(np.arange(count), order)
        assert (groups == kept[site.kind][site.layer]).all()
        rows = np.arange(len(weights)).reshape(count, -1)[groups].ravel()
        updated = obs_update(inverse, weights, order, count)
        np.testing.assert_allclose(updated, fit.rows(rows), rtol=1e-6, atol=1e-9)
        return prune_site(site, site.kind, groups, resolve(settings, decoder.config))

    walk(decoder, BATCHES, check)


def test_layers_with_other_numbers_of_kept_groups_share_the_programs_of_the_walk() -> None:
    """The dense and the pruned streams too: one program a sublayer, whatever the layers keep."""
    decoder = small_decoder()
    jax.clear_caches()  # two sizes of batches: the held-out window is one
    with compilations("advance") as advanced, compilations("add_pair") as added, compilations("take") as taken:
        prune_by_obs(decoder, {"head": [3, 2, 1], "channel": [9, 7, 11]}, BATCHES)
    assert (len(advanced), len(added), len(taken)) == (4, 6, 0)


def test_layers_with_other_numbers_of_kept_groups_share_the_programs_of_the_device() -> None:
    """The solver has one program for the heads and one for the channels."""
    decoder, names = small_decoder(), ("system", "order", "solutions", "best_share", "refit")
    jax.clear_caches()
    with ExitStack() as stack:
        compiled = [stack.enter_context(compilations(name)) for name in names]
        counts = {"head": [3, 2, 1], "channel": [9, 7, 11]}
        prune_by_obs(decoder, counts, Batches(random_tokens(61, 16, 11)), Refit(inputs=0.0, solver="device"))
    assert [len(programs) for programs in compiled] == [
        4,
        2,
        2,
        2,
        2,
    ]  # systems of some windows, and of all the others without them


def test_a_device_solves_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_decoder().config
    assert resolve(Refit(), config).solver == "host"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert resolve(Refit(), config).solver == "device"
    assert resolve(Refit(solver="host"), config).solver == "host"


def test_obs_on_the_device_chooses_and_refits_as_on_the_host() -> None:
    decoder, counts = small_decoder(**BIASED), {kind: [len(rows)] * 3 for kind, rows in KEPT.items()}
    (host, kept_on_host), (device, kept_on_device) = (
        prune_by_obs(decoder, counts, BATCHES, Refit(solver=solver)) for solver in SOLVERS
    )
    assert {kind: np.asarray(rows).tolist() for kind, rows in kept_on_host.items()} == {
        kind: np.asarray(rows).tolist() for kind, rows in kept_on_device.items()
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
        (Refit(inputs=1.5), {}, r"--refit-inputs must lie in \[0, 1\], found 1.5"),
        (Refit("bias", inputs=0.5), {"output_bias": True, "mlp_bias": True}, "must be 0 without least squares"),
    ],
)
def test_settings_outside_their_range_are_errors(settings: Refit, changes: dict[str, bool], sentence: str) -> None:
    decoder = small_decoder(**changes)
    with pytest.raises(InputError, match=sentence):
        slice_and_refit(decoder, kept_in(decoder), BATCHES, settings)


def test_alpha_is_a_half_by_default_and_0_for_norms_after_the_projection() -> None:
    for changes, alpha in (({}, 0.5), ({"parallel": True}, 0.5), ({"post_norms": True}, 0.0)):
        assert resolve(Refit(), small_decoder(**changes).config).alpha == alpha
    biased = small_decoder(**BIASED).config
    assert resolve(Refit("bias"), biased).alpha == 0
    assert can_compensate(biased)


def test_activations_that_are_not_finite_are_an_error() -> None:
    decoder = small_decoder()
    up = decoder.runs[0].mlp.up.kernel
    up.set_value(up[...].at[1].set(jnp.nan))
    with pytest.raises(InputError, match=r"mlp\.down of layer 1 is not finite"):
        slice_and_refit(decoder, kept_in(decoder), BATCHES)
