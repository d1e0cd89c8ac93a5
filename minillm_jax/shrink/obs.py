"""Structured OBS: groups of input features go one after the other, and the rest takes over what it can.

The error of a linear map with weights W on inputs of second moments H is a quadratic, tr(ΔᵀHΔ). Removing the rows S of
a group costs at least tr(W_Sᵀ (H⁻¹_SS)⁻¹ W_S), reached by W ← W − H⁻¹_:S (H⁻¹_SS)⁻¹ W_S; what is left then has the
inverse H⁻¹ − H⁻¹_:S (H⁻¹_SS)⁻¹ H⁻¹_S: (Hassibi and Stork, 1993; in groups: Kurtic et al., ZipLM, arXiv 2302.04089).
"""

import numpy as np
from jaxtyping import Bool, Float, Int


def greedy_removal(
    inverse: Float[np.ndarray, "I I"], weights: Float[np.ndarray, "I D"], count: int, keep: int
) -> tuple[Int[np.ndarray, " keep"], Float[np.ndarray, "rest D"]]:
    """The group of least error goes, again and again, until `keep` are left; of equal ones that of the lower index.

    Every group that goes takes time I² + I · D, in float64.

    Args:
      inverse: H⁻¹, symmetric and positive definite.
      weights: W, the best there is at full width.
      count: number of groups, each of equally many neighbouring rows of W.
      keep: how many groups stay.

    Returns:
      The groups that stay, ascending, and their rows of W: the best there is without the others.
    """
    width = len(weights) // count
    inverse, weights = np.array(inverse, dtype=np.float64), np.array(weights, dtype=np.float64)
    stay = np.ones(count, dtype=bool)
    for _ in range(count - keep):
        group = int(np.argmin(np.where(stay, removal_errors(inverse, weights, stay), np.inf)))
        _remove(inverse, weights, slice(group * width, (group + 1) * width))
        stay[group] = False
    return np.flatnonzero(stay), weights[np.repeat(stay, width)]


def removal_errors(
    inverse: Float[np.ndarray, "I I"], weights: Float[np.ndarray, "I D"], stay: Bool[np.ndarray, " count"]
) -> Float[np.ndarray, " count"]:
    """tr(W_Sᵀ (H⁻¹_SS)⁻¹ W_S) of every group that is still there; of the others 0."""
    count, width = len(stay), len(weights) // len(stay)
    if width == 1:
        return np.sum(np.square(weights), axis=1) / np.where(stay, np.diagonal(inverse), 1.0)
    groups = np.arange(count)
    blocks = inverse.reshape(count, width, count, width)[groups, :, groups]  # [count, width, width]
    blocks[~stay] = np.eye(width)
    parts = weights.reshape(count, width, -1)
    return np.einsum("gwd,gwd->g", parts, np.linalg.solve(blocks, parts))


def _remove(inverse: Float[np.ndarray, "I I"], weights: Float[np.ndarray, "I D"], rows: slice) -> None:
    """The step for one group, in place; its own rows and columns become zero, exactly."""
    columns = inverse[:, rows].copy()
    gain = np.linalg.solve(inverse[rows, rows], columns.T).T  # H⁻¹_:S (H⁻¹_SS)⁻¹
    weights -= gain @ weights[rows]
    inverse -= gain @ columns.T
    weights[rows] = inverse[rows] = inverse[:, rows] = 0.0
