"""The README quotes the committed results, and its tree is the repository's."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
README = " ".join((ROOT / "README.md").read_text().split())


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_comes_from_a_committed_result(tables: ModuleType) -> None:
    quoted = [*tables.quality_rows(), tables.demo_sentence(), *tables.memory_rows(), tables.pair_sentence()]
    quoted += tables.conversion_rows()
    assert len(quoted) == 5 + 1 + 4 + 1 + 4
    for line in quoted:
        assert line in README, f"the README does not say {line!r}; run python bench/tables.py"


def test_results_name_hardware_versions_and_a_clean_commit() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        text = path.read_text()
        commit = re.search(r'"commit": "([^"]*)"', text)
        assert commit is not None, path
        assert re.fullmatch(r"[0-9a-f]{12}", commit[1]), f"{path.name} was measured on uncommitted changes"
        assert '"device"' in text
        assert '"jax"' in text


def test_every_module_stands_in_the_tree() -> None:
    for package in ("minillm_jax", "convert"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.startswith("__"):
                assert path.name in README, path


def test_options_of_prune_are_documented() -> None:
    text = (ROOT / "minillm_jax" / "cli.py").read_text()
    prune = text[text.index("def prune(") : text.index("def evaluate_model(")]
    for name in re.findall(r"^    (\w+): Annotated", prune, re.MULTILINE):
        assert f"--{name.replace('_', '-')}" in README, name
