"""precompute: check, plan, run what is not committed yet, write the manifest."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xtoken.pipeline.capture.answering import BYTES_PER_TOKEN
from xtoken.pipeline.capture.audit import accepted_audits, unaudited
from xtoken.pipeline.capture.conversations import Chat, plan_date
from xtoken.pipeline.capture.corpus_form import form_of_run, form_words
from xtoken.pipeline.capture.monitor.dashboard import Dashboard
from xtoken.pipeline.capture.plan import PLAN_FILE, Plan, check_files, settle_plan
from xtoken.pipeline.capture.rendered_chat import Look
from xtoken.pipeline.capture.run_identity import (
    RUN_FILE,
    TEACHER_FILE,
    WEIGHTS_FILE,
    another_run,
    codec_info,
    read_engine_settings,
    read_teacher,
    run_hash,
    run_settings,
    settle_settings,
    settle_weights,
)
from xtoken.pipeline.capture.token_codes import corpus_codes, look_at_some
from xtoken.pipeline.capture.worker import CaptureJob, open_tokenizer
from xtoken.pipeline.executors.local import LocalExecutor, refuse_unshared
from xtoken.pipeline.executors.protocol import Executor, Job
from xtoken.pipeline.store.codes import Codes, with_codes
from xtoken.pipeline.store.figures import bos_figure
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import clean, committed, data_name
from xtoken.pipeline.store.reader import MERGES_FILE, VOCAB_FILE, read_table
from xtoken.pipeline.store.seal import SUMS_FILE, seal
from xtoken.pipeline.store.skip_records import BAD_FILE, join_skips
from xtoken.pipeline.teachers import check_backend, check_reach
from xtoken.pipeline.teachers.base import refuse_k
from xtoken.pipeline.tokens import TextTokenizer, TokenTable, load_tokenizer
from xtoken.schemas.configs.capture import CorpusForm, PrecomputeConfig, RunGroup, TeacherGroup
from xtoken.schemas.errors import IncompleteRun, Unreachable, VerificationError, XtokenError, last_words
from xtoken.schemas.heads import refuse_narrow_head, stated_rows
from xtoken.schemas.io.overlap import refuse_inside
from xtoken.schemas.io.remote import patiently
from xtoken.schemas.manifest import (
    MANIFEST,
    ONE_DEVICE,
    OTHER_SPACE,
    SEVERAL_PATHS,
    CaptureManifest,
    Part,
    provenance,
    read_manifest,
)
from xtoken.schemas.tables import CHAT_CAPTURE
from xtoken.schemas.ui.progress import Progress

_NAMED = 5
_OWN = ("data", "commits")  # folders below --out
MakeJob = Callable[[PrecomputeConfig], Job]


@dataclass(frozen=True)
class _Run:
    """What a run has settled before any worker starts."""

    config: PrecomputeConfig
    folder: Folder
    table: TokenTable
    settings: dict[str, Any]
    plan: Plan
    files: dict[str, str]
    chat: Chat | None = None

    def mine(self, index: int) -> bool:
        """Whether a shard is of this cell."""
        which, count = self.config.run.cells
        return index % count == which


def precompute(
    config: PrecomputeConfig,
    progress: Progress,
    *,
    make_job: MakeJob = CaptureJob,
    executor: Executor | None = None,
) -> CaptureManifest | None:
    """Run a teacher over a corpus and store its rows; the same command resumes, and a finished one does nothing.

    Args:
        config: what to run, on what, and where to.
        progress: shows bytes of corpus text done.
        make_job: what workers open.
        executor: where they run; left out: what the settings say.

    Returns:
        The manifest, also written to ``config.out``; None under ``--cell``, where the run that has no cell writes it.

    Raises:
        XtokenError: bad input, a backend that cannot give it, another run's folder, a corpus that changed, or no room
            to write.
        IncompleteRun: some shards failed three times; the others are committed.
    """
    refuse_places(config)
    check_backend(config.teacher, config.codec)
    folder = Folder(config.out)
    if not folder.exists(MANIFEST):
        check_reach(config.teacher)
    refuse_unshared(config.out)
    form = form_of_run(config, folder)
    tokenizer = open_tokenizer(config.teacher, chats=form != "text")
    chat = Chat.of(config, form)
    for word in form_words(config.corpus, folder, form):
        progress.note(word)
    settings = _checked_settings(config, tokenizer.table, chat)
    for word in bos_figure(tokenizer.table.info, shown=settings["bos"]).values() if chat is None else ():
        progress.note(word)
    made = folder.local and not folder.exists("")  # an object store has no folders
    fresh = settle_settings(folder, settings, type(config))
    try:
        run = _settle(config, folder, tokenizer, settings, progress, chat, form)
        return _work(run, executor, make_job, progress)
    except IncompleteRun:
        raise
    except XtokenError:
        # other cells may be at work with what lies there
        if fresh and config.run.cell is None and not committed(config.out):
            _forget(folder, made=made)
        raise


def refuse_places(config: PrecomputeConfig) -> None:
    """Refuse to write where the corpus lies.

    Raises:
        XtokenError: ``out`` or the log lies inside the corpus, or the corpus where ``out`` has files of its own.
    """
    corpus, log = config.corpus.corpus, config.run.log
    refuse_inside("--out", config.out, corpus)
    if log is not None:
        refuse_inside("--log", log, corpus)
    for name in _OWN:
        refuse_inside("corpus", corpus, f"{config.out.rstrip('/')}/{name}", "the capture's own files go there")


def _settle(
    config: PrecomputeConfig,
    folder: Folder,
    tokenizer: TextTokenizer,
    settings: dict[str, Any],
    progress: Progress,
    chat: Chat | None,
    form: CorpusForm,
) -> _Run:
    """Plan and token tables, made by the first run and checked by the later ones; a refused audit stays refused."""
    accepted_audits(config.run, folder)
    look = Look.of(config.corpus, config.teacher, tokenizer) if form == "text" else None
    date = plan_date(config, form)
    corpus, chats = config.corpus.model_copy(update={"form": form}), config.chat
    answers = 0 if chats.generate is None else BYTES_PER_TOKEN * chats.generate * chats.samples
    plan = settle_plan(folder, corpus, config.run.shard_bytes, progress, look, date, answers)
    if config.chat.date not in (None, plan.date):
        raise another_run(folder, [f"date: {plan.date!r} there, {config.chat.date!r} now"])
    if plan.form != form or (chat is not None and chat.info.date != plan.date):
        chat = Chat.of(config, plan.form, plan.date)
    if not folder.exists(VOCAB_FILE):
        if look is not None and look.documents == 0:
            # the plan was made before, perhaps for a teacher of other control tokens
            look_at_some(config.corpus, plan, look)
        write_vocab(folder, tokenizer.table, corpus_codes(config.corpus, plan, tokenizer, chat))
    files = check_vocab(folder, tokenizer.table)
    return _Run(config, folder, tokenizer.table, settings, plan, files, chat)


def _executor(run: RunGroup, teacher: TeacherGroup) -> Executor:
    if run.ray is None:
        return LocalExecutor(run.workers or max(1, len(teacher.server)), run.lease_seconds)
    from xtoken.pipeline.executors.ray_driver import RayExecutor

    gpus, parallel = run.gpus_per_worker, teacher.tensor_parallel
    device = teacher.device if teacher.takes_gpus else "cpu"
    return RayExecutor(run.ray, run.workers, gpus, parallel, device, run.lease_seconds)


def _forget(folder: Folder, *, made: bool) -> None:
    """Undo what a run wrote that failed before its first commit: corrected settings may use the folder.

    Args:
        folder: the run's.
        made: it was not there before.
    """
    for name in (TEACHER_FILE, WEIGHTS_FILE, PLAN_FILE, BAD_FILE, VOCAB_FILE, MERGES_FILE, RUN_FILE):
        folder.remove(name)
    if made:
        folder.remove_empty()


def _checked_settings(config: PrecomputeConfig, table: TokenTable, chat: Chat | None) -> dict[str, Any]:
    refuse_k(config.codec, table.size, f"the vocabulary's {table.size} tokens")
    if config.teacher.backend != "fake":  # which has no head
        rows = stated_rows(config.teacher.teacher, config.teacher.revision)
        refuse_narrow_head(config.teacher.teacher, rows, table.role, table.pieces())
    student = load_tokenizer(config.student).table if config.student is not None else None
    return run_settings(config, table, student, chat.settings if chat is not None else None)


def _work(run: _Run, executor: Executor | None, make_job: MakeJob, progress: Progress) -> CaptureManifest | None:
    """Run what is missing, then seal; see ``precompute``."""
    _clean(run)
    done = _checked_commits(run.folder, run.plan)
    missing = [shard.index for shard in run.plan.shards if run.mine(shard.index) and shard.index not in done]
    if not missing and run.config.run.cell is None and run.folder.exists(MANIFEST):
        progress.start(f"{run.config.out} is complete, nothing to do", None, "bytes")
        progress.finish()
        return _finish(run, {})
    with Dashboard(run.folder, run.plan, run.config.run, run.config.teacher, done, progress) as dashboard:
        failed = _run(run, executor, make_job, missing, dashboard, progress) if missing else {}
        if missing and (word := unaudited(run.config.run, run.folder)) is not None:
            progress.note(word)
        dashboard.enter("sealing")
        manifest = patiently(partial(_finish, run, failed)) if run.config.run.cell is None else None
        if failed:
            raise IncompleteRun(_incomplete(failed, len(run.plan.shards), run.config.out))
    return manifest


def _run(
    run: _Run,
    executor: Executor | None,
    make_job: MakeJob,
    missing: list[int],
    dashboard: Dashboard,
    progress: Progress,
) -> dict[int, str]:
    patiently(partial(settle_weights, run.folder, run.config.teacher))  # once, before workers ask for it
    dashboard.log_corpus(check_files(run.config.out, run.plan, run.config.corpus))
    progress.start("precompute", dashboard.text_bytes, "bytes", dashboard.text_bytes_done)
    try:
        return (executor or _executor(run.config.run, run.config.teacher)).run(make_job(run.config), missing, dashboard)
    finally:
        progress.finish()
        _clean(run)


def _clean(run: _Run) -> None:
    """Remove what dead workers left; other cells' workers may be alive."""
    with suppress(Unreachable):  # the next run finds it; why this one ends is more important
        clean(run.config.out, run.mine if run.config.run.cell is not None else None)


def _finish(run: _Run, failed: dict[int, str]) -> CaptureManifest:
    """Write the manifest of everything that is committed, and seal it."""
    parts = committed(run.config.out)
    assert {*parts, *failed} == set(range(len(run.plan.shards))), "the executor lost a shard"
    manifest = _manifest(run, parts, failed)
    if not _is_current(run.folder, manifest):
        run.folder.remove(SUMS_FILE)
        join_skips(run.folder, [index for index, part in parts.items() if part.counts.get("conversations_skipped")])
        run.folder.replace(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    seal(run.config.out)
    return read_manifest(run.config.out, CaptureManifest)


def write_vocab(folder: Folder, table: TokenTable, codes: Codes) -> None:
    """Write the token tables unless they are there; the codes last, since a worker takes those it finds."""
    vocab, merges = table.to_tables()
    folder.create(MERGES_FILE, _parquet(merges))
    folder.create(VOCAB_FILE, _parquet(with_codes(vocab, codes)))


def check_vocab(folder: Folder, table: TokenTable) -> dict[str, str]:
    """The sha256 of each token table, which must still be this tokenizer's.

    Raises:
        VerificationError: a table is missing, torn or another tokenizer's.
    """
    TokenTable.from_tables(read_table(folder.url(VOCAB_FILE)), read_table(folder.url(MERGES_FILE)), table.info)
    return {name: folder.sha256(name)[0] for name in (VOCAB_FILE, MERGES_FILE)}


def _parquet(table: pa.Table) -> bytes:
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=1, use_dictionary=["role"])
    return buffer.getvalue()


def _checked_commits(folder: Folder, plan: Plan) -> dict[int, Part]:
    """Committed parts, which must be of the plan and lie there with their recorded size.

    Raises:
        VerificationError: a record without its file.
    """
    found = committed(folder.root)
    sizes = folder.sizes("data")
    for index, part in found.items():
        name = data_name(index)
        size = sizes.get(name.rsplit("/", 1)[-1])
        if index >= len(plan.shards) or size != part.file_bytes:
            raise VerificationError(
                f"{folder.url(name)} has {size} bytes, its commit record says {part.file_bytes}; remove "
                f"commits/part-{index:05d}.json and the file, then run the same command to capture it again"
            )
    return found


def _manifest(run: _Run, parts: dict[int, Part], failed: dict[int, str]) -> CaptureManifest:
    config, folder = run.config, run.folder
    teacher, codec = read_teacher(folder), codec_info(config.codec)
    devices = _all_of(teacher.device, [part.device for part in parts.values()])
    paths = _all_of(teacher.capture_path, [part.capture_path for part in parts.values()])
    return CaptureManifest(
        **provenance(),
        schema_version=_version(run, devices, paths),
        files=run.files,
        parts=list(parts.values()),
        teacher=teacher.model_copy(update={"device": " + ".join(devices), "capture_path": " + ".join(paths)}),
        tokenizer=run.table.info,
        bos=run.settings["bos"],
        max_tokens=config.codec.max_tokens,
        codec=codec,
        space=config.codec.space,
        chat=run.chat.info if run.chat is not None else None,
        corpus=run.plan.corpus,
        plan_hash=run.plan.hash,
        run_hash=run_hash(run.plan.hash, teacher, run.settings, codec),
        set_aside=failed,
        audits=accepted_audits(config.run, folder),
        engine_settings=read_engine_settings(folder),
        # said by whoever wrote a card before this run went on
        licenses=read_manifest(config.out, CaptureManifest).licenses if folder.exists(MANIFEST) else {},
    )


def _all_of(first: str, parts: Sequence[str | None]) -> list[str]:
    """What the run began with, and what parts say that are of another."""
    return list(dict.fromkeys([first, *(one for one in parts if one is not None)]))


def _version(run: _Run, devices: Sequence[str], paths: Sequence[str]) -> int:
    """The first version of the schema that can say it."""
    if run.chat is not None:
        return CHAT_CAPTURE
    if len(paths) > 1:
        return SEVERAL_PATHS
    return OTHER_SPACE if run.config.codec.space != "space" else ONE_DEVICE + (len(devices) > 1)


def _is_current(folder: Folder, manifest: CaptureManifest) -> bool:
    """Whether the manifest that lies there says the same, whoever wrote it and when."""
    if not folder.exists(MANIFEST):
        return False
    there = read_manifest(folder.root, CaptureManifest)
    said_by = set(provenance())
    return there.model_dump(exclude=said_by) == manifest.model_dump(exclude=said_by)


def _incomplete(failed: dict[int, str], shards: int, out: str) -> str:
    named = "\n".join(f"  shard {index}: {last_words(error)}" for index, error in list(failed.items())[:_NAMED])
    more = f"\n  and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    return (
        f"{len(failed)} of {shards} shards were quarantined after three attempts, the others are committed in {out}:\n"
        f"{named}{more}\nthe log and {MANIFEST} hold all they said; run the same command again to try them once more"
    )
