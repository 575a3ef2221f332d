"""The text of each sample: from the capture, or cut again from its corpus when it was captured with --no-text."""

from collections.abc import Iterator

import pyarrow as pa

from xtoken.pipeline.capture.plan import SliceReader, load_plan
from xtoken.pipeline.corpus import Document
from xtoken.pipeline.store.files import Folder, StopRun
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import XtokenError


class CorpusTexts:
    """Samples cut from the corpus that the capture's plan describes; every document's hash is checked."""

    def __init__(self, capture: str, corpus: str) -> None:
        """Find the corpus.

        Raises:
            XtokenError: the capture has no plan, or the corpus is not there or has other files.
        """
        plan = load_plan(Folder(capture))
        if plan is None:
            raise XtokenError(
                f"{capture} holds no plan.json, so samples cannot be found in {corpus}: subsets by --where and merges "
                "of different documents have none; align the captures they were made from"
            )
        self._plan = plan
        self._reader = SliceReader(CorpusConfig(corpus=corpus, **plan.corpus.options), plan)

    def part(self, index: int) -> "PartTexts":
        """The texts of one part, in file order.

        Raises:
            StopRun: the documents are not those that were captured.
        """
        return PartTexts(iter(self._reader.read(self._plan.shards[index])))


class PartTexts:
    """Cuts documents by the byte lengths of their samples, which are consecutive and cover each document."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self._documents = documents
        self._id: str | None = None
        self._left = b""

    def fill(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch of consecutive samples with its text column filled in.

        Raises:
            StopRun: the samples do not cover the documents: the teacher's tokenizer changed their text.
        """
        sizes = [ends[-1] for ends in batch["teacher_end"].to_pylist()]
        texts = [self._next(name, size) for name, size in zip(batch["sample_id"].to_pylist(), sizes, strict=True)]
        column = batch.schema.get_field_index("text")
        return batch.set_column(column, batch.schema.field(column), pa.array(texts, pa.string()))

    def _next(self, sample_id: str, size: int) -> str:
        document_id = sample_id.rpartition("#")[0]
        if document_id != self._id:
            document = next(self._documents, None)
            if self._left or document is None or document.id != document_id:
                raise self._mismatch(sample_id)
            self._id, self._left = document.id, document.text.encode()
        data, self._left = self._left[:size], self._left[size:]
        if len(data) != size:
            raise self._mismatch(sample_id)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._mismatch(sample_id) from error

    def _mismatch(self, sample_id: str) -> StopRun:
        return StopRun(
            f"sample {sample_id!r} is not where its document has it: the teacher's tokenizer normalised the text; "
            "capture this corpus again without --no-text"
        )


def refuse_without_text(batch: pa.RecordBatch, capture: str) -> None:
    """Raise StopRun when the batch's text was not stored."""
    if batch["text"].null_count:
        if "messages" in batch.schema.names:
            raise StopRun(f"{capture} is a copy without text, which the student must tokenize; align the whole capture")
        raise StopRun(
            f"{capture} was captured with --no-text, and the student must tokenize its text; give the corpus it was "
            "captured from with --corpus"
        )
