"""Many runs as one: layers of unequal sizes, padded with zeros to the largest, so that one scan computes all layers.

A model with unequal layers is a long list of runs, and a program that scans every run for itself takes as many times
as long to compile. A CPU compiles a layer in a fraction of a second. The compiler for a GPU tries many kernels for
every product and takes seconds. There the program pads the weights first: this takes memory for one copy of the layers
and the arithmetic of layers that are all as wide as the widest.

A head of zeros adds nothing to the residual stream. Neither does a channel of zeros, because the activation function of
every family maps zero to zero. Padding is part of the program, so a gradient reaches the real elements alone.
"""

from collections.abc import Mapping, Sequence

import jax
from jax import numpy as jnp
from jaxtyping import Array, Shaped

from minillm_jax.model import axis_table
from minillm_jax.model.modules import Block, depth, run_letters

# Platforms whose compiler is fast enough for a scan of every run.
SCAN_EVERY_RUN = ("cpu",)

# So many runs are worth a program of their own on the other platforms.
MOST_RUNS = 4

# The padded layers may take this share of the memory of a device.
SHARE_OF_MEMORY = 0.25

# Size of every axis letter of a run; G, the query heads of a key/value head, besides.
Letters = Mapping[str, int]


def worth_padding(runs: Sequence[Block]) -> bool:
    """Whether a program should pad these runs on this platform, and has the memory."""
    if jax.default_backend() in SCAN_EVERY_RUN or len(runs) <= MOST_RUNS:
        return False
    if runs[0].attention.q_joint_norm is not None:  # heads of zeros would change the norm over all heads
        return False
    if runs[0].experts is not None:  # a router would choose experts of zeros
        return False
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    shapes = jax.tree.leaves(jax.eval_shape(one_run, list(runs)))
    return limit is None or sum(one.size * one.dtype.itemsize for one in shapes) <= SHARE_OF_MEMORY * limit


def largest(runs: Sequence[Block]) -> dict[str, int]:
    """The sizes of the padded layers: the largest number of heads, of query heads of each, and of channels."""
    each = [letters_of(run) for run in runs]
    sizes = {letter: max(letters[letter] for letters in each) for letter in each[0]}
    return sizes | {"N": sizes["K"] * sizes["G"]}


def letters_of(run: Block) -> dict[str, int]:
    """The size of every axis letter of a run of equal layers: `run_letters`, L, and G where it has heads."""
    letters = run_letters(run)
    return letters | {"L": depth(run), "G": letters["N"] // letters["K"] if letters["K"] else 0}


def one_run(runs: Sequence[Block]) -> list[Block]:
    """The runs as a list of one, whose layers all have the largest sizes. Called inside a compiled program.

    Args:
      runs: runs of a decoder whose layers differ in the numbers of heads and channels alone.
    """
    sizes = largest(runs)

    def padded_run(run: Block) -> Block:
        before = letters_of(run)

        def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
            axes = axis_table.letters(axis_table.BLOCK_AXES[axis_table.array_path(path)])
            return padded(array, f"L{axes}", before, sizes)

        return jax.tree_util.tree_map_with_path(leaf, run)

    return [jax.tree.map(lambda *pieces: jnp.concatenate(pieces), *map(padded_run, runs))]


def padded(array: Shaped[Array, "..."], axes: str, before: Letters, after: Letters) -> Shaped[Array, "..."]:
    """An array with zeros behind its heads and channels, and behind the query heads of every key/value head.

    Args:
      array: an array of a run, or of a matrix of it.
      axes: its letters, L first; a letter that `after` lacks keeps its size.
      before: the sizes of the run.
      after: the sizes of the padded layers; their number of layers is that of the run.
    """
    sizes = dict(zip(axes, array.shape, strict=True))
    new = sizes | dict(after) | {"L": before["L"]}
    shape = tuple(new[letter] for letter in axes)
    if not array.size:  # the whole sublayer was removed
        return jnp.zeros(shape, array.dtype)
    # A query head is the G-th of the K-th key/value head.
    grouped = axes.replace("N", "KG")
    sizes |= {letter: before[letter] for letter in "KG" if "N" in axes}
    widths = [(0, new[letter] - sizes[letter]) for letter in grouped]
    return jnp.pad(array.reshape([sizes[letter] for letter in grouped]), widths).reshape(shape)
