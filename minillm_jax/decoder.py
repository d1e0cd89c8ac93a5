"""The one decoder: embedding, runs of equal blocks, final norm, head (letters: see `groups`).

The modules are plain pytrees of arrays. Consecutive layers of equal shape are stacked along a leading axis L and
scanned; a model pruned unequally is a longer list of such runs behind the same interface. Sizes are read off the
arrays everywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from minillm_jax import groups, layers
from minillm_jax.config import DecoderConfig, Sizes

Angles = tuple[Float[Array, "T half"], Float[Array, "T half"]]


class Linear(nnx.Module):
    """x · kernel + bias, along the axes that the einsum equation names."""

    def __init__(self, kernel: Any, bias: Any = None):
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product along the equation's axes, plus the bias along its last ones."""
        y = layers.einsum(equation, x, self.kernel[...])
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, scale: Any):
        self.scale = nnx.Param(scale)

    def __call__(self, x: Float[Array, "..."], epsilon: float) -> Float[Array, "..."]:
        """The norm over the last axis."""
        return layers.rms_norm(x, self.scale[...], epsilon)


class Attention(nnx.Module):
    """Projections of grouped-query attention; q and k norms act on each head."""

    def __init__(self, q: Linear, k: Linear, v: Linear, o: Linear, q_norm: RMSNorm | None, k_norm: RMSNorm | None):
        self.q, self.k, self.v, self.o = q, k, v, o
        self.q_norm, self.k_norm = q_norm, k_norm


class MLP(nnx.Module):
    """Gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, gate: Linear, up: Linear, down: Linear):
        self.gate, self.up, self.down = gate, up, down


class Block(nnx.Module):
    """One layer, or a run of equal layers when its arrays carry a leading axis L."""

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: MLP):
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp


class Decoder(nnx.Module):
    """A causal language model as a pytree: `embedding` [V, D], `runs` of blocks, `final_norm`, `head` (None: tied)."""

    def __init__(
        self, config: DecoderConfig, embedding: Any, runs: Sequence[Block], final_norm: RMSNorm, head: Linear | None
    ):
        self.config = config
        self.embedding = nnx.Param(embedding)
        self.runs = nnx.List(runs)
        self.final_norm = final_norm
        self.head = head

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of every position. For losses see `loss`, which never holds them all."""
        return project_to_vocabulary(self, final_hidden(self, tokens))


def build(config: DecoderConfig, sizes: Sizes, dtype: DTypeLike = jnp.float32) -> Decoder:
    """The decoder with `jax.ShapeDtypeStruct` leaves: what loading, initialising and restoring fill in.

    Example:
      >>> abstract = build(config, sizes)
      >>> decoder = initialise(abstract, jax.random.key(0))
    """

    def leaf(path: str, axes: str, letters: dict[str, int], *stack: int) -> Any:
        if not config.has_array(path):
            return None
        return jax.ShapeDtypeStruct((*stack, *groups.shape(axes, letters)), dtype)

    outer = {p: leaf(p, axes, {"V": sizes.V, "D": sizes.D}) for p, axes in groups.OUTER_AXES.items()}
    runs = []
    for layer, equal in groupby(sizes.layers):
        letters = {"D": sizes.D, "H": sizes.H, "N": layer.N, "K": layer.K, "F": layer.F}
        count = len(list(equal))
        runs.append(_build_block({p: leaf(p, axes, letters, count) for p, axes in groups.BLOCK_AXES.items()}))
    head = None if outer["head.kernel"] is None else Linear(outer["head.kernel"])
    return Decoder(config, outer["embedding"], runs, RMSNorm(outer["final_norm.scale"]), head)


def _build_block(leaves: dict[str, Any]) -> Block:
    def linear(name: str) -> Linear:
        return Linear(leaves[f"{name}.kernel"], leaves[f"{name}.bias"])

    def norm(name: str) -> RMSNorm | None:
        scale = leaves[f"{name}.scale"]
        return None if scale is None else RMSNorm(scale)

    q, k, v, o = (linear(f"attention.{name}") for name in "qkvo")
    attention = Attention(q, k, v, o, norm("attention.q_norm"), norm("attention.k_norm"))
    mlp = MLP(linear("mlp.gate"), linear("mlp.up"), linear("mlp.down"))
    return Block(RMSNorm(leaves["attention_norm.scale"]), attention, RMSNorm(leaves["mlp_norm.scale"]), mlp)


def initialise(abstract: Decoder, key: Array, deviation: float = 0.02) -> Decoder:
    """Random weights for an abstract decoder: normal matrices, unit norms, zero biases."""

    def fill(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> Array:
        name = groups.array_path(path)
        if name.endswith(".scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name.endswith(".bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        keys.append(jax.random.fold_in(key, len(keys)))
        return (deviation * jax.random.normal(keys[-1], leaf.shape)).astype(leaf.dtype)

    keys: list[Array] = []
    return jax.tree_util.tree_map_with_path(fill, abstract)


# ------------------------------------------------------------------------------------------------------- forward


def apply_block(
    block: Block, config: DecoderConfig, x: Float[Array, "B T D"], angles: Angles, mask: Bool[Array, "T S"]
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T ..."]]]:
    """One layer.

    Returns:
      The residual stream after it, and the input of every matrix by name (free under jit when it is not used).
    """
    attention, mlp = block.attention, block.mlp
    with jax.named_scope("attention"):
        h = block.attention_norm(x, config.norm_epsilon)
        q, k = attention.q("BTD,DNH->BTNH", h), attention.k("BTD,DKH->BTKH", h)
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = attention.q_norm(q, config.norm_epsilon), attention.k_norm(k, config.norm_epsilon)
        v = attention.v("BTD,DKH->BTKH", h)
        mixed = layers.attend(layers.rotate(q, angles), layers.rotate(k, angles), v, mask)
        x = x + attention.o("BTNH,NHD->BTD", mixed).astype(x.dtype)
    with jax.named_scope("mlp"):
        m = block.mlp_norm(x, config.norm_epsilon)
        gate = layers.ACTIVATIONS[config.activation](mlp.gate("BTD,DF->BTF", m))
        wide = gate * mlp.up("BTD,DF->BTF", m)
        x = x + mlp.down("BTF,FD->BTD", wide).astype(x.dtype)
    inputs = {"attention.q": h, "attention.k": h, "attention.v": h, "attention.o": mixed}
    return x, inputs | {"mlp.gate": m, "mlp.up": m, "mlp.down": wide}


def scan_layers(
    runs: Sequence[Block],
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    per_layer: Sequence[Any] | None = None,
    visits: int = 1,
) -> tuple[Any, list[Any]]:
    """Walk over all layers in order: `carry, out = step(carry, block, layer, extra)`.

    The only loop that carries a stream through the layers. Each run is one `jax.lax.scan`, so compile time grows with
    the number of runs, and what a step makes lives for one step only.

    Args:
      runs: stacked blocks.
      step: called with one layer's block, its index from 0 (int32 []), and its slice of `per_layer`.
      carry: initial carry.
      per_layer: a further pytree for each run, its leaves stacked like the run, or None.
      visits: how often in a row each layer is stepped through.

    Returns:
      The last carry, and for each run the stacked outputs of all its steps.
    """
    outputs, start = [], 0
    for position, run in enumerate(runs):
        indices = jnp.arange(start, start + depth(run), dtype=jnp.int32)
        stacked = (run, indices, None if per_layer is None else per_layer[position])
        carry, out = _scan_run(stacked, step, carry, depth(run), visits)
        outputs.append(out)
        start += depth(run)
    return carry, outputs


def _scan_run(
    stacked: Any, step: Callable[..., tuple[Any, Any]], carry: Any, count: int, visits: int
) -> tuple[Any, Any]:
    if visits == 1:
        return jax.lax.scan(lambda carry, layer: step(carry, *layer), carry, stacked)

    def visit(carry: Any, number: Array) -> tuple[Any, Any]:
        layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number // visits, keepdims=False), stacked)
        return step(carry, *layer)

    return jax.lax.scan(visit, carry, jnp.arange(count * visits, dtype=jnp.int32))


def embed(decoder: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream before the first layer, in the common type of embedding and layers."""
    dtype = jnp.promote_types(decoder.embedding.dtype, decoder.runs[0].attention.q.kernel.dtype)
    return jnp.take(decoder.embedding[...], tokens, axis=0).astype(dtype)


def positions(decoder: Decoder, length: int) -> tuple[Angles, Bool[Array, "T S"]]:
    """What every layer shares for one sequence length: rotary angles and the attention mask."""
    head_size = decoder.runs[0].attention.k.kernel.shape[-1]
    config = decoder.config
    return layers.rotary_angles(config.rope, head_size, length), layers.causal_mask(length, config.sliding_window)


def final_hidden(decoder: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream after the last layer and the final norm."""
    angles, mask = positions(decoder, tokens.shape[1])

    def step(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
        return apply_block(block, decoder.config, x, angles, mask)[0], None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens))
    return decoder.final_norm(x, decoder.config.norm_epsilon)


def project_to_vocabulary(decoder: Decoder, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Float32 logits of final hidden states."""
    if decoder.head is None:
        return layers.einsum("...D,VD->...V", hidden, decoder.embedding[...], out=jnp.float32)
    return layers.einsum("...D,DV->...V", hidden, decoder.head.kernel[...], out=jnp.float32)


# --------------------------------------------------------------------------------------------- reading the tree


def depth(run: Block) -> int:
    """Number of layers of a run."""
    return run.attention_norm.scale.shape[0]


def layer_count(decoder: Decoder) -> int:
    """Number of layers."""
    return sum(depth(run) for run in decoder.runs)


def group_count(block: Block, kind: str) -> int:
    """Number of groups of a kind (`head`: key/value heads, `channel`: MLP width) in each layer of a run or block."""
    return block.attention.k.kernel.shape[-2] if kind == "head" else block.mlp.down.kernel.shape[-2]


def group_counts(decoder: Decoder, kind: str) -> list[int]:
    """Number of groups of a kind in every layer."""
    return [group_count(run, kind) for run in decoder.runs for _ in range(depth(run))]


def kernels(block: Block) -> dict[str, nnx.Param]:
    """The matrices of a block by name, in the order of the table."""
    found = {}
    for name in groups.matrices():
        part, matrix = name.split(".")
        found[name] = getattr(getattr(block, part), matrix).kernel
    return found


def replace_kernels(block: Block, new: Callable[[str, Array], Array]) -> Block:
    """A block with every matrix W replaced by `new(name, W)`, the rest shared with the original."""

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = groups.array_path(path)
        return new(name.removesuffix(".kernel"), array) if name.endswith(".kernel") else array

    return jax.tree_util.tree_map_with_path(leaf, block)


def named_arrays(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every array of a decoder, or of a tree with its structure, by its dotted path (`runs.0.attention.q.kernel`)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield groups.array_path(path), leaf


def parameter_count(decoder: Decoder) -> int:
    """Number of parameters; tied embeddings count once."""
    return sum(leaf.size for _, leaf in named_arrays(decoder))
