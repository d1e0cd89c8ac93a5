"""GGUF through the commands: a GGUF file is pruned to a GGUF file, converted, planned and evaluated."""

import json
from pathlib import Path

import pytest

from convert import gguf_file
from convert.__main__ import main as convert_main
from minillm_jax import demo
from minillm_jax.data.tokenizer import load_tokenizer
from tests.cli.command import call
from tests.helpers import load_torch


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(demo.training_text()[:30_000])
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a GGUF file."""
    folder = tmp_path_factory.mktemp("gguf") / "demo"
    convert_main(["to-gguf", str(demo.FOLDER), str(folder)])
    return folder / "model.gguf"


def test_a_gguf_is_pruned_to_a_gguf(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, text: Path
) -> None:
    common = ["--ratio", 0.2, "--calibration", text, "--samples", 2, "--seq-len", 32, "--recipe", "wanda-sp"]
    options = [*common, "--format", "gguf", "--gguf-type", "f16"]
    assert call(monkeypatch, ["plan", model, *options, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert call(monkeypatch, ["prune", model, *options, "--output", tmp_path / "out"]) == 0
    assert "model.gguf, which llama.cpp and minillm_jax read" in " ".join(capsys.readouterr().out.split())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "pruning.json", "recipe.toml", "report.json", "report.html", "README.md"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "llama-cli --model path/to/this/folder/model.gguf" in card
    assert planned["format"] == "gguf"
    assert 0 <= (tmp_path / "out" / "model.gguf").stat().st_size - planned["files"] < 100_000  # metadata and padding
    first, second = (gguf_file.open_gguf(path) for path in (model, tmp_path / "out" / "model.gguf"))
    assert (second.arch, second.value("attention.head_count_kv"), second.value("feed_forward_length")) == (
        "llama",
        4,
        205,
    )
    tokenizers = [{k: v for k, v in one.metadata.items() if "tokenizer" in k} for one in (first, second)]
    assert tokenizers[0] == tokenizers[1]

    assert call(monkeypatch, ["eval", tmp_path / "out", "--text", text, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert call(monkeypatch, ["convert", "to-torch", tmp_path / "out", tmp_path / "torch"]) == 0
    load_torch(tmp_path / "torch")
    assert (
        load_tokenizer(tmp_path / "torch")("Once upon")["input_ids"]
        == load_tokenizer(demo.FOLDER)("Once upon")["input_ids"]
    )
    capsys.readouterr()
    assert call(monkeypatch, ["eval", tmp_path / "torch", "--text", text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == measured["perplexity"]

    unequal = [*common, "--format", "gguf", "--budget", "global", "--output", tmp_path / "unequal"]
    assert call(monkeypatch, ["prune", model, *unequal]) == 0
    assert gguf_file.open_gguf(tmp_path / "unequal" / "model.gguf").arch == "deci"


def test_bad_requests_are_one_sentence_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, text: Path
) -> None:
    def refusal(*options: object) -> str:
        common = ["--ratio", 0.2, "--calibration", text]
        assert call(monkeypatch, ["prune", model, *common, *options]) == 2
        return capsys.readouterr().err

    folder = ["--output", tmp_path / "out"]
    assert "--gguf-type would do nothing in this run" in refusal(*folder, "--gguf-type", "f16")
    assert "expected one of f32, f16, bf16, q8_0" in refusal(*folder, "--format", "gguf", "--gguf-type", "q4_k")
    assert "in which the weights are model.gguf; name it without .gguf" in refusal(
        "--output", tmp_path / "out.gguf", "--format", "gguf"
    )
    assert "--max-shard-size would do nothing" in refusal(*folder, "--format", "gguf", "--max-shard-size", "1GB")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert call(monkeypatch, ["plan", tmp_path / "a.gguf", "--ratio", 0.2]) == 2
    assert capsys.readouterr().err.strip().endswith("a.gguf: the file ends too early; is the download complete?")
    assert not (tmp_path / "out").exists()
