"""The mixture of experts of a layer: the router chooses experts for every token, and their outputs are mixed.

    x ── router ── choice, weights ─┐
    └─ chosen experts: gate, up ── down ── (· weight, sum over the chosen) ── residual stream

No token is dropped: every chosen expert computes it. The rows of all tokens are cut into blocks of one expert each, and
a loop multiplies one block after the other, so that a row costs the products of its expert alone. `jax.lax.ragged_dot`
multiplies every row by every expert, on CPUs, on GPUs by default, and in what the compiler makes for a TPU
(docs/LOG.md).

    M    tokens of a batch, B · T
    C    chosen experts of a token
    R    rows: a token for each of its chosen experts, M · C
"""

from collections.abc import Mapping
from functools import partial

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.model import ops
from minillm_jax.model.config import Routing
from minillm_jax.model.modules import Experts

# Rows of a block: few on a CPU, where an expert has few; enough on the others to fill a matrix unit.
ROWS_ON_CPU, ROWS_ELSEWHERE = 64, 256

# The matrices `gate`, `up`, `down` of experts and their biases, `gate_bias` ..., by name.
Matrices = Mapping[str, Array]


def mixed(experts: Experts, routing: Routing, activation: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The sum over the chosen experts of every token of weight · expert(x).

    Args:
      experts: the experts of one layer, none in a layer without a mixture of experts.
      routing: how experts are chosen.
      activation: of their gates, a key of `ops.ACTIVATIONS`.
      x: the input of the router and of the experts.
    """
    if not experts.down.shape[0]:
        return jnp.zeros_like(x)
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = route(experts, routing, tokens)
    outputs = of_chosen(experts, routing, activation, tokens, chosen)
    return ops.einsum("MCD,MC->MD", outputs, weights.astype(x.dtype)).reshape(x.shape)


def gated_by(experts: Experts, x: Float[Array, "B T D"], wide: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """The channels of the shared expert times the sigmoid of its gate, if it has one."""
    if experts.shared_gate is None or not experts.shared_gate.size:
        return wide
    return wide * jax.nn.sigmoid(ops.linear("BTD,DO->BTO", x, experts.shared_gate[...]))


def route(
    experts: Experts, routing: Routing, tokens: Float[Array, "M D"]
) -> tuple[Float[Array, "M C"], Int[Array, "M C"]]:
    """Weights and indices of the chosen experts of every token; the weights are float32.

    A model that has fewer experts than it would choose chooses all.

    Args:
      experts: the experts of one layer.
      routing: how experts are chosen.
      tokens: the inputs of the router.
    """
    logits = ops.einsum("MD,DX->MX", tokens, experts.router[...], out=jnp.float32)
    if experts.router_bias is not None:
        logits = logits + jnp.broadcast_to(experts.router_bias[...].astype(jnp.float32), logits.shape)
    scores = jax.nn.softmax(logits, axis=-1) if routing.scores == "softmax" else jax.nn.sigmoid(logits)
    preferred = scores
    if experts.choice_bias is not None:
        preferred = scores + jnp.broadcast_to(experts.choice_bias[...].astype(jnp.float32), scores.shape)
    if routing.groups > 1:
        preferred = jnp.where(in_best_groups(preferred, routing), preferred, -jnp.inf)
    _, chosen = jax.lax.top_k(preferred, min(routing.chosen, scores.shape[-1]))
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if routing.renormalised:
        # A sum of sigmoids may be zero; transformers adds the same number.
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + (1e-20 if routing.scores == "sigmoid" else 0))
    return weights * routing.scale, chosen


def in_best_groups(preferred: Float[Array, "M X"], routing: Routing) -> Array:
    """Whether an expert is in one of the groups that a token chooses among, bool [M, X] (DeepSeek-V3, 2412.19437)."""
    groups = preferred.reshape(len(preferred), routing.groups, -1)
    of_group = jnp.sum(jax.lax.top_k(groups, min(2, groups.shape[-1]))[0], axis=-1)
    _, best = jax.lax.top_k(of_group, routing.chosen_groups)
    mask = jnp.any(jnp.expand_dims(best, -1) == jnp.arange(routing.groups).reshape(1, 1, -1), axis=1)
    return jnp.repeat(mask, groups.shape[-1], axis=-1)


def of_chosen(
    experts: Experts, routing: Routing, activation: str, tokens: Float[Array, "M D"], chosen: Int[Array, "M C"]
) -> Float[Array, "M C D"]:
    """The output of every chosen expert for every token, before its weight."""
    settings = {"routing": routing, "activation": activation}
    of_rows = [partial(by_blocks, largest=rows, **settings) for rows in (ROWS_ON_CPU, ROWS_ELSEWHERE)]
    arrays = matrices(experts), experts.low_rank(), tokens, chosen
    return jax.lax.platform_dependent(*arrays, cpu=of_rows[0], default=of_rows[1])


def matrices(experts: Experts) -> Matrices:
    """The arrays of the experts that have an axis X, by name."""
    names = (f"{name}{suffix}" for suffix in ("", "_bias") for name in ("gate", "up", "down"))
    return {name: getattr(experts, name)[...] for name in names if getattr(experts, name) is not None}


def of_one(expert: Matrices, rows: Float[Array, "R D"], routing: Routing, activation: str) -> Float[Array, "R D"]:
    """The output of one expert, whose arrays lack the axis X."""
    return _map(expert, "down", channels(expert, rows, routing, activation))


def channels(expert: Matrices, rows: Float[Array, "R D"], routing: Routing, activation: str) -> Float[Array, "R W"]:
    """The channels of one expert, the input of its down projection."""
    return gated(_map(expert, "gate", rows), _map(expert, "up", rows), routing, activation)


def weighted_channels(
    experts: Experts,
    routing: Routing,
    activation: str,
    tokens: Float[Array, "M D"],
    choice: tuple[Float[Array, "M C"], Int[Array, "M C"]],
    number: Int[Array, ""],
) -> Float[Array, "M W"]:
    """The channels of expert `number` times its weight, for all tokens; zero where a token has not chosen it. float32.

    Args:
      experts: the experts of one layer.
      routing: how experts are chosen.
      activation: of their gates.
      tokens: the inputs of the router.
      choice: the result of `route`.
      number: of the expert.
    """
    weights, chosen = choice
    expert = {name: array[number] for name, array in matrices(experts).items()}
    weight = jnp.sum(jnp.where(chosen == number, weights, 0.0), axis=-1, keepdims=True)
    return channels(expert, tokens, routing, activation).astype(jnp.float32) * weight


def _map(expert: Matrices, name: str, rows: Float[Array, "R I"]) -> Float[Array, "R O"]:
    """The product with the matrix `name` of an expert, with its low-rank factors and its bias if it has them."""
    outputs = ops.einsum("RI,IO->RO", rows, expert[name])
    if f"{name}_a" in expert:
        narrow = ops.einsum("RI,Ir->Rr", rows, expert[f"{name}_a"])
        outputs = (outputs + ops.einsum("Rr,rO->RO", narrow, expert[f"{name}_b"])).astype(outputs.dtype)
    bias = expert.get(f"{name}_bias")
    return outputs if bias is None else outputs + jnp.broadcast_to(bias, outputs.shape)


def gated(gate: Float[Array, "R W"], up: Float[Array, "R W"], routing: Routing, activation: str) -> Float[Array, "R W"]:
    """The channels of an expert from the outputs of its gate and up projections."""
    if routing.limit is None:
        return ops.ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, routing.limit), jnp.clip(up, -routing.limit, routing.limit)
    return (up + 1) * (gate * jax.nn.sigmoid(routing.slope * gate))


def by_blocks(
    experts: Matrices,
    factors: Matrices,
    tokens: Float[Array, "M D"],
    chosen: Int[Array, "M C"],
    routing: Routing,
    activation: str,
    largest: int,
) -> Float[Array, "M C D"]:
    """`of_chosen` in blocks of at most `largest` rows. The last block of an expert has rows that nobody reads."""
    count, rows = len(experts["down"]), chosen.size
    size = max(1, min(largest, rows // count))
    blocks = -(-rows // size) + min(count, rows)
    expert_of_row = chosen.reshape(-1)
    sizes = jnp.bincount(expert_of_row, length=count)
    padded = -(-sizes // size) * size
    ends = jnp.cumsum(padded)
    # Each row stands behind the earlier rows of the same expert.
    rank = jnp.zeros(rows, jnp.int32).at[jnp.argsort(expert_of_row, stable=True)].set(jnp.arange(rows, dtype=jnp.int32))
    place = rank + (ends - padded - jnp.cumsum(sizes) + sizes)[expert_of_row]
    token_at = jnp.zeros(blocks * size, jnp.int32).at[place].set(jnp.arange(rows, dtype=jnp.int32) // chosen.shape[1])
    expert_of_block = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks) * size, side="right"), count - 1)

    # The factors are taken before the loop, whose gradient would otherwise add an array of all experts in every step.
    factors_of_block = {name: jnp.take(array, expert_of_block, axis=0) for name, array in factors.items()}

    def one_block(block: tuple[Int[Array, ""], Matrices, Int[Array, " size"]]) -> Float[Array, "size D"]:
        index, low_rank, places = block
        expert = {name: jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for name, a in experts.items()}
        return of_one({**expert, **low_rank}, tokens[places], routing, activation)

    outputs = jax.lax.map(one_block, (expert_of_block, factors_of_block, token_at.reshape(blocks, size)))
    return outputs.reshape(blocks * size, -1)[place].reshape(*chosen.shape, -1)
