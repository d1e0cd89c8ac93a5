"""Says which file hides the package `convert`, whose common name a file of the user may have too.

`check` is called before this package imports `convert`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from minillm_jax.errors import InputError

# A module that every installation of the package has.
_MARKER = "modeling_pruned.py"


class HiddenError(ImportError, InputError):
    """Another file or folder is found where `convert` is imported."""


def check() -> None:
    """Check that `import convert` finds the package of minillm-jax.

    Raises:
      HiddenError: it finds another file or folder, or nothing.
    """
    loaded = sys.modules.get("convert")
    spec = find_spec("convert") if loaded is None else getattr(loaded, "__spec__", None)
    folders = list(getattr(loaded, "__path__", []) if spec is None else spec.submodule_search_locations or [])
    if any(Path(folder, _MARKER).is_file() for folder in folders):
        return
    other = next(iter(folders), getattr(loaded, "__file__", None) if spec is None else spec.origin)
    if other is None:
        raise HiddenError("the package `convert` of minillm-jax is not installed; install minillm-jax again")
    raise HiddenError(
        f"{other} hides the package `convert`, which minillm-jax needs; rename it, or run Python in another folder"
    )


check()
