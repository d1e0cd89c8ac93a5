"""Log-likelihoods of continuations of given prefixes, such as the choices of a question (letters: see `axis_table`).

Requests with the same prefix share one sequence: the prefix stands there once, and all its continuations behind it
(`model.modules.Branches`). Prefixes that begin alike, such as those of few-shot prompts, share their beginning, and
their ends stand before the continuations. Sequences are padded to few lengths and come in batches of few sizes, so that
few programs are compiled.
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


class Branch(NamedTuple):
    """What a request adds to the common beginning of its group.

    Attributes:
      number: of the request.
      tokens: the end of its prefix, then its continuation.
      given: number of these tokens that belong to the prefix.
    """

    number: int
    tokens: tuple[int, ...]
    given: int = 0


class Group(NamedTuple):
    """Requests whose prefixes begin alike.

    Attributes:
      prefix: the common beginning, token ids.
      branches: one for each request.
    """

    prefix: tuple[int, ...]
    branches: tuple[Branch, ...]

    @property
    def predicted(self) -> int:
        """Tokens of all continuations."""
        return sum(len(branch.tokens) - branch.given for branch in self.branches)

    @property
    def length(self) -> int:
        """Tokens of the sequence. The last token of a continuation is predicted, and no other token follows it."""
        return len(self.prefix) + sum(len(branch.tokens) - 1 for branch in self.branches)


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
            for branch in group.branches:
                start, stop = stop, stop + len(branch.tokens) - branch.given
                total = float(logs[row, start:stop].sum(dtype=np.float64))
                found[branch.number] = Likelihood(total, bool(greedy[row, start:stop].all()))
        done += sum(len(group.branches) for group in groups)
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
    """Requests whose prefixes are equal or begin alike, in groups whose branches are not much longer than that."""
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        by_prefix.setdefault(request.prefix, []).append(number)
    groups: list[Group] = []
    for prefix, numbers in by_prefix.items():
        for part in _parts(requests, numbers, most_tokens(prefix)):
            group = Group(prefix, tuple(Branch(number, requests[number].continuation) for number in part))
            joined = joined_groups(groups[-1], group) if groups else None
            if joined is None:
                groups.append(group)
            else:
                groups[-1] = joined
    return groups


def most_tokens(prefix: tuple[int, ...]) -> int:
    """Tokens of the branches behind a prefix at most."""
    return MOST_BRANCHES * max(64, len(prefix))


def joined_groups(first: Group, second: Group) -> Group | None:
    """Two groups as one; None where less than half of a prefix is common, or the branches would be too long."""
    shorter = min(len(first.prefix), len(second.prefix))
    common = next((i for i in range(shorter) if first.prefix[i] != second.prefix[i]), shorter)
    if 2 * common < max(len(first.prefix), len(second.prefix)):
        return None
    branches = tuple(
        Branch(branch.number, group.prefix[common:] + branch.tokens, branch.given + len(group.prefix) - common)
        for group in (first, second)
        for branch in group.branches
    )
    prefix = first.prefix[:common]
    return Group(prefix, branches) if sum(len(one.tokens) for one in branches) <= most_tokens(prefix) else None


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
    numbers += max(len(group.branches) for group in groups) + 1
    for row, group in enumerate(groups):
        place, first = len(group.prefix), 0
        tokens[row, :place], positions[row, :place], numbers[row, :place] = group.prefix, range(place), 0
        for number, (_, branch, given) in enumerate(group.branches, 1):
            inner = slice(place, place + len(branch) - 1)
            tokens[row, inner], numbers[row, inner] = branch[:-1], number
            positions[row, inner] = np.arange(len(branch) - 1) + len(group.prefix)
            predicted = slice(first, first + len(branch) - given)
            sources[row, predicted] = [len(group.prefix) - 1, *range(inner.start, inner.stop)][given:]
            targets[row, predicted] = branch[given:]
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
