"""Costs by formula, compared with compiled programs, sums over arrays, and sliced models."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.errors import InputError
from minillm_jax.model import axis_table, costs
from minillm_jax.model.attention import parts_of
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder, rotary_angles
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.tree import group_counts, named_arrays, part_counts
from minillm_jax.pruning.slicing import slice_groups
from tests.helpers import small_decoder
from tests.pruning.test_walk import BIASED

# With matrices of this size, norms, rotary positions and softmax are a few per cent of the operations.
LARGE = Sizes(V=61, D=256, H=32, layers=(LayerSizes(N=8, K=4, F=640),))


@pytest.mark.parametrize(("window", "changes"), [(64, {}), (256, {}), (64, BIASED)])
def test_macs_of_a_block_are_half_the_operations_that_xla_counts(window: int, changes: dict[str, bool]) -> None:
    """One layer without a scan, because XLA counts the body of a scan once.

    The costs count all keys for every query, as published figures do. Attention in parts leaves later keys out.
    """
    decoder = small_decoder(sizes=LARGE, **changes)
    block = jax.tree.map(lambda leaf: leaf[0], decoder.runs[0])
    angles = rotary_angles(decoder, window)
    stream = jnp.zeros((1, window, 256))
    compiled = jax.jit(lambda block, x: apply_layer(block, decoder.config, x, angles)[0]).lower(block, stream).compile()
    counted = compiled.cost_analysis()["flops"] / 2
    parts = parts_of(window)
    left_out = 2 * window**2 * 8 * 32 * (parts - 1) / (2 * parts)
    assert costs.block_macs(decoder.runs[0], window) - left_out == pytest.approx(counted, rel=0.04)


def test_macs_of_a_model_add_the_head_and_grow_with_the_square_of_the_window() -> None:
    decoder = small_decoder(sizes=LARGE)
    for window in (1, 64):
        head = window * 61 * 256
        assert costs.cost(decoder, "macs", window) == costs.block_macs(decoder.runs[0], window) + head
    scores = costs.block_macs(decoder.runs[0], 64) - 64 * costs.block_macs(decoder.runs[0], 1)
    assert scores == 2 * (64**2 - 64) * 8 * 32


@pytest.mark.parametrize("changes", [{}, BIASED, {"tie_embeddings": True}])
def test_parameters_and_memory_are_sums_over_arrays(changes: dict[str, bool]) -> None:
    """bfloat16 halves the memory; the window adds the keys and values of 3 layers with 4 heads of size 4."""
    decoder = small_decoder(**changes)
    arrays = [leaf for path, leaf in named_arrays(decoder) if not axis_table.is_data(path)]
    assert costs.all_costs(decoder, 7) == {
        "parameters": sum(leaf.size for leaf in arrays),
        "macs": costs.cost(decoder, "macs", 7),
        "memory": sum(leaf.nbytes for leaf in arrays) + 3 * 2 * 7 * 4 * 4 * 4,
    }
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, decoder)
    assert 2 * costs.cost(half, "memory", 7) == costs.cost(decoder, "memory", 7)
    with pytest.raises(InputError, match="unknown measure 'seconds'"):
        costs.cost(decoder, "seconds")


def remove_one_group(decoder: Decoder, kind: str, layer: int) -> tuple[Decoder, int]:
    """A model with one group removed from each part of a layer (see `part_count`), and the number of removed groups."""
    counts, parts = group_counts(decoder, kind), part_counts(decoder, [kind])[kind]
    kept = [np.arange(count) for count in counts]
    kept[layer] = np.delete(kept[layer], np.arange(0, counts[layer], counts[layer] // parts[layer]))
    return slice_groups(decoder, {kind: kept}), parts[layer]


@pytest.mark.parametrize("measure", costs.MEASURES)
@pytest.mark.parametrize("kind", ["head", "query", "channel"])
@pytest.mark.parametrize("changes", [{}, BIASED], ids=["plain", "biased"])
def test_the_saving_of_a_group_is_that_of_its_removal(changes: dict[str, bool], kind: str, measure: str) -> None:
    decoder = small_decoder(layers=2, **changes)
    smaller, removed = remove_one_group(decoder, kind, layer=1)
    saved = costs.cost(decoder, measure, 9) - costs.cost(smaller, measure, 9)
    assert costs.group_costs(decoder, [kind], measure, 9)[kind][1] * removed == saved > 0
    remaining = costs.group_costs(smaller, [kind], measure, 9)[kind]
    assert remaining == costs.group_costs(decoder, [kind], measure, 9)[kind], "savings add up"


def test_block_parameters_are_all_parameters_inside_the_layers() -> None:
    decoder = small_decoder()
    outside = sum(leaf.size for path, leaf in named_arrays(decoder) if not path.startswith("runs."))
    assert costs.block_parameters(decoder) == costs.cost(decoder, "parameters") - outside
