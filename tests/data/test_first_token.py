"""The beginning-of-sequence token: between documents where the tokenizer puts one, and before the windows of Gemma."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, processors

from minillm_jax import demo
from minillm_jax.api import calibrate, describe, held_out
from minillm_jax.data import first_token, tokenizing
from minillm_jax.data.text import Tokens, tokenise
from minillm_jax.data.windows import cut
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model
from tests.helpers import SMALL, edit_json, random_tokens, shared

BOS = 0
DOCUMENTS = [demo.training_text()[at : at + 700].strip() for at in range(0, 42_000, 700)]


def folder_of(path: Path, family: str, puts: bool = True, **changes: object) -> Path:
    """A folder without weights: a family's configuration and the tokenizer of the demo model, which may put a token."""
    config = transformers.AutoConfig.for_model(family, **SMALL[family] | {"vocab_size": 1024, **changes})
    config.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo.FOLDER / name, path / name)
    if puts:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", BOS)])
        tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return describe(folder_of(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return describe(folder_of(tmp_path_factory.mktemp("gemma"), "gemma2"))


def packed(model: Model) -> np.ndarray:
    """The documents packed one after the other, with a token before each but the first."""
    ids = [np.concatenate([[BOS], tokenise(text, model.folder)]) for text in DOCUMENTS]
    return np.concatenate(ids)[1:]


def every_window(ids: np.ndarray, length: int) -> set[tuple[int, ...]]:
    return {tuple(row) for row in ids[: len(ids) // length * length].reshape(-1, length).tolist()}


def test_documents_are_packed_with_the_token_of_the_tokenizer(llama: Model) -> None:
    drawn = calibrate(llama, DOCUMENTS, 40, 64).batches.windows
    assert {tuple(row) for row in drawn.tolist()} <= every_window(packed(llama), 64)
    assert (drawn == BOS).sum() > 5
    assert (drawn[:, 0] == BOS).sum() < 5
    np.testing.assert_array_equal(calibrate(llama, DOCUMENTS, 40, 64, bos="no").batches.windows[:, 0] == BOS, False)


@pytest.mark.parametrize("bos", ["auto", "no"])
def test_a_tokenizer_that_puts_no_token_changes_nothing(tmp_path: Path, bos: str) -> None:
    model = describe(folder_of(tmp_path, "gemma", puts=False))
    expected = every_window(tokenise("\n\n".join(DOCUMENTS), model.folder), 64)
    assert {tuple(row) for row in calibrate(model, DOCUMENTS, 40, 64, bos=bos).batches.windows.tolist()} <= expected
    assert not (held_out(model, DOCUMENTS, 64, bos=bos).windows == BOS).any()
    assert (calibrate(model, DOCUMENTS, 40, 64, bos="yes").batches.windows[:, 0] == BOS).all()


def test_every_window_of_gemma_begins_with_the_token(gemma: Model, llama: Model) -> None:
    ids = packed(gemma)
    for windows in (
        calibrate(gemma, DOCUMENTS, 40, 64).batches.windows,
        calibrate(llama, DOCUMENTS, 40, 64, bos="yes").batches.windows,
    ):
        assert windows.shape == (40, 64)
        assert (windows[:, 0] == BOS).all()
        assert (windows[:, 1] != BOS).all(), "there is no second one"
        text = ",".join(map(str, ids))
        assert all(",".join(map(str, row)) in text for row in windows[:, 1:].tolist())


def test_evaluation_keeps_the_published_convention_but_for_gemma(gemma: Model, llama: Model) -> None:
    text = tokenise("\n\n".join(DOCUMENTS), llama.folder)
    rows = text[: len(text) // 64 * 64].reshape(-1, 64)
    np.testing.assert_array_equal(held_out(llama, DOCUMENTS, 64).windows, rows)
    begun = np.concatenate([[BOS], text])
    begun = begun[: len(begun) // 64 * 64].reshape(-1, 64)
    np.testing.assert_array_equal(held_out(llama, DOCUMENTS, 64, bos="text").windows, begun)
    np.testing.assert_array_equal(held_out(gemma, DOCUMENTS, 64, bos="no").windows, rows)
    for windows in (held_out(gemma, DOCUMENTS, 64).windows, held_out(llama, DOCUMENTS, 64, bos="yes").windows):
        assert (windows[:, 0] == BOS).all()
        np.testing.assert_array_equal(windows[:, 1:].ravel(), text[: windows.shape[0] * 63])


def test_long_texts_begin_with_the_token_too(gemma: Model) -> None:
    """A text that is drawn in passages."""
    many = (f"{number} {text}" for number in range(120) for text in DOCUMENTS)
    windows = calibrate(gemma, many, 12, 32).batches.windows
    assert windows.shape == (12, 32)
    assert (windows[:, 0] == BOS).all()
    assert (windows[:, 1] != BOS).all()


def test_a_window_at_the_beginning_of_a_document_has_one_token() -> None:
    ids = np.array([5, 6, 7, BOS, 8, 9, 10, 11, 12, 13], np.int32)
    assert cut(Tokens(ids, "here", 1), 4, BOS).tolist() == [[BOS, 5, 6, 7], [BOS, 8, 9, 10], [BOS, 10, 11, 12]]
    with pytest.raises(InputError, match="10 tokens are less than one window of 11"):
        cut(Tokens(ids, "here", 1), 11, BOS)


def test_a_chat_template_that_writes_the_token_gets_no_second_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "gemma")
    edit_json(
        folder / "tokenizer_config.json",
        chat_template="<|end|>{% for one in messages %}{{ one['role'] }} {{ one['content'] }}\n{% endfor %}",
    )
    rows = [{"prompt": text, "response": "Yes."} for text in DOCUMENTS]
    windows = calibrate(describe(folder), rows, 40, 64).batches.windows
    assert (windows[:, 0] == BOS).all()
    assert (windows == BOS).sum() > 45
    assert not ((windows[:, 1:] == BOS) & (windows[:, :-1] == BOS)).any()


def test_a_template_without_the_token_gets_the_one_of_the_tokenizer(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}!")
    windows = calibrate(describe(folder), [{"prompt": text, "response": "-"} for text in DOCUMENTS], 40, 64)
    ids = [np.concatenate([[BOS], tokenise(f"{text}!", folder)]) for text in DOCUMENTS]
    assert {tuple(row) for row in windows.batches.windows.tolist()} <= every_window(np.concatenate(ids)[1:], 64)


def test_token_ids_are_taken_as_they_are(gemma: Model, tmp_path: Path) -> None:
    ids = random_tokens(1024, 640)
    np.save(tmp_path / "ids.npy", ids)
    assert {tuple(row) for row in calibrate(gemma, ids, 5, 64).batches.windows.tolist()} <= every_window(ids, 64)
    np.testing.assert_array_equal(held_out(gemma, tmp_path / "ids.npy", 64).windows, ids.reshape(-1, 64))
    for take in (lambda: calibrate(gemma, ids, 5, 64, bos="yes"), lambda: held_out(gemma, ids, 64, bos="yes")):
        with pytest.raises(InputError, match="--bos is for text; put the token into the array instead"):
            take()


def test_a_tokenizer_without_the_token_refuses_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "gemma", puts=False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = describe(folder)
    assert calibrate(model, DOCUMENTS, 4, 64).batches.windows.shape == (4, 64)
    with pytest.raises(InputError, match="the tokenizer has no beginning-of-sequence token; leave out --bos"):
        calibrate(model, DOCUMENTS, 4, 64, bos="yes")
    with pytest.raises(InputError, match="the tokenizer has no beginning-of-sequence token; leave out --bos"):
        held_out(model, DOCUMENTS, 64, bos="text")


def test_unknown_places_are_one_sentence(llama: Model) -> None:
    with pytest.raises(InputError, match="unknown place of the token --bos 'text'; expected one of auto, yes, no"):
        calibrate(llama, DOCUMENTS, 4, 64, bos="text")
    with pytest.raises(InputError, match="expected one of auto, yes, text, no"):
        held_out(llama, DOCUMENTS, 64, bos="maybe")


def test_stories260k_packs_stories_as_it_was_trained() -> None:
    """Its tokenizer reads the word behind the token as it does at the beginning of a text."""
    tokenizer = tokenizing.load(shared("models/stories260K"))
    assert first_token.is_put_by(tokenizer)
    assert first_token.between_documents(tokenizer, "auto") == "<s>"
    assert first_token.of_windows(tokenizer, "auto", "llama") is None
    model = describe(shared("models/stories260K"))
    stories = shared("data/tinystories/tinystories_sample_2MiB.txt").read_text().split("<|endoftext|>")[:200]
    stories = [story.strip() for story in stories if story.strip()]
    call = tokenizer.call
    whole = np.concatenate([call(story)["input_ids"] for story in stories])[1:]
    drawn = calibrate(model, stories, 40, 64).batches.windows
    assert {tuple(row) for row in drawn.tolist()} <= every_window(whole, 64)
