"""The whole job from Python, its controls, and everything that must fail before any work."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import minillm_jax
from minillm_jax import demo
from minillm_jax.api import calibrate, evaluate, load, prune, save
from minillm_jax.budget.budget import Budget, kept_count
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, kernels
from minillm_jax.pruning.refit import Refit
from minillm_jax.run import Job, run
from minillm_jax.scoring.activations import activation_norms
from minillm_jax.scoring.criteria import CRITERIA
from minillm_jax.scoring.gradient import directions
from minillm_jax.scoring.score import Scores, Scoring, score
from minillm_jax.settings import Estimation
from tests.helpers import (
    arrays_equal,
    hugging_face_folder,
    load_torch,
    logits_of,
    random_tokens,
    shared,
    small_decoder,
    torch_logits,
)

FEW = Estimation(directions=2)


def small_model() -> Model:
    return Model(small_decoder(), {"model_type": "llama", "hidden_size": 16}, Path("nowhere"), "small")


def windows(seed: int = 0) -> Calibration:
    return Calibration(random_tokens(61, 4, 12, seed=seed), "random", seed)


def test_five_lines_from_a_folder_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(demo.training_text()[:20_000])
    model = minillm_jax.load(demo.FOLDER)
    calibration = minillm_jax.calibrate(model, tmp_path / "text.txt", samples=3, length=32)
    scores = minillm_jax.score(model, calibration, minillm_jax.Scoring("fms", FEW))
    pruned = minillm_jax.prune(model, scores, ratio=0.2)
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
    """Channel and head scores written out in NumPy, matrix by matrix, with the paper's reductions."""
    (norms,) = activation_norms(model.decoder, calibration.windows)
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
            drawn = [[draw(k, jnp.int32(i), name, kernel.shape[1:], "gaussian") for i in layers] for k in keys]
            slopes[name] = np.mean(
                [c * np.asarray(z, np.float64) for c, z in zip(projected_of(scores), drawn, strict=True)], axis=0
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


@pytest.mark.parametrize("criterion", ["obs", "wanda"])
def test_pruning_with_refit_walks_over_the_calibration(criterion: str) -> None:
    """The same numbers of groups as without, chosen on the way by obs, and a loss that is nearer to the dense one."""
    model, calibration = small_model(), Calibration(random_tokens(61, 32, 12), "random", 0)
    scores = score(model, calibration, Scoring(criterion))
    with pytest.raises(InputError, match="give the calibration"):
        prune(model, scores, 0.5, refit=Refit())
    refitted = prune(model, scores, 0.5, refit=Refit(), calibration=calibration)
    plain = prune(model, score(model, calibration, Scoring("wanda")), 0.5)
    for kind in ("head", "channel"):
        assert group_counts(refitted.decoder, kind) == group_counts(plain.decoder, kind)
    dense, with_it, without = (perplexity(one.decoder, calibration.windows).loss for one in (model, refitted, plain))
    assert abs(with_it - dense) < abs(without - dense)
    assert refitted.record is not None
    assert refitted.record["refit"]["alpha"] == 0.5
    assert [len(rows) for rows in refitted.record["kept"]["channel"]] == [6, 6, 6]


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
    (norms,) = activation_norms(model.decoder, calibration.windows)
    up = np.abs(np.asarray(model.decoder.runs[0].mlp.up.kernel[...])) * np.asarray(norms["mlp.up"])[:, :, None]
    ratio = np.asarray(
        score(model, calibration, Scoring("fms", Estimation(directions=1, distribution="rademacher"))).groups["channel"]
    )
    assert (ratio / constant >= up.sum(axis=1) * (1 - 1e-4)).all()


def test_pruning_twice_keeps_the_first_record_and_a_range_of_layers_prunes_only_those() -> None:
    model = small_model()
    once = prune(model, score(model, windows(), Scoring("wanda")), 0.25)
    twice = prune(once, score(once, windows(), Scoring("wanda")), Budget(0.25, layers=(1, 3)))
    assert group_counts(once.decoder, "channel") == [9, 9, 9]
    assert group_counts(twice.decoder, "channel") == [9, 7, 7]
    assert twice.record is not None
    assert twice.record["pruned_before"] == once.record
    with pytest.raises(InputError, match=r"the scores are for \[4, 4, 4\] groups of kind head"):
        prune(once, score(model, windows(), Scoring("wanda")), 0.25)


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        (
            Scoring("best"),
            "unknown criterion 'best'; expected one of fms, noise, wanda, flap, ",
        ),
        (Scoring(activation_norm="l7"), "unknown activation norm 'l7'"),
        (Scoring(within="median"), "unknown reduction within a structure 'median'"),
        (Scoring(across="first"), "unknown reduction across structures 'first'"),
        (Scoring(estimation=Estimation(distribution="cauchy")), "unknown distribution 'cauchy'"),
        (
            Scoring(estimation=Estimation(directions=0)),
            "the number of directions must be at least 1, found 0",
        ),
        (Scoring(estimation=Estimation(epsilon=0.0)), "epsilon must be a positive float32 number, found 0"),
        (Scoring(estimation=Estimation(epsilon=float("nan"))), "epsilon must be a positive float32 number"),
    ],
)
def test_settings_out_of_range_are_errors(scoring: Scoring, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(small_model(), windows(), scoring)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": Budget(1.0)}, "ratio must lie between 0 and 1"),
        ({"scoring": Scoring("best")}, "unknown criterion"),
        ({"model": "./nowhere"}, "no such folder"),
        ({"budget": Budget(0.2, layers=(1, 9))}, r"layers 1:9 are not a range of this model's layers; it has 0:4"),
        (
            {"budget": Budget(0.2, layers=(1, 3)), "format": "stock"},
            "unequal numbers of query heads .* use the format per-layer or padded",
        ),
        ({"format": "zip"}, "unknown format 'zip'"),
        ({"max_shard_size": "0GB"}, "shard size '0GB' is not understood"),
        ({"budget": Budget(0.2, round_heads_to=0)}, "multiples of at least 1, not 0"),
        ({"calibration": "nowhere.txt"}, "no such file"),
        ({"samples": 100_000}, "but 100000 are asked for"),
        ({"evaluation": "nowhere.txt"}, "no such file"),
    ],
)
def test_bad_jobs_fail_before_any_work_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    (tmp_path / "text.txt").write_text(demo.training_text()[:20_000])
    monkeypatch.setattr("minillm_jax.api.score", lambda *_: pytest.fail("scored before checking"))
    job = {
        "model": str(demo.FOLDER),
        "calibration": str(tmp_path / "text.txt"),
        "output": str(tmp_path / "out"),
        "budget": Budget(0.2),
    }
    with pytest.raises(InputError, match=message):
        run(Job(**job | changes))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_interrupted_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.writer.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(load(demo.FOLDER), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_stories260k_pruned_with_wanda_is_as_good_as_the_prototype(tmp_path: Path) -> None:
    """20 %, 16 calibration windows: 2.0 to 2.6 times the dense perplexity on 96 other windows."""
    model = load(shared("models/stories260K"))
    stories = shared("data/tinystories/tinystories_sample_2MiB.txt").read_text().split("<|endoftext|>")
    (tmp_path / "stories.txt").write_text("\n\n".join(story.strip() for story in stories))
    chosen = calibrate(model, tmp_path / "stories.txt", samples=112, length=128).windows
    held_out = tmp_path / "held-out.npy"
    np.save(held_out, chosen[16:])
    dense = evaluate(model, held_out).perplexity
    assert dense < 6
    scores = score(model, Calibration(chosen[:16], "tinystories", 0), Scoring("wanda"))
    assert 2.0 <= evaluate(prune(model, scores, 0.2), held_out).perplexity / dense <= 2.6


@pytest.mark.parametrize("family", ["opt", "bloom", "gpt_neox", "gemma2", "glm4", "phi3"])
def test_the_paper_s_recipe_in_every_kind_of_family(tmp_path: Path, family: str) -> None:
    """SPSA, activation norms and scores of plain and fused MLPs, post norms, a parallel residual, ALiBi."""
    folder = hugging_face_folder(tmp_path / "model", family)
    np.save(tmp_path / "tokens.npy", random_tokens(97, 400))
    estimation = Estimation(directions=2, distribution="rademacher")
    job = Job(
        str(folder),
        str(tmp_path / "tokens.npy"),
        str(tmp_path / "out"),
        Budget(0.3),
        samples=4,
        length=32,
        scoring=Scoring("fms", estimation),
    )
    result = run(job)
    counts = {kind: [len(rows) for rows in kept] for kind, kept in (result.pruned.record or {})["kept"].items()}
    expected = {kind: [kept_count(n, 0.3) for n in group_counts(load(folder).decoder, kind)] for kind in counts}
    assert counts == expected
    tokens = random_tokens(97, 2, 32)
    difference = torch_logits(load_torch(tmp_path / "out"), tokens) - logits_of(result.pruned.decoder, tokens)
    assert np.abs(difference).max() <= 1e-4
