"""Several runs on one page: what is compared, in which order, and which folders are refused."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from minillm_jax.errors import InputError
from minillm_jax.report import several
from minillm_jax.report.runs import Group, groups_of, read_runs
from tests.cli.command import call
from tests.report.pages import check_page, measured, pruned_report, recovered_report


def write(folder: Path, report: object) -> str:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return str(folder)


def grouped(tmp_path: Path, *reports: dict[str, Any]) -> list[Group]:
    folders = [write(tmp_path / f"run{number}", report) for number, report in enumerate(reports)]
    return groups_of(read_runs(folders))


def names(group: Group) -> list[str]:
    return [run.name for run in group.runs]


def test_a_recovery_stands_beside_its_pruning_and_the_dense_model(tmp_path: Path) -> None:
    (group,) = grouped(tmp_path, pruned_report(), recovered_report())
    assert [run.kind for run in group.runs] == ["dense", "pruned", "recovered"]
    assert [run.ratio for run in group.runs] == [1.0, 1.1, 1.05]
    assert [run.parameters for run in group.runs] == [1000, 800, 800]
    assert [run.memory for run in group.runs] == [4000, 3000, 3000]
    assert [run.seconds for run in group.runs] == [None, 3.5, 10.0]
    text = several.page([group])
    page = check_page(text, plots=2)
    assert "base on held-out.txt, windows of 128 tokens" in page.text
    assert "someone" not in text
    assert "21.000 ±\xa00.500" in page.text


def test_the_perplexity_of_the_dense_model_is_taken_from_another_run_of_the_group(tmp_path: Path) -> None:
    (group,) = grouped(tmp_path, recovered_report(perplexity_teacher=None), pruned_report())
    assert [run.ratio for run in group.runs] == [1.0, 1.05, 1.1]


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": "other/base"},
        {"perplexity_after": measured(22.0, fingerprint="f" * 16)},
        {"perplexity_after": measured(22.0) | {"window": 64}},
        {"perplexity_before": measured(30.0)},
        {"parameters_before": 2000},
        {"perplexity_before": None, "perplexity_after": None},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_cannot_be_compared_is_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    groups = grouped(tmp_path, pruned_report(), pruned_report(**changes), pruned_report())
    assert [len(group.runs) for group in groups] == [3, 2]
    found = several.headings(groups)
    assert len(set(found)) == 2
    page = check_page(several.page(groups), plots=2 if changes.get("perplexity_before", 1) is None else 4)
    assert "The runs are in 2 groups" in page.text


def test_reports_without_fingerprints_are_compared_by_the_names_of_their_texts(tmp_path: Path) -> None:
    def old(**changes: Any) -> dict[str, Any]:
        both = {f"perplexity_{when}": measured(20.0, fingerprint=None) for when in ("before", "after")}
        return pruned_report(**both | changes)

    recovered = recovered_report(
        **{f"perplexity_{when}": measured(20.0, fingerprint=None) for when in ("teacher", "before", "after")}
    )
    del recovered["costs"], recovered["parameters_dense"]
    groups = grouped(tmp_path, old(), old(evaluation="other.txt"), recovered)
    assert [names(group) for group in groups] == [["base", "run0", "run2"], ["base", "run1"]]
    assert [run.memory for run in groups[0].runs] == [4000, 3000, None]
    check_page(several.page(groups), plots=4)


def test_the_models_of_a_comparison_are_runs_of_their_own(tmp_path: Path) -> None:
    found = {
        "text": "/home/someone/held-out.txt",
        "window": 128,
        "dense": {"model": "/home/someone/base", "parameters": 1000, "perplexity": 20.0},
        "others": [{"model": f"/home/someone/out{n}", "parameters": 800, "perplexity": 20.0 + n} for n in (1, 2)],
    }
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "compare.json").write_text(json.dumps(found))
    (group,) = groups_of(read_runs([str(tmp_path / "compared")]))
    assert names(group) == ["base", "compared: out1", "compared: out2"]
    assert [run.ratio for run in group.runs] == [1.0, 1.05, 1.1]
    check_page(several.page([group]), plots=1)
    found["fingerprint"] = "0123456789abcdef"
    write(tmp_path / "both", pruned_report())
    (tmp_path / "both" / "compare.json").write_text(json.dumps(found))
    (group,) = groups_of(read_runs([str(tmp_path / "both")]))
    assert [run.kind for run in group.runs] == ["dense", "pruned", "compared", "compared"]
    (tmp_path / "both" / "compare.json").write_text(json.dumps(found | {"others": {}}))
    with pytest.raises(InputError, match=r"compare.json: the report is broken at others, expected a list"):
        read_runs([str(tmp_path / "both")])


def test_memory_with_other_windows_has_no_axis(tmp_path: Path) -> None:
    longer = pruned_report()
    longer["costs"] = longer["costs"] | {"window": 4096}
    assert "Quality against memory" not in several.page(grouped(tmp_path, pruned_report(), longer))


def places_of(text: str, key: str) -> list[int]:
    return [int(place) for place in re.findall(rf"--{key}:(\d+);", text)]


def test_rows_have_a_place_for_every_order(tmp_path: Path) -> None:
    worse = pruned_report(perplexity_after=measured(40.0), parameters_after=500, seconds={"prune": 0.5})
    text = several.page(grouped(tmp_path, pruned_report(), worse))
    # rows: dense, run0, run1
    assert places_of(text, "name") == [0, 1, 2]
    assert places_of(text, "parameters") == [2, 1, 0]
    assert places_of(text, "parameters-down") == [0, 1, 2]
    assert places_of(text, "ratio") == [0, 1, 2]
    assert places_of(text, "seconds") == [2, 1, 0]
    assert places_of(text, "seconds-down") == [2, 0, 1]  # the dense model has none
    assert places_of(text, "memory") == [2, 0, 1]
    for key in several.COLUMNS:
        assert f".runs:has(.by-{key}:checked) tbody tr {{ order: var(--{key}); }}" in text
        assert text.count(f'class="by-{key}"') == 1
    assert text.count(" checked>") == 1


def test_every_group_has_its_own_choice_of_order(tmp_path: Path) -> None:
    groups = grouped(tmp_path, pruned_report(), pruned_report(evaluation="b", perplexity_after=measured(9.0, 1.0, "1")))
    text = several.page(groups)
    assert set(re.findall(r'name="(sort\d)"', text)) == {"sort0", "sort1"}
    assert text.count(" checked>") == 2
    assert "<label><input" in text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    name = "a<script>alert(1)<b>$x^"
    folder = write(tmp_path / name, pruned_report(base_model="<script>x", evaluation="<script>$y^.txt"))
    text = several.page(groups_of(read_runs([folder])))
    assert "<script" not in text
    assert name in check_page(text, plots=2).text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write(tmp_path / part / "out", pruned_report()) for part in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/out", "b/out"]


def test_without_matplotlib_the_page_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = grouped(tmp_path, pruned_report())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install minillm-jax[report]" in check_page(several.page(groups), plots=0).text


BROKEN = {
    "{": "the report cannot be read",
    "[]": "holds no JSON object",
    "{}": "broken at costs.before, expected an object, found nothing",
    json.dumps(pruned_report(parameters_after="many")): "at parameters_after, expected a number, found 'many'",
    json.dumps(
        pruned_report(parameters_after=float("nan"))
    ): "at parameters_after, expected a finite number, found nan",
    json.dumps(pruned_report(base_model=None)): "at base_model, expected a text, found nothing",
    json.dumps(pruned_report(perplexity_after={"window": 128})): "at perplexity, expected a number, found nothing",
    json.dumps(pruned_report(seconds=[1])): r"at seconds, expected an object, found \[1\]",
    json.dumps(recovered_report(costs=[])): "at costs.after.memory, expected a number",
    "[" * 100_000: "the report cannot be read",
}


@pytest.mark.parametrize(("report", "words"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_report_is_one_sentence(tmp_path: Path, report: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_runs([write(tmp_path / "run", report)])


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"the folder has no report\.json; name a folder that prune, recover or compare"
    ):
        read_runs([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="there is no such folder"):
        read_runs([str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="no run is named"):
        read_runs([])
    folder = write(tmp_path / "run", pruned_report())
    with pytest.raises(InputError, match="named twice"):
        read_runs([folder, folder])


def test_the_command_writes_one_page_and_never_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write(tmp_path / "out", pruned_report()), write(tmp_path / "out-recovered", recovered_report())]
    output = tmp_path / "runs.html"
    assert call(monkeypatch, ["report", *folders, "--output", output]) == 0
    assert "1.050" in capsys.readouterr().out
    check_page(output.read_text(), plots=2)
    before = output.read_text()
    assert call(monkeypatch, ["report", *folders, "--output", output]) == 2
    assert "the output file already exists" in capsys.readouterr().err
    assert output.read_text() == before
    assert call(monkeypatch, ["report", *folders, "--json", "--output", tmp_path / "again.html"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert [run["ratio"] for run in group["runs"]] == [1.0, 1.1, 1.05]
    for arguments, words in (
        ([*folders], "no page is named"),
        ([*folders, tmp_path, "--output", tmp_path / "x.html"], "has no report.json"),
        ([*folders, "--output", tmp_path / "nowhere" / "x.html"], "is not a writable folder"),
        (["--output", tmp_path / "x.html"], "missing argument"),
    ):
        assert call(monkeypatch, ["report", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.html", "out", "out-recovered", "runs.html"]
