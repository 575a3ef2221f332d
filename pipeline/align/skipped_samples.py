"""Which samples of a capture are not in its targets, although their part is: the student cannot represent them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from xtoken.pipeline.align.plain_columns import peek
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.reader import iter_parquet, local_part
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, Part

SKIPPED_FILE = "skipped.jsonl"
_NAMED = 5
_MOST_LINES = 100_000


@dataclass(frozen=True)
class Skipped:
    """How many samples there are that no part of the targets holds, and the first of them."""

    count: int = 0
    first: tuple[str, ...] = ()


def note_skipped(capture: str, manifest: CaptureManifest, out: str, parts: Sequence[Part]) -> Skipped:
    """Count skipped samples, and name up to 100,000 of them in ``out``'s skipped.jsonl, a line each.

    Args:
        capture: folder or URL of the capture.
        manifest: the capture's.
        out: folder or URL of its targets.
        parts: committed parts of the targets.
    """
    folder, count = Folder(out), sum(part.counts.get("samples_skipped", 0) for part in parts)
    if not count:
        if folder.exists(SKIPPED_FILE):
            folder.remove(SKIPPED_FILE)
        return Skipped()
    found = list(islice(_skipped(capture, manifest, folder, parts), _MOST_LINES))
    lines = [json.dumps({"part": part, "sample_id": name}, ensure_ascii=False) for part, name in found]
    folder.replace(SKIPPED_FILE, "".join(f"{line}\n" for line in lines).encode())
    return Skipped(count, tuple(name for _, name in found[:_NAMED]))


def _skipped(
    capture: str, manifest: CaptureManifest, folder: Folder, parts: Sequence[Part]
) -> Iterator[tuple[int, str]]:
    records = {part.index: part for part in manifest.parts}
    for part in parts:
        if not part.counts.get("samples_skipped"):
            continue
        with local_part(folder, part.index, part) as path:
            held = {name for batch in iter_parquet(path, ["sample_id"]) for name in batch["sample_id"].to_pylist()}
        try:
            for batch in peek(capture, manifest, records[part.index], ["sample_id"]):
                yield from ((part.index, name) for name in batch["sample_id"].to_pylist() if name not in held)
        except XtokenError:
            continue  # it went away since: they stay counted
