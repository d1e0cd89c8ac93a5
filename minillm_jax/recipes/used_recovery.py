"""The settings that a recovery reads: one that a user gave in vain is an error."""

from collections.abc import Mapping

from minillm_jax.data.windows import check_seed
from minillm_jax.errors import InputError
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.settings import check_continuations

# Settings of the updates, which `--method refit` does not make.
UPDATES = {
    ("training", key)
    for key in (
        "loss",
        "learning_rate",
        "warmup",
        "schedule",
        "weight_decay",
        "clip",
        "validate_every",
        "activations",
        "last",
    )
}


def check(recipe: Recovery, given: Mapping[tuple[str, str], str] | None = None) -> None:
    """Check the settings as far as that is possible without the model.

    Args:
      recipe: the settings.
      given: section and key -> flag, of the settings that a user gave.

    Raises:
      InputError: a setting is out of its range, two do not suit each other, or a given one would do nothing.
    """
    recipe.computed.check()
    check_continuations(recipe.evaluation.continuations)
    check_seed(recipe.data.seed)
    recipe.computed.share(recipe.distillation.teacher is not None)
    if recipe.data.seq_len < 2:
        raise InputError(f"--seq-len must be at least 2, found {recipe.data.seq_len}")
    if recipe.data.held_out is not None and recipe.data.held_out < 0:
        raise InputError(f"--held-out must be at least 0, found {recipe.data.held_out}")
    for (section, key), flag in (given or {}).items():
        why = _idle(recipe, section, key)
        if why is not None:
            raise InputError(f"{flag} would do nothing in this run ({why}); leave it out")


def _idle(recipe: Recovery, section: str, key: str) -> str | None:
    """Why a run does not read a setting; None where it does."""
    method = recipe.training.method
    if method == "refit" and ((section, key) in UPDATES or (section == "distillation" and key != "teacher")):
        return "method refit makes no updates"
    if recipe.computed.trains_matrices and (section, key) in (("training", "clip"), ("training", "weight_decay")):
        return "--train matrices has no optimiser"
    if section == "refit" and method != "refit":
        return f"method {method}"
    if section == "adapter" and not recipe.computed.trains_adapter:
        return f"method {method} trains no adapter"
    if section == "adapter" and recipe.adapter.start is not None and key in ("rank", "alpha", "targets"):
        return "the adapter of --adapter has its own shape"
    if (section, key) == ("adapter", "dropout") and method == "forward":
        return "method forward has no dropout"
    if section == "forward" and method != "forward":
        return f"method {method}"
    if section == "distillation" and key != "teacher":
        if recipe.distillation.teacher is None:
            return "no --teacher"
        if recipe.training.loss == "ce":
            return "loss ce"
        if key == "weight" and recipe.training.loss == "kd":
            return "loss kd"
        if key == "top" and recipe.distillation.teacher_logits is None:
            return "no --teacher-logits"
    if (section, key) == ("training", "epochs") and recipe.training.steps is not None:
        return "--steps"
    if (section, key) == ("training", "activations") and method == "forward":
        return "method forward has no backward pass"
    if section == "evaluation" and key in ("window", "continuations") and recipe.evaluation.text is None:
        return "no --evaluate"
    if section == "evaluation" and key == "watch_windows" and recipe.evaluation.watch is None:
        return "no --watch"
    return None
