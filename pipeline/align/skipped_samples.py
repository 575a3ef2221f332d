"""Which samples of a capture are not in its targets, although their part is, and why the student cannot represent them.

Found at the end from what lies there: a sample that a committed part lacks is tokenized once more, alone, for its
reason. So the record does not depend on which worker met it, or on which run.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from xtoken.pipeline.align.conversations import ChatStudent
from xtoken.pipeline.align.encoding import Refusal, encode_one
from xtoken.pipeline.align.plain_columns import peek
from xtoken.pipeline.align.sample_texts import CorpusTexts
from xtoken.pipeline.corpus.corpus import source_of
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.reader import iter_parquet, local_part
from xtoken.pipeline.store.skip_records import SKIPPED_FILE, write_records
from xtoken.pipeline.tokens import TextTokenizer
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, Part

_NAMED = 5
_COLUMNS = ("sample_id", "text", "teacher_end", "complete")
_TOKENIZED = Refusal("the tokenizer represents it now", "it did not when the part was built; build the targets again")


@dataclass(frozen=True)
class Skipped:
    """How many samples there are that no part of the targets holds, the first of them, and how many by reason."""

    count: int = 0
    first: tuple[str, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedSamples:
    """What is looked into.

    Attributes:
        capture: folder or URL of the capture.
        manifest: the capture's.
        out: folder or URL of its targets.
        tokenizer: the student's.
        corpus: of a capture without text, else None.
        student: of conversations, the student's side.
    """

    capture: str
    manifest: CaptureManifest
    out: str
    tokenizer: TextTokenizer
    corpus: str | None = None
    student: ChatStudent | None = None

    def note(self, parts: Sequence[Part]) -> Skipped:
        """Name each skipped sample in ``out``'s skipped.jsonl, in the order of the capture; without any, no file.

        A line has ``part``, ``sample_id``, ``document``, ``source``, ``reason`` and ``detail``.

        Args:
            parts: committed parts of the targets.
        """
        count = sum(part.counts.get("samples_skipped", 0) for part in parts)
        records = [record for part in parts if part.counts.get("samples_skipped") for record in self._records(part)]
        write_records(Folder(self.out), SKIPPED_FILE, records)
        reasons = Counter(record["reason"] for record in records)
        return Skipped(count, tuple(record["sample_id"] for record in records[:_NAMED]), dict(reasons.most_common()))

    def _records(self, part: Part) -> Iterator[dict[str, Any]]:
        with local_part(Folder(self.out), part.index, part) as path:
            held = {name for batch in iter_parquet(path, ["sample_id"]) for name in batch["sample_id"].to_pylist()}
        try:
            for batch in self._batches(part):
                for sample in batch.select(self._looked_at).to_pylist():
                    if sample["sample_id"] not in held:
                        yield _record(part.index, sample, self._reason(sample))
        except XtokenError:
            return  # the capture went away since: what is not named stays counted

    @property
    def _looked_at(self) -> list[str]:
        """Columns that the reason follows from."""
        return ["sample_id", "text", "complete"] if self.student is None else list(self.student.columns)

    def _batches(self, part: Part) -> Iterator[pa.RecordBatch]:
        recorded = next(one for one in self.manifest.parts if one.index == part.index)
        batches = peek(self.capture, self.manifest, recorded, list(dict.fromkeys([*_COLUMNS, *self._looked_at])))
        if self.corpus is None:
            yield from batches
        else:
            texts = CorpusTexts(self.capture, self.corpus).part(part.index)
            yield from map(texts.fill, batches)

    def _reason(self, sample: dict[str, Any]) -> Refusal:
        if self.student is not None:
            found = self.student.read_one(sample)
            return found if isinstance(found, Refusal) else _TOKENIZED
        _, refusal = encode_one(self.tokenizer, sample["text"], sample["complete"])
        return refusal or _TOKENIZED


def _record(part: int, sample: dict[str, Any], refusal: Refusal) -> dict[str, Any]:
    document = sample["sample_id"].rpartition("#")[0]
    place = {"part": part, "sample_id": sample["sample_id"], "document": document, "source": source_of(document)}
    return {**place, **refusal._asdict()}
