"""The rules of the house that a machine can check."""

import ast
from pathlib import Path

import pytest

import cli
import pipeline
import schemas
import trainer

ROOT = Path(cli.__file__).parent
ALLOWED = {"schemas": {"schemas"}, "pipeline": {"schemas", "pipeline"}, "trainer": {"schemas", "trainer"}}
OURS = {"schemas", "pipeline", "trainer", "cli"}


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("layer", ALLOWED)
def test_layers_import_only_what_lies_below(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & OURS <= ALLOWED[layer], path


def test_our_folders_are_the_ones_beside_cli() -> None:
    # A package named trainer exists on PyPI; with it installed first, ours would be shadowed.
    for package in (pipeline, schemas, trainer):
        assert package.__file__ is not None
        assert Path(package.__file__).parent.parent == ROOT


def test_only_the_command_line_prints() -> None:
    for layer in ALLOWED:
        for path in (ROOT / layer).rglob("*.py"):
            calls = (
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            )
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path
