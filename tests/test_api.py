"""The public functions, the scores by every criterion, and bad jobs, which fail before any work."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import minillm_jax
from minillm_jax import demo
from minillm_jax.api import calibrate, evaluate, load, prune, save
from minillm_jax.budget.budget import kept_count
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, kernels, parameter_count
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.run import Job, run
from minillm_jax.scoring.activations import activation_norms
from minillm_jax.scoring.criteria import CRITERIA
from minillm_jax.scoring.gradient import directions
from minillm_jax.scoring.score import Scores, score
from minillm_jax.settings import Budget, Data, Estimation, Evaluation, Output, Refit, Scoring
from minillm_jax.stages import prune_groups
from tests.helpers import (
    arrays_equal,
    hugging_face_folder,
    load_torch,
    logits_of,
    quickly,
    random_tokens,
    shared,
    small_decoder,
    torch_logits,
)

FEW = Estimation(directions=2)


def small_model() -> Model:
    return Model(small_decoder(), {"model_type": "llama", "hidden_size": 16}, Path("nowhere"), "small")


def windows(seed: int = 0) -> Calibration:
    return Calibration(Batches(random_tokens(61, 4, 12, seed=seed)), "random", seed)


def test_every_step_by_its_public_function(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(demo.training_text()[:20_000])
    model = minillm_jax.load(demo.FOLDER)
    calibration = minillm_jax.calibrate(model, tmp_path / "text.txt", samples=3, length=32)
    scores = minillm_jax.score(model, calibration, minillm_jax.Scoring("fms", FEW))
    pruned = minillm_jax.prune(model, calibration, ratio=0.2, recipe="mini-llm", scores=scores)
    minillm_jax.save(pruned, tmp_path / "out")

    tokens = random_tokens(1024, 2, 40)
    ours = np.asarray(pruned.decoder(jnp.asarray(tokens)))
    np.testing.assert_allclose(torch_logits(load_torch(tmp_path / "out"), tokens), ours, atol=1e-4)
    assert group_counts(pruned.decoder, "head") == [4] * 4
    assert arrays_equal(load(tmp_path / "out").decoder, pruned.decoder)
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["parameters_before"] == 964_000
    assert record["parameters_after"] == sum(p.size for p in load_file_tensors(tmp_path / "out"))
    assert [len(row) for row in record["kept"]["channel"]] == group_counts(pruned.decoder, "channel")
    assert record["scoring"]["criterion"] == "fms"
    assert record["estimate"]["projected_gradients"] == projected_of(scores).tolist()
    assert record["versions"].keys() >= {"minillm-jax", "jax"}
    assert record["recipe"] == "mini-llm"


def test_one_call_prunes_a_model_with_a_text(tmp_path: Path) -> None:
    """The text may be a file, a list of texts, or calibration windows: the pruned weights are bit-equal."""
    (tmp_path / "text.txt").write_text(demo.training_text()[:20_000])
    model = load(demo.FOLDER)
    options = {"ratio": 0.2, "samples": 3, "seq_len": 32, "seed": 5}
    pruned = prune(model, tmp_path / "text.txt", **options)
    assert parameter_count(pruned.decoder) <= 804_640, "what a uniform share leaves"
    assert pruned.record is not None
    assert (pruned.record["scoring"]["criterion"], pruned.record["refit"]["method"]) == ("obs", "least-squares")
    calibration = calibrate(model, tmp_path / "text.txt", samples=3, length=32, seed=5)
    assert pruned.record["calibration"] == calibration.record()
    assert arrays_equal(prune(model, calibration, ratio=0.2).decoder, pruned.decoder)
    assert arrays_equal(prune(model, [demo.training_text()[:20_000]], **options).decoder, pruned.decoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.2}, "unknown option 'sparsity'"),
        ({"ratios": 0.2}, "unknown option 'ratios'; did you mean ratio?"),
        ({"ratio": 0.2, "alpha": "much"}, "--alpha must be a number, found 'much'"),
        ({"ratio": 0.2, "samples": 2.5}, "--samples must be a whole number, found '2.5'"),
        ({"ratio": 0.2, "directions": 4}, "--directions would do nothing in this run"),
        ({"ratio": 1.0}, "ratio must lie between 0 and 1"),
        ({}, "give a ratio or a target for the pruned model"),
        ({"ratio": 0.2, "recipe": "best"}, "unknown recipe 'best'"),
    ],
)
def test_options_that_prune_does_not_take(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(small_model(), windows(), progress=lambda *_: pytest.fail("worked before checking"), **options)


def load_file_tensors(folder: Path) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    for name in minillm_jax.__all__:
        assert getattr(minillm_jax, name) is not None
        assert name in dir(minillm_jax)
    with pytest.raises(AttributeError, match="no attribute 'prone'"):
        _ = minillm_jax.prone


def by_hand(model: Model, calibration: Calibration, criterion: str, slopes: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Head and channel scores written out in NumPy, matrix by matrix, with the paper's reductions."""
    (norms,) = activation_norms(model.decoder, calibration.batches)
    matrices = {name: np.asarray(kernel[...], np.float64) for name, kernel in kernels(model.decoder.runs[0]).items()}

    def importance(name: str) -> np.ndarray:
        norm = np.asarray(norms[name], np.float64)
        norm = norm.reshape(norm.shape + (1,) * (matrices[name].ndim - norm.ndim))
        return np.abs(matrices[name]) * norm * np.abs(slopes.get(name, np.ones_like(matrices[name])))

    def heads(name: str, axis: int) -> np.ndarray:
        parts = np.moveaxis(importance(name), axis, 1)
        return parts.reshape(3, 4, -1).sum(axis=-1)

    if criterion == "wanda":
        return [heads("attention.o", 1), importance("mlp.down").sum(axis=2)]
    head = np.max(
        [heads("attention.q", 2), heads("attention.k", 2), heads("attention.v", 2), heads("attention.o", 1)], 0
    )
    channel = [importance("mlp.gate").sum(axis=1), importance("mlp.up").sum(axis=1), importance("mlp.down").sum(axis=2)]
    return [head, np.max(channel, axis=0)]


def projected_of(scores: Scores) -> np.ndarray:
    assert scores.estimate is not None
    assert scores.estimate.projected is not None
    return scores.estimate.projected.sum(axis=1)


@pytest.mark.parametrize("criterion", ["fms", "noise", "wanda"])
def test_scores_equal_those_written_out_by_hand(criterion: str) -> None:
    model, calibration, estimation = small_model(), windows(), Estimation(directions=3, epsilon=1e-2, seed=4)
    scores = score(model, calibration, Scoring(criterion, estimation, seed=9))
    slopes: dict[str, np.ndarray] = {}
    draw = jax.jit(directions.draw, static_argnums=(2, 3, 4))
    for name, kernel in kernels(model.decoder.runs[0]).items():
        layers = range(3)
        if criterion == "fms":
            keys = directions.direction_keys(4, 0, 3)
            along = [[draw(k, jnp.int32(i), name, kernel.shape[1:], "gaussian") for i in layers] for k in keys]
            slopes[name] = np.mean(
                [c * np.asarray(z, np.float64) for c, z in zip(projected_of(scores), along, strict=True)], axis=0
            )
        if criterion == "noise":
            key = directions.stream_key(9, "noise")
            slopes[name] = np.stack([draw(key, jnp.int32(i), name, kernel.shape[1:], "gaussian") for i in layers])
    head, channel = by_hand(model, calibration, criterion, slopes)
    np.testing.assert_allclose(scores.groups["head"], head, rtol=1e-4)
    np.testing.assert_allclose(scores.groups["channel"], channel, rtol=1e-4)


def test_magnitude_is_the_largest_norm_of_a_structure() -> None:
    model = small_model()
    scores = score(model, windows(), Scoring("magnitude"))
    parts = kernels(model.decoder.runs[0])
    gate, up, down = (np.asarray(parts[f"mlp.{name}"][...]) for name in ("gate", "up", "down"))
    norms = [np.linalg.norm(gate, axis=1), np.linalg.norm(up, axis=1), np.linalg.norm(down, axis=2)]
    np.testing.assert_allclose(scores.groups["channel"], np.max(norms, axis=0), rtol=1e-5)


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "obs"])
def test_every_criterion_scores_every_group_and_is_deterministic(criterion: str) -> None:
    model = small_model()
    first = score(model, windows(), Scoring(criterion, FEW))
    again = score(model, windows(), Scoring(criterion, FEW))
    for kind, counts in (("head", 4), ("channel", 12)):
        assert [len(row) for row in first.groups[kind]] == [counts] * 3
        np.testing.assert_array_equal(first.groups[kind], again.groups[kind])
        assert np.unique(first.groups[kind]).size == 3 * counts
    changed = score(model, windows(1), Scoring(criterion, Estimation(directions=2, seed=1), seed=1))
    same = np.array_equal(first.groups["channel"], changed.groups["channel"])
    assert same == criterion.startswith("magnitude")


def test_activation_norms_and_reductions_are_options() -> None:
    model, calibration = small_model(), windows()
    plain = score(model, calibration, Scoring("wanda")).groups["channel"]
    rms = score(model, calibration, Scoring("wanda", activation_norm="rms")).groups["channel"]
    np.testing.assert_allclose(np.asarray(plain) / np.asarray(rms), 48**0.5, rtol=1e-5)
    none = score(model, calibration, Scoring("wanda", activation_norm="none")).groups["channel"]
    down = np.abs(np.asarray(model.decoder.runs[0].mlp.down.kernel[...]))
    np.testing.assert_allclose(none, down.sum(axis=2), rtol=1e-5)
    largest = score(model, calibration, Scoring("wanda", activation_norm="none", within="max")).groups["channel"]
    np.testing.assert_allclose(largest, down.max(axis=2), rtol=1e-6)
    summed = score(model, calibration, Scoring("magnitude", across="sum")).groups["head"]
    assert (np.asarray(summed) > np.asarray(score(model, calibration, Scoring("magnitude")).groups["head"])).all()


def test_one_rademacher_direction_is_wanda_over_all_structures() -> None:
    """With one direction of signs |ĝ| is one constant, so fms ranks as its other two factors do (docs/LOG.md)."""
    model, calibration = small_model(), windows()
    one = score(model, calibration, Scoring("fms", Estimation(directions=1, distribution="rademacher")))
    constant = abs(projected_of(one)[0])
    (norms,) = activation_norms(model.decoder, calibration.batches)
    up = np.abs(np.asarray(model.decoder.runs[0].mlp.up.kernel[...])) * np.asarray(norms["mlp.up"])[:, :, None]
    ratio = np.asarray(
        score(model, calibration, Scoring("fms", Estimation(directions=1, distribution="rademacher"))).groups["channel"]
    )
    assert (ratio / constant >= up.sum(axis=1) * (1 - 1e-4)).all()


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        (
            Scoring("best"),
            "unknown criterion 'best'; expected one of obs, wanda, flap, fms, ",
        ),
        (Scoring("fms", activation_norm="l7"), "unknown activation norm 'l7'"),
        (
            Scoring("wanda", factors=("magnitude",)),
            "the criterion wanda does not read factors, which would do nothing; leave it out, or use the criterion fms",
        ),
        (Scoring("obs", factors=("magnitude",)), "the criterion obs does not read factors"),
        (Scoring("gate", within="mean", across="sum"), "the criterion gate does not read within and across"),
        (Scoring("magnitude", activation_norm="rms"), "the criterion magnitude does not read activation_norm"),
        (Scoring("fms", within="median"), "unknown reduction within a structure 'median'"),
        (Scoring("fms", across="first"), "unknown reduction across structures 'first'"),
        (Scoring("fms", estimation=Estimation(distribution="cauchy")), "unknown distribution 'cauchy'"),
        (
            Scoring("fms", estimation=Estimation(directions=0)),
            "the number of directions must be at least 1, found 0",
        ),
        (Scoring("fms", estimation=Estimation(epsilon=0.0)), "epsilon must be a positive float32 number, found 0"),
        (Scoring("fms", estimation=Estimation(epsilon=float("nan"))), "epsilon must be a positive float32 number"),
    ],
)
def test_settings_out_of_range_are_errors(scoring: Scoring, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(small_model(), windows(), scoring)


def recipe_of(text: Path, **changes: Any) -> Recipe:
    """A recipe that scores by wanda, with other sections in the place of its own."""
    sections = {"data": Data(str(text)), "budget": Budget(0.2), "scoring": Scoring("wanda"), "refit": Refit("none")}
    return Recipe(**sections | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": Budget(1.0)}, "ratio must lie between 0 and 1"),
        ({"scoring": Scoring("best")}, "unknown criterion"),
        ({"budget": Budget(0.2, layers=(1, 9))}, r"layers 1:9 are not a range of this model's layers; it has 0:4"),
        (
            {"budget": Budget(0.2, layers=(1, 3)), "output": Output("stock")},
            "unequal numbers of query heads .* use the format per-layer or padded",
        ),
        ({"output": Output("zip")}, "unknown format 'zip'"),
        ({"output": Output(max_shard_size="0GB")}, "shard size '0GB' is not understood"),
        ({"budget": Budget(0.2, round_heads_to=0)}, "multiples of at least 1, not 0"),
        ({"data": Data()}, "no calibration text is given"),
    ],
)
def test_bad_settings_fail_before_the_weights_are_read(tmp_path: Path, changes: dict, message: str) -> None:
    """The model has no weight file, so that reading the weights would be another error."""
    model = shutil.copytree(demo.FOLDER, tmp_path / "model")
    (model / "model.safetensors").unlink()
    recipe = recipe_of(tmp_path / "nowhere.txt", **changes)
    with pytest.raises(InputError, match=message):
        run(Job(str(model), str(tmp_path / "out"), recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("model", "data", "evaluation", "message"),
    [
        ("./nowhere", Data(), Evaluation(), "no such folder"),
        (demo.FOLDER, Data("nowhere.txt"), Evaluation(), "no such file"),
        (demo.FOLDER, Data(samples=100_000), Evaluation(), "but 100000 are asked for"),
        (demo.FOLDER, Data(samples=2), Evaluation("nowhere.txt"), "no such file"),
    ],
)
def test_models_and_texts_that_do_not_exist_fail_before_any_stage(
    tmp_path: Path, model: Path, data: Data, evaluation: Evaluation, message: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(demo.training_text()[:20_000])
    recipe = recipe_of(text, data=replace(data, calibration=data.calibration or str(text)), evaluation=evaluation)
    with pytest.raises(InputError, match=message):
        run(Job(str(model), str(tmp_path / "out"), recipe), lambda *_: pytest.fail("worked before checking"))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


class Interrupted(Mapping[str, str]):
    """Texts to write beside the weights, whose reading is interrupted."""

    def __getitem__(self, name: str) -> str:
        raise KeyboardInterrupt

    def __iter__(self) -> Iterator[str]:
        raise KeyboardInterrupt

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("format_name", ["stock", "per-layer", "padded", "flax"])
def test_interrupted_saving_leaves_nothing(tmp_path: Path, format_name: str) -> None:
    """The interruption comes after the weights are written to the scratch folder."""
    with pytest.raises(KeyboardInterrupt):
        save(load(demo.FOLDER), tmp_path / "deep" / "out", format_name, extra=Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    """In the middle of pruning. Afterwards the weights are saved, and an interruption loses the documents only."""
    text = tmp_path / "text.txt"
    text.write_text(demo.training_text()[:20_000])
    job = Job(str(demo.FOLDER), str(tmp_path / "out"), recipe_of(text, data=Data(str(text), 2, 32)))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    with pytest.raises(KeyboardInterrupt):
        run(job, documents=interrupt)
    load(tmp_path / "out")


def test_stories260k_pruned_with_wanda_is_as_good_as_the_prototype(tmp_path: Path) -> None:
    """20 %, 16 calibration windows: 2.0 to 2.6 times the dense perplexity on 96 other windows."""
    model = load(shared("models/stories260K"))
    stories = shared("data/tinystories/tinystories_sample_2MiB.txt").read_text().split("<|endoftext|>")
    (tmp_path / "stories.txt").write_text("\n\n".join(story.strip() for story in stories))
    chosen = calibrate(model, tmp_path / "stories.txt", samples=112, length=128).batches.windows
    held_out = tmp_path / "held-out.npy"
    np.save(held_out, chosen[16:])
    dense = evaluate(model, held_out).perplexity
    assert dense < 6
    scores = score(model, Calibration(Batches(chosen[:16]), "tinystories", 0), Scoring("wanda"))
    assert 2.0 <= evaluate(prune_groups(model, scores, Budget(0.2)), held_out).perplexity / dense <= 2.6


@pytest.mark.parametrize("family", quickly(["opt", "bloom", "gpt_neox", "gemma2", "glm4", "phi3"], ("bloom", "gemma2")))
def test_the_paper_s_recipe_in_every_kind_of_family(tmp_path: Path, family: str) -> None:
    """SPSA, activation norms and scores of plain and fused MLPs, post norms, a parallel residual, ALiBi."""
    folder = hugging_face_folder(tmp_path / "model", family)
    np.save(tmp_path / "tokens.npy", random_tokens(97, 400))
    estimation = Estimation(directions=2, distribution="rademacher")
    recipe = Recipe(
        data=Data(str(tmp_path / "tokens.npy"), 4, 32),
        budget=Budget(0.3),
        scoring=Scoring("fms"),
        gradient=estimation,
        refit=Refit("none"),
    )
    result = run(Job(str(folder), str(tmp_path / "out"), recipe))
    counts = {kind: [len(rows) for rows in kept] for kind, kept in (result.pruned.record or {})["kept"].items()}
    expected = {kind: [kept_count(n, 0.3) for n in group_counts(load(folder).decoder, kind)] for kind in counts}
    assert counts == expected
    tokens = random_tokens(97, 2, 32)
    difference = torch_logits(load_torch(tmp_path / "out"), tokens) - logits_of(result.pruned.decoder, tokens)
    assert np.abs(difference).max() <= 1e-4
