"""A corpus: documents with stable ids, NFC text, and bad ones named or counted."""

import hashlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import IO, NamedTuple

import pyarrow as pa

from xtoken.pipeline.chats import Form, form_of
from xtoken.pipeline.corpus.damage import check_head, problem_of
from xtoken.pipeline.corpus.listing import FORMATS, CorpusFile, list_files, reader_of, suffix_of
from xtoken.pipeline.corpus.readers import Fields, FileProblem, Problem, Row, first_names
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import Unreachable, XtokenError
from xtoken.schemas.io.remote import may_pass, named_errors, open_filesystem

_SURROGATES = re.compile("[\ud800-\udfff]")
# Memory for checking ids: about 100 bytes each. Later ids are not checked.
_CHECKED_IDS = 1_000_000
_LONE = Problem("lone surrogate", "the text holds a lone surrogate, which no encoding can represent", "mend the text")
_EMPTY = Problem("empty document", "the document holds nothing but whitespace", "remove the record")


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        id: the id field, else ``{file name relative to the corpus}:{record}``.
        text: NFC, without lone surrogates, not only whitespace; of a conversation its JSON (``chats.to_json``), of
            token ids theirs (``chats.TokenRow``).
        file: index into ``Corpus.files``.
        record: number within the file, from 0 (for JSON lines: line number - 1).
        contents: bytes of a conversation's contents, or of token ids; None of plain text.
    """

    id: str
    text: str
    file: int
    record: int
    contents: int | None = None

    @property
    def text_bytes(self) -> int:
        """What people call its size: bytes of its text, of a conversation's contents, or of token ids."""
        return len(self.text.encode()) if self.contents is None else self.contents

    @property
    def source(self) -> str:
        """See ``source_of``."""
        return source_of(self.id)


def source_of(document: str) -> str:
    """A document's id up to its last '/', so that ids like book/language/page group by book and language.

    An id without one counts up to its first '#' or ':', as in corpus.jsonl:12; as in the views of 'xtoken query'.
    """
    return document.rpartition("/")[0] or re.split("[#:]", document, maxsplit=1)[0]


class Bad(NamedTuple):
    """A bad document, or the unusable rest of a file.

    Attributes:
        place: file, and line or record, as error messages have it.
        reason: what is counted, the same words for all such documents.
        detail: this one's case.
        outcome: ``skipped``, or ``mended``: a lone surrogate was replaced, and the document is there.
    """

    place: str
    reason: str
    detail: str
    outcome: str


class Corpus:
    """Documents of a file, a folder, or a saved Hugging Face dataset, local or at any fsspec URL.

    Attributes:
        files: what is read, in order.
        listing: that, and what is not read.
        bad: documents skipped (or, for lone surrogates, mended) so far under ``on_bad="skip"``, by
            reason; what several passes meet is counted by each. A file that cannot be read counts once.
    """

    def __init__(
        self, config: CorpusConfig, planned: Collection[str] = (), note: Callable[[Bad], None] | None = None
    ) -> None:
        """List the files; nothing is read yet.

        Args:
            config: which documents.
            planned: names of files that a plan of them has.
            note: given each bad document or file under ``on_bad="skip"``, in the order of reading.

        Raises:
            XtokenError: there is no corpus, or nothing in it can be read.
        """
        self._config = config
        self._note = note
        self._fs, root = open_filesystem(config.corpus)
        self.listing = list_files(self._fs, root, config.corpus, config.split, planned)
        self.files = self.listing.files
        self.bad: Counter[str] = Counter()
        if len(self.files) == 1 and suffix_of(self.files[0].name) is None:
            raise XtokenError(
                f"corpus {config.corpus} has a suffix that no reader knows; known are {', '.join(FORMATS)}"
            )

    @cached_property
    def columns(self) -> list[str]:
        """Names of the fields of the first file that has any; none of a corpus of plain text files."""
        for file in self.files:
            suffix = suffix_of(file.name)
            if suffix is not None and suffix not in (".txt", ".md"):
                # who reads the documents says what is wrong with it
                passed_over = suppress(*_unreadable(), ValueError, RecursionError)
                # a network that fails says nothing about the file
                with passed_over, named_errors(file.path), self._fs.open(file.path, "rb") as stream:
                    return _column_names(stream, suffix)
        return []

    @cached_property
    def form(self) -> Form | None:
        """How the corpus holds conversations; None: it holds text. A text field that is there counts first."""
        asked = self._config.form
        if asked != "auto":
            return None if asked == "text" else asked
        return None if self._config.text_field in self.columns else form_of(self.columns)

    @cached_property
    def _fields(self) -> Fields:
        return Fields(self._config.text_field, self._config.id_field, self.form)

    def documents(self, file: int = 0, record: int = 0) -> Iterator[Document]:
        """Documents in a stable order from a position on, at most ``limit`` of them.

        Duplicate ids are found in passes from the start, among the first million; they always stop
        the run, since which of two documents is meant cannot be decided by a reader that starts later.

        Raises:
            XtokenError: a bad document under ``on_bad="stop"``, a duplicate id, or a file that is gone.
        """
        stream = self._from(file, record)
        if self._fields.id is not None and (file, record) == (0, 0):
            stream = self._unique(stream)
        return islice(stream, self._config.limit)

    def nothing_usable(self) -> XtokenError:
        """The error of a pass that met no document."""
        held, named = ("document", "--text-field") if self.form is None else ("conversation", f"--form {self.form}")
        held = "row of token ids" if self.form == "ids" else held
        return XtokenError(
            f"{self._config.corpus} has no usable {held} (bad: {dict(self.bad)}); check {named} and the path"
        )

    def _from(self, file: int, record: int) -> Iterator[Document]:
        for index in range(file, len(self.files)):
            for row in self._rows(self.files[index], record if index == file else 0):
                document = self._document(index, row)
                if document is not None:
                    yield document

    def _rows(self, file: CorpusFile, start: int) -> Iterator[Row]:
        """Rows of one file; what makes the rest of it unusable is handled as a bad document."""
        suffix = suffix_of(file.name)
        if suffix is None:
            known = ", ".join(FORMATS)
            self._bad(file.name, Problem("unknown suffix", f"no reader knows it; known are {known}", "move it away"))
            return
        last, unreadable = start - 1, _unreadable()
        try:
            # a network that fails says nothing about the file
            with named_errors(file.path), self._fs.open(file.path, "rb") as stream:
                if suffix != ".parquet":  # which is read from its end on, and looks at its beginning where that fails
                    check_head(stream, suffix)
                for row in reader_of(suffix)(stream, self._fields, start):
                    last = row.number
                    yield row
        except FileProblem as error:
            self._bad(file.name, error.problem)
        except FileNotFoundError as error:
            raise XtokenError(
                f"{file.path} was listed, but is gone; bring it back or start a new run without it"
            ) from error
        except unreadable as error:
            if isinstance(error, OSError) and error.errno is not None:
                # of the disk, or a right that is missing: it says nothing about the file either
                kind = Unreachable if may_pass(error) else XtokenError
                raise kind(f"{file.path} cannot be read ({error.strerror}); check its rights and its disk") from error
            self._bad(file.name, problem_of(error, last if last >= start else None))

    def _document(self, index: int, row: Row) -> Document | None:
        file = self.files[index]
        where = self._where(file, row.number)
        if row.problem is not None:
            self._bad(where, row.problem)
            return None
        text = row.text
        if _SURROGATES.search(text):
            self._bad(where, _LONE)
            text = _SURROGATES.sub("\ufffd", text)
        text = unicodedata.normalize("NFC", text)
        if not text or text.isspace():
            self._bad(where, _EMPTY)
            return None
        document_id = f"{file.name}:{row.number}" if row.id is None else row.id
        if _SURROGATES.search(document_id):
            self._bad(where, Problem("bad id", "the id holds a lone surrogate", "mend the id"))
            return None
        return Document(document_id, text, index, row.number, row.text_bytes)

    def _where(self, file: CorpusFile, number: int) -> str:
        suffix = suffix_of(file.name) or ""
        if suffix.startswith(".jsonl"):
            return f"{file.name}, line {number + 1}"
        return file.name if suffix in (".txt", ".md") else f"{file.name}, record {number}"

    def _bad(self, where: str, problem: Problem) -> None:
        """Stop, or count.

        Raises:
            XtokenError: under ``on_bad="stop"``.
        """
        if self._config.on_bad == "stop":
            raise XtokenError(
                f"{where}: {problem.reason}: {problem.detail}; {problem.fix}, or have precompute count it with "
                "--on-bad skip"
            )
        self.bad[problem.reason] += 1
        if self._note is not None:
            self._note(Bad(where, problem.reason, problem.detail, "mended" if problem is _LONE else "skipped"))

    def _unique(self, documents: Iterator[Document]) -> Iterator[Document]:
        seen: set[bytes] = set()
        for document in documents:
            if len(seen) < _CHECKED_IDS:
                key = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
                if key in seen:
                    where = self._where(self.files[document.file], document.record)
                    raise XtokenError(
                        f"{where}: id {document.id!r} was seen before, but ids must be unique; "
                        "choose another --id-field, or none: ids are then made of file and record"
                    )
                seen.add(key)
            yield document


def _unreadable() -> tuple[type[Exception], ...]:
    """What readers raise of a file that is damaged or gone."""
    import zstandard

    return OSError, EOFError, zlib.error, pa.ArrowException, zstandard.ZstdError


def _column_names(stream: IO[bytes], suffix: str) -> list[str]:
    if suffix not in (".parquet", ".arrow"):
        return first_names(stream, suffix)
    from xtoken.pipeline.corpus.tables import column_names

    return column_names(stream, parquet=suffix == ".parquet")
