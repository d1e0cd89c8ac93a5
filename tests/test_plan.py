"""The plan of a run: its shapes are those of the run, its costs follow the shapes, and it reads no weight."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from jax import numpy as jnp
from safetensors.numpy import load_file

from convert.reader import describe_model
from minillm_jax import demo
from minillm_jax import plan as plans
from minillm_jax.data.calibration_size import FEW_TOKENS_PER_CHANNEL
from minillm_jax.errors import InputError
from minillm_jax.model import costs
from minillm_jax.model.build import build
from minillm_jax.plan import DEVICES, Device, Plan, device_bytes, host_bytes, parse_devices, plan, run_flops
from minillm_jax.recipes.recipe import Recipe, load, with_options
from minillm_jax.recipes.sized import filled
from minillm_jax.recipes.used import used
from minillm_jax.report.tables import plan_table
from minillm_jax.run import Job, run
from minillm_jax.settings import MEASURED, Budget, Data
from tests.helpers import edit_json, hugging_face_folder, random_tokens

RECORD = Path(__file__).parents[1] / "bench" / "results" / "tpu-job-v5e.json"


def settings_of(name: str = "ours", **options: Any) -> Recipe:
    """The settings of a run with some options, for a small model; a ratio unless there is a target.

    Layers of our own recipe are equal, so that the shapes are known before the run.
    """
    amount = {} if any(option.startswith("target") for option in options) else {"ratio": 0.5}
    equal = {"budget": "uniform"} if name == "ours" else {}
    return filled(used(*with_options(load(name), equal | amount | options)).recipe, 64, 128)


def planned(model: Path, recipe: Recipe, devices: str | None = None) -> Plan:
    return plan(describe_model(model, recipe.output.dtype), str(model), recipe, devices)


def without_weights(model: Path, folder: Path) -> Path:
    """A folder with the configuration of a model alone."""
    folder.mkdir()
    shutil.copyfile(model / "config.json", folder / "config.json")
    return folder


# ---------------------------------------------------------------------------------------- the plan and the run


def check_equals_the_run(model: Path, tmp_path: Path, tokens: Path, recipe: Recipe) -> None:
    """Parameters, costs and format of the plan are those of the run, and of the files."""
    data = replace(recipe.data, calibration=str(tokens), samples=2, seq_len=24)
    recipe = used(replace(recipe, data=data)).recipe
    expected = planned(without_weights(model, tmp_path / "shapes"), recipe)
    result = run(Job(str(model), str(tmp_path / "out"), recipe))
    record = result.pruned.record or {}
    assert expected.parameters_before == record["parameters_before"]
    assert expected.parameters_after == record["parameters_after"]
    assert expected.costs_before == result.costs_before
    assert expected.costs_after == result.costs_after
    assert expected.format == result.written.format
    if expected.format != "flax":
        stored = load_file(tmp_path / "out" / "model.safetensors").values()
        assert expected.files == sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("llama", {}, {"name": "ours"}),
        ("llama", {}, {"name": "wanda-sp", "layers": "1:-1"}),
        ("llama", {}, {"name": "wanda-sp", "layers": "1:-1", "format": "padded"}),
        ("llama", {}, {"name": "wanda-sp", "heads": "query"}),
        ("llama", {}, {"name": "wanda-sp", "structures": "layers"}),
        ("llama", {}, {"name": "wanda-sp", "structures": "hidden", "round_width_to": 12}),
        ("llama", {}, {"name": "wanda-sp", "structures": "heads,channels,hidden,layers", "format": "flax"}),
        ("llama", {}, {"name": "wanda-sp", "target_params": "70k"}),
        ("llama", {"tie_word_embeddings": True}, {"name": "wanda-sp", "ratio_of": "model", "ratio": 0.3}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"name": "wanda-sp", "refit": "bias"}),
        ("llama", {}, {"name": "flap", "budget": "uniform"}),
        ("llama", {}, {"name": "wanda-sp", "refit": "bias", "structures": "hidden,channels"}),
        ("qwen3", {}, {"name": "wanda-sp", "dtype": "bfloat16"}),
        ("gemma2", {}, {"name": "wanda-sp", "round_width_to": 16}),
        (
            "opt",
            {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
            {"name": "wanda-sp", "structures": "hidden"},
        ),
        ("opt", {}, {"name": "wanda-sp"}),
        ("bloom", {}, {"name": "wanda-sp", "format": "padded"}),
        ("gpt_neox", {}, {"name": "wanda-sp", "structures": "channels"}),
        ("phi3", {}, {"name": "wanda-sp", "heads": "query"}),
    ],
    ids=str,
)
def test_the_plan_of_small_models_equals_the_run(
    tmp_path: Path, family: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    model = hugging_face_folder(tmp_path / "model", family, **changes)
    np.save(tmp_path / "tokens.npy", random_tokens(97, 200))
    check_equals_the_run(model, tmp_path, tmp_path / "tokens.npy", settings_of(**options))


@pytest.mark.parametrize("name", ["ours", "wanda-sp"])
def test_the_plan_of_the_demo_model_equals_the_run(tmp_path: Path, name: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(demo.training_text()[:20_000])
    check_equals_the_run(demo.FOLDER, tmp_path, text, settings_of(name, ratio=0.2, seed=3))


def test_a_per_layer_folder_can_be_planned_again(tmp_path: Path) -> None:
    model = hugging_face_folder(tmp_path / "dense", num_hidden_layers=4)
    np.save(tmp_path / "tokens.npy", random_tokens(97, 200))
    recipe = settings_of("wanda-sp", layers="1:3", samples=2, seq_len=24, calibration=str(tmp_path / "tokens.npy"))
    assert run(Job(str(model), str(tmp_path / "unequal"), recipe)).written.format == "per-layer"
    (tmp_path / "again").mkdir()
    check_equals_the_run(tmp_path / "unequal", tmp_path / "again", tmp_path / "tokens.npy", settings_of("wanda-sp"))


@pytest.mark.parametrize("options", [{"name": "flap"}, *({"budget": name} for name in MEASURED)], ids=str)
def test_shapes_that_scores_or_losses_decide_are_left_open(tmp_path: Path, options: dict[str, Any]) -> None:
    model = hugging_face_folder(tmp_path / "model")
    open_plan = planned(model, settings_of(**options))
    after = (open_plan.parameters_after, open_plan.costs_after, open_plan.format, open_plan.files)
    assert after == (None, None, None, None)
    assert open_plan.flops > 0
    assert open_plan.device_bytes > open_plan.costs_before["memory"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "1:9"}, "layers 1:9 are not a range of this model's layers; it has 0:3"),
        ({"target_params": "5"}, "use a larger target, a smaller --keep-at-least, or prune more kinds"),
        ({"target_params": "9M"}, "is not below the"),
        ({"layers": "1:2", "format": "stock"}, "use the format per-layer or padded"),
    ],
)
def test_budgets_that_do_not_suit_the_model(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = without_weights(hugging_face_folder(tmp_path / "model"), tmp_path / "shapes")
    with pytest.raises(InputError, match=message):
        planned(model, settings_of("wanda-sp", **options))


def test_the_type_of_the_weights_comes_from_their_header(tmp_path: Path) -> None:
    """The header of the weight file, the configuration where there is no file, or the option."""
    model = hugging_face_folder(tmp_path / "model")
    shapes = without_weights(model, tmp_path / "shapes")
    full = planned(model, settings_of()).files
    assert full is not None
    edit_json(model / "config.json", dtype="bfloat16")
    assert planned(model, settings_of()).files == full
    edit_json(shapes / "config.json", dtype="bfloat16")
    assert planned(shapes, settings_of()).files == full // 2
    assert planned(shapes, settings_of(dtype="float32")).files == full


# ------------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("text", "count", "memory"),
    [("h100", 1, 80 * 10**9), ("v5e-8", 8, 16 * 10**9), ("H200-2", 2, 141 * 10**9), ("v5p-128", 128, 95 * 10**9)],
)
def test_devices_are_a_kind_and_a_number(text: str, count: int, memory: int) -> None:
    assert parse_devices(text) == (text.lower(), count, memory)


@pytest.mark.parametrize("text", ["", "tpu", "v5e-", "v5e-0", "v5e-two", "v5e--2", "v5e-²", "8", "h100 4", "h100-1.5"])
def test_devices_that_are_not_understood(text: str) -> None:
    with pytest.raises(
        InputError, match=r"--devices .* is not understood; expected a kind and a number, v5e-8 or h100"
    ):
        parse_devices(text)


def test_this_machine_is_the_default() -> None:
    kind, count, memory = parse_devices(None)
    assert kind == "cpu"
    assert count == 1
    assert memory is None or memory > 10**8


def test_a_model_fits_a_device_or_not() -> None:
    described = describe_model(demo.FOLDER)
    recipe = settings_of(ratio=0.2)
    assert plan(described, "demo", recipe, "v5e").fits
    here = plan(described, "demo", recipe)
    assert not replace(here, device_memory=1000).fits
    assert replace(here, device_memory=None).fits is None
    assert all(isinstance(device, Device) and device.memory > 10**10 for device in DEVICES.values())
    # Several devices share the weights.
    memory = [plan(described, "demo", recipe, f"v5e-{count}").device_bytes for count in (1, 2, 8)]
    assert memory[0] > memory[1] > memory[2]


# ------------------------------------------------------------------------------------------------ memory and work

SHAPES = [{"name": "ours"}, {"name": "mini-llm"}, {"name": "wanda-sp"}, {"name": "flap"}, {"budget": "measured"}]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_memory_and_operations_grow_with_the_samples(options: dict[str, Any]) -> None:
    described = describe_model(demo.FOLDER)
    dense = described.abstract
    plans_of = [plan(described, "demo", settings_of(**options | {"samples": n}), "h100") for n in (1, 16, 64, 1024)]
    for fewer, more in pairwise(plans_of):
        assert more.flops > fewer.flops
        assert more.device_bytes >= fewer.device_bytes
        assert more.tokens_per_channel > fewer.tokens_per_channel
    assert plans_of[-1].device_bytes > plans_of[0].device_bytes
    # The residual streams of the walk hold all windows; a forward pass holds one batch.
    settings = [settings_of(**options | {"samples": n}) for n in (512, 1024)]
    grown = np.diff([device_bytes(dense, dense, recipe) for recipe in settings])[0]
    assert (grown > 0) == plans.walks(settings[0])
    assert host_bytes(dense, settings[0], on_cpu=False) > host_bytes(dense, settings[0], on_cpu=True)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"name": "wanda-sp"}, 1),
        ({"name": "flap", "refit": "none"}, 2),
        ({"criterion": "noise", "refit": "none"}, 1),
        ({"criterion": "magnitude", "refit": "none"}, 0),
        ({"criterion": "random", "refit": "none"}, 0),
        ({"name": "mini-llm", "directions": 4}, 2 * 4 + 1 + 1),
        ({"criterion": "gate", "refit": "none", "directions": 4}, 2 * 4),
        ({"criterion": "element-1", "refit": "none"}, 4),
        ({"name": "wanda-sp", "structures": "hidden"}, 1),
        ({"structures": "layers"}, 4 + 3),
    ],
    ids=str,
)
def test_operations_are_forward_passes_over_the_calibration_windows(options: dict[str, Any], passes: int) -> None:
    """Two operations for each multiply-accumulate of `costs`, times the windows, times the passes."""
    dense = describe_model(demo.FOLDER).abstract
    recipe = settings_of(**options | {"seq_len": 96})
    forward = 2 * costs.cost(dense, "macs", 96) * (recipe.data.samples or 0)
    assert run_flops(dense, dense, recipe) == pytest.approx(passes * forward, rel=1e-12)


def test_the_pruning_of_experts_is_planned(tmp_path: Path) -> None:
    described = describe_model(hugging_face_folder(tmp_path / "model", "mixtral"))
    dense = described.abstract
    plain, refitted, more = (
        settings_of(structures="experts", ratio=0.2, seq_len=32, **options)
        for options in ({"samples": 8, "refit": "none"}, {"samples": 8}, {"samples": 64})
    )
    forward = 2 * costs.cost(dense, "macs", 32) * 8
    assert run_flops(dense, dense, plain) == pytest.approx(2 * forward, rel=1e-12)
    # Three sweeps: both layers' chosen experts, and all experts' channels and Gram matrices (D 64, W 40, 3 layers).
    sweep = 2 * 3 * (2 * 2 * 3 * 64 * 40 + 6 * (2 * 64 * 40 + 40 * 40 + 40 * 64)) * 8 * 32
    assert run_flops(dense, dense, refitted) == pytest.approx(3 * forward + 3 * sweep, rel=1e-12)
    found = [plan(described, "mixtral", recipe, "h100").device_bytes for recipe in (plain, refitted, more)]
    assert found == sorted(found)
    # The residual streams hold all windows, and the moments of a layer one square and one product for each expert.
    assert found[1] - found[0] == 4 * (8 * 32 * 64 + 3 * 6 * (40 * 40 + 40 * 64))


@pytest.mark.parametrize("shape", ["7B", "8B", "70B"])
def test_the_plan_of_a_streamed_run_holds_what_the_compiler_counts(
    bench: Callable[[str], ModuleType], shape: str
) -> None:
    """The largest program of the record, with what lies beside it, to one percent, and at most a third more."""
    shapes = bench("shapes")
    dense = build(shapes.CONFIG, shapes.SHAPES[shape], jnp.bfloat16)
    rows = json.loads(RECORD.read_text())["rows"]
    counted = max(row["bytes"] + row["resident"] for row in rows if row["shape"] == shape)
    recipe = settings_of(ratio=0.2, samples=2, seq_len=2048)
    planned = plans.streamed_bytes(dense, recipe)
    assert planned is not None
    assert 0.99 * counted <= planned <= 4 / 3 * counted


def test_every_round_costs_as_much_as_the_first() -> None:
    dense = describe_model(demo.FOLDER).abstract
    once, thrice = (run_flops(dense, dense, settings_of("ours", rounds=rounds)) for rounds in (1, 3))
    assert thrice == pytest.approx(3 * once)


def test_a_smaller_pruned_model_needs_less_memory_and_work() -> None:
    described = describe_model(demo.FOLDER)
    weak, strong = (plan(described, "demo", settings_of(ratio=ratio), "h100") for ratio in (0.2, 0.8))
    assert strong.device_bytes < weak.device_bytes
    assert strong.flops < weak.flops
    assert strong.files is not None
    assert weak.files is not None
    assert strong.files < weak.files


def test_the_pruned_sizes_build_the_pruned_decoder() -> None:
    described = describe_model(demo.FOLDER)
    recipe = settings_of(ratio=0.2)
    sizes = plans.pruned_sizes(described.abstract.config, described.sizes, recipe)
    assert sizes is not None
    assert {(layer.K, layer.F) for layer in sizes.layers} == {(4, sizes.layers[0].F)}
    parameters = costs.cost(build(described.abstract.config, sizes), "parameters")
    assert plan(described, "demo", recipe).parameters_after == parameters


# -------------------------------------------------------------------------------------------------------- tables


def printed(table: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_few_tokens_for_each_channel_are_a_warning() -> None:
    described = describe_model(demo.FOLDER)
    few, enough = (plan(described, "demo", settings_of(samples=samples, seq_len=16)) for samples in (1, 1024))
    width = max(layer.F for layer in described.sizes.layers)
    assert few.tokens_per_channel == 16 / width
    assert few.tokens_per_channel < FEW_TOKENS_PER_CHANNEL < enough.tokens_per_channel
    assert few.as_json()["few_tokens"]
    assert not enough.few_tokens
    words = "calibration tokens for each MLP channel are few: below 2 the ridge decides the refit"
    assert words in " ".join(printed(plan_table(few)).split())
    assert "are few" not in printed(plan_table(enough))


def test_the_plan_has_the_windows_that_suit_the_model() -> None:
    described = describe_model(demo.FOLDER)
    recipe = replace(Recipe(), budget=Budget(0.2, allocation="uniform"))
    assert plan(described, "demo", used(recipe).recipe) == plan(described, "demo", settings_of(ratio=0.2))
    planned_for = plan(described, "demo", used(replace(recipe, data=Data(seq_len=100))).recipe)
    assert planned_for.tokens == 8200
    assert planned_for.costs_before == costs.all_costs(described.abstract, 100)


def test_the_table_says_whether_the_model_fits_and_what_is_left_open() -> None:
    described = describe_model(demo.FOLDER)
    table = printed(plan_table(plan(described, "demo", settings_of(ratio=0.2), "v5e-8")))
    for words in ("plan: demo, recipe ours, v5e-8", "964,000", "fits", "stock", "floating-point operations"):
        assert words in table
    table = printed(plan_table(replace(plan(described, "demo", settings_of("flap"), "v5e"), device_memory=1000)))
    for words in ("by scores or losses", "does not fit", "per-layer folder"):
        assert words in table


def test_the_plan_as_json_holds_every_figure() -> None:
    value = plan(describe_model(demo.FOLDER), "demo", settings_of(ratio=0.2), "h100").as_json()
    again = json.loads(json.dumps(value))
    assert again == value
    assert again["fits"] is True
    assert again["parameters_before"] == 964_000
    assert math.isfinite(again["flops"])
    assert again.keys() > {"model", "recipe", "devices", "tokens", "device_bytes", "host_bytes", "costs_after", "files"}
