"""Align: a capture and a student become targets that a trainer reads without teacher or capture."""

import json
from itertools import islice
from typing import Any

from pipeline.align.stage import AlignJob, read_part, refuse_other_tokenizer
from pipeline.align.texts import CorpusTexts, refuse_without_text
from pipeline.capture.executor import LocalExecutor
from pipeline.capture.work import Event
from pipeline.project.build import build_w
from pipeline.project.files import read_projection, write_table, write_tables
from pipeline.project.projection import Projection
from pipeline.store import Folder, clean, committed, load_vocab
from pipeline.store.left_out import without_rows
from pipeline.store.seal import seal
from pipeline.tokens import TokenTable, load_tokenizer
from schemas.config import AlignConfig
from schemas.errors import IncompleteRun, XtokenError
from schemas.manifest import (
    MANIFEST,
    CaptureManifest,
    Part,
    TargetManifest,
    TokenizerInfo,
    content_hash,
    digest,
    provenance,
    read_manifest,
)
from schemas.progress import Progress

RUN_FILE = "align.json"
STUDENT_VOCAB_FILE = "student_vocab.parquet"
# Losses that have no meaning without the mass not kept.
_NEED_REST = ("h-kl", "gold", "uld", "byte-prefix")
# Losses that are served by the log-probability of the text alone (ALM's correction reads space_logprob).
_NEED_NO_ROWS = ("ce", "alm")
# Losses whose targets are no linear function of a row.
_NOT_LINEAR = {"h-kl": "compares sorted lists", "gold": "compares sorted lists", "uld": "compares sorted lists"}


def align(config: AlignConfig, progress: Progress) -> TargetManifest:
    """Build the targets of every part of a capture; what is committed already is kept.

    Shards that the capture set aside are left out here too; its manifest names them.

    Raises:
        XtokenError: the capture is not finished or has no text or not what a loss needs, W belongs to other
            tokenizers, or the output folder belongs to another run (the message names what differs).
        IncompleteRun: parts failed three times; the others are committed.
    """
    capture = read_manifest(config.captures[0], CaptureManifest)
    student = load_tokenizer(config.student).table
    _refuse_losses(config, student.info, capture)
    projection = _projection(config, student, capture)
    settings = _settings(config, capture, projection)
    _claim(config.out, settings)
    if Folder(config.out).exists(MANIFEST):
        seal(config.out)
        return read_manifest(config.out, TargetManifest)
    _refuse_without_text(config, capture)
    files = write_tables(config.out, projection)
    files[STUDENT_VOCAB_FILE] = write_table(config.out, STUDENT_VOCAB_FILE, student.to_tables()[0])
    job = AlignJob(config, config.captures[0], config.out, projection, capture.codec, capture.tokenizer.eos_id)
    parts = _run(job, capture, progress)
    manifest = TargetManifest(
        **provenance(),
        files=files,
        parts=parts,
        capture_hash=content_hash(capture),
        teacher=capture.teacher,
        teacher_tokenizer=capture.tokenizer,
        student=student.info,
        w_hash=projection.hash,
        losses=config.losses,
        unreached=config.unreached,
        merge=config.merge,
        tau=config.tau,
        codec=capture.codec.name,
        run_hash=digest(settings),
    )
    Folder(config.out).replace(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    seal(config.out)
    return manifest


def _refuse_losses(config: AlignConfig, student: TokenizerInfo, capture: CaptureManifest) -> None:
    """Raise XtokenError for a loss that this pair or this capture cannot serve."""
    teacher, tau = capture.tokenizer, config.tau
    if "sparse-kl" in config.losses and student.hash != teacher.hash:
        raise XtokenError(
            f"sparse-kl compares rows of one vocabulary, but the student's tokenizer {student.name} "
            f"({student.hash[:12]}) is not the teacher's, {teacher.name} ({teacher.hash[:12]}); take --for p-kl"
        )
    _refuse_without_rows(config, capture)
    if capture.codec.name == "sampled":
        _refuse_biased(config)
    if tau in capture.codec.temperatures:
        return
    refused = [loss for loss in config.losses if loss in _NEED_REST]
    if "p-kl" in config.losses and config.merge == "mean":
        refused.append("p-kl with --merge mean")
    if refused:
        raise XtokenError(
            f"{', '.join(refused)} at --tau {tau:g} needs the mass not kept at that temperature, and "
            f"{config.captures[0]} stores it at {', '.join(f'{known:g}' for known in capture.codec.temperatures)} only; capture again with "
            f"--temperatures {tau:g}, or leave --tau out"
        )


def _refuse_without_rows(config: AlignConfig, capture: CaptureManifest) -> None:
    """Raise XtokenError for a loss that needs the distributions, where a subset left them out."""
    refused = [loss for loss in config.losses if loss not in _NEED_NO_ROWS]
    if refused and without_rows(capture.left_out):
        raise XtokenError(
            f"{config.captures[0]} is a subset without the teacher's rows, which --for {','.join(refused)} needs; take "
            f"--for {','.join(_NEED_NO_ROWS)}, or fetch the capture with rows among its --columns"
        )


def _refuse_biased(config: AlignConfig) -> None:
    """Raise XtokenError for what draws cannot serve: their shares are right in the mean, and so is only what is
    linear in them."""
    reasons = [f"--for {loss} {_NOT_LINEAR[loss]}" for loss in config.losses if loss in _NOT_LINEAR]
    if config.tau != 1:
        reasons.append(f"--tau {config.tau:g} takes powers of probabilities")
    if config.merge == "mean":
        reasons.append("--merge mean takes means of logarithms")
    if "p-kl" in config.losses and config.unreached != "prefix":
        what = {"none": "divides by what was drawn", "rest": "lets the student's REST depend on what was drawn"}
        reasons.append(f"--unreached {config.unreached} {what[config.unreached]} (prefix does not)")
    if reasons:
        raise XtokenError(
            f"{config.captures[0]} holds draws of teacher rows, and only what is linear in them is right in the mean: "
            f"{'; '.join(reasons)}. Leave it out (ce, alm, p-kl, sparse-kl and byte-prefix remain), or capture with "
            "--codec topk"
        )


def _projection(config: AlignConfig, student: TokenTable, capture: CaptureManifest) -> Projection:
    """W from its folder, if it was built for these two tokenizers, or built now."""
    if config.w is None:
        return build_w(student, load_vocab(config.captures[0]))
    projection = read_projection(config.w)
    refuse_other_tokenizer("student", student.info, projection.student)
    refuse_other_tokenizer("teacher", capture.tokenizer, projection.teacher)
    return projection


def _settings(config: AlignConfig, capture: CaptureManifest, projection: Projection) -> dict[str, Any]:
    """Everything that decides what the targets hold."""
    return {
        "capture": content_hash(capture),
        "student": projection.student.hash,
        "w": projection.hash,
        "for": config.losses,
        "unreached": config.unreached,
        "merge": config.merge,
        "tau": config.tau,
    }


def _claim(root: str, settings: dict[str, Any]) -> None:
    """Record whose run this folder is, or refuse when it is another's."""
    folder = Folder(root)
    folder.make("")
    foreign = [name for name in folder.names() if not name.endswith(".tmp")]
    if foreign and not folder.exists(RUN_FILE):
        raise XtokenError(f"{root} holds {foreign[0]} and no {RUN_FILE}: no align run wrote it; give another --out")
    if folder.create(RUN_FILE, json.dumps(settings, indent=1).encode() + b"\n"):
        return
    found = json.loads(folder.read(RUN_FILE))
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
        listed = ", ".join(
            f"{name}: {_short(found.get(name))} there, {_short(settings[name])} now" for name in differing
        )
        raise XtokenError(f"{root} belongs to another align run ({listed}); give another --out, or remove that folder")


def _short(value: Any) -> str:
    text = "+".join(value) if isinstance(value, list) else str(value)
    return text[:12]


def _refuse_without_text(config: AlignConfig, capture: CaptureManifest) -> None:
    """Look at one batch before any worker starts; with --corpus, look whether that is there."""
    if config.corpus is not None:
        CorpusTexts(config.captures[0], config.corpus)
        return
    for part in capture.parts[:1]:
        for batch in islice(read_part(config.captures[0], part.index, config.memory_limit, None), 1):
            refuse_without_text(batch, config.captures[0])


def _run(job: AlignJob, capture: CaptureManifest, progress: Progress) -> list[Part]:
    """All parts, in order: those committed before and those built now."""
    out = job.config.out
    clean(out)
    done = committed(out)
    tokens = {part.index: part.tokens for part in capture.parts}
    progress.start("align", sum(tokens.values()), "tokens", sum(tokens[index] for index in done))
    waiting = [index for index in tokens if index not in done]
    failed = LocalExecutor(job.config.workers).run(job, waiting, _Advance(progress, tokens)) if waiting else {}
    progress.finish()
    if failed:
        listed = "; ".join(f"part {index}: {error.splitlines()[-1]}" for index, error in failed.items())
        raise IncompleteRun(f"{len(failed)} parts of {out} failed ({listed}); the same command resumes")
    found = committed(out)
    assert set(found) == set(tokens), "the executor lost a part"
    return list(found.values())


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
