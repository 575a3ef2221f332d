"""How a student's tokens meet the teacher's, counted on samples taken evenly from a capture's parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_parquet
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest

SAMPLES = 512
_COLUMNS = ("text", "teacher_ids", "teacher_end", "complete")


@dataclass
class Alignment:
    """Chunks of one student's tokenizer against the teacher's tokens.

    Attributes:
        student: name of the tokenizer.
        samples: counted; those whose text the student's tokens do not rejoin are left out.
        text_bytes: of these samples.
        student_tokens: of these samples.
        chunks: spans that both tokenizations cut at the same bytes.
        one_to_one: chunks of one token on either side.
    """

    student: str
    samples: int = 0
    text_bytes: int = 0
    student_tokens: int = 0
    chunks: int = 0
    one_to_one: int = 0


def alignments(root: str, manifest: CaptureManifest, students: Sequence[str]) -> list[Alignment]:
    """Count the chunks of each student's tokenizer on about ``SAMPLES`` samples.

    Raises:
        XtokenError: a tokenizer cannot be loaded, or the capture holds no text.
    """
    if not students:
        return []
    if manifest.chat is not None:
        raise XtokenError(
            f"--students {','.join(students)} counts chunks of plain text, and {root} holds conversations, which each "
            "student's own chat template renders; leave it out: 'xtoken align' counts them"
        )
    tokenizers = [load_tokenizer(student) for student in students]
    found = [Alignment(tokenizer.table.info.name) for tokenizer in tokenizers]
    for row in _samples(root, manifest):
        if row.get("text") is None:
            raise XtokenError(
                f"--students {','.join(students)} needs the text, which {root} leaves out; "
                "leave --students out, or write the card of the capture that holds the text"
            )
        for tokenizer, counts in zip(tokenizers, found, strict=True):
            _count(counts, tokenizer, row, manifest.tokenizer.eos_id)
    return found


def _samples(root: str, manifest: CaptureManifest) -> Iterator[dict[str, Any]]:
    folder, parts = Folder(root), manifest.parts
    stride = -(-len(parts) // SAMPLES)
    chosen = parts[:: max(stride, 1)]
    for part in chosen:
        batches = iter_parquet(folder.url(data_name(part.index)), _COLUMNS)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from islice(rows, -(-SAMPLES // len(chosen)))


def _count(counts: Alignment, tokenizer: TextTokenizer, row: dict[str, Any], eos_id: int | None) -> None:
    # numba takes a second to import: only where chunks are cut
    from xtoken.pipeline.align.chunks import cut

    try:
        mine = tokenizer.encode(row["text"], complete=row["complete"], keep_text=True)
    except XtokenError:
        return
    student_eos = bool(len(mine.ids)) and int(mine.ids[-1]) == tokenizer.table.info.eos_id
    teacher_eos = row["complete"] and eos_id is not None and row["teacher_ids"][-1] == eos_id
    ends = np.asarray(row["teacher_end"], np.int32)
    chunks = cut(mine.ends, ends, student_eos=student_eos, teacher_eos=teacher_eos)
    counts.samples += 1
    counts.text_bytes += int(ends[-1])
    counts.student_tokens += len(mine.ids)
    counts.chunks += chunks.count
    counts.one_to_one += chunks.one_to_one
