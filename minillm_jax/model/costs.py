"""What a model costs, by formula from its shapes: parameters, multiply-accumulates, memory.

parameters  of all arrays; tied embeddings count once
macs        multiply-accumulates of one forward pass over one window of T tokens: every matrix T times, and for
            every query head 2 · T² · H (scores, and the mixture of values; a causal mask saves nothing by itself)
memory      bytes of the weights as they are stored, and of the keys and values of one window
"""

from collections.abc import Sequence

import jax
import numpy as np

from minillm_jax.errors import one_of
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block, depth
from minillm_jax.model.tree import group_count, kernels, named_arrays, parameter_count, run_letters

MEASURES = ("parameters", "macs", "memory")

# Tokens of the window that `macs` and `memory` are for, where nothing else is said.
WINDOW = 128


def cost(decoder: Decoder, measure: str, window: int = WINDOW) -> int:
    """What a model costs in a measure; only shapes are looked at.

    Raises:
      InputError: there is no such measure.
    """
    one_of("measure", measure, MEASURES)
    match measure:
        case "parameters":
            return parameter_count(decoder)
        case "macs":
            outer = (decoder.project_in, decoder.project_out)
            matrices = sum(linear.kernel.size for linear in outer if linear is not None)
            return window * (matrices + decoder.embedding.size) + sum(_run_macs(run, window) for run in decoder.runs)
    weights = sum(_bytes(leaf) for path, leaf in named_arrays(decoder) if not axis_table.is_data(path))
    return weights + sum(depth(run) * 2 * window * _key_bytes(run, group_count(run, "head")) for run in decoder.runs)


def all_costs(decoder: Decoder, window: int = WINDOW) -> dict[str, int]:
    """What a model costs in every measure."""
    return {measure: cost(decoder, measure, window) for measure in MEASURES}


def block_macs(block: Block, window: int = WINDOW) -> int:
    """Multiply-accumulates of one layer, given as a run of one, over one window."""
    return _run_macs(block, window)


def _run_macs(run: Block, window: int) -> int:
    size = run_letters(run)
    matrices = sum(int(np.prod(kernel.shape)) for kernel in kernels(run).values())
    return window * matrices + depth(run) * 2 * window**2 * size["N"] * size["H"]


def _bytes(leaf: jax.Array) -> int:
    return leaf.size * leaf.dtype.itemsize


def _key_bytes(run: Block, heads: int) -> int:
    return heads * run_letters(run)["H"] * run.attention.k.kernel.dtype.itemsize


def block_parameters(decoder: Decoder) -> int:
    """Parameters of the layers, without embeddings, final norm and head."""
    return sum(
        leaf.size for path, leaf in named_arrays(decoder) if path.startswith("runs.") and not axis_table.is_data(path)
    )


def group_costs(decoder: Decoder, kinds: Sequence[str], measure: str, window: int = WINDOW) -> dict[str, list[int]]:
    """What one group less saves: kind -> one number for each layer.

    Groups of two kinds share no array, so savings add up.
    """
    return {
        kind: [_group_cost(run, kind, measure, window) for run in decoder.runs for _ in range(depth(run))]
        for kind in kinds
    }


def _group_cost(run: Block, kind: str, measure: str, window: int) -> int:
    layers, count = depth(run), group_count(run, kind)
    arrays = [
        leaf
        for path, leaf in named_arrays(run)
        if not axis_table.is_data(path) and axis_table.group_axis(axis_table.BLOCK_AXES[path], kind) is not None
    ]
    if measure == "memory":
        keys = 2 * window * _key_bytes(run, 1) if kind == "head" else 0
        return sum(_bytes(leaf) for leaf in arrays) // (layers * count) + keys
    if measure == "parameters":
        return sum(leaf.size for leaf in arrays) // (layers * count)
    sliced = [
        kernel.size
        for name, kernel in kernels(run).items()
        if axis_table.group_axis(axis_table.matrices()[name], kind) is not None
    ]
    size = run_letters(run)
    heads = {"head": size["N"] // size["K"], "query": 1}.get(kind, 0)
    return window * sum(sliced) // (layers * count) + 2 * window**2 * heads * size["H"]
