"""Align: a capture and a student become targets that a trainer reads without teacher or capture.

Part n of the targets is part n of the capture. Workers publish and commit parts by themselves, as at capture, so a
run may die anywhere and the same command goes on with what is missing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from xtoken.pipeline.align.conversations import ChatStudent
from xtoken.pipeline.align.form import open_form
from xtoken.pipeline.align.losses import builders
from xtoken.pipeline.align.refusals import (
    refuse_losses,
    refuse_narrow_student,
    refuse_no_text,
    refuse_other_kind,
    w_rule,
)
from xtoken.pipeline.align.run_identity import claim, run_settings
from xtoken.pipeline.align.skipped_samples import Skipped, SkippedSamples
from xtoken.pipeline.align.stage import AlignJob, chat_student, phi_of, refuse_other_tokenizer
from xtoken.pipeline.executors.local import LocalExecutor, refuse_unshared
from xtoken.pipeline.executors.protocol import Event, Executor
from xtoken.pipeline.project.build import build_w
from xtoken.pipeline.project.files import read_projection, write_table, write_tables
from xtoken.pipeline.project.projection import Projection
from xtoken.pipeline.project.stops import StopPair, with_stops
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import clean, committed
from xtoken.pipeline.store.reader import load_vocab
from xtoken.pipeline.store.seal import SUMS_FILE, seal
from xtoken.pipeline.store.skip_records import SKIPPED_FILE
from xtoken.pipeline.tokens import TextTokenizer, TokenTable, load_tokenizer, refuse_long_prefix
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import IncompleteRun, Unreachable, last_words
from xtoken.schemas.io.remote import patiently
from xtoken.schemas.manifest import (
    MANIFEST,
    OTHER_SPACE,
    WHOLE_TARGETS,
    CaptureManifest,
    TargetManifest,
    TokenizerInfo,
    content_hash,
    digest,
    provenance,
    read_manifest,
)
from xtoken.schemas.tables import IMPORTED_TARGETS
from xtoken.schemas.target_form import CODES_FILE, TargetForm, TokenCodes
from xtoken.schemas.ui.progress import Progress

STUDENT_VOCAB_FILE = "student_vocab.parquet"
_NAMED = 5
_POOL = "ARROW_DEFAULT_MEMORY_POOL"


@dataclass(frozen=True)
class _Run:
    """What a run has settled before any worker starts."""

    config: AlignConfig
    capture: CaptureManifest
    projection: Projection
    tokenizer: TextTokenizer
    settings: dict[str, Any]
    files: dict[str, str]
    form: TargetForm
    chat: ChatStudent | None
    stops: StopPair | None

    @property
    def student(self) -> TokenizerInfo:
        """The student's tokenizer, as manifests have it."""
        return self.tokenizer.table.info

    def job(self) -> AlignJob:
        """What workers open."""
        config, capture = self.config, self.capture
        phi_B = phi_of(config.losses, load_vocab(config.captures[0]), self.tokenizer)
        return AlignJob(config, config.captures[0], config.out, self.projection, capture.codec, phi_B, self.stops)


def align(config: AlignConfig, progress: Progress, *, executor: Executor | None = None) -> TargetManifest:
    """Build the targets of every part of one capture; the same command resumes, and a finished one does nothing.

    Shards that the capture quarantined are left out here too; its manifest names them.

    Args:
        config: of one capture; what is done with bad parts and samples says ``on_bad``.
        progress: told the capture's tokens.
        executor: where workers run; left out: what the settings say.

    Returns:
        The manifest, also written to ``config.out``.

    Raises:
        XtokenError: the capture is not finished or has no text or not what a loss needs, W belongs to other
            tokenizers, or the output folder belongs to another run (the message names what differs).
        VerificationError: the capture's vocabulary is not what its manifest says.
        IncompleteRun: parts failed three times, the others are committed; under ``on_bad`` set-aside the manifest is
            written without them. Or, under refuse, the student cannot represent samples.
    """
    assert len(config.captures) == 1, "several captures are run one by one"
    for root in (config.out, config.captures[0]):
        refuse_unshared(root)
    capture = read_manifest(config.captures[0], CaptureManifest)
    tokenizer = load_tokenizer(config.student)
    if capture.chat is None:
        refuse_long_prefix(tokenizer)  # as train would, when the targets are there
    student = tokenizer.table
    refuse_narrow_student(config, student)
    refuse_losses(config, student.info, capture)
    refuse_other_kind(config, capture)
    chat = chat_student(config, capture)
    projection, stops = _with_stops(_projection(config, student, capture), student, chat, capture)
    settings = run_settings(config, capture, projection, None if chat is None else chat.info, stops)
    claim(config.out, settings, type(config))
    if (there := written(config.out)) is not None and not there.set_aside:
        seal(config.out)
        return there
    refuse_no_text(config, capture)
    files = write_tables(config.out, projection)
    files[STUDENT_VOCAB_FILE] = write_table(config.out, STUDENT_VOCAB_FILE, student.to_tables()[0])
    form = open_form(config, capture, projection)
    if form.codes is not None:
        files[CODES_FILE] = _write_codes(config.out, form.codes)
    run = _Run(config, capture, projection, tokenizer, settings, files, form, chat, stops)
    failed = _work(run, executor, progress)
    return patiently(partial(_finish, run, failed))


def written(out: str) -> TargetManifest | None:
    """The manifest of targets that lies there already, or None."""
    return read_manifest(out, TargetManifest) if Folder(out).exists(MANIFEST) else None


def _write_codes(out: str, codes: TokenCodes) -> str:
    """Write codes.parquet unless it is there; its sha256."""
    folder = Folder(out)
    return folder.sha256(CODES_FILE)[0] if folder.exists(CODES_FILE) else write_table(out, CODES_FILE, codes.table())


def _projection(config: AlignConfig, student: TokenTable, capture: CaptureManifest) -> Projection:
    """W from its folder, if it was built for these two tokenizers, or built now."""
    teacher = load_vocab(config.captures[0])  # damage here would befall every part
    if config.w is None:
        return build_w(student, teacher, w_rule(builders(config.losses)))
    projection = read_projection(config.w)
    refuse_other_tokenizer("student", student.info, projection.student)
    refuse_other_tokenizer("teacher", capture.tokenizer, projection.teacher)
    return projection


def _with_stops(
    projection: Projection, student: TokenTable, chat: ChatStudent | None, capture: CaptureManifest
) -> tuple[Projection, StopPair | None]:
    """W as it is for texts, or for conversations, and what ends their answers on both sides."""
    if chat is None or capture.chat is None:
        return projection, None
    stops = StopPair.of(student, chat.info.stop_token, capture.tokenizer, capture.chat.stop_token)
    return (projection, None) if stops is None else (with_stops(projection, stops), stops)


def _executor(config: AlignConfig) -> Executor:
    if config.ray is None:
        return LocalExecutor(config.workers)
    from xtoken.pipeline.executors.ray_driver import RayExecutor

    return RayExecutor(
        config.ray, config.workers, 0.0, device="cpu", lease_seconds=config.lease_seconds, cpus_per_worker=1
    )


def _work(run: _Run, executor: Executor | None, progress: Progress) -> dict[int, str]:
    """Build every part that is not committed yet; those that failed three times, with their error."""
    out = run.config.out
    clean(out)
    done = committed(out)
    tokens = {part.index: part.tokens for part in run.capture.parts}
    waiting = [index for index in tokens if index not in done]
    if not waiting:
        return {}
    progress.start("align", sum(tokens.values()), "tokens", sum(tokens[index] for index in done))
    try:
        with _memory_goes_back():
            return (executor or _executor(run.config)).run(run.job(), waiting, _Advance(progress, tokens))
    finally:
        progress.finish()
        with suppress(Unreachable):  # the next run finds it; why this one ends is more important
            clean(out)


@contextmanager
def _memory_goes_back() -> Iterator[None]:
    """Processes that start inside have Arrow take memory from the system: its own allocator keeps what it once had.

    That is some 90 MB of a worker. Arrow reads the variable when it is loaded.
    """
    given = os.environ.get(_POOL)
    os.environ[_POOL] = given or "system"
    try:
        yield
    finally:
        if given is None:
            del os.environ[_POOL]


def _finish(run: _Run, failed: dict[int, str]) -> TargetManifest:
    """Write the manifest of everything that is committed and seal it, if nothing is wrong or that was asked for."""
    config, there = run.config, written(run.config.out)
    done = committed(config.out)
    assert {*done, *failed} == {part.index for part in run.capture.parts}, "the executor lost a part"
    parts = [done[index] for index in sorted(done)]
    lookup = SkippedSamples(config.captures[0], run.capture, config.out, run.tokenizer, config.corpus, run.chat)
    skipped = lookup.note(parts)
    # who set parts aside before has accepted samples without targets, and a manifest must not fall behind its parts
    if (failed or skipped.count) and config.on_bad == "refuse" and there is None:
        raise IncompleteRun(_refusal(run, failed, skipped))
    manifest = TargetManifest(
        **provenance(),
        schema_version=_manifest_version(run, failed),
        files=run.files,
        parts=parts,
        capture_hash=content_hash(run.capture),
        teacher=run.capture.teacher,
        teacher_tokenizer=run.capture.tokenizer,
        student=run.student,
        w_hash=run.projection.hash,
        losses=config.losses,
        unreached=config.unreached,
        merge=config.merge,
        tau=config.tau,
        codec=run.capture.codec.name,
        space=run.capture.space,
        step=run.form.step if run.form.lean else None,
        chat=None if run.chat is None else run.chat.info,
        imported=run.capture.imported,
        run_hash=digest(run.settings),
        set_aside=failed,
    )
    if there is None or (there.parts, there.set_aside) != (manifest.parts, manifest.set_aside):
        folder = Folder(config.out)
        folder.remove(SUMS_FILE)
        folder.replace(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    seal(config.out)
    if failed:
        raise IncompleteRun(
            f"{_failed(run, failed)}\nthey are quarantined, and the targets are finished without them: "
            "mend the capture and run the same command again to try them once more"
        )
    return manifest


def _manifest_version(run: _Run, failed: dict[int, str]) -> int:
    """What older releases wrote says what differs from theirs, and nothing more."""
    if run.capture.imported is not None:
        return IMPORTED_TARGETS
    if run.form.lean:
        return run.form.version
    return OTHER_SPACE if run.capture.space != "space" else WHOLE_TARGETS + bool(failed)


def _refusal(run: _Run, failed: dict[int, str], skipped: Skipped) -> str:
    said = [_failed(run, failed)] if failed else []
    if skipped.count:
        first = ", ".join([*map(repr, skipped.first), *(["..."] if skipped.count > len(skipped.first) else [])])
        said.append(
            f"the {'tokenizer' if run.chat is None else 'chat template'} of {run.config.student} cannot represent "
            f"{skipped.count:,} samples ({first}), which "
            f"{run.config.out}/{SKIPPED_FILE} names; all others are committed"
        )
        said += [f"  {count:,} samples: {reason}" for reason, count in skipped.reasons.items()]
    return "\n".join(
        [*said, "the same command goes on, and with --on-bad set-aside it finishes the targets without them"]
    )


def _failed(run: _Run, failed: dict[int, str]) -> str:
    """Which parts, and why, a line each."""
    named = "\n".join(f"  {_reason(index, error)}" for index, error in list(failed.items())[:_NAMED])
    more = f"\n  and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    total = len(run.capture.parts)
    return f"{len(failed)} of {total} parts failed, the others are committed in {run.config.out}:\n{named}{more}"


def _reason(index: int, error: str) -> str:
    last = last_words(error)
    return last if last.startswith(f"part {index} ") else f"part {index}: {last}"


class _Advance:
    """Tells progress of each finished part, in the capture's tokens."""

    def __init__(self, progress: Progress, tokens: dict[int, int]) -> None:
        self._progress = progress
        self._tokens = tokens

    def see(self, event: Event) -> None:
        """See ``Watch``; parts are short enough to be told whole."""
        if event.kind == "part" and event.part is not None:
            self._progress.advance(self._tokens[event.shard], chunks=event.part.counts.get("chunks", 0))

    def tick(self) -> None:
        """See ``Watch``."""
