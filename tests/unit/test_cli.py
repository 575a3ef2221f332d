"""The command line: frozen flags, help that teaches, exit codes."""

import json

import pytest
import typer
from typer.testing import CliRunner

import cli

RUNNER = CliRunner()
VERBS = ("align", "demo", "eval", "inspect", "precompute", "project", "train", "verify")


def flags() -> dict[str, list[str]]:
    """Every verb with its arguments and options, as a user would type them."""
    group = typer.main.get_command(cli.app)
    commands: dict[str, typer.core.TyperCommand] = group.commands  # type: ignore[attr-defined]
    return {name: sorted(p.opts[0] for p in command.params if p.name != "help") for name, command in commands.items()}


def test_flags_are_frozen(request: pytest.FixtureRequest) -> None:
    # A flag is a promise: adding one means adding it here, removing one breaks somebody's script.
    frozen = json.loads((request.path.parent / "flags.json").read_text())
    assert flags() == frozen


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = RUNNER.invoke(cli.app, [verb, "--help"])
    assert result.exit_code == 0
    assert f"Example: xtoken {verb}" in " ".join(result.output.split())


def test_a_wrong_value_names_the_flag_and_the_choices() -> None:
    result = RUNNER.invoke(cli.app, ["align", "x", "--student", "y", "--out", "z", "--for", "p-kl,nonsense"])
    assert result.exit_code == 2
    assert "--for: loss 'nonsense' is unknown; choose from ce, p-kl, h-kl" in result.output


def test_json_errors_are_json() -> None:
    result = RUNNER.invoke(cli.app, ["verify", "/does/not/exist", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["kind"] == "XtokenError"
