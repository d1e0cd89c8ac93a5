"""A comparison of models in numbers and plain words: JSON, table and page."""

import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from minillm_jax.comparing import Comparison
from minillm_jax.report import html, plots
from minillm_jax.report.summary import short_name

# Measures of the curves, with the titles of their panels.
_PANELS = {
    "increase": "increase of the cross entropy, nats",
    "divergence": "KL(dense ‖ other), nats",
    "agreement": "share with the same most probable token",
    "acceptance": "expected acceptance of a drafted token",
}

_ROWS = {
    "loss": "cross entropy, nats",
    "increase": "increase, nats",
    "divergence": "KL(dense ‖ other), nats",
    "agreement": "same top token",
    "overlap": "overlap of the top 5",
    "acceptance": "expected acceptance",
}

_TILES = {"divergence": "KL, nats", "agreement": "same top token", "acceptance": "expected acceptance"}

_WORDS = (
    "The divergence is KL(dense ‖ other) over the whole vocabulary.",
    "The expected acceptance is the sum of min(p, q) over the vocabulary: the probability that speculative sampling "
    "accepts a token which the other model drafts (arXiv 2211.17192).",
    "A number behind ± is the standard error over the windows.",
    "compare.json holds all numbers of this page.",
)


def documents(found: Mapping[str, Any]) -> dict[str, str]:
    """The files of an output folder, by name, from `summary`."""
    return {"compare.json": json.dumps(found, indent=2) + "\n", "compare.html": page(found)}


def summary(result: Comparison) -> dict[str, Any]:
    """A comparison as one JSON object."""
    measured, settings = result.measured, result.settings
    dense = {
        "model": result.names[0],
        "parameters": result.parameters[0],
        "perplexity": measured.perplexity,
        "loss": measured.loss._asdict(),
    }
    drafts = result.drafts or (None,) * len(measured.others)
    others = [
        {
            "model": name,
            "parameters": parameters,
            "perplexity": changes.perplexity,
            **{key: mean._asdict() for key, mean in changes.means.items()},
            "positions": [part._asdict() for part in changes.positions],
            "frequencies": [part._asdict() for part in changes.frequencies],
            "tokens": [token._asdict() for token in changes.tokens],
            "windows": [window._asdict() for window in changes.windows],
            "draft": None if draft is None else _draft(draft),
        }
        for name, parameters, changes, draft in zip(
            result.names[1:], result.parameters[1:], measured.others, drafts, strict=True
        )
    ]
    drafting = {"gamma": settings.draft, "prompts": result.prompts, "new_tokens": settings.new_tokens}
    return {
        "text": result.source,
        "window": measured.window,
        "windows": measured.windows,
        "fingerprint": result.fingerprint,
        "tokens": measured.tokens,
        "dense": dense,
        "others": others,
        "drafting": drafting if settings.draft else None,
        "device": result.device,
        "versions": result.versions,
    }


def _draft(draft: Any) -> dict[str, Any]:
    return {
        "greedy": draft.greedy._asdict(),
        "sampling": draft.sampling._asdict(),
        "same": draft.same,
        "seconds_dense": draft.seconds_dense,
        "seconds_alone": draft.seconds_alone,
        "seconds": draft.seconds,
        "speedup": draft.speedup,
    }


def names(found: Mapping[str, Any]) -> list[str]:
    """A short name for each model, the dense one first; with a number where two have the same."""
    short = [short_name(one["model"]) for one in (found["dense"], *found["others"])]
    return [
        name if short.count(name) == 1 else f"{name} ({short[: at + 1].count(name)})" for at, name in enumerate(short)
    ]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The measured rows: the name of a measure, then its value for each model, the dense one first."""
    dense, others = found["dense"], found["others"]
    result = [
        ["parameters", *(f"{one['parameters']:,}" for one in (dense, *others))],
        ["perplexity", *(f"{one['perplexity']:.3f}" for one in (dense, *others))],
    ]
    for key, name in _ROWS.items():
        result.append([name, _mean(dense[key]) if key == "loss" else "", *(_mean(one[key]) for one in others)])
    return result


def draft_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the drafting; empty without one."""
    if found["drafting"] is None:
        return []
    drafts = [one["draft"] for one in found["others"]]
    prompts, alone = found["drafting"]["prompts"], f"{1000 * drafts[0]['seconds_dense']:.2f}"
    return [
        ["accepted, greedy", "", *(f"{one['greedy']['accepted']:.3f}" for one in drafts)],
        ["accepted, sampling", "", *(f"{one['sampling']['accepted']:.3f}" for one in drafts)],
        ["tokens a pass, greedy", "1.00", *(f"{one['greedy']['tokens_per_pass']:.2f}" for one in drafts)],
        ["tokens a pass, sampling", "1.00", *(f"{one['sampling']['tokens_per_pass']:.2f}" for one in drafts)],
        ["prompts with the same tokens", "", *(f"{one['same']} of {prompts}" for one in drafts)],
        ["ms a token, alone", alone, *(f"{1000 * one['seconds_alone']:.2f}" for one in drafts)],
        ["ms a token, as draft", "", *(f"{1000 * one['seconds']:.2f}" for one in drafts)],
        ["speed with the draft", "", *(f"× {one['speedup']:.2f}" for one in drafts)],
    ]


def _mean(mean: Mapping[str, float | None]) -> str:
    return f"{mean['value']:.4f}" + ("" if mean["error"] is None else f" ± {mean['error']:.4f}")


def _drafting(found: Mapping[str, Any]) -> str:
    """How the drafting was measured."""
    drafting = found["drafting"]
    return (
        f"drafted tokens a round: {drafting['gamma']}; prompts: {drafting['prompts']}; new tokens behind each prompt: "
        f"{drafting['new_tokens']}; one sequence at a time on {found['device']}"
    )


def _measured_on(found: Mapping[str, Any]) -> str:
    return (
        f"{found['tokens']:,} predictions in {found['windows']:,} windows of {found['window']} tokens of "
        f"{short_name(found['text'])}"
    )


def table(found: Mapping[str, Any]) -> Table:
    """A comparison as a table with one column for each model."""
    shown = Table(title=Text(_measured_on(found)))
    for number, heading in enumerate(("", *names(found))):
        shown.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for row in rows(found):
        shown.add_row(*row)
    if found["drafting"] is not None:
        shown.add_section()
        for row in draft_rows(found):
            shown.add_row(*row)
        shown.caption = Text(_drafting(found))
    return shown


# ------------------------------------------------------------------------------------------------------------ page


def page(found: Mapping[str, Any]) -> str:
    """compare.html: results, curves, and the tokens and windows that became harder to predict."""
    headings = ["", *map(html.text, names(found))]
    parts = [html.section("Next-token probabilities", html.table(headings, rows(found)))]
    if found["drafting"] is not None:
        note = f"<p>{html.text(_drafting(found))}.</p>"
        parts.append(html.section("As draft in speculative decoding", html.table(headings, draft_rows(found)) + note))
    parts.append(html.section("Curves", html.figures(plots.lines(_curves(found)))))
    for name, other in zip(names(found)[1:], found["others"], strict=True):
        parts.append(html.section(f"Tokens and windows that {name} predicts worst", _worst(other)))
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    footer = "".join(f"<p>{html.text(line)}</p>" for line in (*_WORDS, f"Versions: {versions}."))
    first, *rest = names(found)
    return html.document(f"{first} and {', '.join(rest)}", f"{_measured_on(found)}.", _tiles(found), parts, footer)


def _tiles(found: Mapping[str, Any]) -> str:
    """The main numbers of the first pruned model."""
    dense, other = found["dense"], found["others"][0]
    tiles = [("perplexity", f"{dense['perplexity']:.3f} → {other['perplexity']:.3f}")]
    tiles += [(name, f"{other[key]['value']:.3f}") for key, name in _TILES.items()]
    if other["draft"] is not None:
        tiles.append(("speed with the draft", f"× {other['draft']['speedup']:.2f}"))
    whose = f'<dd class="muted">{html.text(names(found)[1])}</dd>' if len(found["others"]) > 1 else ""
    each = "".join(f"<div><dt>{html.text(name)}</dt><dd>{html.text(value)}</dd>{whose}</div>" for name, value in tiles)
    return f'<dl class="tiles">{each}</dl>'


def _value(part: Mapping[str, Any], key: str) -> float:
    return part["means"]["loss"] - part["dense"] if key == "increase" else part["means"][key]


def _curves(found: Mapping[str, Any]) -> list[plots.Lines]:
    """The curves by position and by frequency, each measure in a panel of its own."""

    def panels(curve: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
        def points(other: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
            return [((part["first"] + part["last"]) / 2, _value(part, key)) for part in other[curve]]

        series = list(zip(names(found)[1:], found["others"], strict=True))
        return {title: {name: points(other, key) for name, other in series} for key, title in _PANELS.items()}

    def words(curve: str) -> str:
        parts = []
        for name, other in zip(names(found)[1:], found["others"], strict=True):
            first, last = (_value(other[curve][at], "divergence") for at in (0, -1))
            parts.append(f"divergence of {name}: {first:.3f} at the left end, {last:.3f} at the right end")
        return "; ".join(parts)

    tokens = ", ".join(f"{part['tokens']:,}" for part in found["others"][0]["frequencies"])
    by_frequency = f"{words('frequencies')}. Predictions at each point: {tokens}"
    return [
        plots.Lines("By position", words("positions"), "position in the window", panels("positions")),
        plots.Lines("By frequency", by_frequency, "occurrences of the true token", panels("frequencies"), True),
    ]


def _worst(other: Mapping[str, Any]) -> str:
    """The tables of tokens and windows of one model."""
    tokens = [(repr(one["text"]), f"{one['occurrences']:,}", *_losses(one)) for one in other["tokens"]]
    windows = [(f"{one['number']}: {one['text']}…", *_losses(one)) for one in other["windows"]]
    losses = ("dense, nats", "other, nats", "increase")
    return html.table(("token", "predictions", *losses), tokens) + html.table(("window", *losses), windows)


def _losses(one: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{one['dense']:.3f}", f"{one['loss']:.3f}", f"{one['loss'] - one['dense']:+.3f}".replace("-", "−")
