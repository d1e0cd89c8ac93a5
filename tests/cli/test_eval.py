"""The command `eval`: formats and fields of the text, and errors that come before the weights are read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from bench.local_tasks import write
from minillm_jax import demo
from tests.cli.command import call
from tests.helpers import edit_json

TEXTS = [demo.held_out_text()[:6000], demo.held_out_text()[6000:9000]]


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose weights would be missed as soon as they are read."""
    folder = shutil.copytree(demo.FOLDER, tmp_path_factory.mktemp("model") / "model")
    (folder / "model.safetensors").unlink()
    return folder


def test_rows_and_plain_text_give_one_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "t.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "t.JSONL").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    figures = set()
    for arguments in (["t.txt"], ["t.json"], ["t.JSONL", "--field", "body"]):
        name, *more = arguments
        assert call(monkeypatch, ["eval", demo.FOLDER, "--text", tmp_path / name, *more, "--json"]) == 0
        figures.add(json.loads(capsys.readouterr().out)["perplexity"])
    assert len(figures) == 1


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("nowhere.txt", None, [], "nowhere.txt: no such file"),
        ("a.jsonl", '{"content": "words"}', [], "expected a field 'text', found 'content'; name one with --field"),
        ("late.jsonl", '{"text": "words"}\n' * 99 + "{", [], "late.jsonl: line 100 is not JSON"),
        ("short.txt", "words", [], "tokens are less than one window of 128"),
        ("short.txt", "words", ["--window", "1"], "a window of 1 tokens has nothing to predict"),
    ],
)
def test_errors_of_the_text_come_before_the_weights(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    without_weights: Path,
    name: str,
    content: str | None,
    options: list[str],
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert call(monkeypatch, ["eval", without_weights, "--text", tmp_path / name, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_text_itself_is_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_weights: Path
) -> None:
    assert call(monkeypatch, ["eval", without_weights, "--text", TEXTS[0] * 8]) == 2
    error = capsys.readouterr().err
    assert "is no file: expected the name of one and not the text itself" in error
    assert len(error) < 250


def test_a_window_beyond_the_trained_positions_is_a_warning_beside_the_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(demo.FOLDER, tmp_path / "model")
    edit_json(folder / "config.json", max_position_embeddings=48)
    (tmp_path / "t.txt").write_text(TEXTS[0])
    assert call(monkeypatch, ["eval", folder, "--text", tmp_path / "t.txt", "--window", 64, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["window"] == 64
    assert shown.err.count("warning: --window 64: the model was trained for windows of at most 48 tokens") == 1


def test_a_working_directory_that_was_deleted_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gone, before = tmp_path / "gone", Path.cwd()
    gone.mkdir()
    os.chdir(gone)
    try:
        gone.rmdir()
        assert call(monkeypatch, ["eval", demo.FOLDER, "--text", "text.txt"]) == 2
        error = capsys.readouterr().err
        assert "the working directory was deleted" in error
        assert error.count("\n") == 1
    finally:
        os.chdir(before)


def test_tasks_and_text_of_two_models_stand_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(TEXTS[0])
    rows = [{"query": "The file is", "choices": ["read", "red"], "gold": gold} for gold in (0, 1, 0)]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    write(tmp_path / "tasks", {"tiny_one": tmp_path / "q.jsonl"})
    other = shutil.copytree(demo.FOLDER, tmp_path / "other")
    asked = ["--tasks", "tiny_one", "--include-path", tmp_path / "tasks", "--against", other]
    arguments = ["eval", demo.FOLDER, "--text", tmp_path / "t.txt", *asked]
    assert call(monkeypatch, [*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["model"] for one in found["models"]] == [str(demo.FOLDER), str(other)]
    first, second = ({key: one[key] for key in ("perplexity", "scores")} for one in found["models"])
    assert first == second
    assert {score["metric"] for score in first["scores"]} == {"acc", "acc_norm"}
    assert found["lm_eval"]
    assert call(monkeypatch, arguments) == 0
    table = capsys.readouterr().out
    assert "tiny_one, acc" in table
    assert f"{100 * first['scores'][0]['value']:.2f} ±" in table
    assert table.count(f"{first['perplexity']['perplexity']:.3f}") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing is to be measured; give a text with --text, tasks with --tasks, or both"),
        (["--text", "any.txt", "--limit", 3], "--limit 3 would do nothing without --tasks"),
        (["--tasks", ","], "no task is given"),
        (["--tasks", "tiny_one", "--include-path", "/nowhere"], "--include-path /nowhere: no such folder"),
    ],
)
def test_errors_of_tasks_come_before_the_weights(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    without_weights: Path,
    options: list[object],
    message: str,
) -> None:
    assert call(monkeypatch, ["eval", without_weights, *options]) == 2
    assert message in capsys.readouterr().err


def test_tasks_go_into_the_report_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(demo.training_text()[:30_000])
    options = [
        "--ratio",
        0.2,
        "--calibration",
        tmp_path / "t.txt",
        "--samples",
        4,
        "--seq-len",
        32,
        "--recipe",
        "wanda-sp",
    ]
    assert call(monkeypatch, ["prune", demo.FOLDER, *options, "--output", tmp_path / "out"]) == 0
    (tmp_path / "q.jsonl").write_text(json.dumps({"query": "The file is", "choices": ["read", "red"], "gold": 0}))
    write(tmp_path / "tasks", {"tiny_report": tmp_path / "q.jsonl"})
    asked = ["--tasks", "tiny_report", "--include-path", tmp_path / "tasks"]
    assert call(monkeypatch, ["eval", tmp_path / "out", *asked, "--report"]) == 2
    assert "--report needs --tasks, and the dense model as the first --against" in capsys.readouterr().err
    assert call(monkeypatch, ["eval", demo.FOLDER, *asked, "--against", tmp_path / "out", "--report"]) == 2
    assert "--report needs a folder that prune or recover has written" in capsys.readouterr().err
    assert call(monkeypatch, ["eval", tmp_path / "out", *asked, "--against", demo.FOLDER, "--report"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(one["task"], one["metric"]) for one in report["tasks"]} == {
        ("tiny_report", "acc"),
        ("tiny_report", "acc_norm"),
    }
    assert "tiny_report, acc_norm" in (tmp_path / "out" / "report.html").read_text()
