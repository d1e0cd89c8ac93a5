"""Perplexity over windows of token ids."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isfinite, sqrt

import numpy as np
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.evaluation.layerwise import layerwise_losses
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import sequence_losses
from minillm_jax.model.streamed import StreamedDecoder

# Nats per token. The exponential of a larger loss overflows a float64.
LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Perplexity:
    """exp(total negative log likelihood / predictions) over non-overlapping windows.

    Attributes:
      perplexity: the exponential of `loss`.
      tokens: number of predicted tokens.
      window: tokens of a window.
      windows: number of windows.
      loss: mean negative log likelihood of a token, nats.
      stderr: standard error of `perplexity` over the windows, as if they were independent; None for one window.
      fingerprint: the first digits of `Batches.fingerprint`. Perplexities with the same one, of models with the same
        tokenizer, can be compared.
    """

    perplexity: float
    tokens: int
    window: int
    windows: int
    loss: float
    stderr: float | None = None
    fingerprint: str | None = None


def window_losses(
    decoder: Decoder,
    batches: Batches,
    losses: Callable[[Decoder, Int[Array, "b T"]], Float[Array, " b"]] = sequence_losses,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, " B"]:
    """The summed cross entropy of every window, float32, nats.

    Args:
      decoder: the model.
      batches: windows of token ids.
      losses: decoder, tokens -> the summed cross entropy of every sequence; `sequence_losses` by default.
      progress: called with the number of windows done, and of all.
    """
    return batches.collect(lambda batch: losses(decoder, batch.tokens), progress)


def losses_of_windows(
    decoder: Decoder, batches: Batches, progress: Callable[[int, int], None] | None = None
) -> Float[np.ndarray, " B"]:
    """The same of any decoder: layer by layer if its layers are read one at a time."""
    if isinstance(decoder, StreamedDecoder):
        return layerwise_losses(decoder, batches, progress)
    return window_losses(decoder, batches, progress=progress)


def check_dense_loss(loss: float, consequence: str) -> None:
    """Check that the loss of the dense model, with which others are compared, is finite.

    Args:
      loss: the summed loss over the calibration windows, nats.
      consequence: what cannot be done otherwise, for the message.

    Raises:
      InputError: it is not.
    """
    if not isfinite(loss):
        raise InputError(
            f"the loss of the dense model on the calibration windows is {loss:g}, so {consequence}: the weights are "
            "broken, or overflow their type; use --dtype float32"
        )


def perplexity(decoder: Decoder, batches: Batches, progress: Callable[[int, int], None] | None = None) -> Perplexity:
    """Perplexity over windows of token ids: T - 1 predictions a window, totals in float64.

    Raises:
      InputError: the windows have one token and predict nothing, or the loss is not finite.
    """
    if batches.length < 2:
        raise InputError(f"windows of {batches.length} tokens have nothing to predict; use at least 2")
    losses = losses_of_windows(decoder, batches, progress).astype(np.float64)
    loss = float(losses.sum()) / batches.predictions
    value = exponential(loss, "the model")
    error = value * standard_error(losses / (batches.length - 1)) if batches.count > 1 else None
    digits = batches.fingerprint()[:16]
    return Perplexity(value, batches.predictions, batches.length, batches.count, loss, error, digits)


def exponential(loss: float, name: str) -> float:
    """The perplexity of a mean loss.

    Args:
      loss: nats per token.
      name: of the model, for the message.

    Raises:
      InputError: the loss is not finite, or its exponential is not.
    """
    if not loss < LARGEST_LOSS:
        raise InputError(f"{name}'s loss on this text is {loss:g}: its weights are broken, or overflow their type")
    return exp(loss)


def standard_error(values: Float[np.ndarray, " B"]) -> float:
    """The standard error of the mean of at least two values.

    The standard error of a perplexity is that of its loss times the perplexity, to first order.
    """
    return float(values.std(ddof=1)) / sqrt(len(values))
