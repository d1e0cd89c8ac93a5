"""The documents beside pruned weights: there, in agreement with the result, safe in any hands, needing no network."""

import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax import numpy as jnp

from convert import writer
from convert.reader import read_model
from minillm_jax import demo
from minillm_jax.budget.budget import Budget
from minillm_jax.devices import sharding
from minillm_jax.errors import InputError
from minillm_jax.pruning.refit import Refit
from minillm_jax.report import html, model_card, plots, summary, tables
from minillm_jax.run import Job, Result, run
from minillm_jax.scoring.score import QUANTILES, Scores, Scoring, summaries
from tests.helpers import hugging_face_folder, load_torch, random_tokens

HOSTILE = 'a"b: `c`<script src=http://x>|d\n---\n# e & f\u2028\udc80'


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed out of turn"

    def handle_data(self, data: str) -> None:
        self.words += data


def check_page(text: str, drawn: int) -> Page:
    """Well nested, nothing from elsewhere, no scripts, one picture each with its name and words."""
    page = Page(text)
    assert page.open == []
    assert page.tags["svg"] == page.tags["figure"] == page.tags["desc"] == drawn
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "foreignobject"}
    loads = {"src", "href", "xlink:href", "srcset", "data", "action"}
    assert all(value.startswith("#") for name, value in page.attributes if name in loads and value is not None)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert all(words not in text for words in ("@import", "url(h", "url(/"))
    assert len(page.ids) == len(set(page.ids))
    referred = {value[1:] for name, value in page.attributes if name in loads and value is not None}
    assert referred | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    return page


def job_of(tmp_path: Path, **changes: Any) -> Job:
    folder = hugging_face_folder(tmp_path / "model")
    (folder / "README.md").write_text("words of the base model")
    np.save(tmp_path / "tokens.npy", random_tokens(97, 400))
    tokens = str(tmp_path / "tokens.npy")
    options = {"samples": 4, "length": 32, "evaluation": tokens, "window": 32, "scoring": Scoring("wanda")}
    return Job(
        **{"model": str(folder), "calibration": tokens, "output": str(tmp_path / "out"), "budget": Budget(0.3)}
        | options
        | changes
    )


def finish(job: Job) -> tuple[Result, dict[str, Any]]:
    result = run(job, documents=tables.documents)
    return result, json.loads(Path(job.output, "report.json").read_text())


def same_figures(result: Result, written: dict[str, Any]) -> bool:
    """Whether the file says what `--json` prints, but for the seconds of saving, which were still to come."""
    found = json.loads(json.dumps(tables.result_json(result)))
    assert found["seconds"].pop("save") > 0
    return found == written


@pytest.fixture(scope="module")
def wanda(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any], Path]:
    job = job_of(tmp_path_factory.mktemp("wanda"), budget=Budget(0.3, of="blocks", allocation="measured"))
    return *finish(job), Path(job.output)


def test_the_folder_holds_the_figures_as_json_page_and_card(wanda: tuple[Result, dict[str, Any], Path]) -> None:
    result, written, folder = wanda
    assert same_figures(result, written)
    assert written["format"] == "per-layer"
    before, after = read_model(result.job.model).decoder, result.pruned.decoder
    from minillm_jax.model import costs

    assert written["costs"] == {
        "window": 128,
        "before": costs.all_costs(before, 128),
        "after": costs.all_costs(after, 128),
    }
    page = check_page((folder / "report.html").read_text(), drawn=5)
    for row in summary.rows(written):
        assert row.before in page.words
        assert row.change in page.words
    assert "http" not in (folder / "report.html").read_text()
    text = (folder / "README.md").read_text()
    assert "words of the base model" not in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"base_model": "model", "library_name": "transformers", "tags": ["pruned", "minillm-jax"]}
    for row in summary.rows(written):
        assert f"| {' | '.join(row)} |" in text
    assert str(folder.parent) not in text + page.words, "where it lay is nobody's business"
    assert folder.joinpath("modeling_pruned.py").exists()


def test_measured_losses_and_scores_before_pruning_are_told(wanda: tuple[Result, dict[str, Any], Path]) -> None:
    _, written, _ = wanda
    for kind, total in (("head", 4), ("channel", 40)):
        assert [pairs[0] for pairs in written["losses"][kind]] == [[total, 0.0]] * 3
        assert all(pairs[-1][0] < total and pairs[-1][1] != 0 for pairs in written["losses"][kind])
        assert all(len(five) == 5 and sorted(five) == five for five in written["scores"][kind])


def test_the_same_figures_give_the_same_bytes(wanda: tuple[Result, dict[str, Any], Path]) -> None:
    result, written, folder = wanda
    again = tables.documents(result)
    assert plots.draw(written) == plots.draw(written)
    body = re.compile(r"<footer>.*</footer>", re.DOTALL)  # the seconds
    assert body.sub("", again["report.html"]) == body.sub("", (folder / "report.html").read_text())


@pytest.mark.parametrize("form", ["stock", "padded", "flax"])
def test_every_format_has_its_documents_and_what_the_card_says_loads(tmp_path: Path, form: str) -> None:
    """The criterion obs has no scores to draw; without evaluation there is no perplexity to draw."""
    job = job_of(tmp_path, format=form, scoring=Scoring("obs"), evaluation=None)
    job = Job(**vars(job) | {"refit": Refit(), "structures": ("channels",), "heads": "group"})
    result, written = finish(job)
    assert same_figures(result, written)
    assert written["format"] == result.written.format == form
    page = check_page((tmp_path / "out" / "report.html").read_text(), drawn=2)
    assert "chooses the groups while it removes them" in page.words
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("minillm_jax.load(" in text) == (form == "flax")
    assert ("Padding stays zero" in text) == (form == "padded")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_whole_structures_have_their_rows_and_no_empty_pictures(tmp_path: Path) -> None:
    result, written = finish(job_of(tmp_path, structures=("hidden", "layers")))
    assert same_figures(result, written)
    page = check_page((tmp_path / "out" / "report.html").read_text(), drawn=2)
    assert "chooses the groups" not in page.words
    assert [tuple(row) for row in summary.rows(written)[-3:-1]] == [
        ("layers", "3", "2", ""),
        ("hidden size", "64", "45", ""),
    ]
    assert "whole hidden dimensions and layers are gone" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
def test_what_the_card_says_of_recovery_runs(
    wanda: tuple[Result, dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last snippet, with the model of the one before, on two batches."""
    torch = pytest.importorskip("torch")
    _, _, folder = wanda
    *_, snippet = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"model": load_torch(folder), "batches": [torch.from_numpy(random_tokens(97, 2, 8).astype(np.int64))] * 2}
    exec(snippet, names)
    adapted = {name for name, _ in names["tuned"].named_modules()}
    assert not any("lm_head.base" in name for name in adapted)
    assert sum(p.numel() for p in names["optimiser"].param_groups[0]["params"]) > 0
    load_torch(tmp_path / "recovered")


def test_without_matplotlib_there_is_a_page_that_says_so(
    wanda: tuple[Result, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = tables.documents(wanda[0])["report.html"]
    assert "pip install minillm-jax[report]" in check_page(text, drawn=0).words


def test_names_from_outside_are_only_text(wanda: tuple[Result, dict[str, Any], Path]) -> None:
    """In the page, in the YAML and in the Markdown; and UTF-8 can hold what is left of them."""
    _, written, _ = wanda
    hostile = json.loads(json.dumps(written)) | {"base_model": HOSTILE, "evaluation": HOSTILE}
    hostile["settings"]["calibration"]["source"] = HOSTILE
    hostile["settings"]["preset"] = HOSTILE
    text = html.page(hostile, plots.draw(hostile))
    page = check_page(text, drawn=5)
    assert page.tags == check_page(html.page(written, plots.draw(written)), drawn=5).tags
    assert "<script" in page.words
    made = model_card.card(hostile)
    for document in (text, made):
        document.encode()
    lines = made.splitlines()
    assert lines.count("---") == 2
    assert [line for line in lines if line.startswith("# ")] == [lines[lines.index("---", 1) + 2]]
    assert "<script" not in re.sub(r"(`+).*?(?<!`)\1(?!`)", "", made.split("---\n")[2])
    front = yaml.safe_load(made.split("---\n")[1])
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


def test_names_are_short_and_sizes_are_readable() -> None:
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
    assert summaries(Scores({"head": [values]}, {"criterion": "obs"}, {})) is None


def test_an_interruption_while_documents_are_made_or_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, evaluation=None)
    before = sorted(path.name for path in tmp_path.iterdir())

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, documents=interrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    monkeypatch.setattr(writer, "_write_extra", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job, documents=tables.documents)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_documents_never_take_the_place_of_a_model_s_file(tmp_path: Path) -> None:
    model = read_model(demo.FOLDER)
    with pytest.raises(InputError, match="cannot be written"):
        writer.write_model(model, tmp_path / "out", extra={"config.json": "{}"})
    assert list(tmp_path.iterdir()) == []


def test_only_the_writing_process_makes_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "is_writer", lambda: False)
    run(job_of(tmp_path, evaluation=None), documents=lambda _: pytest.fail("made by another process"))
    assert not (tmp_path / "out").exists()


def test_rounds_keep_the_scores_of_the_dense_model(tmp_path: Path) -> None:
    once = run(job_of(tmp_path, evaluation=None))
    twice = run(Job(**vars(once.job) | {"rounds": 2, "output": str(tmp_path / "rounds")}), documents=tables.documents)
    assert twice.pruned.record["scores"] == once.pruned.record["scores"]
    assert json.loads((tmp_path / "rounds" / "report.json").read_text())["settings"]["rounds"] == 2


def test_what_is_planned_is_what_is_written(tmp_path: Path) -> None:
    """Padded sizes included, and half precision."""
    model = read_model(hugging_face_folder(tmp_path / "model", "opt"))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.decoder)
    for number, decoder in enumerate((model.decoder, half)):
        one = type(model)(decoder, model.raw_config, model.folder, model.name)
        for form in ("stock", "per-layer", "padded", "flax"):
            assert writer.planned(one, form) == writer.write_model(one, tmp_path / f"{form}{number}", form)
