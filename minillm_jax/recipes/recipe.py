"""A recipe: all settings of a run, from defaults, a TOML file, and what the user gives; and back to TOML."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minillm_jax.errors import InputError, cause, one_of, shortened
from minillm_jax.options import BYTES, COUNT, LAYERS, STEP, WORDS, Option, flag_of, option_of
from minillm_jax.paths import local_path
from minillm_jax.settings import Budget, Data, Devices, Estimation, Evaluation, Output, Refit, Scoring

FOLDER = Path(__file__).parent
DEFAULT = "ours"

# Keys of a written recipe beside its sections: how the run was made, to repeat it and to check it.
ORIGIN = "origin"


@dataclass(frozen=True)
class Recipe:
    """The settings of a run by section, and where they come from.

    Attributes:
      name: of a recipe of the package, or the path of a file.
      summary: a sentence.
      data, budget, scoring, gradient, refit, output, devices, evaluation: the sections.
      origin: of a recipe that a run wrote: model, revision, hash of the calibration tokens, versions.
    """

    name: str = DEFAULT
    summary: str = ""
    data: Data = field(default_factory=Data)
    budget: Budget = field(default_factory=Budget)
    scoring: Scoring = field(default_factory=Scoring)
    gradient: Estimation = field(default_factory=Estimation)
    refit: Refit = field(default_factory=Refit)
    output: Output = field(default_factory=Output)
    devices: Devices = field(default_factory=Devices)
    evaluation: Evaluation = field(default_factory=Evaluation)
    origin: Mapping[str, Any] = field(default_factory=dict)


SECTIONS = tuple(one.name for one in fields(Recipe) if one.name not in ("name", "summary", ORIGIN))

# The heading of each section in help.
PANELS = {
    "data": "Data",
    "budget": "What to remove",
    "scoring": "Criterion",
    "gradient": "Gradient estimate",
    "refit": "Refit",
    "output": "Output",
    "devices": "Devices",
    "evaluation": "Evaluation",
}


def options() -> Iterator[tuple[str, "Field[Any]", Option]]:
    """Every option: its section, its field, and what is known of it."""
    for section in SECTIONS:
        for one in fields(getattr(Recipe(), section)):
            described = option_of(one)
            if described is not None:
                yield section, one, described


def places() -> dict[str, tuple[str, str]]:
    """Keyword in Python -> section and key: the flag's name with underscores, its aliases, and the field's name."""
    keywords: dict[str, tuple[str, str]] = {}
    for section, one, described in options():
        for name in (described.flag or one.name, *described.aliases):
            keywords[name] = section, one.name
    return keywords


# ------------------------------------------------------------------------------------------------------------ in


def names() -> list[str]:
    """The recipes of the package, the default first."""
    packaged = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return sorted(packaged, key=lambda name: name != DEFAULT)


def load(name: str | Path = DEFAULT) -> Recipe:
    """A recipe of the package by its name, or a TOML file by its path.

    Raises:
      InputError: there is no such recipe, or the file does not hold one.
    """
    text = str(name)
    packaged = FOLDER / f"{text}.toml"
    if re.fullmatch(r"[\w-]+", text) and packaged.is_file():
        return _read(packaged, text)
    path = local_path(name, "recipe")
    if not text.endswith(".toml") and "/" not in text:
        near = get_close_matches(text, names(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"unknown recipe {shortened(text)!r}; expected one of {', '.join(names())}, or a path to a .toml file{hint}"
        )
    return _read(path, text)


def _read(path: Path, name: str) -> Recipe:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {name}: cannot be read ({cause(error)})") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {name}: not a TOML file ({cause(error)})") from error
    recipe = Recipe(name, str(table.pop("summary", "")), origin=table.pop(ORIGIN, {}))
    for section, values in table.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise InputError(f"recipe {name}: unknown section {section!r}; expected one of {', '.join(SECTIONS)}")
        for key, value in values.items():
            recipe = with_value(recipe, section, key, value, f"recipe {name}: {section}.{key}")
    return recipe


def with_value(recipe: Recipe, section: str, key: str, value: Any, where: str) -> Recipe:
    """A recipe with one more setting.

    Args:
      recipe: the recipe.
      section: of `SECTIONS`.
      key: name of a field of the section.
      value: as TOML or the command line gives it; its spelling is read here.
      where: the flag, or file and key, named in errors.

    Raises:
      InputError: there is no such setting, or the value is of another type.
    """
    settings = getattr(recipe, section)
    known = {one.name: option_of(one) for one in fields(settings)}
    described = known.get(key)
    if described is None:
        keys = ", ".join(name for name, one in known.items() if one is not None)
        raise InputError(f"{where}: unknown key; expected one of {keys}")
    return replace(recipe, **{section: replace(settings, **{key: _value(described, value, where)})})


def _value(described: Option, value: Any, where: str) -> Any:
    spelling = described.spelling
    if spelling is not None and isinstance(value, str):
        try:
            return spelling.read(value)
        except ValueError as error:
            raise InputError(f"{where} {shortened(value)!r} {error}") from None
    if spelling is WORDS and isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        return tuple(value)
    if spelling is LAYERS and isinstance(value, list | tuple) and [type(one) for one in value] == [int, int]:
        return tuple(value)
    if spelling in (COUNT, BYTES, STEP) and isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if spelling is not None and value is not None:
        raise InputError(f"{where} must be written like {spelling.example}, found {shortened(str(value))!r}")
    if described.kind in (int, float) and isinstance(value, str):
        value = _number(described.kind, value)
    if described.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, described.kind) or (described.kind is int and isinstance(value, bool)):
        raise InputError(f"{where} must be {_KINDS[described.kind]}, found {shortened(str(value))!r}")
    if described.choices:
        one_of(where, str(value), described.choices)
    return value


def _number(kind: type, text: str) -> Any:
    """The number that a text stands for; the text itself where it stands for none."""
    try:
        return kind(text)
    except ValueError:
        return text


_KINDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def with_options(recipe: Recipe, given: Mapping[str, Any]) -> tuple[Recipe, dict[tuple[str, str], str]]:
    """A recipe with the options that a user gave, by their keywords.

    Args:
      recipe: the recipe.
      given: keyword (see `places`) -> value.

    Returns:
      The recipe; and for each given option, its section and key -> its flag.

    Raises:
      InputError: there is no such option, or a value is of another type.
    """
    known, flags = places(), {}
    for keyword, value in given.items():
        if keyword not in known:
            near = get_close_matches(keyword, known, 1)
            raise InputError(f"unknown option {keyword!r}" + (f"; did you mean {near[0]}?" if near else ""))
        section, key = known[keyword]
        flag = "--" + keyword.replace("_", "-")
        recipe = with_value(recipe, section, key, value, flag)
        flags[section, key] = flag
    return recipe, flags


def with_assignments(recipe: Recipe, assignments: list[str]) -> tuple[Recipe, dict[tuple[str, str], str]]:
    """A recipe with settings written as `section.key=value`, as `--set` takes them.

    Raises:
      InputError: an assignment is not written like that, or there is no such setting.
    """
    flags = {}
    for assignment in assignments:
        match = re.fullmatch(r"\s*(\w+)\.(\w+)\s*=(.*)", assignment, re.DOTALL)
        if match is None or match[1] not in SECTIONS:
            raise InputError(
                f"--set {shortened(assignment)!r} is not understood; expected SECTION.KEY=VALUE, refit.ridge=0.1 for "
                f"example, with a section of {', '.join(SECTIONS)}"
            )
        section, key, text = match[1], match[2], match[3].strip()
        recipe = with_value(recipe, section, key, _parsed(section, key, text), f"--set {section}.{key}")
        flags[section, key] = f"--set {section}.{key}"
    return recipe, flags


def _parsed(section: str, key: str, text: str) -> Any:
    """The text of an assignment as TOML reads it, or as a plain word."""
    described = {one.name: option for at, one, option in options() if at == section}.get(key)
    if described is not None and (described.spelling is not None or described.kind is str):
        return text.strip("\"'")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# ----------------------------------------------------------------------------------------------------------- out


def as_table(recipe: Recipe, keys: Mapping[str, set[str]] | None = None) -> dict[str, dict[str, Any]]:
    """The settings of a recipe as TOML holds them, by section.

    Args:
      recipe: the recipe.
      keys: section -> the keys to write; by default those that differ from the defaults.
    """
    table: dict[str, dict[str, Any]] = {}
    for section, one, described in options():
        value, default = (getattr(getattr(r, section), one.name) for r in (recipe, Recipe()))
        wanted = value != default if keys is None else one.name in keys.get(section, ())
        unset = value is None and (default is None or described.spelling is None)
        written = value if unset or described.spelling is None else described.spelling.write(value)
        if wanted and described.recorded and written is not None:
            table.setdefault(section, {})[one.name] = written
    return table


def all_keys() -> dict[str, set[str]]:
    """Section -> the keys of all its settings."""
    return {section: {one.name for at, one, _ in options() if at == section} for section in SECTIONS}


def to_toml(recipe: Recipe, keys: Mapping[str, set[str]] | None = None) -> str:
    """A recipe as the text of a TOML file; the arguments are those of `as_table`."""
    import tomli_w

    head: dict[str, Any] = {"summary": recipe.summary} if recipe.summary else {}
    origin = {ORIGIN: dict(recipe.origin)} if recipe.origin else {}
    return tomli_w.dumps(head | as_table(recipe, keys) | origin)


def flags_of(section: str, key: str) -> str:
    """The flag of a setting."""
    return next(flag_of(one) for at, one, _ in options() if (at, one.name) == (section, key))
