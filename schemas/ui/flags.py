"""How a configuration becomes flags, and words of the command line a configuration."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.markup import escape

from xtoken.schemas.configs.base import (
    LAST,
    LISTS,
    NUMBER_OR_WORD,
    Config,
    Leaf,
    flag,
    leaves,
    marked,
    place_of,
)
from xtoken.schemas.errors import TRACEBACK, XtokenError, named
from xtoken.schemas.ui.config_file import HELP, read_settings
from xtoken.schemas.ui.terminal import close_streams, open_streams, remarks

C = TypeVar("C", bound=Config)


class App(typer.Typer):
    """An application whose standard streams are fit for use, and that ends in one line whatever happens."""

    def __call__(self, *words: Any, **options: Any) -> Any:
        """See ``typer.Typer``."""
        open_streams()
        try:
            return super().__call__(*words, **options)
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            told = named(error)
            remarks(soft_wrap=True).out(f"error: {told}", highlight=False)
            raise SystemExit(told.exit_code) from error
        finally:
            close_streams()


def options(model: type[Config], repeat: str | None = None) -> list[inspect.Parameter]:
    """One typer parameter per field of a configuration, arguments first.

    Args:
        model: the configuration.
        repeat: field whose flag may be given several times, one configuration for each (see ``build_each``).
    """
    parameters = []
    for leaf in sorted(leaves(model), key=_rank):
        name, field = leaf.name, leaf.field
        kind: Any = field.annotation
        default: Any = inspect.Parameter.empty if field.default is PydanticUndefined else field.default
        if kind in LISTS and not _many(field):
            kind, default = str, default if default is inspect.Parameter.empty else ",".join(map(str, default))
        if kind == NUMBER_OR_WORD:  # words are read by the field itself
            kind, default = str, default if default is inspect.Parameter.empty else str(default)
        if default == "":  # what is left out is not what a variable that is unset gives
            kind, default = kind | None, None
        if name == repeat:
            kind = list[kind]
        annotation = Annotated[kind, _info(leaf, repeat)]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    # Arguments stand first on the command line whatever class declared them.
    return sorted(parameters, key=lambda p: not isinstance(p.annotation.__metadata__[0], type(typer.Argument())))


def _rank(leaf: Leaf) -> int:
    """Common flags stand first in the help, details of losses last."""
    return 0 if leaf.panel is None else 2 if leaf.panel in LAST else 1


def _info(leaf: Leaf, repeat: str | None) -> Any:
    name, field = leaf.name, leaf.field
    if _positional(field):
        return typer.Argument(help=escape(field.description or ""))
    shown = f"--{flag(name, field)}"
    if field.annotation is bool and field.default is True:
        shown = f"{shown}/--no-{flag(name, field)}"
    again = " Give it again for one after the other." if name == repeat else ""
    extra = field.json_schema_extra
    choices = extra.get("choices") if isinstance(extra, dict) else None
    metavar = f"[{'|'.join(map(str, choices))}]" if isinstance(choices, list) else None
    return typer.Option(shown, help=escape(f"{field.description}{again}"), metavar=metavar, rich_help_panel=leaf.panel)


def _positional(field: FieldInfo) -> bool:
    """Whether it is an argument, which no flag names."""
    return bool(marked(field, "argument"))


def _many(field: FieldInfo) -> bool:
    """Whether an argument takes several words."""
    return bool(marked(field, "many"))


def build(model: type[C], values: dict[str, Any]) -> C:
    """The configuration that words of the command line make; lists are still text.

    Raises:
        XtokenError: a value is refused; the message names its flag.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for _, name, field, _ in leaves(model):
        if field.annotation in LISTS and name in given:
            given[name] = _items(given[name], field)
    try:
        return model.from_flat(**given)
    except ValidationError as error:
        raise XtokenError(_refusal(model, error)) from error


def _items(given: Any, field: FieldInfo) -> list[str]:
    """What stands between the commas. An empty path stays, to be refused: a list is not to shrink by an unset name."""
    words = given if isinstance(given, list) else [given]
    items = [item.strip() for word in words for item in str(word).split(",")]
    if place_of(field) is not None and (any(items) or field.is_required()):
        return items
    return [item for item in items if item]


def build_each(model: type[C], values: dict[str, Any], repeat: str | None) -> list[C]:
    """One configuration for each value of the flag that may be repeated.

    Raises:
        XtokenError: as ``build``.
    """
    if repeat is None:
        return [build(model, values)]
    return [build(model, {**values, repeat: value}) for value in values[repeat]]


def _refusal(model: type[Config], error: ValidationError) -> str:
    first = error.errors()[0]
    found = {(group, name): field for group, name, field, _ in leaves(model)}
    place = [str(part) for part in first["loc"]]
    if place and place[0] in {group for group, _ in found}:
        group, place = place[0], place[1:]
    else:
        group = None
    name = place[0] if place else ""
    known = found.get((group, name))
    where = f"--{flag(name, known)}: " if known is not None else f"--{name}: " * bool(name)
    where = where.removeprefix("--").upper() if known is not None and _positional(known) else where
    given = f" (it is {first['input']!r})" if first["type"] != "value_error" else ""
    return where + first["msg"].removeprefix("Value error, ") + given


def config_option(model: type[Config], repeat: str | None = None) -> inspect.Parameter:
    """``--config FILE``: what the file says becomes the default of every parameter that is not given."""
    read = functools.partial(_read_defaults, model, repeat)
    read.__annotations__ = {"context": typer.Context, "path": str | None}
    shown = typer.Option("--config", help=HELP, metavar="FILE", is_eager=True, callback=read)
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, shown]
    )


def _read_defaults(model: type[Config], repeat: str | None, context: typer.Context, path: str | None) -> str | None:
    if path is None or context.resilient_parsing:  # completion asks, and nobody reads an error
        return path
    try:
        values = read_settings(path, model, repeat)
    except XtokenError as error:
        remarks(soft_wrap=True).out(f"error: {error}", highlight=False)
        raise typer.Exit(error.exit_code) from error
    context.default_map = {
        leaf.name: _typed(values[leaf.name], leaf, repeat) for leaf in leaves(model) if leaf.name in values
    }
    return path


def _typed(value: Any, leaf: Leaf, repeat: str | None) -> Any:
    """A value of a file as a word of the command line, of which a list is one."""
    if leaf.name == repeat:
        return value if isinstance(value, list) else [value]
    return ",".join(value) if leaf.field.annotation in LISTS and not _many(leaf.field) else value


def words_of(config: Config) -> list[str]:
    """The words of the command line that make a configuration; fields at their default are left out."""
    words, flags = list[str](), list[str]()
    for leaf in leaves(type(config)):
        value, shown = leaf.of(config), f"--{flag(leaf.name, leaf.field)}"
        if value == leaf.field.default:
            continue
        if _positional(leaf.field):
            words += value if _many(leaf.field) else [_text(value)]
        elif isinstance(value, bool):
            flags.append(shown if value else f"--no-{shown.removeprefix('--')}")
        else:
            flags += [shown, _text(value)]
    return words + flags


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def command(
    function: Callable[..., None], parameters: list[inspect.Parameter], switches: dict[str, Any]
) -> Callable[..., None]:
    """``function`` as typer takes it: with the parameters, then switches (name to annotation) that default to off."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default=False, annotation=kind) for name, kind in switches.items()]
    shown: Any = function
    shown.__signature__ = inspect.Signature([*parameters, *added])
    shown.__annotations__ = {parameter.name: parameter.annotation for parameter in [*parameters, *added]}
    return function
