"""What makes two runs the same run: every field of a configuration, unless a mark on the field says otherwise.

A folder is one run's. The record in it (run.json, align.json) holds the identity of the run that began it, and a rerun
whose identity differs is refused, so a field that nobody thought of can only refuse too much, never mix two runs.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from xtoken.schemas.configs.base import MAY_CHANGE, Config, leaves, marked


class Difference(NamedTuple):
    """A setting in which a run differs from the one that began the folder."""

    name: str
    there: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.there!r} there, {self.now!r} now"


def identity(config: Config) -> dict[str, Any]:
    """The values, as JSON holds them, that must be the same whenever a run goes on."""
    record = config.record()
    return {leaf.name: record[leaf.name] for leaf in leaves(type(config)) if marked(leaf.field, "resume") is None}


def may_change(model: type[BaseModel]) -> list[str]:
    """Flat names of what may differ from start to start of one run."""
    return [leaf.name for leaf in leaves(model) if marked(leaf.field, "resume") == MAY_CHANGE["resume"]]


def defaults(model: type[BaseModel], recorded: Collection[str] = ()) -> dict[str, Any]:
    """What a record means that was written before there was a field: its default.

    Args:
        model: the configuration.
        recorded: names that every record holds, in its own form.
    """
    found = {leaf.name: leaf.field.get_default(call_default_factory=True) for leaf in leaves(model)}
    known = {name: value for name, value in found.items() if value is not PydanticUndefined and name not in recorded}
    return dict(to_jsonable_python(known))


def differences(there: Mapping[str, Any], now: Mapping[str, Any], absent: Mapping[str, Any]) -> list[Difference]:
    """Settings of ``now`` that a record does not have so; where it lacks a name it means what ``absent`` says."""
    pairs = [Difference(name, there.get(name, absent.get(name)), value) for name, value in now.items()]
    return [one for one in pairs if one.there != one.now]
