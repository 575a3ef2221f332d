"""One capture worker: a shard's documents in, one committed part out.

Shapes: T teacher tokens of a sample, R rows.
"""

import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.capture.answering import answered, prompts_of, question
from xtoken.pipeline.capture.audit import open_audit
from xtoken.pipeline.capture.conversations import Chat, ChatPiece, ChatPieces, chunk_counts
from xtoken.pipeline.capture.plan import Plan, SliceReader, load_plan
from xtoken.pipeline.capture.run_identity import as_begun, codec_info, sees_bos, settle_teacher, settle_weights
from xtoken.pipeline.capture.worker_threads import Audit, Piece, Prepared, Stages
from xtoken.pipeline.corpus import Document, Window, all_windows
from xtoken.pipeline.executors.gpus import engines_per_gpu, pin_gpus
from xtoken.pipeline.executors.protocol import Lease, OnProgress, Send, ignore_progress
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codes import Codes, read_codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import Made, publish_part, read_commit
from xtoken.pipeline.store.reader import VOCAB_FILE, read_table
from xtoken.pipeline.store.skip_records import keep_skips
from xtoken.pipeline.store.writer import ROW_GROUP, Sample, capture_batch, group_rows, write_parquet
from xtoken.pipeline.teachers import open_teacher, sees_whole_rows
from xtoken.pipeline.teachers.base import Teacher, TeacherRows, refuse_k
from xtoken.pipeline.tokens import Encoded, TextTokenizer, TokenTable, load_tokenizer, refuse_long_prefix
from xtoken.schemas.configs.capture import CodecGroup, PrecomputeConfig, TeacherGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import patiently
from xtoken.schemas.manifest import Part, TeacherInfo
from xtoken.schemas.tables import CHAT_CAPTURE, PARTS_SINCE


@dataclass(frozen=True)
class CaptureJob:
    """Everything a worker process needs to start; the plan lies in the output folder."""

    config: PrecomputeConfig
    cwd: str = field(default_factory=os.getcwd)  # what relative paths mean, wherever the worker is started

    @property
    def ahead(self) -> int:
        """See ``Job``: one shard is published while the next is scored and a third one is read."""
        return 3

    def open(self, slot: int = 0) -> "CaptureWorker":
        """Load tokenizer and teacher, and check that they fit each other and the run.

        Under ``--device auto`` each worker takes one of the visible GPUs by its slot, and so it does for vLLM, which
        knows no numbers of GPUs.

        Raises:
            XtokenError: the model cannot be loaded, its context is too short, or it is not the run's teacher.
        """
        if os.path.isdir(self.cwd):
            os.chdir(self.cwd)
        folder = Folder(self.config.out)
        config = patiently(partial(as_begun, self.config, folder))
        engines = engines_per_gpu(config.run, config.teacher.tensor_parallel)
        if config.teacher.device == "auto" or config.teacher.backend == "vllm":
            pin_gpus(slot, config.teacher.tensor_parallel)
        plan = patiently(partial(load_plan, folder))
        if plan is None:
            raise XtokenError(
                f"{config.out} holds no plan as {socket.gethostname()} sees it; every machine with workers must see "
                "the same --out: use an object store, or a file system that all of them mount"
            )
        tokenizer = open_tokenizer(config.teacher, chats=plan.form != "text")
        teacher = open_teacher(config.teacher.of_slot(slot), config.codec, tokenizer.table, engines)
        check_teacher(config.codec, teacher.info)
        weights = patiently(partial(settle_weights, folder, config.teacher))
        if weights is not None:
            teacher.info = teacher.info.model_copy(update={"weights_hash": weights})
        first = patiently(partial(settle_teacher, folder, teacher.info, teacher.settings))
        student = load_tokenizer(config.student) if config.student is not None else None
        codes = read_codes(patiently(partial(read_table, folder.url(VOCAB_FILE))))
        chat = Chat.of(config, plan.form, plan.date)
        worker = CaptureWorker(config, plan, tokenizer, teacher, student, codes, chat)
        here = teacher.info
        worker.made = Made(
            here.device if here.device != first.device else None,
            here.capture_path if here.capture_path != first.capture_path else None,
        )
        worker.keeps_space = sees_whole_rows(first)
        worker.audit = open_audit(config, folder, tokenizer, teacher, worker.context, slot)
        return worker


def open_tokenizer(config: TeacherGroup, *, chats: bool = False) -> TextTokenizer:
    """The teacher's tokenizer.

    Args:
        config: the teacher.
        chats: for conversations, of which the chat template says what stands first.

    Raises:
        XtokenError: it cannot be loaded, or puts more in front of a text than the teacher would be shown.
    """
    tokenizer = load_tokenizer(config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code)
    if config.bos != "never" and not chats:
        refuse_long_prefix(tokenizer, ", or show the teacher none of them with --bos never")
    return tokenizer


def check_teacher(codec: CodecGroup, info: TeacherInfo) -> None:
    """Refuse a teacher whose context or head what is asked for does not fit.

    Raises:
        XtokenError: the message names what fits.
    """
    longest = codec.max_tokens + 1
    if longest > info.context:
        raise XtokenError(
            f"--max-tokens {codec.max_tokens} and one more do not fit the {info.context} tokens of {info.model}'s "
            f"context; use --max-tokens {info.context - 1} or less"
        )
    refuse_k(codec, info.vocab_rows, f"the {info.vocab_rows} rows of {info.model}'s head")


class CaptureWorker:
    """See ``xtoken.pipeline.executors.protocol.Worker``; the steps of ``Stages`` are its methods."""

    def __init__(
        self,
        config: PrecomputeConfig,
        plan: Plan,
        tokenizer: TextTokenizer,
        teacher: Teacher,
        student: TextTokenizer | None,
        codes: Codes | None = None,
        chat: Chat | None = None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._tokenizer = tokenizer
        self.teacher = teacher
        self._student = student
        self._codes = codes
        self.audit: Audit | None = None
        self.made = Made()  # where it is not as the run began
        self.keeps_space = True  # False where the run's first rows had no P(a word begins)
        self._reader = SliceReader(config.corpus, plan)
        self._codec = open_codec(codec_info(config.codec))
        self._chat = chat
        self._version = PARTS_SINCE if chat is None else CHAT_CAPTURE
        shown = chat is None and sees_bos(config.teacher, tokenizer.table)
        bos = tokenizer.table.info.bos_id if shown else None
        self.context = np.array([] if bos is None else [bos], np.int32)

    def serve(self, leases: Iterator[Lease], send: Send) -> None:
        """See ``pipeline.executors.protocol.Worker``; ``worker_threads`` overlaps the steps."""
        Stages(self, self.teacher, self.audit, most_waiting=self.most_waiting).serve(leases, send)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step of the engine: what it settled on, else what was asked for."""
        taken = (self.teacher.settings.get(name) for name in ("max_num_batched_tokens", "batch_tokens"))
        return next((int(tokens) for tokens in taken if tokens), self._config.teacher.batch_on("cpu"))

    @property
    def most_waiting(self) -> int:
        """Tokens whose rows may wait to be packed: two steps."""
        return 2 * self.step_tokens

    def prepare(self, shard: int) -> Prepared | Part:
        """Read and tokenize one shard, unless it is committed by now: another driver or an overdue worker may have.

        Raises:
            StopRun: the corpus changed.
            XtokenError: the tokenizer refuses a document.
        """
        part = read_commit(Folder(self._config.out), shard)
        if part is not None:
            return part
        documents = self._reader.read(self._plan.shards[shard])
        if self._chat is not None and self._chat.info.answering is not None:
            return self._questions(shard, documents)
        if self._chat is not None:
            return self._chats(shard, self._chat.pieces(documents), len(documents))
        pieces = all_windows(documents, self._tokenizer, self._config.codec.max_tokens)
        counts = Counter(documents=len(documents))
        if self._student is not None:
            counts.update(_student_counts(self._student, self._tokenizer.table, pieces))
        return self.prepared(shard, pieces, counts)

    def prepared(self, shard: int, pieces: Sequence[Piece], counts: Counter[str]) -> Prepared:
        """Samples that are to be scored."""
        return Prepared(shard, pieces, *self._prompts(pieces), counts)

    def _chats(self, shard: int, made: ChatPieces, documents: int) -> Prepared:
        assert self._chat is not None
        counts = self._chat.counts(made) + Counter(documents=documents)
        return Prepared(shard, made.pieces, *self._prompts(made.pieces), counts, [vars(one) for one in made.left_out])

    def _questions(self, shard: int, documents: Sequence[Document]) -> Prepared:
        """A shard whose answers the teacher is to write."""
        assert self._chat is not None
        prompts, made = prompts_of(self._chat, documents)
        left_out = [vars(one) for one in made.left_out]
        questions = [question(self._chat, prompt) for prompt in prompts]
        counts = Counter(documents=len(documents), conversations_skipped=len(left_out))
        return Prepared(shard, [], [], [], counts, left_out, prompts, questions)

    def answered(self, prepared: Prepared, answers: Sequence[NDArray[np.int32]]) -> Prepared:
        """See ``Steps``."""
        assert self._chat is not None
        made = answered(self._chat, prepared.prompts_to_answer, answers)
        done = self._chats(prepared.shard, made, prepared.counts["documents"])
        done.counts.update(
            conversations_skipped=prepared.counts["conversations_skipped"],
            answers_cut=done.counts.pop("conversations_cut", 0),
        )
        return replace(done, left_out=[*prepared.left_out, *done.left_out], counts=+done.counts)

    def publish(self, prepared: Prepared, samples: Sequence[Sample]) -> Part:
        """Write, verify and commit the samples of a shard, in the order of its pieces.

        Raises:
            StopRun: there is no room to write.
        """
        counts = {**prepared.counts, "snapped": sum(sample.snapped for sample in samples)}
        if self._chat is None:
            counts["ends_moved"] = self._moved(samples)
        write = partial(_write, samples, self._codec.schema(version=self._version), self._codes, counts)
        check = CaptureCheck(self._tokenizer.table.size, self._codec.info, version=self._version)
        if prepared.left_out:
            keep_skips(Folder(self._config.out), prepared.shard, prepared.left_out)
        return publish_part(self._config.out, prepared.shard, write, check, made=self.made)

    def _moved(self, samples: Sequence[Sample]) -> int:
        table = self._tokenizer.table
        return sum(table.moved_ends(one.teacher_ids, one.teacher_end) for one in samples if one.snapped)

    def _prompts(self, pieces: Sequence[Piece]) -> tuple[list[NDArray[np.int32]], list[list[int]]]:
        """What the teacher is shown of each piece, and the pieces that have rows in batches of like lengths."""
        prompts = [np.concatenate([self.context, piece.ids]).astype(np.int32) for piece in pieces]
        limit = self._config.teacher.batch_on(self.teacher.info.device)
        batches = length_batches([len(prompt) for prompt in prompts], limit)
        scored = [[index for index in batch if len(prompts[index]) > 1] for batch in batches]
        return prompts, [batch for batch in scored if batch]

    def score(self, pieces: Sequence[Piece], on_progress: OnProgress = ignore_progress) -> list[Sample]:
        """Samples in the order of ``pieces``; the teacher sees them by length. ``on_progress`` gets bytes of text."""
        prompts, batches = self._prompts(pieces)
        scored: dict[int, TeacherRows] = {}
        done = 0
        for batch in batches:
            rows = self.teacher.rows([prompts[index] for index in batch])
            scored.update(zip(batch, rows, strict=True))
            done += sum(pieces[index].size for index in batch)
            on_progress(done)
        return [self.sample(piece, scored.get(index)) for index, piece in enumerate(pieces)]

    def sample(self, piece: Piece, rows: TeacherRows | None) -> Sample:
        """One row of the capture; ``rows`` is None where the teacher saw no token before another."""
        if rows is not None and not self.keeps_space:
            rows = replace(rows, space_logprob=None)
        if isinstance(piece, ChatPiece):
            assert self._chat is not None
            assert rows is not None, "something is taught, and never the first token"
            with _named(piece):
                size, text = self._tokenizer.table.size, self._config.codec.text
                return self._chat.sample(piece, rows, self._codec, size, text=text)
        assert isinstance(piece, Window)
        encoded = piece.encoded
        empty: NDArray[np.float32] = np.zeros(0, np.float32)
        return Sample(
            sample_id=piece.sample_id,
            text=encoded.text if self._config.codec.text else None,
            teacher_ids=encoded.ids,
            teacher_end=encoded.ends,
            packed=self._codec.no_rows() if rows is None else self._pack(piece, rows),
            realised_logprob=empty if rows is None else rows.target_logprob,
            space_logprob=empty if rows is None else rows.space_logprob,
            first_row=0 if len(self.context) else 1,
            complete=piece.complete,
            snapped=encoded.snapped,
        )

    def _pack(self, piece: Piece, rows: TeacherRows) -> object:
        with _named(piece):
            return self._codec.encode(rows, self._tokenizer.table.size)


@contextmanager
def _named(piece: Piece) -> Iterator[None]:
    """Errors of a sample's rows say which it is."""
    try:
        yield
    except XtokenError as error:
        raise XtokenError(f"sample {piece.sample_id!r}: {error}") from error


def length_batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in batches whose padded size stays within ``limit`` tokens (or one sample), longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        count = max(1, limit // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def _write(
    samples: Sequence[Sample], schema: pa.Schema, codes: Codes | None, counts: dict[str, int], url: str
) -> dict[str, int]:
    write_parquet(url, schema, sample_batches(samples, schema, codes), group_rows(len(samples)))
    return counts


def sample_batches(samples: Sequence[Sample], schema: pa.Schema, codes: Codes | None) -> Iterator[pa.RecordBatch]:
    """The samples in batches of a row group."""
    for start in range(0, len(samples), ROW_GROUP):
        yield capture_batch(samples[start : start + ROW_GROUP], schema, codes)


def _student_counts(student: TextTokenizer, teacher: TokenTable, pieces: Sequence[Window]) -> Counter[str]:
    """How the intended student's tokens meet the teacher's: chunks, and those of one token on both sides."""
    texts = [piece.encoded.text for piece in pieces]
    others = student.encode_batch(texts, [piece.complete for piece in pieces], keep_text=True)
    counts: Counter[str] = Counter()
    for piece, other in zip(pieces, others, strict=True):
        chunks, single = chunk_counts(_wide(piece.encoded, teacher), _wide(other, student.table))
        ends_meet = piece.complete and teacher.info.eos_id is not None and student.table.info.eos_id is not None
        counts.update(
            chunks=chunks + ends_meet,
            chunks_1_1=single + ends_meet,
            student_tokens=len(other.ids),
            student_snapped=int(other.snapped),
        )
    return counts


def _wide(encoded: Encoded, table: TokenTable) -> NDArray[np.int32]:
    """Byte ends of the tokens that have bytes."""
    return encoded.ends[table.lengths[encoded.ids] > 0]
