"""Texts of the public function `generate`, and the command of this name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import minillm_jax as mj
from minillm_jax import demo
from minillm_jax.data.prompts import Pieces, prompt_tokens, stop_tokens
from minillm_jax.data.text import tokenizer_of
from minillm_jax.data.tokenizing import Tokenizer
from minillm_jax.generating import continuations
from minillm_jax.model.loaded import Model
from tests.cli.command import call
from tests.helpers import edit_json, load_torch

PROMPT = "The command"


@pytest.fixture(scope="module")
def model() -> Model:
    return mj.load(demo.FOLDER)


def by_transformers(folder: Path, prompt: str, count: int, **options: Any) -> str:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    found = load_torch(folder).generate(**given, max_new_tokens=count, do_sample=False, **options)
    whole = tokenizer.decode(found[0], skip_special_tokens=True)
    return whole[len(tokenizer.decode(given["input_ids"][0], skip_special_tokens=True)) :]


def test_texts_are_those_of_transformers_and_are_told_piece_by_piece(model: Model) -> None:
    prompts, pieces = [PROMPT, "Each file is read once. The"], {0: "", 1: ""}

    def told(number: int, piece: str) -> None:
        pieces[number] += piece

    found = mj.generate(model, prompts, max_tokens=20, told=told)
    assert found == [by_transformers(demo.FOLDER, prompt, 20) for prompt in prompts]
    assert list(pieces.values()) == found
    assert mj.generate(model, PROMPT, max_tokens=20) == found[:1]


def test_unfinished_characters_are_held_back(model: Model) -> None:
    tokenizer = tokenizer_of(model.folder)()
    text = " “naïve” 漢字 🙂 end"
    ids = tokenizer.call(PROMPT + text)["input_ids"]
    start = len(tokenizer.call(PROMPT)["input_ids"])
    pieces = Pieces(tokenizer, ids[:start])
    told = [pieces.add(token) for token in ids[start:]]
    assert "".join(told) == pieces.whole() == text
    assert "" in told, "a character of several tokens is told once"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in told)


def test_stop_tokens_stand_in_three_places(tmp_path: Path) -> None:
    def stops(generation: dict[str, Any] | None, config: dict[str, Any], tokenizer: Tokenizer) -> set[int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return stop_tokens(folder, config, tokenizer)

    tokenizer = Tokenizer(tmp_path, lambda text: {}, None, True, eos=7)
    assert stops({"eos_token_id": [4, 5]}, {"eos_token_id": 6}, tokenizer) == {4, 5}
    assert stops({}, {"eos_token_id": 6}, tokenizer) == {6}
    assert stops(None, {"eos_token_id": None}, tokenizer) == {7}
    assert stops(None, {}, tokenizer._replace(eos=None)) == set()


def test_a_tokenizer_that_closes_every_text_does_not_close_a_prompt(tmp_path: Path) -> None:
    closing = Tokenizer(tmp_path, lambda text, add_special_tokens: {"input_ids": [3, 4, 2]}, None, True, eos=2)
    assert prompt_tokens(closing, "any", False, 61) == [3, 4]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompts": []}, "no prompt is given"),
        ({"temperature": -1.0}, r"--temperature -1.0: expected a number of at least 0"),
        ({"temperature": float("nan")}, r"--temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"--top-p 0.0: expected a number in \(0, 1\]"),
        ({"top_p": 0.9}, "--top-p 0.9 would do nothing at temperature 0"),
        ({"max_tokens": 0}, "--max-tokens 0: expected a whole number of at least 1"),
        ({"seed": -1}, "--seed -1: expected a whole number of at least 0"),
        ({"chat": True}, "the tokenizer has no chat template; leave --chat out"),
        ({"prompts": [""]}, "a prompt has no tokens"),
    ],
)
def test_bad_input_is_one_sentence(model: Model, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(mj.InputError, match=sentence):
        mj.generate(model, **{"prompts": PROMPT} | options)


def test_a_prompt_may_be_a_message_of_a_chat(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(demo.FOLDER, folder)
    message = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template = message + "{% if add_generation_prompt %}[assistant]{% endif %}"
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    found = mj.generate(mj.load(folder), PROMPT, max_tokens=12, chat=True)
    assert found == mj.generate(model, f"[user] {PROMPT}\n[assistant]", max_tokens=12)


def test_the_command_writes_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Model
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    expected = mj.generate(model, PROMPT, max_tokens=12)[0]
    for given in (["--prompt", PROMPT], ["--file", tmp_path / "prompt.txt"]):
        assert call(monkeypatch, ["generate", demo.FOLDER, *given, "--max-tokens", 12]) == 0
        assert capsys.readouterr().out == PROMPT + expected + "\n"
    options = ["--prompt", PROMPT, "--prompt", "A", "--max-tokens", 12, "--against", demo.FOLDER]
    assert call(monkeypatch, ["generate", demo.FOLDER, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["texts"][0] for one in found["models"]] == [expected] * 2
    assert call(monkeypatch, ["generate", demo.FOLDER, *options]) == 0
    assert capsys.readouterr().out.count("demo_model") >= 2


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "no prompt is given; give one with --prompt or --file"),
        (["--file", "/nowhere.txt"], "--file /nowhere.txt: cannot be read as text"),
        (["--prompt", "a", "--against", "/nowhere"], "/nowhere"),
        (["--prompt", "a", "--top-p", "2"], "--top-p 2.0: expected a number in"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], sentence: str
) -> None:
    assert call(monkeypatch, ["generate", demo.FOLDER, *given]) == 2
    errors = capsys.readouterr().err
    assert sentence in errors.replace("\n", " ")
    assert "Traceback" not in errors


def test_models_continue_the_same_beginnings(model: Model) -> None:
    windows = mj.calibrate(model, [demo.held_out_text()[:8000]], samples=4, length=32).batches
    found = continuations({"dense": model, "pruned": model}, windows, 2)
    assert len(found) == 2
    for row, ids in zip(found, windows.spaced(2).windows, strict=True):
        assert row["dense"] == row["pruned"] != ""
        assert row["prompt"] == Pieces(tokenizer_of(model.folder)(), []).of(ids[:16].tolist())
    assert continuations({"dense": model}, windows, 0) == []


def test_a_model_without_a_tokenizer_continues_nothing(model: Model, tmp_path: Path) -> None:
    windows = mj.calibrate(model, [demo.held_out_text()[:8000]], samples=4, length=32).batches
    assert continuations({"dense": Model(model.decoder, {}, tmp_path, "model")}, windows, 2) == []
