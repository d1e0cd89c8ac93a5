"""Number of directions in one pass, by memory, and number of passes in one call of the compiled program, by work."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from minillm_jax.data.batches import TOKENS_PER_BATCH
from minillm_jax.devices import hosts
from minillm_jax.evaluation.layerwise import STREAMS
from minillm_jax.model.attention import causal_rows
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import LOGITS_AT_ONCE
from minillm_jax.model.modules import depth, run_letters
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import hidden_size, parameter_count
from minillm_jax.scoring.gradient.layerwise import stream_bytes
from minillm_jax.settings import Estimation

# Upper limit for the directions of one pass; more directions save hardly any time.
MOST_PER_STEP = 8

# Floating-point operations of one call: some seconds on a CPU. Each call reports progress and may save a checkpoint.
WORK_PER_CALL = 1e12
MOST_CHUNKS = 64

# Bytes for the estimate on a CPU, where JAX does not report the free memory.
CPU_MEMORY = 2**30

# Bytes of a float32.
FLOAT = 4


@dataclass(frozen=True)
class Plan:
    """How an estimate is divided into calls. It changes speed and memory, not the directions.

    Attributes:
      per_step: number of directions in one pass, vmapped.
      chunks: number of passes in one call, one after the other.
      tokens: tokens of a batch on each device, at least one window.
    """

    per_step: int
    chunks: int
    tokens: int

    @property
    def per_call(self) -> int:
        """Number of directions in one call."""
        return self.per_step * self.chunks


def shared_plan(decoder: Decoder, length: int, settings: Estimation, tokens: int) -> Plan:
    """The plan of process 0, in all processes; the arguments are those of `plan`, and the tokens of all windows."""
    if isinstance(decoder, StreamedDecoder):
        found = plan_of_streams(decoder, length, settings, tokens)
    else:
        found = plan(decoder, length, settings)
    return Plan(**json.loads(hosts.agree(json.dumps(asdict(found)))))


def plan_of_streams(decoder: StreamedDecoder, length: int, settings: Estimation, tokens: int) -> Plan:
    """The plan for a model that is read once a call: as many directions in a call as the bytes of their streams allow.

    Args:
      decoder: the model.
      length: tokens of a window.
      settings: as in `plan`.
      tokens: tokens of all windows.
    """
    one_pass = plan(decoder, length, settings, work_per_call=0.0)
    streams = tokens * stream_bytes(decoder, settings.estimator == "spsa") * one_pass.per_step
    passes = -(-settings.directions // one_pass.per_step)
    calls = -(-passes // max(1, STREAMS // streams))
    return replace(one_pass, chunks=-(-passes // calls))


def plan(
    decoder: Decoder,
    length: int,
    settings: Estimation,
    tokens_at_once: int = TOKENS_PER_BATCH,
    work_per_call: float = WORK_PER_CALL,
) -> Plan:
    """The plan for windows of a length.

    Args:
      decoder: the model.
      length: tokens of a window.
      settings: settings of the estimate; `directions_per_step` and `memory` limit the directions of a pass.
      tokens_at_once: tokens of one pass on each device, over all its directions; at least one window.
      work_per_call: floating-point operations of one call; at least one pass.
    """
    per_step = settings.directions_per_step or _per_step(decoder, length, settings, tokens_at_once)
    per_step = min(per_step, settings.directions)
    tokens = max(length, tokens_at_once // per_step)
    passes = -(-settings.directions // per_step)
    work = 4.0 * parameter_count(decoder) * tokens * per_step  # two losses; a multiply and an add for each weight
    calls = -(-passes // max(1, min(MOST_CHUNKS, int(work_per_call / work))))
    return Plan(per_step, -(-passes // calls), tokens)


def _per_step(decoder: Decoder, length: int, settings: Estimation, tokens_at_once: int) -> int:
    """As many directions as the memory holds; one for pairs on a CPU, where more are not faster."""
    device = jax.local_devices()[0]
    if device.platform == "cpu" and settings.estimator == "spsa":
        return 1
    memory = settings.memory or free_memory(device)
    tokens = max(length, tokens_at_once // MOST_PER_STEP)
    return max(1, min(MOST_PER_STEP, memory // direction_bytes(decoder, tokens, length, settings)))


def free_memory(device: Any) -> int:
    """Bytes for the estimate: most of the device's free memory."""
    statistics = device.memory_stats() or {}
    if "bytes_limit" not in statistics:
        return CPU_MEMORY
    return int(0.8 * (statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)))


def direction_bytes(decoder: Decoder, tokens: int, length: int, settings: Estimation) -> int:
    """Bytes of one more direction in a pass: an upper bound by formula.

    The residual stream of a side (or the tangent) and the activations of the widest layer, all twice, a copy of the
    largest layer in the space `weights`, and a chunk of logits.

    Args:
      decoder: the model.
      tokens: tokens of the pass.
      length: tokens of a window.
      settings: settings of the estimate, resolved.
    """
    widest = 0
    for run in decoder.runs:
        size = run_letters(run)
        scores = 3 * size["N"] * causal_rows(length)
        attention = 4 * size["N"] * size["H"] + 4 * size["K"] * size["H"] + scores
        widest = max(widest, attention, 4 * size["F"])
    streams = 8 * hidden_size(decoder)
    copy = _largest_layer(decoder) if settings.space == "weights" else 0
    return FLOAT * (2 * tokens * (streams + widest) + 2 * copy + LOGITS_AT_ONCE)


def _largest_layer(decoder: Decoder) -> int:
    """Number of entries of the largest layer."""
    return max(sum(leaf.size // depth(run) for leaf in jax.tree.leaves(run)) for run in decoder.runs)
