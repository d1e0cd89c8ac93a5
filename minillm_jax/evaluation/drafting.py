"""Speculative decoding of one sequence: a pruned model drafts tokens, and the dense model verifies them in one pass.

Leviathan et al., arXiv 2211.17192. The draft proposes γ tokens. One pass of the dense model over the last token and the
γ proposals gives its probabilities at γ + 1 places. The first proposals that pass a rule are accepted, and one more
token comes from the dense model, so that a pass gives 1 to γ + 1 tokens.

    greedy     a proposal is accepted if it is the dense model's most probable token; the tokens are those of greedy
               decoding with the dense model alone
    sampling   a proposal x is accepted with the probability min(1, p(x) / q(x)); the token behind a rejected one is
               drawn from max(p - q, 0), normalised; every token has the dense model's distribution p

A sequence of n tokens has n - 1 tokens in the cache of the dense model. Rejected tokens remain in the arrays of both
caches, behind the positions that are read, and are overwritten. The draft reads the last two tokens again in each
round, because it has not read its last proposal.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from minillm_jax.devices import sharding
from minillm_jax.model.cache import Cache, empty, extend
from minillm_jax.model.decoder import Decoder, project_to_vocabulary
from minillm_jax.model.ops import LENGTH_DEPENDENT

# Fewest tokens of a prompt: the draft reads the last two again.
SHORTEST_PROMPT = 2

Key = PRNGKeyArray | None


class Proposal(NamedTuple):
    """The proposed tokens of every sequence, and the logits of the draft that they were chosen by."""

    tokens: Int[Array, "B G"]
    logits: Float[Array, "B G V"]


class Verdict(NamedTuple):
    """The number of accepted proposals of every sequence, and the token of the dense model behind them."""

    accepted: Int[Array, " B"]
    token: Int[Array, " B"]


@partial(jax.jit, static_argnames="size")
def prefill(decoder: Decoder, prompt: Int[Array, "B T"], size: int) -> Cache:
    """A cache for `size` tokens with all tokens of the prompt but the last."""
    return extend(decoder, empty(decoder, prompt.shape[0], size), prompt[:, :-1])[1]


@partial(jax.jit, donate_argnames="cache")
def step(decoder: Decoder, cache: Cache, token: Int[Array, " B"], key: Key = None) -> tuple[Int[Array, " B"], Cache]:
    """The token behind the given last one: the most probable, or drawn with a key. The cache is given up."""
    hidden, cache = extend(decoder, cache, jnp.expand_dims(token, 1))
    return _chosen(project_to_vocabulary(decoder, hidden[:, -1]), key), cache


@partial(jax.jit, static_argnames="gamma", donate_argnames="cache")
def propose(
    draft: Decoder, cache: Cache, last: Int[Array, "B 2"], length: Int[Array, " B"], gamma: int, key: Key = None
) -> tuple[Proposal, Cache]:
    """The proposals of the draft, each the most probable token or drawn with a key. The cache is given up.

    Args:
      draft: the pruned model.
      cache: of the draft, with all tokens but the last two at least.
      last: the last two tokens.
      length: number of tokens of each sequence.
      gamma: number of proposals.
      key: of the draws; None for greedy decoding.
    """
    hidden, cache = extend(draft, cache._replace(lengths=length - 2), last)
    keys = None if key is None else jax.random.split(key, gamma)
    first = project_to_vocabulary(draft, hidden[:, -1])
    token = _chosen(first, None if keys is None else keys[0])

    def one(carry: tuple[Cache, Array], key: Key) -> tuple[tuple[Cache, Array], tuple[Array, Array]]:
        cache, token = carry
        hidden, cache = extend(draft, cache, jnp.expand_dims(token, 1))
        logits = project_to_vocabulary(draft, hidden[:, -1])
        token = _chosen(logits, key)
        return (cache, token), (token, logits)

    rest = None if keys is None else keys[1:]
    (cache, _), (tokens, logits) = jax.lax.scan(one, (cache, token), rest, length=gamma - 1)
    joined = (jnp.concatenate([jnp.expand_dims(a, 0), b]) for a, b in ((token, tokens), (first, logits)))
    return Proposal(*(jnp.moveaxis(array, 0, 1) for array in joined)), cache


@partial(jax.jit, donate_argnames="cache")
def verify(
    dense: Decoder,
    cache: Cache,
    last: Int[Array, " B"],
    length: Int[Array, " B"],
    proposal: Proposal,
    key: Key = None,
) -> tuple[Verdict, Cache]:
    """What the dense model accepts, in one pass over γ + 1 tokens. The cache is given up.

    Args:
      dense: the dense model.
      cache: of the dense model, with all tokens but the last at least.
      last: the last token.
      length: number of tokens of each sequence.
      proposal: of the draft.
      key: of the draws; None for greedy decoding.
    """
    tokens = jnp.concatenate([jnp.expand_dims(last, 1), proposal.tokens], axis=1)
    hidden, cache = extend(dense, cache._replace(lengths=length - 1), tokens)
    logits = project_to_vocabulary(dense, hidden)
    if key is None:
        return jax.vmap(accept_greedily)(proposal.tokens, logits), cache
    keys = jax.random.split(key, len(last))
    return jax.vmap(accept_by_sampling)(keys, proposal.tokens, proposal.logits, logits), cache


def accept_greedily(proposed: Int[Array, " G"], logits: Float[Array, "places V"]) -> Verdict:
    """The greedy rule, for one sequence.

    Args:
      proposed: the tokens.
      logits: of the dense model at the places of the γ proposals and behind them.
    """
    best = jnp.argmax(logits, axis=-1).astype(proposed.dtype)
    accepted = _leading(proposed == best[:-1])
    return Verdict(accepted, best[accepted])


def accept_by_sampling(
    key: PRNGKeyArray, proposed: Int[Array, " G"], drafted: Float[Array, "G V"], logits: Float[Array, "places V"]
) -> Verdict:
    """The rule of speculative sampling, for one sequence.

    Args:
      key: of the draws.
      proposed: tokens that were drawn from the draft.
      drafted: logits of the draft.
      logits: of the dense model at the places of the γ proposals and behind them.
    """
    chance, draw = jax.random.split(key)
    p, q = jax.nn.softmax(logits), jax.nn.softmax(drafted)
    of_p, of_q = (jnp.take_along_axis(array, proposed[:, None], axis=1)[:, 0] for array in (p[:-1], q))
    accepted = _leading(jax.random.uniform(chance, proposed.shape) * of_q < of_p)
    # Behind the last proposal nothing was drafted: the token comes from p itself.
    rest = jnp.maximum(p - jnp.concatenate([q, jnp.zeros_like(p[:1])]), 0)[accepted]
    rest = jnp.where(jnp.sum(rest) > 0, rest, p[accepted])
    return Verdict(accepted, jax.random.categorical(draw, jnp.log(rest)).astype(proposed.dtype))


def _leading(passed: Array) -> Int[Array, ""]:
    """How many of the first ones passed."""
    return jnp.sum(jnp.cumprod(passed.astype(jnp.int32)))


def _chosen(logits: Float[Array, "B V"], key: Key) -> Int[Array, " B"]:
    chosen = jnp.argmax(logits, axis=-1) if key is None else jax.random.categorical(key, logits)
    return chosen.astype(jnp.int32)


# ------------------------------------------------------------------------------------------------------- sequences


class Decoded(NamedTuple):
    """A continuation.

    Attributes:
      tokens: the new tokens; a last pass may add more than were asked for.
      passes: passes of the dense model, or of the only model.
      drafted: number of proposals.
      accepted: number of accepted proposals.
      seconds: without those of the prompt.
    """

    tokens: list[int]
    passes: int
    drafted: int
    accepted: int
    seconds: float


def decode_alone(decoder: Decoder, prompt: Int[np.ndarray, " T"], count: int, size: int, key: Key = None) -> Decoded:
    """`count` tokens behind a prompt, one pass a token.

    Args:
      decoder: the model.
      prompt: at least `SHORTEST_PROMPT` token ids.
      count: number of new tokens.
      size: tokens of the cache; the same size needs no further compilation.
      key: of the draws; None for greedy decoding.
    """
    cache = jax.block_until_ready(prefill(decoder, jnp.asarray(prompt)[None], size))
    tokens, token = [], jnp.asarray(prompt[-1:])
    started = time.perf_counter()
    for number in range(count):
        token, cache = step(decoder, cache, token, _folded(key, number))
        tokens.append(int(sharding.gather(token)[0]))  # a decoder waits for each token, to see whether it is the last
    return Decoded(tokens, count, 0, 0, time.perf_counter() - started)


def decode_with_draft(
    dense: Decoder,
    draft: Decoder,
    prompt: Int[np.ndarray, " T"],
    gamma: int,
    count: int,
    size: int,
    key: Key = None,
) -> Decoded:
    """At least `count` tokens behind a prompt, by speculative decoding.

    Args:
      dense: the model whose tokens these are.
      draft: a model of the same vocabulary.
      prompt: at least `SHORTEST_PROMPT` token ids.
      gamma: number of proposals of a round.
      count: number of new tokens; the last round may add up to γ more.
      size: tokens of both caches, at least `cache_size`; the same size needs no further compilation.
      key: of the draws; None for greedy decoding.
    """
    whole = jnp.asarray(prompt)[None]
    caches = jax.block_until_ready((prefill(dense, whole, size), prefill(draft, whole, size)))
    of_dense, of_draft = caches
    tokens, passes, accepted = prompt.tolist(), 0, 0
    started = time.perf_counter()
    while len(tokens) < len(prompt) + count:
        last, length = jnp.asarray([tokens[-2:]], jnp.int32), jnp.asarray([len(tokens)], jnp.int32)
        proposal, of_draft = propose(draft, of_draft, last, length, gamma, _folded(key, 2 * passes))
        verdict, of_dense = verify(dense, of_dense, last[:, 1], length, proposal, _folded(key, 2 * passes + 1))
        number, token, proposed = (
            sharding.gather(array)[0] for array in (verdict.accepted, verdict.token, proposal.tokens)
        )
        tokens += [*proposed[:number].tolist(), int(token)]
        passes, accepted = passes + 1, accepted + int(number)
    seconds = time.perf_counter() - started
    return Decoded(tokens[len(prompt) :], passes, passes * gamma, accepted, seconds)


def cache_size(prompt: int, count: int, gamma: int) -> int:
    """Tokens of a cache with room for the proposals of the last round."""
    return prompt + count + gamma


def outgrown(decoder: Decoder, prompt: int, size: int) -> int | None:
    """The length behind which the rotary positions of all tokens would change while a continuation is decoded.

    The caches keep the states of earlier tokens, which would be those of a shorter sequence. None where the positions
    do not depend on the length, or all sequences lie on one side of LongRoPE's.

    Args:
      decoder: the model.
      prompt: tokens of the prompt.
      size: tokens of the cache.
    """
    for rope in (decoder.config.rope, decoder.config.other_rope):
        if rope is not None and rope.kind in LENGTH_DEPENDENT and size > rope.original_length:
            if rope.kind == "longrope" and prompt - 1 > rope.original_length:
                continue
            return rope.original_length
    return None


def _folded(key: Key, number: int) -> Key:
    return None if key is None else jax.random.fold_in(key, number)


# ------------------------------------------------------------------------------------------------------ measurement


class Acceptance(NamedTuple):
    """How much of a draft the dense model accepts.

    Attributes:
      accepted: accepted share of the proposals. Those behind a rejected one count as rejected.
      tokens_per_pass: new tokens for each pass of the dense model.
    """

    accepted: float
    tokens_per_pass: float


@dataclass(frozen=True)
class Drafting:
    """A model as the draft of the dense one.

    Attributes:
      greedy: of greedy decoding.
      sampling: of speculative sampling, temperature 1.
      same: number of prompts that were continued as by the dense model alone; rounding may decide between two tokens.
      seconds_dense: seconds a token of greedy decoding with the dense model alone, median over the prompts.
      seconds_alone: with the draft alone.
      seconds: with the dense model and the draft.
    """

    greedy: Acceptance
    sampling: Acceptance
    same: int
    seconds_dense: float
    seconds_alone: float
    seconds: float

    @property
    def speedup(self) -> float:
        """How many times as fast decoding is with the draft."""
        return self.seconds_dense / self.seconds


def measure(
    dense: Decoder,
    drafts: Sequence[Decoder],
    prompts: Int[np.ndarray, "N T"],
    gamma: int,
    count: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Drafting]:
    """Every draft beside the dense model.

    The ways of decoding take turns, prompt by prompt. A first turn of each compiles and does not count.

    Args:
      dense: the dense model.
      drafts: models of the same vocabulary, on the same mesh.
      prompts: token ids, at least `SHORTEST_PROMPT` for each prompt.
      gamma: number of proposals of a round.
      count: number of new tokens behind each prompt.
      seed: of the draws.
      progress: called with the number of prompts done, and of all.
    """
    size = cache_size(prompts.shape[1], count, gamma)

    def all_ways(prompt: np.ndarray, count: int, key: PRNGKeyArray) -> tuple[Decoded, list[list[Decoded]]]:
        plain = decode_alone(dense, prompt, count, size)
        return plain, [
            [
                decode_alone(draft, prompt, count, size),
                decode_with_draft(dense, draft, prompt, gamma, count, size),
                decode_with_draft(dense, draft, prompt, gamma, count, size, key),
            ]
            for draft in drafts
        ]

    keys = jax.random.split(jax.random.key(seed), len(prompts))
    all_ways(prompts[0], min(count, gamma + 2), keys[0])  # two rounds: arrays of a mesh may be placed anew after one
    plain, found = [], []
    for number, prompt in enumerate(prompts):
        one, others = all_ways(prompt, count, keys[number])
        plain.append(one)
        found.append(others)
        if progress is not None:
            progress(number + 1, len(prompts))
    return [_drafting(plain, [others[at] for others in found], count) for at in range(len(drafts))]


def _drafting(plain: list[Decoded], found: list[list[Decoded]], count: int) -> Drafting:
    """The result of one draft, from the continuations of all prompts."""
    alone, greedy, sampled = zip(*found, strict=True)
    same = sum(one.tokens[:count] == other.tokens[:count] for one, other in zip(plain, greedy, strict=True))
    return Drafting(_acceptance(greedy), _acceptance(sampled), same, _seconds(plain), _seconds(alone), _seconds(greedy))


def _seconds(decoded: Sequence[Decoded]) -> float:
    return median(one.seconds / len(one.tokens) for one in decoded)


def _acceptance(decoded: Sequence[Decoded]) -> Acceptance:
    accepted, drafted = sum(one.accepted for one in decoded), sum(one.drafted for one in decoded)
    return Acceptance(accepted / drafted, sum(len(one.tokens) for one in decoded) / sum(one.passes for one in decoded))
