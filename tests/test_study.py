"""The study of one model: recipes as text, jobs, resumption, tables and plot; and the peers in PyTorch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from minillm_jax import api, demo
from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.model.tree import parameter_count
from tests.helpers import hugging_face_folder, load_torch, random_tokens

ROOT = Path(__file__).parents[1]
Bench = Callable[[str], ModuleType]
SETTINGS = {"model": "small", "calibration": "a.txt", "texts": {"wiki": "w.txt", "stories": "s.txt"}}
SETTINGS |= {"windows": 8, "length": 16, "dtype": "float32"}


# -------------------------------------------------------------------------------------------------------- recipes


def test_a_recipe_is_a_name_with_options(bench: Bench) -> None:
    parse = bench("study").parse
    assert parse("ours") == ("ours", {})
    assert parse("ours+criterion=noise+ridge=0.001") == ("ours", {"criterion": "noise", "ridge": "0.001"})
    assert parse("ours+structures=heads,channels") == ("ours", {"structures": "heads,channels"})
    assert parse("mini-llm+per_sequence=true")[1] == {"per_sequence": True}


@pytest.mark.parametrize("text", ["ours+", "ours+noise", "ours+criterion=", "ours+=1", "ours+seed=1+seed=2"])
def test_a_recipe_that_is_not_understood_is_refused(bench: Bench, text: str) -> None:
    with pytest.raises(InputError, match="not understood"):
        bench("study").parse(text)


def test_options_target_and_seed_reach_the_settings(bench: Bench) -> None:
    study = bench("study")
    settings = study.settings_of(study.Job("ours+allocation=curves+samples=256+ridge=0.001", 1000, 3))
    assert settings.budget.target_params == 1000
    assert settings.budget.allocation == "curves"
    assert (settings.data.samples, settings.data.seed, settings.refit.ridge) == (256, 3, 0.001)
    assert study.settings_of(study.Job("llm-pruner", 1000, 3)).budget.layers == (4, -2)


@pytest.mark.parametrize("text", ["theirs", "ours+rigde=1", "ours+criterion=best", "wanda-sp+alpha=0.5"])
def test_a_recipe_that_the_package_refuses_is_refused(bench: Bench, text: str) -> None:
    study = bench("study")
    with pytest.raises(InputError):
        study.settings_of(study.Job(text, 1000, 0))


def test_every_recipe_of_the_study_is_accepted(bench: Bench) -> None:
    study = bench("study")
    for name in study.RECIPES:
        if name not in study.PEERS:
            assert study.settings_of(study.Job(name, 1000, 1)).data.seed in (0, 1)


def test_jobs_begin_with_the_dense_model_and_hold_each_peer_once(bench: Bench) -> None:
    study = bench("study")
    jobs = study.jobs_of(["ours", "torch-pruning", "ours"], [200, 100], 2)
    assert [(job.recipe, job.target, job.seed) for job in jobs] == [
        ("dense", None, 0),
        ("ours", 200, 0),
        ("torch-pruning", 200, 0),
        ("ours", 100, 0),
        ("torch-pruning", 100, 0),
        ("ours", 200, 1),
        ("ours", 100, 1),
    ]


# ----------------------------------------------------------------------------------------------------- resumption


class Measured:
    """Measures jobs, notes them, and is interrupted at one of them."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        self.jobs: list[Any] = []
        self.interrupted_at = interrupted_at

    def __call__(self, job: Any) -> dict[str, Any]:
        if len(self.jobs) == self.interrupted_at:
            raise KeyboardInterrupt
        self.jobs.append(job)
        if job.recipe == "broken":
            raise RuntimeError("out of memory")
        return {"perplexity": {"wiki": float(len(job.recipe) + (job.target or 0))}}


def completed(study: ModuleType, output: Path, jobs: Any, measured: Measured, made_at: str = "a", keep: bool = False):
    """The rows after a run that may be interrupted, as the file holds them."""
    try:
        for _, rows in study.complete(jobs, study.read(output, SETTINGS), made_at, keep, measured):
            if not isinstance(rows, RuntimeError):
                study.write(output, SETTINGS, rows)
    except KeyboardInterrupt:
        pass
    return json.loads(output.read_text())["rows"]


def test_an_interrupted_study_continues_with_the_rows_that_are_missing(bench: Bench, tmp_path: Path) -> None:
    study = bench("study")
    jobs = study.jobs_of(["ours", "flap"], [200, 100], 2)
    whole = completed(study, tmp_path / "whole.json", jobs, Measured())
    assert len(whole) == len(jobs)
    output = tmp_path / "study.json"
    assert completed(study, output, jobs, Measured(interrupted_at=3)) == whole[:3]
    rest = Measured()
    assert completed(study, output, jobs, rest) == whole
    assert rest.jobs == jobs[3:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.json", "whole.json"]


def test_rows_of_another_commit_are_measured_again_unless_kept(bench: Bench, tmp_path: Path) -> None:
    study, output = bench("study"), tmp_path / "study.json"
    jobs = study.jobs_of(["ours"], [100], 1)
    first = completed(study, output, jobs, Measured())
    kept = Measured()
    assert completed(study, output, jobs, kept, made_at="b", keep=True) == first
    assert kept.jobs == []
    again = Measured()
    assert [row["commit"] for row in completed(study, output, jobs, again, made_at="b")] == ["b", "b"]
    assert again.jobs == jobs


def test_a_failed_job_costs_its_own_row_only(bench: Bench, tmp_path: Path) -> None:
    study = bench("study")
    jobs = study.jobs_of(["broken", "ours"], [100], 1)
    rows = completed(study, tmp_path / "study.json", jobs, Measured())
    assert [row["recipe"] for row in rows] == ["dense", "ours"]


def test_rows_of_another_study_are_refused(bench: Bench, tmp_path: Path) -> None:
    study, output = bench("study"), tmp_path / "study.json"
    study.write(output, SETTINGS, [])
    assert study.read(output, SETTINGS) == []
    with pytest.raises(InputError, match="windows 8, and this study has 9; give another --output"):
        study.read(output, SETTINGS | {"windows": 9})


def test_evaluation_windows_are_spread_over_the_text(bench: Bench, tmp_path: Path) -> None:
    study = bench("study")
    path = tmp_path / "text.txt"
    path.write_text(demo.held_out_text())
    every = study.evaluation_windows(path, demo.FOLDER, 60, 64).windows
    few = study.evaluation_windows(path, demo.FOLDER, 3, 64).windows
    found = [next(n for n, window in enumerate(every) if np.array_equal(window, one)) for one in (few[0],)]
    assert found == [0]
    assert few.shape == (3, 64)
    assert not any(np.array_equal(few[2], window) for window in every[:30])
    with pytest.raises(InputError, match="100000 are asked for"):
        study.evaluation_windows(path, demo.FOLDER, 100000, 64)


def test_a_study_checks_recipes_and_calibration_text_before_the_first_row(bench: Bench, tmp_path: Path) -> None:
    study, outline, text = bench("study"), api.describe(demo.FOLDER), tmp_path / "text.txt"
    text.write_text(demo.held_out_text())
    study.check(study.jobs_of(["ours", "torch-pruning"], [900_000], 1), outline, text)
    with pytest.raises(InputError, match=r"recipe flap: .*1024 are asked for"):
        study.check(study.jobs_of(["ours", "flap"], [900_000], 1), outline, text)


def test_a_process_that_fails_gives_its_last_line(bench: Bench, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('a warning')\nprint(sys.argv[2]) if 'ok' in sys.argv[2] else sys.exit('no')\n")
    result = bench("processes").launch(script, {"ok": 1})
    assert result.pop("seconds") >= 0
    assert result.pop("load") >= 0
    assert result == {"ok": 1}
    with pytest.raises(RuntimeError, match=r"no \(exit status 1\)"):
        bench("processes").launch(script, {})


def test_the_process_of_a_row_ends_with_its_parent() -> None:
    """A child that would sleep for a minute holds the errors' pipe open, so `run` returns when it has ended."""
    child = "import time, processes; processes.end_with_parent(); print('started', flush=True); time.sleep(60)"
    start = f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, text=True)"
    parent = f"import os, subprocess, sys; {start}; print(child.stdout.readline(), end='', flush=True); os._exit(0)"
    variables = os.environ | {"PYTHONPATH": str(ROOT / "bench")}
    command = [sys.executable, "-c", parent]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=40)
    assert done.stdout == "started\n"


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    """The command itself, killed after its second row, then run again: the same rows as those of one run."""
    text = tmp_path / "text.txt"
    text.write_text(demo.held_out_text())
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(demo.training_text()[:200_000])

    def started(output: str) -> subprocess.Popen[str]:
        command = [sys.executable, "bench/study.py", str(demo.FOLDER), "--calibration", str(calibration)]
        command += ["--text", f"manual={text}", "--params", "900K", "--windows", "8", "--length", "64"]
        command += ["--recipes", "wanda-sp", "ours+criterion=random+refit=none", "--output", str(tmp_path / output)]
        variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)

    whole = started("whole.json")
    printed, _ = whole.communicate()
    assert whole.returncode == 0
    rows = json.loads((tmp_path / "whole.json").read_text())["rows"]
    assert [json.loads(line) for line in printed.splitlines()] == rows
    assert [row["recipe"] for row in rows] == ["dense", "wanda-sp", "ours+criterion=random+refit=none"]
    assert all(row["parameters"] <= 900_000 < rows[0]["parameters"] for row in rows[1:])
    assert all(row["perplexity"]["manual"] > rows[0]["perplexity"]["manual"] for row in rows[1:])
    assert all(row["seconds"] > row["pruning_seconds"] and row["peak_bytes"] > 1e7 for row in rows)
    assert rows[1]["calibration_tokens"] == 1280
    killed = started("killed.json")
    assert killed.stdout is not None
    first = [json.loads(killed.stdout.readline()) for _ in range(2)]
    killed.kill()
    killed.communicate()
    printed, _ = started("killed.json").communicate()
    resumed = json.loads((tmp_path / "killed.json").read_text())["rows"]
    assert resumed[:2] == first
    assert [json.loads(line) for line in printed.splitlines()] == resumed[2:]
    timed = ("seconds", "cpu_seconds", "pruning_seconds", "peak_bytes", "load")
    untimed = [[{key: row[key] for key in row if key not in timed} for row in table] for table in (rows, resumed)]
    assert untimed[0] == untimed[1]


# ------------------------------------------------------------------------------------------------ tables and plot


def row(recipe: str, target: int | None, seed: int, wiki: float, seconds: float, **more: Any) -> dict[str, Any]:
    parameters = 4_000_000 if target is None else target - 100
    measured = {"perplexity": {"wiki": wiki, "stories": 2 * wiki}, "parameters": parameters, "seconds": seconds}
    measured |= {
        "cpu_seconds": seconds + 1,
        "peak_bytes": 5e8,
        "calibration_tokens": 8192,
        "tokens_per_channel": 5.33,
        "commit": "a",
    }
    return {"recipe": recipe, "target": target, "seed": seed} | measured | more


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [row("dense", None, 0, 10.0, 5), row("torch-pruning", 3_000_000, 0, 2e6, 3.0, note="as published")]
    rows += [row("ours", 3_000_000, seed, 12.0 + seed, 60.0) for seed in (0, 1)]
    rows += [row("flap", 2_000_000, 0, 15.0, 70.0), row("ours", 2_000_000, 0, 20.0, 60.0)]
    study = {"environment": {"device": "a processor", "cores": 2, "commit": "a"}, "settings": SETTINGS, "rows": rows}
    (tmp_path / "study-small.json").write_text(json.dumps(study))
    return tmp_path


def test_the_table_has_every_recipe_at_every_target(bench: Bench, results: Path) -> None:
    tables = bench("study_tables")
    table = tables.perplexity_table(tables.load("small", results))
    assert table == [
        "| recipe | parameters | wiki | stories | seconds | CPU seconds | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `dense` | 4.00M | 10.00 | 20.00 | 5 | 6 | 500 MB |",
        "| `ours` | 3.00M | 12.50 (12.00 to 13.00) | 25.00 (24.00 to 26.00) | 60 | 61 | 500 MB |",
        "| `torch-pruning` | 3.00M | 2.0e+06 | 4.0e+06 | 3 | 4 | 500 MB |",
        "| `flap` | 2.00M | 15.00 | 30.00 | 70 | 71 | 500 MB |",
        "| `ours` | 2.00M | 20.00 | 40.00 | 60 | 61 | 500 MB |",
    ]


def test_the_table_of_the_readme_has_a_row_for_every_recipe_and_no_controls(bench: Bench, results: Path) -> None:
    path = results / "study-small.json"
    study = json.loads(path.read_text())
    study["rows"] += [
        row("ours+criterion=noise", 2_000_000, 0, 9.0, 9.0),
        row("ours+samples=9", 3_000_000, 0, 9.0, 9.0),
    ]
    path.write_text(json.dumps(study))
    tables = bench("study_tables")
    assert tables.peers_table("small", results) == [
        "| recipe | 3.00M: wiki | 3.00M: stories | 2.00M: wiki | 2.00M: stories | seconds | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `dense` | 10.00 | 20.00 | 10.00 | 20.00 | 5 | 0.5 GB |",
        "| `ours` | 12.50 (12.00 to 13.00) | 25.00 (24.00 to 26.00) | 20.00 | 40.00 | 60 | 0.5 GB |",
        "| `torch-pruning` | 2.0e+06 | 4.0e+06 |  |  | 3 | 0.5 GB |",
        "| `flap` |  |  | 15.00 | 30.00 | 70 | 0.5 GB |",
    ]
    assert tables.peers_table("absent", results) == []


def test_what_others_do_better_is_said(bench: Bench, results: Path) -> None:
    tables = bench("study_tables")
    study = tables.load("small", results)
    study["rows"].append(row("ours+refit=none", 2_000_000, 0, 19.0, 1.0))
    assert tables.better_table(study)[2:] == [
        "| 3.00M | CPU seconds | `torch-pruning` | 4 | 61 |",
        "| 2.00M | perplexity, wiki | `flap` | 15.00 | 20.00 |",
        "| 2.00M | perplexity, wiki | `ours+refit=none` | 19.00 | 20.00 |",
        "| 2.00M | perplexity, stories | `flap` | 30.00 | 40.00 |",
        "| 2.00M | perplexity, stories | `ours+refit=none` | 38.00 | 40.00 |",
    ]


def test_the_section_of_a_study_appears_with_its_results(bench: Bench, results: Path) -> None:
    section = bench("study_tables").section
    assert section("absent", results) == []
    text = "\n".join(section("small", results))
    assert text.startswith("Every recipe keeps at most 3,000,000 and 2,000,000 of the 4,000,000 parameters; 2 seeds,")
    assert "- `torch-pruning`, at most 3.00M: as published." in text


def test_the_plot_of_a_study_is_drawn_from_its_results(bench: Bench, results: Path) -> None:
    pytest.importorskip("matplotlib")
    bench("plots").study("absent", results, results)
    bench("plots").study("small", results, results)
    assert [path.name for path in results.glob("*.svg")] == ["study-small.svg"]
    assert "ours" in (results / "study-small.svg").read_text()


def test_only_the_made_parts_of_a_page_are_replaced(bench: Bench) -> None:
    page = bench("page")
    text = "By hand.\n<!-- made: study absent -->\nold\n<!-- end -->\n\n<!-- made: refit -->\n<!-- end -->\nBy hand.\n"
    filled = page.filled(text)
    assert filled.startswith("By hand.\n<!-- made: study absent -->\n<!-- end -->\n\n<!-- made: refit -->\n\n| part |")
    assert filled.endswith("|\n\n<!-- end -->\nBy hand.\n")
    assert page.filled(filled) == filled
    with pytest.raises(KeyError, match="unknown"):
        page.filled("<!-- made: unknown -->\n<!-- end -->")


# ---------------------------------------------------------------------------------------------------------- peers


def test_peers_are_measured_like_our_models(bench: Bench, tmp_path: Path) -> None:
    peers = bench("peers")
    folder = hugging_face_folder(tmp_path / "model", tie_word_embeddings=True)
    windows = random_tokens(97, 6, 24)
    model = api.load(folder)
    ours = api.evaluate(model, Batches(windows)).perplexity
    torch_model = load_torch(folder)
    assert peers.perplexity(torch_model, windows) == pytest.approx(ours, rel=1e-4)
    assert peers.counts(torch_model) == {"hidden": [64], "query": [8] * 3, "head": [4] * 3, "channel": [40] * 3}
    assert peers.parameter_count(torch_model) == parameter_count(model.decoder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_reaches_the_target(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="needs torch-pruning, of the extra bench")
    peers = bench("peers")
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}
    folder = hugging_face_folder(tmp_path / "model", tie_word_embeddings=True, **sizes)
    model = peers.load(str(folder))
    dense = peers.parameter_count(model)
    ratio = peers.ratio_for(str(folder), 0.7 * dense)
    peers.prune(model, ratio)
    left = peers.parameter_count(model)
    assert 0.55 * dense < left <= 0.7 * dense
    assert left == peers.parameters_left(str(folder), ratio)
    assert peers.counts(model)["head"] == [3] * 3
    assert peers.counts(model)["query"] == [6] * 3
    assert np.isfinite(peers.perplexity(model, random_tokens(97, 2, 16)))
