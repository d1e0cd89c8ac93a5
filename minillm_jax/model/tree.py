"""Sizes, counts and names of the arrays of a decoder, read from the arrays (letters: see `axis_table`)."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from minillm_jax.model import axis_table
from minillm_jax.model.build import NO_WINDOW
from minillm_jax.model.config import LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import MLP, Attention, Block, Linear, depth, run_letters


def layer_count(decoder: Decoder) -> int:
    """Number of layers."""
    return sum(depth(run) for run in decoder.runs)


def hidden_size(decoder: Decoder) -> int:
    """Width D of the residual stream."""
    return decoder.runs[0].attention.q.kernel.shape[1]


def outer_letters(decoder: Decoder) -> dict[str, int]:
    """The size of every axis letter outside the layers."""
    vocabulary, width = decoder.embedding.shape
    positions = 0 if decoder.position_embedding is None else decoder.position_embedding.shape[0]
    return {"V": vocabulary, "E": width, "D": hidden_size(decoder), "M": positions}


def sizes_of(decoder: Decoder) -> Sizes:
    """The sizes from which `build` makes this decoder, with the data of the layers."""
    outer, head_size = outer_letters(decoder), run_letters(decoder.runs[0])["H"]
    layers = tuple(layer for run in decoder.runs for layer in _layers_of(run))
    return Sizes(outer["V"], outer["D"], head_size, layers, outer["E"], outer["M"])


def _layers_of(run: Block) -> Iterator[LayerSizes]:
    attention, letters = run.attention, run_letters(run)
    for index in range(depth(run)):
        window = None if attention.window is None else int(attention.window[index])
        slopes = () if attention.slopes is None else tuple(float(slope) for slope in attention.slopes[index])
        window = None if window == NO_WINDOW else window
        rope = 0 if attention.rope is None else int(attention.rope[index])
        yield LayerSizes(letters["N"], letters["K"], letters["F"], window, slopes, rope, letters["X"], letters["W"])


def group_count(block: Block, kind: str) -> int:
    """Number of groups of a layer.

    Key/value heads for `head`, query heads for `query`, MLP width for `channel`, experts for `expert`, and the channels
    of all experts for `expert_channel`.
    """
    match kind:
        case "head":
            return block.attention.k.kernel.shape[-2]
        case "query":
            return block.attention.q.kernel.shape[-2]
        case "expert":
            return 0 if block.experts is None else block.experts.down.shape[-3]
        case axis_table.EXPERT_CHANNEL:
            return 0 if block.experts is None else math.prod(block.experts.down.shape[-3:-1])
    return block.mlp.down.kernel.shape[-2]


def part_count(block: Block, kind: str) -> int:
    """Number of parts of a layer's groups that must keep equally many groups: for `query`, the key/value heads."""
    return max(group_count(block, "head"), 1) if kind == "query" else 1


def group_counts(decoder: Decoder, kind: str) -> list[int]:
    """`group_count` of every layer."""
    return [group_count(run, kind) for run in decoder.runs for _ in range(depth(run))]


def part_counts(decoder: Decoder, kinds: Iterable[str]) -> dict[str, list[int]]:
    """`part_count` of every layer, for each kind."""
    return {kind: [part_count(run, kind) for run in decoder.runs for _ in range(depth(run))] for kind in kinds}


def kernels(block: Block) -> dict[str, nnx.Param]:
    """The matrices of a block, by name, in the order of the table."""
    matrices = {}
    for name in axis_table.matrices():
        part, matrix = name.split(".")
        linear = getattr(getattr(block, part), matrix)
        if linear is not None:
            matrices[name] = linear.kernel
    return matrices


def all_matrices(block: Block) -> dict[str, nnx.Param]:
    """`kernels`, then the matrices of the experts, if the block has them."""
    of_experts = {} if block.experts is None else axis_table.expert_matrices()
    return kernels(block) | {name: getattr(block.experts, name.split(".")[1]) for name in of_experts}


def replace_all_matrices(block: Block, new: Callable[[str, Array], Array]) -> Block:
    """`replace_kernels`, of the matrices of the experts too."""
    of_experts = axis_table.expert_matrices()

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = axis_table.array_path(path)
        return new(name, array) if name in of_experts else array

    return jax.tree_util.tree_map_with_path(leaf, replace_kernels(block, new))


def replace_kernels(block: Block, new: Callable[[str, Array], Array]) -> Block:
    """A block with every matrix W replaced by `new(name, W)`; all other arrays are shared with the original."""

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = axis_table.array_path(path)
        return new(name.removesuffix(".kernel"), array) if name.endswith(".kernel") else array

    return jax.tree_util.tree_map_with_path(leaf, block)


def replace_linears(block: Block, new: Callable[[str, Linear], Linear]) -> Block:
    """A layer with every linear map replaced by `new(name, linear)`; all other modules are shared with the original."""
    attention, mlp = block.attention, block.mlp
    q, k, v, o = (new(f"attention.{name}", getattr(attention, name)) for name in "qkvo")
    data = {"window": attention.window, "slopes": attention.slopes, "rope": attention.rope}
    values = {name: None if one is None else one[...] for name, one in data.items()}
    joint = {"q_joint_norm": attention.q_joint_norm, "k_joint_norm": attention.k_joint_norm}
    sinks = None if attention.sinks is None else attention.sinks[...]
    gate = None if mlp.gate is None else new("mlp.gate", mlp.gate)
    return Block(
        block.attention_norm,
        Attention(q, k, v, o, attention.q_norm, attention.k_norm, **values, **joint, sinks=sinks),
        block.mlp_norm,
        MLP(gate, new("mlp.up", mlp.up), new("mlp.down", mlp.down)),
        block.attention_post_norm,
        block.mlp_post_norm,
        block.experts,
    )


def named_arrays(tree: Any) -> Iterator[tuple[str, Any]]:
    """Dotted path (`runs.0.attention.q.kernel`) and array of each leaf of a decoder, or of a tree of its structure."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield axis_table.array_path(path), leaf


def outer_arrays(decoder: Decoder) -> dict[str, Any]:
    """The arrays outside the layers, by the names of `axis_table.OUTER_AXES`."""
    return {path: array for path, array in named_arrays(decoder) if not path.startswith("runs.")}


def parameter_count(decoder: Decoder) -> int:
    """Number of parameters; tied embeddings count once."""
    return sum(leaf.size for path, leaf in named_arrays(decoder) if not axis_table.is_data(path))
