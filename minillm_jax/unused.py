"""Options that would do nothing beside the others: whoever gives one expects something else than what would happen."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from minillm_jax.errors import InputError
from minillm_jax.scoring.criteria import CRITERIA, Criterion

DIRECTIONS = ("directions", "distribution", "rank", "per_sequence", "directions_per_step", "memory", "rng")
RESTORATION = ("alpha", "ridge", "inner", "solver")
REDUCTIONS = ("activation_norm", "within", "across")


def check(given: Collection[str], chosen: Mapping[str, Any]) -> None:
    """Whether all options that were given do something.

    Args:
      given: names of options that somebody gave.
      chosen: what all options are, those of the preset too.

    Raises:
      InputError: one does not.
    """
    criterion = CRITERIA.get(chosen["criterion"])
    if criterion is None:
        return  # whoever takes the name refuses it
    if chosen["factors"] is not None:
        criterion = replace(criterion, factors=tuple(chosen["factors"].split(",")))
    for idle, why in _idle(criterion, chosen):
        for option in idle:
            if option in given:
                raise InputError(f"{why}, so --{option.replace('_', '-')} would do nothing; leave it out")


def _idle(criterion: Criterion, chosen: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Options that do nothing, and why."""
    name = chosen["criterion"]
    if chosen["structures"] == "layers":
        yield ("criterion", "factors", "refit", "rounds"), "whole layers go by the loss without them"
    if not criterion.estimates:
        yield ("difference", "space", *DIRECTIONS, "epsilon", "checkpoint"), f"the criterion {name} takes no gradient"
    difference = chosen["difference"] or criterion.difference
    if difference == "exact":
        yield (*DIRECTIONS, "epsilon"), "the exact gradient takes no directions"
    if difference == "jvp":
        yield ("epsilon",), "a derivative in forward mode takes no step"
    if chosen["space"] != "low-rank":
        yield ("rank",), "only directions of low rank have a rank"
    if chosen["refit"] == "none" and name != "obs":
        yield RESTORATION, "nothing is refitted"
    if criterion.by_gates or name in ("obs", "random"):
        yield REDUCTIONS, f"the criterion {name} has no scores of single weights"
    if "activation" not in criterion.factors:
        yield ("activation_norm",), f"the criterion {name} looks at no activations"
    if chosen["evaluate"] is None:
        yield ("window",), "nothing is evaluated"
