"""Runs padded to one compute the same, with the same gradients, and compile once."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.evaluation.layer_errors import layer_errors
from minillm_jax.model import padded_runs
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.modules import depth
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.recovery import gradients
from minillm_jax.recovery.adapter import initial
from minillm_jax.recovery.objective import Sequences, Weights
from minillm_jax.recovery.settings import Lora
from minillm_jax.recovery.trained import TrainedAdapter, TrainedArrays
from tests.helpers import CONFIGURATIONS, JOINT_NORMS, quickly, random_tokens, small_decoder, torch_model

QUICK = ("llama", "gemma2", "opt", "bloom", "gpt_neox", "phi3")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are made for a platform with a slow compiler."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def as_one(decoder: Decoder) -> Decoder:
    return with_runs(decoder, jax.jit(padded_runs.one_run)(list(decoder.runs)))


def unequal(decoder: Decoder, seed: int = 0) -> Decoder:
    """The decoder with other numbers of heads and channels in every layer, none in the last."""
    generator = np.random.default_rng(seed)

    def kept(count: int, layers: int) -> list[np.ndarray]:
        numbers = [max(1, count - 1 - layer) for layer in range(layers - 1)] + [0]
        return [np.sort(generator.permutation(count)[:number]) for number in numbers]

    sizes, layers = padded_runs.largest(decoder.runs), sum(depth(run) for run in decoder.runs)
    return slice_groups(decoder, {"head": kept(sizes["K"], layers), "channel": kept(sizes["F"], layers)})


def hidden(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda d, t: final_hidden(d, t))(decoder, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", quickly([n for n, (f, _) in CONFIGURATIONS.items() if f not in JOINT_NORMS], QUICK))
def test_padded_layers_compute_the_same_in_every_family(name: str, tmp_path: Path) -> None:
    family, changes = CONFIGURATIONS[name]
    torch_model(family, **changes).save_pretrained(tmp_path / "model")
    decoder, tokens = unequal(read_model(tmp_path / "model").decoder), random_tokens(97, 2, 20)
    padded = as_one(decoder)
    assert (len(decoder.runs), len(padded.runs)) == (3, 1)
    np.testing.assert_allclose(hidden(padded, tokens), hidden(decoder, tokens), rtol=1e-5, atol=1e-5)


def test_query_heads_keep_their_key_value_heads() -> None:
    """Layers with 2, 1 and 2 query heads a key/value head: padding comes behind those of each key/value head."""
    decoder = slice_groups(small_decoder(), {"query": [np.arange(8), np.arange(0, 8, 2), np.arange(8)]})
    tokens = random_tokens(61, 2, 20)
    np.testing.assert_allclose(hidden(as_one(decoder), tokens), hidden(decoder, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [TrainedAdapter(Lora(rank=2)), TrainedArrays("all")], ids=["adapter", "arrays"])
def test_gradients_reach_the_real_elements_alone(trained: Any, request: Any) -> None:
    decoder, tokens = unequal(small_decoder(layers=5)), jnp.asarray(random_tokens(61, 2, 12))
    parameters = jax.tree.map(
        lambda array: array + 0.01 * jax.random.normal(jax.random.key(array.size), array.shape),
        trained.initial(decoder, 0),
    )
    counted = jnp.ones(tokens.shape, bool).at[:, 0].set(False)
    part = gradients.Part(None, Sequences(tokens, counted), Weights(0.0, 1.0), jnp.float32(1 / 22), jax.random.key(0))

    def found() -> Any:
        return jax.jit(lambda p, d: gradients.backward(trained)(p, d, part))(parameters, decoder)

    every = found()
    request.getfixturevalue("on_gpu")
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-6), found(), every)


def test_an_adapter_of_one_run_has_zeros_beside_the_real_factors() -> None:
    decoder = unequal(small_decoder())
    (padded,) = jax.jit(lambda: adapters_of(decoder))()
    layers = sum(depth(run) for run in decoder.runs)
    assert padded["attention.q"].b.shape == (layers, 2, 6, 4)
    assert padded["mlp.down"].a.shape == (layers, 11, 2)
    assert not np.any(padded["mlp.down"].a[1, 10:])
    assert not np.any(padded["mlp.down"].a[2])


def adapters_of(decoder: Decoder) -> Any:
    from minillm_jax.recovery import adapter

    return adapter.one_run(decoder.runs, initial(decoder, Lora(rank=2), 0))


def test_few_runs_and_fast_compilers_scan_every_run(request: Any) -> None:
    decoder = unequal(small_decoder(layers=6))
    assert not padded_runs.worth_padding(decoder.runs)
    request.getfixturevalue("on_gpu")
    assert padded_runs.worth_padding(decoder.runs)
    assert not padded_runs.worth_padding(decoder.runs[:4])


def test_a_copy_that_a_device_has_no_memory_for_is_not_made(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": limit}

    decoder = unequal(small_decoder(layers=6))
    padded = sum(array.nbytes for array in jax.tree.leaves(padded_runs.one_run(decoder.runs)))
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    limit = 4 * padded
    assert padded_runs.worth_padding(decoder.runs)
    limit -= 1
    assert not padded_runs.worth_padding(decoder.runs)


def test_one_scan_is_compiled(on_gpu: None) -> None:
    decoder = unequal(small_decoder(layers=6))
    text = jax.jit(final_hidden).lower(decoder, jnp.zeros((1, 8), jnp.int32)).as_text()
    assert text.count("stablehlo.while") == 1


def test_errors_of_layers_are_those_of_every_run(request: Any) -> None:
    dense, windows = small_decoder(layers=5), Batches(random_tokens(61, 3, 12))
    pruned = unequal(dense)
    every = layer_errors(dense, pruned, windows)
    request.getfixturevalue("on_gpu")
    padded = layer_errors(dense, pruned, windows)
    for field in ("stream", "attention", "mlp"):
        np.testing.assert_allclose(getattr(padded, field), getattr(every, field), rtol=1e-4)
