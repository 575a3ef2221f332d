"""precompute: check, plan, run what is not committed yet, write the manifest."""

from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.capture.executor import LocalExecutor
from pipeline.capture.pilot import corpus_codes
from pipeline.capture.plan import PLAN_FILE, Plan, check_files, settle_plan
from pipeline.capture.settings import (
    RUN_FILE,
    TEACHER_FILE,
    codec_info,
    read_teacher,
    run_hash,
    run_settings,
    settle_settings,
)
from pipeline.capture.worker import CaptureJob, open_tokenizer
from pipeline.store import Folder, clean, committed, data_name, read_table
from pipeline.store.codes import Codes, with_codes
from pipeline.store.reader import MERGES_FILE, VOCAB_FILE
from pipeline.store.seal import SUMS_FILE, seal
from pipeline.teachers import check_backend
from pipeline.teachers.base import entries_asked
from pipeline.tokens import TextTokenizer, TokenTable, load_tokenizer
from schemas.config import PrecomputeConfig
from schemas.errors import IncompleteRun, VerificationError, XtokenError
from schemas.manifest import MANIFEST, CaptureManifest, Part, provenance, read_manifest
from schemas.progress import Progress

_NAMED = 5


@dataclass
class _Reporter:
    """Passes what workers tell on as progress in bytes of corpus text."""

    plan: Plan
    progress: Progress
    tokens: int = 0
    shown: dict[int, int] = field(default_factory=dict)

    def part(self, part: Part) -> None:
        """See ``Watch``."""
        self.tokens += part.tokens
        self._advance(part.index, self.plan.shards[part.index].text_bytes)

    def told(self, shard: int, done: int) -> None:
        """See ``Watch``; an attempt that starts anew moves nothing until it is past the one before."""
        self._advance(shard, min(done, self.plan.shards[shard].text_bytes))

    def _advance(self, shard: int, done: int) -> None:
        more = done - self.shown.get(shard, 0)
        if more > 0:
            self.shown[shard] = done
            self.progress.advance(more, **({"tokens": self.tokens} if self.tokens else {}))


def precompute(config: PrecomputeConfig, progress: Progress) -> CaptureManifest:
    """Run a teacher over a corpus and store its rows; the same command resumes, and a finished one does nothing.

    Args:
        config: what to run, on what, and where to.
        progress: told bytes of corpus text done.

    Returns:
        The manifest, also written to ``config.out``.

    Raises:
        XtokenError: bad input, a backend that cannot give it, another run's folder, a corpus that changed, or no room
            to write.
        IncompleteRun: some shards failed three times; the others are committed.
    """
    check_backend(config)
    folder = Folder(config.out)
    if not folder.local and "memory" in folder.fs.protocol:
        raise XtokenError(f"{config.out}: worker processes do not share memory://; use a folder or an object store")
    tokenizer = open_tokenizer(config)
    settings = _checked_settings(config, tokenizer.table)
    fresh = settle_settings(folder, settings)
    try:
        return _fill(config, folder, tokenizer, settings, progress)
    except IncompleteRun:
        raise
    except XtokenError:
        if fresh and not committed(config.out):
            _forget(folder)
        raise


def _fill(
    config: PrecomputeConfig, folder: Folder, tokenizer: TextTokenizer, settings: dict[str, Any], progress: Progress
) -> CaptureManifest:
    plan = settle_plan(folder, config, config.shard_bytes, progress)
    if not folder.exists(VOCAB_FILE):
        write_vocab(folder, tokenizer.table, corpus_codes(config, plan, tokenizer))
    files = check_vocab(folder, tokenizer.table)
    clean(config.out)
    done = _checked_commits(folder, plan)
    failed = _run(config, plan, done, progress)
    manifest = _manifest(config, tokenizer.table, plan, settings, files, failed)
    if not _is_current(folder, manifest):
        folder.remove(SUMS_FILE)
        folder.replace(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    seal(config.out)
    if failed:
        raise IncompleteRun(_incomplete(failed, len(plan.shards), config.out))
    return read_manifest(config.out, CaptureManifest)


def _forget(folder: Folder) -> None:
    """Undo what a run wrote that failed before its first commit: corrected settings may use the folder."""
    for name in (TEACHER_FILE, PLAN_FILE, VOCAB_FILE, MERGES_FILE, RUN_FILE):
        folder.remove(name)


def _checked_settings(config: PrecomputeConfig, table: TokenTable) -> dict[str, Any]:
    if entries_asked(config) > table.size:
        raise XtokenError(f"--k {config.k} is more than the vocabulary's {table.size} tokens; use --k {table.size}")
    student = load_tokenizer(config.student).table if config.student is not None else None
    return run_settings(config, table, student)


def _run(config: PrecomputeConfig, plan: Plan, done: dict[int, Part], progress: Progress) -> dict[int, str]:
    missing = [shard.index for shard in plan.shards if shard.index not in done]
    if missing:
        check_files(config.out, plan, config)
    label = "precompute" if missing else f"{config.out} is complete, nothing to do"
    report = _Reporter(plan, progress, sum(part.tokens for part in done.values()))
    before = sum(plan.shards[index].text_bytes for index in done)
    progress.start(label, plan.corpus.text_bytes, "bytes", before)
    try:
        failed = LocalExecutor(config.workers).run(CaptureJob(config), missing, report) if missing else {}
        assert {*committed(config.out), *failed} == set(range(len(plan.shards))), "the executor lost a shard"
        return failed
    finally:
        progress.finish()
        clean(config.out)


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
    present = set(folder.names("data"))
    for index, part in found.items():
        name = data_name(index)
        size = folder.fs.size(folder.at(name)) if name.rsplit("/", 1)[-1] in present else None
        if index >= len(plan.shards) or size != part.file_bytes:
            raise VerificationError(
                f"{folder.url(name)} has {size} bytes, its commit record says {part.file_bytes}; remove "
                f"commits/part-{index:05d}.json and the file, then run the same command to capture it again"
            )
    return found


def _manifest(
    config: PrecomputeConfig,
    table: TokenTable,
    plan: Plan,
    settings: dict[str, Any],
    files: dict[str, str],
    failed: dict[int, str],
) -> CaptureManifest:
    teacher, codec = read_teacher(Folder(config.out)), codec_info(config)
    return CaptureManifest(
        **provenance(),
        files=files,
        parts=list(committed(config.out).values()),
        teacher=teacher,
        tokenizer=table.info,
        bos=settings["bos"],
        max_tokens=config.max_tokens,
        codec=codec,
        corpus=plan.corpus,
        plan_hash=plan.hash,
        run_hash=run_hash(plan.hash, teacher, settings, codec),
        set_aside=failed,
        # said by whoever wrote a card before this run went on
        licenses=read_manifest(config.out, CaptureManifest).licenses if Folder(config.out).exists(MANIFEST) else {},
    )


def _is_current(folder: Folder, manifest: CaptureManifest) -> bool:
    """Whether the manifest that lies there says the same, whoever wrote it and when."""
    if not folder.exists(MANIFEST):
        return False
    there = read_manifest(folder.root, CaptureManifest)
    said_by = set(provenance())
    return there.model_dump(exclude=said_by) == manifest.model_dump(exclude=said_by)


def _incomplete(failed: dict[int, str], shards: int, out: str) -> str:
    named = "\n".join(f"  shard {index}: {error}" for index, error in list(failed.items())[:_NAMED])
    more = f"\n  and {len(failed) - _NAMED} more in manifest.json" if len(failed) > _NAMED else ""
    return (
        f"{len(failed)} of {shards} shards were set aside after three attempts, the others are committed in {out}:\n"
        f"{named}{more}\nrun the same command again to try them once more"
    )
