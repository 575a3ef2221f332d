"""Settings from a file: ``--config run.yaml``. Its keys are the names of flags or fields, flat or in sections.

A record that a run wrote of itself (``run.json``, ``align.json``) is such a file, too. What the file says stands where
no flag is given: flags win over it.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from xtoken.schemas.configs.base import LISTS, Config, Leaf, flag, leaves
from xtoken.schemas.errors import XtokenError

HELP = (
    "YAML or JSON file with settings, or the run.json of a run: names of flags, flat or in sections. Flags given here "
    "win over it; relative paths start at the current folder."
)
_LIMIT = 1 << 20  # bytes
Pair = tuple[str, Any]


def read_settings(path: str, model: type[Config], repeat: str | None = None) -> dict[str, Any]:
    """Values by flat name, each of a type that its field takes.

    Args:
        path: a local file.
        model: the configuration that they are for.
        repeat: field that may have several values (see ``xtoken.schemas.ui.flags.build_each``).

    Raises:
        XtokenError: the file cannot be read, or a key of it is unknown, given twice or has a wrong value. No message
            repeats a line of the file, only keys, and values of known ones.
    """
    record = _parsed(path)
    if not isinstance(record, dict):
        raise XtokenError(f"--config {path}: expected names with values, such as 'k: 32'; see its format in --help")
    settings = model.settings_of(record)
    by_name = {name: leaf for leaf in leaves(model) for name in (leaf.name, flag(leaf.name, leaf.field))}
    values: dict[str, Any] = {}
    for key, value in _flat(path, record if settings is None else settings, model):
        leaf = by_name.get(key) or by_name.get(key.replace("_", "-"))
        if leaf is None:
            raise XtokenError(f"--config {path}: {key!r} is unknown; {_nearest(key, by_name)}")
        if leaf.name in values:
            raise XtokenError(f"--config {path}: {key!r} is given twice; remove one of them")
        values[leaf.name] = _checked(path, key, leaf, value, leaf.name == repeat)
    return {name: value for name, value in values.items() if value is not None}


def _flat(path: str, record: dict[str, Any], model: type[Config]) -> Iterator[Pair]:
    """Keys with their values; those of a section like any other."""
    found = leaves(model)
    sections = {leaf.group or (leaf.section or "").lower() for leaf in found} - {""}
    titles = {(leaf.section or "").lower() for leaf in found}  # as --help shows them
    for key, value in record.items():
        if not isinstance(value, dict):
            yield str(key), value
        elif key in sections | titles:
            yield from ((str(inner), one) for inner, one in value.items())
        else:
            known = ", ".join(sorted(sections)) or "there are none: give names of flags"
            raise XtokenError(f"--config {path}: {str(key)!r} is not a section; sections of this verb: {known}")


def _nearest(key: str, known: dict[str, Leaf]) -> str:
    names = sorted({flag(leaf.name, leaf.field) for leaf in known.values()})
    close = difflib.get_close_matches(key.replace("_", "-"), names, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"remove it, or use one of {', '.join(names)}"


def _checked(path: str, key: str, leaf: Leaf, value: Any, many: bool) -> Any:
    """The value as the command line would give it: lists are text with commas."""
    if value is None:
        return None
    field = leaf.field
    try:
        if field.annotation in LISTS:
            return _listed(value)
        for one in value if many and isinstance(value, list) else [value]:
            TypeAdapter(_type(field)).validate_python(one)
    except ValidationError as error:
        first = error.errors()[0]
        raise XtokenError(
            f"--config {path}: {key}: {first['msg']} (it is {first['input']!r}); mend it there, or remove it and give "
            f"--{flag(leaf.name, field)}"
        ) from error
    return value


def _listed(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    TypeAdapter(list[str | int | float]).validate_python(items)
    return [str(item) for item in items]


def _type(field: FieldInfo) -> Any:
    kind: Any = field.annotation
    for one in field.metadata:
        kind = Annotated[kind, one]
    return kind


def _parsed(path: str) -> Any:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        why = "it is a folder; give the run.json in it" if Path(path).is_dir() else error.strerror
        raise XtokenError(f"--config {path} cannot be read ({why}); give a local YAML or JSON file") from error
    if len(data) > _LIMIT:
        raise XtokenError(f"--config {path} has more than {_LIMIT} bytes; give a file of settings")
    try:
        text = data.decode()
        return json.loads(text, object_pairs_hook=_once) if Path(path).suffix == ".json" else _yaml(text)
    except _Twice as error:
        raise XtokenError(f"--config {path}: {error.args[0]!r} is given twice; remove one of them") from error
    except (ValueError, RecursionError) as error:
        # neither parser may quote the line at fault: it may hold what nobody is to see
        line = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)[:80]
        raise XtokenError(f"--config {path} is neither YAML nor JSON ({line}); mend it") from error


class _Twice(Exception):
    """A key that stands twice."""


def _once(pairs: list[Pair]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _Twice(name)
    return dict(pairs)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return _plain(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError("" if mark is None else f"line {mark.line + 1}") from None


def _plain(node: Any) -> Any:
    """A YAML node as JSON would hold it, keys once each and as text."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return _once([(str(key.value), _plain(value)) for key, value in node.value])
    if isinstance(node, yaml.SequenceNode):
        return [_plain(one) for one in node.value]
    return None if node is None else yaml.SafeLoader("").construct_object(node)
