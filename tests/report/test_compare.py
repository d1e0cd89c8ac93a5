"""The page of a comparison: it has all figures, escapes hostile text, and loads nothing else."""

import json
import sys
from typing import Any

import pytest
from rich.console import Console

from minillm_jax.comparing import Comparison
from minillm_jax.data.batches import Batches
from minillm_jax.evaluation.compare import compare
from minillm_jax.evaluation.drafting import Acceptance, Drafting
from minillm_jax.report import compare as reports
from minillm_jax.settings import Comparing
from tests.helpers import random_tokens, small_decoder
from tests.report.test_report import HOSTILE, check_page


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Two models beside the dense one, with hostile names and hostile text."""
    batches = Batches(random_tokens(61, 12, 20))
    names = ("dense", HOSTILE, HOSTILE)
    others = [small_decoder(5), small_decoder(7)]
    measured = compare(small_decoder(), others, names, batches, lambda ids: f"{HOSTILE} {ids[0]}")
    draft = Drafting(Acceptance(0.625, 3.5), Acceptance(0.5, 3.0), 7, 0.030, 0.010, 0.020)
    return reports.summary(
        Comparison(
            names, (300, 200, 100), HOSTILE, Comparing(), measured, 8, (draft, draft), "cpu", {"jax": "1.0"}, "f0"
        )
    )


def test_the_page_has_all_figures_and_no_markup_from_the_text(found: dict[str, Any]) -> None:
    documents = reports.documents(found)
    assert documents.keys() == {"compare.json", "compare.html"}
    assert json.loads(documents["compare.json"]) == json.loads(json.dumps(found))
    page = check_page(documents["compare.html"], plots=2)
    shown = page.text.replace("\xa0", " ")
    for row in (*reports.rows(found), *reports.draft_rows(found)):
        assert all(cell in shown for cell in row)
    assert "× 1.50" in shown
    assert page.tags["table"] == 2 + 2 * 2
    assert "228 predictions in 12 windows of 20 tokens" in shown
    documents["compare.html"].encode()


def test_the_table_has_a_column_for_each_model(found: dict[str, Any]) -> None:
    table = reports.table(found)
    assert len(table.columns) == 4
    console = Console(width=250)
    with console.capture() as capture:
        console.print(table)
    for row in (*reports.rows(found), *reports.draft_rows(found)):
        assert all(cell in capture.get() for cell in row)


def test_without_drafting_and_matplotlib_the_page_is_whole(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    others = [other | {"draft": None} for other in found["others"]]
    page = check_page(reports.page(found | {"others": others, "drafting": None}), plots=0)
    assert "speculative decoding" not in page.text
    assert reports.draft_rows(found | {"drafting": None}) == []


def test_models_of_one_name_are_numbered(found: dict[str, Any]) -> None:
    assert reports.names(found)[1].endswith("(1)")
    assert reports.names(found)[2].endswith("(2)")
