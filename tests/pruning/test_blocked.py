"""The inverse by blocks: equal to LAPACK's at every size, and compiled for a TPU where libtpu is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
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
def test_inverse_and_factor_are_those_of_lapack(count: int, block: int) -> None:
    matrix = definite(count)
    inverse, factor = (
        jax.jit(partial(function, block=block))(jnp.asarray(matrix, jnp.float32))
        for function in (blocked.inverse, blocked.inverse_factor)
    )
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), atol=1e-4)
    np.testing.assert_allclose(factor, np.linalg.inv(np.linalg.cholesky(matrix)), atol=1e-4)
    np.testing.assert_array_equal(factor, np.tril(factor))


def test_rows_are_updated_in_several_steps() -> None:
    """Of many rows, as many as `UPDATED` at a time, and the rest."""
    matrix = definite(2 * blocked.UPDATED + 40, 1.0)
    inverse = jax.jit(blocked.inverse)(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(inverse @ matrix, np.eye(len(matrix)), atol=1e-4)


@pytest.mark.parametrize("function", [blocked.inverse, blocked.inverse_factor])
def test_an_indefinite_matrix_gives_nan(function: Callable[..., jax.Array]) -> None:
    matrix = definite(20)
    matrix[13, 13] = -1
    assert np.isnan(np.asarray(function(jnp.asarray(matrix, jnp.float32), 8))).any()


def test_the_program_has_one_size_whatever_the_number_of_rows() -> None:
    def lowered(count: int) -> Lowered:
        return jax.jit(blocked.inverse).lower(jax.ShapeDtypeStruct((count, count), jnp.float32))

    few, many = (lowered(count).as_text().count("\n") for count in (2048, 8192))
    assert many == few


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for a TPU with the package libtpu")
def test_programs_of_the_default_recipe_compile_for_a_tpu() -> None:
    """A forward loss on four chips, systems, exact gradients, in a process that begins with the chips' settings."""
    chips = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    chips |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-m", "tests.devices.tpu_child"]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | chips
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["all-reduce"] > 0  # the sums over `model`
    swept, tiled = found["temporaries / matrix"]
    assert swept < 0.01  # the inverse takes the memory of its argument
    assert tiled < 0.6  # beside it lie the tiles on and above the diagonal
    assert found["gradients / weights"] < 3.1  # bfloat16 weights and float32 sums
    assert found["refit / matrix"] < 1.5  # its tiles, and the slices of a tile of the Gram matrix for float64
