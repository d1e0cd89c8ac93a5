"""Gradients of the loss of a recovery by its parameters: by back-propagation, or from forward passes alone.

`forward` is SPSA (Spall 1992), as MeZO uses it for tuning (Malladi et al., arXiv 2305.17333), over the parameters of a
recovery alone. Every sequence gets directions of its own, at the cost of shared ones: a batch of B sequences estimates
with B times as many directions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Key

from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import Top
from minillm_jax.recovery import objective
from minillm_jax.recovery.objective import Sequences, Sums, Weights
from minillm_jax.recovery.trained import Parameters, Trained


class Part(NamedTuple):
    """What one call of a gradient reads beside the model: a micro-batch.

    Attributes:
      teacher: the dense model, its most probable tokens of these sequences, or None.
      sequences: the sequences.
      weights: numbers of the loss.
      scale: factor of the gradient.
      key: of dropout or directions.
    """

    teacher: Decoder | Top | None
    sequences: Sequences
    weights: Weights
    scale: Float[Array, ""]
    key: Key[Array, ""]


# The gradient of scale · loss by the parameters, and the sums of the loss.
Gradient = Callable[[Parameters, Decoder, Part], tuple[Parameters, Sums]]


def backward(trained: Trained) -> Gradient:
    """The gradient in reverse mode."""

    def gradient(parameters: Parameters, decoder: Decoder, part: Part) -> tuple[Parameters, Sums]:
        def scaled(parameters: Parameters) -> tuple[Array, Sums]:
            hidden = trained.hidden(parameters, decoder, part.sequences.tokens, part.key)
            found = _sums(trained, parameters, decoder, hidden, part)
            return part.scale * objective.loss(found, part.weights), found

        return jax.grad(scaled, has_aux=True)(parameters)

    return gradient


def forward(trained: Trained, directions: int, epsilon: float) -> Gradient:
    """The estimate from paired losses along random directions; no activation is kept for a backward pass.

    Args:
      trained: what moves.
      directions: number of directions of every sequence.
      epsilon: ε of the paired losses at parameters ± ε z, with standard normal z.
    """

    def gradient(parameters: Parameters, decoder: Decoder, part: Part) -> tuple[Parameters, Sums]:
        def pair(sequence: Sequences, top: Top | None, key: Array) -> tuple[Parameters, Sums]:
            z = _normal(parameters, key)
            known = part.teacher if top is None else jax.tree.map(lambda leaf: leaf[None], top)
            single = part._replace(teacher=known, sequences=jax.tree.map(lambda leaf: leaf[None], sequence))

            def at(parameters: Parameters) -> Sums:
                hidden = trained.hidden(parameters, decoder, single.sequences.tokens, None)
                return _sums(trained, parameters, decoder, hidden, single)

            ahead, behind = (at(_moved(parameters, z, step)) for step in (epsilon, -epsilon))
            slope = (objective.loss(ahead, part.weights) - objective.loss(behind, part.weights)) / (2 * epsilon)
            return jax.tree.map(lambda leaf: slope * leaf, z), jax.tree.map(lambda a, b: (a + b) / 2, ahead, behind)

        def accumulated(total: Any, number: Array) -> tuple[Any, None]:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.fold_in(part.key, number), jnp.arange(len(part.sequences.tokens))
            )
            found = jax.vmap(pair)(part.sequences, part.teacher if isinstance(part.teacher, Top) else None, keys)
            return jax.tree.map(lambda sum_, each: sum_ + jnp.sum(each, axis=0), total, found), None

        zero = jax.tree.map(jnp.zeros_like, (parameters, Sums(jnp.float32(0), jnp.float32(0))))
        (estimate, found), _ = jax.lax.scan(accumulated, zero, jnp.arange(directions))
        mean = jax.tree.map(lambda total: total / directions, found)
        return jax.tree.map(lambda total: part.scale * total / directions, estimate), mean

    return gradient


def _sums(
    trained: Trained, parameters: Parameters, decoder: Decoder, hidden: Float[Array, "B T E"], part: Part
) -> Sums:
    model = trained.computing(parameters, decoder)
    return objective.sums(model, hidden, part.sequences, part.teacher, part.weights.temperature)


def _normal(parameters: Parameters, key: Key[Array, ""]) -> Parameters:
    """Standard normal numbers of the shapes of the parameters."""
    leaves, structure = jax.tree.flatten(parameters)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(one, leaf.shape) for one, leaf in zip(keys, leaves, strict=True)]
    )


def _moved(parameters: Parameters, direction: Parameters, step: float) -> Parameters:
    return jax.tree.map(lambda leaf, z: leaf + step * z, parameters, direction)
