"""Print docs/options.md, the table of all options, from the settings: python docs/make_options.py > docs/options.md."""

from minillm_jax.options import flag_of
from minillm_jax.recipes.recipe import PANELS, Recipe, Settings, options
from minillm_jax.recipes.recovery import Recovery

HEAD = """\
# Options

This page lists every option of `prune`, `plan` and `recover`, its key in a recipe, its default, and what it does.
`python docs/make_options.py` makes it from `minillm_jax/settings.py` and `minillm_jax/recovery/settings.py`.

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

RECOVER = """\
# Options of `recover`

`MODEL`, `--output`, `--recipe`, `--set`, `--revision`, `--json` and `--quiet` are as above. In Python these options are
keywords of `minillm_jax.recover`.
"""


def page() -> str:
    """The whole page."""
    pruning = [_table(Recipe, section) for section in Recipe.sections()]
    recovery = [_table(Recovery, section) for section in Recovery.sections()]
    return "\n".join([HEAD, "# Options of `prune` and `plan`\n", *pruning, TAIL, RECOVER, *recovery])


def _table(kind: type[Settings], section: str) -> str:
    lines = [
        f"## {PANELS[section]}: `[{section}]`",
        "",
        "| option | key | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    for at, one, described in options(kind):
        if at == section:
            flags = [flag_of(one), *("--" + alias.replace("_", "-") for alias in described.aliases)]
            value = getattr(getattr(kind(), section), one.name)
            words = described.help + (f" One of {', '.join(described.choices)}." if described.choices else "")
            names = ", ".join(f"`{flag}`" for flag in flags)
            lines.append(f"| {names} | `{one.name}` | {_default(value, described.spelling)} | {words} |")
    return "\n".join(lines) + "\n"


def _default(value: object, spelling: object) -> str:
    if value is None or value is False:
        return ""
    return f"`{','.join(map(str, value))}`" if isinstance(value, tuple) else f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
