"""What every verb's configuration is made of."""

import json
import re
from collections.abc import Iterator
from datetime import date
from typing import Any, NamedTuple, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from xtoken.schemas.io.paths import Kind, plain, refuse_unusable

# What a field is, in its json_schema_extra: a path, URL or id of something that is read, or an output.
PLACE: Any = {"place": "read"}
OUT_FOLDER: Any = {"place": "folder"}
OUT_FILE: Any = {"place": "file"}
OUT_PAGE: Any = {"place": "page"}  # HTML
OUT_LOG: Any = {"place": "log"}
# Where --help shows a field, and the section of a configuration file that it may stand in; a group's fields need none.
ROWS: Any = {"section": "Rows"}
TARGETS: Any = {"section": "Targets"}
RUN: Any = {"section": "Run"}
DETAILS: Any = {"section": "Loss details"}
LAST = ("Loss details",)  # at the end of the help
# Whether a rerun of the same folder may give another value; a field without such a mark may not. Either it may, or
# what it means is recorded, and checked, in another form.
MAY_CHANGE: Any = {"resume": "may change"}
IN_PLAN: Any = {"resume": "recorded in plan.json"}
AS_HASH: Any = {"resume": "recorded as the sha256 of what it names"}
AS_FOR: Any = {"resume": "recorded as 'for'"}
COMMON: Any = {"common": True}  # what most people give: shown first
ARGUMENT: Any = {"argument": True}
ARGUMENTS: Any = {"argument": True, "many": True}  # several words on the command line


LISTS = (list[str], list[float])  # written with commas on the command line
NUMBER_OR_WORD: Any = int | str


def argument(description: str, place: Any = PLACE) -> Any:
    """A required positional field."""
    return Field(description=description, json_schema_extra=ARGUMENT | place)


def flag(name: str, field: FieldInfo) -> str:
    """A field's flag, without its dashes."""
    return (field.alias or name).replace("_", "-")


def marked(field: FieldInfo, mark: str) -> Any:
    """What a field's ``json_schema_extra`` says under a name; None when it says nothing."""
    extra = field.json_schema_extra
    return extra.get(mark) if isinstance(extra, dict) else None


def place_of(field: FieldInfo) -> str | None:
    """What is at the path that a field holds: read, folder, file, page or log; None for fields that hold none."""
    place = marked(field, "place")
    return None if place is None else str(place)


class Config(BaseModel):
    """What every verb's configuration is: closed, and never changed. Its paths are plain (``schemas.io.paths``).

    A field is a flag, or a group: a configuration of its own whose fields are flags. Names of flags are unique over all
    groups, and flags, configuration files and records on disk know nothing of groups: they hold flat names only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _said_something(cls, value: Any, info: ValidationInfo) -> Any:
        if place_of(cls.model_fields[str(info.field_name)]) is not None:
            return [plain(item) for item in value] if isinstance(value, list) else _plain(value)
        if isinstance(value, str) and not value.strip():
            raise ValueError("it is empty; is a variable unset? give a value, or leave it out")
        return value

    @classmethod
    def from_flat(cls, **values: Any) -> Self:
        """The configuration of flat names, as flags and records give them; ``to_flat`` is its inverse.

        Raises:
            ValidationError: a value is refused, a needed one is missing, or a name is unknown.
        """
        places = {leaf.name: leaf.group for leaf in leaves(cls)}
        given: dict[str, Any] = {group: {} for group in places.values() if group is not None}
        for name, value in values.items():
            group = places.get(name)
            (given if group is None else given[group])[name] = value
        return cls(**given)

    def to_flat(self) -> dict[str, Any]:
        """Every value under its flat name, groups in their order."""
        return {leaf.name: leaf.of(self) for leaf in leaves(type(self))}

    def record(self) -> dict[str, Any]:
        """``to_flat`` as JSON holds it: what a run writes down of its configuration."""
        dumped = self.model_dump(mode="json")
        found = leaves(type(self))
        return {leaf.name: (dumped if leaf.group is None else dumped[leaf.group])[leaf.name] for leaf in found}

    @classmethod
    def settings_of(cls, record: dict[str, Any]) -> dict[str, Any] | None:  # noqa: ARG003 - verbs that write one say what
        """The settings in a record that a run of this verb wrote as it began; None where it is none."""
        return None

    def changed(self, **values: Any) -> Self:
        """This configuration with other values under some flat names, checked like any other."""
        given = {leaf.name: leaf.of(self) for leaf in leaves(type(self)) if leaf.of(self) != leaf.field.default}
        return type(self).from_flat(**{**given, **values})

    def refuse_unusable_outputs(self) -> None:
        """Raise XtokenError when an output cannot be made where it is to lie."""
        for leaf in leaves(type(self)):
            kind, value = place_of(leaf.field), leaf.of(self)
            if kind not in (None, "read") and value:  # what is given is never empty
                refuse_unusable(value, cast(Kind, kind))


class Leaf(NamedTuple):
    """A field that is a flag.

    Attributes:
        group: that it stands in; None is the configuration itself.
        name: its flat name.
        field: itself.
        section: title of where ``--help`` shows it; None is the first panel.
    """

    group: str | None
    name: str
    field: FieldInfo
    section: str | None = None

    @property
    def panel(self) -> str | None:
        """Where ``--help`` shows it: what most people give stands first."""
        return None if marked(self.field, "common") else self.section

    def of(self, config: Config) -> Any:
        """Its value in a configuration."""
        return getattr(config if self.group is None else getattr(config, self.group), self.name)


def leaves(model: type[BaseModel]) -> list[Leaf]:
    """The flags of a configuration: fields of its own and those of its groups, in order."""
    return list(_leaves(model))


def _leaves(model: type[BaseModel]) -> Iterator[Leaf]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            title = field.title or name.capitalize()
            yield from (Leaf(name, inner, one, _section(one, title)) for inner, one in kind.model_fields.items())
        else:
            yield Leaf(None, name, field, _section(field, None))


def _section(field: FieldInfo, title: str | None) -> str | None:
    section = marked(field, "section") or title
    return None if section is None else str(section)


def _plain(value: str | None) -> str | None:
    return None if value is None else plain(value)


def ray_address(value: str | None) -> str | None:
    """Check a value of ``--ray``; for ``field_validator``."""
    if value is not None and value.startswith("ray://"):
        raise ValueError(
            f"{value!r} is a client connection, which a run of days must not hang on; "
            "submit the command to the cluster with 'ray job submit' and say --ray auto"
        )
    if value is not None and value not in ("local", "auto") and re.fullmatch(r"[^/:\s]+:\d+", value) is None:
        raise ValueError(f"{value!r} is not an address; say local, auto or HOST:PORT")
    return value


def named_values(value: list[str]) -> list[str]:
    """Refuse words that are not ``name=value``; for a validator of a chat template's variables."""
    for word in value:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", word, re.DOTALL):
            raise ValueError(f"{word!r} names no variable; write name=value, such as enable_thinking=false")
    return value


_TIME = re.compile(r"([1-9]\d*)([smh])")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def steps_or_time(value: Any) -> Any:
    """Read the words of a field that is a number of steps, or a time; for ``field_validator``, before its own."""
    if isinstance(value, str) and not value.isdecimal() and _TIME.fullmatch(value) is None:
        raise ValueError(f"{value!r} is neither a number of steps nor a time; write 50, 90s, 10m or 2h")
    value = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{value} steps are none; give at least 1, or a time such as 10m")
    return value


def seconds_of(value: int | str) -> int | None:
    """Seconds of a time that ``steps_or_time`` let pass; None for a number of steps."""
    found = _TIME.fullmatch(str(value))
    return None if found is None else int(found[1]) * _SECONDS[found[2]]


def a_day(value: str | None) -> str | None:
    """Refuse what is no day of ISO 8601; for a validator of what a chat template takes for today."""
    try:
        return value if value is None else date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"{value!r} is not a day; write it as 2026-07-04") from None


def arguments_of(words: list[str]) -> dict[str, Any]:
    """Variables of a chat template, of words ``name=value``: JSON values where they are such, else text."""
    pairs = (word.partition("=") for word in words)
    return {name: _json_or_text(value) for name, _, value in pairs}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
