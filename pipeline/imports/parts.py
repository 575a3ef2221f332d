"""A slice of the source as a part of the capture: read, pack, write, verify, commit."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from xtoken.pipeline.capture.plan import Plan
from xtoken.pipeline.chats import ChatTokens, span_columns, to_json
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.findings import Begun
from xtoken.pipeline.imports.rows import clean, packed
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Reader, Slice
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec, record_of
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.codes import Codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import publish_part
from xtoken.pipeline.store.skip_records import keep_skips
from xtoken.pipeline.store.writer import ROW_GROUP, Sample, capture_batch, group_rows, write_parquet
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.manifest import (
    CodecInfo,
    Part,
)
from xtoken.schemas.tables import CHAT_CAPTURE, PARTS_SINCE

DROPPED = (
    *("entries_not_finite", "entries_outside", "entries_twice", "rows_above_one", "rows_empty", "labels_unknown"),
    "documents_skipped",
)


@dataclass(frozen=True)
class Settled:
    """What a run has settled before it writes parts."""

    config: ImportConfig
    folder: Folder
    spelling: Spelling
    reader: Reader
    slices: Sequence[Slice]
    begun: Begun
    plan: Plan
    files: dict[str, str]
    codes: Codes | None

    @property
    def codec(self) -> CodecInfo:
        """How rows are kept."""
        return record_of("topk", self.config.codec)

    @property
    def version(self) -> int:
        """Of the parts' columns."""
        return PARTS_SINCE if self.begun.chat is None else CHAT_CAPTURE


def write_part(run: Settled, index: int, wanted: Slice) -> Part:
    """Read, write, verify and commit one part."""
    codec = open_codec(run.codec)
    samples, counts, left_out = list[Sample](), Counter(dict.fromkeys(DROPPED, 0)), list[LeftOut]()
    for one in run.reader.read(wanted):
        made = one if isinstance(one, LeftOut) else _sample(run, one, codec, counts)
        if isinstance(made, LeftOut):
            left_out.append(made)
        else:
            samples.append(made)
    counts.update(documents=len(samples) + len(left_out), documents_skipped=len(left_out), snapped=0)
    if left_out:
        keep_skips(run.folder, index, [vars(one) for one in left_out])
    schema = codec.schema(version=run.version)
    check = CaptureCheck(run.spelling.table.size, run.codec, version=run.version, imported=True)
    return publish_part(run.config.out, index, partial(_write, samples, schema, run.codes, dict(counts)), check)


def _write(
    samples: Sequence[Sample], schema: Any, codes: Codes | None, counts: dict[str, int], url: str
) -> dict[str, int]:
    batches = (
        capture_batch(samples[start : start + ROW_GROUP], schema, codes) for start in range(0, len(samples), ROW_GROUP)
    )
    write_parquet(url, schema, batches, group_rows(len(samples)))
    return counts


def _sample(run: Settled, one: ImportedSample, codec: Codec, counts: Counter[str]) -> Sample | LeftOut:
    """A row of the capture."""
    spans, messages = None, None
    if one.chat is not None:
        text, ends = one.chat.text, one.chat.ends
        counts.update(taught_counts(one.chat))
        spans = span_columns(one.chat.spans)
        messages = None if one.conversation is None else to_json(one.conversation)
    else:
        spelt = run.spelling.text(one.ids)
        if spelt is None:
            return LeftOut(one.name, "a text that is not UTF-8", "its tokens spell bytes that are no text")
        text, ends = spelt
    found = clean(one, run.spelling.valid)
    kept, labels = packed(found, run.config.codec, codec.info.step, rest_known=run.begun.info.whole_rest)
    counts.update(found.counts)
    return Sample(
        sample_id=f"{one.name}#0",
        text=text,
        teacher_ids=one.ids,
        teacher_end=ends,
        packed=kept,
        realised_logprob=labels,
        space_logprob=None,
        first_row=one.first_row,
        complete=one.complete,
        snapped=False,
        spans=spans,
        messages=messages,
    )


def taught_counts(chat: ChatTokens) -> Counter[str]:
    """Answers and tokens that are taught, for a commit record; as of a capture of conversations."""
    counts = Counter(turns=len(chat.message_ends))
    for span in chat.spans:
        if span.learn:
            counts[f"taught_{span.kind}"] += span.token_end - span.token_start
    return counts
