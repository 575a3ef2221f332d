"""What a capture will cost, from a pilot that is really scored.

The corpus is read once. Text taken evenly from it is tokenized, windows taken evenly from that text are scored, encoded
and written to a temporary folder by the code that writes a capture; what was written is extrapolated. Figures named
``low`` and ``high`` are the 95 % interval that the pilot itself gives: they say how rough it is, not what is sure.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from xtoken.pipeline.capture.conversations import Chat, ChatPieces
from xtoken.pipeline.capture.corpus_form import form_of_run
from xtoken.pipeline.capture.estimate.pipelined import busy_rate
from xtoken.pipeline.capture.estimate.sampling import POOL, Pool, Ratio, evenly, ratio, take_pool
from xtoken.pipeline.capture.plan import Plan
from xtoken.pipeline.capture.precompute import write_vocab
from xtoken.pipeline.capture.rendered_chat import Look
from xtoken.pipeline.capture.run_identity import codec_info
from xtoken.pipeline.capture.worker import CaptureWorker, check_teacher, open_tokenizer, sample_batches
from xtoken.pipeline.capture.worker_threads import Piece
from xtoken.pipeline.corpus import windows
from xtoken.pipeline.executors.gpus import engines_per_gpu
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codes import Codes, codes_by_use, restore_ids
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.inspect import column_bytes
from xtoken.pipeline.store.reader import MERGES_FILE, VOCAB_FILE, ids_of_codes, iter_parquet, stored_columns
from xtoken.pipeline.store.writer import ROW_GROUP, Sample, list_column, write_parquet
from xtoken.pipeline.teachers import check_backend, open_teacher
from xtoken.pipeline.teachers.base import refuse_k
from xtoken.pipeline.tokens import TextTokenizer
from xtoken.schemas.configs.capture import CodecGroup, PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CorpusInfo
from xtoken.schemas.tables import CHAT_CAPTURE, PARTS_SINCE
from xtoken.schemas.ui.progress import Progress

# Columns that no teacher is needed for: measured on all the text that was tokenized.
_TEXT_COLUMNS = ("sample_id", "text", "teacher_ids", "teacher_end")
# Bytes of text per token that a pilot may need at most: more of the corpus is kept than is scored.
_WIDEST = 8
_UNITS = 64  # groups of windows that the spread is taken over, at most


@dataclass
class _Shown:
    """Passes on how far a worker is (see ``OnProgress``)."""

    progress: Progress
    done: int = 0

    def __call__(self, done: int) -> None:
        self.progress.advance(done - self.done)
        self.done = done


@dataclass(frozen=True)
class Costs:
    """What the pilot says about every other token.

    Attributes:
        tokens: of the whole corpus; tokens per byte of text, with its error.
        columns: bytes per token.
        row_bytes: those of the columns that the teacher's rows make, together, with their error.
        overhead: bytes of all files that are not a column.
        vocab: bytes of the token tables.
    """

    tokens: Ratio
    columns: dict[str, float]
    row_bytes: Ratio
    overhead: float
    vocab: int


@dataclass(frozen=True)
class Pilot:
    """What a pilot found.

    Attributes:
        pool: the corpus and what was taken from it.
        costs: what a token costs.
        rate: rows per second of one worker with the machine for itself, once its engine is warm; on a GPU, of one that
            is kept busy.
        start_up: seconds until the engine is ready.
        device: what the engine runs on.
        tokens, windows: what was scored; all there is if ``whole``.
        rows: figures of what the codec keeps of them.
        chat: what became of conversations; None of text.
    """

    pool: Pool
    costs: Costs
    rate: float
    start_up: float
    device: str
    tokens: int
    windows: int
    whole: bool
    rows: dict[str, Any]
    chat: dict[str, Any] | None = None

    @property
    def tokens_per_byte(self) -> Ratio:
        """Of the corpus's text."""
        return self.costs.tokens

    @property
    def vocab(self) -> int:
        """Bytes of the token tables."""
        return self.costs.vocab

    @property
    def bytes_per_token(self) -> float:
        """Of a capture's parts."""
        return sum(self.costs.columns.values()) + self.costs.overhead / (self.costs.tokens.value * self.pool.text_bytes)

    def figures(self, text_bytes: int) -> dict[str, Any]:
        """What a run over so many bytes of text takes, column by column, and how sure that is."""
        costs = self.costs
        tokens = costs.tokens.value * text_bytes
        in_rows = tokens * sum(size for name, size in costs.columns.items() if name not in _TEXT_COLUMNS)
        parts = tokens * self.bytes_per_token
        # text is known from all that was tokenized, rows only from the pilot
        error = math.hypot(costs.tokens.error, costs.row_bytes.error * in_rows / parts) if parts else 0.0
        columns = {name: round(size, 3) for name, size in costs.columns.items()}
        return {
            **interval("tokens", tokens, costs.tokens.error),
            "tokens_per_byte": costs.tokens.value,
            **interval("disk_bytes", parts, error, costs.vocab),
            "vocabulary_bytes": costs.vocab,
            "bytes_per_token": {**columns, "all": round(self.bytes_per_token, 3)},
            **self.rows,
            "rows_per_s": self.rate,
            "start_up_s": self.start_up,
            "pilot_tokens": self.tokens,
            "pilot_windows": self.windows,
            "whole_corpus_scored": self.whole,
        }


class Reading(NamedTuple):
    """How a run reads its corpus: the teacher's tokenizer, and of conversations the rest."""

    tokenizer: TextTokenizer
    chat: Chat | None

    @classmethod
    def of(cls, config: PrecomputeConfig) -> "Reading":
        """Load them.

        Raises:
            XtokenError: they cannot be loaded, or settings do not fit what the corpus holds.
        """
        form = form_of_run(config, Folder(config.out))
        return cls(open_tokenizer(config.teacher, chats=form != "text"), Chat.of(config, form))


def take_pilot(config: PrecomputeConfig, tokens: int, progress: Progress, reading: Reading | None = None) -> Pilot:
    """Read the corpus once, and score about so many tokens of it.

    Args:
        config: of the capture; ``out`` is a folder to write to.
        tokens: of the pilot.
        progress: shows bytes of text.
        reading: where it is loaded already.

    Raises:
        XtokenError: bad input, or a teacher that cannot be loaded or does not fit the flags.
    """
    check_backend(config.teacher, config.codec)
    tokenizer, chat = reading or Reading.of(config)
    refuse_k(config.codec, tokenizer.table.size, f"the vocabulary's {tokenizer.table.size} tokens")
    look = Look.of(config.corpus, config.teacher, tokenizer) if chat is None else None
    pool = take_pool(config.corpus, config.run.shard_bytes, max(POOL, _WIDEST * tokens), progress, look)
    made = [] if chat is None else [chat.pieces([piece]) for piece in pool.pieces]
    pieces: list[Sequence[Piece]] = [one.pieces for one in made]
    if chat is None:
        pieces = [list(windows(piece, tokenizer, config.codec.max_tokens)) for piece in pool.pieces]
    if not any(pieces):
        raise XtokenError(f"not one conversation of {config.corpus.corpus} can be used: {_skipped(made)}")
    chosen = _choose([window for piece in pieces for window in piece], tokens)
    began = time.monotonic()
    worker, device = _open_worker(config, pool, tokenizer, chat)
    opened = time.monotonic() - began
    samples, rate = _score(worker, chosen, progress)
    if device != "cpu" and rate:  # all of the pilot is one step of a GPU
        progress.start("speed of a busy engine", None, "bytes")
        rate = busy_rate(worker, chosen)
        progress.finish()
    return Pilot(
        pool=pool,
        costs=_costs(config.codec, Path(config.out), pool, pieces, samples, tokenizer, chat is not None),
        rate=rate,
        start_up=opened,
        device=device,
        tokens=sum(len(sample.teacher_ids) for sample in samples),
        windows=len(samples),
        whole=pool.whole and len(samples) == sum(map(len, pieces)),
        rows=_row_figures(config.codec, config.out),
        chat=None if chat is None else _chat_figures(chat, made),
    )


def _skipped(made: Sequence[ChatPieces]) -> dict[str, int]:
    return dict(Counter(skip.reason for one in made for skip in one.left_out).most_common())


def _chat_figures(chat: Chat, made: Sequence[ChatPieces]) -> dict[str, Any]:
    """What became of the conversations that were looked at."""
    samples = [piece for one in made for piece in one.pieces]
    counts = sum((one.counts for one in made), Counter[str]())
    taught = sum(int(piece.tokens.learn.sum()) for piece in samples)
    skipped = _skipped(made)
    return {
        "form": chat.info.form,
        "taught_share": round(taught / max(1, sum(len(piece.ids) for piece in samples)), 4),
        "looked_at": {"conversations": len(made), "samples": len(samples), "cut": counts["conversations_cut"]},
        **({"skipped_of_those": skipped} if skipped else {}),
    }


def _choose(windows: Sequence[Piece], tokens: int) -> list[Piece]:
    """About so many tokens, evenly from all windows."""
    total = sum(map(_size, windows))
    return evenly(windows, math.ceil(len(windows) * tokens / max(total, 1)))


def _open_worker(
    config: PrecomputeConfig, pool: Pool, tokenizer: TextTokenizer, chat: Chat | None
) -> tuple[CaptureWorker, str]:
    """The worker of a capture, without a shard to run, and what it runs on."""
    info = CorpusInfo(source=config.corpus.corpus, hash="", documents=pool.documents, text_bytes=pool.text_bytes)
    plan = Plan(corpus=info, files=pool.files, shard_bytes=config.run.shard_bytes, shards=[])
    teacher = open_teacher(
        config.teacher,
        config.codec,
        tokenizer.table,
        engines_per_gpu(config.run, config.teacher.tensor_parallel),
    )
    check_teacher(config.codec, teacher.info)
    return CaptureWorker(config, plan, tokenizer, teacher, None, chat=chat), teacher.info.device


def _score(worker: CaptureWorker, chosen: Sequence[Piece], progress: Progress) -> tuple[list[Sample], float]:
    """Samples of the windows, and rows per second once the engine was warm."""
    progress.start("pilot", sum(window.size for window in chosen), "bytes")
    worker.score([min(chosen, key=_size)])
    began = time.monotonic()
    samples = worker.score(chosen, _Shown(progress))
    seconds = time.monotonic() - began
    progress.finish()
    rows = sum(len(sample.teacher_ids) - sample.first_row for sample in samples)
    return samples, rows / max(seconds, 1e-9)


def _costs(
    codec: CodecGroup,
    folder: Path,
    pool: Pool,
    pieces: Sequence[Sequence[Piece]],
    samples: Sequence[Sample],
    tokenizer: TextTokenizer,
    chats: bool,
) -> Costs:
    schema = open_codec(codec_info(codec)).schema(version=CHAT_CAPTURE if chats else PARTS_SINCE)
    windows = [window for piece in pieces for window in piece]
    codes = codes_by_use((window.ids for window in windows), tokenizer.table.size)
    tokens = _tokens_per_byte(pool, pieces)
    pool_tokens, pilot_tokens = sum(map(_size, windows)), sum(len(sample.teacher_ids) for sample in samples)
    text_schema = pa.schema([field for field in schema if field.name in _TEXT_COLUMNS])
    text, _ = _written(folder / "text.parquet", text_schema, _text_batches(windows, text_schema, text=codec.text))
    rows, overhead = _written(folder / "rows.parquet", schema, sample_batches(samples, schema, codes))
    columns = {name: (text[name] / pool_tokens if name in text else rows[name] / pilot_tokens) for name in rows}
    write_vocab(Folder(str(folder)), tokenizer.table, codes)
    total = tokens.value * pool.text_bytes
    # a part's last group of rows is not full
    groups = total / pool_tokens * len(windows) / ROW_GROUP + pool.shards / 2
    return Costs(
        tokens=tokens,
        columns=columns,
        row_bytes=_row_bytes(folder, samples, schema, codes, pilot_tokens / total),
        overhead=overhead * max(groups, pool.shards),
        vocab=sum((folder / name).stat().st_size for name in (VOCAB_FILE, MERGES_FILE)),
    )


def _tokens_per_byte(pool: Pool, pieces: Sequence[Sequence[Piece]]) -> Ratio:
    tokens = [sum(map(_size, piece)) for piece in pieces]
    sizes = [
        sum(window.size for window in piece) if document.contents is None else document.contents
        for document, piece in zip(pool.pieces, pieces, strict=True)
    ]
    if pool.whole:
        return ratio([sum(tokens)], [pool.text_bytes], 1.0)
    # longer documents were taken more often, in proportion: each counts once
    shares = [count / size for count, size in zip(tokens, sizes, strict=True)]
    return ratio(shares, [1.0] * len(shares), sum(sizes) / pool.text_bytes)


def _row_bytes(folder: Path, samples: Sequence[Sample], schema: pa.Schema, codes: Codes, seen: float) -> Ratio:
    """Bytes per token of what the rows take, over groups of windows that are written by themselves."""
    count = min(_UNITS, len(samples))
    units = [samples[index * len(samples) // count : (index + 1) * len(samples) // count] for index in range(count)]
    sizes = []
    for unit in units:
        columns, _ = _written(folder / "unit.parquet", schema, sample_batches(unit, schema, codes))
        sizes.append(sum(size for name, size in columns.items() if name not in _TEXT_COLUMNS))
    return ratio(sizes, [sum(len(sample.teacher_ids) for sample in unit) for unit in units], seen)


def _size(window: Piece) -> int:
    return len(window.ids)


def _written(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> tuple[dict[str, int], float]:
    """Bytes of each column of a file, and what else it takes per group of rows."""
    write_parquet(str(path), schema, batches)
    metadata = pq.read_metadata(path)
    with path.open("rb") as file:
        columns = dict(column_bytes(file, path.name))
    return columns, (path.stat().st_size - sum(columns.values())) / metadata.num_row_groups


def _text_batches(windows: Sequence[Piece], schema: pa.Schema, *, text: bool) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(windows), ROW_GROUP):
        part = windows[start : start + ROW_GROUP]
        columns = [
            pa.array([window.sample_id for window in part]),
            pa.array([window.text if text else None for window in part], pa.string()),
            list_column([window.ids for window in part], "teacher_ids", schema),
            list_column([window.ends for window in part], "teacher_end", schema),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def interval(name: str, value: float, error: float, fixed: int = 0) -> dict[str, int | None]:
    """``low`` and ``high`` of a figure; None where one unit was seen, which tells no spread.

    Args:
        name: of the figure.
        value: what is known to within ``error``.
        error: half of the interval, relative; NaN where it is not known.
        fixed: what is added and known exactly.
    """
    ends = {"low": value * max(0.0, 1.0 - error), "high": value * (1.0 + error)}
    return {f"{name}_{end}": None if math.isnan(error) else round(at + fixed) for end, at in ends.items()}


def _row_figures(codec: CodecGroup, folder: str) -> dict[str, Any]:
    """What the codec keeps of the pilot's rows."""
    path = str(Path(folder) / "rows.parquet")
    return open_codec(codec_info(codec)).estimate(partial(_rows_as_read, path))


def _rows_as_read(path: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    id_of_code = ids_of_codes(str(Path(path).parent))
    for batch in iter_parquet(path, stored_columns(columns, id_of_code)):
        yield restore_ids(batch, id_of_code)
