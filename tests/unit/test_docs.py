"""Documents: their length, links that lead somewhere, API pages of modules that exist, tools that are pinned."""

import re
import tomllib
from pathlib import Path

import pytest

from xtoken import cli

ROOT = Path(cli.__file__).resolve().parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "pipeline/*.md", "trainer/*.md", "benchmarks/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)", _FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 150


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert ROOT in file.parents, target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs" / "api"], ids=name)
def test_api_pages_describe_modules_that_exist(page: Path) -> None:
    modules = re.findall(r"^::: xtoken\.(\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module


def test_what_builds_the_site_is_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = {re.split(r"[<>=\[]", line)[0] for line in extras["docs"]}
    lines = (ROOT / "constraints" / "docs.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert wanted <= set(pinned)
    assert not {"torch", "numpy", "pyarrow"} & set(pinned), "pages are made without importing the package"


def test_every_benchmark_has_a_row() -> None:
    """Scripts that are run, by the command of their docstring."""
    shown = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if "__main__" in path.read_text(encoding="utf-8"):
            assert f"benchmarks.{path.stem}" in shown or f"`{path.stem.split('_')[0]}_*`" in shown, path.name
    for result in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        assert f"(results/{result.name})" in shown, result.name
