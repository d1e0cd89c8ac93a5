"""The table: which axis of which array belongs to a head, a channel, a hidden dimension, a layer.

Letters, used for shapes everywhere in the package:

    B batch            T query length     S key length      V vocabulary
    D hidden size      N query heads      K key/value heads  G query heads of one key/value head (N = K * G)
    H head size        F MLP width        L layers           P directions

A kernel is written `inputs outputs`: `"D NH"` is an array [D, N, H] that maps D to N heads of size H. Arrays of a
block carry a further leading axis L, because equal layers are stacked. Everything that has to know a shape reads this
table: the abstract decoder, slicing, scoring and the converter.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Int, Shaped

OUTER_AXES = {
    "embedding": "V D",
    "final_norm.scale": "D",
    "head.kernel": "D V",
}

BLOCK_AXES = {
    "attention_norm.scale": "D",
    "attention.q.kernel": "D NH",
    "attention.q.bias": "NH",
    "attention.k.kernel": "D KH",
    "attention.k.bias": "KH",
    "attention.v.kernel": "D KH",
    "attention.v.bias": "KH",
    "attention.q_norm.scale": "H",
    "attention.k_norm.scale": "H",
    "attention.o.kernel": "NH D",
    "attention.o.bias": "D",
    "mlp_norm.scale": "D",
    "mlp.gate.kernel": "D F",
    "mlp.gate.bias": "F",
    "mlp.up.kernel": "D F",
    "mlp.up.bias": "F",
    "mlp.down.kernel": "F D",
    "mlp.down.bias": "D",
}

# The letters a kind of group slices, the one that counts its groups first: query heads go with their key/value head.
GROUP_LETTERS = {"head": "KN", "channel": "F"}

KINDS = tuple(GROUP_LETTERS)

# Kind of group -> for each layer, the indices that stay, ascending; layers may keep different numbers.
Kept = Mapping[str, Sequence[Int[np.ndarray, " _"]]]


def matrices() -> dict[str, str]:
    """Name of every block matrix (`attention.q`, ...) and its axes (`D NH`), in the order of the forward pass."""
    suffix = ".kernel"
    return {path.removesuffix(suffix): axes for path, axes in BLOCK_AXES.items() if path.endswith(suffix)}


def input_rank(axes: str) -> int:
    """Number of input axes of a kernel: 1 for `"D NH"`, 2 for `"NH D"`."""
    return len(axes.split()[0])


def letters(axes: str) -> str:
    """`"D NH"` as a plain sequence of axis letters, `"DNH"`."""
    return axes.replace(" ", "")


def structures(kind: str) -> dict[str, str]:
    """The matrices that have a part in every group of a kind, and their axes."""
    return {name: axes for name, axes in matrices().items() if set(axes) & set(GROUP_LETTERS[kind])}


def shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The array shape of an entry of the table, from the size of each letter."""
    return tuple(sizes[letter] for letter in letters(axes))


def group_axis(axes: str, kind: str) -> int | None:
    """Position of the axis that a kind of group slices, or None when the array has none."""
    found = [i for i, letter in enumerate(letters(axes)) if letter in GROUP_LETTERS[kind]]
    return found[0] if found else None


def split_groups(array: Shaped[Array, "..."], axes: str, kind: str, count: int) -> Shaped[Array, "count rest"]:
    """An array cut into the parts of its groups, [count, everything else]."""
    axis = group_axis(axes, kind)
    assert axis is not None, f"{axes} has no axis of kind {kind}"
    return jnp.moveaxis(array, axis, 0).reshape(count, -1)


def take_groups(
    array: Shaped[Array, "..."], axes: str, kind: str, kept: Shaped[Array, "kept"], count: int
) -> Shaped[Array, "..."]:
    """An array with only the kept groups of a kind; unchanged when the kind has no axis in it."""
    axis = group_axis(axes, kind)
    if axis is None:
        return array
    width = array.shape[axis] // count
    grouped = array.reshape(*array.shape[:axis], count, width, *array.shape[axis + 1 :])
    taken = jnp.take(grouped, kept, axis=axis)
    return taken.reshape(*array.shape[:axis], kept.shape[0] * width, *array.shape[axis + 1 :])


def array_path(path: jax.tree_util.KeyPath) -> str:
    """A leaf's path in a module tree as the dotted name the tables use (`attention.q.kernel`)."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
