"""How the next-token probabilities of pruned models differ from those of the dense model, on the windows of a text.

With the probabilities p of the dense model and q of another one, at every position of a window but the last:

    loss         -log q(true token), nats
    divergence   KL(p ‖ q) over the whole vocabulary, nats
    agreement    1 where both models have the same most probable token, else 0
    overlap      the share of the five most probable tokens of p that are among the five of q
    acceptance   Σ min(p, q): the probability that speculative sampling accepts a token which is drafted from q
                 (Leviathan et al., arXiv 2211.17192)

All models go through one pass over the batches. The logits of a few positions exist at a time, in float32; the sums of
windows, positions and token types are float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from minillm_jax.data.batches import Batches
from minillm_jax.devices import sharding
from minillm_jax.evaluation.perplexity import exponential
from minillm_jax.model.decoder import Decoder, final_hidden, project_to_vocabulary
from minillm_jax.model.loss import LOGITS_AT_ONCE, cross_entropy, kl_divergence, map_logits

# The most probable tokens whose sets are compared.
TOP = 5
# Points of the curve by position, and of the curve by frequency.
POSITIONS, FREQUENCIES = 32, 6
# Token types and windows in the lists of the largest losses; occurrences of a type below which its mean says little.
WORST, FEWEST = 10, 5
# Tokens of a window that are shown as its beginning.
BEGINNING = 24

Decode = Callable[[list[int]], str]


class Measures(NamedTuple):
    """The measures of the module, of one position or of all positions of a batch."""

    loss: Float[Array, "*positions"]
    divergence: Float[Array, "*positions"]
    agreement: Float[Array, "*positions"]
    overlap: Float[Array, "*positions"]
    acceptance: Float[Array, "*positions"]


class Mean(NamedTuple):
    """A mean over all predictions.

    Attributes:
      value: the mean.
      error: its standard error, from the means of the windows; None with one window.
    """

    value: float
    error: float | None


class Part(NamedTuple):
    """The means over some predictions: a point of a curve.

    Attributes:
      first: least position in the window, or least number of occurrences of the true token.
      last: the greatest.
      types: number of different true tokens; None for a range of positions.
      tokens: number of predictions.
      dense: loss of the dense model.
      means: the mean of every measure, by its name in `Measures`.
    """

    first: int
    last: int
    types: int | None
    tokens: int
    dense: float
    means: dict[str, float]


class TokenLoss(NamedTuple):
    """A token type that became harder to predict.

    Attributes:
      token: token id.
      text: the token as text.
      occurrences: number of its predictions.
      dense: mean loss of the dense model.
      loss: mean loss of the other model.
    """

    token: int
    text: str
    occurrences: int
    dense: float
    loss: float


class WindowLoss(NamedTuple):
    """A window that became harder to predict.

    Attributes:
      number: of the window among all windows that were measured.
      text: its beginning.
      dense: mean loss of the dense model.
      loss: mean loss of the other model.
    """

    number: int
    text: str
    dense: float
    loss: float


@dataclass(frozen=True)
class Changes:
    """One model beside the dense one.

    Attributes:
      perplexity: the exponential of its mean loss.
      means: of every measure by its name in `Measures`, and `increase`, of the loss over that of the dense model.
      positions: curve by the position of the true token in the window; at most `POSITIONS` points.
      frequencies: curve by the occurrences of the true token in the windows; at most `FREQUENCIES` points.
      tokens: the types with the largest increase of the loss, of those with at least `FEWEST` predictions.
      windows: the windows with the largest increase of the loss.
    """

    perplexity: float
    means: dict[str, Mean]
    positions: list[Part]
    frequencies: list[Part]
    tokens: list[TokenLoss]
    windows: list[WindowLoss]


@dataclass(frozen=True)
class Compared:
    """The dense model, and every other one beside it.

    Attributes:
      window: tokens of a window.
      windows: number of windows.
      tokens: number of predictions.
      loss: of the dense model.
      perplexity: of the dense model.
      others: in the order in which they were given.
    """

    window: int
    windows: int
    tokens: int
    loss: Mean
    perplexity: float
    others: tuple[Changes, ...]


@jax.jit
def measures(
    dense: Decoder, others: tuple[Decoder, ...], tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B predictions"], tuple[Measures, ...]]:
    """The loss of the dense model and the measures of every other one, float32 [B, T - 1]."""
    states = tuple(final_hidden(other, tokens)[:, :-1] for other in others)

    def at(logits: Array, target: Array, states: tuple[Array, ...]) -> tuple[Array, tuple[Measures, ...]]:
        found = (project_to_vocabulary(other, state) for other, state in zip(others, states, strict=True))
        return cross_entropy(logits, target), tuple(_measured(logits, one, target) for one in found)

    return map_logits(
        dense,
        final_hidden(dense, tokens)[:, :-1],
        at,
        tokens[:, 1:],
        states,
        logits_at_once=LOGITS_AT_ONCE // (1 + len(others)),
    )


def _measured(known: Float[Array, " V"], logits: Float[Array, " V"], target: Int[Array, ""]) -> Measures:
    """The measures of one position, by the logits of the dense and of the other model."""
    count = min(TOP, len(known))
    tops, best = (jax.lax.top_k(one, count)[1] for one in (logits, known))
    return Measures(
        cross_entropy(logits, target),
        kl_divergence(known, logits),
        (tops[0] == best[0]).astype(jnp.float32),
        jnp.mean(jnp.isin(best, tops), dtype=jnp.float32),
        jnp.sum(jnp.minimum(jax.nn.softmax(known), jax.nn.softmax(logits))),
    )


class _Sums(NamedTuple):
    """Float64 sums of the rows: the loss of the dense model, then the measures of every other model.

    Attributes:
      windows: means over the positions of each window.
      positions: sums over the windows.
      types: sums over the predictions of each token type.
    """

    windows: Float[np.ndarray, "R B"]
    positions: Float[np.ndarray, "R P"]
    types: Float[np.ndarray, "R U"]

    def of(self, number: int) -> "_Sums":
        """The row of the dense model and the rows of one other model."""
        start, size = 1 + number * len(Measures._fields), len(Measures._fields)
        return _Sums(*(np.concatenate([rows[:1], rows[start : start + size]]) for rows in self))


class _Types(NamedTuple):
    """The true tokens of all predictions.

    Attributes:
      ids: the token ids that occur.
      places: for every prediction, the place of its true token in `ids`.
      counts: number of predictions of each.
    """

    ids: Int[np.ndarray, " U"]
    places: Int[np.ndarray, "B P"]
    counts: Int[np.ndarray, " U"]


def compare(
    dense: Decoder,
    others: Sequence[Decoder],
    names: Sequence[str],
    batches: Batches,
    decode: Decode,
    progress: Callable[[int, int], None] | None = None,
) -> Compared:
    """The changes of every other model on the windows.

    Args:
      dense: the dense model.
      others: models of the same vocabulary, on the same mesh.
      names: of the dense and of every other model, for messages.
      batches: windows of at least two token ids.
      decode: token ids -> text.
      progress: called with the number of windows done, and of all.

    Raises:
      InputError: the loss of a model is not finite.
    """
    targets = batches.windows[:, 1:]
    ids, places, counts = np.unique(targets, return_inverse=True, return_counts=True)
    types = _Types(ids, places.reshape(targets.shape), counts)
    sums = _sums(dense, tuple(others), batches, types, progress)
    losses = [sums.windows[row].mean() for row in (0, *range(1, len(sums.windows), len(Measures._fields)))]
    perplexities = [exponential(float(loss), name) for loss, name in zip(losses, names, strict=True)]
    changes = (
        _changes(sums.of(number), perplexities[1 + number], batches, types, decode) for number in range(len(others))
    )
    return Compared(
        batches.length, batches.count, batches.predictions, _mean(sums.windows[0]), perplexities[0], tuple(changes)
    )


def _sums(
    dense: Decoder,
    others: tuple[Decoder, ...],
    batches: Batches,
    types: _Types,
    progress: Callable[[int, int], None] | None,
) -> _Sums:
    rows, done = 1 + len(others) * len(Measures._fields), 0
    windows = np.zeros((rows, batches.count))
    positions, of_types = np.zeros((rows, batches.length - 1)), np.zeros((rows, len(types.ids)))
    for batch in batches:
        found = [sharding.gather(array) for array in jax.tree.leaves(measures(dense, others, batch.tokens))]
        numbers = np.arange(done, done + len(batch.numbers))
        places = types.places[numbers].ravel()
        for row, values in enumerate(found):
            exact = values.astype(np.float64)
            windows[row, numbers] = exact.mean(axis=1)
            positions[row] += exact.sum(axis=0)
            of_types[row] += np.bincount(places, exact.ravel(), len(types.ids))
        done += len(numbers)
        if progress is not None:
            progress(done, batches.count)
    return _Sums(windows, positions, of_types)


def _mean(windows: Float[np.ndarray, " B"]) -> Mean:
    """The mean over windows of equal length, with its standard error."""
    error = float(windows.std(ddof=1) / np.sqrt(len(windows))) if len(windows) > 1 else None
    return Mean(float(windows.mean()), error)


def _changes(sums: _Sums, perplexity: float, batches: Batches, types: _Types, decode: Decode) -> Changes:
    """The changes of one model, by its rows behind that of the dense model."""
    means = {name: _mean(row) for name, row in zip(Measures._fields, sums.windows[1:], strict=True)}
    means["increase"] = _mean(sums.windows[1] - sums.windows[0])
    predictions = np.full(batches.length - 1, batches.count)
    ranges = np.array_split(np.arange(batches.length - 1), min(POSITIONS, batches.length - 1))
    positions = [
        _part(sums.positions[:, group], predictions[group], int(group[0]) + 1, int(group[-1]) + 1) for group in ranges
    ]
    return Changes(
        perplexity,
        means,
        positions,
        _by_frequency(sums.types, types.counts),
        _worst_tokens(sums.types, types, decode),
        _worst_windows(sums.windows, batches, decode),
    )


def _part(
    sums: Float[np.ndarray, "R X"], counts: Int[np.ndarray, " X"], first: int, last: int, types: int | None = None
) -> Part:
    tokens = int(counts.sum())
    dense, *means = (sums.sum(axis=1) / tokens).tolist()
    return Part(first, last, types, tokens, dense, dict(zip(Measures._fields, means, strict=True)))


def _by_frequency(sums: Float[np.ndarray, "R U"], counts: Int[np.ndarray, " U"]) -> list[Part]:
    """The curve by occurrences: ranges of equal size on a logarithmic scale, without those that no type lies in."""
    place = np.floor(FREQUENCIES * np.log(counts) / np.log(counts.max() + 1)).astype(int)
    groups = [np.flatnonzero(place == number) for number in range(FREQUENCIES)]
    return [
        _part(sums[:, group], counts[group], int(counts[group].min()), int(counts[group].max()), len(group))
        for group in groups
        if len(group)
    ]


def _worst_tokens(sums: Float[np.ndarray, "R U"], types: _Types, decode: Decode) -> list[TokenLoss]:
    often = np.flatnonzero(types.counts >= FEWEST)
    dense, loss = sums[:2, often] / types.counts[often]
    order = np.argsort(dense - loss, kind="stable")[:WORST]
    ids, counts = types.ids[often], types.counts[often]
    return [
        TokenLoss(int(ids[at]), decode([int(ids[at])]), int(counts[at]), float(dense[at]), float(loss[at]))
        for at in order
    ]


def _worst_windows(windows: Float[np.ndarray, "R B"], batches: Batches, decode: Decode) -> list[WindowLoss]:
    dense, loss = windows[:2]
    order = np.argsort(dense - loss, kind="stable")[:WORST]
    return [
        WindowLoss(int(at), decode(batches.windows[at, :BEGINNING].tolist()), float(dense[at]), float(loss[at]))
        for at in order
    ]
