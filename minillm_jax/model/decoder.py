"""The decoder of all families: embedding, runs of equal layers, final norm, head (letters: see `axis_table`).

Consecutive layers of equal size are one run: their arrays are stacked along a leading axis L, and the forward pass
scans them. A model with layers of unequal size is a longer list of runs. Sizes are read from the arrays.
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
from minillm_jax.model.modules import Angles, Block, Branches, Linear, Norm, depth
from minillm_jax.model.padded_runs import one_run, worth_padding


class Decoder(nnx.Module):
    """A causal language model as a pytree of arrays.

    `head` is None if the embedding is tied. The other optional modules are None if the configuration lacks them.
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
        """The logits of every position, float32. `loss` computes losses without all logits in memory."""
        return project_to_vocabulary(self, final_hidden(self, tokens))


def scan_layers(
    runs: Sequence[Block],
    step: Callable[..., tuple[Any, Any]],
    carry: Any,
    per_layer: Sequence[Any] | None = None,
) -> tuple[Any, list[Any]]:
    """A scan over all layers in order: `carry, out = step(carry, block, layer, extra)`.

    All forward passes over several layers use this function. Each run is one `jax.lax.scan`, so compile time grows with
    the number of runs, and the temporary arrays of a step are freed after the step.

    Args:
      runs: the layers, stacked.
      step: carry, block of one layer, index of the layer (int32 []), slice of `per_layer` -> carry, output.
      carry: the carry of the first step.
      per_layer: for each run, a further pytree whose leaves have the run's leading axis L; or None.

    Returns:
      The last carry, and for each run the stacked outputs of its steps.
    """
    outputs, start = [], 0
    for position, run in enumerate(runs):
        indices = jnp.arange(start, start + depth(run), dtype=jnp.int32)
        stacked = (run, indices, None if per_layer is None else per_layer[position])
        carry, out = jax.lax.scan(lambda carry, layer: step(carry, *layer), carry, stacked)
        outputs.append(out)
        start += depth(run)
    return carry, outputs


def layers_from(
    decoder: Decoder, x: Float[Array, "B T D"], first: Int[Array, ""], length: int
) -> Float[Array, "B T D"]:
    """The residual stream after the last layer, from the stream before layer `first`.

    The layer is an argument of the compiled program, so that all layers share one compilation.

    Args:
      decoder: the model.
      x: the residual stream before layer `first`.
      first: index of a layer; the number of layers for none.
      length: tokens T of a sequence.
    """
    angles, start = rotary_angles(decoder, length), 0
    for run in decoder.runs:

        def step(index: Array, x: Array, run: Block = run) -> Array:
            block = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), run)
            return apply_layer(block, decoder.config, x, angles)[0]

        x = jax.lax.fori_loop(jnp.clip(first - start, 0, depth(run)), depth(run), step, x)
        start += depth(run)
    return x


def learned_positions(decoder: Decoder) -> int | None:
    """Tokens of the longest sequence that a model has learned positions for; None for a model without them."""
    if decoder.position_embedding is None:
        return None
    return decoder.position_embedding.shape[0] - (decoder.config.position_offset or 0)


def embed(
    decoder: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """The residual stream before the first layer, in the promoted type of embedding and layers.

    Args:
      decoder: the model.
      tokens: token ids.
      positions: of the tokens; 0, 1, ... by default.

    Raises:
      InputError: the model has learned positions, and they are fewer than T.
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
        if positions is None and tokens.shape[1] > learned.shape[0]:
            raise InputError(
                f"sequences of {tokens.shape[1]} tokens are too long: "
                f"the model has {learned.shape[0]} learned positions"
            )
        chosen = jnp.expand_dims(learned[: tokens.shape[1]], 0) if positions is None else learned[positions]
        x = x + chosen.astype(dtype)
    return x if decoder.embedding_norm is None else decoder.embedding_norm(x, config)


def rotary_angles(decoder: Decoder, length: int) -> Angles:
    """The rotary angles of all layers for sequences of `length` tokens; None for a model without rotary positions."""
    return angles_at(decoder, jnp.arange(length), length)


def angles_at(decoder: Decoder, positions: Int[Array, "*batch T"], lengths: Int[Array, "*batch"] | int) -> Angles:
    """The rotary angles of all layers at some positions; None for a model without rotary positions.

    Args:
      decoder: the model.
      positions: of the tokens.
      lengths: number of tokens of each sequence, the earlier ones included.
    """
    config = decoder.config
    if config.rope is None:
        return None
    head_size = decoder.runs[0].attention.k.kernel.shape[-1]
    places = positions.astype(jnp.float32)
    angles = ops.rotary_angles(config.rope, head_size, places, lengths)
    if config.rope.query_growth:
        others = ops.query_angles(config.rope, angles, places)
    elif config.other_rope is not None:
        others = ops.rotary_angles(config.other_rope, head_size, places, lengths)
    else:
        return angles
    cos, sin = (jnp.stack(pair) for pair in zip(angles, others, strict=True))
    return cos, sin


def final_hidden(
    decoder: Decoder, tokens: Int[Array, "B T"], branches: Branches | None = None
) -> Float[Array, "B T E"]:
    """The input of the head: the residual stream after the last layer, through `finish`.

    Args:
      decoder: the model.
      tokens: token ids.
      branches: where the tokens stand, if a sequence holds several continuations of a prefix.
    """
    positions = None if branches is None else jnp.asarray(branches.positions)
    length = tokens.shape[1]
    angles = (
        rotary_angles(decoder, length)
        if positions is None
        else angles_at(decoder, positions, jnp.max(positions, axis=1) + 1)
    )

    def step(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
        return apply_layer(block, decoder.config, x, angles, branches)[0], None

    runs = one_run(decoder.runs) if worth_padding(decoder.runs) else decoder.runs
    x, _ = scan_layers(runs, step, embed(decoder, tokens, positions))
    return finish(decoder, x)


def finish(decoder: Decoder, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
    """The final norm and the projection to the embedding size, if the model has them, of the last residual stream."""
    x = x if decoder.final_norm is None else decoder.final_norm(x, decoder.config)
    return x if decoder.project_out is None else decoder.project_out("...D,DE->...E", x)


def project_to_vocabulary(decoder: Decoder, hidden: Float[Array, "*batch E"]) -> Float[Array, "*batch V"]:
    """The logits of the head's input, float32."""
    if decoder.head is None:
        logits = ops.einsum("...E,VE->...V", hidden, decoder.embedding[...], out=jnp.float32)
    else:
        logits = ops.einsum("...E,EV->...V", hidden, decoder.head.kernel[...], out=jnp.float32)
        if decoder.head.bias is not None:
            logits = logits + jnp.broadcast_to(decoder.head.bias[...], logits.shape).astype(jnp.float32)
    config = decoder.config
    return ops.soft_cap(logits if config.logit_scale is None else logits * config.logit_scale, config.logit_cap)
