"""Next-token cross entropy, and the divergence from the next-token probabilities of another model, by chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.model.decoder import Decoder, final_hidden, finish, project_to_vocabulary

# Number of logits in memory at a time: 32 MiB of float32, whatever the length and the vocabulary. The logits of one
# position of all sequences are always in memory together, even if they are more.
LOGITS_AT_ONCE = 2**23

# Tokens of the dense model whose probabilities are kept at each position; the others count as one.
TOP = 64


def map_logits(
    decoder: Decoder,
    hidden: Float[Array, "B P E"],
    function: Callable[..., Any],
    *per_position: Any,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Any:
    """`function(logits [V], *slices)` of every position, as arrays [B, P, ...].

    The logits of a few positions exist at a time, never an array [B, P, V]; reverse mode computes them again. A chunk
    holds the same positions of all sequences, so that sequences on different devices stay on their devices.

    Args:
      decoder: the model.
      hidden: hidden states after the last norm, the input of the head.
      function: of the logits of one position, float32, and of the slices of `per_position` there; returns a pytree.
      per_position: further pytrees of arrays [B, P, ...].
      logits_at_once: number of logits in memory at a time, at least one position of all sequences.
    """
    batch, positions, _ = hidden.shape

    @jax.checkpoint
    def one(arguments: tuple[Any, ...]) -> Any:
        state, *slices = arguments
        return function(project_to_vocabulary(decoder, state), *slices)

    chunk = max(1, logits_at_once // (batch * decoder.embedding.shape[0]))
    by_position = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (hidden, *per_position))
    results = jax.lax.map(jax.vmap(one), by_position, batch_size=min(chunk, positions))
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), results)


def token_losses(
    decoder: Decoder, hidden: Float[Array, "B T E"], tokens: Int[Array, "B T"], logits_at_once: int = LOGITS_AT_ONCE
) -> Float[Array, "B predictions"]:
    """Next-token cross entropy of every position but the last, float32 [B, T - 1], nats.

    Args:
      decoder: the model.
      hidden: hidden states after the last norm, the input of the head.
      tokens: token ids.
      logits_at_once: see `map_logits`.
    """
    return map_logits(decoder, hidden[:, :-1], cross_entropy, tokens[:, 1:], logits_at_once=logits_at_once)


def cross_entropy(logits: Float[Array, " V"], target: Int[Array, ""]) -> Float[Array, ""]:
    """Cross entropy of one token, nats."""
    return jax.nn.logsumexp(logits) - jnp.take(logits, target)


def kl_divergence(known: Float[Array, " X"], logits: Float[Array, " X"]) -> Float[Array, ""]:
    """KL(p ‖ q), nats, of two distributions by their logits: `known` of p, `logits` of q."""
    log_p, log_q = jax.nn.log_softmax(known), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


@partial(jax.jit, static_argnames="logits_at_once")
def sequence_losses(
    decoder: Decoder, tokens: Int[Array, "B T"], logits_at_once: int = LOGITS_AT_ONCE
) -> Float[Array, " B"]:
    """Summed next-token cross entropy of each sequence, float32, nats; the arguments are those of `token_losses`."""
    return jnp.sum(token_losses(decoder, final_hidden(decoder, tokens), tokens, logits_at_once), axis=1)


@jax.jit
def losses_of_stream(decoder: Decoder, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, " B"]:
    """The same from the last residual stream; the layers of the decoder are not read."""
    return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=1)


class Top(NamedTuple):
    """The most probable next tokens of the dense model at every position but the last.

    Attributes:
      ids: token ids.
      logs: logarithms of their probabilities, float32.
    """

    ids: Int[Array, "B P X"]
    logs: Float[Array, "B P X"]


def top_tokens(decoder: Decoder, hidden: Float[Array, "B T E"], count: int = TOP) -> Top:
    """The `count` most probable next tokens at every position but the last, or all of a smaller vocabulary.

    Args:
      decoder: the dense model.
      hidden: hidden states after the last norm, the input of the head.
      count: number of tokens X.
    """

    def top(logits: Float[Array, " V"]) -> Top:
        values, ids = jax.lax.top_k(logits, min(count, len(logits)))
        return Top(ids, values - jax.nn.logsumexp(logits))

    return map_logits(decoder, hidden[:, :-1], top)


def token_divergences(
    decoder: Decoder, hidden: Float[Array, "B T E"], tokens: Int[Array, "B T"], dense: Top
) -> tuple[Float[Array, "B predictions"], Float[Array, "B predictions"]]:
    """Cross entropy, and the divergence from the dense model, of every position but the last, float32, nats.

    The divergence is KL(dense ‖ decoder) over the kept tokens of the dense model and the rest of the vocabulary as one
    further token. By the log-sum inequality this is at most the divergence over the whole vocabulary.

    Args:
      decoder: the pruned model; its head is that of the dense model or of its size.
      hidden: hidden states of the pruned model after its last norm.
      tokens: token ids.
      dense: from `top_tokens`, of the same tokens.
    """

    def both(logits: Float[Array, " V"], target: Int[Array, ""], top: Top) -> tuple[Array, Array]:
        log_q = jnp.take(logits, top.ids) - jax.nn.logsumexp(logits)
        p, rest = jnp.exp(top.logs), rest_of(top.logs)
        divergence = jnp.sum(p * (top.logs - log_q)) + rest * (jnp.log(rest) - jnp.log(rest_of(log_q)))
        return cross_entropy(logits, target), divergence

    return map_logits(decoder, hidden[:, :-1], both, tokens[:, 1:], dense)


def rest_of(logs: Float[Array, " X"]) -> Float[Array, ""]:
    """The probability of all tokens but those whose logarithms are given; at least the rounding error of a sum."""
    return jnp.maximum(1 - jnp.sum(jnp.exp(logs)), 1e-6)
