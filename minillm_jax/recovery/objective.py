"""The loss of a recovery: cross entropy of the text, divergence from a teacher, or both.

    loss = a · T² · KL(teacher ‖ student at temperature T) + (1 - a) · CE

CE and KL are means over the counted tokens of a batch (Hinton et al., arXiv 1503.02531). The logits of a few positions
exist at a time (`model.loss.map_logits`).
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.model.decoder import Decoder, final_hidden, project_to_vocabulary
from minillm_jax.model.loss import Top, cross_entropy, kl_divergence, map_logits, rest_of


class Sequences(NamedTuple):
    """Sequences to train on, or to measure a loss on.

    Attributes:
      tokens: token ids, padded on the right.
      counted: whether the loss counts the prediction of the token at this place; never at the first place.
    """

    tokens: Int[Array, "B T"]
    counted: Bool[Array, "B T"]


class Weights(NamedTuple):
    """The numbers of the loss, which may change from update to update.

    Attributes:
      share: share a of the divergence.
      temperature: T.
    """

    share: Float[Array, ""] | float
    temperature: Float[Array, ""] | float


class Sums(NamedTuple):
    """Sums over the counted tokens, float32, nats.

    Attributes:
      cross_entropy: of the next token.
      divergence: from the teacher; zero without one.
    """

    cross_entropy: Float[Array, ""]
    divergence: Float[Array, ""]


def sums(
    decoder: Decoder,
    hidden: Float[Array, "B T E"],
    sequences: Sequences,
    teacher: Decoder | Top | None = None,
    temperature: Float[Array, ""] | float = 1.0,
) -> Sums:
    """The losses of a batch.

    Padding follows all tokens of its sequence. Attention is causal, so padding reaches no counted prediction.

    Args:
      decoder: embedding and head of the student.
      hidden: the student's input of the head.
      sequences: the batch.
      teacher: the dense model, or its most probable tokens at every position but the last.
      temperature: T of the divergence.
    """
    tokens, counted = sequences
    targets = tokens[:, 1:]
    if teacher is None:
        losses = map_logits(decoder, hidden[:, :-1], cross_entropy, targets)
        return Sums(_total(losses, counted), jnp.float32(0))
    if isinstance(teacher, Top):

        def both(logits: Array, target: Array, top: Top) -> tuple[Array, Array]:
            return cross_entropy(logits, target), _divergence_of_top(top, logits, temperature)

        found = map_logits(decoder, hidden[:, :-1], both, targets, teacher)
    else:
        dense = jax.lax.stop_gradient(final_hidden(teacher, tokens))

        def against(logits: Array, target: Array, state: Array) -> tuple[Array, Array]:
            known = project_to_vocabulary(teacher, state)
            return cross_entropy(logits, target), kl_divergence(known / temperature, logits / temperature)

        found = map_logits(decoder, hidden[:, :-1], against, targets, dense[:, :-1])
    return Sums(*(_total(values, counted) for values in found))


def loss(found: Sums, weights: Weights) -> Float[Array, ""]:
    """The summed loss of the module's formula."""
    temperature = jnp.square(weights.temperature)
    return weights.share * temperature * found.divergence + (1 - weights.share) * found.cross_entropy


def _total(values: Float[Array, "B predictions"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(counted[:, 1:], values, 0))


def _divergence_of_top(top: Top, logits: Float[Array, " V"], temperature: Float[Array, ""] | float) -> Array:
    """KL over the kept tokens and the rest of the vocabulary as one more; both are then raised to the power 1 / T."""
    log_q = jnp.take(logits, top.ids) - jax.nn.logsumexp(logits)
    known, found = (jnp.append(logs, jnp.log(rest_of(logs))) / temperature for logs in (top.logs, log_q))
    return kl_divergence(known, found)
