"""Cross entropy in chunks, and perplexity."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.devices.sharding import data_size, gather, of, shard_batch
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder, final_hidden, project_to_vocabulary

# Logits alive at once, in elements: 32 MiB of float32, whatever the length and the vocabulary; more only where those of
# one position of all sequences are more.
LOGITS_AT_ONCE = 2**23

# Tokens of one forward pass when nothing else is asked for.
TOKENS_AT_ONCE = 4096


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


def batches(
    windows: Int[np.ndarray, "B T"], at_once: int = TOKENS_AT_ONCE, devices: int = 1
) -> list[Int[np.ndarray, "b T"]]:
    """Windows cut into batches, in order, of at most two sizes besides a last one that does not divide.

    Args:
      windows: all of them.
      at_once: tokens of a batch on each device, at least one window.
      devices: how many share a batch; sizes are multiples of it, and what is left over comes last.
    """
    count, length = windows.shape
    whole = count - count % devices
    per_batch = devices * max(1, at_once // length)
    even = np.array_split(windows[:whole].reshape(-1, devices, length), max(1, -(-whole // per_batch)))
    return [batch for batch in (*(part.reshape(-1, length) for part in even), windows[whole:]) if len(batch)]


def window_losses(
    decoder: Decoder,
    windows: Int[np.ndarray, "B T"],
    losses: Callable[[Decoder, Int[Array, "b T"]], Float[Array, " b"]] = sequence_losses,
) -> Float[np.ndarray, " B"]:
    """The summed cross entropy of every window, float32, batch by batch over the devices of the mesh.

    Args:
      decoder: the model.
      windows: of token ids.
      losses: of a batch; those of the model as it is by default.
    """
    devices = of(decoder)
    cut = batches(windows, devices=data_size(devices))
    return np.concatenate([gather(losses(decoder, shard_batch(batch, devices))) for batch in cut])


# In nats; its exponential is still a number.
LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Perplexity:
    """exp(total negative log likelihood / predictions) over non-overlapping windows."""

    perplexity: float
    tokens: int
    window: int
    windows: int
    loss: float


def perplexity(
    decoder: Decoder, windows: Int[np.ndarray, "B T"], progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Perplexity over windows of token ids: T - 1 predictions a window, totals in float64.

    Raises:
      InputError: windows of one token predict nothing; or the loss is not finite.
    """
    if windows.shape[1] < 2:
        raise InputError(f"windows of {windows.shape[1]} tokens have nothing to predict; use at least 2")
    total, done, mesh = 0.0, 0, of(decoder)
    for batch in batches(windows, devices=data_size(mesh)):
        total += float(np.sum(gather(sequence_losses(decoder, shard_batch(batch, mesh))), dtype=np.float64))
        done += len(batch)
        if progress is not None:
            progress(done, len(windows))
    count, length = windows.shape
    predictions = count * (length - 1)
    loss = total / predictions
    if not loss < LARGEST_LOSS:
        raise InputError(f"the model's loss on this text is {loss:g}: its weights are broken, or overflow their type")
    return Perplexity(exp(loss), predictions, length, count, loss)
