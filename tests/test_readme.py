"""README and docs quote the committed results, and the tree in CONTRIBUTING.md is the repository's."""

import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.model.families import FAMILIES
from tests.helpers import CONFIGURATIONS, MIXTURES, hugging_face_folder

ROOT = Path(__file__).parents[1]


def words_of(page: str) -> str:
    """A page of the repository with single spaces, so that line breaks do not matter."""
    return " ".join((ROOT / page).read_text().split())


README = words_of("README.md")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_comes_from_a_committed_result(tables: ModuleType) -> None:
    quoted = tables.quality_rows("stories260K", tables.SHOWN)
    assert len(quoted) == len(tables.SHOWN)
    for line in quoted:
        assert " ".join(line.split()) in README, f"the README does not say {line!r}; run python bench/tables.py"


def test_every_figure_of_the_benchmarks_comes_from_a_committed_result(tables: ModuleType) -> None:
    benchmarks = words_of("docs/benchmarks.md")
    quoted = [*tables.conversion_rows(), *tables.process_rows(), *tables.forward_rows(), *tables.compile_rows()]
    quoted += [
        *tables.estimate_rows(),
        *tables.estimate_torch_rows(),
        *tables.estimate_memory_rows(),
        *tables.plan_rows(),
        *tables.gguf_rows(),
        *tables.parity_rows(),
    ]
    assert len(quoted) > 30
    for line in quoted:
        assert " ".join(line.split()) in benchmarks, f"docs/benchmarks.md lacks {line!r}; run python bench/tables.py"


def test_every_figure_of_the_fidelity_study_comes_from_a_committed_result(tables: ModuleType) -> None:
    study = words_of("docs/fidelity.md")
    quoted = [*tables.fidelity_rows(), *tables.plain_rows()]
    assert len(quoted) > 25
    for line in quoted:
        assert " ".join(line.split()) in study, f"docs/fidelity.md does not say {line!r}; run python bench/tables.py"


def test_every_figure_of_the_quality_study_comes_from_a_committed_result(tables: ModuleType) -> None:
    study = words_of("docs/quality.md")
    quoted = [row for model in tables.MODELS for row in tables.quality_rows(model)]
    quoted += [*tables.beaten_rows(), *tables.cost_rows(), *tables.refit_rows()]
    assert len(quoted) > 150
    for line in quoted:
        assert " ".join(line.split()) in study, f"docs/quality.md does not say {line!r}; run python bench/tables.py"


def test_the_made_parts_of_the_pages_are_up_to_date(bench: Callable[[str], ModuleType]) -> None:
    page = bench("page")
    for name in page.PAGES:
        text = (ROOT / name).read_text()
        assert page.filled(text) == text, f"{name} is not what the results give; run python bench/page.py"


def test_results_name_hardware_versions_and_a_clean_commit() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        text = path.read_text()
        commits = re.findall(r'"commit": "([^"]*)"', text)
        assert commits, path
        for commit in commits:
            assert re.fullmatch(r"[0-9a-f]{12}", commit), f"{path.name} was measured on uncommitted changes"
        assert '"device"' in text
        assert '"jax"' in text


def test_every_module_stands_in_the_tree() -> None:
    contributing = words_of("CONTRIBUTING.md")
    for package in ("minillm_jax", "convert"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in contributing, path


def test_flax_checkpoints_load_as_documented(tmp_path: Path) -> None:
    """The three lines for other JAX programs, as docs/families.md gives them."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "orbax" in block)
    write_model(read_model(hugging_face_folder(tmp_path / "model")), tmp_path / "flax-folder", "flax")
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax would rather be told the sharding
        exec(lines.replace("/absolute/path/to", str(tmp_path)), found)
    kernel = found["weights"]["runs"]["0"]["attention"]["q"]["kernel"]
    assert kernel.shape == (3, 64, 8, 10)  # L D N H
    np.testing.assert_array_equal(kernel, read_model(tmp_path / "model").decoder.runs[0].attention.q.kernel[...])


def test_counts_in_words_are_true() -> None:
    families = words_of("docs/families.md")
    assert f"for every family in {len(CONFIGURATIONS | MIXTURES)} configurations" in words_of("docs/benchmarks.md")
    lines = len((ROOT / "convert" / "modeling_pruned.py").read_text().splitlines())
    assert f"the {round(lines, -1)} lines of `modeling_pruned.py`" in families


def script(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_families_is_made_from_the_code() -> None:
    text = (ROOT / "docs" / "families.md").read_text()
    assert script("make_families").page(text) == text, "run PYTHONPATH=. python docs/make_families.py"
    for family in FAMILIES:
        assert f"| `{family}` |" in text


def test_the_readme_names_every_family() -> None:
    for family in FAMILIES.values():
        assert re.split(r"[ ,]", family.name)[0] in README.split("these [families]")[1].split("The folder")[0]


def test_the_page_of_options_is_made_from_the_settings() -> None:
    assert (ROOT / "docs" / "options.md").read_text() == script("make_options").page(), (
        "run python docs/make_options.py"
    )


def test_the_readme_fits_150_lines_and_links_pages_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
