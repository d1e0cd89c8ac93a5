"""Log-likelihoods of continuations of given prefixes, such as the choices of a question (letters: see `axis_table`).

Requests with the same prefix share one sequence: the prefix stands there once, and all its continuations behind it
(`model.modules.Branches`). Sequences are padded to few lengths and come in batches of a fixed size for each length, so
that few programs are compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder, final_hidden, learned_positions
from minillm_jax.model.loss import map_logits
from minillm_jax.model.modules import Branches

# Tokens of a batch: a CPU gains nothing by larger ones, and small ones have less padding.
ON_CPU, ELSEWHERE = 1024, 8192

# Tokens of the continuations that share a sequence with their prefix, as a multiple of the tokens of the prefix. With
# more, a sequence would be longer than the padding of others is worth.
MOST_BRANCHES = 3


class Request(NamedTuple):
    """A prefix and one continuation of it, token ids of at least one token each."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """The log-likelihood of a continuation.

    Attributes:
      log: sum of the log-probabilities of its tokens, nats.
      greedy: whether each token is the most probable one.
    """

    log: float
    greedy: bool


class Group(NamedTuple):
    """Requests with one prefix.

    Attributes:
      prefix: token ids.
      continuations: token ids of each.
      numbers: number of each request.
    """

    prefix: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]

    @property
    def predicted(self) -> int:
        """Tokens of all continuations."""
        return sum(map(len, self.continuations))

    @property
    def length(self) -> int:
        """Tokens of the sequence. The last token of a continuation is predicted, and no other token follows it."""
        return len(self.prefix) + self.predicted - len(self.continuations)


class Shape(NamedTuple):
    """Size of a batch: sequences, tokens of each, predicted tokens of each."""

    sequences: int
    length: int
    predicted: int


class Packed(NamedTuple):
    """The arrays of a batch.

    Attributes:
      tokens: token ids.
      branches: where they stand.
      sources: for every predicted token the place in its sequence that predicts it.
      targets: the predicted tokens.
    """

    tokens: Int[Array | np.ndarray, "B T"]
    branches: Branches
    sources: Int[Array | np.ndarray, "B P"]
    targets: Int[Array | np.ndarray, "B P"]


def likelihoods(
    decoder: Decoder,
    requests: Sequence[Request],
    tokens_per_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """The log-likelihood of the continuation of every request.

    Args:
      decoder: the model.
      requests: prefixes and continuations.
      tokens_per_batch: tokens of a batch on each device, at least one sequence; by default what suits the platform.
      progress: called with the number of requests done, and of all.

    Raises:
      InputError: a prefix or a continuation is empty, or the model has too few learned positions for a request.
    """
    check(decoder, requests)
    size = (ON_CPU if jax.default_backend() == "cpu" else ELSEWHERE) if tokens_per_batch is None else tokens_per_batch
    mesh, found, done = sharding.mesh_of(decoder), [Likelihood(0.0, True)] * len(requests), 0
    for shape, groups in batches(requests, size, sharding.data_size(mesh)):
        arrays = jax.tree.map(lambda array: sharding.shard_batch(array, mesh), packed(groups, shape))
        logs, greedy = (sharding.gather(array) for array in predictions(decoder, arrays))
        for row, group in enumerate(groups):
            stop = 0
            for number, continuation in zip(group.numbers, group.continuations, strict=True):
                start, stop = stop, stop + len(continuation)
                total = float(logs[row, start:stop].sum(dtype=np.float64))
                found[number] = Likelihood(total, bool(greedy[row, start:stop].all()))
        done += sum(len(group.numbers) for group in groups)
        if progress is not None:
            progress(done, len(requests))
    return found


def check(decoder: Decoder, requests: Sequence[Request]) -> None:
    """Check that a model can read the requests.

    Raises:
      InputError: see `likelihoods`.
    """
    limit = learned_positions(decoder)
    for number, (prefix, continuation) in enumerate(requests):
        if not prefix or not continuation:
            part = "continuation" if prefix else "prefix"
            raise InputError(f"request {number}: the {part} has no tokens")
        length = len(prefix) + len(continuation) - 1
        if limit is not None and length > limit:
            raise InputError(
                f"request {number}: {length} tokens are too long: the model has {limit} learned positions; cut the "
                "prefix on its left"
            )


def batches(
    requests: Sequence[Request], tokens_per_batch: int, devices: int = 1
) -> Iterator[tuple[Shape, list[Group]]]:
    """Groups of requests in batches of few shapes, the longest first: a batch has room for its longest sequence.

    Args:
      requests: prefixes and continuations.
      tokens_per_batch: tokens of a batch on each device, at least one sequence.
      devices: number of sequences that a batch must be a multiple of.
    """
    waiting = sorted(grouped(requests), key=lambda group: -group.length)
    while waiting:
        length = padded(waiting[0].length)
        most = max(1, tokens_per_batch // length)
        groups, waiting = waiting[: devices * most], waiting[devices * most :]
        # The last batch is smaller: it holds the next power of two, so that few shapes are compiled.
        needed = 2 ** (-(-len(groups) // devices) - 1).bit_length()
        predicted = predicted_size(max(group.predicted for group in groups), length)
        yield Shape(devices * min(most, needed), length, predicted), groups


def grouped(requests: Sequence[Request]) -> list[Group]:
    """Requests with equal prefixes, in groups whose continuations are not much longer than their prefix."""
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        by_prefix.setdefault(request.prefix, []).append(number)
    return [
        Group(prefix, tuple(requests[number].continuation for number in part), tuple(part))
        for prefix, numbers in by_prefix.items()
        for part in _parts(requests, numbers, MOST_BRANCHES * max(64, len(prefix)))
    ]


def _parts(requests: Sequence[Request], numbers: Sequence[int], most: int) -> Iterator[list[int]]:
    """Requests in parts whose continuations have at most `most` tokens together, or that are one request."""
    part, total = [], 0
    for number in numbers:
        length = len(requests[number].continuation)
        if part and total + length > most:
            yield part
            part, total = [], 0
        part.append(number)
        total += length
    yield part


def padded(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is at least `length`."""
    power = max(16, 2 ** (length - 1).bit_length())
    return 3 * power // 4 if power > 16 and length <= 3 * power // 4 else power


def predicted_size(predicted: int, length: int) -> int:
    """Room for predicted tokens: an eighth, a quarter, ... of a sequence's length, up to twice the length."""
    sizes = (length // 8, length // 4, length // 2, 3 * length // 4, length, 3 * length // 2, 2 * length, predicted)
    return next(size for size in sizes if size >= predicted)


def packed(groups: Sequence[Group], shape: Shape) -> Packed:
    """The arrays of a batch. Padding stands at the end of a sequence, is a branch of its own, and predicts nothing."""
    tokens, positions, numbers = np.zeros((3, shape.sequences, shape.length), np.int32)
    sources, targets = np.zeros((2, shape.sequences, shape.predicted), np.int32)
    numbers += len(max((group.continuations for group in groups), key=len)) + 1
    for row, group in enumerate(groups):
        place, first = len(group.prefix), 0
        tokens[row, :place], positions[row, :place], numbers[row, :place] = group.prefix, range(place), 0
        for number, continuation in enumerate(group.continuations, 1):
            inner = slice(place, place + len(continuation) - 1)
            tokens[row, inner], numbers[row, inner] = continuation[:-1], number
            positions[row, inner] = np.arange(len(continuation) - 1) + len(group.prefix)
            predicted = slice(first, first + len(continuation))
            sources[row, predicted] = [len(group.prefix) - 1, *range(inner.start, inner.stop)]
            targets[row, predicted] = continuation
            place, first = inner.stop, predicted.stop
    return Packed(tokens, Branches(positions, numbers), sources, targets)


@jax.jit
def predictions(decoder: Decoder, batch: Packed) -> tuple[Float[Array, "B P"], Bool[Array, "B P"]]:
    """The log-probability of every predicted token, float32, nats; and whether it is the most probable one."""
    hidden = final_hidden(decoder, jnp.asarray(batch.tokens), batch.branches)
    chosen = jnp.take_along_axis(hidden, jnp.expand_dims(jnp.asarray(batch.sources), 2), axis=1)

    def one(logits: Float[Array, " V"], target: Int[Array, ""]) -> tuple[Array, Array]:
        return jnp.take(logits, target) - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

    return map_logits(decoder, chosen, one, batch.targets)
