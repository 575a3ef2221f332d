"""One part of a capture to one part of targets: read, tokenize, cut, project, write, prove.

The kernels are fed Arrow batches rather than registered as DuckDB functions: a chunk's target needs the student's
tokens, which come from Python anyway, and a function inside a query measures slower. Memory stays bounded by the batch
(at most 32 samples) and by DuckDB's own limit, whatever the corpus.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.pipeline.align.checks import Rules, summary_batch
from xtoken.pipeline.align.chunks import Joined, join
from xtoken.pipeline.align.conversations import ChatStudent, conversation_counts, join_conversations
from xtoken.pipeline.align.encoding import encode
from xtoken.pipeline.align.form import open_form, rest_lost
from xtoken.pipeline.align.losses import builders
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.parts import CaptureParts
from xtoken.pipeline.align.prefix import first_tokens
from xtoken.pipeline.align.rows import Recipe
from xtoken.pipeline.align.sample_texts import CorpusTexts, refuse_without_text
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.executors.protocol import OneByOne, OnProgress, ignore_progress
from xtoken.pipeline.project.projection import Projection, Unreached
from xtoken.pipeline.project.stops import StopPair
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.publish import Figures, publish_part
from xtoken.pipeline.store.reader import load_vocab
from xtoken.pipeline.store.writer import group_rows, write_parquet
from xtoken.pipeline.tokens import TextTokenizer, TokenTable, load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.parquet_limits import check_pages, reading
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.manifest import CaptureManifest, CodecInfo, Part, TokenizerInfo
from xtoken.schemas.target_form import TargetForm

_RISING = ("student_end", "chunk_student_end", "chunk_teacher_end")


@dataclass(frozen=True)
class AlignJob:
    """What a worker process needs; small enough to send, W is in arrays.

    Attributes:
        capture: folder or URL of the one that is aligned.
        out: folder or URL of its targets.
        codec: how the capture stored its rows.
        phi_B: ``phi_of`` the pair, made once for all workers.
        stops: of conversations, what ``projection`` was changed by.
    """

    config: AlignConfig
    capture: str
    out: str
    projection: Projection
    codec: CodecInfo
    phi_B: NDArray[np.int32] | None = None
    stops: StopPair | None = None

    @property
    def ahead(self) -> int:
        """See ``Job``: parts are built one at a time."""
        return 1

    def open(self, slot: int = 0) -> "AlignWorker":  # noqa: ARG002
        """Load the student's tokenizer and prepare W and, for byte-prefix, the teacher's vocabulary.

        Raises:
            XtokenError: the tokenizer is no longer the one W was built for.
            VerificationError: the capture's vocabulary is damaged.
        """
        config = self.config
        tokenizer = load_tokenizer(config.student)
        refuse_other_tokenizer("student", tokenizer.table.info, self.projection.student)
        unreached: Unreached = config.unreached
        teacher = load_vocab(self.capture)
        maps = Maps.of(self.projection, unreached, tokenizer.table, teacher, phi_B=self.phi_B, stops=self.stops)
        texts = CorpusTexts(self.capture, config.corpus) if config.corpus else None
        parts = CaptureParts(self.capture, config.memory_limit, len(config.losses))
        lost = rest_lost(parts.manifest)
        recipe = Recipe(config.losses, config.merge, config.tau, self.codec, config.entries, lost)
        rules = Rules(maps, recipe, config.memory_limit)
        form = open_form(config, parts.manifest, self.projection)
        student = chat_student(config, parts.manifest)
        return AlignWorker(self, tokenizer, maps, recipe, rules, parts, texts, form, student)


def chat_student(config: AlignConfig, capture: CaptureManifest) -> ChatStudent | None:
    """The student's side of the conversations of a capture; None of a capture of texts.

    Raises:
        XtokenError: it has no chat template, or it cannot be loaded.
    """
    if capture.chat is None:
        return None
    return ChatStudent.open(config.student, config.template, config.arguments, capture.chat, capture.tokenizer.hash)


def phi_of(losses: Sequence[str], teacher: TokenTable, student: TextTokenizer) -> NDArray[np.int32] | None:
    """``first_tokens`` of the pair if one of the losses needs them."""
    return first_tokens(teacher, student) if any(loss.needs_prefix_maps for loss in builders(losses)) else None


def refuse_other_tokenizer(side: str, given: TokenizerInfo, wanted: TokenizerInfo) -> None:
    """Raise XtokenError unless both are the same tokenizer by hash."""
    if given.hash != wanted.hash:
        raise XtokenError(
            f"the {side} tokenizer {given.name} ({given.hash[:12]}) is not the one W was built for, "
            f"{wanted.name} ({wanted.hash[:12]}); build W for this pair with 'xtoken project', or leave --w out"
        )


@dataclass(frozen=True)
class AlignWorker(OneByOne):
    """Builds target parts; part n of the targets is part n of the capture."""

    job: AlignJob
    tokenizer: TextTokenizer
    maps: Maps
    recipe: Recipe
    rules: Rules
    parts: CaptureParts
    texts: CorpusTexts | None
    form: TargetForm
    student: ChatStudent | None = None

    def run(self, shard: int, attempt: int, on_progress: OnProgress = ignore_progress) -> Part:
        """Build, publish and commit one part; the attempt's number does not enter its content.

        Raises:
            XtokenError: the capture part cannot be read within the memory limit, or holds no text.
            VerificationError: the capture part is not the one recorded, or the targets break a rule.
        """
        del attempt, on_progress  # a part is done within seconds
        written = _Written(self.form.schema)
        return publish_part(self.job.out, shard, partial(self._write, shard, written), written.check)

    def _write(self, shard: int, written: "_Written", url: str) -> dict[str, int]:
        written.forget()
        rows = group_rows(self.parts.records[shard].samples)
        write_parquet(
            url, written.schema, self._batches(shard, written), rows, rising=_RISING if self.form.lean else ()
        )
        if written.built:
            self.rules.check(pa.concat_tables(written.built))
        return dict(written.counts)

    def _batches(self, shard: int, written: "_Written") -> Iterator[pa.RecordBatch]:
        texts = None if self.texts is None else self.texts.part(shard)
        for read in self.parts.read(shard):
            batch = read if texts is None else texts.fill(read)
            refuse_without_text(batch, self.job.capture)
            _refuse_foreign_ids(batch, [*open_codec(self.job.codec).id_columns, "teacher_ids"], self.maps.teacher_size)
            samples, counts = self._joined(batch)
            built, figures = target_batch(batch, samples, self.maps, self.recipe)
            figures.update(counts)
            written.add(batch, built, figures, summary_batch(batch, samples, built, self.job.config.losses))
            yield self.form.stored_batch(built)

    def _joined(self, batch: pa.RecordBatch) -> tuple[list[Joined], Counter[str]]:
        """The samples that the student can read, cut into chunks; and counts of conversations."""
        if self.student is None:
            eos_id = self.tokenizer.table.info.eos_id
            return join(batch, encode(self.tokenizer, batch), eos_id), Counter()
        readings = self.student.read(batch)
        samples = join_conversations(batch, readings)
        return samples, conversation_counts(readings, samples)


@dataclass
class _Written:
    """What a part holds, known from what was given to its writer.

    Attributes:
        schema: of the targets.
        counts: for ``Part.counts``.
        built: of ``summary_batch``, some 50 bytes per token.
    """

    schema: pa.Schema
    counts: Counter[str] = field(default_factory=Counter)
    built: list[pa.Table] = field(default_factory=list)

    def forget(self) -> None:
        """Begin again: storage may ask for a part twice."""
        self.counts, self.built = Counter(samples_skipped=0), []

    def add(self, batch: pa.RecordBatch, made: pa.RecordBatch, figures: Mapping[str, int], built: pa.Table) -> None:
        """Take note of one batch."""
        self.counts.update(figures)
        self.counts["samples_skipped"] += batch.num_rows - made.num_rows
        self.built.append(built)

    def check(self, url: str) -> Figures:
        """Every page of the file lies there as it was written.

        Raises:
            VerificationError: it does not.
        """
        samples = sum(table.num_rows for table in self.built)
        with reading("the file", "build it again"), open_url(url) as file:
            check_pages(file, "the file", self.schema, samples)
        tokens = chunks = text_bytes = 0
        for table in self.built:
            tokens += pc.sum(pc.list_value_length(table["student_ids"])).as_py() or 0
            chunks += _chunks(table)
            text_bytes += sum(ends[-1].as_py() if len(ends) else 0 for ends in table["student_end"])
        return Figures(samples, tokens, chunks, chunks, text_bytes)


def _chunks(table: pa.Table) -> int:
    """Chunks of a table of ``summary_batch``, without the gaps of conversations."""
    if "learn" in table.schema.names:
        return int((~np.isnan(table["teacher_logprob"].combine_chunks().flatten().to_numpy())).sum())
    return pc.sum(pc.list_value_length(table["chunk_student_end"])).as_py() or 0


def _refuse_foreign_ids(batch: pa.RecordBatch, names: Sequence[str], size: int) -> None:
    """Raise VerificationError when an id is outside the teacher's vocabulary (compiled loops do not look)."""
    for name in names:
        ids = flat(batch, name)
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            raise VerificationError(
                f"the part of sample {batch['sample_id'][0].as_py()!r} has an id outside 0 to {size - 1} in {name}; "
                "'xtoken verify' on the capture lists what is damaged"
            )
