"""The documents beside pruned weights exist, agree with the result, escape hostile names and load nothing else."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax import numpy as jnp
from rich.console import Console

from convert import writer
from convert.reader import read_model
from minillm_jax import demo
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.recipes.recipe import Recipe, options
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.report import model_card, plots, summary, tables
from minillm_jax.report.page import page as page_of
from minillm_jax.report.runs import read_runs
from minillm_jax.run import Job, Result, run
from minillm_jax.scoring.score import QUANTILES, ChosenWhilePruning, Scores, summaries
from minillm_jax.settings import Budget, Data, Evaluation, Output, Refit, Scoring
from tests.helpers import hugging_face_folder, random_tokens
from tests.report.pages import HOSTILE, Page, check_page


def job_of(tmp_path: Path, evaluate: bool = True, **sections: Any) -> Job:
    """A job on a small random LLaMA, with the criterion wanda and without a refit unless a section says otherwise."""
    folder = hugging_face_folder(tmp_path / "model")
    (folder / "README.md").write_text("card of the base model")
    np.save(tmp_path / "tokens.npy", random_tokens(97, 400))
    tokens = str(tmp_path / "tokens.npy")
    defaults = {
        "data": Data(tokens, samples=4, seq_len=32),
        "budget": Budget(0.3),
        "scoring": Scoring("wanda"),
        "refit": Refit("none"),
        "evaluation": Evaluation(tokens if evaluate else None, window=32),
    }
    return Job(str(folder), str(tmp_path / "out"), Recipe(**defaults | sections))


def finish(job: Job) -> tuple[Result, dict[str, Any]]:
    result = run(job, documents=tables.documents)
    return result, json.loads(Path(job.output, "report.json").read_text())


def same_summary(result: Result, written: dict[str, Any]) -> bool:
    """Whether report.json equals the output of `--json`."""
    assert written["seconds"]["save"] > 0
    return json.loads(json.dumps(tables.result_json(result))) == written


@pytest.fixture(scope="module")
def wanda(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any], Path]:
    job = job_of(tmp_path_factory.mktemp("wanda"), budget=Budget(0.3, ratio_of="blocks", allocation="measured"))
    return *finish(job), Path(job.output)


def test_few_calibration_tokens_are_named_in_every_document(tmp_path: Path) -> None:
    """Three windows of 20 tokens for 40 channels, which the refit solves a system for; a mixture is named by parts."""
    mixture = f"{tmp_path / 'tokens.npy'}:2,{tmp_path / './tokens.npy'}:1"
    data = Data(mixture, samples=3, seq_len=20)
    with pytest.warns(InputWarning, match="1.50 calibration tokens for each MLP channel are few"):
        result, written = finish(job_of(tmp_path, evaluate=False, data=data, refit=Refit()))
    assert written["tokens_per_channel"] == 1.5
    words = "1.50 calibration tokens for each MLP channel are few: below 2 the ridge decides the refit; use --samples"
    assert written["few_tokens"].startswith(words)
    page = Page(Path(result.job.output, "report.html").read_text())
    console = Console(width=300)
    with console.capture() as capture:
        console.print(tables.result_table(result))
    printed = capture.get()
    for text in (page.text, Path(result.job.output, "README.md").read_text(), printed):
        assert words in " ".join(text.replace("\xa0", " ").split())
        squeezed = "".join(text.split())  # the table wraps a long path
        assert str(tmp_path) not in squeezed.replace(result.job.output, "")
    assert "3 windows of 20 tokens of tokens.npy (2) and tokens.npy (1)" in page.text


def test_the_folder_holds_the_summary_as_json_page_and_card(wanda: tuple[Result, dict[str, Any], Path]) -> None:
    result, written, folder = wanda
    assert same_summary(result, written)
    assert written["format"] == "per-layer"
    before, after = read_model(result.job.model).decoder, result.pruned.decoder
    from minillm_jax.model import costs

    assert written["costs"] == {
        "window": 32,
        "before": costs.all_costs(before, 32),
        "after": costs.all_costs(after, 32),
    }
    page = check_page((folder / "report.html").read_text(), plots=5)
    share = 1 - written["parameters_after"] / written["parameters_before"]
    assert f"model, {100 * share:.1f} % of parameters removed" in page.text.replace("\xa0", " ")
    for row in summary.rows(written):
        assert row.before in page.text.replace("\xa0", " ")
        assert row.change in page.text
    assert "http" not in (folder / "report.html").read_text()
    text = (folder / "README.md").read_text()
    assert "card of the base model" not in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"base_model": "model", "library_name": "transformers", "tags": ["pruned", "minillm-jax"]}
    for row in summary.rows(written):
        assert f"| {' | '.join(row)} |" in text
    assert str(folder.parent) not in text + page.text, "documents must not show local folders"
    assert folder.joinpath("modeling_pruned.py").exists()
    assert 'from_pretrained("path/to/this/folder", trust_remote_code=True)\ninputs' in text
    assert "vllm serve path/to/the/base/model --trust-remote-code --speculative-config" in text


def test_the_summary_holds_measured_losses_and_scores_before_pruning(
    wanda: tuple[Result, dict[str, Any], Path],
) -> None:
    _, written, _ = wanda
    for kind, total in (("head", 4), ("channel", 40)):
        assert [pairs[0] for pairs in written["losses"][kind]] == [[total, 0.0]] * 3
        assert all(pairs[-1][0] < total and pairs[-1][1] != 0 for pairs in written["losses"][kind])
        assert all(len(five) == 5 and sorted(five) == five for five in written["scores"][kind])


def test_the_summary_holds_the_error_of_every_layer_and_of_the_perplexities(
    wanda: tuple[Result, dict[str, Any], Path],
) -> None:
    result, written, folder = wanda
    errors = written["layer_errors"]
    assert (errors["windows"], errors["window"]) == (8, 32)
    assert result.errors is not None
    assert errors["stream"] == result.errors.stream
    assert all(0 <= error < 2 for what in ("stream", "attention", "mlp") for error in errors[what])
    assert errors["stream"][-1] > 0
    assert all(written[f"perplexity_{when}"]["stderr"] > 0 for when in ("before", "after"))
    text = (folder / "report.html").read_text()
    assert "Error of the residual stream" in text
    assert "standard error over the windows" in text
    (run_of,) = read_runs([str(folder)])
    assert (run_of.parameters, run_of.dense_parameters) == (written["parameters_after"], written["parameters_before"])
    assert run_of.perplexity == written["perplexity_after"]["perplexity"]
    assert run_of.windows == written["perplexity_before"]["fingerprint"]


def test_the_same_summary_gives_the_same_bytes(wanda: tuple[Result, dict[str, Any], Path]) -> None:
    result, written, folder = wanda
    again = tables.documents(result)
    assert plots.draw(written) == plots.draw(written)
    body = re.compile(r"<footer>.*</footer>", re.DOTALL)  # holds the seconds
    assert body.sub("", again["report.html"]) == body.sub("", (folder / "report.html").read_text())


@pytest.mark.parametrize("form", ["stock", "padded", "flax"])
def test_every_format_has_its_documents_and_its_loading_snippet(tmp_path: Path, form: str) -> None:
    """The criterion obs has no plot of scores, and without an evaluation the layers read the calibration text."""
    budget = Budget(0.3, structures=("channels",), allocation="uniform")
    job = job_of(tmp_path, False, budget=budget, scoring=Scoring("obs"), refit=Refit(), output=Output(form))
    result, written = finish(job)
    assert same_summary(result, written)
    assert written["format"] == result.written.format == form
    page = check_page((tmp_path / "out" / "report.html").read_text(), plots=3)
    assert "chooses the groups while it removes them" in page.text
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("minillm_jax.load(" in text) == (form == "flax")
    assert ("zeros of the padding" in text) == (form == "padded")
    assert ("assistant_model=draft" in text) == ("num_speculative_tokens" in text) == (form == "stock")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_whole_structures_have_their_rows_and_no_empty_plots(tmp_path: Path) -> None:
    result, written = finish(job_of(tmp_path, budget=Budget(0.3, structures=("hidden", "layers"))))
    assert same_summary(result, written)
    page = check_page((tmp_path / "out" / "report.html").read_text(), plots=2)
    assert "chooses the groups" not in page.text
    (removed,) = {0, 1, 2} - set((result.pruned.record or {})["whole"]["layer"]["kept"])
    assert f"Removed layers: {removed}." in page.text
    assert [error is None for error in written["layer_errors"]["mlp"]].index(True) == removed
    assert [tuple(row) for row in summary.rows(written)[-3:-1]] == [
        ("layers", "3", "2", ""),
        ("hidden size", "64", "45", ""),
    ]
    assert "whole hidden dimensions and layers were removed" in (tmp_path / "out" / "README.md").read_text()


def test_the_recovery_command_of_the_card_exists(wanda: tuple[Result, dict[str, Any], Path]) -> None:
    """Its options are those of the command."""
    (line,) = re.findall(r"minillm-jax recover .*", (wanda[2] / "README.md").read_text())
    given = [word.removeprefix("--") for word in line.split() if word.startswith("--")]
    assert set(given) - {"output"} <= {described.flag or one.name for _, one, described in options(Recovery)}
    assert "output" in given


def test_without_matplotlib_the_page_names_the_extra(
    wanda: tuple[Result, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = tables.documents(wanda[0])["report.html"]
    assert "pip install minillm-jax[report]" in check_page(text, plots=0).text


def test_hostile_names_are_only_text(wanda: tuple[Result, dict[str, Any], Path]) -> None:
    """The page, the YAML and the Markdown escape hostile names, and UTF-8 can encode the result."""
    _, written, _ = wanda
    hostile = json.loads(json.dumps(written)) | {"base_model": HOSTILE, "evaluation": HOSTILE}
    hostile["settings"]["calibration"]["source"] = HOSTILE
    hostile["settings"]["recipe"] = HOSTILE
    hostile["settings"]["scoring"]["criterion"] = HOSTILE
    text = page_of(hostile, plots.draw(hostile))
    page = check_page(text, plots=5)
    assert page.tags == check_page(page_of(written, plots.draw(written)), plots=5).tags
    assert "<script" in page.text
    card = model_card.card(hostile)
    for document in (text, card):
        document.encode()
    lines = card.splitlines()
    assert lines.count("---") == 2
    assert [line for line in lines if line.startswith("# ")] == [lines[lines.index("---", 1) + 2]]
    assert "<script" not in re.sub(r"(`+).*?(?<!`)\1(?!`)", "", card.split("---\n")[2])
    front = yaml.safe_load(card.split("---\n")[1])
    assert front.keys() == {"base_model", "library_name", "tags"}
    assert front["base_model"] in summary.printable(HOSTILE)


@pytest.mark.parametrize("text", ["", "plain", "`", "a`b``c", "``", " ", "x\ny"])
def test_code_spans_hold_any_text(text: str) -> None:
    span = model_card.code(text)
    fence = re.match("`+", span)
    assert fence is not None
    inner = span[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inner)
    assert "\n" not in span


def test_names_are_shortened_and_sizes_have_prefixes() -> None:
    assert summary.short_name("owner/name") == "owner/name"
    assert summary.short_name("owner/name/part:train") == "owner/name/part:train"
    assert summary.short_name("../model") == "model"
    assert summary.short_name("owner/name:train") == "owner/name:train"
    assert summary.short_name("/home/somebody/model") == "model"
    assert summary.short_name("../x/y.txt") == "y.txt"
    assert [summary.short(n) for n in (12, 999, 1500, 864_026_050_560)] == ["12", "999", "1.5 k", "864.0 G"]
    assert [summary.size(n) for n in (12, 12_550_000_000)] == ["12 B", "12.6 GB"]


def test_summaries_are_the_quartiles_of_every_layer() -> None:
    values = np.arange(9.0)[::-1]
    scores = Scores({"head": [values, 2 * values]}, {"criterion": "wanda"}, {})
    assert summaries(scores) == {"head": [[0, 2, 4, 6, 8], [0, 4, 8, 12, 16]]}
    assert len(QUANTILES) == 5
    assert summaries(ChosenWhilePruning(("head",), {"criterion": "obs"}, {})) is None


def test_an_interruption_while_documents_are_made_or_written_leaves_the_model_and_whole_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    job = job_of(tmp_path, evaluate=False)
    with pytest.raises(KeyboardInterrupt):
        run(job, documents=interrupted)
    weights = sorted(path.name for path in Path(job.output).iterdir())
    assert not [name for name in weights if "report" in name]
    read_model(job.output)
    open_path = Path.open

    def interrupted_at_the_page(path: Path, *arguments: Any, **options: Any) -> Any:
        return interrupted() if "report.html" in path.name else open_path(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", interrupted_at_the_page)
    again = replace(job, output=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        run(again, documents=tables.documents)
    written = sorted(path.name for path in Path(again.output).iterdir())
    assert set(written) - set(weights) <= {"README.md", "report.json"}
    read_model(again.output)


def test_documents_never_replace_a_file_of_the_model(tmp_path: Path) -> None:
    model = read_model(demo.FOLDER)
    with pytest.raises(InputError, match="cannot be written"):
        writer.write_model(model, tmp_path / "out", extra={"config.json": "{}"})
    assert list(tmp_path.iterdir()) == []


def test_only_the_writing_process_makes_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(job_of(tmp_path, evaluate=False), documents=lambda _: pytest.fail("made by another process"))
    assert not (tmp_path / "out").exists()


def test_rounds_keep_the_scores_of_the_dense_model(tmp_path: Path) -> None:
    once = run(job_of(tmp_path, evaluate=False))
    recipe = replace(once.job.recipe, budget=replace(once.job.recipe.budget, rounds=2))
    job = replace(once.job, recipe=recipe, output=str(tmp_path / "rounds"))
    twice = run(job, documents=tables.documents)
    assert twice.pruned.record["scores"] == once.pruned.record["scores"]
    assert json.loads((tmp_path / "rounds" / "report.json").read_text())["settings"]["rounds"] == 2


def test_the_planned_result_is_the_written_result(tmp_path: Path) -> None:
    """`planned` and `write_model` agree, also for padded sizes and half precision."""
    model = read_model(hugging_face_folder(tmp_path / "model", "opt"))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.decoder)
    for number, decoder in enumerate((model.decoder, half)):
        variant = type(model)(decoder, model.raw_config, model.folder, model.name)
        for form in ("stock", "per-layer", "padded", "flax"):
            assert writer.planned(variant, form) == writer.write_model(variant, tmp_path / f"{form}{number}", form)
