"""Structured pruning of language models with forward passes alone.

>>> import minillm_jax as mj

>>> model = mj.load("path/or/hub-id")
>>> pruned = mj.prune(model, "calibration.txt", ratio=0.2)
>>> mj.save(pruned, "pruned")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minillm_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from minillm_jax.api import calibrate as calibrate
    from minillm_jax.api import evaluate as evaluate
    from minillm_jax.api import load as load
    from minillm_jax.api import prune as prune
    from minillm_jax.api import save as save
    from minillm_jax.api import score as score
    from minillm_jax.comparing import compare as compare
    from minillm_jax.data.windows import Calibration as Calibration
    from minillm_jax.errors import InputError as InputError
    from minillm_jax.generating import generate as generate
    from minillm_jax.model.loaded import Model as Model
    from minillm_jax.recipes.recipe import Recipe as Recipe
    from minillm_jax.recipes.recovery import Recovery as Recovery
    from minillm_jax.recovering import recover as recover
    from minillm_jax.scoring.score import ChosenWhilePruning as ChosenWhilePruning
    from minillm_jax.scoring.score import Scores as Scores
    from minillm_jax.settings import Budget as Budget
    from minillm_jax.settings import Estimation as Estimation
    from minillm_jax.settings import Refit as Refit
    from minillm_jax.settings import Scoring as Scoring

# Resolved on first use: `import minillm_jax.settings`, or the help of a command, must not import JAX and transformers.
_HOME = {
    "Budget": "settings",
    "Calibration": "data.windows",
    "ChosenWhilePruning": "scoring.score",
    "Estimation": "settings",
    "InputError": "errors",
    "Model": "model.loaded",
    "Recipe": "recipes.recipe",
    "Recovery": "recipes.recovery",
    "Refit": "settings",
    "Scores": "scoring.score",
    "Scoring": "settings",
    "calibrate": "api",
    "compare": "comparing",
    "evaluate": "api",
    "generate": "generating",
    "load": "api",
    "prune": "api",
    "recover": "recovering",
    "save": "api",
    "score": "api",
}

__all__ = [
    "Budget",
    "Calibration",
    "ChosenWhilePruning",
    "Estimation",
    "InputError",
    "Model",
    "Recipe",
    "Recovery",
    "Refit",
    "Scores",
    "Scoring",
    "calibrate",
    "compare",
    "evaluate",
    "generate",
    "load",
    "prune",
    "recover",
    "save",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
