"""Models whose layers are read one at a time: the same weights and figures as in memory."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minillm_jax as mj
from convert.reader import read_model
from minillm_jax import api
from minillm_jax.data.batches import Batches
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.evaluation import layerwise
from minillm_jax.model.modules import Block
from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.model.tree import parameter_count
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.run import Job, Result, run
from minillm_jax.settings import Data, Evaluation
from tests import test_resuming as interrupted
from tests.helpers import hugging_face_folder, load_torch, logits_of, random_tokens, small_decoder, torch_logits
from tests.test_resuming import check_equal, make_model


def prune(root: Path, output: str, **options: Any) -> Result:
    text = str(root / "tokens.npy")
    base = Recipe(data=Data(text, 6, 24), evaluation=Evaluation(text, 24, 0))
    recipe, given = recipes.with_options(base, {"ratio": 0.5} | options)
    return run(Job(str(root / "model"), str(root / output), recipe, given))


CASES = [
    ("llama", {}),
    ("opt", {"criterion": "flap", "refit": "bias"}),
    ("llama", {"criterion": "flap", "refit": "bias"}),
    ("bloom", {"allocation": "equal", "format": "padded"}),
    ("gemma2", {"criterion": "wanda", "refit": "none", "heads": "query"}),
    ("llama", {"criterion": "magnitude", "rounds": 2, "format": "gguf", "refit": "none"}),
    ("llama", {"structures": ("attention", "channels"), "allocation": "curves", "max_shard_size": "20KB"}),
    ("gpt_neox", {"criterion": "random"}),
    ("qwen2_moe", {"structures": ("experts", "expert-channels"), "ratio": 0.2}),
    ("qwen2_moe", {"structures": ("heads", "channels", "experts"), "ratio": 0.2}),  # layers of unequal size
    ("llama", {"criterion": "fms", "directions": 3, "epsilon": 1e-2, "refit": "none"}),
    ("opt", {"criterion": "gate", "estimator": "jvp", "directions": 3, "refit": "none"}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_streamed_pruning_writes_the_weights_of_a_pruning_in_memory(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    root = make_model(tmp_path, family)
    in_memory, streamed = (prune(root, name, **options, stream=name == "streamed") for name in ("memory", "streamed"))
    assert isinstance(streamed.pruned.decoder, StreamedDecoder)
    assert not (root / "streamed.checkpoint").exists()
    for before, after in ((in_memory.before, streamed.before), (in_memory.after, streamed.after)):
        assert before is not None
        assert after is not None
        assert after.loss == pytest.approx(before.loss, rel=1e-6)
    weights = sorted(path.name for path in (root / "memory").glob("model*"))
    assert weights == sorted(path.name for path in (root / "streamed").glob("model*"))
    for name in weights:
        assert (root / "memory" / name).read_bytes() == (root / "streamed" / name).read_bytes()
    assert in_memory.errors is not None
    assert streamed.errors is not None
    np.testing.assert_allclose(streamed.errors.stream, in_memory.errors.stream, rtol=1e-5)


def test_an_interrupted_streamed_pruning_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The streams of the trials of the budget are in the work folder too."""
    root = make_model(tmp_path)
    calls = interrupted.prune(root, "whole", None, stream=True)
    for share in (0.3, 0.5, 0.8):
        with pytest.raises(interrupted.Interrupted):
            interrupted.prune(root, "resumed", (calls, int(share * len(calls))), stream=True)
    names = {path.name.split("-")[0] for path in (root / "resumed.checkpoint").glob("*.safetensors")}
    assert names == {"streams", "budget.safetensors", "round"}
    interrupted.prune(root, "resumed", None, stream=True)
    check_equal(root / "whole", root / "resumed")


@pytest.mark.parametrize("solver", ["host", "device"])
def test_arrays_in_the_memory_of_the_host_do_not_change_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    """As on an accelerator, which holds the residual streams of one batch, no moments, and no embedding in a layer."""
    root = make_model(tmp_path)
    prune(root, "whole", stream=True, solver=solver, allocation="curves")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    prune(root, "parked", stream=True, solver=solver, allocation="curves")
    check_equal(root / "whole", root / "parked")


def test_a_streamed_model_in_python(tmp_path: Path) -> None:
    """Loaded, evaluated, pruned and saved without a work folder."""
    folder = hugging_face_folder(tmp_path / "model", num_hidden_layers=3)
    tokens = random_tokens(97, 8, 24)
    streamed, in_memory = (api.load(folder, stream=stream) for stream in (True, False))
    assert parameter_count(streamed.decoder) == parameter_count(in_memory.decoder)
    losses = [api.evaluate(model, tokens, 24).loss for model in (streamed, in_memory)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    pruned = api.prune(streamed, tokens, 0.5, seq_len=24, samples=8)
    saved = tmp_path / "pruned"
    api.save(pruned, saved)
    expected = torch_logits(load_torch(saved, remote_code=True), tokens)
    np.testing.assert_allclose(logits_of(read_model(saved).decoder, tokens), expected, atol=1e-4)


def test_windows_that_do_not_fit_pass_the_layers_in_parts(tmp_path: Path) -> None:
    """The losses are the same whatever the number of windows on the devices."""
    model = api.load(hugging_face_folder(tmp_path / "model"), stream=True)
    batches = Batches(random_tokens(97, 7, 20), tokens_per_batch=40)
    reads: list[int] = []

    def read(index: int) -> Block:
        reads.append(index)
        return model.decoder.read(index)

    decoder = StreamedDecoder(model.decoder, model.decoder.runs, read)
    whole = layerwise.layerwise_losses(decoder, batches)
    few = layerwise.layerwise_losses(decoder, batches, most_bytes=2 * 40 * 64 * 4)
    np.testing.assert_array_equal(few, whole)
    assert reads == 3 * [0, 1, 2]  # once, and once for each two batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "element-1"}, "the exact gradient needs all weights of the model in memory"),
        ({"structures": ("layers",)}, "the removal of layers needs all weights"),
        ({"allocation": "search"}, "--budget search needs all weights"),
        ({"format": "flax"}, "the format flax needs all weights"),
    ],
)
def test_runs_that_need_all_weights_are_not_streamed(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    root = make_model(tmp_path)
    with pytest.raises(InputError, match=message):
        prune(root, "pruned", stream=True, **options)


def test_functions_of_whole_models_refuse_a_streamed_one(tmp_path: Path) -> None:
    model = api.load(hugging_face_folder(tmp_path / "model"), stream=True)
    tokens = random_tokens(97, 4, 24)
    calls: dict[str, Callable[[], Any]] = {
        "generation": lambda: mj.generate(model, "text"),
        "a comparison": lambda: mj.compare(model, model, tokens),
        "a recovery": lambda: mj.recover(model, tokens),
        "the format flax": lambda: mj.save(model, tmp_path / "flax", "flax"),
        "the exact gradient": lambda: mj.score(model, Batches(tokens), "element-1"),
        "the removal of layers": lambda: mj.prune(model, Batches(tokens), 0.5, structures=("layers",)),
    }
    for what, call in calls.items():
        with pytest.raises(InputError, match=f"{what} needs all (layers|weights)"):
            call()
    assert not (tmp_path / "flax").exists()


def test_damaged_layers_are_found_when_they_are_read(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = api.load(folder, stream=True)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*(NaN|nan|finite)"):
        api.evaluate(model, random_tokens(97, 4, 24), 24)


def test_a_flax_checkpoint_is_not_streamed(tmp_path: Path) -> None:
    model = api.load(hugging_face_folder(tmp_path / "model"))
    api.save(model, tmp_path / "flax", "flax")
    with pytest.raises(InputError, match="layers of a Flax checkpoint cannot be read one at a time"):
        api.load(tmp_path / "flax", stream=True)


def test_layers_of_other_types_are_refused(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].astype(np.float16)}, folder / "model.safetensors", {"format": "pt"})
    model = api.load(folder, stream=True)
    with pytest.raises(InputError, match=r"mlp\.up\.kernel of layer 1 is float16, that of the first layer float32"):
        api.evaluate(model, random_tokens(97, 4, 24), 24)
    api.evaluate(api.load(folder, "float32", stream=True), random_tokens(97, 4, 24), 24)


def test_the_next_layer_is_read_while_the_caller_works_and_its_error_comes_with_it() -> None:
    """The last layer fails: the caller hears of it when it asks for that layer, not before."""
    read = [threading.Event() for _ in range(3)]
    layer = small_decoder(layers=1).runs[0]

    def read_layer(index: int) -> Block:
        read[index].set()
        if index == 2:
            raise InputError("layer 2 is cut short")
        return layer

    decoder = StreamedDecoder(small_decoder(layers=3), small_decoder(layers=3).runs, read_layer)
    layers = sharding.layers_of(decoder, None)
    for index in (1, 2):
        assert next(layers) is layer
        assert read[index].wait(60)
    with pytest.raises(InputError, match="layer 2 is cut short"):
        next(layers)


def test_two_callers_never_read_at_once_and_one_that_stops_leaves_no_thread() -> None:
    active, most, layer, lock = 0, 0, small_decoder(layers=1).runs[0], threading.Lock()

    def read_layer(index: int) -> Block:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.01)
        with lock:
            active -= 1
        return layer

    decoder = StreamedDecoder(small_decoder(layers=5), small_decoder(layers=5).runs, read_layer)
    before = threading.active_count()
    for _ in zip(sharding.layers_of(decoder, None), range(3), strict=False):
        next(iter(sharding.layers_of(decoder, None)))
    assert most == 1
    assert threading.active_count() == before
