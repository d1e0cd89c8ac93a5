"""What people have in hand in Python: texts, rows, arrays of ids, paths, windows; and limits of the model."""

from collections.abc import Callable
from inspect import unwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import minillm_jax
from minillm_jax import api, demo
from minillm_jax.api import calibrate, describe, evaluate, load, prune
from minillm_jax.data.batches import Batches
from minillm_jax.data.documents import check_source
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.loaded import Model
from minillm_jax.settings import Scoring
from tests.helpers import LLAMA_ROPE, SMALL, edit_json, hugging_face_folder, random_tokens

TEXTS = [demo.training_text()[:4000], demo.training_text()[5000:9000]]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(demo.FOLDER)


def rows() -> list[dict[str, Any]]:
    return [{"text": text, "body": text.upper(), "n": 1} for text in TEXTS]


@pytest.mark.parametrize(
    "given",
    [
        lambda: TEXTS,
        lambda: tuple(TEXTS),
        lambda: (text for text in TEXTS),
        lambda: np.array(TEXTS),
        lambda: np.array(TEXTS, dtype=object),
        lambda: rows(),
        lambda: iter(rows()),
    ],
    ids=["list", "tuple", "generator", "array", "objects", "rows", "iterator of rows"],
)
def test_texts_are_documents(model: Model, given: Callable[[], Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    expected = calibrate(model, tmp_path / "text.txt", 3, 32)
    assert calibrate(model, given(), 3, 32).fingerprint() == expected.fingerprint()


def test_the_field_of_rows_is_chosen(model: Model) -> None:
    expected = calibrate(model, [text.upper() for text in TEXTS], 3, 32)
    assert calibrate(model, rows(), 3, 32, field="body").fingerprint() == expected.fingerprint()
    with pytest.raises(
        InputError, match="text 0 of the given data: expected a field 'content', found 'text', 'body', 'n'"
    ):
        calibrate(model, rows(), 3, 32, field="content")


@pytest.mark.parametrize(
    "given",
    [
        *(lambda ids, kind=kind: ids.astype(kind) for kind in ("int16", "int32", "int64", "uint16", "uint64")),
        lambda ids: ids.reshape(-1, 10),
        lambda ids: jnp.asarray(ids, jnp.int32),
        lambda ids: [jnp.asarray(row, jnp.int32) for row in ids.reshape(-1, 10)],
        lambda ids: ids.tolist(),
        lambda ids: list(ids),
        lambda ids: [ids[:7].tolist(), ids[7:].tolist()],
        lambda ids: [ids[:7], ids[7:7], ids[7:]],
        lambda ids: (row.tolist() for row in ids.reshape(-1, 10)),
    ],
)  # fmt: skip
def test_ids_are_taken_in_every_shape(model: Model, given: Callable[[np.ndarray], Any]) -> None:
    ids = random_tokens(1024, 600)
    expected = calibrate(model, ids, 4, 16)
    assert calibrate(model, given(ids), 4, 16).fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "expected a path, a Hub data set, a list of texts, or an array of token ids, found NoneType None"),
        (b"words", "found bytes b'words'"),
        (3, "found int 3"),
        ({"input_ids": [1, 2]}, "found dict"),
        ({"a text"}, "found set"),
        ([], "the given data: there is no text in it"),
        ([""], "the given data: there is no text in it"),
        ([TEXTS[0], None], "text 1 of the given data: expected a text, or an object .*, found null"),
        ([TEXTS[0], 3], "text 1 of the given data: expected a text, or an object .*, found a number"),
        ([1.5, 2.5], "expected texts or token ids, found float 1.5"),
        ([True, False] * 99, "expected texts or token ids, found bool True"),
        ([[1, 2], ["a"]], "expected texts or token ids, found str 'a'"),
        ([[[1], [2, 3]], [[4]]], "expected texts or token ids, found lists of unequal lists"),
        (np.ones(9), "expected whole-number token ids, found float64"),
        (np.zeros(0, np.int32), "expected whole-number token ids, found int32 of shape"),
        ([2**70] * 40, "expected texts or token ids, found int"),
        (np.full(99, 1024), "token id 1024 lies outside the model's vocabulary of 1024"),
        ([5] * 99 + [-1], "token id -1 lies outside the model's vocabulary of 1024"),
        ("Once upon a time, there was a text that was no path.", "expected the name of one and not the text itself"),
        ("nowhere.txt", "nowhere.txt: no such file; give a text, .json"),
    ],
)
@pytest.mark.parametrize("take", ["calibrate", "evaluate", "prune"])
def test_other_data_are_one_sentence(model: Model, take: str, data: Any, message: str) -> None:
    """The checks of types in the tests would come first; they are taken off, but for those of inner functions."""
    if take == "prune" and (data is None or isinstance(data, int)):
        return
    more = {"calibrate": {"samples": 1, "length": 8}, "prune": {"ratio": 0.2, "samples": 1, "seq_len": 8}}.get(take, {})
    with pytest.raises(InputError, match=message):
        unwrap(getattr(api, take))(model, data, **more)


def test_an_open_file_is_no_list_of_texts(model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0])
    with (
        (tmp_path / "text.txt").open() as file,
        pytest.raises(InputError, match=r"expected a path, .*found TextIOWrapper"),
    ):
        calibrate(model, file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2.5}, "--samples must be a whole number, found 2.5"),
        ({"samples": True}, "--samples must be a whole number, found True"),
        ({"length": "64"}, "--seq-len must be a whole number, found '64'"),
        ({"seed": 1.0}, "--seed must be a whole number, found 1.0"),
        ({"samples": 0}, "--samples must be at least 1, found 0"),
        ({"length": -5}, "a window of -5 tokens has nothing to predict"),
        ({"seed": -1}, "--seed must lie between 0 and"),
    ],
)
def test_numbers_of_calibrate_are_checked(model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        unwrap(calibrate)(model, TEXTS, **options)


@pytest.mark.parametrize("window", [2.5, True, "64", None])
def test_the_window_of_evaluate_is_checked(model: Model, window: Any) -> None:
    with pytest.raises(InputError, match=r"--window must be a whole number, found "):
        unwrap(evaluate)(model, TEXTS, window)


def test_numbers_of_numpy_are_numbers(model: Model) -> None:
    calibration = unwrap(calibrate)(model, TEXTS, np.int64(3), np.int32(16), np.uint8(1))
    assert calibration.fingerprint() == calibrate(model, TEXTS, 3, 16, 1).fingerprint()
    assert type(calibration.seed) is int


def test_a_criterion_is_named_by_its_word(model: Model) -> None:
    calibration = calibrate(model, TEXTS, 3, 16)
    expected = minillm_jax.score(model, calibration, Scoring("wanda"))
    named = minillm_jax.score(model, calibration, "wanda")
    assert named.settings == expected.settings
    jax.tree.map(np.testing.assert_array_equal, named.groups, expected.groups)
    assert minillm_jax.score(model, calibration).kinds == ("head", "channel")
    with pytest.raises(InputError, match="unknown criterion 'wand'; expected one of obs, wanda"):
        minillm_jax.score(model, calibration, "wand")
    with pytest.raises(InputError, match="expected a Scoring or the name of a criterion, found 3"):
        unwrap(minillm_jax.score)(model, calibration, 3)


def test_scores_are_made_on_texts_and_batches(model: Model) -> None:
    drawn = calibrate(model, [demo.training_text()[:40_000]])
    expected = minillm_jax.score(model, drawn, "wanda").groups
    for given in ([demo.training_text()[:40_000]], drawn.batches):
        jax.tree.map(np.testing.assert_array_equal, minillm_jax.score(model, given, "wanda").groups, expected)


def test_windows_are_evaluated_as_they_are(model: Model) -> None:
    windows = random_tokens(1024, 5, 24)
    expected = evaluate(model, windows, window=24)
    assert evaluate(model, Batches(windows)) == expected
    assert evaluate(model, Calibration(Batches(windows), "made", 0)) == expected
    with pytest.raises(InputError, match="--bos is for text"):
        evaluate(model, Batches(windows), bos="yes")


@pytest.mark.parametrize("token", [-1, 1024, 2**31 - 1])
@pytest.mark.parametrize("wrap", [lambda batches: batches, lambda batches: Calibration(batches, "made", 0)])
def test_ids_of_windows_made_by_hand_are_checked(model: Model, token: int, wrap: Callable[[Batches], Any]) -> None:
    windows = random_tokens(1024, 3, 8)
    windows[1, 2] = token
    for take in (
        lambda: evaluate(model, wrap(Batches(windows))),
        lambda: prune(model, wrap(Batches(windows)), ratio=0.2),
        lambda: minillm_jax.score(model, wrap(Batches(windows)), "wanda"),
    ):
        with pytest.raises(InputError, match=f"token id {token} lies outside the model's vocabulary of 1024"):
            take()


# ------------------------------------------------------------------------------------------------------- positions

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def described(folder: Path, family: str, **changes: Any) -> Model:
    """A model without weights, of a small configuration with 512 positions."""
    import transformers

    transformers.AutoConfig.for_model(family, **SMALL[family] | changes).save_pretrained(folder)
    return describe(folder)


@pytest.mark.parametrize(
    ("family", "changes", "limit"),
    [
        *((family, {}, 512) for family in SMALL if family not in ("opt", "bloom")),
        ("llama", {"rope_parameters": LINEAR}, 2048),
        ("llama", {"rope_parameters": LLAMA_ROPE}, 512),
    ],
)  # fmt: skip
def test_a_window_beyond_the_trained_positions_is_a_warning(
    tmp_path: Path, family: str, changes: dict[str, Any], limit: int
) -> None:
    model, ids = described(tmp_path / "model", family, **changes), random_tokens(97, 3000)
    words = f"{limit + 1}: the model was trained for windows of at most {limit} tokens.*; use"
    with pytest.warns(InputWarning, match=f"--seq-len {words} --seq-len {limit} or less"):
        calibrate(model, ids, 1, limit + 1)
    with pytest.warns(InputWarning, match=f"--window {words} --window {limit} or less"):
        api.held_out(model, ids, limit + 1)
    with pytest.warns(InputWarning, match=f"--window {words}"):
        api.held_out(model, Batches(random_tokens(97, 1, limit + 1)), 128)
    calibrate(model, ids, 1, limit)
    api.held_out(model, ids, limit)


def test_a_window_beyond_learned_positions_is_an_error(tmp_path: Path) -> None:
    model, ids = described(tmp_path / "model", "opt"), random_tokens(97, 3000)
    with pytest.raises(
        InputError, match="--seq-len 513: the model has 512 learned positions; use --seq-len 512 or less"
    ):
        calibrate(model, ids, 1, 513)
    with pytest.raises(InputError, match="--window 513: the model has 512 learned positions"):
        api.held_out(model, ids, 513)
    calibrate(model, ids, 1, 512)


def test_positions_without_a_limit_and_unknown_ones_give_no_warning(tmp_path: Path) -> None:
    calibrate(described(tmp_path / "bloom", "bloom"), random_tokens(97, 6000), 1, 5000)
    model = described(tmp_path / "llama", "llama")
    edit_json(tmp_path / "llama" / "config.json", max_position_embeddings=None)
    assert model.decoder.config.trained_length == 512
    # transformers fills in its default of 2048.
    assert describe(tmp_path / "llama").decoder.config.trained_length == 2048


def test_evaluation_of_a_loaded_model_warns_too(tmp_path: Path) -> None:
    model = load(hugging_face_folder(tmp_path / "model", max_position_embeddings=16))
    with pytest.warns(InputWarning, match="--window 24: the model was trained for windows of at most 16 tokens"):
        evaluate(model, random_tokens(97, 48), window=24)


# ---------------------------------------------------------------------------------------------- before the weights


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", "", "there is no text in it"),
        ("blank.txt", " \n" * 2000, "there is no text in it"),
        ("late.jsonl", '{"text": "a"}\n' * 3000 + "{", "line 3001 is not JSON"),
        ("field.jsonl", '{"content": "a"}', "expected a field 'text', found 'content'"),
        ("rows.txt", '{"text": "a"}\n', "holds JSON documents"),
    ],
)
def test_a_source_is_checked_without_a_model(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        check_source(tmp_path / name)


def test_good_sources_pass_and_a_hub_data_set_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Hub:
        @staticmethod
        def load_dataset(*_: Any, **__: Any) -> None:
            pytest.fail("downloaded")

    monkeypatch.setitem(__import__("sys").modules, "datasets", Hub)
    check_source("owner/name:test")
    with pytest.raises(InputError, match="no such file"):
        check_source("owner/name with spaces")
    (tmp_path / "a.jsonl").write_text('{"body": "words"}\n' * 9 + "broken")
    check_source(tmp_path / "a.jsonl", "body", most=20)
    np.save(tmp_path / "ids.npy", np.arange(5))
    check_source(tmp_path / "ids.npy")
    np.save(tmp_path / "negative.npy", np.array([1, -2]))
    with pytest.raises(InputError, match="token ids must be at least 0, found -2"):
        check_source(tmp_path / "negative.npy")
