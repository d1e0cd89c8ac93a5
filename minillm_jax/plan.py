"""The cost of a pruning run before anything is loaded: from config.json and the headers of the weight files.

Parameters, shapes and the output format are exact. Memory and floating-point operations are formulas over the shapes,
the number of calibration tokens and the recipe; `docs/benchmarks.md` holds them against measured peaks.
"""

import os
import re
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import jax
import numpy as np

import minillm_jax.hidden  # noqa: F401  before the first import of convert
from convert import formats, gguf_metadata, gguf_write, multimodal
from convert.reader import Description
from minillm_jax import plan_experts
from minillm_jax.budget import allocate, curves, expected, search
from minillm_jax.budget.inventory import kept_count
from minillm_jax.data.batches import TOKENS_PER_BATCH
from minillm_jax.data.calibration_size import widest_mlp
from minillm_jax.errors import InputError, shortened
from minillm_jax.evaluation.layerwise import STREAMS
from minillm_jax.model import costs
from minillm_jax.model.attention import causal_rows
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loss import LOGITS_AT_ONCE
from minillm_jax.model.modules import depth, run_letters
from minillm_jax.model.tree import hidden_size, layer_count, named_arrays
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.recipes.sized import few_tokens, sized
from minillm_jax.recipes.used import check_streamed
from minillm_jax.scoring.criteria import CRITERIA
from minillm_jax.scoring.gradient.plan import direction_bytes
from minillm_jax.scoring.score import resolve
from minillm_jax.settings import BY_CURVES, MEASURED, Output
from minillm_jax.stages import biased_config

FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class Device:
    """A kind of accelerator.

    Attributes:
      memory: bytes of one device.
      flops: peak floating-point operations a second of one device in bfloat16, by its data sheet; None where unknown.
    """

    memory: int
    flops: float | None = None


GB = 10**9
DEVICES = {
    "v4": Device(32 * GB, 275e12),
    "v5e": Device(16 * GB, 197e12),
    "v5p": Device(95 * GB, 459e12),
    "v6e": Device(32 * GB, 918e12),
    "a100": Device(80 * GB, 312e12),
    "h100": Device(80 * GB, 989e12),
    "h200": Device(141 * GB, 989e12),
    "l4": Device(24 * GB, 121e12),
}


@dataclass(frozen=True)
class Plan:
    """What a run will cost and write.

    Attributes:
      model: name of the model.
      recipe: name of the recipe.
      devices: the devices in words.
      count: number of devices.
      parameters_before: of the dense model.
      parameters_after: of the pruned model; None where scores or losses decide.
      costs_before: parameters, macs and memory of the dense model, for a window of `seq_len` tokens.
      costs_after: of the pruned model, or None.
      format: of the output folder; None for per-layer or stock, by the shapes.
      files: bytes of the weight files; None where the shapes are not known.
      tokens: calibration tokens.
      tokens_per_channel: calibration tokens for each channel of the widest MLP.
      few_tokens: a sentence where these are too few; the empty text otherwise.
      flops: floating-point operations on the devices, all together.
      device_bytes: peak memory of one device.
      host_bytes: peak memory of the host process beside the device's.
      device_memory: memory of one device; None where it is not known.
      streamed_bytes: peak memory of the device with --stream; None for a run that needs all weights in memory.
      work_bytes: disk space of the work folder beside the output; None where the shapes are not known.
    """

    model: str
    recipe: str
    devices: str
    count: int
    parameters_before: int
    parameters_after: int | None
    costs_before: dict[str, int]
    costs_after: dict[str, int] | None
    format: str | None
    files: int | None
    tokens: int
    tokens_per_channel: float
    few_tokens: str
    flops: float
    device_bytes: int
    host_bytes: int
    device_memory: int | None
    streamed_bytes: int | None
    work_bytes: int | None

    @property
    def fits(self) -> bool | None:
        """Whether the peak memory fits the device; None where the device's memory is not known."""
        return None if self.device_memory is None else self.device_bytes <= self.device_memory

    def as_json(self) -> dict[str, Any]:
        """All figures as one JSON object."""
        return asdict(self) | {"fits": self.fits}


def plan(described: Description, name: str, recipe: Recipe, devices: str | None = None) -> Plan:
    """The cost of a run. A text that is too short for the windows that suit the model makes it smaller.

    Args:
      described: configuration and sizes of the model.
      name: of the model.
      recipe: settings as `recipes.used` completes them.
      devices: `v5e-8`, `h100`, `h100-4`; this machine by default.

    Raises:
      InputError: the devices are unknown, or the recipe does not suit the model's shapes.
    """
    kind, count, memory = parse_devices(devices)
    dense = described.abstract
    recipe = sized(recipe, dense)
    config = biased_config(dense.config) if recipe.refit.method == "bias" else dense.config
    after = pruned_sizes(config, described.sizes, recipe)
    window, dtype = recipe.budget.window, np.dtype(dense.embedding.dtype)
    small = None if after is None else build(config, after, dtype)
    layout = None if after is None else output_format(config, after, described, recipe.output)
    samples, length = _windows(recipe)
    per_channel = samples * length / widest_mlp(dense)
    return Plan(
        model=name,
        recipe=recipe.name,
        devices=kind,
        count=count,
        parameters_before=costs.cost(dense, "parameters"),
        parameters_after=None if small is None else costs.cost(small, "parameters"),
        costs_before=costs.all_costs(dense, window),
        costs_after=None if small is None else costs.all_costs(small, window),
        format=multimodal.unequal_format(described.raw_config) if layout is None else layout[0],
        files=None if layout is None else layout[1],
        tokens=samples * length,
        tokens_per_channel=per_channel,
        few_tokens=few_tokens(recipe, samples, length, per_channel),
        flops=run_flops(dense, small or dense, recipe),
        device_bytes=device_bytes(dense, small or dense, recipe, count, kind == "cpu"),
        host_bytes=host_bytes(dense, recipe, on_cpu=kind == "cpu"),
        device_memory=memory,
        streamed_bytes=streamed_bytes(dense, recipe, count, kind == "cpu"),
        work_bytes=None if small is None else costs.block_parameters(small) * dtype.itemsize,
    )


def _windows(recipe: Recipe) -> tuple[int, int]:
    """Number and length of the calibration windows of a recipe that `recipes.sized` has completed."""
    samples, length = recipe.data.samples, recipe.data.seq_len
    assert samples is not None, "filled in by sized"
    assert length is not None, "filled in by sized"
    return samples, length


def parse_devices(text: str | None) -> tuple[str, int, int | None]:
    """Kind, number and memory of the devices that `v5e-8` or `h100` stands for; this machine for None.

    Raises:
      InputError: the kind is unknown, or the number is not a number.
    """
    if text is None:
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else _ram()
        return device.platform, 1 if device.platform == "cpu" else jax.local_device_count(), limit
    kind, _, number = text.lower().partition("-")
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(-[1-9]\d{{0,5}})?", text, re.ASCII | re.IGNORECASE):
        raise InputError(
            f"--devices {shortened(text)!r} is not understood; expected a kind and a number, v5e-8 or h100, with a "
            f"kind of {', '.join(DEVICES)}"
        )
    count = int(number or 1)
    return text.lower(), count, DEVICES[kind].memory


def _ram() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return None


# --------------------------------------------------------------------------------------------------------- shapes


def pruned_sizes(config: DecoderConfig, sizes: Sizes, recipe: Recipe) -> Sizes | None:
    """The sizes of the pruned decoder; None where scores or losses decide them.

    Raises:
      InputError: the budget does not suit the model, cannot be met, or removes nothing.
    """
    return expected.pruned_sizes(config, sizes, recipe.budget, recipe.named_by("budget", "layers"))


def output_format(config: DecoderConfig, sizes: Sizes, described: Description, output: Output) -> tuple[str, int]:
    """The format of the output folder, and the bytes of its weight files.

    Raises:
      InputError: the format cannot hold the shapes.
    """
    dtype = np.dtype(described.abstract.embedding.dtype)
    multimodal.check_format(described.raw_config, output.format)
    if output.format == formats.GGUF:
        gguf_metadata.arch_for(config, sizes)
        return formats.GGUF, gguf_write.file_bytes(build(config, sizes, dtype), output.gguf_type)
    if output.format == formats.FLAX:
        return formats.FLAX, costs.cost(build(config, sizes), "parameters") * dtype.itemsize
    layout = formats.describe(config, sizes, described.raw_config, output.format)
    return layout.format, costs.cost(build(config, layout.sizes), "parameters") * dtype.itemsize


# --------------------------------------------------------------------------------------------------------- memory


def device_bytes(dense: Decoder, pruned: Decoder, recipe: Recipe, count: int = 1, on_cpu: bool = False) -> int:
    """Peak memory of one device: the largest of the stages that score, walk through the layers, and stack the result.

    With several devices this is an upper bound: the weights are spread over all of them, but the residual streams and
    the Gram matrices count whole, because a mesh may be shared over one axis only.
    """
    width = np.dtype(dense.embedding.dtype).itemsize
    weights, smaller = (costs.cost(decoder, "parameters") * width for decoder in (dense, pruned))
    scores = score_bytes(dense, recipe, on_cpu)
    walked = smaller // count + walk_bytes(dense, recipe, on_cpu) if walks(recipe) else 0
    composed = smaller // count + scores if recipe.budget.allocation == "search" else 0
    work = _work_on_experts(recipe)
    experts = 0 if work is None else smaller // count + plan_experts.memory(dense, work)
    return weights // count + max(scores, walked, experts, composed, 2 * smaller // count)


def streamed_bytes(dense: Decoder, recipe: Recipe, count: int = 1, on_cpu: bool = False) -> int | None:
    """Peak memory of one device with --stream; None for a run that needs all weights in memory.

    It holds one layer of the dense and of the pruned model, and what the walk or the evaluation needs. An evaluation
    holds the next layer, which is read meanwhile, in the place of the second one. The arrays outside the layers are on
    an accelerator for the evaluation alone.
    """
    try:
        check_streamed(recipe.budget, resolve(recipe.scoring)[1], recipe.output.format)
    except InputError:
        return None
    width = np.dtype(dense.embedding.dtype).itemsize
    outer = (costs.cost(dense, "parameters") - costs.block_parameters(dense)) * width // count
    walked, beside_outer = 0, []
    if not walks(recipe):
        beside_outer.append(forward_bytes(dense, recipe, on_cpu))
    elif on_cpu:
        beside_outer.append(walk_bytes(dense, recipe, on_cpu))
    else:
        walked = parked_walk_bytes(dense, recipe)
    if recipe.evaluation.text is not None:
        beside_outer.append(STREAMS + forward_bytes(dense, recipe, on_cpu))
    if CRITERIA[recipe.scoring.criterion].takes_gradient:
        beside_outer.append(STREAMS + _estimate_bytes(dense, recipe))
    work = _work_on_experts(recipe)
    if work is not None:
        beside_outer.append(plan_experts.memory(dense, work, parked=not on_cpu))
    layers = 2 * _layer_parameters(dense) * width // count
    return layers + max(walked, outer + max(beside_outer, default=0))


def score_bytes(dense: Decoder, recipe: Recipe, on_cpu: bool) -> int:
    """Memory of the scores beside the weights: a forward pass, and the gradient estimate; 0 where nothing is estimated.

    XLA for the CPU keeps a float32 copy of all bfloat16 and float16 weights of a program.
    """
    criterion, (_, length) = CRITERIA[recipe.scoring.criterion], _windows(recipe)
    evaluates = recipe.evaluation.text is not None or recipe.budget.allocation in MEASURED
    if not (criterion.reads_text and not criterion.while_pruning) and not evaluates:
        return 0
    parameters = costs.cost(dense, "parameters")
    upcast = FLOAT * parameters if on_cpu and np.dtype(dense.embedding.dtype).itemsize < FLOAT else 0
    estimate, tokens = recipe.scoring.estimation, _tokens_per_batch(recipe)
    if not criterion.takes_gradient:
        gradient = 0
    elif estimate.estimator == "exact":
        # The squares are those of single windows. A stream a layer waits for the backward pass.
        sums = (2 if criterion.curved else 1) * costs.block_parameters(dense) + _layer_parameters(dense)
        streams = layer_count(dense) * (length if criterion.curved else tokens) * hidden_size(dense)
        gradient = FLOAT * (streams + (0 if criterion.by_gates else sums))
    else:
        gradient = _estimate_bytes(dense, recipe)
    return upcast + gradient + forward_bytes(dense, recipe, on_cpu)


def _estimate_bytes(dense: Decoder, recipe: Recipe) -> int:
    """Memory of a gradient estimate along the directions of one pass beside the weights."""
    estimate, (_, length) = recipe.scoring.estimation, _windows(recipe)
    tokens = _tokens_per_batch(recipe)
    return (estimate.directions_per_step or 1) * direction_bytes(dense, tokens, length, estimate)


def walk_bytes(dense: Decoder, recipe: Recipe, on_cpu: bool) -> int:
    """Memory of the walk through the layers beside the weights of both models.

    The moments of a projection stay beside its system and the inverse.
    """
    streams = _streams(dense, prod(_windows(recipe)))
    sums = 3 if recipe.refit.ridge is not None else 4  # with those of the held-out windows
    moments = sums * sum(_moments(dense))
    copies = 2 * _layer_parameters(dense)  # an accelerator widens bfloat16 weights inside its products
    return FLOAT * (streams + moments + copies) + _activations(dense, recipe, on_cpu)


def parked_walk_bytes(dense: Decoder, recipe: Recipe) -> int:
    """The same where residual streams and moments wait on the host, as those of a streamed model on an accelerator.

    One sum of moments is there while it is collected, with the streams of one batch. Later a system and the moments of
    two parts of the windows are, or two matrices with products with the weights. `bench/tpu_job.py` has these figures
    from the compiler.
    """
    matrix, products = _moments(dense)
    streams = _streams(dense, _tokens_per_batch(recipe))
    collected = FLOAT * (matrix + products + streams) + _activations(dense, recipe, on_cpu=False)
    return max(collected, FLOAT * (2 * matrix + max(matrix, 3 * products)))


def _streams(dense: Decoder, tokens: int) -> int:
    """Numbers in the residual streams of both models and in what a sublayer is fitted to."""
    return (5 if dense.config.parallel else 3) * tokens * hidden_size(dense)


def _moments(dense: Decoder) -> tuple[int, int]:
    """Numbers in the Gram matrix of the widest projection's inputs, and in its products with the outputs."""
    letters = _letters(dense)
    inputs = max(letters["N"] * letters["H"], letters["F"])
    return inputs**2, inputs * letters["D"]


def forward_bytes(dense: Decoder, recipe: Recipe, on_cpu: bool) -> int:
    """Memory of a forward pass over one batch beside the weights: one layer's activations, one chunk of logits."""
    return _activations(dense, recipe, on_cpu) + FLOAT * LOGITS_AT_ONCE


def _activations(dense: Decoder, recipe: Recipe, on_cpu: bool) -> int:
    """Memory of the arrays inside one layer. XLA for the CPU holds three copies of the scores of attention."""
    letters, (_, length), tokens = _letters(dense), _windows(recipe), _tokens_per_batch(recipe)
    scores = (3 if on_cpu else 1) * letters["N"] * causal_rows(length)
    attention = 4 * letters["N"] * letters["H"] + 4 * letters["K"] * letters["H"] + scores
    return FLOAT * tokens * (8 * letters["D"] + max(attention, 4 * letters["F"]))


def _work_on_experts(recipe: Recipe) -> plan_experts.Work | None:
    return plan_experts.work_of(recipe, *_windows(recipe), _tokens_per_batch(recipe))


def _tokens_per_batch(recipe: Recipe) -> int:
    samples, length = _windows(recipe)
    return max(length, min(TOKENS_PER_BATCH, samples * length))


def host_bytes(dense: Decoder, recipe: Recipe, on_cpu: bool) -> int:
    """Peak memory of the host process beside the device's: libraries, float64 systems, one layer on its way.

    On a CPU the device's memory is the host's too, and is not counted here.
    """
    letters = _letters(dense)
    inputs = max(letters["N"] * letters["H"], letters["F"])
    systems = 0
    if walks(recipe):
        matrices = 6 if recipe.scoring.criterion == "obs" else 3
        matrices += 2 if recipe.refit.ridge is None else 0  # the systems of the fit and of the held-out windows
        systems = DOUBLE * (matrices * inputs**2 + 3 * inputs * letters["D"])
    layer = 0 if on_cpu else 2 * FLOAT * _layer_parameters(dense)
    return LIBRARIES + systems + layer


# Resident memory of a process that has imported JAX, transformers and Orbax and compiled a few programs.
LIBRARIES = 650 * 10**6


def walks(recipe: Recipe) -> bool:
    """Whether the run walks through the layers with calibration activations."""
    return bool(recipe.budget.kinds) and (
        recipe.scoring.criterion == "obs" or recipe.refit.method != "none" or recipe.budget.allocation in MEASURED
    )


def _letters(decoder: Decoder) -> dict[str, int]:
    """The largest size of every axis letter of the layers."""
    runs = [run_letters(run) for run in decoder.runs]
    return {letter: max(run[letter] for run in runs) for letter in runs[0]}


def _layer_parameters(decoder: Decoder) -> int:
    """Parameters of the largest layer."""
    return max(sum(leaf.size // depth(run) for _, leaf in named_arrays(run)) for run in decoder.runs)


# --------------------------------------------------------------------------------------------------------- work


def run_flops(dense: Decoder, pruned: Decoder, recipe: Recipe) -> float:
    """Floating-point operations on the devices: forward passes, Gram matrices, and the gradient estimate."""
    samples, length = _windows(recipe)
    forward = 2.0 * costs.cost(dense, "macs", length) * samples
    total = forward * gradient_passes(recipe) * recipe.budget.rounds
    if walks(recipe):
        total += walk_flops(dense, pruned, recipe) * recipe.budget.rounds
    elif recipe.scoring.criterion in ("wanda", "fms", "noise"):
        total += forward
    elif recipe.scoring.criterion == "flap":
        total += 2 * forward
    work = _work_on_experts(recipe)
    if work is not None:
        total += plan_experts.flops(dense, work)
    if "layers" in recipe.budget.structures:
        total += forward * layer_passes(recipe, layer_count(dense))
    if recipe.budget.allocation in MEASURED:
        few = min(1.0, curves.tokens_of_curves(widest_mlp(dense)) / (samples * length))
        walks_there = few if recipe.budget.allocation in BY_CURVES else 1.0
        walks_there += recipe.budget.allocation == "search"  # the walk that makes the library
        passes = allocation_passes(recipe, layer_count(dense))
        total += walks_there * walk_flops(dense, dense, recipe) + forward * passes
    return total


def allocation_passes(recipe: Recipe, layers: int) -> float:
    """Forward passes of an allocation that measures, in forward passes over all calibration windows.

    Each begins at the pruned layer: half a pass by the mean. The allocations by curves measure fewer levels, on fewer
    tokens; all measure the level without any groups where whole sublayers may be removed. Those of a search are whole
    passes.
    """
    budget, tokens = recipe.budget, prod(_windows(recipe))
    by_curves = budget.allocation in BY_CURVES
    each = len(curves.MEASURED_SHARES if by_curves else allocate.SHARES)
    levels = sum((each if budget.single(kind) else 0) + budget.whole(kind) for kind in budget.kinds)
    share = min(1.0, curves.MEASURED_TOKENS / tokens) if by_curves else 1.0
    searched = 0.0
    if budget.allocation == "search":
        searched = search.measured_tokens(len(allocate.layers_of(budget, layers))) / tokens
    return share * (1 + levels * layers / 2) + searched


def layer_passes(recipe: Recipe, count: int) -> int:
    """Forward passes of the removal of layers: in each removal, one for every layer that may still be removed."""
    removable = len(allocate.layers_of(recipe.budget, count))
    removed = removable - kept_count(removable, recipe.budget.ratio or 0.0)
    return sum(removable - done for done in range(removed))


def gradient_passes(recipe: Recipe) -> float:
    """Forward passes of the gradient estimate, in forward passes over all calibration windows."""
    criterion = CRITERIA[recipe.scoring.criterion]
    if not criterion.takes_gradient or not (recipe.budget.kinds or "hidden" in recipe.budget.structures):
        return 0.0
    match recipe.scoring.estimation.estimator:
        case "exact":
            return 4.0  # forward, forward again for the layers' activations, backward
        case "jvp":
            return 2.0 * recipe.scoring.estimation.directions
    return 2.0 * recipe.scoring.estimation.directions + 1


def walk_flops(dense: Decoder, pruned: Decoder, recipe: Recipe) -> float:
    """Of the walk: three passes through every dense sublayer, one through every pruned one, and the Gram matrices."""
    letters, tokens = _letters(dense), prod(_windows(recipe))
    layers = layer_count(dense)
    blocks = 2.0 * costs.block_parameters(dense) * tokens
    smaller = 2.0 * costs.block_parameters(pruned) * tokens
    grams = sum(2.0 * tokens * n * (n + letters["D"]) for n in (letters["N"] * letters["H"], letters["F"]))
    inputs = 2 * 2.0 * tokens * 2 * letters["D"] ** 2 if recipe.refit.method == "least-squares" else 0.0
    return (5 if inputs else 3) * blocks + smaller + layers * (grams + inputs)
