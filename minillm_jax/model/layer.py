"""One layer's forward, top to bottom: the attention sublayer, the MLP sublayer (letters: see `axis_table`).

    x ─┬─ norm ─ q, k, v ─ rotary positions ─ attention ─ output projection ─ (+) ─┬─ norm ─ gate, up ─ down ─ (+) ─
       └───────────────────────── residual stream ─────────────────────────────┘   └─── residual stream ───────┘

In a mixture of experts, `experts` adds its output to the residual stream beside that of gate, up and down, which are
then the shared expert. The configuration says which of these parts a family has and where its norms stand. The code
branches on the configuration and on the arrays that exist, never on the family.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float

from minillm_jax.model import experts, ops
from minillm_jax.model.attention import branch_mask, cached_mask, causal_mask, grouped_attention
from minillm_jax.model.config import DecoderConfig
from minillm_jax.model.modules import MLP, Angles, Attention, Block, Branches, LayerCache

# The sublayers of a layer, in the order of the forward pass. Each adds one term to the residual stream.
SUBLAYERS = ("attention", "mlp")


class Sublayer(NamedTuple):
    """What one sublayer computes.

    Attributes:
      stream: the residual stream after the sublayer.
      total: the residual sum before a norm that follows it; equal to `stream` in models without such a norm.
      base: the first term of the residual sum: the residual stream before the sublayer, or its norm (a BLOOM option);
        in a mixture of experts, with the output of the experts.
      inputs: the input of each of the sublayer's matrices, by name.
      cache: with the keys and values of the new tokens, of an attention sublayer that was given one.
    """

    stream: Float[Array, "B T D"]
    total: Float[Array, "B T D"]
    base: Float[Array, "B T D"]
    inputs: dict[str, Float[Array, "B T ..."]]
    cache: LayerCache | None = None


def apply_layer(
    block: Block, config: DecoderConfig, x: Float[Array, "B T D"], angles: Angles, branches: Branches | None = None
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T ..."]]]:
    """One layer.

    Args:
      block: the layer's arrays, without a leading axis L.
      config: how the decoder computes.
      x: the residual stream before the layer.
      angles: the rotary angles of `decoder.rotary_angles`.
      branches: where the tokens stand, if a sequence holds several continuations of a prefix.

    Returns:
      The residual stream after the layer, and the input of every matrix by name. The compiler removes unused inputs.
    """
    block = whole(block, config)
    with jax.named_scope("attention"):
        attention = attention_sublayer(block, config, x, angles, branches)
    with jax.named_scope("mlp"):
        mlp = mlp_sublayer(block, config, x, attention.stream)
    return mlp.stream, attention.inputs | mlp.inputs


def whole(block: Block, config: DecoderConfig) -> Block:
    """A layer whose arrays lie on every device that computes with them."""
    return block if config.whole_layer is None else config.whole_layer(block)


def attention_sublayer(
    block: Block,
    config: DecoderConfig,
    x: Float[Array, "B T D"],
    angles: Angles,
    context: LayerCache | Branches | None = None,
) -> Sublayer:
    """The attention sublayer of one layer.

    Args:
      block: the layer's arrays.
      config: how the decoder computes.
      x: the residual stream before the layer.
      angles: the rotary angles of the tokens.
      context: keys and values of earlier tokens, if x holds only the tokens after them; or where the tokens stand, if
        a sequence holds several continuations of a prefix.
    """
    h = x if config.norm_after or block.attention_norm is None else block.attention_norm(x, config)
    mixed, cache = attend(block.attention, config, h, angles, context)
    update = block.attention.o("BTNH,NHD->BTD", mixed)
    if block.attention_post_norm is not None:
        update = block.attention_post_norm(update, config)
    base = h if config.residual_from_norm else x
    total = base + scaled(update, config).astype(x.dtype)
    stream = block.attention_norm(total, config) if config.norm_after and block.attention_norm is not None else total
    inputs = {"attention.q": h, "attention.k": h, "attention.v": h, "attention.o": mixed}
    return Sublayer(stream, total, base, inputs, cache)


def attend(
    attention: Attention,
    config: DecoderConfig,
    h: Float[Array, "B T D"],
    angles: Angles,
    context: LayerCache | Branches | None,
) -> tuple[Float[Array, "B T N H"], LayerCache | None]:
    """The values mixed by attention: the input of the output projection; and the cache with the new tokens."""
    q = attention.q("BTD,DNH->BTNH", h)
    k = attention.k("BTD,DKH->BTKH", h)
    v = attention.v("BTD,DKH->BTKH", h)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q, config), attention.k_norm(k, config)
    if attention.q_joint_norm is not None and attention.k_joint_norm is not None:
        q, k = attention.q_joint_norm.of_heads(q, config), attention.k_joint_norm.of_heads(k, config)
    if angles is not None and config.rope is not None:
        if attention.rope is not None:
            cos, sin = (jnp.take(angle, attention.rope[...], axis=0) for angle in angles)
            angles = cos, sin
        cos, sin = angles
        turned = ((cos[1], sin[1]), (cos[0], sin[0])) if config.rope.query_growth else (angles, angles)
        q, k = (ops.rotate(heads, by, config.rope.interleaved) for heads, by in zip((q, k), turned, strict=True))
    window = None if attention.window is None else attention.window[...]
    slopes = None if attention.slopes is None else attention.slopes[...]
    cache, positions = None, None
    if context is None:
        mask = causal_mask(h.shape[1], window)
    elif isinstance(context, Branches):
        positions, numbers = (jnp.asarray(array) for array in context)
        mask = branch_mask(positions, numbers, window)
    else:
        cache = context.extended(k, v)
        k, v = (jnp.take(array, cache.layer, axis=0) for array in (cache.keys, cache.values))
        mask = cached_mask(cache.positions, k.shape[1], window)
    sinks = None if attention.sinks is None else attention.sinks[...]
    return grouped_attention(q, k, v, mask, config.query_scale, config.attention_cap, slopes, positions, sinks), cache


def mlp_sublayer(
    block: Block, config: DecoderConfig, x: Float[Array, "B T D"], after: Float[Array, "B T D"]
) -> Sublayer:
    """The MLP sublayer of one layer.

    Args:
      block: the layer's arrays.
      config: how the decoder computes.
      x: the residual stream before the layer; the MLP reads it in models with parallel sublayers.
      after: the residual stream after the attention sublayer; the MLP reads it in all other models.
    """
    m = x if config.parallel else after
    norm = block.attention_norm if config.shared_norm else block.mlp_norm
    m = m if config.norm_after or norm is None else norm(m, config)
    wide = widen(block.mlp, config, m)
    base = m if config.residual_from_norm else after
    if block.experts is not None and config.routing is not None:
        wide = experts.gated_by(block.experts, m, wide)
        # The sum begins with the experts, so that `mlp.down` alone makes up the difference to `total`.
        base = base + scaled(experts.mixed(block.experts, config.routing, config.activation, m), config).astype(x.dtype)
    update = block.mlp.down("BTF,FD->BTD", wide)
    if block.mlp_post_norm is not None:
        update = block.mlp_post_norm(update, config)
    total = base + scaled(update, config).astype(x.dtype)
    stream = block.mlp_norm(total, config) if config.norm_after and block.mlp_norm is not None else total
    gate = {} if block.mlp.gate is None else {"mlp.gate": m}
    return Sublayer(stream, total, base, gate | {"mlp.up": m, "mlp.down": wide})


def scaled(update: Float[Array, "B T D"], config: DecoderConfig) -> Float[Array, "B T D"]:
    """The output of a sublayer times the factor of the residual sum, if the model has one."""
    if config.residual_scale is None:
        return update
    return (update.astype(jnp.float32) * config.residual_scale).astype(update.dtype)


def widen(mlp: MLP, config: DecoderConfig, m: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
    """The MLP's channels: activation(gate(m)) * up(m), or activation(up(m)) without a gate."""
    activation = ops.ACTIVATIONS[config.activation]
    up = mlp.up("BTD,DF->BTF", m)
    return activation(up) if mlp.gate is None else activation(mlp.gate("BTD,DF->BTF", m)) * up
