"""The plan: the ordered list of shards, each a fixed slice of the corpus. Written once, then hashed.

Same corpus and options, same plan. A worker reads its slice again and compares it with the plan,
so that a corpus that changes under a run stops it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from xtoken.pipeline.capture.rendered_chat import Look
from xtoken.pipeline.capture.run_identity import another_run
from xtoken.pipeline.corpus import Corpus, Document, Listing
from xtoken.pipeline.corpus.corpus import Bad
from xtoken.pipeline.store.files import Folder, StopRun
from xtoken.pipeline.store.skip_records import BAD_FILE, write_records
from xtoken.schemas.configs.capture import CorpusConfig, CorpusForm
from xtoken.schemas.errors import Unreachable, VerificationError, XtokenError
from xtoken.schemas.manifest import CorpusInfo, digest
from xtoken.schemas.ui.progress import Progress

PLAN_FILE = "plan.json"
# What decides which documents there are, in which order and under which ids.
_OPTIONS = ("text_field", "id_field", "limit", "on_bad")
_NO_FORM = ("text", "auto")
_SPLIT = CorpusConfig.model_fields["split"].default


class Shard(BaseModel):
    """``documents`` good documents from record ``record`` of file ``file`` on; it may run into later files."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    index: int
    file: int
    record: int
    documents: int
    text_bytes: int
    sha256: str


class Plan(BaseModel):
    """All shards of one corpus, and the files they came from as (name, bytes).

    ``date`` is that of conversations: what every run of the plan tells chat templates.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    corpus: CorpusInfo
    files: list[tuple[str, int]]
    shard_bytes: int
    shards: list[Shard]
    date: str | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # plans of text stay what older releases read
        data: dict[str, Any] = handler(self)
        if self.date is None:
            del data["date"]
        return data

    @property
    def names(self) -> list[str]:
        """Names of the files, in order."""
        return [name for name, _ in self.files]

    @property
    def form(self) -> CorpusForm:
        """What the corpus holds."""
        found: CorpusForm = self.corpus.options.get("form", "text")
        return found

    @property
    def hash(self) -> str:
        """Identity of the plan; where the corpus lies plays no part."""
        date = [] if self.date is None else [self.date]
        return digest([self.corpus.hash, self.corpus.options, [shard.model_dump() for shard in self.shards], *date])


class _Hasher:
    """sha256 over documents: ids and texts, each preceded by its length."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.documents = 0
        self.text_bytes = 0

    def add(self, document: Document) -> int:
        """Add one document; returns its bytes."""
        for part in (document.id.encode(), document.text.encode()):
            self._sha256.update(len(part).to_bytes(8, "little"))
            self._sha256.update(part)
        self.documents += 1
        self.text_bytes += document.text_bytes
        return document.text_bytes

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def make_plan(
    config: CorpusConfig,
    shard_bytes: int,
    progress: Progress,
    look: Look | None = None,
    note: Callable[[Bad], None] | None = None,
    date: str | None = None,
    answer_bytes: int = 0,
) -> Plan:
    """Read the corpus once and cut it into shards that close at ``shard_bytes`` of text.

    Args:
        config: the corpus.
        shard_bytes: as above.
        progress: shows the bytes of text read.
        look: shown every document.
        note: given every bad one under ``--on-bad skip``.
        date: of a corpus of conversations, for ``Plan.date``.
        answer_bytes: that each document counts for more, since the teacher will answer it.

    Raises:
        XtokenError: the corpus is missing, empty, has a bad document under ``--on-bad stop``, or looks rendered.
    """
    corpus = Corpus(config, note=note)
    files = [(file.name, file.size) for file in corpus.files]
    whole, shards = _Hasher(), []
    progress.start(corpus.listing.label("plan"), None, "bytes")
    documents = corpus.documents() if look is None else look.over(corpus.documents())
    for shard in _cut(documents, shard_bytes, whole, answer_bytes):
        shards.append(shard)
        progress.advance(shard.text_bytes, documents=whole.documents)
    progress.finish()
    if not shards:
        raise corpus.nothing_usable()
    info = CorpusInfo(
        source=config.corpus,
        hash=whole.hexdigest(),
        documents=whole.documents,
        text_bytes=whole.text_bytes,
        bad=dict(sorted((corpus.bad + Counter(look.counts if look is not None else {})).items())),
        options=_options(config.model_copy(update={"form": corpus.form or "text"})),
    )
    return Plan(corpus=info, files=files, shard_bytes=shard_bytes, shards=shards, date=date)


def _options(config: CorpusConfig) -> dict[str, Any]:
    """Options as plans record them: one that came later is there only where it says something."""
    late = {} if config.split == _SPLIT else {"split": config.split}
    form = {} if config.form in _NO_FORM else {"form": config.form}
    return {name: getattr(config, name) for name in _OPTIONS} | late | form


def _cut(documents: Iterator[Document], shard_bytes: int, whole: _Hasher, more: int = 0) -> Iterator[Shard]:
    index, part = 0, _Hasher()
    first: Document | None = None
    for document in documents:
        first = first or document
        whole.add(document)
        part.add(document)
        if part.text_bytes + more * part.documents >= shard_bytes:
            yield _shard(index, first, part)
            index, part, first = index + 1, _Hasher(), None
    if first is not None:
        yield _shard(index, first, part)


def _shard(index: int, first: Document, part: _Hasher) -> Shard:
    return Shard(
        index=index,
        file=first.file,
        record=first.record,
        documents=part.documents,
        text_bytes=part.text_bytes,
        sha256=part.hexdigest(),
    )


def load_plan(folder: Folder) -> Plan | None:
    """The plan written earlier, or None.

    Raises:
        VerificationError: plan.json is damaged.
    """
    try:
        return Plan.model_validate(json.loads(folder.read(PLAN_FILE)))
    except FileNotFoundError:
        return None
    except (ValidationError, ValueError, RecursionError) as error:
        raise VerificationError(
            f"{folder.url(PLAN_FILE)} is damaged ({' '.join(str(error).split())[:200]}); put a copy of it there, or, "
            "if the corpus is as it was, remove it and run the same precompute, which plans again; else capture into "
            "another folder"
        ) from error


def settle_plan(
    folder: Folder,
    config: CorpusConfig,
    shard_bytes: int,
    progress: Progress,
    look: Look | None = None,
    date: str | None = None,
    answer_bytes: int = 0,
) -> Plan:
    """The folder's plan, made and written on the first run, checked against the options on later ones.

    Raises:
        XtokenError: as ``make_plan``; or the corpus options or the shard size are not those of the plan.
    """
    plan = load_plan(folder)
    if plan is None:
        bad: list[Bad] = []
        plan = make_plan(config, shard_bytes, progress, look, bad.append, date, answer_bytes)
        # before the plan, with which the corpus is not read for this again
        write_records(folder, BAD_FILE, (one._asdict() for one in bad))
        if folder.create(PLAN_FILE, plan.model_dump_json(indent=1).encode() + b"\n"):
            return plan
        plan = load_plan(folder) or plan  # another cell was first, perhaps on the day before
    _check_options(folder, plan, config, shard_bytes)
    return plan


def check_files(root: str, plan: Plan, config: CorpusConfig) -> Listing:
    """The corpus's files, which must be the planned ones, by name and size.

    Raises:
        XtokenError: the corpus is gone, or files were added, removed or changed.
    """
    listing = Corpus(config, plan.names).listing
    files = [(file.name, file.size) for file in listing.files]
    changed = sorted({name for name, _ in set(files) ^ set(plan.files)})
    if changed:
        raise XtokenError(
            f"file {changed[0]!r} of {config.corpus} was added, removed or changed since {root} was planned "
            f"({len(changed)} such files); restore the corpus or capture into a new folder"
        )
    return listing


def _check_options(folder: Folder, plan: Plan, config: CorpusConfig, shard_bytes: int) -> None:
    asked = {**_options(config), "split": config.split, "form": config.form, "shard_bytes": shard_bytes}
    had = {"split": _SPLIT, "form": "text", **plan.corpus.options, "shard_bytes": plan.shard_bytes}
    if config.form == "auto":
        del asked["form"]
    if (had["on_bad"], asked["on_bad"]) == ("stop", "skip"):  # nothing was bad when it was planned
        del asked["on_bad"]
    differ = [f"{name}: {had.get(name)!r} there, {asked[name]!r} now" for name in asked if had.get(name) != asked[name]]
    if differ:
        raise another_run(folder, differ)


@dataclass
class _Stream:
    """An open stream of documents, with the one read too far."""

    documents: Iterator[Document]
    pending: Document | None = None

    def take(self) -> Document | None:
        """Next document; None at the end."""
        document, self.pending = self.peek(), None
        return document

    def peek(self) -> Document | None:
        """Next document, which stays."""
        if self.pending is None:
            self.pending = next(self.documents, None)
        return self.pending


class SliceReader:
    """Reads shards of a planned corpus; going forward in one file never reads its beginning again."""

    def __init__(self, config: CorpusConfig, plan: Plan) -> None:
        # a limit counts from the corpus's beginning, and the plan has applied it
        self._corpus = Corpus(config.model_copy(update={"limit": None, "form": plan.form}), plan.names)
        self._plan = plan
        self._stream: _Stream | None = None
        if [file.name for file in self._corpus.files] != plan.names:
            raise StopRun(f"files of {config.corpus} were added or removed since it was planned; restore the corpus")

    def read(self, shard: Shard) -> list[Document]:
        """The shard's documents.

        Raises:
            StopRun: the corpus is not the planned one any more; the message names the file.
        """
        documents: list[Document] = []
        hasher = _Hasher()
        try:
            stream = self._seek(shard)
            while len(documents) < shard.documents and (document := stream.take()) is not None:
                documents.append(document)
                hasher.add(document)
        except Unreachable:
            self._stream = None
            raise
        except (OSError, EOFError) as error:
            raise self._changed(shard, f"cannot be read ({error})") from error
        except XtokenError as error:
            raise self._changed(shard, f"gives an error it did not give when planned ({error})") from error
        if hasher.hexdigest() != shard.sha256:
            raise self._changed(shard, "holds other documents than when it was planned")
        return documents

    def _changed(self, shard: Shard, what: str) -> StopRun:
        self._stream = None
        return StopRun(
            f"file {self._plan.files[shard.file][0]!r} of {self._plan.corpus.source}, or one after it, {what} "
            f"(shard {shard.index}); restore the corpus and run the same command again"
        )

    def _seek(self, shard: Shard) -> _Stream:
        """The stream, standing at the shard's first document: skipped forward where that is in the same file."""
        stream, start = self._stream, (shard.file, shard.record)
        if stream is None or not self._leads_to(stream, start):
            self._stream = stream = _Stream(self._corpus.documents(*start))
        while (document := stream.peek()) is not None and _position(document) < start:
            stream.take()
        return stream

    def _leads_to(self, stream: _Stream, start: tuple[int, int]) -> bool:
        document = stream.peek()
        return document is not None and _position(document)[0] == start[0] and _position(document) <= start


def _position(document: Document) -> tuple[int, int]:
    return document.file, document.record
