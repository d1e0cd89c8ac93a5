"""Structured OBS: groups of input features go one after the other, and the rest takes over what it can.

The error of a linear map with weights W on inputs of second moments H is a quadratic, tr(ΔᵀHΔ). Removing the rows S of
a group costs at least tr(W_Sᵀ (H⁻¹_SS)⁻¹ W_S), reached by W ← W − H⁻¹_:S (H⁻¹_SS)⁻¹ W_S; what is left then has the
inverse H⁻¹ − H⁻¹_:S (H⁻¹_SS)⁻¹ H⁻¹_S: (Hassibi and Stork, 1993; in groups: Kurtic et al., ZipLM, arXiv 2302.04089).

That is a Cholesky factorisation of H⁻¹ whose pivots are chosen on the way: the inverse is not written anew for every
group but kept as H⁻¹ − L Lᵀ, and only its blocks of a group with itself are brought up to date.
"""

import numpy as np
from jaxtyping import Float, Int


def greedy_removal(
    inverse: Float[np.ndarray, "I I"], weights: Float[np.ndarray, "I D"], count: int, keep: int, parts: int = 1
) -> tuple[Int[np.ndarray, " gone"], Float[np.ndarray, "rest D"]]:
    """The group of least error goes, again and again, until `keep` are left; of equal ones that of the lower index.

    The r-th group that goes takes time I · (r + D), in float64.

    Args:
      inverse: H⁻¹, symmetric and positive definite.
      weights: W, the best there is at full width.
      count: number of groups, each of equally many neighbouring rows of W.
      keep: how many groups stay.
      parts: in how many parts of neighbouring groups they lie; equally many go of each.

    Returns:
      The groups that go, in that order, and the others' rows of W: the best there is without those.
    """
    width = len(weights) // count
    weights = np.array(weights, dtype=np.float64)
    each = weights.reshape(count, width, -1)  # a view
    gone: list[int] = []
    left = np.full(parts, (count - keep) // parts)
    places = np.arange(count)
    blocks = inverse.reshape(count, width, count, width)[places, :, places]  # [count, width, width], a copy
    factor = np.zeros(((count - keep) * width, len(weights)))  # Lᵀ
    stay = np.ones(count, dtype=bool)
    for done in range(0, len(factor), width):
        may_go = stay & np.repeat(left > 0, count // parts)
        group = int(np.argmin(np.where(may_go, removal_errors(blocks, each), np.inf)))
        stay[group] = False
        left[group * parts // count] -= 1
        gone.append(group)
        rows = slice(group * width, (group + 1) * width)
        new = inverse[rows] - factor[:done, rows].T @ factor[:done]
        pivot = np.linalg.cholesky(blocks[group])
        new = np.linalg.solve(pivot, new * np.repeat(stay, width))  # [width, I], zero for what is gone
        factor[done : done + width] = new
        weights -= new.T @ np.linalg.solve(pivot, each[group])
        of_groups = new.reshape(width, count, width).swapaxes(0, 1)  # [count, width of L, width]
        blocks -= of_groups.mT @ of_groups
    return np.asarray(gone, np.int64), weights[np.repeat(stay, width)]


def removal_errors(
    blocks: Float[np.ndarray, "count width width"], parts: Float[np.ndarray, "count width D"]
) -> Float[np.ndarray, " count"]:
    """tr(W_Sᵀ (H⁻¹_SS)⁻¹ W_S) of every group, from its block of H⁻¹ and its rows of W."""
    solved = parts / blocks if parts.shape[1] == 1 else np.linalg.solve(blocks, parts)
    return np.einsum("gwd,gwd->g", parts, solved)
