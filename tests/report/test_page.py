"""The parts of report.html: tiles, kept shares, errors, samples, tasks; for new summaries and for old ones."""

import json
from typing import Any

import pytest

from minillm_jax.evaluation.layer_errors import LayerErrors
from minillm_jax.report import html, plots, recovery, summary
from minillm_jax.report.page import page
from tests.report.pages import HOSTILE, check_page, measured

GROUPS = {"head": {"before": [4, 4], "asked": [2, 4], "after": [2, 4]}}
ERRORS = {"windows": 8, "window": 32, "stream": [0.02, 0.05], "attention": [0.1, None], "mlp": [0.3, None]}
SAMPLES = [{"prompt": f"Once {HOSTILE}", "dense": "a <b>bold</b> one\nsecond line", "pruned": "w" * 300}]
TASKS = [
    {"task": "arc", "metric": "acc", "before": 0.55, "before_stderr": 0.01, "after": 0.51, "after_stderr": 0.011},
    {"task": f"$x^{HOSTILE}", "metric": "$ppl", "before": 12.3, "before_stderr": None, "after": 15.0},
]

# A summary as it was written before it held errors of layers and standard errors.
OLD: dict[str, Any] = {
    "base_model": "models/base",
    "format": "stock",
    "parameters_stored": 800,
    "parameters_before": 1000,
    "parameters_after": 800,
    "costs": {
        "window": 128,
        "before": {"parameters": 1000, "macs": 5000, "memory": 4000},
        "after": {"parameters": 800, "macs": 4000, "memory": 3000},
    },
    "evaluation": "text.txt",
    "perplexity_before": measured(20.0, fingerprint=None),
    "perplexity_after": measured(22.0, fingerprint=None),
    "whole": {},
    "groups": GROUPS,
    "tokens_per_channel": 20.0,
    "few_tokens": "",
    "scores": None,
    "losses": None,
    "searched": None,
    "seconds": {"load": 1.0},
    "settings": {
        "recipe": "ours",
        "structures": ["heads"],
        "rounds": 1,
        "budget": {"ratio": 0.2, "ratio_of": "groups", "target": None, "allocation": "curves"},
        "scoring": {"criterion": "obs"},
        "refit": {"method": "none"},
        "calibration": {"samples": 4, "length": 32, "source": "text.txt", "seed": 0},
    },
    "step": None,
    "versions": {"jax": "1"},
}

RECOVERED: dict[str, Any] = {
    "model": "out",
    "base_model": "models/base",
    "format": "stock",
    "parameters": 800,
    "trained_parameters": 10,
    "settings": {"training": {"method": "lora"}},
    "recipe": "distil",
    "updates": 0,
    "tokens": 0,
    "tokens_per_second": None,
    "peak_bytes": 0,
    "points": [{"update": 0, "tokens": 0, "loss": None, "validation": 2.0, "watched": None}],
    "evaluation": "text.txt",
    "perplexity_teacher": measured(20.0, fingerprint=None),
    "perplexity_before": measured(22.0, fingerprint=None),
    "perplexity_after": measured(21.0, fingerprint=None),
    "seconds": {"train": 1.0},
    "versions": {"jax": "1"},
}


def new(**changes: Any) -> dict[str, Any]:
    return OLD | {"perplexity_before": measured(20.0), "perplexity_after": measured(22.0)} | changes


def shown(found: dict[str, Any], count: int) -> str:
    """The text of a page, which is checked."""
    return check_page(page(found, plots.draw(found)), count).text.replace("\xa0", " ")


def test_old_summaries_have_pages_without_the_new_parts() -> None:
    text = shown(OLD, 1)
    assert "20.000 → 22.000" in text
    assert not [word for word in ("±", "Samples", "Tasks", "Error of", "tokens a second") if word in text]
    text = check_page(recovery.page(RECOVERED), plots=1).text
    assert "perplexity / teacher1.05teacher 20.000" in text
    assert not [word for word in ("±", "memory", "Kept groups", "Error of") if word in text]


def test_the_tiles_begin_with_the_perplexity_and_its_standard_error() -> None:
    tiles = summary.tiles(new(speed={"before": 900.0, "after": 1080.0}))
    assert [tile.name for tile in tiles] == [
        *("perplexity", "parameters", "memory with 128 tokens", "MACs for 128 tokens", "tokens a second")
    ]
    assert tiles[0][1:3] == ("× 1.10", "20.000 ± 0.500 → 22.000 ± 0.500")
    assert [tile.share for tile in tiles] == [None, 0.8, 0.75, 0.8, None]
    assert tiles[-1][1:3] == ("× 1.20", "900 → 1,080")
    markup = html.tiles(tiles)
    assert "width:75.0%" in markup
    assert "20.000&nbsp;±&nbsp;0.500" in markup
    assert next(tile.name for tile in summary.tiles(new(perplexity_before=None))) == "parameters"
    assert "± is the standard error" in shown(new(), 1)


def test_the_tiles_of_a_recovery_name_the_dense_model() -> None:
    costs = {"window": 64, "after": {"parameters": 800, "macs": 4000, "memory": 3000}}
    tiles = recovery.tiles(RECOVERED | {"parameters_dense": 1000, "costs": costs})
    assert [tile.name for tile in tiles] == ["perplexity", "perplexity / teacher", "parameters", "memory", "MACs"]
    assert tiles[2][1:] == ("800", "80.0 % of 1,000", 0.8)
    assert tiles[3][1:3] == ("3.0 kB", "with 64 tokens")


def test_kept_groups_are_shown_as_shares_of_every_layer() -> None:
    text = shown(OLD, 1)
    assert "key/value heads per layer: 2 to 4 of 4, 50 to 100 %" in text
    none = OLD | {"groups": {"head": {"before": [0, 4], "asked": [0, 2], "after": [0, 2]}}}
    assert "0 to 2 of 0 to 4, 0 to 50 %" in shown(none, 1)


def test_errors_of_layers_are_plotted_with_the_removed_layers_named() -> None:
    text = shown(new(layer_errors=ERRORS), 3)
    assert "the median over the tokens of 8 windows of 32 tokens" in text
    assert "Removed layers: 1." in text
    assert "residual stream after the layer: 2 to 5 %" in text
    better = ERRORS | {"stream": [0.01, 0.03]}
    found = RECOVERED | {"layer_errors_before": ERRORS, "layer_errors_after": better, "groups": GROUPS}
    both = check_page(recovery.page(found), plots=4).text.replace("\xa0", " ")
    assert "the layer before: 2 to 5 %; residual stream after the layer after: 1 to 3 %" in both


def test_errors_that_are_not_finite_are_nothing_in_json() -> None:
    errors = LayerErrors([0.1, float("nan")], [float("inf"), None], [0.2, None], 8, 32)
    found = summary.errors_json(errors)
    assert found == {"windows": 8, "window": 32, "stream": [0.1, None], "attention": [None, None], "mlp": [0.2, None]}
    json.dumps(found, allow_nan=False)
    shown(new(layer_errors=found), 3)
    assert summary.errors_json(None) is None


def test_samples_are_texts_side_by_side() -> None:
    text = page(new(samples=SAMPLES), None)
    found = check_page(text, plots=0)
    assert found.text.count("Once") == 1
    assert "a <b>bold</b> one\nsecond line" in found.text
    assert "<script" in found.text
    assert "<script" not in text
    assert "<b>" not in text
    assert found.tags["article"] == 1
    three = recovery.page(RECOVERED | {"samples": [SAMPLES[0] | {"recovered": "better"}]})
    assert [word in check_page(three, 1).text for word in ("dense", "pruned", "recovered", "better")] == [True] * 4


def test_tasks_are_a_table_and_a_plot_with_error_bars() -> None:
    found = new(tasks=TASKS)
    text = shown(found, 2)
    assert "arc, acc0.550 ± 0.0100.510 ± 0.011−0.040" in text
    assert "12.30015.000+2.700" in text
    drawn = plots.draw(found)
    assert drawn is not None
    assert "<script" not in drawn["tasks"].svg
    assert "$ppl" in drawn["tasks"].svg
    assert check_page(recovery.page(RECOVERED | {"tasks": TASKS}), plots=2)


@pytest.mark.parametrize("field", ["base_model", "evaluation"])
def test_hostile_names_are_text_in_every_part(field: str) -> None:
    found = new(samples=SAMPLES, tasks=TASKS, layer_errors=ERRORS, **{field: HOSTILE})
    text = page(found, plots.draw(found))
    check_page(text, plots=4)
    assert "<script" not in text
    text.encode()
