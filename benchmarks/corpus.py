"""Real text for measurements of the store: prose, a technical book in many languages, and code.

Prose is the demo's; the book is the Debian Administrator's Handbook (GPL-2+ or CC BY-SA 3.0), of which Debian's
package holds translations, a different section from each; code is Python's own standard library. Nothing of it is
committed: the same packages give the same file.

    python -m benchmarks.corpus OUT.jsonl [--handbook debian-handbook.deb] [--scale 1.0]
"""

import argparse
import json
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Those whose translation covers nearly all of the book.
LANGUAGES = (
    *("ar-MA", "de-DE", "en-US", "es-ES", "fr-FR", "id-ID", "it-IT", "ja-JP", "nb-NO"),
    *("nl-NL", "pl-PL", "pt-BR", "ru-RU", "sv-SE", "vi-VN", "zh-CN"),
)
CODE = ("argparse.py", "dataclasses.py", "heapq.py", "shutil.py", "textwrap.py", "statistics.py")
PROSE_BYTES, BOOK_BYTES, CODE_BYTES = 75_000, 17_500, 16_500


class _Text(HTMLParser):
    """Paragraphs, headings, list items and listings of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        """Leave out what is no text of the page; paragraphs end lines."""
        self._skipped += tag in ("script", "style", "head")
        if tag in ("p", "h1", "h2", "h3", "li", "pre"):
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """See ``handle_starttag``."""
        self._skipped -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        if not self._skipped:
            self.pieces.append(data)


def page_text(page: str) -> str:
    """The readable text of an HTML page, one paragraph a line."""
    parser = _Text()
    parser.feed(page)
    lines = (" ".join(line.split()) for line in "".join(parser.pieces).splitlines())
    return "\n".join(line for line in lines if line)


def cut(text: str, size: int) -> str:
    """At most ``size`` bytes of text, ending at a line."""
    data = text.encode()
    return text if len(data) <= size else data[:size].decode(errors="ignore").rsplit("\n", 1)[0]


def prose(size: int) -> Iterator[tuple[str, str]]:
    """Chapters of Moby-Dick."""
    for line in (ROOT / "examples" / "data" / "moby-dick.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if size < 1000:
            return
        text = cut(record["text"], size)
        size -= len(text.encode())
        yield f"prose-{record['id']}", text


def book(folder: Path, size: int) -> Iterator[tuple[str, str]]:
    """Sections of the handbook, other ones in each language."""
    html = folder / "usr" / "share" / "doc" / "debian-handbook" / "html"
    for at, language in enumerate(LANGUAGES):
        pages = sorted((html / language).glob("sect.*.html"))
        chosen = pages[at * 3 % len(pages) :: len(LANGUAGES)]
        text = "\n\n".join(page_text(page.read_text(encoding="utf-8")) for page in chosen)
        yield f"book-{language}", cut(text, size)


def code(size: int) -> Iterator[tuple[str, str]]:
    """Modules of Python's standard library."""
    for name in CODE:
        yield f"code-{name}", cut((Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8"), size)


def unpack_handbook(deb: Path | None, folder: Path) -> None:
    """Debian's package, fetched unless given."""
    if deb is None:
        subprocess.run(["apt-get", "download", "debian-handbook"], cwd=folder, check=True)
        (deb,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)


def main() -> None:
    """Write one JSON object per document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--handbook", type=Path, help="Debian's package; fetched with apt-get when left out")
    parser.add_argument("--scale", type=float, default=1.0, help="how much of each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        unpack_handbook(options.handbook, Path(work))
        sizes = [int(size * options.scale) for size in (PROSE_BYTES, BOOK_BYTES, CODE_BYTES)]
        documents = [*prose(sizes[0]), *book(Path(work), sizes[1]), *code(sizes[2])]
    with options.out.open("w", encoding="utf-8") as out:
        for name, text in documents:
            out.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
    print(f"{len(documents)} documents, {sum(len(text.encode()) for _, text in documents)} bytes")


if __name__ == "__main__":
    main()
