"""The factorisation by blocks: equal to LAPACK's at every size, and compiled for a TPU where libtpu is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.stages import Lowered

from minillm_jax.pruning import blocked


def definite(count: int, ridge: float = 0.1) -> np.ndarray:
    """A random positive definite matrix, float64."""
    x = np.random.default_rng(count).normal(size=(count, 2 * count))
    return x @ x.T / count + ridge * np.eye(count)


@pytest.mark.parametrize(("count", "block"), [(1, 4), (4, 4), (5, 4), (23, 4), (24, 8), (130, 128)])
def test_factor_and_solution_are_those_of_lapack(count: int, block: int) -> None:
    matrix, right = definite(count), np.random.default_rng(0).normal(size=(count, 3))
    factor = jax.jit(blocked.factorise, static_argnames="block")(jnp.asarray(matrix, jnp.float32), block=block)
    lower = np.asarray(factor.lower)
    np.testing.assert_allclose(lower[:count, :count], np.linalg.cholesky(matrix), atol=1e-5)
    np.testing.assert_array_equal(lower, np.tril(lower))
    solution = jax.jit(blocked.solve)(factor, jnp.asarray(right, jnp.float32))
    np.testing.assert_allclose(solution, np.linalg.solve(matrix, right), atol=1e-4)


def test_an_indefinite_matrix_gives_nan() -> None:
    matrix = definite(20)
    matrix[13, 13] = -1
    factor = blocked.factorise(jnp.asarray(matrix, jnp.float32), 8)
    assert np.isnan(np.asarray(blocked.solve(factor, jnp.ones((20, 2))))).any()


@pytest.mark.parametrize("refine", [False, True])
def test_solutions_on_a_device_are_those_of_lapack(refine: bool) -> None:
    matrix, right = definite(60, 1e-3), np.ones((60, 2))
    arrays = (jnp.asarray(array, jnp.float32) for array in (matrix, right))
    found = jax.jit(blocked.solve_on_device, static_argnames="refine")(*arrays, refine=refine)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right), rtol=1e-3)


def test_the_program_has_one_size_whatever_the_number_of_rows() -> None:
    def lowered(count: int) -> Lowered:
        return jax.jit(blocked.factorise).lower(jax.ShapeDtypeStruct((count, count), jnp.float32))

    few, many = (lowered(count).as_text().count("\n") for count in (512, 8192))
    assert many == few


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for a TPU with the package libtpu")
def test_programs_of_the_default_recipe_compile_for_a_tpu() -> None:
    """A forward loss on four chips, a system, exact gradients, in a process that begins with the chips' settings."""
    chips = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    chips |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-m", "tests.devices.tpu_child"]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | chips
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["all-reduce"] > 0  # the sums over `model`
    assert found["whiles"] >= 3  # the loops of the factorisation and of both solutions
    assert found["gradients / weights"] < 3.1  # bfloat16 weights and float32 sums
