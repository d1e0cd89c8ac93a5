"""What goes: query heads, hidden dimensions, whole layers; from folder to folder, loaded in PyTorch."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.api import drop_layers, narrow, prune
from minillm_jax.budget.budget import Budget
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model import axis_table
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, hidden_size, layer_count
from minillm_jax.pruning.drop_layers import best_layers
from minillm_jax.pruning.refit import Refit
from minillm_jax.pruning.slicing import slice_groups, slice_layers
from minillm_jax.run import Job, Result, run
from minillm_jax.scoring.score import Scoring, score
from tests.helpers import (
    hugging_face_folder,
    load_stock,
    load_torch,
    logits_of,
    random_tokens,
    small_decoder,
    torch_logits,
)

WINDOWS = random_tokens(61, 24, 12)
CALIBRATION = Calibration(WINDOWS, "random", 0)


def small_model() -> Model:
    return Model(small_decoder(), {"model_type": "llama", "hidden_size": 16}, Path("nowhere"), "small")


# -------------------------------------------------------------------------------------------------- query heads


def test_query_heads_are_sliced_as_if_they_were_zero() -> None:
    decoder = small_decoder()
    kept = {"query": [np.array([1, 2, 4, 7]), np.array([0, 3, 5, 6]), np.array([1, 3, 5, 7])]}

    def leaf(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        if not axis_table.array_path(path).endswith("attention.o.kernel"):
            return array
        mask = np.zeros((3, 8, 1, 1), np.float32)
        for layer, heads in enumerate(kept["query"]):
            mask[layer, heads] = 1
        return array * jnp.asarray(jnp.broadcast_to(mask, array.shape))

    zeroed = jax.tree_util.tree_map_with_path(leaf, decoder)
    sliced = slice_groups(decoder, kept)
    assert group_counts(sliced, "query") == [4, 4, 4]
    assert group_counts(sliced, "head") == [4, 4, 4]
    expected = logits_of(zeroed, WINDOWS[:3])
    assert np.abs(expected - logits_of(decoder, WINDOWS[:3])).max() > 1e-2
    np.testing.assert_allclose(logits_of(sliced, WINDOWS[:3]), expected, atol=1e-4)


@pytest.mark.parametrize(("criterion", "refitted"), [("wanda", False), ("obs", True), ("fms", True), ("random", False)])
def test_as_many_query_heads_stay_of_every_key_value_head(criterion: str, refitted: bool) -> None:
    model = small_model()
    scores = score(model, CALIBRATION, Scoring(criterion, kinds=("query", "channel")))
    refit = Refit() if refitted else None
    pruned = prune(model, scores, 0.5, refit, CALIBRATION)
    assert group_counts(pruned.decoder, "query") == [4, 4, 4]
    assert group_counts(pruned.decoder, "head") == [4, 4, 4]
    for heads in (pruned.record or {})["kept"]["query"]:
        assert [head // 2 for head in heads] == [0, 1, 2, 3]


def test_the_scores_of_query_heads_are_those_of_their_rows() -> None:
    """One query head and its columns of the output; keys and values stay and are not counted."""
    model = small_model()
    found = score(model, CALIBRATION, Scoring("magnitude", kinds=("query",))).groups["query"]
    attention = model.decoder.runs[0].attention
    q, o = np.asarray(attention.q.kernel[...]), np.asarray(attention.o.kernel[...])
    for layer in range(3):
        rows = np.linalg.norm(q[layer], axis=(0, 2)), np.linalg.norm(o[layer], axis=(1, 2))
        np.testing.assert_allclose(found[layer], np.maximum(*rows), rtol=1e-5)


# ------------------------------------------------------------------------------------ layers and hidden dimensions


def test_the_layers_that_go_are_those_that_are_missed_least() -> None:
    decoder = small_decoder(layers=5, deviation=0.4)

    def loss_without(gone: set[int]) -> float:
        return perplexity(slice_layers(decoder, [n for n in range(5) if n not in gone]), WINDOWS).loss

    first = min(range(5), key=lambda n: loss_without({n}))
    second = min({*range(5)} - {first}, key=lambda n: loss_without({first, n}))
    assert best_layers(decoder, WINDOWS, 3) == sorted({*range(5)} - {first, second})
    assert best_layers(decoder, WINDOWS, 4, range(2, 3)) == [0, 1, 3, 4]
    model = Model(decoder, {}, Path("nowhere"), "small")
    pruned, kept = drop_layers(model, CALIBRATION, 0.4)
    assert (layer_count(pruned.decoder), kept) == (3, best_layers(decoder, WINDOWS, 3))


def test_hidden_dimensions_are_scored_over_the_whole_model() -> None:
    """Magnitude: the largest norm of a dimension's rows and columns, over all matrices of all layers."""
    model = small_model()
    pruned, kept = narrow(model, CALIBRATION, Scoring("magnitude"), 0.25)
    assert hidden_size(pruned.decoder) == 12
    (run_,) = model.decoder.runs
    inner = [run_.attention.q, run_.attention.k, run_.attention.v, run_.mlp.gate, run_.mlp.up]
    norms = []
    for linear in inner:
        array = np.asarray(linear.kernel[...])
        norms += list(np.sqrt(np.square(array.reshape(3, 16, -1)).sum(-1)))
    for linear in (run_.attention.o, run_.mlp.down):
        array = np.asarray(linear.kernel[...])
        norms += list(np.sqrt(np.square(array.reshape(3, -1, 16)).sum(1)))
    expected = np.sort(np.argsort(-np.max(norms, axis=0))[:12])
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("criterion", ["wanda", "random", "element-1", "fms"])
def test_criteria_that_score_hidden_dimensions(criterion: str) -> None:
    pruned, kept = narrow(small_model(), CALIBRATION, Scoring(criterion), 0.5, round_to=6)
    assert hidden_size(pruned.decoder) == len(kept) == 12
    assert np.isfinite(perplexity(pruned.decoder, WINDOWS).loss)


@pytest.mark.parametrize("criterion", ["obs", "gate", "flap"])
def test_criteria_that_do_not(criterion: str) -> None:
    with pytest.raises(InputError, match="has no scores for hidden dimensions"):
        narrow(small_model(), CALIBRATION, Scoring(criterion), 0.5)


# ------------------------------------------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("structures")
    np.save(root / "tokens.npy", random_tokens(97, 600))
    hugging_face_folder(root / "model", num_hidden_layers=4)
    return root


def job(folder: Path, output: Path, **changes: Any) -> Result:
    given = {"budget": Budget(0.5), "samples": 4, "length": 32, "scoring": Scoring("wanda")} | changes
    return run(Job(str(folder / "model"), str(folder / "tokens.npy"), str(output), **given))


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"heads": "query"}, {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 20}),
        ({"structures": ("channels",)}, {"num_attention_heads": 8, "intermediate_size": 20}),
        ({"structures": ("heads",)}, {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}),
        ({"structures": ("layers",)}, {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 40}),
        ({"structures": ("hidden",)}, {"num_hidden_layers": 4, "hidden_size": 32}),
        (
            {"structures": ("heads", "channels", "hidden", "layers"), "refit": Refit()},
            {"num_hidden_layers": 2, "hidden_size": 32, "num_key_value_heads": 2, "intermediate_size": 20},
        ),
        ({"rounds": 2, "scoring": Scoring("obs")}, {"num_key_value_heads": 2, "intermediate_size": 20}),
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
    """Of zero first, which changes nothing, and no less than what the projections lose on average."""
    changes = {"scoring": Scoring("flap"), "budget": Budget(0.5, allocation=allocation)}
    plain = job(folder, tmp_path / "plain", **changes)
    found = job(folder, tmp_path / "out", refit=Refit("bias"), **changes)
    assert (found.pruned.record or {})["kept"] == (plain.pruned.record or {})["kept"]
    assert (found.pruned.record or {})["parameters_before"] == (plain.pruned.record or {})["parameters_before"]
    loaded, tokens = load_torch(tmp_path / "out"), random_tokens(97, 2, 20)
    assert np.abs(torch_logits(loaded, tokens) - logits_of(found.pruned.decoder, tokens)).max() <= 1e-4
    assert loaded.config.attention_bias
    biases = {name: tensor for name, tensor in loaded.named_parameters() if name.endswith(".bias")}
    assert all(
        (tensor.abs().max() > 0) == name.endswith(("o_proj.bias", "down_proj.bias")) for name, tensor in biases.items()
    )


def test_models_that_cannot_have_biases_say_so(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", random_tokens(97, 600))
    hugging_face_folder(tmp_path / "model", "mistral")
    with pytest.raises(InputError, match="refit by bias needs output projections with biases"):
        job(tmp_path, tmp_path / "out", refit=Refit("bias"))


@pytest.mark.parametrize("allocation", ["global", "measured"])
def test_unequal_budgets_become_per_layer_folders(folder: Path, tmp_path: Path, allocation: str) -> None:
    budget = Budget(0.4, ratio_of="blocks", allocation=allocation)
    result = job(folder, tmp_path / "out", budget=budget, refit=Refit())
    assert result.written.format == "per-layer"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"structures": ()}, "name at least one structure"),
        ({"structures": ("heads", "heads")}, "each of them once"),
        ({"structures": ("neurons",)}, "unknown structure 'neurons'"),
        ({"heads": "pairs"}, "unknown way to count heads 'pairs'"),
        ({"heads": "query", "structures": ("channels",)}, "no heads go; add heads to --structures"),
        ({"structures": ("hidden",), "budget": Budget(0.5, ratio_of="model")}, "the ratio counts groups where hidden go"),
        ({"structures": ("hidden",), "scoring": Scoring("obs")}, "obs has no scores for hidden dimensions"),
        ({"structures": ("heads", "layers"), "budget": Budget(0.5, layers=(0, 2))}, "--layers cannot be used where"),
        ({"budget": Budget(0.5, allocation="global"), "format": "stock"}, "use the format per-layer or padded"),
        ({"budget": Budget(0.5, allocation="global"), "scoring": Scoring("obs")}, "no scores to compare"),
        ({"rounds": 0}, "at least 1 round"),
        ({"budget": Budget(target_params=10.0)}, "ask for less, or prune more kinds"),
        ({"heads": "query", "scoring": Scoring("gate")}, "not for query heads"),
    ],
)
def test_combinations_that_make_no_sense_fail_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    for name in ("score", "best_layers", "hidden_scores"):
        monkeypatch.setattr(f"minillm_jax.api.{name}", lambda *_, **__: pytest.fail("worked before checking"))
    with pytest.raises(InputError, match=words):
        job(folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_query_heads_need_more_than_one_of_each_key_value_head(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", random_tokens(97, 600))
    hugging_face_folder(tmp_path / "model", "opt")
    with pytest.raises(InputError, match="every key/value head has one query head"):
        job(tmp_path, tmp_path / "out", heads="query")
