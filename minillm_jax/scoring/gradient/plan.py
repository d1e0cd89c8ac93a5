"""How many directions share one pass, and how many passes one call of the compiled program: by memory and by work."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import jax

from minillm_jax.data.batches import TOKENS_PER_BATCH
from minillm_jax.devices import hosts
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import LOGITS_AT_ONCE
from minillm_jax.model.tree import hidden_size, parameter_count, run_letters
from minillm_jax.scoring.gradient.settings import Estimation

# More directions in one pass share hardly more.
MOST_PER_STEP = 8

# Floating-point operations of one call: some seconds on a CPU, so that progress is seen and little is lost.
WORK_PER_CALL = 1e12
MOST_CHUNKS = 64

# What the estimate may use on a CPU, where nobody knows what else the memory is wanted for.
CPU_MEMORY = 2**30

FLOAT = 4


@dataclass(frozen=True)
class Plan:
    """How an estimate is cut up.

    Attributes:
      per_step: directions in one pass, vmapped.
      chunks: such passes in one call, scanned.
      tokens: at most so many in a batch, at least one window.
    """

    per_step: int
    chunks: int
    tokens: int

    @property
    def per_call(self) -> int:
        """Directions of one call."""
        return self.per_step * self.chunks


def shared_plan(decoder: Decoder, length: int, settings: Estimation) -> Plan:
    """As `plan`, and the same in all processes: by the memory of process 0."""
    return Plan(**json.loads(hosts.agree(json.dumps(asdict(plan(decoder, length, settings))))))


def plan(decoder: Decoder, length: int, settings: Estimation) -> Plan:
    """The plan for windows of so many tokens."""
    per_step = min(settings.per_step or _per_step(decoder, length, settings), settings.directions)
    tokens = max(length, TOKENS_PER_BATCH // per_step)
    needed = -(-settings.directions // per_step)
    work = 4.0 * parameter_count(decoder) * tokens * per_step  # a pair; a multiply and an add for each weight
    calls = -(-needed // max(1, min(MOST_CHUNKS, int(WORK_PER_CALL / work))))
    return Plan(per_step, -(-needed // calls), tokens)


def _per_step(decoder: Decoder, length: int, settings: Estimation) -> int:
    """As many directions as the memory takes; pairs on a CPU one by one, which is as fast there."""
    device = jax.local_devices()[0]
    if device.platform == "cpu" and settings.difference == "spsa":
        return 1
    memory = settings.memory or _free_memory(device)
    tokens = max(length, TOKENS_PER_BATCH // MOST_PER_STEP)
    return max(1, min(MOST_PER_STEP, memory // direction_bytes(decoder, tokens, length, settings)))


def _free_memory(device: Any) -> int:
    found = device.memory_stats() or {}
    if "bytes_limit" not in found:
        return CPU_MEMORY
    return int(0.8 * (found["bytes_limit"] - found.get("bytes_in_use", 0)))


def direction_bytes(decoder: Decoder, tokens: int, length: int, settings: Estimation) -> int:
    """Memory of one more direction in a pass over so many tokens in windows of a length: a bound, not a measurement.

    The streams of both sides (or the tangent), what the widest layer makes from them, a copy of that layer where its
    weights move, and a chunk of logits.
    """
    widest = 0
    for run in decoder.runs:
        size = run_letters(run)
        attention = 4 * size["N"] * size["H"] + 4 * size["K"] * size["H"] + 3 * size["N"] * length
        widest = max(widest, attention, 4 * size["F"])
    streams = 8 * hidden_size(decoder)
    copy = _largest_layer(decoder) if settings.space == "weights" else 0
    return FLOAT * (2 * tokens * (streams + widest) + 2 * copy + LOGITS_AT_ONCE)


def _largest_layer(decoder: Decoder) -> int:
    return max(sum(leaf[0].size for leaf in jax.tree.leaves(run)) for run in decoder.runs)
