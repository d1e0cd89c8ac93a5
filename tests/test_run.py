"""Whole runs from folder to folder, loaded in PyTorch, and repeated from the recipe that they write."""

import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minillm_jax.api import load
from minillm_jax.errors import InputError
from minillm_jax.model import costs
from minillm_jax.progress import StageProgress
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.run import Documents, Job, Result, run
from minillm_jax.settings import Data, Refit, Scoring
from tests.helpers import hugging_face_folder, load_stock, load_torch, logits_of, random_tokens, torch_logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("structures")
    np.save(root / "tokens.npy", random_tokens(97, 600))
    hugging_face_folder(root / "model", num_hidden_layers=4)
    return root


def job(
    folder: Path,
    output: Path,
    documents: Documents | None = None,
    told: StageProgress | None = None,
    **options: Any,
) -> Result:
    """A run with the options of the command line, beside 4 windows, wanda, no refit, and a ratio of one half."""
    base = Recipe(data=Data(str(folder / "tokens.npy"), 4, 32), scoring=Scoring("wanda"), refit=Refit("none"))
    amount = {} if "target_params" in options else {"ratio": 0.5}
    recipe, given = recipes.with_options(base, amount | options)
    return run(Job(str(folder / "model"), str(output), recipe, given), told, documents)


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"heads": "query"}, {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 20}),
        ({"structures": ("channels",)}, {"num_attention_heads": 8, "intermediate_size": 20}),
        ({"structures": ("heads",)}, {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}),
        ({"structures": ("layers",)}, {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 40}),
        ({"structures": ("hidden",)}, {"num_hidden_layers": 4, "hidden_size": 32}),
        (
            {"structures": ("heads", "channels", "hidden", "layers"), "refit": "least-squares"},
            {"num_hidden_layers": 2, "hidden_size": 32, "num_key_value_heads": 2, "intermediate_size": 20},
        ),
        (
            {"rounds": 2, "criterion": "obs", "allocation": "uniform"},
            {"num_key_value_heads": 2, "intermediate_size": 20},
        ),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_every_structure_becomes_a_stock_folder(
    folder: Path, tmp_path: Path, changes: dict[str, Any], sizes: dict[str, int]
) -> None:
    result = job(folder, tmp_path / "out", **changes)
    assert result.written.format == "stock"
    loaded = load_stock(tmp_path / "out")
    assert {key: getattr(loaded.config, key) for key in sizes} == sizes
    tokens = random_tokens(97, 2, 20)
    assert np.abs(torch_logits(loaded, tokens) - logits_of(result.pruned.decoder, tokens)).max() <= 1e-4
    record = result.pruned.record or {}
    assert record["parameters_after"] == sum(tensor.numel() for tensor in loaded.parameters())
    assert record["parameters_before"] > record["parameters_after"]
    assert len(record["whole"]) == len({"hidden", "layers"} & set(changes.get("structures", ())))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_flap_gives_a_llama_biases_that_make_up_for_means(folder: Path, tmp_path: Path, allocation: str) -> None:
    """The biases are zero in the dense model, and take the mean output of the removed groups in the pruned model."""
    options = {"criterion": "flap", "allocation": allocation}
    plain = job(folder, tmp_path / "plain", **options)
    biased = job(folder, tmp_path / "out", refit="bias", **options)
    assert (biased.pruned.record or {})["kept"] == (plain.pruned.record or {})["kept"]
    assert (biased.pruned.record or {})["parameters_before"] == (plain.pruned.record or {})["parameters_before"]
    loaded, tokens = load_torch(tmp_path / "out"), random_tokens(97, 2, 20)
    assert np.abs(torch_logits(loaded, tokens) - logits_of(biased.pruned.decoder, tokens)).max() <= 1e-4
    assert loaded.config.attention_bias
    biases = {name: tensor for name, tensor in loaded.named_parameters() if name.endswith(".bias")}
    assert all(
        (tensor.abs().max() > 0) == name.endswith(("o_proj.bias", "down_proj.bias")) for name, tensor in biases.items()
    )


def test_models_without_biases_refuse_the_refit_by_bias(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", random_tokens(97, 600))
    hugging_face_folder(tmp_path / "model", "mistral")
    with pytest.raises(InputError, match="refit by bias needs output projections with biases"):
        job(tmp_path, tmp_path / "out", refit="bias")


@pytest.mark.parametrize("allocation", ["global", "measured"])
def test_unequal_budgets_become_per_layer_folders(folder: Path, tmp_path: Path, allocation: str) -> None:
    options = {"ratio": 0.4, "ratio_of": "blocks", "allocation": allocation}
    result = job(folder, tmp_path / "out", refit="least-squares", **options)
    assert result.written.format == "per-layer"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_equal_layers_are_those_that_a_stock_class_holds(tmp_path: Path, family: str) -> None:
    """OPT computes the size of a head from the number of heads, so that its heads all stay."""
    np.save(tmp_path / "tokens.npy", random_tokens(97, 600))
    hugging_face_folder(tmp_path / "model", family)
    options = {"criterion": "obs", "refit": "least-squares", "format": "stock", "ratio_of": "blocks", "ratio": 0.2}
    result = job(tmp_path, tmp_path / "out", **options)
    assert result.written.format == "stock"
    counts = (result.pruned.record or {})["kept"]
    assert all(len({len(rows) for rows in layers}) == 1 for layers in counts.values())
    if family == "opt":
        assert [len(rows) for rows in counts["head"]] == (result.pruned.record or {})["groups_before"]["head"]


def test_a_stock_class_that_holds_no_pruned_shape_is_an_error_before_the_weights_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", random_tokens(97, 600))
    hugging_face_folder(tmp_path / "model", "bloom")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no stock class can hold this model"):
        job(tmp_path, tmp_path / "out", criterion="obs", refit="least-squares", format="stock")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structures": ()}, "--structures must name at least one structure"),
        ({"structures": ("heads", "heads")}, "each of them once"),
        ({"structures": ("neurons",)}, "unknown structure 'neurons'"),
        ({"heads": "pairs"}, "unknown --heads 'pairs'; expected one of group, query"),
        ({"heads": "query", "structures": ("channels",)}, "--heads would do nothing in this run .structures channels"),
        ({"structures": ("hidden",), "ratio_of": "model"}, "the ratio counts groups, .* where hidden are removed"),
        (
            {"structures": ("heads", "experts"), "ratio_of": "model"},
            "the ratio counts groups, .* where experts are rem",
        ),
        ({"structures": ("hidden",), "criterion": "obs"}, "obs has no scores for hidden dimensions"),
        ({"structures": ("heads", "layers"), "layers": "0:2"}, "--layers cannot be used where"),
        ({"allocation": "global", "format": "stock"}, "use the format per-layer or padded"),
        ({"allocation": "curves", "criterion": "obs", "format": "stock"}, "or --budget equal"),
        ({"allocation": "equal", "criterion": "obs", "format": "stock", "layers": "0:2"}, "unequal numbers"),
        ({"allocation": "equal"}, "the allocation equal follows the errors of structured OBS, not wanda"),
        ({"allocation": "global", "criterion": "obs"}, "no scores to compare"),
        ({"rounds": 0}, "--rounds must be at least 1 round, found 0"),
        ({"target_params": 10.0}, "use a larger target, .* or prune more kinds"),
        ({"heads": "query", "criterion": "gate"}, "not for query heads"),
    ],
)
def test_combinations_that_make_no_sense_fail_before_the_weights_are_read(
    folder: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    """The model has no weight file and the text does not exist, so that reading either would be another error."""
    (tmp_path / "model").mkdir()
    shutil.copyfile(folder / "model" / "config.json", tmp_path / "model" / "config.json")
    with pytest.raises(InputError, match=words):
        job(tmp_path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_query_heads_need_more_than_one_of_each_key_value_head(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", random_tokens(97, 600))
    hugging_face_folder(tmp_path / "model", "opt")
    with pytest.raises(InputError, match="every key/value head has one query head"):
        job(tmp_path, tmp_path / "out", heads="query")


# -------------------------------------------------------------------------------------- failures after the pruning


@pytest.mark.parametrize("error", [InputError("the loss is nan"), RuntimeError("RESOURCE_EXHAUSTED: out of memory")])
@pytest.mark.parametrize("failing", ["evaluation", "documents"])
def test_a_failure_after_the_pruning_does_not_lose_the_pruned_model(
    folder: Path, tmp_path: Path, failing: str, error: Exception
) -> None:
    """The evaluation of the dense model works, that of the pruned model fails; or the report does."""
    weights = tmp_path / "out" / "model.safetensors"

    def told(stage: str, done: int, total: int) -> None:
        if failing == "evaluation" and stage == "perplexity" and weights.is_file():
            raise error

    def documents(result: Result) -> dict[str, str]:
        assert (result.after is None) == (failing == "evaluation")
        if failing == "documents":
            raise error
        return {"report.txt": f"before: {result.before}"}

    missing = "perplexity was not measured" if failing == "evaluation" else "report was not written"
    with pytest.raises(InputError, match=rf"the pruned model is saved in .*out, but its {missing} \({error}\)"):
        job(folder, tmp_path / "out", documents, told, evaluate=str(folder / "tokens.npy"))
    assert load_stock(tmp_path / "out").config.intermediate_size == 20
    assert (tmp_path / "out" / "recipe.toml").is_file()
    assert (tmp_path / "out" / "report.txt").exists() == (failing == "evaluation")


def test_documents_are_added_whole_and_never_overwrite(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a file of that name exists already"):
        job(folder, tmp_path / "out", documents=lambda result: {"a.txt": "a", "config.json": "b"})
    assert (tmp_path / "out" / "a.txt").read_text() == "a"
    assert load_stock(tmp_path / "out").config.intermediate_size == 20
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


# ----------------------------------------------------------------------------------------- failures before the work


@pytest.fixture
def without_weights(folder: Path, tmp_path: Path) -> Path:
    """The folder of the tests with a model that has no weight file, so that reading the weights is an error."""
    root = tmp_path / "without"
    (root / "model").mkdir(parents=True)
    shutil.copyfile(folder / "model" / "config.json", root / "model" / "config.json")
    shutil.copyfile(folder / "tokens.npy", root / "tokens.npy")
    return root


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibration": "mistyped.txt"}, "mistyped.txt: no such file"),
        ({"evaluate": "mistyped.txt"}, "mistyped.txt: no such file"),
        ({"evaluate": "short.npy"}, "less than one window of 128"),
        ({"samples": 1000}, "but 1000 are asked for"),
    ],
)
def test_texts_are_checked_before_the_weights_are_read(
    folder: Path, without_weights: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    np.save(without_weights / "short.npy", random_tokens(97, 20))
    places = {"short.npy": str(without_weights / "short.npy")}
    options = {key: places.get(value, value) for key, value in options.items()}
    with pytest.raises(InputError, match=words):
        job(without_weights, tmp_path / "out", **options)


def test_room_for_the_output_is_checked_before_the_weights_are_read(
    without_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=1000))
    with pytest.raises(InputError, match=r"the folder needs .* kB, but .* has 1 kB free"):
        job(without_weights, tmp_path / "out")


def test_weights_are_read_after_all_checks(without_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no weights"):
        job(without_weights, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- repeated runs


def files_of(folder: Path, *suffixes: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in suffixes}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ours", {}),
        ("mini-llm", {"directions": 2, "seed": 3}),
        ("wanda-sp", {"layers": "1:-1", "seed": 4}),
        ("flap", {"alpha": 0.25}),
        ("ours", {"structures": "hidden,layers", "criterion": "wanda", "round_width_to": 12}),
    ],
    ids=str,
)
def test_a_run_repeated_from_its_recipe_is_equal_byte_for_byte(
    folder: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    text = {"calibration": str(folder / "tokens.npy"), "samples": 4, "seq_len": 32, "ratio": 0.4}
    recipe, given = recipes.with_options(recipes.load(name), text | options)
    run(Job(str(folder / "model"), str(tmp_path / "first"), recipe, given))

    written = recipes.load(tmp_path / "first" / "recipe.toml")
    assert written.origin["model"] == str(folder / "model")
    run(Job(str(written.origin["model"]), str(tmp_path / "again"), written))
    suffixes = (".safetensors", ".toml", ".py")
    first, again = (files_of(tmp_path / output, *suffixes) for output in ("first", "again"))
    assert {"model.safetensors", "recipe.toml"} <= first.keys()
    assert again == first
    config = "config.json"
    assert (tmp_path / "again" / config).read_bytes() == (tmp_path / "first" / config).read_bytes()


def test_numbers_that_nobody_names_follow_the_model_and_the_text(folder: Path, tmp_path: Path) -> None:
    """600 tokens make four windows of 128; the record and the recipe of the run name them."""
    recipe, given = recipes.with_options(Recipe(), {"calibration": str(folder / "tokens.npy"), "ratio": 0.4})
    result = run(Job(str(folder / "model"), str(tmp_path / "first"), recipe, given))
    record = result.pruned.record or {}
    assert (record["calibration"]["samples"], record["calibration"]["length"]) == (4, 128)
    assert record["tokens_per_channel"] == 4 * 128 / 40
    assert record["budget"]["window"] == result.job.recipe.budget.window == 128
    written = recipes.load(tmp_path / "first" / "recipe.toml")
    assert (written.data.samples, written.data.seq_len) == (4, 128)
    run(Job(str(folder / "model"), str(tmp_path / "again"), written))
    assert files_of(tmp_path / "again", ".safetensors", ".toml") == files_of(
        tmp_path / "first", ".safetensors", ".toml"
    )


def test_costs_are_for_windows_as_long_as_a_short_text_makes_them(tmp_path: Path) -> None:
    """A model of 4,096 channels suits windows of 512 tokens; 3,000 tokens make 23 of 128."""
    hugging_face_folder(tmp_path / "model", intermediate_size=4096)
    np.save(tmp_path / "tokens.npy", random_tokens(97, 3000))
    options = {"calibration": str(tmp_path / "tokens.npy"), "ratio": 0.5, "criterion": "wanda", "refit": "none"}
    recipe, given = recipes.with_options(Recipe(), options)
    result = run(Job(str(tmp_path / "model"), str(tmp_path / "out"), recipe, given))
    assert result.job.recipe.data == Data(options["calibration"], 23, 128)
    assert result.costs_before == costs.all_costs(load(tmp_path / "model").decoder, 128)


def test_a_mixture_is_recorded_and_repeated(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", random_tokens(97, 500, seed=5))
    mixture = f"{folder / 'tokens.npy'}:3,{tmp_path / 'other.npy'}:1"
    result = job(folder, tmp_path / "first", calibration=mixture)
    shares = (result.pruned.record or {})["calibration"]["mixture"]
    assert [(Path(share["source"]).name, share["samples"]) for share in shares] == [("tokens.npy", 3), ("other.npy", 1)]
    run(Job(str(folder / "model"), str(tmp_path / "again"), recipes.load(tmp_path / "first" / "recipe.toml")))
    assert files_of(tmp_path / "again", ".safetensors", ".toml") == files_of(
        tmp_path / "first", ".safetensors", ".toml"
    )
    with pytest.raises(InputError, match=r"nowhere\.txt: no such file"):
        job(folder, tmp_path / "none", calibration=f"{tmp_path / 'other.npy'}:1,nowhere.txt:1")
    with pytest.raises(InputError, match="a mixture is for --calibration of prune"):
        job(folder, tmp_path / "none", evaluate=mixture)


def test_a_recipe_that_is_repeated_checks_the_calibration_text(folder: Path, tmp_path: Path) -> None:
    """Other text is refused, unless the user names a text, or the model is another one."""
    shutil.copytree(folder / "model", tmp_path / "model")
    np.save(tmp_path / "tokens.npy", random_tokens(97, 600))
    job(tmp_path, tmp_path / "first")
    np.save(tmp_path / "tokens.npy", random_tokens(97, 600, seed=1))
    written = recipes.load(tmp_path / "first" / "recipe.toml")
    repeated = Job(str(tmp_path / "model"), str(tmp_path / "again"), written)
    with pytest.raises(InputError, match=r"the calibration windows are not those of the recipe .* Give --calibration"):
        run(repeated, lambda *_: pytest.fail("worked before checking"))
    assert not (tmp_path / "again").exists()

    recipe, given = recipes.with_options(written, {"calibration": str(tmp_path / "tokens.npy")})
    run(Job(str(tmp_path / "model"), str(tmp_path / "given"), recipe, given))
    (tmp_path / "model").rename(tmp_path / "copy")
    run(Job(str(tmp_path / "copy"), str(tmp_path / "copied"), written))
    assert files_of(tmp_path / "copied", ".safetensors") == files_of(tmp_path / "given", ".safetensors")


def test_a_written_recipe_holds_the_settings_that_the_run_read(folder: Path, tmp_path: Path) -> None:
    job(folder, tmp_path / "out", structures=("channels",), seed=7)
    table = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())
    assert table.pop("origin").keys() == {"model", "tokens_sha256", "versions"}
    text = {"calibration": str(folder / "tokens.npy"), "field": "text", "bos": "auto"}
    assert table["data"] == text | {"samples": 4, "seq_len": 32, "seed": 7}
    assert table["refit"] == {"method": "none"}
    assert table["scoring"] == {"criterion": "wanda", "activation_norm": "l2", "within": "sum"}
    assert "gradient" not in table
    assert not {"heads", "round_heads_to", "keep_at_least"} & table["budget"].keys()
    assert table["budget"].items() >= {"ratio": 0.5, "structures": ["channels"], "round_width_to": 1}.items()
