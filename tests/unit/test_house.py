"""The rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
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


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys; before = set(sys.modules); import xtoken; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    assert {name.split(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names == {"xtoken"}
    assert xtoken.__version__ == version("xtoken")


# Each folder of pipeline/ imports only from those to its left; pipeline/README.md shows them in this order.
ORDER = (
    *("tokens", "chats", "corpus", "html", "teachers", "store", "project", "executors", "query", "page", "capture"),
    *("imports", "align", "share"),
)


def modules(layer: str) -> dict[str, Path]:
    """The modules of a layer, by dotted name."""
    names = {}
    for path in sorted((ROOT / layer).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(("xtoken", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return names


def imports_of(name: str, path: Path, known: Collection[str]) -> set[str]:
    """Modules of ``known`` that a file imports when it is imported itself, or (in functions) later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {one for one in found if one in known and one != name}


def test_folders_of_the_pipeline_import_only_from_their_left() -> None:
    names = modules("pipeline")
    assert {name.split(".")[2] for name in names if name.count(".") > 1} == set(ORDER)
    upward = []
    for name, path in names.items():
        for other in imports_of(name, path, names):
            if name.count(".") > 1 and other.count(".") > 1:
                here, there = ORDER.index(name.split(".")[2]), ORDER.index(other.split(".")[2])
                upward += [f"{name} imports {other}"] if there > here else []
    assert upward == []


@pytest.mark.parametrize("layer", ALLOWED)
def test_no_module_imports_itself_by_way_of_others(layer: str) -> None:
    """Imports in functions count, too; those of a package's own ``__init__`` by its modules do not exist."""
    names = modules(layer)
    edges = {name: imports_of(name, path, names) for name, path in names.items()}
    packages = {name for name, path in names.items() if path.name == "__init__.py"}
    edges = {name: {one for one in others if one not in packages} for name, others in edges.items()}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_folder_of_the_pipeline_is_a_warehouse() -> None:
    """The largest holds less than a fifth of its lines."""
    lines = Counter(dict.fromkeys(ORDER, 0))
    for name, path in modules("pipeline").items():
        if name.count(".") > 1:
            lines[name.split(".")[2]] += path.read_text(encoding="utf-8").count("\n")
    largest, count = lines.most_common(1)[0]
    assert count < 0.2 * lines.total(), f"{largest}: {count} of {lines.total()}"


def test_the_readme_of_the_pipeline_shows_its_folders_in_order() -> None:
    text = (ROOT / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)/` ", text, re.MULTILINE)) == ORDER


def test_only_the_command_line_prints() -> None:
    for layer in ALLOWED:
        for path in (ROOT / layer).rglob("*.py"):
            calls = (
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            )
            assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path


# Names that we once had for what the field has names for. Names on disk (set_aside, cell) and ordinary words stay.
REPLACED = {
    "News": "Message",
    "Say": "Send",
    "Tell": "OnProgress",
    "tell_nobody": "ignore_progress",
    "said_why": "explained",
    "Board": "Dashboard",
    "board": "dashboard",
    "Crew": "WorkerTable",
    "RayCrew": "RayTransport",
    "crew": "workers",
    "Seat": "Slot",
    "seat": "slot",
    "seats": "slots",
    "Notice": "StatusFile",
    "notice": "status_file",
    "staff": "scale_up",
    "hire": "spawn",
    "bury": "reap",
    "bury_dead": "reap",
    "wait_for_news": "turn",
    "parting": "draining",
    "dismiss": "release",
    "aside": "quarantined",
}


def identifiers(tree: ast.AST) -> set[str]:
    """Names of functions, classes, arguments, attributes and fields, without underscores in front."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names |= {node.name, node.asname or ""}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name.lstrip("_") for name in names}


def test_names_that_were_replaced_do_not_come_back() -> None:
    assert identifiers(ast.parse("class _Crew:\n a: int\n def f(self, board): self._b.seat()")) == {
        *("Crew", "a", "f", "self", "board", "b", "seat")
    }
    assert not REPLACED.keys() & set(REPLACED.values())
    for path in [ROOT / "cli.py", *(path for layer in ALLOWED for path in sorted((ROOT / layer).rglob("*.py")))]:
        old = identifiers(ast.parse(path.read_text(encoding="utf-8"))) & REPLACED.keys()
        assert not old, f"{path.relative_to(ROOT)}: {', '.join(f'{name} is now {REPLACED[name]}' for name in old)}"
