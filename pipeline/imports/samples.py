"""What a reader of others' logit datasets gives: samples as they lie in the files, and what is known of their source.

A reader knows one format. It decodes, splits and names; it sorts nothing, drops no entry for being small, and tests
nothing: shift, calibration, the vocabulary, k, min_p and REST are the same for all (``rows.py``, ``claims.py``).

Shapes: T tokens of a sample, R rows (the teacher's distributions), E entries of all its rows together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.chats import ChatTokens, Conversation
from xtoken.schemas.chat import CaptureChat
from xtoken.schemas.imported import RestClass


@dataclass(frozen=True, eq=False)
class ImportedSample:
    """One document, or one conversation, with its rows.

    A plain text has a row for each token, in order, but for the first where ``first_row`` is 1. A conversation has rows
    for the tokens that ``chat.learn`` marks, in order, and for no other.

    Attributes:
        name: unique in the run and stable: file, row and number of the document in the row, such as ``a.parquet:7.0``.
        ids: int32 [T], the teacher's tokens, without BOS in front. They need not be checked: an id may be anything.
        first_row: 0: token 0 has a row, since the teacher saw something before it; 1: it has none. Of conversations 1.
        offsets: int64 [R + 1], row r has entries ``offsets[r]:offsets[r + 1]``; a row may have none.
        entry_ids: int32 [E], in any order, the same id perhaps several times, perhaps outside the vocabulary.
        entry_logprob: float64 [E], natural logarithms; what is not finite is dropped. Where the source has logits they
            are over the entries of the row (log-softmax), and the source's ``rest`` is unknown.
        label_logprob: float64 [R], of the token that stands in the text; NaN where the source does not say. A label
            that is among the entries need not be given here: NaN is then filled in.
        label_rank: int32 [R], 1 = the most probable; 0 = unknown. None where the source knows no ranks.
        complete: the sample ends where its document ends.
        chat: of a conversation, its tokens and spans: ``chat.ids`` are ``ids``. None of plain text.
        conversation: what ``chat`` renders; None where nobody knows (token ids alone).
        listed_logprob: float64 [R], log of what all entries of the source add up to, where some of them are not given;
            None: those given are all.
    """

    name: str
    ids: NDArray[np.int32]
    first_row: int
    offsets: NDArray[np.int64]
    entry_ids: NDArray[np.int32]
    entry_logprob: NDArray[np.float64]
    label_logprob: NDArray[np.float64]
    complete: bool
    label_rank: NDArray[np.int32] | None = None
    chat: ChatTokens | None = None
    conversation: Conversation | None = None
    listed_logprob: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class LeftOut:
    """A sample, or a whole row of a file, that cannot be imported; a line of skipped.jsonl.

    Attributes:
        sample_id: as ``ImportedSample.name``.
        reason: what is counted, a few words without numbers, such as ``no rows``.
        detail: what is wrong with this one.
    """

    sample_id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Slice:
    """Rows ``start`` to ``stop`` (not included) of one file: what becomes one part of the capture.

    Attributes:
        file: its number among ``Source.files``.
        start, stop: rows of a Parquet file, or lines.
        at: byte of the file at which ``start`` begins, where it is read by bytes; else 0.
    """

    file: int
    start: int
    stop: int
    at: int = 0


@dataclass(frozen=True)
class Source:
    """What a reader says of what it reads; it goes into the manifest.

    Attributes:
        format: in a word and a variant, such as ``distillkit packed``.
        files: paths or URLs, in order; names of samples begin with their last part.
        rest: class of REST. exact: float32 log-probabilities of a whole softmax; rounded: of 16 bits; unknown: logits,
            or rows that were renormalised over their entries.
        config: what decoded the rows, as the manifest keeps it: JSON, keys sorted.
        k: most entries that a row can have.
        chat: of conversations, what the manifest says of them; None: plain text.
        notes: what a person should know, a sentence each.
        hint: what to check where the rows are not what they should be; the end of an error's message.
        calibrated: tokens of the text should occur as often as their rows say. False: they were not drawn from these.
        blameless: reasons for which samples are left out that say nothing of the tokenizer.
    """

    format: str
    files: tuple[str, ...]
    rest: RestClass
    config: dict[str, object]
    k: int
    chat: CaptureChat | None = None
    notes: tuple[str, ...] = field(default=())
    hint: str = "fetch the files again, or ask whoever wrote them how they are to be read"
    calibrated: bool = True
    blameless: frozenset[str] = frozenset()


class Reader(Protocol):
    """Opened by ``open_reader(config, spelling, form)`` of the module that ``FORMATS`` names for the format.

    Attributes:
        source: what it says of its files.
        shift: how far rows were moved against what the format says they predict; 0 unless ``moved`` made it.

    Two more are optional: ``findings``, sentences for the manifest about the rows that were read by then, and
    ``refuse_unsound(share of rows that list more than 1.01, whether an entry lists more than 1)``, which raises.
    """

    @property
    def source(self) -> Source:
        """See above."""
        ...

    @property
    def shift(self) -> int:
        """See above."""
        ...

    def slices(self) -> Sequence[Slice]:
        """What becomes a part each, in order; a function of the files and the settings alone.

        Raises:
            XtokenError: a file is not of the format, or asks for more than is read.
        """
        ...

    def read(self, wanted: Slice) -> Iterator[ImportedSample | LeftOut]:
        """The samples of a slice in order, in memory of a few rows of the file. Going forward, slice after slice, must
        not read the beginning of a file again.

        Raises:
            XtokenError: the file changed, or its rows are damaged; the message names file, row and rule.
        """
        ...

    def moved(self, by: int) -> "Reader | None":
        """The same with row r predicting the token ``by`` places later; None where the format leaves no doubt.

        Asked where the test of the shift says so: the tokens whose stored probability is largest on average stand
        ``by`` places from where this reader says.
        """
        ...
