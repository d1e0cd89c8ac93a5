"""Least-squares problems with random inputs, for the tests of the solver."""

import numpy as np

from minillm_jax.pruning.solver import Groups, Problem, Solution


def problem(
    biased: bool = False,
    ridge: float | None = None,
    groups: Groups | None = None,
    inputs: int = 12,
    outputs: int = 8,
    per_input: int = 32,
) -> Problem:
    """A problem whose inputs depend on each other, with a quarter of its tokens held out."""
    rng, tokens = np.random.default_rng(0), per_input * inputs
    held, half = tokens // 4, inputs // 2
    x = 0.5 + rng.normal(size=(tokens, inputs))
    x[:, half:] = x[:, :half] + 0.3 * x[:, half:]
    kernel = rng.normal(size=(inputs, outputs)).astype(np.float32)
    target = x @ kernel + rng.normal(size=(tokens, outputs)) + 0.2
    centers = x[0], target[0]
    total, held_out = (sums(x[rows], target[rows], *centers) for rows in (slice(None), slice(-held, None)))
    groups = groups or Groups(inputs)
    return Problem(total, held_out, kernel, groups, (tokens, held), 0.5, ridge, biased, "mlp.down of layer 3")


def sums(x: np.ndarray, target: np.ndarray, center: np.ndarray, target_center: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of `walk.Moments`, about two centers."""
    about, off = x - center, target - target_center
    parts = about.T @ about, about.sum(0), about.T @ off, off.sum(0), center, target_center
    return tuple(part.astype(np.float32) for part in parts)


def assert_close(found: Solution, expected: Solution) -> None:
    """Checks rows in float32 against rows in float64."""
    np.testing.assert_allclose(found.kernel, expected.kernel, atol=1e-4 * np.abs(expected.kernel).max())
    assert (found.shift is None) == (expected.shift is None)
    if found.shift is not None:
        np.testing.assert_allclose(found.shift, expected.shift, atol=1e-4 * np.abs(expected.kernel).max())
