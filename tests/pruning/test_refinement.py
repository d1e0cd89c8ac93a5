"""Iterative refinement: the device's rows have the digits of float64."""

from dataclasses import replace

import numpy as np
import pytest

from minillm_jax.pruning.solver import DeviceFit, Groups, HostFit, Problem, Solver
from tests.pruning.problems import problem, sums

KEPT = np.arange(40) % 4 != 1


def hard(biased: bool, spread: float) -> Problem:
    """A problem whose inputs lie near to few directions, far from zero: the condition number is about 1 / spread²."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2000, 8)) @ random.normal(size=(8, 40)) + spread * random.normal(size=(2000, 40)) + 2.0
    target = x @ random.normal(size=(40, 5)) + 0.1 * random.normal(size=(2000, 5))
    total = sums(x, target, x[:50].mean(0), target[:50].mean(0))
    kernel = random.normal(size=(40, 5)).astype(np.float32)
    return Problem(total, None, kernel, Groups(40), (2000, 0), 0.5, 1e-8, biased, "mlp.down of layer 3")


@pytest.mark.parametrize("biased", [False, True])
def test_rows_of_an_ill_conditioned_system_are_those_of_float64(biased: bool) -> None:
    given = replace(hard(biased, 1e-2), ridge=1e-5)
    expected, found = HostFit(given, Solver()).refit(KEPT), DeviceFit(given).refit(KEPT)
    scale = np.abs(expected.kernel).max()
    np.testing.assert_allclose(found.kernel, expected.kernel, atol=1e-7 * scale)
    if biased:
        np.testing.assert_allclose(found.shift, expected.shift, atol=1e-6 * scale)


def test_rows_are_those_of_the_host_rounded() -> None:
    """Bit for bit but for a few: then the weights are the same in bfloat16, and all later layers see the same."""
    given = problem(groups=Groups(64), inputs=64, outputs=32)
    expected, found = (fit.refit(np.arange(64) % 3 > 0) for fit in (HostFit(given, Solver()), DeviceFit(given)))
    equal = np.asarray(found.kernel) == expected.kernel.astype(np.float32)
    assert equal.mean() > 0.99


def test_a_system_that_float32_cannot_factorise_is_not_sound() -> None:
    given = hard(False, 1e-5)
    with pytest.raises(np.linalg.LinAlgError, match="more precision than float32 has"):
        DeviceFit(given).refit(KEPT)
