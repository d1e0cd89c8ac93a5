"""The command `compare`: what it prints and writes, and what it refuses before the weights are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import demo
from minillm_jax.comparing import Comparison
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from tests.cli.command import call
from tests.helpers import edit_json, hugging_face_folder, random_tokens


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(demo.held_out_text()[:6000])
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders without tokenizers: a small model, and another one of the same vocabulary."""
    folder = tmp_path_factory.mktemp("pair")
    return hugging_face_folder(folder / "dense"), hugging_face_folder(folder / "pruned", intermediate_size=24)


def compared(pair: tuple[Path, Path], **more: Any) -> Comparison:
    dense, pruned = map(mj.load, pair)
    return mj.compare(dense, pruned, Batches(random_tokens(97, 6, 16)), **more)


def test_compare_writes_json_and_page_and_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    np.save(tmp_path / "ids.npy", random_tokens(97, 200))
    output = tmp_path / "out"
    options = ["--window", 16, "--windows", 5, "--draft", 2, "--prompts", 1, "--new-tokens", 3, "--quiet"]
    arguments = ["compare", *pair, "--text", tmp_path / "ids.npy", *options]
    assert call(monkeypatch, [*arguments, "--output", output]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert sorted(path.name for path in output.iterdir()) == ["compare.html", "compare.json"]
    found = json.loads((output / "compare.json").read_text())
    assert (found["windows"], found["window"], found["tokens"]) == (5, 16, 75)
    assert found["drafting"] == {"gamma": 2, "prompts": 1, "new_tokens": 3}
    assert f"{found['others'][0]['perplexity']:.3f}" in shown
    assert "drafted tokens a round: 2; prompts: 1; new tokens behind each prompt: 3" in shown
    assert call(monkeypatch, [*arguments, "--output", output]) == 2
    assert "the output folder already exists" in capsys.readouterr().err


def test_python_and_json_give_the_same_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    np.save(tmp_path / "ids.npy", random_tokens(97, 6, 16).ravel())
    arguments = ["compare", *pair, "--text", tmp_path / "ids.npy", "--window", 16, "--draft", 0, "--json"]
    assert call(monkeypatch, arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["others"][0]["draft"] is found["drafting"] is None
    result = compared(pair, window=16, draft=0)
    assert result.drafts is None
    assert result.names == tuple(map(str, pair))
    means = result.measured.others[0].means
    assert {name: mean._asdict() for name, mean in means.items()} == {name: found["others"][0][name] for name in means}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "0"], "--windows must be at least 1, found 0"),
        (["--hosts", "nowhere"], "hosts 'nowhere' is not understood; expected auto or ADDRESS:PORT,COUNT,NUMBER"),
        (["--mesh", "data=99"], "99 devices"),
        (["--draft", "many"], "--draft must be a whole number, found 'many'"),
        (["--draft", "0", "--prompts", "2"], "--prompts does nothing with --draft 0"),
        (["--window", "1"], "a window of 1 tokens has nothing to predict"),
    ],
)
def test_numbers_out_of_range_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: Path,
    options: list[str],
    message: str,
) -> None:
    assert call(monkeypatch, ["compare", demo.FOLDER, demo.FOLDER, "--text", text, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_vocabularies_and_tokenizers_are_refused_before_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, pair: Any
) -> None:
    assert call(monkeypatch, ["compare", demo.FOLDER, pair[1], "--text", text]) == 2
    assert "pruned: the model has a vocabulary of 97 tokens, but" in capsys.readouterr().err
    folder = shutil.copytree(demo.FOLDER, tmp_path / "other")
    (folder / "model.safetensors").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġa"] = vocabulary["Ġa"], vocabulary["Ġthe"]
    edit_json(folder / "tokenizer.json", model=tokenizer["model"])
    assert call(monkeypatch, ["compare", demo.FOLDER, folder, "--text", text]) == 2
    error = capsys.readouterr().err
    assert "other: its tokenizer gives other token ids for the text than that of" in error
    assert error.count("\n") == 1


def test_prompts_that_learned_positions_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "opt", "opt", max_position_embeddings=20)
    with pytest.raises(InputError, match="are 22 tokens, but the model has 20 learned positions; use fewer"):
        compared((folder, folder), draft=4, new_tokens=10)
