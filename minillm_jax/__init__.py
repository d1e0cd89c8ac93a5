"""Structured pruning of language models with forward passes alone.

>>> import minillm_jax as mj

>>> model = mj.load("path/or/hub-id")
>>> calibration = mj.calibrate(model, "text.txt")
>>> scores = mj.score(model, calibration, mj.Scoring("obs"))
>>> pruned = mj.prune(model, scores, 0.2, refit=mj.Refit(), calibration=calibration)
>>> mj.save(pruned, "pruned")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm_jax.api import calibrate as calibrate
    from minillm_jax.api import evaluate as evaluate
    from minillm_jax.api import load as load
    from minillm_jax.api import prune as prune
    from minillm_jax.api import save as save
    from minillm_jax.budget.budget import Budget as Budget
    from minillm_jax.data.windows import Calibration as Calibration
    from minillm_jax.errors import InputError as InputError
    from minillm_jax.model.loaded import Model as Model
    from minillm_jax.pruning.refit import Refit as Refit
    from minillm_jax.scoring.gradient.settings import Estimation as Estimation
    from minillm_jax.scoring.score import Scores as Scores
    from minillm_jax.scoring.score import Scoring as Scoring
    from minillm_jax.scoring.score import score as score

__version__ = "0.1.0"

# Resolved on first use: `import minillm_jax.config`, or the help of a command, must not import JAX and transformers.
_HOME = {
    "Budget": "budget.budget",
    "Calibration": "data.text",
    "Estimation": "scoring.gradient.settings",
    "InputError": "errors",
    "Model": "model.loaded",
    "Refit": "pruning.refit",
    "Scores": "scoring.score",
    "Scoring": "scoring.score",
    "calibrate": "api",
    "evaluate": "api",
    "load": "api",
    "prune": "api",
    "save": "api",
    "score": "scoring.score",
}

__all__ = [
    "Budget",
    "Calibration",
    "Estimation",
    "InputError",
    "Model",
    "Refit",
    "Scores",
    "Scoring",
    "calibrate",
    "evaluate",
    "load",
    "prune",
    "save",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
