"""Proof of values: rows read back from the store against the same tokens scored another way.

The other way is the engine's own second path (``--audit path``), by every worker, or transformers in float32 on the CPU
(``--audit hf``), by the worker of the run that commits first: it loads the whole teacher once more. Windows are drawn
at random from the worker's first committed shard. What is found lies in ``audits/part-NNNNN.json`` and goes into the
manifest. Rows that cannot be of the same model and text stop the run, and every later one that would finish this
capture.
"""

import gc
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from xtoken.pipeline.capture.differences import differences
from xtoken.pipeline.capture.plan import Plan, load_plan
from xtoken.pipeline.capture.run_identity import codec_info, read_small, read_teacher
from xtoken.pipeline.capture.worker_threads import Audit
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codes import restore_ids
from xtoken.pipeline.store.columns import list_lengths
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import AUDITS, read_commit
from xtoken.pipeline.store.reader import ids_of_codes, iter_parquet, local_part, stored_columns
from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.teachers.base import Teacher, TeacherRows, chosen_rows
from xtoken.pipeline.tokens import TextTokenizer, TokenTable
from xtoken.schemas.configs.capture import CodecGroup, PrecomputeConfig, RunGroup, TeacherGroup
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.memory import free_memory
from xtoken.schemas.io.remote import named_errors, patiently
from xtoken.schemas.manifest import MOST_AUDITS, AuditRecord, Part, TeacherInfo
from xtoken.schemas.spans import CHAT_ROW_COLUMNS, ROW_COLUMNS, tokens_with_row

_NAME = re.compile(r"part-\d{5,}\.json")
_RECORD_BYTES = 1 << 16
_ROW_LENGTH = "realised_logprob"  # one value per row, whatever the codec
# Beyond these two ways of computing one model never are, not even with quantised weights on one side.
_MOST_REALISED = 0.5
_MOST_ENTRIES = 1.0
_LEAST_COMMON = 0.5
_NO_NUMBER = 1e9  # stands for a difference that is infinite or undefined; JSON has neither

_WAY_OUT = (
    "Check that --teacher, --revision and --dtype name what the engine really ran, try another version of the engine "
    "or --backend hf, and capture into another --out; --audit none is for those who know why the two differ"
)
_PATIENCE_SECONDS = 1800.0  # as long as an outage may last for those who publish
R = TypeVar("R")
Score = Callable[[Sequence[NDArray[np.int32]]], tuple[list[TeacherRows], str]]
"""Scores prompts another way; also says which."""


def open_audit(
    config: PrecomputeConfig,
    folder: Folder,
    tokenizer: TextTokenizer,
    teacher: Teacher,
    context: NDArray[np.int32],
    slot: int = 0,
) -> Audit | None:
    """A worker's audit of one shard that it committed; None where none is wanted, or the engine has no second path.

    Args:
        config: of the capture.
        folder: of the capture.
        tokenizer: the teacher's.
        teacher: whose rows they are.
        context: int32, what the teacher is shown before each sample.
        slot: of the worker, see ``xtoken.pipeline.executors.protocol.Job``.

    Raises:
        XtokenError: ``--audit hf`` of a model that transformers does not run, or that does not fit the memory.
    """
    run = config.run
    if run.audit == "none" or (run.audit == "path" and teacher.second_path([]) is None):
        return None
    score: Score = _SecondPath(teacher)
    turn: Turn | None = None
    if run.audit == "hf":
        score = _Transformers.of(config.teacher, config.codec, tokenizer.table)
        turn = Turn(folder, slot, run.cells[0])
    return _Audit(config.codec, run, folder, teacher.info, context, score, turn)


def read_audits(folder: Folder) -> list[AuditRecord]:
    """What workers found, by number of the shard; the first ``MOST_AUDITS`` where there are more.

    Raises:
        VerificationError: a record is not one of ours.
    """
    names = [name for name in folder.names(AUDITS) if _NAME.fullmatch(name)]
    return [_read(folder, f"{AUDITS}/{name}") for name in names[:MOST_AUDITS]]


def accepted_audits(run: RunGroup, folder: Folder) -> list[AuditRecord]:
    """``read_audits`` for a manifest; under ``--audit none`` whatever they found.

    Raises:
        XtokenError: one found rows that cannot be of the same model and text.
    """
    records = read_audits(folder)
    for record in records if run.audit != "none" else ():
        _refuse_other_rows(record, folder.root, read_teacher(folder).model)
    return records


def unaudited(run: RunGroup, folder: Folder) -> str | None:
    """What to say of a run of which no worker lived to audit it by transformers as it was asked to."""
    if run.audit != "hf" or any(record.method == "hf" for record in read_audits(folder)):
        return None
    return (
        "no part was audited by --audit hf: the worker whose turn it was ended over it (its memory may be too small), "
        "or what it had committed holds no row"
    )


def _refuse_other_rows(record: AuditRecord, root: str, model: str) -> None:
    top1, entries = record.same_top1, max(record.entries_mean or 0.0, record.entropy_mean or 0.0)
    common = record.ids_in_common if top1 is None else top1
    if record.realised_mean <= _MOST_REALISED and entries <= _MOST_ENTRIES and common >= _LEAST_COMMON:
        return
    what = "sampled tokens are the same" if top1 is None else "rows have the same most probable token"
    raise XtokenError(
        f"{_not_of(root, model, record.against)}: {common:.1%} of the {what} (asked for are {_LEAST_COMMON:.0%}), "
        f"log-probabilities differ on average by {record.realised_mean:.3g} nats for the text's tokens (at most "
        f"{_MOST_REALISED:g}) and by {entries:.3g} for stored entries or entropies (at most {_MOST_ENTRIES:g}). "
        f"{_WAY_OUT}"
    )


def _not_of(root: str, model: str, against: str) -> str:
    return f"what {root} stores is not what {model} gives when scored again by {against}"


def _read(folder: Folder, name: str) -> AuditRecord:
    try:
        return AuditRecord.model_validate_json(read_small(folder, name, _RECORD_BYTES))
    except ValidationError as error:
        raise VerificationError(
            f"{folder.url(name)} is not an audit ({error.error_count()} errors); remove it and run the same command "
            "again"
        ) from error


@dataclass(frozen=True)
class Turn:
    """Which of a run's workers audits, where one is enough.

    The first to ask leaves a temporary file that says so, which the run removes when it ends and the next one when it
    begins. A worker that finds its own slot there follows one that died over its audit, and takes its turn.

    Attributes:
        folder: of the capture.
        slot: of this worker; no two that live have the same.
        cell: of the run; each cell is a run of its own, and sweeps what has the number of a part of its own.
    """

    folder: Folder
    slot: int
    cell: int

    def taken(self, shard: int) -> bool:
        """Whether it is this worker's turn, with this shard."""
        name = f"{AUDITS}/part-{self.cell:05d}.turn.tmp"
        claim = json.dumps({"slot": self.slot, "shard": shard}).encode()
        self.folder.make(AUDITS)
        if self.folder.create(name, claim):
            return True
        try:
            there = json.loads(self.folder.read(name))
        except FileNotFoundError:  # swept: better twice than never
            return True
        if there["slot"] != self.slot or self.folder.exists(_record_name(there["shard"])):
            return False
        self.folder.replace(name, claim)
        return True


def _record_name(shard: int) -> str:
    return f"{AUDITS}/part-{shard:05d}.json"


@dataclass(frozen=True)
class _SecondPath:
    """The engine's other way out; see ``Score``."""

    teacher: Teacher

    def __call__(self, prompts: Sequence[NDArray[np.int32]]) -> tuple[list[TeacherRows], str]:
        rows = self.teacher.second_path(prompts)
        assert rows is not None, "the engine said that it has a second path"
        info = self.teacher.info
        return rows, f"{info.backend}'s second path ({info.engine_version})"


@dataclass(frozen=True)
class _Transformers:
    """The model in float32 on the CPU, loaded for one call; see ``Score``."""

    config: TeacherGroup
    codec: CodecGroup
    table: TokenTable
    weights: int

    @classmethod
    def of(cls, config: TeacherGroup, codec: CodecGroup, table: TokenTable) -> "_Transformers":
        """Refuse what cannot be loaded, before the teacher has worked for it.

        Raises:
            XtokenError: transformers does not know the model, or it does not fit the memory.
        """
        changes = {"backend": "hf", "device": "cpu", "dtype": "float32", "tensor_parallel": 1}
        config = config.model_copy(update=changes)
        audit = cls(config, codec.model_copy(update={"temperatures": []}), table, _float32_bytes(config))
        audit._refuse_too_large()
        return audit

    def __call__(self, prompts: Sequence[NDArray[np.int32]]) -> tuple[list[TeacherRows], str]:
        self._refuse_too_large()
        rows, info = self._scored(prompts)
        gc.collect()
        return rows, f"{info.engine_version}, {info.dtype} on {info.device}"

    def _scored(self, prompts: Sequence[NDArray[np.int32]]) -> tuple[list[TeacherRows], TeacherInfo]:
        try:
            teacher = open_teacher(self.config, self.codec, self.table)
            return teacher.rows(prompts), teacher.info
        except (
            XtokenError,
            ImportError,
            MemoryError,
            RuntimeError,
        ) as error:  # torch says RuntimeError where memory is short
            raise _cannot(self.config, error) from error

    def _refuse_too_large(self) -> None:
        free = free_memory()
        if free is not None and self.weights > free:
            raise _cannot(
                self.config, f"its weights take {self.weights / 1e9:.1f} GB in float32, {free / 1e9:.1f} GB are free"
            )


def _cannot(config: TeacherGroup, why: Exception | str) -> XtokenError:
    return XtokenError(
        f"--audit hf cannot run {config.teacher} by transformers on the CPU: {why}\n"
        "Use --audit none, or --audit path where the engine has a second way out"
    )


def _float32_bytes(config: TeacherGroup) -> int:
    """Bytes of the model's weights in float32; its modules are built without any.

    Raises:
        XtokenError: transformers does not know the model.
    """
    import torch
    import transformers

    from xtoken.pipeline.teachers import model_source

    auto: Any = transformers.AutoModelForCausalLM
    try:
        model_config = model_source.load_model_config(config)
        with torch.device("meta"):
            model = auto.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except (XtokenError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise _cannot(config, error) from error
    return 4 * sum(int(weight.numel()) for weight in model.parameters())


@dataclass(frozen=True)
class _Audit:
    """See ``open_audit``; call with the shard."""

    codec: CodecGroup
    run: RunGroup
    folder: Folder
    info: TeacherInfo
    context: NDArray[np.int32]
    score: Score
    turn: Turn | None  # None: every worker audits

    def __call__(self, shard: int) -> None:
        """Audit a shard and record it; nothing to do where it has no row, or where another worker does it for all.

        Raises:
            XtokenError: its rows cannot be of this model and text.
        """
        part = self._reached(partial(read_commit, self.folder, shard))
        if part is None or part.rows == 0:
            return
        if self.turn is not None and not self._reached(partial(self.turn.taken, shard)):
            return
        stored = self._reached(partial(self._sample, part))
        prompts = [np.concatenate([self.context, ids]).astype(np.int32) for ids in _lists(stored, "teacher_ids")]
        others, against = self.score(prompts)
        if [len(rows.target_logprob) for rows in others] != [len(ids) - 1 for ids in prompts]:
            wrong = _not_of(self.folder.root, self.info.model, against)
            raise XtokenError(f"{wrong}: it gave other numbers of rows. {_WAY_OUT}")
        figures = differences(stored, codec_info(self.codec), self._stored_ones(stored, others))
        record = AuditRecord(
            method="hf" if self.run.audit == "hf" else "path",
            against=against,
            capture_path=self.info.capture_path,
            samples=stored.num_rows,
            rows=int(list_lengths(stored, _ROW_LENGTH).sum()),
            **{name: value if np.isfinite(value) else _NO_NUMBER for name, value in figures.items()},
        )
        self._reached(partial(self._keep, shard, record))
        _refuse_other_rows(record, self.folder.root, self.info.model)

    def _stored_ones(self, stored: pa.RecordBatch, others: Sequence[TeacherRows]) -> list[TeacherRows]:
        """Of rows for every token of each prompt but its first, those that are stored."""
        has_T, shown = tokens_with_row(stored), len(self.context)
        stops_N = np.cumsum(list_lengths(stored, "teacher_ids"))
        positions = [np.flatnonzero(one) + shown - 1 for one in np.split(has_T, stops_N[:-1])]
        return [chosen_rows(rows, at) for rows, at in zip(others, positions, strict=True)]

    def _keep(self, shard: int, record: AuditRecord) -> None:
        self.folder.make(AUDITS)
        self.folder.create(_record_name(shard), record.model_dump_json(indent=1).encode() + b"\n")

    def _reached(self, step: Callable[[], R]) -> R:
        """A step that needs storage, again while that is out of reach: an outage says nothing about the rows."""
        return patiently(partial(_named, self.folder.root, step), _PATIENCE_SECONDS)

    def _sample(self, part: Part) -> pa.RecordBatch:
        """Whole samples of a part, drawn at random until they have the wanted rows; as a reader sees them."""
        codes = ids_of_codes(self.folder.root)
        columns = open_codec(codec_info(self.codec)).whole_columns
        plan = self._plan()
        spans = CHAT_ROW_COLUMNS if plan.form != "text" else ()
        names = list(dict.fromkeys(["sample_id", *ROW_COLUMNS, *spans, *columns, _ROW_LENGTH]))
        with local_part(self.folder, part.index, part) as path:
            rows_N = np.concatenate([list_lengths(batch, _ROW_LENGTH) for batch in iter_parquet(path, [_ROW_LENGTH])])
            chosen = self._chosen(plan, rows_N, part.index)
            kept, start = [], 0
            for batch in iter_parquet(path, stored_columns(names, codes)):
                here = chosen[(chosen >= start) & (chosen < start + batch.num_rows)] - start
                if len(here):
                    kept.append(restore_ids(batch.take(pa.array(here)), codes))
                start += batch.num_rows
        return pa.Table.from_batches(kept).combine_chunks().to_batches()[0]

    def _plan(self) -> Plan:
        plan = load_plan(self.folder)
        assert plan is not None, "a shard was committed, so there is a plan"
        return plan

    def _chosen(self, plan: Plan, rows_N: NDArray[np.int64], shard: int) -> NDArray[np.int64]:
        """Numbers of samples with at least the wanted rows together, ascending; they follow from plan and shard."""
        seed = int.from_bytes(sha256(f"{plan.hash}:{shard}".encode()).digest()[:8], "little")
        order_N = np.random.default_rng(seed).permutation(np.flatnonzero(rows_N > 0))
        enough = int(np.searchsorted(np.cumsum(rows_N[order_N]), self.run.audit_rows)) + 1
        return np.sort(order_N[:enough])


def _named(root: str, step: Callable[[], R]) -> R:
    with named_errors(root):
        return step()


def _lists(batch: pa.RecordBatch, name: str) -> list[NDArray[np.int32]]:
    return [value.values.to_numpy() for value in batch[name]]
