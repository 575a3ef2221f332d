"""What several captures have in common, before any of them is aligned: one query over ids, lengths and texts.

Training joins targets by sample id and student tokens, which follow from the bytes of a sample and from whether it
ends its document. Windows are cut in each teacher's own tokens, so documents longer than --max-tokens rarely join. Of a
conversation they follow from its messages.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from xtoken.pipeline.align.conversations import COLUMNS, told
from xtoken.pipeline.align.plain_columns import peek
from xtoken.pipeline.align.queries import query
from xtoken.pipeline.store.files import StopRun
from xtoken.schemas.errors import Unreachable, XtokenError
from xtoken.schemas.manifest import CaptureManifest
from xtoken.schemas.tables import CAPTURE
from xtoken.schemas.ui.progress import Progress

CLASSES = ("in_all", "in_some", "in_one", "other_bytes")
MOST_CAPTURES = 62  # a bit each of a signed 64-bit number
_COLUMNS = ["sample_id", "text", "teacher_end", "complete"]
_CREATE = "CREATE TABLE samples (capture BIGINT, sample_id VARCHAR, bytes INTEGER, complete BOOLEAN, text UHUGEINT)"
_INSERT = "INSERT INTO samples SELECT $capture, sample_id, teacher_end[-1], complete, md5_number(text) FROM incoming"


class _Reading:
    """The compared columns of a capture; parts that cannot be read are left to the run, which names them."""

    def __init__(self, root: str, manifest: CaptureManifest, progress: Progress) -> None:
        self.root, self.manifest, self.progress = root, manifest, progress
        self.unread: list[int] = []

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Record batches of ``_COLUMNS``."""
        chat = self.manifest.chat is not None
        columns = list(dict.fromkeys([*_COLUMNS, *COLUMNS])) if chat else _COLUMNS
        for part in self.manifest.parts:
            try:
                for batch in peek(self.root, self.manifest, part, columns):
                    self.progress.advance(batch.num_rows)
                    yield _written(batch) if chat else batch
            except Unreachable:
                raise
            except XtokenError:
                self.unread.append(part.index)


def _written(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Conversations with what is rendered for the student in the place of their text."""
    rows = []
    for row in batch.to_pylist():
        text = None if row["text"] is None else told(row)
        size = row["teacher_end"][-1] if text is None else len(text)
        rows.append({"sample_id": row["sample_id"], "text": text, "teacher_end": [size], "complete": row["complete"]})
    return pa.RecordBatch.from_pylist(rows, pa.schema([CAPTURE.field(name) for name in _COLUMNS]))


def _holds(manifest: CaptureManifest) -> str:
    if manifest.chat is None:
        return "texts"
    return "token ids" if manifest.chat.template is None else "conversations"


def refuse_other_chat(captures: Mapping[str, CaptureManifest]) -> None:
    """Raise XtokenError for captures that cannot have a sample in common: of texts and of conversations, or of
    conversations that teach other kinds of spans or tell templates another date."""
    (first, manifest), *others = captures.items()
    for root, other in others:
        kinds = {one: _holds(found) for one, found in captures.items()}
        if kinds[first] != kinds[root]:
            raise XtokenError(f"{first} holds {kinds[first]}, {root} {kinds[root]}; align them one by one")
        if manifest.chat is None or other.chat is None:
            continue
        for name, flag in (("learn", "--learn"), ("date", "--date")):
            mine, theirs = getattr(manifest.chat, name), getattr(other.chat, name)
            if mine != theirs:
                raise XtokenError(
                    f"conversations of {first} and {root} differ in {flag} ({mine} and {theirs}), so that no sample "
                    f"would be the same; capture both with one 'xtoken precompute', or with the same {flag}, or align "
                    "them one by one"
                )


def compare(captures: Mapping[str, CaptureManifest], memory_limit: str, progress: Progress) -> dict[str, Any]:
    """Which samples are in all captures with the same bytes, in some, in one, or in several with other bytes.

    Args:
        captures: at least two, by folder or URL, with their manifests.
        memory_limit: what DuckDB may use, such as 1GB; nothing is written to disk.
        progress: told samples.

    Returns:
        Counts ``in_all``, ``in_some``, ``in_one``, ``other_bytes``, and ``alike`` (two or more have the same bytes);
        ``examples`` with up to 10 ids of each class but the first; ``compared_by`` text or length; and ``captures``: by
        folder the same counts, and ``parts_unread`` where some could not be read.

    Raises:
        XtokenError: the samples do not fit the memory limit, or no two of the captures can have one in common.
    """
    import duckdb

    refuse_other_chat(captures)
    progress.start("compare", sum(part.samples for manifest in captures.values() for part in manifest.parts), "samples")
    limits: dict[str, Any] = {"memory_limit": memory_limit, "temp_directory": "", "threads": 1}
    readings = [_Reading(root, manifest, progress) for root, manifest in captures.items()]
    try:
        with duckdb.connect(config=limits) as connection:
            connection.execute(_CREATE)
            for number, reading in enumerate(readings):
                _insert(connection, number, reading)
            rows = connection.execute(query("joined"), {"captures": len(readings)}).fetchall()
            by_text = connection.execute("SELECT coalesce(bool_and(text IS NOT NULL), false) FROM samples").fetchall()
    except duckdb.OutOfMemoryException as error:
        raise StopRun(
            f"the ids of all samples do not fit --memory-limit {memory_limit}; give more (some 300 bytes a sample of "
            "each capture), or align each capture by itself"
        ) from error
    finally:
        progress.finish()
    summary: dict[str, Any] = _counts(rows, None)
    summary["compared_by"] = "text" if by_text[0][0] else "length"
    summary["examples"] = {kind: ids for capture, kind, _, _, ids in rows if capture is None and kind != "in_all"}
    summary["captures"] = {
        reading.root: _counts(rows, number) | ({"parts_unread": reading.unread} if reading.unread else {})
        for number, reading in enumerate(readings)
    }
    return summary


def _insert(connection: Any, number: int, reading: _Reading) -> None:
    schema = pa.schema([CAPTURE.field(name) for name in _COLUMNS])
    incoming = pa.RecordBatchReader.from_batches(schema, reading.batches())
    connection.register("incoming", incoming)
    connection.execute(_INSERT, {"capture": number})
    connection.unregister("incoming")


def _counts(rows: list[tuple[Any, ...]], number: int | None) -> dict[str, Any]:
    """Samples of each class, of one capture or of all together."""
    of = {kind: (samples, alike) for capture, kind, samples, alike, _ in rows if capture == number}
    counts: dict[str, Any] = {kind: of.get(kind, (0, 0))[0] for kind in CLASSES}
    return counts | {"alike": sum(alike for _, alike in of.values())}


def refuse_nothing_in_common(captures: Mapping[str, CaptureManifest], summary: Mapping[str, Any]) -> None:
    """Raise XtokenError where no two captures have a sample alike; ``summary`` is of ``compare``."""
    if summary["alike"] or any("parts_unread" in counts for counts in summary["captures"].values()):
        return
    said = "\n".join(
        f"  {root}: {manifest.teacher.model}, --max-tokens {manifest.max_tokens}, plan {manifest.plan_hash[:12]}, "
        f"{sum(part.samples for part in manifest.parts):,} samples"
        for root, manifest in captures.items()
    )
    same = f"; {summary['other_bytes']:,} ids stand for other bytes" if summary["other_bytes"] else ""
    raise XtokenError(
        f"no two of these captures have a sample of the same id and bytes in common{same}, so no sample would have two "
        f"teachers:\n{said}\nwindows are cut in each teacher's own tokens: capture with 'xtoken precompute CORPUS "
        "--teacher A --teacher B --out DIR', which makes one plan, and a --max-tokens that whole documents fit; or "
        "align each capture into an --out of its own"
    )
