"""recover on the command line: what it writes, what continues it after a kill, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from transformers import AutoModelForCausalLM

import minillm_jax as mj
from convert import modeling_pruned
from minillm_jax import demo
from tests.cli.command import call
from tests.helpers import hugging_face_folder, load_torch, logits_of, torch_logits

PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(demo.training_text()[:40_000])
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The demo model with unequal layers."""
    folder = tmp_path_factory.mktemp("pruned") / "demo"
    model = mj.prune(mj.load(demo.FOLDER), text, 0.4, "flap", samples=8, seq_len=32)
    mj.save(model, folder)
    return folder


COMMON = ["--seq-len", 32, "--steps", 4, "--batch", 4, "--micro-batch", 2, "--validate-every", 2, "--quiet"]


@PEFT
def test_recover_writes_an_adapter_and_the_merged_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, pruned: Path
) -> None:
    output = tmp_path / "out"
    texts = ["--data", text, "--evaluate", text, "--watch", text, "--teacher", demo.FOLDER]
    assert call(monkeypatch, ["recover", pruned, *texts, "--output", output, *COMMON, "--learning-rate", "1e-2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the adapter of PEFT is in adapter/" in shown
    names = {path.name for path in output.iterdir()}
    assert {"adapter", "config.json", "pruning.json", "recipe.toml", "report.json", "report.html", "README.md"} <= names
    assert not (tmp_path / "out.checkpoint").exists()
    report = json.loads((output / "report.json").read_text())
    assert report["perplexity_after"]["perplexity"] < report["perplexity_before"]["perplexity"]
    assert report["perplexity_teacher"]["perplexity"] < report["perplexity_before"]["perplexity"]
    assert [point["update"] for point in report["points"]] == [0, 2, 4]
    assert report["points"][0]["watched"] > report["points"][-1]["watched"]
    assert report["tokens"] == 4 * 4 * 31
    assert "PeftModel" in (output / "README.md").read_text()
    assert "<svg" in (output / "report.html").read_text()

    modeling_pruned.register()
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    ours = logits_of(mj.load(output).decoder, tokens)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), output / "adapter")
    assert np.abs(torch_logits(adapted, tokens) - ours).max() <= 1e-4
    assert np.abs(torch_logits(load_torch(output), tokens) - ours).max() <= 1e-4


def test_the_written_recipe_repeats_a_run_and_the_adapter_can_be_trained_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, pruned: Path
) -> None:
    output, texts = tmp_path / "out", ["--data", text]
    assert call(monkeypatch, ["recover", pruned, *texts, "--output", output, *COMMON]) == 0
    again = ["recover", pruned, "--recipe", output / "recipe.toml", "--output", tmp_path / "again", "--quiet"]
    assert call(monkeypatch, again) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    more = ["--adapter", output / "adapter", "--output", tmp_path / "more", *COMMON, "--json"]
    assert call(monkeypatch, ["recover", pruned, *texts, *more]) == 0
    report, continued = (json.loads((folder / "report.json").read_text()) for folder in (output, tmp_path / "more"))
    assert continued["points"][0]["validation"] == pytest.approx(report["points"][-1]["validation"], rel=1e-5)


def test_python_recovers_as_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path, pruned: Path
) -> None:
    assert call(monkeypatch, ["recover", pruned, "--data", text, "--output", tmp_path / "out", *COMMON]) == 0
    options: dict[str, Any] = {"seq_len": 32, "steps": 4, "batch": 4, "micro_batch": 2, "validate_every": 2}
    better = mj.recover(mj.load(pruned), text, **options)
    mj.save(better, tmp_path / "python")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "python")]
    assert weights[0] == weights[1]


def test_pruning_and_recovery_in_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    """The recovery trains on the calibration text, with the dense model as teacher; a taken output is refused first."""
    (tmp_path / "mine.toml").write_text(
        "[data]\nseq_len = 32\n[training]\nsteps = 2\nbatch = 4\nlearning_rate = 1e-3\nwarmup = 0\n"
    )
    made = ["--calibration", text, "--evaluate", text, "--recipe", "wanda-sp", "--ratio", 0.3, "--samples", 4]
    both = ["prune", demo.FOLDER, *made, "--seq-len", 32, "--recover", tmp_path / "mine.toml", "--output"]
    assert call(monkeypatch, [*both, tmp_path / "out"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in ("dense", "pruned", "recovered"))
    pruned, recovered = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "out-recovered"))
    assert recovered["perplexity_before"] == pruned["perplexity_after"]
    assert recovered["perplexity_after"]["perplexity"] < pruned["perplexity_after"]["perplexity"]
    assert recovered["perplexity_teacher"] == pruned["perplexity_before"]
    (tmp_path / "again-recovered").mkdir()
    assert call(monkeypatch, [*both, tmp_path / "again"]) == 2
    assert "again-recovered: the output folder already exists" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path: Path, text: Path, pruned: Path) -> None:
    """SIGKILL behind the first saved state; the same command then gives the weights of a run that was not killed."""
    rows = [{"prompt": f"Count to {number}.", "response": "One, two, three."} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = f"{text}:0.7,{tmp_path / 'rows.jsonl'}:0.3"
    options = ["--data", mixture, "--seq-len", 32, "--steps", 12, "--batch", 4, "--micro-batch", 2, "--quiet"]

    def command(name: str) -> list[str]:
        made = ["recover", pruned, "--output", tmp_path / name, *options]
        return [sys.executable, "-m", "minillm_jax", *map(str, made)]

    state = tmp_path / "killed.checkpoint"
    process = subprocess.Popen(command("killed"))
    while process.poll() is None and not any(path.name.isdigit() for path in state.glob("*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        subprocess.run(command(name), check=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]
    assert not state.exists()


# --------------------------------------------------------------------------------------------------------- bad input


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[Any]
) -> str:
    """The sentence with which a command is refused before anything is written."""
    assert call(monkeypatch, ["recover", *arguments, "--output", tmp_path / "out"]) == 2
    error = capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert error.splitlines()[-1].startswith("minillm-jax: ")
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no text to train on is given; name a file or a Hub data set with --data"),
        (["--data", "missing.txt"], "missing.txt: no such file"),
        (["--data", "TEXT", "--loss", "kd"], "--loss kd measures the divergence from a teacher"),
        (["--data", "TEXT", "--temperature", "2"], "--temperature would do nothing in this run (no --teacher)"),
        (["--data", "TEXT", "--method", "full", "--rank", "4"], "--rank would do nothing in this run"),
        (["--data", "TEXT", "--kd-weight", "a:b"], "is not understood; expected FIRST:LAST, 0.9:0.5 for example"),
        (["--data", "TEXT", "--micro-batch", "3"], "--micro-batch must divide --batch, found 3 and 16"),
        (["--data", "TEXT", "--method", "sgd"], "unknown --method 'sgd'; expected one of lora, full, forward"),
        (["--data", "TEXT", "--recipe", "ours"], "unknown recipe 'ours'; expected one of distil, forward, llm-pruner"),
        (["--data", "TEXT", "--held-out", "100000"], "leave fewer than 2 for training"),
    ],
)
def test_bad_options_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: Path,
    pruned: Path,
    options: list[str],
    message: str,
) -> None:
    given = [str(text) if option == "TEXT" else option for option in options]
    assert message in refused(monkeypatch, capsys, tmp_path, [pruned, *given])


def test_another_teacher_an_empty_text_and_another_adapter_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, pruned: Path
) -> None:
    other = hugging_face_folder(tmp_path / "other")
    error = refused(monkeypatch, capsys, tmp_path, [pruned, "--data", text, "--teacher", other])
    assert "the teacher has a vocabulary of 97 tokens, the pruned model" in error
    (tmp_path / "empty.txt").write_text("\n")
    error = refused(monkeypatch, capsys, tmp_path, [pruned, "--data", tmp_path / "empty.txt"])
    assert "there is no text in it" in error
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}\n')
    error = refused(monkeypatch, capsys, tmp_path, [pruned, "--data", tmp_path / "rows.jsonl"])
    assert "expected a field 'text', found 'question'" in error
    made = ["--data", text, *COMMON]
    assert call(monkeypatch, ["recover", demo.FOLDER, *made, "--output", tmp_path / "dense"]) == 0
    capsys.readouterr()
    error = refused(monkeypatch, capsys, tmp_path, [pruned, *made, "--adapter", tmp_path / "dense" / "adapter"])
    assert "lora_" in error


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_state_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, pruned: Path
) -> None:
    options = ["--data", text, *COMMON, "--learning-rate", "1e30", "--warmup", 0, "--clip", 0, "--last"]
    assert call(monkeypatch, ["recover", pruned, *options, "--output", tmp_path / "out"]) == 2
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert "--learning-rate" in error
    assert "is saved in" in error
    assert mj.load(tmp_path / "out").decoder is not None


def test_another_tokenizer_of_the_teacher_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path, pruned: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(demo.FOLDER, teacher)
    table = json.loads((teacher / "tokenizer.json").read_text())
    words = table["model"]["vocab"]
    first, second = list(words)[300:302]
    table["model"]["vocab"] |= {first: words[second], second: words[first]}
    (teacher / "tokenizer.json").write_text(json.dumps(table))
    error = refused(monkeypatch, capsys, tmp_path, [pruned, "--data", text, "--teacher", teacher])
    assert "the teacher has another tokenizer than the pruned model" in error
