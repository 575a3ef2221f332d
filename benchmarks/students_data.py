"""The texts of benchmarks.students: chapters of Moby Dick from examples/data, and modules of Python's own library.

Anyone who has this repository and a Python has them. Every eighth document of a source is held out.
"""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "examples" / "data" / "moby-dick.jsonl"
MODULES = ("argparse", "calendar", "csv", "dataclasses", "fractions", "heapq", "random", "shutil", "statistics")
PAGE = 3000  # characters of a document


def write_corpus(out: Path) -> dict[str, int]:
    """Write ``train.jsonl`` and ``held-out.jsonl`` into ``out``; returns their bytes of text."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {f"book/{row['id']}": row["text"] for row in map(json.loads, BOOK.read_text(encoding="utf-8").splitlines())}
    texts |= {f"code/{name}": _source(name) for name in MODULES}
    sizes = {"train": 0, "held-out": 0}
    with open(out / "train.jsonl", "w") as train, open(out / "held-out.jsonl", "w") as held_out:
        for at, (name, text) in enumerate(_pages(texts)):
            kind, file = ("held-out", held_out) if at % 8 == 3 else ("train", train)
            file.write(json.dumps({"id": name, "text": text}) + "\n")
            sizes[kind] += len(text.encode())
    return sizes


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _pages(texts: dict[str, str]) -> list[tuple[str, str]]:
    """Pieces of about a page, cut at the end of a line."""
    pages = []
    for name, text in texts.items():
        page, number = "", 0
        for line in text.splitlines(keepends=True):
            page += line
            if len(page) >= PAGE:
                pages.append((f"{name}/{number:03d}", page))
                page, number = "", number + 1
        if page.strip():
            pages.append((f"{name}/{number:03d}", page))
    return pages
