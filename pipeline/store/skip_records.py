"""What an artifact does not hold, and why: one JSON object per line, in a file beside the parts.

``skipped.jsonl`` of targets: samples of the capture that the student cannot represent; of a capture: conversations that
the teacher's template refuses, or that are too long. ``bad.jsonl`` of a capture: documents of the corpus that were
dropped, or mended, under ``--on-bad skip``. All follow from the input alone, so a
run that is killed, resumed or spread over machines writes the same bytes. An artifact without any has no such file.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from xtoken.pipeline.store.files import Folder
from xtoken.schemas.errors import VerificationError

SKIPPED_FILE, BAD_FILE = "skipped.jsonl", "bad.jsonl"
SKIPS = "skips"  # folder of a capture's records by part, of which the one is made
UNRECORDED = "not recorded"  # by releases before 0.6
_LONGEST = 200  # of a reason, which is counted
_LONGEST_LINE = 1 << 20  # no record of ours is near it: a longer line is refused as damage


def write_records(folder: Folder, name: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Put these records, in their order, in the place of what is there; of none there is no file."""
    text = "".join(map(record_line, records))
    if text:
        folder.replace(name, text.encode())
    elif folder.exists(name):
        folder.remove(name)


def keep_skips(folder: Folder, part: int, records: Iterable[Mapping[str, Any]]) -> None:
    """Record what a part lacks, before the part is committed; of one part it is always the same."""
    folder.make(SKIPS)
    write_records(folder, f"{SKIPS}/part-{part:05d}.jsonl", ({"part": part, **record} for record in records))


def join_skips(folder: Folder, parts: Iterable[int]) -> None:
    """Make ``skipped.jsonl`` of the records of these parts, in their order."""
    lines = b"".join(folder.read(f"{SKIPS}/part-{part:05d}.jsonl") for part in parts)
    if lines:
        folder.replace(SKIPPED_FILE, lines)
    elif folder.exists(SKIPPED_FILE):
        folder.remove(SKIPPED_FILE)


def count_reasons(folder: Folder, name: str) -> dict[str, int]:
    """How many records there are of each reason, most first; empty where there is no file.

    Raises:
        VerificationError: a line is not a record.
    """
    reasons = (str(record.get("reason", UNRECORDED))[:_LONGEST] for record in read_records(folder, name))
    return dict(sorted(Counter(reasons).items(), key=lambda item: (-item[1], item[0])))


def read_records(folder: Folder, name: str) -> Iterator[dict[str, Any]]:
    """The records of a file, one after the other; none where there is no file.

    Raises:
        VerificationError: a line is not a record.
    """
    for number, line in enumerate(_lines(folder, name), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise VerificationError(
                f"{folder.url(name)}, line {number}: expected a JSON object; fetch the artifact again, or run the "
                "stage that writes it with another --out"
            )
        yield record


def record_line(record: Mapping[str, Any]) -> str:
    """A record as it is written."""
    return f"{json.dumps(record, ensure_ascii=False)}\n"


def _lines(folder: Folder, name: str) -> Iterator[bytes]:
    """Lines of an untrusted file of any size, in little memory; of one that is too long, the beginning."""
    if folder.is_link(name):
        raise VerificationError(f"{folder.url(name)} is a symbolic link; an artifact holds plain files only")
    held = b""
    with suppress(FileNotFoundError):
        for block in folder.blocks(name):
            *whole, held = (held + block).split(b"\n")
            yield from whole
            if len(held) > _LONGEST_LINE:
                break
    if held:
        yield held[:_LONGEST_LINE]
