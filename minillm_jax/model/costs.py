"""Costs of a model, by formula from its shapes: parameters, multiply-accumulates, memory.

parameters  number of parameters of all arrays; tied embeddings count once
macs        multiply-accumulates of one forward pass over one window of T tokens: T times the size of every matrix (of
            the experts, those that a token chooses), and
            2 · T² · H for every query head (scores and mixed values; the causal mask is not counted as a saving)
memory      bytes of the weights in their type, and of the keys and values of one window
"""

from collections.abc import Sequence

import jax
import numpy as np

from minillm_jax.errors import one_of
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block, depth, run_letters
from minillm_jax.model.tree import group_count, kernels, named_arrays, parameter_count

MEASURES = ("parameters", "macs", "memory")

# Default number of tokens of the window of `macs` and `memory`.
WINDOW = 128


def cost(decoder: Decoder, measure: str, window: int = WINDOW) -> int:
    """The cost of a model in one of `MEASURES`. The decoder may be abstract.

    Args:
      decoder: the model.
      measure: `parameters`, `macs` or `memory` (bytes).
      window: tokens of the window for `macs` and `memory`.

    Raises:
      InputError: the measure is unknown.
    """
    one_of("measure", measure, MEASURES)
    chosen = 0 if decoder.config.routing is None else decoder.config.routing.chosen
    match measure:
        case "parameters":
            return parameter_count(decoder)
        case "macs":
            outer = (decoder.project_in, decoder.project_out)
            matrices = sum(linear.kernel.size for linear in outer if linear is not None)
            return window * (matrices + decoder.embedding.size) + sum(
                _run_macs(run, window, chosen) for run in decoder.runs
            )
    weights = sum(_bytes(leaf) for path, leaf in named_arrays(decoder) if not axis_table.is_data(path))
    return weights + sum(depth(run) * 2 * window * _key_bytes(run, group_count(run, "head")) for run in decoder.runs)


def all_costs(decoder: Decoder, window: int = WINDOW) -> dict[str, int]:
    """The cost of a model in every measure."""
    return {measure: cost(decoder, measure, window) for measure in MEASURES}


def block_macs(block: Block, window: int = WINDOW, chosen: int = 0) -> int:
    """Multiply-accumulates of a run over one window; for a run of one layer, those of the layer.

    Args:
      block: the run.
      window: tokens of the window.
      chosen: experts that compute a token, in a model with experts.
    """
    return _run_macs(block, window, chosen)


def _run_macs(run: Block, window: int, chosen: int = 0) -> int:
    size = run_letters(run)
    matrices = sum(int(np.prod(kernel.shape)) for kernel in kernels(run).values()) + _expert_macs(run, chosen)
    return window * matrices + depth(run) * 2 * window**2 * size["N"] * size["H"]


def _expert_macs(run: Block, chosen: int) -> int:
    """Multiply-accumulates of the router and of the chosen experts of a run for one token."""
    if run.experts is None or not run.experts.down.size:
        return 0
    parts = run.experts
    matrices = sum(part.size for part in (parts.gate, parts.up, parts.down)) * chosen // group_count(run, "expert")
    gate = 0 if parts.shared_gate is None else parts.shared_gate.size
    return parts.router.size + matrices + gate


def _bytes(leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _key_bytes(run: Block, heads: int) -> int:
    return heads * run_letters(run)["H"] * run.attention.k.kernel.dtype.itemsize


def block_parameters(decoder: Decoder) -> int:
    """Number of parameters of the layers, without embeddings, final norm and head."""
    return sum(
        leaf.size for path, leaf in named_arrays(decoder) if path.startswith("runs.") and not axis_table.is_data(path)
    )


def group_costs(decoder: Decoder, kinds: Sequence[str], measure: str, window: int = WINDOW) -> dict[str, list[int]]:
    """The cost saved by the removal of one group: kind -> one number for each layer.

    Groups of two kinds share no array, so savings add up. The arguments are those of `cost`.
    """
    return {
        kind: [_group_cost(run, kind, measure, window) for run in decoder.runs for _ in range(depth(run))]
        for kind in kinds
    }


def _group_cost(run: Block, kind: str, measure: str, window: int) -> int:
    layers, count = depth(run), max(group_count(run, kind), 1)
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
    heads = {"head": size["N"] // count, "query": 1}.get(kind, 0)
    return window * sum(sliced) // (layers * count) + 2 * window**2 * heads * size["H"]
