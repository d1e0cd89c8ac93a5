"""The exact gradient in reverse mode: the reference for every estimate, and the gradient of LLM-Pruner's criteria.

Every layer is computed again in the backward pass, so the activations take one residual stream a layer. The gradient by
the weights takes as much memory as float32 weights, and nothing else of that size exists beside it and the weights:
three times the memory of bfloat16 weights in all. The gradient by the gates takes almost none.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loss import token_losses
from minillm_jax.model.modules import Block, depth
from minillm_jax.model.tree import group_count, kernels, replace_kernels
from minillm_jax.scoring.gradient import spaces

# For each run: name of a matrix -> gradient with the axes of the matrix, or kind of group -> [L, B, groups].
RunGradients = list[dict[str, Float[Array, "_ ..."]]]


class Sums(NamedTuple):
    """Gradients summed over windows, float32; on the devices of the matrices.

    Attributes:
      gradient: of the mean cross entropy over all windows, the shares of the windows so far.
      squares: the mean square of the gradients of single windows, for criteria that read it; else None.
    """

    gradient: RunGradients
    squares: RunGradients | None


def no_gradients(decoder: Decoder, curvature: bool) -> Sums:
    """The sums over no windows, with squares or without."""

    def zeros() -> RunGradients:
        runs = ({name: kernel[...] for name, kernel in kernels(run).items()} for run in decoder.runs)
        return [jax.tree.map(lambda kernel: jnp.zeros_like(kernel, dtype=jnp.float32), run) for run in runs]

    return Sums(zeros(), zeros() if curvature else None)


@partial(jax.jit, donate_argnames="sums")
def add_weight_gradients(
    sums: Sums,
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    predictions: Float[Array, ""],
    windows: Float[Array, ""],
) -> Sums:
    """The sums with the share of one more batch in the gradient of the mean cross entropy by every block matrix.

    The gradient of a matrix has the type of the weights. It is added to its place in the sums as soon as the backward
    pass leaves its layer, so that the memory is that of the weights, the sums, and a residual stream a layer. `sums` is
    overwritten.

    Args:
      sums: over the earlier windows.
      decoder: the model.
      tokens: token ids of the batch; of a single window where squares are summed.
      predictions: number of predicted tokens of all windows.
      windows: number of all windows.
    """
    angles = rotary_angles(decoder, tokens.shape[1])

    def forward(x: Array, block: Block, layer: Array, extra: None) -> tuple[Array, Array]:
        return apply_layer(block, decoder.config, x, angles)[0], x

    def summed_loss(x: Array) -> Array:
        return jnp.sum(token_losses(decoder, finish(decoder, x), tokens))

    def backward(carry: tuple[Array, Any], layer: tuple[Block, Array, Array]) -> tuple[tuple[Array, Any], None]:
        (cotangent, totals), (block, x, index) = carry, layer

        def of_matrices(x: Array, matrices: dict[str, Array]) -> Array:
            moved = replace_kernels(block, lambda name, _: matrices[name])
            return apply_layer(moved, decoder.config, x, angles)[0]

        _, pull = jax.vjp(of_matrices, x, {name: kernel[...] for name, kernel in kernels(block).items()})
        cotangent, gradient = pull(cotangent)
        shares = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) / predictions, gradient)
        # The share of a window, times the number of windows, is the gradient of the window's mean loss.
        terms = shares, jax.tree.map(lambda share: windows * jnp.square(share), shares)
        added = (
            None if total is None else jax.tree.map(lambda at, term: at.at[index].add(term), total, term)
            for total, term in zip(totals, terms, strict=True)
        )
        return (cotangent, tuple(added)), None

    last, streams = scan_layers(decoder.runs, forward, embed(decoder, tokens))
    cotangent = jax.grad(summed_loss)(last)
    of_runs = list(zip(sums.gradient, sums.squares or [None] * len(decoder.runs), strict=True))
    for position in reversed(range(len(decoder.runs))):
        run = decoder.runs[position]
        layers = (run, streams[position], jnp.arange(depth(run), dtype=jnp.int32))
        (cotangent, of_runs[position]), _ = jax.lax.scan(backward, (cotangent, of_runs[position]), layers, reverse=True)
    gradient, squares = (list(part) for part in zip(*of_runs, strict=True))
    return Sums(gradient, None if sums.squares is None else squares)


@jax.jit
def weight_gradients(decoder: Decoder, tokens: Int[Array, "B T"]) -> RunGradients:
    """The gradient of the batch's summed cross entropy by every block matrix, float32."""
    one = jnp.float32(1)
    return add_weight_gradients(no_gradients(decoder, curvature=False), decoder, tokens, one, one).gradient


def gated_losses(
    decoder: Decoder, tokens: Int[Array, "B T"], changes: Sequence[dict[str, Float[Array, "L #B groups"]]]
) -> Float[Array, " B"]:
    """Summed cross entropy of every window with a gate 1 + change on every group, float32, nats.

    Args:
      decoder: the model.
      tokens: token ids of the batch.
      changes: for each run, kind of group -> change of each gate, for every window or for all windows together. A
        change of -1 removes the group.
    """
    angles = rotary_angles(decoder, tokens.shape[1])

    @jax.checkpoint
    def layer_at(x: Array, block: Block, of_layer: dict[str, Array]) -> Array:
        gated = spaces.gated(block, of_layer, spaces.finite(jnp.float32(1)))
        return apply_layer(gated, decoder.config, x, angles)[0]

    def step(x: Array, block: Block, layer: Array, of_layer: dict[str, Array]) -> tuple[Array, None]:
        return layer_at(x, block, of_layer), None

    x, _ = scan_layers(decoder.runs, step, embed(decoder, tokens), per_layer=changes)
    return jnp.sum(token_losses(decoder, finish(decoder, x), tokens), axis=-1)


@jax.jit
def gate_gradients(decoder: Decoder, tokens: Int[Array, "B T"]) -> RunGradients:
    """The gradient of each window's summed cross entropy by the gate of every group, float32 [L, B, groups].

    Every window has separate gates, so one backward pass gives the gradients of all windows.
    """

    def no_change(run: Block, kind: str) -> Array:
        return jnp.zeros((depth(run), tokens.shape[0], group_count(run, kind)), jnp.float32)

    changes = [{kind: no_change(run, kind) for kind in spaces.GATED} for run in decoder.runs]
    return jax.grad(lambda changes: jnp.sum(gated_losses(decoder, tokens, changes)))(changes)
