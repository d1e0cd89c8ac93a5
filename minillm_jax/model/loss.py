"""Next-token cross entropy, in chunks of positions."""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.model.decoder import Decoder, final_hidden, project_to_vocabulary

# Logits alive at once, in elements: 32 MiB of float32, whatever the length and the vocabulary; more only where those of
# one position of all sequences are more.
LOGITS_AT_ONCE = 2**23


def token_losses(
    decoder: Decoder, hidden: Float[Array, "B T E"], tokens: Int[Array, "B T"]
) -> Float[Array, "B predictions"]:
    """Next-token cross entropy of every position but the last, float32 [B, T - 1], in nats.

    The logits of a few positions exist at a time, never a [B, T, V] array; in reverse mode they are computed again.
    A position is taken from all sequences together: they may lie on different devices, and none has to leave its own.
    """
    batch, length, _ = hidden.shape

    @jax.checkpoint
    def one(state_and_target: tuple[Array, Array]) -> Array:
        state, target = state_and_target
        logits = project_to_vocabulary(decoder, state)  # [V]
        return jax.nn.logsumexp(logits) - jnp.take(logits, target)

    states, targets = jnp.moveaxis(hidden[:, :-1], 1, 0), tokens[:, 1:].T
    chunk = max(1, LOGITS_AT_ONCE // (batch * decoder.embedding.shape[0]))
    losses = jax.lax.map(jax.vmap(one), (states, targets), batch_size=min(chunk, length - 1))
    return losses.T


@jax.jit
def sequence_losses(decoder: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, " B"]:
    """Summed cross entropy of each sequence, float32 [B], in nats."""
    return jnp.sum(token_losses(decoder, final_hidden(decoder, tokens), tokens), axis=1)
