"""The summary of a finished job: numbers and table rows.

`result_json` makes the summary, one JSON object. The tables, report.html, its plots and the model card read only the
summary. Fields that a summary may have beside those of `result_json`, which the page shows where they are present:

    samples    texts of the models from the same prompts: [{"prompt", "dense", "pruned"[, "recovered"]}]
    tasks      metrics of tasks: [{"task", "metric", "before", "before_stderr", "after", "after_stderr"}]
    speed      tokens a second: {"before", "after"}
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import PurePath
from typing import Any, NamedTuple

from convert import multimodal
from minillm_jax.evaluation.layer_errors import LayerErrors
from minillm_jax.recipes.sized import few_tokens
from minillm_jax.run import Result

# The JSON object of `result_json`.
Summary = Mapping[str, Any]

# The keys of the pruning record that are settings.
SETTINGS = ("recipe", "structures", "budget", "scoring", "refit", "calibration")

# How each output format is loaded.
FORMAT_WORDS = {
    "stock": "loads in transformers without remote code",
    "per-layer": "loads in transformers with trust_remote_code=True, or after convert.modeling_pruned.register()",
    "padded": "loads in transformers without remote code; zero-padded, which saves less",
    "flax": "an Orbax checkpoint, which loads in minillm_jax",
    "gguf": "one file, model.gguf, which llama.cpp and minillm_jax read",
}

KIND_WORDS = {
    "head": "key/value heads per layer",
    "query": "query heads per layer",
    "channel": "MLP channels per layer",
    "expert": "experts per layer",
    "expert_channel": "channels per expert",
    "hidden": "hidden size",
    "layer": "layers",
}

STRUCTURE_WORDS = {
    "heads": "attention heads",
    "channels": "MLP channels",
    "attention": "attention sublayers",
    "mlp": "MLP sublayers",
    "experts": "experts",
    "expert-channels": "channels of experts",
    "hidden": "hidden dimensions",
    "layers": "layers",
}

SUBLAYER_OF_KIND = {"head": "attention", "channel": "mlp"}
KIND_STRUCTURES = {"head": "heads", "query": "heads", "channel": "channels"}
KIND_STRUCTURES |= {"expert": "experts", "expert_channel": "expert-channels", "hidden": "hidden", "layer": "layers"}

ERROR_WORDS = {
    "stream": "residual stream after the layer",
    "attention": "update of the attention sublayer",
    "mlp": "update of the MLP sublayer",
}

# The keys of a summary that hold errors of layers: of a pruning, and before and after a recovery.
ERROR_KEYS = ("layer_errors", "layer_errors_before", "layer_errors_after")

MEASURE_WORDS = {"parameters": "parameters", "macs": "MACs", "memory": "memory"}


class Row(NamedTuple):
    """One row of the table of results, as text."""

    name: str
    before: str
    after: str
    change: str


class Tile(NamedTuple):
    """One box at the top of the page, as text.

    Attributes:
      name: what is measured.
      value: the number to look at first.
      detail: the numbers behind it.
      share: the part of the dense model that is left, as a bar; None for no bar.
    """

    name: str
    value: str
    detail: str
    share: float | None = None


def result_json(result: Result) -> dict[str, Any]:
    """The summary of a pruning job, as one JSON object."""
    record = result.pruned.record or {}
    costs = {"window": result.job.recipe.budget.window, "before": result.costs_before, "after": result.costs_after}
    samples, length = (record["calibration"][key] for key in ("samples", "length"))
    return {
        "base_model": record["base_model"],
        "output": result.job.output,
        "format": result.written.format,
        "auto_class": multimodal.auto_class(result.pruned.raw_config),
        "parameters_stored": result.written.parameters,
        "parameters_before": record["parameters_before"],
        "parameters_after": record["parameters_after"],
        "costs": costs,
        "evaluation": result.job.recipe.evaluation.text,
        "perplexity_before": None if result.before is None else asdict(result.before),
        "perplexity_after": None if result.after is None else asdict(result.after),
        "whole": {
            kind: {"before": row["before"], "after": row["after"] if "after" in row else len(row["kept"])}
            for kind, row in record["whole"].items()
        },
        "groups": groups_of(record),
        "layer_errors": errors_json(result.errors),
        "samples": list(result.texts),
        "tokens_per_channel": record["tokens_per_channel"],
        "few_tokens": few_tokens(result.job.recipe, samples, length, record["tokens_per_channel"]),
        "scores": record["scores"],
        "losses": record["losses"],
        "searched": record["searched"],
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        "settings": {key: record[key] for key in SETTINGS} | {"rounds": record["rounds"]},
        "step": (record["estimate"] or {}).get("step"),
        "versions": record["versions"],
    }


def errors_json(errors: LayerErrors | None) -> dict[str, Any] | None:
    """The errors of the layers as JSON, with None in the place of errors that are not finite."""
    if errors is None:
        return None
    columns = {name: getattr(errors, name) for name in ERROR_WORDS}
    finite = {name: [x if x is None or isfinite(x) else None for x in column] for name, column in columns.items()}
    return {"windows": errors.windows, "window": errors.window, **finite}


def groups_of(record: Mapping[str, Any]) -> dict[str, dict[str, list[int]]]:
    """For each kind of group, the number in every layer: before pruning, as the ratio asks for, and after pruning.

    Args:
      record: of the pruning.
    """
    return {
        kind: {
            "before": record["groups_before"][kind],
            "asked": record["groups_asked"][kind],
            "after": [len(indices) for indices in rows],
        }
        for kind, rows in record["kept"].items()
    }


def title(summary: Summary) -> str:
    """The name of the base model and the share of its parameters that was removed, as plain text."""
    return f"{short_name(summary['base_model'])}, {removed(summary)}"


def removed(summary: Summary) -> str:
    """The share of the parameters that was removed, in words."""
    before, after = summary["parameters_before"], summary["parameters_after"]
    percent = 100 * (1 - after / before)
    return f"{percent:.1f} % of parameters removed" if percent >= 0.1 else f"{before - after:,} parameters removed"


def rows(summary: Summary) -> list[Row]:
    """The rows of the table of results: costs, kept groups, perplexity."""
    return [*_cost_rows(summary), *_kept_rows(summary), *_perplexity_rows(summary)]


def _cost_rows(summary: Summary) -> list[Row]:
    window, before, after = (summary["costs"][key] for key in ("window", "before", "after"))
    cost_rows = [Row("parameters", *_change(before["parameters"], after["parameters"], "{:,}".format))]
    stored = summary["parameters_stored"]
    if stored != after["parameters"]:
        name = "parameters in the files, with padding"
        cost_rows.append(Row(name, *_change(before["parameters"], stored, "{:,}".format)))
    cost_rows.append(Row(f"MACs for {window} tokens", *_change(before["macs"], after["macs"], short)))
    cost_rows.append(Row(f"memory with {window} tokens", *_change(before["memory"], after["memory"], size)))
    return cost_rows


def _change(before: int, after: int, write: Callable[[int], str]) -> tuple[str, str, str]:
    return write(before), write(after), f"{after / before - 1:+.1%}".replace("-", "−")


def _kept_rows(summary: Summary) -> list[Row]:
    whole = summary["whole"].items()
    kept_rows = [Row(KIND_WORDS[kind], str(row["before"]), str(row["after"]), "") for kind, row in whole]
    for kind, counts in summary["groups"].items():
        asked = f"asked {span(counts['asked'])}" if counts["after"] != counts["asked"] else ""
        kept_rows.append(Row(KIND_WORDS[kind], span(counts["before"]), span(counts["after"]), asked))
    return kept_rows


def _perplexity_rows(summary: Summary) -> list[Row]:
    if not summary["perplexity_before"] or not summary["perplexity_after"]:
        return []
    before, after = (summary[f"perplexity_{when}"] for when in ("before", "after"))
    change = f"× {after['perplexity'] / before['perplexity']:.2f}"
    return [Row("perplexity", perplexity_text(before), perplexity_text(after), change)]


def perplexity_text(measured: Mapping[str, Any]) -> str:
    """A measured perplexity with its standard error, where it has one: 36.495 ± 0.812."""
    return with_error(measured["perplexity"], measured.get("stderr"))


def with_error(value: float, stderr: float | None) -> str:
    """A number with its standard error, where it has one."""
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def measured_with_error(summary: Summary) -> bool:
    """Whether a perplexity of the summary has a standard error."""
    return any((summary.get(f"perplexity_{when}") or {}).get("stderr") for when in ("before", "after"))


def tiles(summary: Summary) -> list[Tile]:
    """The boxes of a pruning: perplexity, parameters, memory, MACs, and the speed where it was measured."""
    costs, change = summary["costs"], {row.name: row for row in rows(summary)}
    names = {"parameters": "parameters", "memory": f"memory with {costs['window']} tokens"}
    names |= {"macs": f"MACs for {costs['window']} tokens"}
    shown = [Tile("perplexity", row.change, f"{row.before} → {row.after}") for row in _perplexity_rows(summary)]
    for measure, name in names.items():
        share, row = costs["after"][measure] / costs["before"][measure], change[name]
        shown.append(Tile(name, row.change, f"{row.before} → {row.after}", share))
    return shown + speed_tiles(summary)


def speed_tiles(summary: Summary) -> list[Tile]:
    """The box of the speed, where it was measured."""
    speed = summary.get("speed")
    if not speed:
        return []
    before, after = speed["before"], speed["after"]
    return [Tile("tokens a second", f"× {after / before:.2f}", f"{before:,.0f} → {after:,.0f}")]


def errors_in_words(summary: Summary) -> list[str]:
    """What the errors of the layers are, in sentences; none where they were not measured."""
    found = next((summary[key] for key in ERROR_KEYS if summary.get(key)), None)
    if found is None:
        return []
    removed_ones = [str(layer) for layer, error in enumerate(found["attention"]) if error is None]
    windows = f"{found['windows']} windows of {found['window']} tokens"
    return [
        f"How far the vectors of the pruned model are from those of the dense model, in % of their length: the median "
        f"over the tokens of {windows}.",
        f"Removed layers: {', '.join(removed_ones)}." if removed_ones else "",
    ]


def recipe(summary: Summary) -> list[tuple[str, str]]:
    """The settings of the job: pairs of name and value, as plain text."""
    settings = summary["settings"]
    refit, calibration = settings["refit"], settings["calibration"]
    method = refit["method"]
    numbers = [] if method == "none" else [f"{k} {refit[k]:g}" for k in ("alpha", "ridge", "inputs") if refit[k]]
    windows = f"{calibration['samples']} windows of {calibration['length']} tokens of {calibrated_on(calibration)}"
    pairs = [
        ("recipe", short_name(settings["recipe"])),
        ("criterion", criterion(settings)),
        ("removed structures", structures(summary)),
        ("budget", f"{amount(summary)}, {settings['budget']['allocation']} allocation"),
        ("rounds", str(settings["rounds"])),
        ("refit", ", ".join([method, *numbers])),
        ("calibration", f"{windows}, seed {calibration['seed']}"),
        ("calibration tokens for each MLP channel", f"{summary['tokens_per_channel']:.2f}"),
    ]
    if summary["searched"]:
        first, last = (
            "not finite" if x is None else f"{x:.4f}" for x in (summary["searched"][0], summary["searched"][-1])
        )
        pairs.append(("divergence before and after the search", f"{first} and {last} nats"))
    after = summary["perplexity_after"]
    if after:
        evaluation = f"{after['windows']:,} windows of {after['window']} tokens of {short_name(summary['evaluation'])}"
        pairs.append(("perplexity on", evaluation))
    return pairs


def calibrated_on(calibration: Mapping[str, Any]) -> str:
    """The calibration text by its short name; of a mixture, the number of windows and the name of each text."""
    parts = calibration.get("mixture", ())
    if not parts:
        return short_name(calibration["source"])
    return " and ".join(f"{short_name(part['source'])} ({part['samples']})" for part in parts)


def structures(summary: Summary) -> str:
    """The structures in words of which some were removed; the asked ones where none was."""
    whole = [kind for kind, row in summary["whole"].items() if row["after"] < row["before"]]
    groups = [kind for kind, counts in summary["groups"].items() if counts["after"] != counts["before"]]
    lost = [kind for kind in groups if kind in SUBLAYER_OF_KIND and 0 in summary["groups"][kind]["after"]]
    sublayers = {SUBLAYER_OF_KIND[kind] for kind in lost}
    removed_ones = {KIND_STRUCTURES[kind] for kind in (*whole, *groups)} | sublayers
    asked = summary["settings"]["structures"]
    return in_words([structure for structure in asked if structure in removed_ones] or asked)


def criterion(settings: Mapping[str, Any]) -> str:
    """The criterion of a run; that of the experts too where experts are removed, alone where nothing else is scored."""
    scoring, names = settings["scoring"], set(settings["structures"])
    if "experts" not in names:
        return scoring["criterion"]
    of_experts = scoring["expert_criterion"]
    names -= {"expert-channels"}
    return f"{scoring['criterion']}, {of_experts} for experts" if names - {"experts", "layers"} else of_experts


def in_words(names: Iterable[str]) -> str:
    """Structures in words."""
    return " and ".join(STRUCTURE_WORDS[structure] for structure in names)


def amount(summary: Summary) -> str:
    """The budget in words: the share to remove, or the limit of a cost."""
    budget = summary["settings"]["budget"]
    if budget["target"] is not None:
        measure, limit = budget["target"]
        return f"at most {limit:,.0f} {'bytes of memory' if measure == 'memory' else MEASURE_WORDS[measure]}"
    words = {
        "groups": in_words(summary["settings"]["structures"]),
        "blocks": "the parameters of the layers",
        "model": "all parameters",
    }
    return f"remove {100 * budget['ratio']:g} % of {words[budget['ratio_of']]}"


def advice(summary: Summary) -> str:
    """The advice on the step ε of the gradient estimate; empty without advice or without an estimate."""
    return (summary["step"] or {}).get("advice") or ""


def span(counts: list[int]) -> str:
    """The number of groups in the layers: one number if all layers are equal, otherwise the range."""
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def short(number: int | float) -> str:
    """A number with a decimal prefix: 864.0 G."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000 or prefix == "P":
            return f"{number:,.0f}" if not prefix else f"{number:,.1f} {prefix}"
        number /= 1000
    raise AssertionError("the last prefix takes every number")


def size(count: int) -> str:
    """A number of bytes with a decimal prefix: 12.6 GB."""
    return f"{short(count)}B" if count >= 1000 else f"{count} B"


def short_name(name: str | None) -> str:
    """A Hub id unchanged; of a path the last part only, because a published report must not show local folders."""
    text = printable(str(name))
    return text if re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+){0,2}(:[\w.-]+)?", text) else PurePath(text).name or text


def printable(text: str) -> str:
    """The text with a replacement character for control characters and surrogates, which YAML or UTF-8 cannot hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
