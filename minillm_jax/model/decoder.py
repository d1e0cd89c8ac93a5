"""The one decoder: embedding, runs of equal blocks, final norm, head (letters: see `axis_table`).

The modules are plain pytrees of arrays. Consecutive layers of equal shape are stacked along a leading axis L and
scanned; a model pruned unequally is a longer list of such runs behind the same interface. Sizes are read off the
arrays everywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.errors import InputError
from minillm_jax.model import ops
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.modules import Angles, Block, Linear, Norm, depth


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
        return apply_layer(block, decoder.config, x, angles)[0], None

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
