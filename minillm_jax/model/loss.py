"""Next-token cross entropy, in chunks of positions."""

from functools import partial

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.model.decoder import Decoder, final_hidden, project_to_vocabulary

# Number of logits in memory at a time: 32 MiB of float32, whatever the length and the vocabulary. The logits of one
# position of all sequences are always in memory together, even if they are more.
LOGITS_AT_ONCE = 2**23


def token_losses(
    decoder: Decoder, hidden: Float[Array, "B T E"], tokens: Int[Array, "B T"], logits_at_once: int = LOGITS_AT_ONCE
) -> Float[Array, "B predictions"]:
    """Next-token cross entropy of every position but the last, float32 [B, T - 1], nats.

    The logits of a few positions exist at a time, never an array [B, T, V]; reverse mode computes them again. A chunk
    holds the same positions of all sequences, so that sequences on different devices stay on their devices.

    Args:
      decoder: the model.
      hidden: hidden states after the last norm, the input of the head.
      tokens: token ids.
      logits_at_once: number of logits in memory at a time, at least one position of all sequences.
    """
    batch, length, _ = hidden.shape

    @jax.checkpoint
    def token_loss(state_and_target: tuple[Array, Array]) -> Array:
        state, target = state_and_target
        logits = project_to_vocabulary(decoder, state)  # [V]
        return jax.nn.logsumexp(logits) - jnp.take(logits, target)

    states, targets = jnp.moveaxis(hidden[:, :-1], 1, 0), tokens[:, 1:].T
    chunk = max(1, logits_at_once // (batch * decoder.embedding.shape[0]))
    losses = jax.lax.map(jax.vmap(token_loss), (states, targets), batch_size=min(chunk, length - 1))
    return losses.T


@partial(jax.jit, static_argnames="logits_at_once")
def sequence_losses(
    decoder: Decoder, tokens: Int[Array, "B T"], logits_at_once: int = LOGITS_AT_ONCE
) -> Float[Array, " B"]:
    """Summed next-token cross entropy of each sequence, float32, nats; the arguments are those of `token_losses`."""
    return jnp.sum(token_losses(decoder, final_hidden(decoder, tokens), tokens, logits_at_once), axis=1)
