"""Print docs/options.md, the table of all options, from the settings: python docs/make_options.py > docs/options.md."""

from minillm_jax.options import flag_of
from minillm_jax.recipes.recipe import PANELS, SECTIONS, Recipe, options

HEAD = """\
# Options of `prune` and `plan`

This page lists every option, its key in a recipe, its default, and what it does. `python docs/make_options.py` makes it
from `minillm_jax/settings.py`.

An option has three names: a flag of the command line, a keyword of `minillm_jax.prune` in Python (the flag with
underscores), and a key of a recipe. `minillm-jax prune MODEL --ridge 0.1`, `minillm-jax prune MODEL --set
refit.ridge=0.1`, and `mj.prune(model, text, ridge=0.1)` do the same. A setting that the run would not read is an error.
The default is that of the recipe `ours`; the other recipes (`minillm-jax recipe list`) set some options otherwise.
"""

TAIL = """\
## Options that are not settings

| option | meaning |
| --- | --- |
| `MODEL` | A local model folder or a Hub id; by default the one that a recipe names. |
| `--output` | Folder to write. It must not exist, and it appears whole or not at all. |
| `--recipe`, `--preset` | A recipe of the package, or the path of a TOML file. |
| `--set SECTION.KEY=VALUE` | One setting; may be given several times. |
| `--revision` | Branch, tag or commit of a model on the Hub. |
| `--devices` | `plan` only: the devices of the run, `v5e-8` or `h100`; this machine if unset. |
| `--json` | One JSON object on standard output instead of a table. |
| `--quiet` | No progress on standard error. |
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_table(section) for section in SECTIONS), TAIL])


def _table(section: str) -> str:
    lines = [
        f"## {PANELS[section]}: `[{section}]`",
        "",
        "| option | key | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for at, one, described in options():
        if at == section:
            flags = [flag_of(one), *("--" + alias.replace("_", "-") for alias in described.aliases)]
            value = getattr(getattr(Recipe(), section), one.name)
            words = described.help + (f" One of {', '.join(described.choices)}." if described.choices else "")
            names = ", ".join(f"`{flag}`" for flag in flags)
            lines.append(f"| {names} | `{one.name}` | {_default(value, described.spelling)} | {words} |")
    return "\n".join(lines) + "\n"


def _default(value: object, spelling: object) -> str:
    if value is None or value is False:
        return ""
    return f"`{','.join(value)}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
