"""Numerics that a small change would spoil without breaking anything else: precisions, roundings, streams, totals.

The hashes hold for any machine: they are of random words and of signs.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.data import windows
from minillm_jax.data.batches import Batches
from minillm_jax.data.text import Tokens
from minillm_jax.evaluation.perplexity import perplexity, window_losses
from minillm_jax.model import ops
from minillm_jax.model.loss import sequence_losses
from minillm_jax.pruning import refit_inputs, removal_order, walk
from minillm_jax.pruning.solver import DeviceFit, Groups, Problem
from minillm_jax.scoring.gradient import directions, plan, slopes
from minillm_jax.scoring.gradient.directions import Directions
from minillm_jax.scoring.gradient.spaces import Gates, LowRank, Space, Weights
from minillm_jax.settings import RNGS, Estimation
from tests.helpers import SMALL, logits_of, random_tokens, small_decoder, torch_logits, torch_model

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2

# ------------------------------------------------------------------------------------------------- float32 products


def products(jaxpr: Any) -> Iterator[Any]:
    """The matrix products of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def forward(decoder: Any, tokens: Any) -> Any:
    return sequence_losses(decoder, tokens)


def paired(space: Space) -> Callable[..., Any]:
    def program(decoder: Any, tokens: Any) -> Any:
        drawn = Directions.plain(directions.direction_keys(0, 0, 1))
        return slopes.losses_at(decoder, drawn, tokens, jnp.arange(len(tokens)), jnp.float32(0.1), space)

    return program


def moments(decoder: Any, tokens: Any) -> Any:
    pair = (decoder.embedding[tokens],) * 2
    return walk.add_pair(walk.no_sums(pair, 1, None), pair, (pair[0][0, 0],) * 2, shares=1, mesh=None)


def input_refit(decoder: Any, tokens: Any) -> Any:
    layer = jax.tree.map(lambda array: array[:1], decoder.runs[0])
    width = decoder.embedding.shape[1]
    return refit_inputs.mapped(layer, jnp.eye(width), jnp.zeros(width), names=("mlp.up",), mesh=None)


def removal(decoder: Any, tokens: Any) -> Any:
    return removal_order.order_on_device(jnp.eye(6), jnp.eye(6), jnp.int32(2), count=3, parts=1, gathered=2)


def low_rank_matrix(decoder: Any, tokens: Any) -> Any:
    key = directions.direction_keys(0, 0, 1)[0]
    return LowRank(2).add(jnp.zeros((6, 4)), jnp.float32(1), key, jnp.int32(0), "mlp.up")


def system(decoder: Any, tokens: Any) -> Any:
    """From moments to refitted rows."""
    sums = (jnp.eye(6), jnp.ones(6), jnp.ones((6, 4)), jnp.ones(4), jnp.ones(6), jnp.ones(4))
    fit = DeviceFit(Problem(sums, sums, jnp.ones((6, 4)), Groups(3), (16, 4), 0.5, None, False, "mlp.down"))
    return fit.refitted(fit.removed(1).kept)


@pytest.mark.parametrize(
    "program",
    [
        forward,
        paired(Weights()),
        paired(LowRank(2)),
        paired(Gates()),
        moments,
        low_rank_matrix,
        input_refit,
        removal,
        system,
    ],
    ids=[
        "forward",
        "weights",
        "low-rank",
        "gates",
        "moments",
        "low-rank matrix",
        "input refit",
        "removal order",
        "system",
    ],
)
def test_every_float32_product_has_the_highest_precision(program: Callable[..., Any]) -> None:
    """Accelerators round the operands of others to TF32 or bfloat16; a CPU shows no difference."""
    found = list(products(jax.make_jaxpr(program)(small_decoder(), jnp.zeros((2, 5), jnp.int32)).jaxpr))
    assert found
    assert {equation.params["precision"] for equation in found} == {HIGHEST}


def test_systems_on_the_device_are_solved_with_the_highest_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products inside a factorisation take their precision from the context."""
    seen = []
    cholesky = jnp.linalg.cholesky

    def watched(*arguments: Any) -> Any:
        seen.append(jax.config.jax_default_matmul_precision)
        return cholesky(*arguments)

    monkeypatch.setattr(jnp.linalg, "cholesky", watched)
    jax.clear_caches()  # a traced program would not be traced again
    jax.make_jaxpr(system)(None, None)
    assert set(seen) == {"highest"}


# --------------------------------------------------------------------------------------------------------- bfloat16


def test_rms_norm_rounds_where_transformers_does() -> None:
    """Before the scale in Llama, after it in Gemma; bit for bit."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    rng = np.random.default_rng(0)
    x, scale = (rng.normal(size=shape).astype(np.float32) for shape in ((50, 64), (64,)))
    x, scale = (torch.from_numpy(array).to(torch.bfloat16) for array in (x, scale))
    for kind, module in (("rms", LlamaRMSNorm(64, 1e-5)), ("rms_plus_one", GemmaRMSNorm(64, 1e-5))):
        module.weight.data = scale
        expected = module(x).detach().float().numpy()
        arrays = (jnp.asarray(array.float().numpy(), jnp.bfloat16) for array in (x, scale))
        ours = np.asarray(jax.jit(ops.norm, static_argnums=(3, 4))(*arrays, None, kind, 1e-5), np.float32)
        differ = (ours != expected).mean()
        assert differ < 0.01, kind  # a reciprocal square root may differ in its last bit


@pytest.mark.parametrize("family", SMALL)
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(family: str, tmp_path: Path) -> None:
    """At most twice the error of transformers' own bfloat16, in the root mean square."""
    tokens = random_tokens(97, 2, 24)
    model = torch_model(family)
    model.save_pretrained(tmp_path / "model")
    exact = torch_logits(model, tokens)
    rounded = torch_logits(model.to(torch.bfloat16), tokens)
    ours = logits_of(read_model(tmp_path / "model", "bfloat16").decoder, tokens).astype(np.float32)
    errors = [np.sqrt(np.square(logits - exact).mean()) for logits in (ours, rounded)]
    assert errors[0] < 2 * errors[1]


# ---------------------------------------------------------------------------------------------------- random streams


def fingerprint(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


GOLDEN = {
    "direction": "b729a9eb3528",
    "noise": "43bd5287968a",
    "random": "e869a6963b46",
}


@pytest.mark.parametrize("stream", GOLDEN)
def test_random_streams_keep_their_numbers(stream: str) -> None:
    """A recorded seed must make the same directions in every version."""
    key = jax.random.key_data(directions.stream_key(7, stream, RNGS[0]))
    assert fingerprint(np.asarray(key, "<u4")) == GOLDEN[stream]


@pytest.mark.parametrize(("distribution", "expected"), [("gaussian", "6d6177bed3f2"), ("rademacher", "8c16c882cccd")])
def test_directions_keep_their_entries(distribution: str, expected: str) -> None:
    """Their signs, which no rounding changes. The parts that a Gaussian matrix is drawn in define its direction."""
    key, layer = directions.direction_keys(3, 5, 6)[0], jnp.int32(2)
    entries = np.asarray(directions.draw(key, layer, "mlp.up", (48, 40), distribution))
    assert fingerprint(np.sign(entries).astype(np.int8)) == expected


def test_calibration_windows_keep_their_places() -> None:
    tokens = Tokens(np.arange(4000, dtype=np.int32), "numbers", 1)
    assert windows.sample(tokens, 6, 40, seed=11)[:, 0].tolist() == [1920, 3080, 2400, 3800, 480, 2320]
    assert (
        windows.sample(tokens, 6, 40, seed=12)[:, 0].tolist() != windows.sample(tokens, 6, 40, seed=11)[:, 0].tolist()
    )


# ------------------------------------------------------------------------------------------------ totals and memory


def test_totals_of_losses_are_float64() -> None:
    """A float32 total of these losses has other digits."""
    decoder, batches = small_decoder(), Batches(random_tokens(61, 200, 12))
    losses = window_losses(decoder, batches)
    assert losses.dtype == np.float32
    exact = math.fsum(losses.tolist())
    assert float(losses.sum()) != exact
    assert perplexity(decoder, batches).loss * batches.predictions == pytest.approx(exact, rel=1e-14)


def test_an_estimate_takes_four_fifths_of_the_free_memory() -> None:
    device: Any = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 400})
    assert plan.free_memory(device) == 480
    unknown: Any = SimpleNamespace(memory_stats=lambda: None)
    assert plan.free_memory(unknown) == plan.CPU_MEMORY


def test_the_directions_of_a_pass_follow_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, settings = small_decoder(), Estimation("jvp", "gates", directions=8)
    tokens = max(32, plan.TOKENS_PER_BATCH // plan.MOST_PER_STEP)
    one = plan.direction_bytes(decoder, tokens, 32, settings)
    for count in (1, 3):
        free = int(one * (count + 0.5) / 0.8)
        device = SimpleNamespace(platform="gpu", memory_stats=lambda free=free: {"bytes_limit": free})
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert plan.plan(decoder, 32, settings).per_step == count
