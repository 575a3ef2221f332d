"""The rules of the house that a machine can check."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import xtoken
from xtoken import cli, pipeline, schemas, trainer

ROOT = Path(cli.__file__).resolve().parent
ALLOWED = {"schemas": {"schemas"}, "pipeline": {"schemas", "pipeline"}, "trainer": {"schemas", "trainer"}}
OURS = {"schemas", "pipeline", "trainer", "cli"}


def imported(path: Path) -> set[str]:
    """Our own parts that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "xtoken":
            names = [f"xtoken.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("xtoken.")}
    return found


@pytest.mark.parametrize("layer", ALLOWED)
def test_layers_import_only_what_lies_below(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & OURS <= ALLOWED[layer], path


def test_the_package_is_this_checkout() -> None:
    """By the committed link: an installed xtoken that came first would be tested instead."""
    for package in (pipeline, schemas, trainer):
        assert package.__file__ is not None
        assert Path(package.__file__).resolve().parent.parent == ROOT


def test_no_module_goes_by_its_old_name() -> None:
    """``import trainer`` would find another package of that name, or nothing, once it is installed."""
    for path in (
        path for folder in (*ALLOWED, "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & OURS, path


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import xtoken; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    assert [name for name in done.stdout.split() if name != "xtoken"] == []
    assert xtoken.__version__ == version("xtoken")


def test_only_the_command_line_prints() -> None:
    for layer in ALLOWED:
        for path in (ROOT / layer).rglob("*.py"):
            calls = (
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            )
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path
