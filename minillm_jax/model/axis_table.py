"""The table: which axis of which array belongs to a head, a channel, a hidden dimension, a layer.

Letters, used for shapes everywhere in the package:

    B batch            T query length     S key length      V vocabulary
    D hidden size      N query heads      K key/value heads  G query heads of one key/value head (N = K * G)
    H head size        F MLP width        L layers           P directions
    E embedding size, which is D but for models that project their embeddings (OPT-350m)
    M learned positions

A kernel is written `inputs outputs`: `"D NH"` is an array [D, N, H] that maps D to N heads of size H. Arrays of a
block carry a further leading axis L, because equal layers are stacked. Everything that has to know a shape reads this
table: the abstract decoder, slicing, scoring and the converter. A decoder has those arrays of it that its
configuration asks for.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Int, Shaped

OUTER_AXES = {
    "embedding": "V E",
    "position_embedding": "M D",
    "project_in.kernel": "E D",
    "embedding_norm.scale": "D",
    "embedding_norm.bias": "D",
    "final_norm.scale": "D",
    "final_norm.bias": "D",
    "project_out.kernel": "D E",
    "head.kernel": "E V",
}

BLOCK_AXES = {
    "attention_norm.scale": "D",
    "attention_norm.bias": "D",
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
    "attention.window": "",
    "attention.slopes": "N",
    "attention_post_norm.scale": "D",
    "mlp_norm.scale": "D",
    "mlp_norm.bias": "D",
    "mlp.gate.kernel": "D F",
    "mlp.gate.bias": "F",
    "mlp.up.kernel": "D F",
    "mlp.up.bias": "F",
    "mlp.down.kernel": "F D",
    "mlp.down.bias": "D",
    "mlp_post_norm.scale": "D",
}

# Data of a layer that follow from the configuration: sliced and scanned with it, but no parameters, and not stored.
DATA = ("attention.window", "attention.slopes")

# The letters a kind of group slices, the one that counts its groups first: query heads go with their key/value head or,
# as groups of their own, alone; and the embedding size with the hidden size that it is (but for models that project the
# one to the other).
GROUP_LETTERS = {"head": "KN", "query": "N", "channel": "F", "hidden": "DE", "layer": "L"}

# The kinds that are pruned inside each block where nothing else is asked for; hidden dimensions and layers go through
# the whole model.
KINDS = ("head", "channel")

# How heads are counted: as whole key/value heads, or query by query, as many of every key/value head.
HEADS = {"group": "head", "query": "query"}

# Kind of group -> for each layer, the indices that stay, ascending; layers may keep different numbers.
Kept = Mapping[str, Sequence[Int[np.ndarray, " _"]]]


def matrices() -> dict[str, str]:
    """Name of every block matrix (`attention.q`, ...) and its axes (`D NH`), in the order of the forward pass."""
    suffix = ".kernel"
    return {path.removesuffix(suffix): axes for path, axes in BLOCK_AXES.items() if path.endswith(suffix)}


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


def axes_of(path: str) -> str:
    """Axes of an array of a decoder by its path; those of a block (`runs.0.mlp.up.kernel`) begin with L."""
    if path.startswith("runs."):
        return f"L {BLOCK_AXES[path.split('.', 2)[2]]}"
    return OUTER_AXES[path]


def is_data(path: str) -> bool:
    """Whether a path of a decoder names data of a layer, which are no parameters."""
    return path.endswith(DATA)


def split_groups(array: Shaped[Array, "..."], axes: str, kind: str, count: int) -> Shaped[Array, "count rest"]:
    """An array cut into the parts of its groups, [count, everything else]."""
    axis = group_axis(axes, kind)
    assert axis is not None, f"{axes} has no axis of kind {kind}"
    return jnp.moveaxis(array, axis, 0).reshape(count, -1)


def take_groups(
    array: Shaped[Array, "..."], axes: str, kind: str, kept: Shaped[Array, "kept"], count: int
) -> Shaped[Array, "..."]:
    """An array with only the kept groups of a kind; unchanged when the kind has no axis in it.

    Its bits are taken as whole numbers: devices that share the axis put the result together by summing what they have
    and zeros, and a sum of floats would lose the sign of a negative zero.
    """
    axis = group_axis(axes, kind)
    if axis is None:
        return array
    width = array.shape[axis] // count
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    grouped = bits.reshape(*array.shape[:axis], count, width, *array.shape[axis + 1 :])
    taken = jnp.take(grouped, kept, axis=axis).reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])
    return jax.lax.bitcast_convert_type(taken, array.dtype)


def put_groups(
    array: Shaped[Array, "..."], axes: str, kind: str, places: Shaped[Array, "before"], before: int, after: int
) -> Shaped[Array, "..."]:
    """An array with its groups of a kind put in their places among `after` groups, the others zero."""
    axis = group_axis(axes, kind)
    assert axis is not None, f"{axes} has no axis of kind {kind}"
    width = array.shape[axis] // before
    grouped = jnp.moveaxis(array.reshape(*array.shape[:axis], before, width, *array.shape[axis + 1 :]), axis, 0)
    put = jnp.zeros((after, *grouped.shape[1:]), array.dtype).at[places].set(grouped)
    return jnp.moveaxis(put, 0, axis).reshape(*array.shape[:axis], after * width, *array.shape[axis + 1 :])


def array_path(path: jax.tree_util.KeyPath) -> str:
    """A leaf's path in a module tree as the dotted name the tables use (`attention.q.kernel`)."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def kept_of_kept(first: Kept, second: Kept) -> dict[str, list[Int[np.ndarray, " _"]]]:
    """What stays of a model that was pruned twice, by the indices it had before the first time."""
    return {
        kind: [np.asarray(before)[after] for before, after in zip(first[kind], second[kind], strict=True)]
        for kind in first
    }
