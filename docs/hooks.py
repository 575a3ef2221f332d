"""Makes a site of the repository's Markdown: pages that lie outside docs/, and links that lead out of it.

A link means the same in the repository and on the site. It is resolved against the file that holds it; a file that is
a page or a picture of the site is linked there, any other file or folder in the repository (``repo_url``).
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parent.parent
# Files outside docs/ that are pages of the site, under these names.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "pipeline/README.md": "pipeline.md",
    "trainer/README.md": "trainer.md",
}
# Pages and pictures under the same names.
RESULTS = "benchmarks/results"
# The package alone, which mkdocs.yml gives to griffe: through .dev/xtoken it would walk tests and environments, too.
SOURCES = ROOT / ".venv-docs" / "sources" / "xtoken"
_PACKAGE = ("__init__.py", "cli.py", "pipeline", "trainer", "schemas")
_LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<target>[^)\s]+)(?P<after>\))")
_FENCE = re.compile(r"^(```|~~~)")


def on_startup(command: str, dirty: bool) -> None:  # noqa: ARG001
    """Link the package's modules into a folder of their own."""
    SOURCES.mkdir(parents=True, exist_ok=True)
    for name in _PACKAGE:
        link = SOURCES / name
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / name)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, measurements and their pictures among them."""
    measured = sorted(path for path in (ROOT / RESULTS).iterdir() if path.suffix in (".md", ".png", ".svg"))
    names = [path.relative_to(ROOT).as_posix() for path in measured]
    for source, name in (*PAGES.items(), *zip(names, names, strict=True)):
        if (ROOT / source).exists():
            files.append(file := File.generated(config, name, abs_src_path=str(ROOT / source)))
            if source in names or name == "changelog.md":
                file.inclusion = InclusionLevel.NOT_IN_NAV  # found by search and by links
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page, those in fenced code excepted."""
    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= bool(_FENCE.match(line))
        lines.append(line if fenced else _LINK.sub(lambda link: _rewritten(link, page, config, files), line))
    return "\n".join(lines)


def _source_of(uri: str) -> str:
    """Where in the repository a page of the site comes from."""
    inside = uri if uri.startswith(RESULTS) else f"docs/{uri}"
    return next((source for source, name in PAGES.items() if name == uri), inside)


def _rewritten(link: re.Match[str], page: Page, config: MkDocsConfig, files: Files) -> str:
    target, _, anchor = link["target"].partition("#")
    if not target or ":" in target:
        return link[0]
    here = page.file.src_uri
    source = _source_of(here)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / path).exists():
        LOG.warning("%s links %s, which does not exist", source, link["target"])
        return link[0]
    name = PAGES.get(path, path.removeprefix("docs/"))
    if files.get_file_from_path(name) is not None:
        address = posixpath.relpath(name, posixpath.dirname(here) or ".")
    else:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        address = f"{str(config.repo_url).rstrip('/')}/{kind}/main/{path}"
    return f"{link['before']}{address}{'#' + anchor if anchor else ''}{link['after']}"
