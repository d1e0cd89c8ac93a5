"""Solutions on the host and on the device are the same; what happens where there is none."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.tree import named_arrays
from minillm_jax.pruning import device_system, solve, tiled
from minillm_jax.pruning.float64 import Pair
from minillm_jax.pruning.refit import slice_and_refit
from minillm_jax.pruning.solver import DeviceFit, Fit, Groups, HostFit, Problem, Solver
from minillm_jax.settings import Refit
from tests.helpers import small_decoder
from tests.pruning.problems import assert_close, problem
from tests.pruning.test_refit import BATCHES, kept_in

ALL_KEPT = np.ones(12, bool)


def both(given: Problem) -> tuple[Fit, Fit]:
    """The solutions on the host and on the device."""
    return HostFit(given, Solver()), DeviceFit(given)


@pytest.mark.parametrize("ridge", [None, 0.05])
@pytest.mark.parametrize("biased", [False, True])
def test_the_device_orders_chooses_and_refits_as_the_host(biased: bool, ridge: float | None) -> None:
    for groups in (Groups(12), Groups(4), Groups(4, 2)):
        host, device = both(problem(biased, ridge, groups))
        keep = groups.count // 2
        orders = [fit.order(keep) for fit in (host, device)]
        np.testing.assert_array_equal(orders[0].groups, orders[1].groups)
        np.testing.assert_allclose(orders[0].errors, orders[1].errors, rtol=1e-3)
        (kept, rows), (same, found) = (fit.choose_and_refit(keep) for fit in (host, device))
        np.testing.assert_array_equal(kept, same)
        assert kept.sum() == keep
        np.testing.assert_array_equal(np.flatnonzero(~kept), np.sort(orders[0].groups))
        assert_close(found, rows)
        assert_close(device.refit(kept), host.refit(kept))
        assert_close(device.refit(kept, least_squares=False), host.refit(kept, least_squares=False))
        assert (rows.shift is None) == (not biased)


def test_a_matrix_of_several_tiles_is_solved_as_on_the_host() -> None:
    rows = tiled.TILE + 26
    host, device = both(problem(groups=Groups(rows), inputs=rows, per_input=2))
    (kept, expected), (same, found) = (fit.choose_and_refit(tiled.TILE) for fit in (host, device))
    np.testing.assert_array_equal(kept, same)
    assert_close(found, expected)


def test_programs_of_the_device_hold_few_matrices_beside_their_arguments() -> None:
    """In matrices of the system: the products of the weights, or the tiles above the diagonal and some columns."""
    inputs = 10 * tiled.TILE
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    sums = (shape((inputs, inputs)), *map(shape, ((inputs,), (inputs, 64), (64,), (inputs,), (64,))))
    kernel, one, kept = shape((inputs, 64)), Pair(shape(()), shape(())), jax.ShapeDtypeStruct((inputs,), jnp.bool_)
    arguments = sums[0], sums[1:], sums, kernel, device_system.Numbers(one, one, one)
    made = jax.eval_shape(partial(device_system.system, biased=True), *arguments)
    programs = {
        "system": device_system.system.lower(*arguments, biased=True),
        "order": device_system.order.lower(
            made.matrix, made.right, jax.ShapeDtypeStruct((), jnp.int32), count=inputs, parts=1
        ),
        "solutions": device_system.solutions.lower(made, kept, shape((7,))),
        "refit": device_system.refit.lower(sums, kernel, arguments[-1], kept, biased=True),
    }
    held = {name: program.compile().memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    matrices = {name: count / (4 * inputs**2) for name, count in held.items()}
    most = {"system": 0.15, "order": 1.2, "solutions": 0.75, "refit": 0.75}
    assert all(matrices[name] < bound for name, bound in most.items()), matrices


def test_the_device_chooses_the_ridge_of_the_host() -> None:
    """Noise and few tokens ask for a larger one; both are those of the host."""
    given, ridges = problem(), []
    for share in (1.0, 3000.0):
        noisy = replace(given, total=noise(given.total, share), held_out=given.held_out)
        fit = HostFit(noisy, Solver())
        assert fit.system.held_out is not None
        best = fit.system.held_out.best(np.arange(6))
        found = DeviceFit(noisy).best_share(jnp.arange(12) < 6)
        assert float(found.high) == pytest.approx(best)
        ridges.append(best)
    assert ridges[0] < ridges[1]


def noise(moments: tuple[np.ndarray, ...], share: float) -> tuple[np.ndarray, ...]:
    """The moments with other products of inputs and target."""
    more = share * np.random.default_rng(1).normal(size=moments[2].shape).astype(np.float32)
    return (*moments[:2], moments[2] + more, *moments[3:])


def test_no_groups_are_kept() -> None:
    for fit in both(problem(biased=True)):
        rows = fit.refit(~ALL_KEPT)
        assert not np.asarray(rows.kernel).any()


# -------------------------------------------------------------------------------------------------------- failures

INDEFINITE = np.diag([-1e-3, 1.0, 2.0, 3.0, 4.0])


def test_a_matrix_that_is_not_definite_is_not_solved() -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    for function in (lambda matrix: solve.solve(matrix, np.ones((5, 2))), solve.inverse):
        with pytest.raises(np.linalg.LinAlgError):
            function(vectors @ INDEFINITE @ vectors.T)


def test_inverse_of_a_definite_matrix() -> None:
    vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    inverse = solve.inverse(vectors @ np.diag([1.0, 2, 3, 4, 5]) @ vectors.T)
    np.testing.assert_allclose(inverse, vectors @ np.diag([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]) @ vectors.T, atol=1e-6)


def short_problem(ridge: float) -> Problem:
    """12 inputs with 5 tokens, so that their Gram matrix is singular."""
    rng = np.random.default_rng(0)
    x, target, kernel = 100 * rng.normal(size=(5, 12)), rng.normal(size=(5, 4)), rng.normal(size=(12, 4))
    moments = (x.T @ x, x.sum(0), x.T @ target, target.sum(0), np.zeros(12), np.zeros(4))
    return Problem(moments, None, kernel, Groups(12), (5, 0), 0.5, ridge, False, "mlp.down of layer 3")


def test_a_system_that_is_not_definite_gets_a_larger_ridge_and_one_warning() -> None:
    solver = Solver()
    sentence = r"mlp\.down of layer 3: the ridge is raised from 1\.0e-25 to 1\.0e-1\d of the mean diagonal"
    with pytest.warns(InputWarning, match=sentence) as warned:
        kernels = [HostFit(short_problem(1e-25), solver).refit(ALL_KEPT).kernel for _ in range(3)]
    assert len(warned) == 1
    np.testing.assert_allclose(kernels[0], HostFit(short_problem(1e-12), solver).refit(ALL_KEPT).kernel, atol=2e-2)


def broken_problem() -> Problem:
    """A Gram matrix with eigenvalues below zero."""
    given = short_problem(1e-2)
    return replace(given, total=(-given.total[0], *given.total[1:]))


def test_a_system_without_a_solution_is_an_error() -> None:
    with pytest.raises(InputError, match="the refit has no solution at any ridge"):
        HostFit(broken_problem(), Solver()).refit(ALL_KEPT)


def test_moments_that_are_not_finite_are_an_error_on_both() -> None:
    given = short_problem(1e-2)
    given = replace(given, total=(given.total[0] * np.nan, *given.total[1:]))
    with pytest.raises(InputError, match=r"mlp\.down of layer 3 is not finite on the calibration windows"):
        Solver().fit(given).refit(ALL_KEPT)
    with pytest.warns(InputWarning), pytest.raises(InputError, match="is not finite on the calibration windows"):
        Solver("device").fit(given).refit(ALL_KEPT)


def test_a_host_without_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> np.ndarray:
        raise MemoryError

    fit = HostFit(short_problem(1e-2), Solver())
    monkeypatch.setattr(np, "empty", fail)
    with pytest.raises(InputError, match="the host has no memory for a system of 12 x 12 numbers in float64"):
        fit.refit(ALL_KEPT)


@pytest.fixture
def broken_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Makes the pivots of the device fail with a message, or give NaN if the message is None."""

    def break_with(message: str | None) -> None:
        def fail(pivot: jax.Array) -> jax.Array:
            if message is not None:
                raise jax.errors.JaxRuntimeError(message)
            return pivot * jnp.nan

        monkeypatch.setattr(jnp.linalg, "cholesky", fail)
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
        Solver("device").fit(short_problem(1e-2)).refit(ALL_KEPT)
