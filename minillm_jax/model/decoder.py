"""The one decoder: embedding, runs of equal blocks, final norm, head (letters: see `axis_table`).

The modules are plain pytrees of arrays. Consecutive layers of equal shape are stacked along a leading axis L and
scanned; a model pruned unequally is a longer list of such runs behind the same interface. Sizes are read off the
arrays everywhere.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from minillm_jax.errors import InputError
from minillm_jax.model import axis_table, ops
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.modules import MLP, Angles, Attention, Block, Linear, Norm

# The window of a layer that has none, in a model where others have one: no sequence fills it.
NO_WINDOW = np.iinfo(np.int32).max


class Decoder(nnx.Module):
    """A causal language model as a pytree: the embedding [V, E] and what goes with it, runs of blocks, the head.

    `head` is None where the embedding is tied; the other optional parts are None where the configuration has none.
    """

    def __init__(
        self,
        config: DecoderConfig,
        embedding: Any,
        runs: Sequence[Block],
        *,
        final_norm: Norm | None,
        head: Linear | None,
        position_embedding: Any = None,
        embedding_norm: Norm | None = None,
        project_in: Linear | None = None,
        project_out: Linear | None = None,
    ):
        self.config = config
        self.embedding = nnx.Param(embedding)
        self.position_embedding = None if position_embedding is None else nnx.Param(position_embedding)
        self.project_in, self.project_out = project_in, project_out
        self.embedding_norm = embedding_norm
        self.runs = nnx.List(runs)
        self.final_norm = final_norm
        self.head = head

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of every position. For losses see `loss`, which never holds them all."""
        return project_to_vocabulary(self, final_hidden(self, tokens))


def with_runs(decoder: Decoder, runs: Sequence[Block]) -> Decoder:
    """A decoder with other layers; the rest is shared with the original."""
    position = decoder.position_embedding
    return Decoder(
        decoder.config,
        decoder.embedding[...],
        runs,
        final_norm=decoder.final_norm,
        head=decoder.head,
        position_embedding=None if position is None else position[...],
        embedding_norm=decoder.embedding_norm,
        project_in=decoder.project_in,
        project_out=decoder.project_out,
    )


def build(config: DecoderConfig, sizes: Sizes, dtype: DTypeLike = jnp.float32) -> Decoder:
    """The decoder with `jax.ShapeDtypeStruct` leaves: what loading, initialising and restoring fill in.

    Data of the layers (windows, slopes) follow from the sizes and are there already, as NumPy arrays.

    Example:
      >>> abstract = build(config, sizes)
      >>> decoder = initialise(abstract, jax.random.key(0))
    """
    letters = {"V": sizes.V, "D": sizes.D, "H": sizes.H, "E": sizes.E or sizes.D, "M": sizes.M}

    def leaves(table: Mapping[str, str], letters: dict[str, int], *stack: int) -> dict[str, Any]:
        return {
            path: jax.ShapeDtypeStruct((*stack, *axis_table.shape(axes, letters)), dtype)
            for path, axes in table.items()
            if config.has_array(path)
        }

    runs = []
    for (n, k, f), equal in groupby(sizes.layers, lambda layer: (layer.N, layer.K, layer.F)):
        run = list(equal)
        arrays = leaves(axis_table.BLOCK_AXES, letters | {"N": n, "K": k, "F": f}, len(run))
        runs.append(_build_block(arrays | _layer_data(config, run)))
    return assemble(config, leaves(axis_table.OUTER_AXES, letters), runs)


def _layer_data(config: DecoderConfig, run: Sequence[LayerSizes]) -> dict[str, np.ndarray]:
    """Windows and slopes of a run's layers, stacked, where the configuration has them."""
    found: dict[str, np.ndarray] = {}
    if config.windowed:
        found["attention.window"] = np.asarray([layer.window or NO_WINDOW for layer in run], np.int32)
    if config.alibi_heads is not None:
        found["attention.slopes"] = np.asarray([layer.slopes for layer in run], np.float32)
    return found


def assemble(config: DecoderConfig, outer: Mapping[str, Any], runs: Sequence[Block]) -> Decoder:
    """A decoder from the arrays outside its layers, by the names of the table, and its runs."""
    return Decoder(
        config,
        outer["embedding"],
        runs,
        final_norm=_norm(outer, "final_norm") if config.final_norm else None,
        head=_linear(outer, "head"),
        position_embedding=outer.get("position_embedding"),
        embedding_norm=_norm(outer, "embedding_norm") if config.embedding_norm else None,
        project_in=_linear(outer, "project_in"),
        project_out=_linear(outer, "project_out"),
    )


def _linear(arrays: Mapping[str, Any], name: str) -> Any:
    kernel = arrays.get(f"{name}.kernel")
    return None if kernel is None else Linear(kernel, arrays.get(f"{name}.bias"))


def _norm(arrays: Mapping[str, Any], name: str) -> Norm:
    return Norm(arrays.get(f"{name}.scale"), arrays.get(f"{name}.bias"))


def _build_block(arrays: Mapping[str, Any]) -> Block:
    def optional_norm(name: str) -> Norm | None:
        return _norm(arrays, name) if f"{name}.scale" in arrays else None

    q, k, v, o = (_linear(arrays, f"attention.{name}") for name in "qkvo")
    q_norm, k_norm = optional_norm("attention.q_norm"), optional_norm("attention.k_norm")
    data = (arrays.get("attention.window"), arrays.get("attention.slopes"))
    gate, up, down = (_linear(arrays, f"mlp.{name}") for name in ("gate", "up", "down"))
    return Block(
        _norm(arrays, "attention_norm"),
        Attention(q, k, v, o, q_norm, k_norm, *data),
        _norm(arrays, "mlp_norm"),
        MLP(gate, up, down),
        optional_norm("attention_post_norm"),
        optional_norm("mlp_post_norm"),
    )


def initialise(abstract: Decoder, key: Array, deviation: float = 0.02) -> Decoder:
    """Random weights for an abstract decoder: normal matrices, norms that change nothing, zero biases."""
    unit = 0.0 if abstract.config.norm == "rms_plus_one" else 1.0

    def fill(path: jax.tree_util.KeyPath, leaf: Any) -> Array:
        name = axis_table.array_path(path)
        if axis_table.is_data(name):
            return jnp.asarray(leaf)
        if name.endswith(".scale"):
            return jnp.full(leaf.shape, unit, leaf.dtype)
        if name.endswith(".bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        keys.append(jax.random.fold_in(key, len(keys)))
        return (deviation * jax.random.normal(keys[-1], leaf.shape)).astype(leaf.dtype)

    keys: list[Array] = []
    return jax.tree_util.tree_map_with_path(fill, abstract)


# ------------------------------------------------------------------------------------------------------- forward


class Half(NamedTuple):
    """What one half of a layer, the attention or the MLP, makes of the residual stream.

    Attributes:
      stream: the residual stream after it.
      total: what it adds to and what it adds, summed: the stream, but for models with a norm after the sum.
      base: what it adds to: the stream before it, but in an option of BLOOM.
      inputs: the input of each of its matrices, by name.
    """

    stream: Float[Array, "B T D"]
    total: Float[Array, "B T D"]
    base: Float[Array, "B T D"]
    inputs: dict[str, Float[Array, "B T ..."]]


def attention_half(block: Block, config: DecoderConfig, x: Float[Array, "B T D"], angles: Angles) -> Half:
    """The attention of one layer."""
    h = x if config.norm_after else block.attention_norm(x, config)
    update, mixed = block.attention(h, config, angles)
    if block.attention_post_norm is not None:
        update = block.attention_post_norm(update, config)
    base = h if config.residual_from_norm else x
    total = base + update.astype(x.dtype)
    stream = block.attention_norm(total, config) if config.norm_after else total
    return Half(stream, total, base, {"attention.q": h, "attention.k": h, "attention.v": h, "attention.o": mixed})


def mlp_half(block: Block, config: DecoderConfig, x: Float[Array, "B T D"], after: Float[Array, "B T D"]) -> Half:
    """The MLP of one layer.

    Args:
      block: the layer.
      config: how the decoder computes.
      x: the residual stream before the layer, which the MLP reads in models with parallel halves.
      after: the stream after the layer's attention.
    """
    m = x if config.parallel else after
    m = m if config.norm_after else block.mlp_norm(m, config)
    update, wide = block.mlp(m, config)
    if block.mlp_post_norm is not None:
        update = block.mlp_post_norm(update, config)
    base = m if config.residual_from_norm else after
    total = base + update.astype(x.dtype)
    stream = block.mlp_norm(total, config) if config.norm_after else total
    return Half(stream, total, base, {"mlp.gate": m, "mlp.up": m, "mlp.down": wide})


def apply_block(
    block: Block, config: DecoderConfig, x: Float[Array, "B T D"], angles: Angles
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T ..."]]]:
    """One layer.

    Returns:
      The residual stream after it, and the input of every matrix by name (free under jit when it is not used).
    """
    with jax.named_scope("attention"):
        attention = attention_half(block, config, x, angles)
    with jax.named_scope("mlp"):
        mlp = mlp_half(block, config, x, attention.stream)
    inputs = attention.inputs | mlp.inputs
    return mlp.stream, {name: inputs[name] for name in kernels(block)}


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
    """The residual stream before the first layer, in the common type of embedding and layers.

    Raises:
      InputError: the model has learned positions, and fewer of them than T.
    """
    config = decoder.config
    dtype = jnp.promote_types(decoder.embedding.dtype, decoder.runs[0].attention.q.kernel.dtype)
    x = jnp.take(decoder.embedding[...], tokens, axis=0).astype(dtype)
    if config.embedding_scale is not None:
        x = x * jnp.asarray(config.embedding_scale, decoder.embedding.dtype).astype(dtype)
    if decoder.project_in is not None:
        x = decoder.project_in("BTE,ED->BTD", x).astype(dtype)
    if decoder.position_embedding is not None and config.position_offset is not None:
        learned = decoder.position_embedding[config.position_offset :]
        if tokens.shape[1] > learned.shape[0]:
            raise InputError(
                f"sequences of {tokens.shape[1]} tokens are too long: "
                f"the model has {learned.shape[0]} learned positions"
            )
        x = x + jnp.expand_dims(learned[: tokens.shape[1]], 0).astype(dtype)
    return x if decoder.embedding_norm is None else decoder.embedding_norm(x, config)


def rotary_angles(decoder: Decoder, length: int) -> Angles:
    """What every layer shares for one sequence length: rotary angles, or None."""
    rope = decoder.config.rope
    if rope is None:
        return None
    return ops.rotary_angles(rope, decoder.runs[0].attention.k.kernel.shape[-1], length)


def final_hidden(decoder: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """The residual stream after the last layer, normed and projected as the head expects it."""
    angles = rotary_angles(decoder, tokens.shape[1])

    def step(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
        return apply_block(block, decoder.config, x, angles)[0], None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens))
    return finish(decoder, x)


def finish(decoder: Decoder, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
    """The stream after the last layer as the head expects it: final norm and projection, where there are any."""
    x = x if decoder.final_norm is None else decoder.final_norm(x, decoder.config)
    return x if decoder.project_out is None else decoder.project_out("...D,DE->...E", x)


def project_to_vocabulary(decoder: Decoder, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
    """Float32 logits of final hidden states."""
    if decoder.head is None:
        logits = ops.einsum("...E,VE->...V", hidden, decoder.embedding[...], out=jnp.float32)
    else:
        logits = ops.einsum("...E,EV->...V", hidden, decoder.head.kernel[...], out=jnp.float32)
    return ops.soft_cap(logits, decoder.config.logit_cap)


# --------------------------------------------------------------------------------------------- reading the tree


def depth(run: Block) -> int:
    """Number of layers of a run."""
    return run.attention.q.kernel.shape[0]


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


def run_letters(run: Block) -> dict[str, int]:
    """The size of every axis letter of a run's layers."""
    d, n, h = run.attention.q.kernel.shape[1:]
    return {"D": d, "N": n, "H": h, "K": run.attention.k.kernel.shape[2], "F": run.mlp.down.kernel.shape[1]}


def sizes_of(decoder: Decoder) -> Sizes:
    """The sizes that `build` would make this decoder from, data of the layers included."""
    outer, head_size = outer_letters(decoder), run_letters(decoder.runs[0])["H"]
    layers = tuple(layer for run in decoder.runs for layer in _layers_of(run))
    return Sizes(outer["V"], outer["D"], head_size, layers, outer["E"], outer["M"])


def _layers_of(run: Block) -> Iterator[LayerSizes]:
    attention, letters = run.attention, run_letters(run)
    for index in range(depth(run)):
        window = None if attention.window is None else int(attention.window[index])
        slopes = () if attention.slopes is None else tuple(float(slope) for slope in attention.slopes[index])
        own = None if window == NO_WINDOW else window
        yield LayerSizes(letters["N"], letters["K"], letters["F"], own, slopes)


def group_count(block: Block, kind: str) -> int:
    """Number of groups of a kind (`head`: key/value heads, `query`: query heads, `channel`: MLP width) of a layer."""
    match kind:
        case "head":
            return block.attention.k.kernel.shape[-2]
        case "query":
            return block.attention.q.kernel.shape[-2]
    return block.mlp.down.kernel.shape[-2]


def part_count(block: Block, kind: str) -> int:
    """In how many parts the groups of a kind lie, from each of which equally many stay: query heads by key/value."""
    return group_count(block, "head") if kind == "query" else 1


def group_counts(decoder: Decoder, kind: str) -> list[int]:
    """Number of groups of a kind in every layer."""
    return [group_count(run, kind) for run in decoder.runs for _ in range(depth(run))]


def part_counts(decoder: Decoder, kinds: Iterable[str]) -> dict[str, list[int]]:
    """`part_count` of every layer, for each kind."""
    return {kind: [part_count(run, kind) for run in decoder.runs for _ in range(depth(run))] for kind in kinds}


def kernels(block: Block) -> dict[str, nnx.Param]:
    """The matrices that a block has, by name, in the order of the table."""
    found = {}
    for name in axis_table.matrices():
        part, matrix = name.split(".")
        linear = getattr(getattr(block, part), matrix)
        if linear is not None:
            found[name] = linear.kernel
    return found


def replace_kernels(block: Block, new: Callable[[str, Array], Array]) -> Block:
    """A block with every matrix W replaced by `new(name, W)`, the rest shared with the original."""

    def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
        name = axis_table.array_path(path)
        return new(name.removesuffix(".kernel"), array) if name.endswith(".kernel") else array

    return jax.tree_util.tree_map_with_path(leaf, block)


def named_arrays(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every array of a decoder, or of a tree with its structure, by its dotted path (`runs.0.attention.q.kernel`)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield axis_table.array_path(path), leaf


def parameter_count(decoder: Decoder) -> int:
    """Number of parameters; tied embeddings count once."""
    return sum(leaf.size for path, leaf in named_arrays(decoder) if not axis_table.is_data(path))
