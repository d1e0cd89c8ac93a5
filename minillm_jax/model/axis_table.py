"""The table of axes: which axis of each array belongs to a head, a channel, a hidden dimension or a layer.

The whole package writes shapes with these letters:

    B batch            T query length     S key length      V vocabulary
    D hidden size      N query heads      K key/value heads  G query heads of one key/value head (N = K * G)
    H head size        F MLP width        L layers           P directions
    X experts          W width of an expert    1 one in a layer with experts, else zero
    E embedding size, equal to D except in models that project their embeddings (OPT-350m)
    M learned positions

A kernel is written `inputs outputs`: `"D NH"` is an array [D, N, H] that maps D to N heads of size H. The arrays of a
block have a further leading axis L, because equal layers are stacked. The abstract decoder, slicing, scoring and the
converter read all shapes from this table. The configuration of a decoder decides which arrays of the table it has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

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
    "head.bias": "V",
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
    "attention.q_joint_norm.scale": "NH",
    "attention.k_joint_norm.scale": "KH",
    "attention.o.kernel": "NH D",
    "attention.o.bias": "D",
    "attention.window": "",
    "attention.slopes": "N",
    "attention.rope": "",
    "attention.sinks": "N",
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
    "experts.router": "D X",
    "experts.router_bias": "X",
    "experts.choice_bias": "X",
    "experts.gate": "X D W",
    "experts.gate_bias": "X W",
    "experts.up": "X D W",
    "experts.up_bias": "X W",
    "experts.down": "X W D",
    "experts.down_bias": "X D",
    "experts.shared_gate": "D 1",
}

# Data of a layer: computed from the configuration, sliced and scanned with the layer, neither trained nor stored.
DATA = ("attention.window", "attention.slopes", "attention.rope")

# The letters that a kind of group slices; the first letter counts the groups. A head is sliced with its query heads
# (`head`), or single query heads are sliced (`query`). Hidden dimensions are sliced from the embedding too, except in
# models that project their embeddings.
GROUP_LETTERS = {"head": "KN", "query": "N", "channel": "F", "expert": "X", "hidden": "DE", "layer": "L"}

# The kind of the channels inside experts: expert j of a layer has the groups j * W to (j + 1) * W - 1, and all experts
# keep equally many. Two axes, X and W, number its groups, so that `take_channels` slices them.
EXPERT_CHANNEL = "expert_channel"

# The default kinds of groups, both inside a block.
KINDS = ("head", "channel")

# The unit in which heads are pruned -> the kind of group. With `query`, every key/value head of a layer keeps equally
# many query heads.
HEADS = {"group": "head", "query": "query"}

# Kind of group -> for each layer, the indices of the kept groups, ascending. Layers may keep different numbers.
Kept = Mapping[str, Sequence[Int[np.ndarray, " _"]]]


def matrices() -> dict[str, str]:
    """Name of every block matrix (`attention.q`, ...) and its axes (`D NH`), in the order of the forward pass."""
    suffix = ".kernel"
    return {path.removesuffix(suffix): axes for path, axes in BLOCK_AXES.items() if path.endswith(suffix)}


def expert_matrices() -> dict[str, str]:
    """Name of every matrix of the experts (`experts.gate`, ...) and its axes (`X D W`)."""
    return {path: axes for path, axes in BLOCK_AXES.items() if path.startswith("experts.") and axes.count(" ") == 2}


def all_matrices() -> dict[str, str]:
    """`matrices`, then those of the experts."""
    return matrices() | expert_matrices()


def map_axes(name: str) -> tuple[str, str, str]:
    """The axes of a matrix of `all_matrices`: those that number linear maps (X or none), inputs, outputs."""
    *maps, inputs, outputs = all_matrices()[name].split()
    return "".join(maps), inputs, outputs


def letters(axes: str) -> str:
    """The axis letters without spaces: `"DNH"` for `"D NH"`."""
    return axes.replace(" ", "")


def structures(kind: str) -> dict[str, str]:
    """Name and axes of every matrix that holds a structure of each group of a kind."""
    return {name: axes for name, axes in matrices().items() if set(axes) & set(GROUP_LETTERS[kind])}


def shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The array shape for the axes of an entry of the table and the size of each letter."""
    return tuple(sizes[letter] for letter in letters(axes))


def group_axis(axes: str, kind: str) -> int | None:
    """Position of the axis that a kind of group slices; None for an array without such an axis."""
    positions = (i for i, letter in enumerate(letters(axes)) if letter in GROUP_LETTERS[kind])
    return next(positions, None)


def axes_of(path: str) -> str:
    """The axes of a decoder's array, by its path. The axes of a block's array (`runs.0.mlp.up.kernel`) begin with L."""
    if path.startswith("runs."):
        return f"L {BLOCK_AXES[path.split('.', 2)[2]]}"
    return OUTER_AXES[path]


def is_data(path: str) -> bool:
    """Whether the path of an array names data of a layer, which are not parameters."""
    return path.endswith(DATA)


def split_groups(array: Shaped[Array, "..."], axes: str, kind: str, count: int) -> Shaped[Array, "count rest"]:
    """The structures of an array, one row per group: [count, all other axes]."""
    axis = group_axis(axes, kind)
    assert axis is not None, f"{axes} has no axis of kind {kind}"
    return jnp.moveaxis(array, axis, 0).reshape(count, array.size // max(count, 1))


def take_groups(
    array: Shaped[Array, "..."], axes: str, kind: str, kept: Shaped[Array, "kept"], count: int
) -> Shaped[Array, "..."]:
    """An array with only the kept groups of a kind; unchanged if the array has no axis of the kind.

    The values are taken as integers of the same bits. Devices that share the axis combine the result as a sum with
    zeros, and a sum of floats would lose the sign of a negative zero.
    """
    axis = group_axis(axes, kind)
    if axis is None or not count:
        return array
    width = array.shape[axis] // count
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    grouped = bits.reshape(*array.shape[:axis], count, width, *array.shape[axis + 1 :])
    taken = jnp.take(grouped, kept, axis=axis).reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])
    return jax.lax.bitcast_convert_type(taken, array.dtype)


def take_channels(array: Shaped[Any, "..."], axes: str, kept: Int[np.ndarray, "X kept"], xp: Any = np) -> Any:
    """An array with only the kept channels of every expert; unchanged if it has no axis W.

    Args:
      array: the array.
      axes: its axes, which begin with those in front of X.
      kept: for every expert, the indices of its kept channels, ascending.
      xp: `numpy`, or `jax.numpy` for arrays on devices.
    """
    index = _channel_index(axes, kept, array.ndim)
    return array if index is None else xp.take_along_axis(array, xp.asarray(index), axis=_axis_of("W", axes))


def put_channels(whole: Shaped[np.ndarray, "..."], part: Shaped[np.ndarray, "..."], axes: str, kept: Any) -> None:
    """The inverse of `take_channels`: writes the kept channels into an array with all channels."""
    index = _channel_index(axes, kept, whole.ndim)
    assert index is not None, f"{axes} has no channels of experts"
    np.put_along_axis(whole, index, part, axis=_axis_of("W", axes))


def _axis_of(letter: str, axes: str) -> int:
    return letters(axes).index(letter)


def _channel_index(axes: str, kept: Int[np.ndarray, "X kept"], rank: int) -> Int[np.ndarray, "..."] | None:
    """The kept channels with the axes of an array, of one element where the array has others than X and W."""
    if not {"X", "W"} <= set(letters(axes)):
        return None
    shape = [1] * rank
    shape[_axis_of("X", axes)], shape[_axis_of("W", axes)] = kept.shape
    return kept.reshape(shape)


def put_groups(
    array: Shaped[Array, "..."], axes: str, kind: str, places: Shaped[Array, "before"], before: int, after: int
) -> Shaped[Array, "..."]:
    """The inverse of `take_groups`: an array with `after` groups of a kind, zero except at `places`."""
    axis = group_axis(axes, kind)
    assert axis is not None, f"{axes} has no axis of kind {kind}"
    width = array.shape[axis] // before
    grouped = jnp.moveaxis(array.reshape(*array.shape[:axis], before, width, *array.shape[axis + 1 :]), axis, 0)
    put = jnp.zeros((after, *grouped.shape[1:]), array.dtype).at[places].set(grouped)
    return jnp.moveaxis(put, 0, axis).reshape(*array.shape[:axis], after * width, *array.shape[axis + 1 :])


def array_path(path: jax.tree_util.KeyPath) -> str:
    """The dotted name in the tables (`attention.q.kernel`) of a leaf's path in a module tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def kept_of_kept(first: Kept, second: Kept) -> dict[str, list[Int[np.ndarray, " _"]]]:
    """The kept groups of a model that was pruned twice, as indices of the dense model.

    Args:
      first: the groups kept by the first pruning, as indices of the dense model.
      second: the groups kept by the second pruning, as indices of the once pruned model.
    """
    return {
        kind: [np.asarray(dense)[kept] for dense, kept in zip(first[kind], second[kind], strict=True)] for kind in first
    }
