"""Command-line options made from the settings: flags, help, defaults and completion come from `settings` alone."""

import inspect
from collections.abc import Callable
from dataclasses import Field
from typing import Annotated, Any, no_type_check

import typer

from minillm_jax.options import Option
from minillm_jax.recipes.recipe import PANELS, Recipe, Settings, options
from minillm_jax.recipes.synonyms import SYNONYMS as SYNONYMS

COMMON = "Common options"
SHOW = "Output and help"

# The options that `--help` shows, in this order; `--help-all` shows all options.
COMMON_ORDER = (
    "ratio",
    "calibration",
    "data",
    "teacher",
    "output",
    "recipe",
    "assignments",
    "structures",
    "allocation",
    "method",
    "loss",
    "steps",
    "learning_rate",
    "text",
    "watch",
    "format",
    "dtype",
)


def with_settings(command: Callable[..., None], kind: type[Settings] = Recipe) -> Callable[..., None]:
    """A command whose `**given` are the options of all settings of a kind of recipe, by the names of their flags.

    Its own parameters come first. Those that are not common are shown by `--help-all` only.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    arguments = [p for p in own if p.default is p.empty or isinstance(_info(p), typer.models.ArgumentInfo)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    rest = [p.replace(kind=keyword) for p in own if p not in arguments]
    rest += [_parameter(kind, *place) for place in options(kind)]
    rank = {name: number for number, name in enumerate(COMMON_ORDER)}
    parameters = [*arguments, *sorted(rest, key=lambda p: rank.get(_field_name(p), len(rank)))]

    def called(**values: Any) -> None:
        named = {p.name: values.pop(p.name) for p in own}
        command(**named, **{name: value for name, value in values.items() if value is not None})

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def _info(parameter: inspect.Parameter) -> Any:
    return parameter.annotation.__metadata__[0]


def _field_name(parameter: inspect.Parameter) -> str:
    return getattr(_info(parameter), "field_name", parameter.name)


def _parameter(kind: type[Settings], section: str, one: "Field[Any]", described: Option) -> inspect.Parameter:
    """The parameter of one setting, None where the user does not give it."""
    name = described.flag or one.name
    flags = ["--" + flag.replace("_", "-") for flag in (name, *described.aliases)]
    info = typer.Option(
        *flags,
        help=f"{described.help} {_default(kind, section, one, described)}".strip(),
        rich_help_panel=COMMON if described.common else PANELS[section],
        hidden=not described.common,
        metavar=None if described.kind is bool else _metavar(described),
        autocompletion=_completion(described.choices) if described.choices else None,
        show_default=False,
    )
    info.field_name = one.name  # pyright: ignore[reportAttributeAccessIssue]
    read = bool if described.kind is bool else str  # numbers are read by the recipe, which says what it expected
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[read | None, info]
    )


def _default(kind: type[Settings], section: str, one: "Field[Any]", described: Option) -> str:
    value = getattr(getattr(kind(), section), one.name)
    if described.kind is bool or (value is None and (described.spelling is None or one.name.startswith("target"))):
        return ""
    spelled = value if described.spelling is None else described.spelling.write(value) if value is not None else None
    if spelled is None:
        return ""
    text = ",".join(spelled) if isinstance(spelled, list) else f"{spelled:g}" if isinstance(spelled, float) else spelled
    return f"Default: {text} (recipe {kind.DEFAULT})."


def _metavar(described: Option) -> str:
    if described.choices:
        return f"[{'|'.join(described.choices)}]"
    if described.spelling is not None:
        return described.spelling.example
    return {float: "NUMBER", int: "COUNT", str: "TEXT"}[described.kind]


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


# typer recognises the parameter by this annotation, and passes an object of another class.
@no_type_check
def show_all(context: typer.Context, wanted: bool) -> bool:
    """`--help-all`: the help with every option, each in its panel."""
    if not wanted:
        return wanted
    for parameter in context.command.params:
        if getattr(parameter, "hidden", False):
            parameter.hidden = False  # pyright: ignore[reportAttributeAccessIssue]
    typer.echo(context.get_help())
    raise typer.Exit
