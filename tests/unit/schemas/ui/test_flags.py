"""Configurations as flags, and words as configurations."""

import inspect

import pytest
import typer
from pydantic import Field, field_validator
from typer.testing import CliRunner

from xtoken.schemas.configs.base import Config, argument
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.flags import build, build_each, command, options


class Toy(Config):
    """A toy."""

    size: int = Field(3, ge=1, description="How large.")
    names: list[str] = Field(default=["a", "b"], description="Names.")
    fast: bool = Field(True, description="Be fast.")
    kind: str = Field(description="Kind.", alias="of-kind")
    path: str = argument("Where.")

    @field_validator("names")
    @classmethod
    def _no_dots(cls, value: list[str]) -> list[str]:
        for name in value:
            if "." in name:
                raise ValueError(f"{name!r} has a dot")
        return value


def call(*words: str, repeat: str | None = None):
    """The values that a command gets."""
    got = []
    app = typer.Typer()
    app.command()(command(lambda **values: got.append(values), options(Toy, repeat), {}))
    result = CliRunner().invoke(app, words)
    return got[0] if got else result.output


def test_fields_become_flags_arguments_first():
    found = options(Toy)
    assert [parameter.name for parameter in found] == ["path", "size", "names", "fast", "kind"]
    assert [parameter.default for parameter in found] == [inspect.Parameter.empty, 3, "a,b", True, found[0].default]


def test_words_become_values():
    assert call("here", "--of-kind", "k") == {"path": "here", "size": 3, "names": "a,b", "fast": True, "kind": "k"}
    assert call("here", "--of-kind", "k", "--no-fast", "--names", "x")["fast"] is False
    assert call("here", "--of-kind", "k", "--of-kind", "l", repeat="kind")["kind"] == ["k", "l"]
    assert "Missing option" in call("here", repeat="kind")


def test_values_become_configurations():
    values = {"path": "p", "size": 1, "names": " x, y ,", "fast": False, "of-kind": "k"}
    assert build(Toy, values).names == ["x", "y"]
    assert values["names"] == " x, y ,", "what was typed stays"
    many = build_each(Toy, {**values, "size": [1, 2]}, "size")
    assert [toy.size for toy in many] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 0}, r"--size: Input should be greater than or equal to 1 \(it is 0\)"),
        ({"names": "a,b.c"}, r"^--names: 'b\.c' has a dot$"),
        ({"nobody": 1}, r"--nobody: Extra inputs are not permitted"),
    ],
)
def test_refusals_name_the_flag(changes, said):
    with pytest.raises(XtokenError, match=said):
        build(Toy, {"path": "p", "of-kind": "k", **changes})
