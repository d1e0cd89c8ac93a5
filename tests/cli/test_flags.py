"""Flags made from the settings: defaults in help, former names, options in vain, and the same result as from Python."""

import io
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import minillm_jax as mj
from minillm_jax import demo, errors
from minillm_jax.cli.commands import app
from minillm_jax.cli.flags import COMMON_ORDER, SYNONYMS
from minillm_jax.cli.show import Lines, show_warnings
from minillm_jax.options import Option, flag_of
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe, options, places, with_value
from minillm_jax.recipes.recovery import Recovery
from tests.cli.command import call

PRUNE: Any = typer.main.get_command(app)
PRUNE = PRUNE.commands["prune"]
PARAMETERS = {flag: parameter for parameter in PRUNE.params for flag in parameter.opts}


# ----------------------------------------------------------------------------------------------- flags and settings


@pytest.mark.parametrize(("section", "one", "described"), list(options()), ids=lambda value: getattr(value, "name", ""))
def test_every_setting_is_a_flag_whose_help_gives_its_default(section: str, one: Any, described: Option) -> None:
    parameter = PARAMETERS[flag_of(one)]
    assert parameter.default is None
    assert parameter.help.startswith(described.help)
    assert parameter.hidden == (not described.common)
    default = getattr(getattr(Recipe(), section), one.name)
    written = re.search(r"Default: (\S+) \(recipe ours\)\.$", parameter.help)
    if written is None:
        assert default is None or default is False
    else:
        read = with_value(Recipe(), section, one.name, written[1], "help")
        assert getattr(getattr(read, section), one.name) == default


def test_every_alias_is_a_flag_of_its_setting() -> None:
    for keyword, (section, key) in places().items():
        parameter = PARAMETERS["--" + keyword.replace("_", "-")]
        assert parameter is PARAMETERS[recipes.flags_of(section, key)]
    assert PARAMETERS["--preset"] is PARAMETERS["--recipe"]


def test_common_options_and_synonyms_name_flags_that_exist() -> None:
    kinds = (Recipe, Recovery)
    common = {one.name for kind in kinds for _, one, described in options(kind) if described.common}
    assert common < set(COMMON_ORDER)
    assert set(COMMON_ORDER) - common == {"output", "recipe", "assignments"}
    assert set(SYNONYMS.values()) <= PARAMETERS.keys()
    assert not {f"--{name}" for name in SYNONYMS} & PARAMETERS.keys()


@pytest.mark.parametrize("name", SYNONYMS)
def test_synonyms_are_suggested(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert call(monkeypatch, ["prune", "m", f"--{name}", "x"]) == 2
    assert f"no such option: --{name}; did you mean {SYNONYMS[name]}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("prune", "m", "--keep-ratio", "0.8"), "did you mean --ratio, which is the share to remove: 1 minus"),
        (("prune", "--model", "m"), "the model is named without an option, "),
        (("eval", "--model-name", "m", "--text", "t"), "the model is named without an option, "),
        (("prune", "m", "--Sparsity", "0.5"), "no such option: --Sparsity; did you mean --ratio?"),
        (("prune", "m", "--target_size", "1B"), "did you mean --target-params?"),
        (("demo", "--sparsity", "0.5"), "did you mean --ratio?"),
        (("demo", "--ratio", "20%"), "--ratio must be a number, found '20%'; did you mean 0.2?"),
        (("recipe", "show", "ours", "--change"), "did you mean --changes?"),
        (("prune", "m", "--" + 5000 * "x", "1"), "no such option: --xxx"),
    ],
)
def test_wrong_options_are_answered_by_meaning_in_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], words: str
) -> None:
    assert call(monkeypatch, command) == 2
    sentence = capsys.readouterr().err
    assert words in sentence
    assert len(sentence) < 500


def planned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert call(monkeypatch, ["plan", demo.FOLDER, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("former", "current"),
    [
        (("--preset", "wanda-sp"), ("--recipe", "wanda-sp")),
        (("--restoration", "none"), ("--refit", "none")),
        (("--inner", "0.25"), ("--refit-inputs", "0.25")),
        (("--recipe", "mini-llm", "--difference", "jvp"), ("--recipe", "mini-llm", "--estimator", "jvp")),
        (("--criterion", "wanda", "--allocation", "global"), ("--criterion", "wanda", "--budget", "global")),
        (("--set", "refit.method=none"), ("--refit", "none")),
        (("--set", "budget.layers=1:3", "--set", "data.samples=8"), ("--layers", "1:3", "--samples", "8")),
    ],
)
def test_former_flags_and_assignments_plan_the_same_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    former: tuple[str, ...],
    current: tuple[str, ...],
) -> None:
    ratio = ("--ratio", "0.2", "--devices", "h100")
    assert planned(monkeypatch, capsys, *ratio, *former) == planned(monkeypatch, capsys, *ratio, *current)


def test_a_recipe_file_stands_in_the_place_of_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What `recipe show` prints is a recipe again; the options of the command line come before it."""
    assert call(monkeypatch, ["recipe", "show", "llm-pruner"]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert replace(recipes.load(path), name="llm-pruner") == recipes.load("llm-pruner")
    by_file = planned(monkeypatch, capsys, "--recipe", path, "--ratio", "0.2", "--layers", "1:-1")
    by_name = planned(monkeypatch, capsys, "--recipe", "llm-pruner", "--ratio", "0.2", "--layers", "1:-1")
    assert by_file.pop("recipe") == str(path)
    assert by_name.pop("recipe") == "llm-pruner"
    assert by_file == by_name


# ------------------------------------------------------------------------------------------------- options in vain


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ("--criterion wanda --restoration bias --ridge 5", "--ridge"),
        ("--criterion wanda --structures hidden --alpha 0.3", "--alpha"),
        ("--structures channels --round-heads-to 4", "--round-heads-to"),
        ("--format flax --max-shard-size 1MB", "--max-shard-size"),
        ("--preset wanda-sp --across max", "--across"),
        ("--criterion magnitude --refit none --seed 3", "--seed"),
        ("--preset mini-llm --structures hidden --checkpoint saved", "--checkpoint"),
        ("--criterion gate --difference exact --per-sequence", "--per-sequence"),
        ("--refit none --set refit.inputs=0.5", "--set refit.inputs"),
    ],
)
def test_an_option_in_vain_is_one_sentence_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: str, flag: str
) -> None:
    job = ("--ratio", 0.2, "--calibration", "nowhere.txt", "--output", tmp_path / "out")
    assert call(monkeypatch, ["prune", "./nowhere", *job, *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"minillm-jax: {flag} would do nothing in this run (")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ the same result


@pytest.mark.parametrize("recipe", ["ours", "wanda-sp"])
def test_python_and_the_command_line_write_equal_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe: str
) -> None:
    """By default both take the recipe `ours`; the weights are equal byte for byte."""
    text = tmp_path / "text.txt"
    text.write_text(demo.training_text()[:20_000])
    named = () if recipe == "ours" else ("--recipe", recipe)
    job = ("--calibration", text, "--ratio", 0.2, "--samples", 3, "--seq-len", 32, "--output", tmp_path / "command")
    assert call(monkeypatch, ["prune", demo.FOLDER, *job, *named, "--quiet"]) == 0

    model = mj.load(demo.FOLDER)
    keywords = {} if recipe == "ours" else {"recipe": recipe}
    mj.save(mj.prune(model, text, ratio=0.2, samples=3, seq_len=32, **keywords), tmp_path / "python")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    records = [json.loads((tmp_path / folder / "pruning.json").read_text()) for folder in ("python", "command")]
    names = [record.pop("base_model") for record in records]
    assert names == [str(demo.FOLDER)] * 2
    assert records[0] == records[1]


# ---------------------------------------------------------------------------------------------- lines of progress


def test_lines_are_one_for_each_layer_and_otherwise_one_for_a_stage() -> None:
    stream = io.StringIO()
    lines = Lines(stream, every=3600.0)
    for done in range(1, 9):
        lines("refit", done, 8)  # two sublayers a layer
    for done in range(1, 101):
        lines("directions", done, 100)
    lines("perplexity", 1, 2)
    printed = stream.getvalue().splitlines()
    assert [line.split()[:3] for line in printed[:4]] == [["refit", "layer", f"{layer}/4"] for layer in range(1, 5)]
    assert [line.split()[:2] for line in printed[4:]] == [["directions", "100/100"]]
    for line in printed:
        assert re.fullmatch(r"\S+ .* +\d+\.\d s  peak [\d,]+ MB(, device [\d,]+ MB)?", line)


def test_lines_come_at_intervals_within_a_stage() -> None:
    stream = io.StringIO()
    lines = Lines(stream, every=0.0)
    for done in range(1, 4):
        lines("directions", done, 5)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/5", "2/5", "3/5"]


def test_warnings_are_sentences_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        show_warnings()
        errors.warn("4 heads are kept;\n  none is removed")
        warnings.warn("advice of another library", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "minillm-jax: warning: 4 heads are kept; none is removed\n"
