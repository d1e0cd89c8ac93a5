"""The refit against independent least squares, structured OBS against brute force."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from minillm_jax.pruning import removal_order, solve, system
from minillm_jax.pruning.refit import can_compensate, prune_by_obs, prune_site, resolve, slice_and_refit, system_at
from minillm_jax.pruning.slicing import slice_groups, slice_sizes
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
        fit, old_bias = system_at(site, settings), run_kernel_and_bias(site.run, site.kind)[1]
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


INDEFINITE = np.diag([-1e-3, 1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_matrix_that_is_not_definite_is_not_solved(solver: str) -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    for function in (lambda m, s: solve.solve(m, np.ones((5, 2)), s), solve.inverse):
        with pytest.raises(np.linalg.LinAlgError):
            function(vectors @ INDEFINITE @ vectors.T, solver)


def short_system(ridge: float) -> system.System:
    """The system of 12 inputs with 5 tokens, so that its Gram matrix is singular."""
    rng = np.random.default_rng(0)
    x, target, kernel = 100 * rng.normal(size=(5, 12)), rng.normal(size=(5, 4)), rng.normal(size=(12, 4))
    moments = (x.T @ x, x.sum(0), x.T @ target, target.sum(0), np.zeros(12), np.zeros(4))
    return system.system_of(moments, kernel, 5, 0.5, ridge, False, "mlp.down of layer 3")


def test_a_system_that_is_not_definite_gets_a_larger_ridge_and_one_warning() -> None:
    singular, solver, rows = short_system(1e-25), system.Solver(), np.arange(12)
    sentence = r"mlp\.down of layer 3: the ridge is raised from 1\.0e-25 to 1\.0e-1\d of the mean diagonal"
    with pytest.warns(InputWarning, match=sentence) as warned:
        kernels = [solver.run(singular, lambda s, name: s.rows(rows, name)) for _ in range(3)]
    assert len(warned) == 1
    np.testing.assert_allclose(kernels[0], short_system(1e-12).rows(rows, "host"), atol=2e-2)


def test_a_system_without_a_solution_is_an_error() -> None:
    broken = replace(short_system(1e-2), hessian=np.full((12, 12), np.nan))
    with pytest.raises(InputError, match="the refit has no solution at any ridge"):
        system.Solver().run(broken, lambda s, name: s.rows(np.arange(12), name))


@pytest.fixture
def broken_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Makes the solver of the device fail with a message, or give NaN if the message is None."""

    def break_with(message: str | None) -> None:
        def fail(factor: Any, right: jax.Array) -> jax.Array:
            if message is not None:
                raise jax.errors.JaxRuntimeError(message)
            return right * jnp.nan

        monkeypatch.setattr(jax.scipy.linalg, "cho_solve", fail)
        jax.clear_caches()

    yield break_with
    jax.clear_caches()  # the programs that were traced with the broken function


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: out of memory", None])
def test_a_system_that_fails_on_the_device_is_solved_on_the_host(
    broken_device: Callable[[str | None], None], message: str | None
) -> None:
    """For lack of memory; for lack of precision, with NaN as its result."""
    decoder = small_decoder()
    host = slice_and_refit(decoder, kept_in(decoder), BATCHES, Refit(inputs=0.0))
    broken_device(message)
    with pytest.warns(InputWarning, match="layer 0: solved on the host in place of the device") as warned:
        device = slice_and_refit(decoder, kept_in(decoder), BATCHES, Refit(solver="device", inputs=0.0))
    assert len(warned) == 1
    for (path, left), (_, right) in zip(named_arrays(host), named_arrays(device), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4 * float(jnp.abs(left).max()), err_msg=path)


def test_another_failure_of_the_device_is_not_hidden(broken_device: Callable[[str | None], None]) -> None:
    broken_device("INTERNAL: broken")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        system.Solver("device").run(short_system(1e-2), lambda s, name: s.rows(np.arange(12), name))


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


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("gathered", [128, 3])
@pytest.mark.parametrize("width", [1, 3])
def test_greedy_removal_equals_brute_force(width: int, gathered: int, solver: str) -> None:
    """Errors, order and updated weights, against a least-squares solution for every candidate."""
    rng = np.random.default_rng(width)
    count, size = 8, 8 * width
    a, weights = rng.normal(size=(60, size)) @ rng.normal(size=(size, size)), rng.normal(size=(size, 4))
    hessian = a.T @ a + 0.1 * np.eye(size)
    inverse, products = np.linalg.inv(hessian), weights @ weights.T

    def least_squares(kept: list[int]) -> tuple[float, np.ndarray]:
        rows = np.arange(size).reshape(count, width)[kept].ravel()
        solution = np.linalg.solve(hessian[np.ix_(rows, rows)], hessian[rows] @ weights)
        delta = weights.copy()
        delta[rows] -= solution
        return float(np.trace(delta.T @ hessian @ delta)), solution

    def blocks(matrix: np.ndarray) -> np.ndarray:
        return np.stack([matrix[i : i + width, i : i + width] for i in range(0, size, width)])

    errors = [least_squares([g for g in range(count) if g != removed])[0] for removed in range(count)]
    np.testing.assert_allclose(removal_order.removal_errors(blocks(inverse), blocks(products)), errors)
    kept, expected = list(range(count)), []
    for keep in range(count - 1, 0, -1):
        expected.append(min(kept, key=lambda group, kept=kept: least_squares([g for g in kept if g != group])[0]))
        kept.remove(expected[-1])
        if solver == "host" or keep == 1:
            order = removal_order.greedy_removal(inverse.copy(), products.copy(), count, keep, 1, solver, gathered)
            assert order.groups.tolist() == expected
            exact = [
                least_squares(np.delete(np.arange(count), expected[:n]).tolist())[0] for n in range(count - keep + 1)
            ]
            np.testing.assert_allclose(np.cumsum(order.errors), exact[1:], rtol=1e-3)
            solution = least_squares(kept)[1]
            np.testing.assert_allclose(
                obs_update(inverse, weights, order.groups, count), solution, rtol=1e-9, atol=1e-12
            )


def test_every_part_loses_equally_many_groups() -> None:
    """Although all groups of the second part cost less than those of the first."""
    products = np.diag([4.0, 3.0, 2.0, 1.0, 0.4, 0.3, 0.2, 0.1])
    assert removal_order.greedy_removal(np.eye(8), products.copy(), 8, 4).groups.tolist() == [7, 6, 5, 4]
    for solver in SOLVERS:
        assert removal_order.greedy_removal(np.eye(8), products.copy(), 8, 4, 2, solver).groups.tolist() == [7, 6, 3, 2]


def test_an_order_that_takes_more_precision_is_not_guessed() -> None:
    inverse, products = np.diag([1e-60, 1e-60, 1e-60]), np.diag([3.0, 1.0, 2.0])
    with pytest.raises(np.linalg.LinAlgError, match="more precision than float32"):
        removal_order.greedy_removal(inverse, products, 3, 1, 1, "device")
    assert removal_order.greedy_removal(inverse, products, 3, 1, 1, "host").groups.tolist() == [1, 2]
    for broken in (np.nan, -1.0):
        with pytest.raises(np.linalg.LinAlgError, match="more precision than float64"):
            removal_order.greedy_removal(np.diag([1.0, broken, 1.0]), np.diag([3.0, 1.0, 2.0]), 3, 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inverse_of_a_definite_matrix(solver: str) -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    inverse = solve.inverse(vectors @ np.diag([1.0, 2, 3, 4, 5]) @ vectors.T, solver)
    np.testing.assert_allclose(inverse, vectors @ np.diag([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]) @ vectors.T, atol=1e-6)


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
        fit = system_at(site, resolve(settings, decoder.config))
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
        np.testing.assert_allclose(updated, fit.rows(rows, "host"), rtol=1e-6, atol=1e-9)
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
    decoder, names = small_decoder(), ("rows_on_device", "gains_on_device", "order_on_device")
    jax.clear_caches()
    with ExitStack() as stack:
        compiled = [stack.enter_context(compilations(name)) for name in names]
        counts = {"head": [3, 2, 1], "channel": [9, 7, 11]}
        prune_by_obs(decoder, counts, Batches(random_tokens(61, 16, 11)), Refit(inputs=0.0, solver="device"))
    assert [len(programs) for programs in compiled] == [2, 2, 2]


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
