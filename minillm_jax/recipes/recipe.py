"""A recipe: all settings of a run, from defaults, a TOML file, and what the user gives; and back to TOML."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from minillm_jax.errors import InputError, cause, reason, shortened
from minillm_jax.options import (
    BYTES,
    COUNT,
    LAYERS,
    SHARDS,
    STEP,
    WORDS,
    Option,
    flag_of,
    option_of,
    same_words,
    whole_number,
)
from minillm_jax.paths import local_path
from minillm_jax.recipes.synonyms import suggestion
from minillm_jax.settings import Budget, Data, Devices, Estimation, Evaluation, Output, Refit, Scoring

DEFAULT = "ours"

# Keys of a written recipe beside its sections: how the run was made, to repeat it and to check it.
ORIGIN = "origin"


@dataclass(frozen=True)
class Settings:
    """The settings of a command, and where they come from. A subclass adds the sections of its command.

    Attributes:
      name: of a recipe of the package, or the path of a file.
      summary: a sentence.
      origin: of a recipe that a run wrote: model, revision, hash of the calibration tokens, versions.
      own: section and key of the settings that the recipe itself names, and no option replaces.
    """

    name: str = DEFAULT
    summary: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)
    own: frozenset[tuple[str, str]] = field(default=frozenset(), compare=False)

    # The folder with the recipes of the package for this command, and the default among them.
    FOLDER: ClassVar[Path] = Path(__file__).parent
    DEFAULT: ClassVar[str] = DEFAULT

    @classmethod
    def sections(cls) -> tuple[str, ...]:
        """The names of the sections, in their order."""
        return tuple(one.name for one in fields(cls) if one.name not in ("name", "summary", ORIGIN, "own"))

    def named_by(self, section: str, key: str) -> str | None:
        """The name of the recipe where it names a setting itself; None where the user does, or nobody."""
        return self.name if (section, key) in self.own else None


@dataclass(frozen=True)
class Recipe(Settings):
    """The settings of a pruning run by section.

    Attributes:
      data, budget, scoring, gradient, refit, output, devices, evaluation: the sections.
    """

    data: Data = field(default_factory=Data)
    budget: Budget = field(default_factory=Budget)
    scoring: Scoring = field(default_factory=Scoring)
    gradient: Estimation = field(default_factory=Estimation)
    refit: Refit = field(default_factory=Refit)
    output: Output = field(default_factory=Output)
    devices: Devices = field(default_factory=Devices)
    evaluation: Evaluation = field(default_factory=Evaluation)


SECTIONS = Recipe.sections()

AnyRecipe = TypeVar("AnyRecipe", bound=Settings)

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
    "training": "Training",
    "adapter": "Adapter",
    "distillation": "Teacher",
    "forward": "Without back-propagation",
}


def options(kind: type[Settings] = Recipe) -> Iterator[tuple[str, "Field[Any]", Option]]:
    """Every option of a command: its section, its field, and what is known of it."""
    for section in kind.sections():
        for one in fields(getattr(kind(), section)):
            described = option_of(one)
            if described is not None:
                yield section, one, described


def places(kind: type[Settings] = Recipe) -> dict[str, tuple[str, str]]:
    """Keyword in Python -> section and key: the flag's name with underscores, its aliases, and the field's name."""
    keywords: dict[str, tuple[str, str]] = {}
    for section, one, described in options(kind):
        for name in (described.flag or one.name, *described.aliases):
            keywords[name] = section, one.name
    return keywords


# ------------------------------------------------------------------------------------------------------------ in


def names(kind: type[Settings] = Recipe) -> list[str]:
    """The recipes of the package for a command, the default first."""
    packaged = sorted(path.stem for path in kind.FOLDER.glob("*.toml"))
    return sorted(packaged, key=lambda name: name != kind.DEFAULT)


def load(name: str | Path = DEFAULT) -> Recipe:
    """A recipe of `prune` in the package by its name, or a TOML file by its path.

    Raises:
      InputError: there is no such recipe, or the file does not hold one.
    """
    return load_as(Recipe, name)


def load_as(kind: type[AnyRecipe], name: str | Path) -> AnyRecipe:
    """A recipe of a command; see `load`."""
    text = str(name)
    if text in names(kind):
        return _read(kind, kind.FOLDER / f"{text}.toml", text)
    path = local_path(name, "recipe")
    if not text.endswith(".toml") and "/" not in text:
        near = get_close_matches(text, names(kind), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        expected = ", ".join(names(kind))
        raise InputError(
            f"unknown recipe {shortened(text)!r}; expected one of {expected}, or a path to a .toml file{hint}"
        )
    return _read(kind, path, text)


def _read(kind: type[AnyRecipe], path: Path, name: str) -> AnyRecipe:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, tomllib.TOMLDecodeError):
            raise InputError(f"recipe {shortened(name, 300)}: not a TOML file ({cause(error)})") from error
        raise InputError(f"recipe {shortened(name, 300)}: cannot be read ({reason(error)})") from error
    recipe = kind(name, _summary(table, name), origin=_origin(table, name))
    for section, values in table.items():
        if section not in kind.sections():
            one_of_sections = f"expected one of {', '.join(kind.sections())}"
            raise InputError(f"recipe {name}: unknown section {shortened(section)!r}; {one_of_sections}")
        if not isinstance(values, dict):
            raise InputError(
                f"recipe {name}: unknown section {section!r} with the value {_quoted(values)}; expected a table of "
                f"settings, [{section}]"
            )
        for key, value in values.items():
            recipe = with_value(recipe, section, key, value, f"recipe {name}: {section}.{key}")
    named = ((section, key) for section, values in table.items() for key in values)
    return replace(recipe, own=frozenset(named))


def _summary(table: dict[str, Any], name: str) -> str:
    summary = table.pop("summary", "")
    if not isinstance(summary, str):
        raise InputError(f"recipe {name}: summary must be text, found {_quoted(summary)}")
    return summary


def _origin(table: dict[str, Any], name: str) -> dict[str, Any]:
    """What a run wrote about itself, of the types that it writes."""
    origin = table.pop(ORIGIN, {})
    if not isinstance(origin, dict):
        raise InputError(f"recipe {name}: {ORIGIN} must be a table, [{ORIGIN}], found {_quoted(origin)}")
    for key in ("model", "revision", "tokens_sha256"):
        if not isinstance(origin.get(key, ""), str):
            raise InputError(f"recipe {name}: {ORIGIN}.{key} must be text, found {_quoted(origin[key])}")
    return origin


def _quoted(value: Any) -> str:
    """A value of a user for a message, in quotes and shortened."""
    return repr(shortened(str(value)))


def with_value(recipe: AnyRecipe, section: str, key: str, value: Any, where: str) -> AnyRecipe:
    """A recipe with one more setting.

    Args:
      recipe: the recipe.
      section: a section of the recipe.
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
        keys = [name for name, one in known.items() if one is not None]
        near = next(iter(get_close_matches(key, keys, 1)), None)
        hint = f"; did you mean {near}?" if near else ""
        raise InputError(f"{shortened(where, 200)}: unknown key; expected one of {', '.join(keys)}{hint}")
    return replace(recipe, **{section: replace(settings, **{key: _value(described, value, where)})})


def _value(described: Option, value: Any, where: str) -> Any:
    spelling = described.spelling
    if spelling is not None and isinstance(value, str):
        try:
            return spelling.read(value)
        except ValueError as error:
            raise InputError(f"{where} {_quoted(value)} {error}") from None
    if spelling is WORDS and isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        return same_words(value)
    if spelling is LAYERS and isinstance(value, list | tuple) and [type(one) for one in value] == [int, int]:
        return tuple(value)
    if spelling is SHARDS and isinstance(value, int) and not isinstance(value, bool):
        return _value(described, f"{value}B", where)
    if spelling in (COUNT, BYTES, STEP) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if spelling is STEP else value
    if spelling is not None and value is not None:
        raise InputError(f"{where} must be written like {spelling.example}, found {_quoted(value)}")
    if described.kind in (int, float) and isinstance(value, str):
        value = _number(described.kind, value)
    if described.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, described.kind) or (described.kind is int and isinstance(value, bool)):
        hint = _hint(value) if described.kind is float else ""
        raise InputError(f"{where} must be {_KINDS[described.kind]}, found {_quoted(value)}{hint}")
    return _choice(described, str(value), where) if described.choices else value


def _choice(described: Option, value: str, where: str) -> str:
    """One of the words that are allowed."""
    word = described.word(value)
    place, colon, what = where.rpartition(": ")
    if word not in described.choices:
        near = get_close_matches(word.lower(), [*described.choices, *described.synonyms], 1)
        hint = f"; did you mean {described.word(near[0])}?" if near else ""
        if word in described.elsewhere:
            hint = f"; use {described.elsewhere[word]}"
        raise InputError(
            f"{place}{colon}unknown {what} {_quoted(value)}; expected one of {', '.join(described.choices)}{hint}"
        )
    return word


def _number(kind: type, text: str) -> Any:
    """The number that a text stands for; the text itself where it stands for none."""
    if kind is int:
        number = whole_number(text)
        return text if number is None else number
    try:
        return kind(text)
    except ValueError:
        return text


def _hint(value: Any) -> str:
    """The number that a percentage, or a number with a decimal comma, probably means."""
    text = str(value).strip()
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*%", text, re.ASCII):
        return f"; did you mean {float(match[1]) / 100:g}?"
    if re.fullmatch(r"\d{1,9},\d{1,9}", text, re.ASCII):
        return f"; did you mean {text.replace(',', '.')}?"
    return ""


_KINDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def with_options(recipe: AnyRecipe, given: Mapping[str, Any]) -> tuple[AnyRecipe, dict[tuple[str, str], str]]:
    """A recipe with the options that a user gave, by their keywords.

    Args:
      recipe: the recipe.
      given: keyword (see `places`) -> value.

    Returns:
      The recipe; and for each given option, its section and key -> its flag.

    Raises:
      InputError: there is no such option, or a value is of another type.
    """
    known, flags = places(type(recipe)), {}
    for keyword, value in given.items():
        if keyword not in known:
            near = suggestion(keyword, ["--" + name.replace("_", "-") for name in known])
            hint = "" if near is None else f"; did you mean {near.removeprefix('--').replace('-', '_')}?"
            raise InputError(f"unknown option {_quoted(keyword)}{hint}")
        section, key = known[keyword]
        flag = "--" + keyword.replace("_", "-")
        recipe = with_value(recipe, section, key, value, flag)
        flags[section, key] = flag
    return replace(recipe, own=recipe.own.difference(flags)), flags


def with_assignments(recipe: AnyRecipe, assignments: list[str]) -> tuple[AnyRecipe, dict[tuple[str, str], str]]:
    """A recipe with settings written as `section.key=value`, as `--set` takes them.

    Raises:
      InputError: an assignment is not written like that, or there is no such setting.
    """
    flags, sections = {}, type(recipe).sections()
    for assignment in assignments:
        match = re.fullmatch(r"\s*(\w+)\.(\w+)\s*=(.*)", assignment, re.DOTALL)
        if match is None or match[1] not in sections:
            raise InputError(
                f"--set {shortened(assignment)!r} is not understood; expected SECTION.KEY=VALUE, refit.ridge=0.1 for "
                f"example, with a section of {', '.join(sections)}"
            )
        section, key, text = match[1], match[2], match[3].strip()
        recipe = with_value(recipe, section, key, _parsed(type(recipe), section, key, text), f"--set {section}.{key}")
        flags[section, key] = f"--set {section}.{key}"
    return replace(recipe, own=recipe.own.difference(flags)), flags


def _parsed(kind: type[Settings], section: str, key: str, text: str) -> Any:
    """The text of an assignment as TOML reads it, or as a plain word."""
    described = {one.name: option for at, one, option in options(kind) if at == section}.get(key)
    if described is not None and (described.spelling is not None or described.kind is str):
        return text.strip("\"'")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# ----------------------------------------------------------------------------------------------------------- out


def as_table(recipe: Settings, keys: Mapping[str, set[str]] | None = None) -> dict[str, dict[str, Any]]:
    """The settings of a recipe as TOML holds them, by section.

    Args:
      recipe: the recipe.
      keys: section -> the keys to write; by default those that differ from the defaults.
    """
    table: dict[str, dict[str, Any]] = {}
    kind = type(recipe)
    for section, one, described in options(kind):
        value, default = (getattr(getattr(r, section), one.name) for r in (recipe, kind()))
        wanted = value != default if keys is None else one.name in keys.get(section, ())
        unset = value is None and (default is None or described.spelling is None)
        written = value if unset or described.spelling is None else described.spelling.write(value)
        if wanted and described.recorded and written is not None:
            table.setdefault(section, {})[one.name] = written
    return table


def all_keys(kind: type[Settings] = Recipe) -> dict[str, set[str]]:
    """Section -> the keys of all its settings."""
    return {section: {one.name for at, one, _ in options(kind) if at == section} for section in kind.sections()}


def to_toml(recipe: Settings, keys: Mapping[str, set[str]] | None = None) -> str:
    """A recipe as the text of a TOML file; the arguments are those of `as_table`."""
    import tomli_w

    head: dict[str, Any] = {"summary": recipe.summary} if recipe.summary else {}
    origin = {ORIGIN: dict(recipe.origin)} if recipe.origin else {}
    return tomli_w.dumps(head | as_table(recipe, keys) | origin)


def flags_of(section: str, key: str) -> str:
    """The flag of a setting."""
    return next(flag_of(one) for at, one, _ in options() if (at, one.name) == (section, key))
