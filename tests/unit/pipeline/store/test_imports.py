"""Names of the store come from the module that defines them, and from nowhere else."""

import ast
from pathlib import Path

from xtoken import cli
from xtoken.pipeline import store

ROOT = Path(cli.__file__).resolve().parent
PACKAGE = store.__name__


def test_the_store_has_no_names_of_its_own() -> None:
    assert store.__file__ is not None
    body = ast.parse(Path(store.__file__).read_text(encoding="utf-8")).body
    assert [type(node) for node in body] == [ast.Expr]  # its docstring


def test_nobody_imports_from_the_package() -> None:
    """``from xtoken.pipeline.store import verify`` would be the module, not the function in it."""
    layers = ("pipeline", "trainer", "schemas", "tests", "benchmarks", "examples")
    files = [ROOT / "cli.py", *(path for layer in layers for path in sorted((ROOT / layer).rglob("*.py")))]
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE
    ]
    assert found == []


def test_modules_give_away_only_what_they_define() -> None:
    """No ``from x import name as name`` in the store."""
    assert store.__file__ is not None
    for path in sorted(Path(store.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not [alias.name for alias in node.names if alias.asname == alias.name], path
