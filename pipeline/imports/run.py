"""Import: others' files are tested, cut into parts, and written as a capture; the same command goes on after a kill.

What a part holds follows from its slice of the source and the settings alone. The tests and the plan are made once and
recorded, so a run that goes on does not look again.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from xtoken.pipeline.capture.plan import PLAN_FILE, Plan, Shard
from xtoken.pipeline.capture.precompute import check_vocab, write_vocab
from xtoken.pipeline.capture.run_identity import RUN_FILE, another_run, create_or_compare
from xtoken.pipeline.chats import ChatTokens, span_columns, to_json
from xtoken.pipeline.executors.local import refuse_unshared
from xtoken.pipeline.imports import FORMATS
from xtoken.pipeline.imports.claims import (
    Look,
    look,
    refuse_other_tokenizer,
    refuse_shift,
    refuse_sums,
    refuse_uncalibrated,
)
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.rows import clean, packed
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Reader, Slice
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec, record_of
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.codes import Codes, codes_by_use, read_codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import clean as clean_up
from xtoken.pipeline.store.publish import committed, publish_part
from xtoken.pipeline.store.reader import MERGES_FILE, VOCAB_FILE, read_table
from xtoken.pipeline.store.seal import SUMS_FILE, seal
from xtoken.pipeline.store.skip_records import join_skips, keep_skips
from xtoken.pipeline.store.writer import ROW_GROUP, Sample, capture_batch, group_rows, write_parquet
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.chat import CaptureChat
from xtoken.schemas.configs.identity import identity
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.imported import ImportedFile, ImportedInfo, RestClass, why_not
from xtoken.schemas.io.overlap import refuse_inside
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.manifest import (
    MANIFEST,
    CaptureManifest,
    CodecInfo,
    CorpusInfo,
    Part,
    TeacherInfo,
    digest,
    provenance,
    read_manifest,
)
from xtoken.schemas.tables import CHAT_CAPTURE, IMPORTED_CAPTURE, PARTS_SINCE
from xtoken.schemas.ui.progress import Progress

IMPORT_FILE = "import.json"
_UNKNOWN = "unknown"
_DROPPED = (
    *("entries_not_finite", "entries_outside", "entries_twice", "rows_above_one", "rows_empty", "labels_unknown"),
    "documents_skipped",
)


class Begun(BaseModel):
    """What the first start of a run found, for all later ones.

    Attributes:
        info: of the manifest; its counts are those of the end.
        form: what the rows are.
        bos: all samples have a row for their first token.
        chat: of conversations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    info: ImportedInfo
    form: str
    bos: bool
    chat: CaptureChat | None


@dataclass(frozen=True)
class _Run:
    """What a run has settled before it writes parts."""

    config: ImportConfig
    folder: Folder
    spelling: Spelling
    reader: Reader
    slices: Sequence[Slice]
    begun: Begun
    plan: Plan
    files: dict[str, str]
    codes: Codes | None

    @property
    def codec(self) -> CodecInfo:
        """How rows are kept."""
        return record_of("topk", self.config.codec)

    @property
    def version(self) -> int:
        """Of the parts' columns."""
        return PARTS_SINCE if self.begun.chat is None else CHAT_CAPTURE


def import_dataset(config: ImportConfig, progress: Progress) -> dict[str, Any]:
    """Import a dataset; the same command resumes, and a finished one does nothing.

    Returns:
        What was found and, unless ``dry_run``, what was written.

    Raises:
        XtokenError: the files are not of the format, their rows are not what they should be, or the folder belongs to
            another run.
    """
    for path in config.paths:
        refuse_inside("--out", config.out, path)
    spelling = Spelling(load_tokenizer(config.tokenizer))
    if config.dry_run:
        reader, form = _open(config, spelling)
        reader, found = _tested(config, spelling, reader, reader.slices())
        return _figures(config, _info(reader, found, []), form)
    refuse_unshared(config.out)
    folder = Folder(config.out)
    settings = {**identity(config), "tokenizer_hash": spelling.table.info.hash}
    if not folder.exists(RUN_FILE):
        _refuse_foreign(folder)
    fresh, made = not folder.exists(RUN_FILE), folder.local and not folder.exists("")
    folder.make("")
    if differ := create_or_compare(folder, RUN_FILE, settings, needed=False):
        raise another_run(folder, [str(one) for one in differ])
    try:
        run = _settle(config, folder, spelling, progress)
    except XtokenError:
        if fresh and not committed(config.out):
            _forget(folder, made=made)
        raise
    manifest = _work(run, progress)
    assert manifest.imported is not None
    totals = {name: sum(getattr(part, name) for part in manifest.parts) for name in ("samples", "tokens", "rows")}
    return {**_figures(config, manifest.imported, run.begun.form), **totals, "out": config.out}


def _refuse_foreign(folder: Folder) -> None:
    if names := folder.names():
        raise XtokenError(f"{folder.root} holds {names[0]!r} but no import; use another --out")


def _forget(folder: Folder, *, made: bool) -> None:
    """Undo what a run wrote whose rows were refused: corrected settings may use the folder."""
    for name in (IMPORT_FILE, PLAN_FILE, VOCAB_FILE, MERGES_FILE, RUN_FILE):
        folder.remove(name)
    if made:
        folder.remove_empty()


def _open(config: ImportConfig, spelling: Spelling, form: str | None = None) -> tuple[Reader, str]:
    """The reader, for rows of the form that was asked for, or that its first samples have."""
    module = import_module(FORMATS[config.format])
    asked = form or (config.form if config.form != "auto" else None)
    if asked is not None:
        return module.open_reader(config, spelling, asked), asked
    guess = getattr(module, "guess_form", None)
    if guess is not None and (said := guess(config)) is not None:
        return module.open_reader(config, spelling, said), said
    reader: Reader = module.open_reader(config, spelling, "text")
    found = look(reader, spelling, reader.slices())
    if not found.control:
        return reader, "text"
    return module.open_reader(config, spelling, "ids"), "ids"


def _tested(config: ImportConfig, spelling: Spelling, reader: Reader, slices: Sequence[Slice]) -> tuple[Reader, Look]:
    """The reader with its rows where they belong and the class that they have, and what a look at them found.

    Raises:
        XtokenError: they predict nothing, or their probabilities are none.
    """
    found = look(reader, spelling, slices)
    if found.best_shift and (moved := reader.moved(found.best_shift)) is not None:
        reader, found = moved, look(moved, spelling, slices)
    unsound = getattr(reader, "refuse_unsound", None)
    if unsound is not None:
        unsound(found.far_above / found.rows, found.above_zero)
    source = reader.source
    refuse_sums(found, source.hint)
    if source.calibrated:
        refuse_uncalibrated(found, source.hint)
    refuse_other_tokenizer(found, config.tokenizer, source.blameless)
    refuse_shift(found, source.format)
    return reader, found


def _rest(reader: Reader, found: Look) -> RestClass:
    return "unknown" if found.renormalised else reader.source.rest


def _info(reader: Reader, found: Look, files: list[ImportedFile]) -> ImportedInfo:
    source, rest = reader.source, _rest(reader, found)
    config = {name: json.loads(json.dumps(value)) for name, value in source.config.items()}
    return ImportedInfo(
        format=source.format,
        rest=rest,
        config=config,
        files=files,
        looked_at=found.rows,
        shift={f"{shift:+d}": min(1.0, share) for shift, share in found.shares.items()},
        moved=reader.shift,
        calibration=found.calibration,
        same_ids=found.same_ids,
        labels_unknown=1.0 if rest == "unknown" else found.unknown / found.rows,
        notes=list(source.notes),
    )


def _figures(config: ImportConfig, info: ImportedInfo, form: str) -> dict[str, Any]:
    """What a verb prints of an import."""
    reasons = {loss: why_not(loss, info.rest, info.labels_unknown) for loss in LOSSES}
    drop = " (with --rest drop)" if info.rest == "unknown" else ""
    trained = [loss + (drop if loss in ("p-kl", "sparse-kl") else "") for loss, why in reasons.items() if why is None]
    return {
        "format": info.format,
        "form": form,
        "tail_mass": info.rest,
        "rows_looked_at": info.looked_at,
        "stored_probability_by_shift": {shift: round(share, 4) for shift, share in info.shift.items()},
        "calibration": [one.model_dump() for one in info.calibration],
        "texts_with_the_same_ids": info.same_ids,
        "labels_unknown": round(info.labels_unknown, 4),
        "losses": trained,
        "losses_refused": {loss: why for loss, why in reasons.items() if why is not None},
        **({"dropped": dict(info.counts)} if info.counts else {}),
        **({"notes": list(info.notes)} if info.notes else {}),
        **({} if config.licenses else {"licences": "not said; give --license corpus=...,outputs=..."}),
    }


def _settle(config: ImportConfig, folder: Folder, spelling: Spelling, progress: Progress) -> _Run:
    """Tests and plan: made by the first start, read by the later ones."""
    begun = _read_begun(folder)
    if begun is None:
        reader, form = _open(config, spelling)
        slices = reader.slices()
        reader, found = _tested(config, spelling, reader, slices)
        files = _hashed(reader, progress)
        info = _info(reader, found, files).model_copy(update={"source": config.source, "revision": config.revision})
        begun = Begun(info=info, form=form, bos=found.first_rows == found.samples, chat=reader.source.chat)
        codes = codes_by_use((ids[ids < spelling.table.size] for ids in found.tokens), spelling.table.size)
        if not folder.exists(VOCAB_FILE):
            write_vocab(folder, spelling.table, codes)
        folder.replace(PLAN_FILE, _plan(config, slices, files).model_dump_json(indent=1).encode() + b"\n")
        folder.replace(IMPORT_FILE, begun.model_dump_json(indent=1).encode() + b"\n")
    else:
        reader, _ = _open(config, spelling, begun.form)
        if begun.info.moved:
            reader = reader.moved(begun.info.moved) or reader
        if reader.source.config != begun.info.config:
            raise another_run(folder, [f"{config.compression or 'the settings beside the data'} says other things now"])
        slices = reader.slices()
    plan = _plan(config, slices, begun.info.files)
    sizes = [(name.rsplit("/", 1)[-1], size) for name, size in plan.files]
    if sizes != [(one.name.rsplit("/", 1)[-1], _size(path)) for one, path in _with_paths(begun, reader)]:
        raise XtokenError(f"files of {', '.join(config.paths)} changed since {config.out} was begun; restore them")
    tables = check_vocab(folder, spelling.table)
    codes_there = read_codes(read_table(folder.url(VOCAB_FILE)))
    return _Run(config, folder, spelling, reader, slices, begun, plan, tables, codes_there)


def _with_paths(begun: Begun, reader: Reader) -> Iterator[tuple[ImportedFile, str]]:
    files = begun.info.files
    if len(files) != len(reader.source.files):
        raise XtokenError("files were added or removed since the import was begun; restore them, or use another --out")
    return zip(files, reader.source.files, strict=True)


def _size(path: str) -> int:
    from xtoken.schemas.io.remote import open_filesystem

    fs, inner = open_filesystem(path)
    return int(fs.size(inner) or 0)


def _read_begun(folder: Folder) -> Begun | None:
    try:
        return Begun.model_validate_json(folder.read(IMPORT_FILE))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise VerificationError(
            f"{folder.url(IMPORT_FILE)} is damaged; remove it and run the same command again, which tests the source"
        ) from error


def _hashed(reader: Reader, progress: Progress) -> list[ImportedFile]:
    """sha256 of every file of the source."""
    paths = reader.source.files
    progress.start("hash the source", sum(map(_size, paths)), "bytes")
    found = []
    for path in paths:
        root, _, name = path.rpartition("/")
        sha256, size = Folder(root or ".").sha256(name)
        found.append(ImportedFile(name=name, bytes=size, sha256=sha256))
        progress.advance(size)
    progress.finish()
    return found


def _plan(config: ImportConfig, slices: Sequence[Slice], files: Sequence[ImportedFile]) -> Plan:
    """The slices as a plan of shards, which status and card read; a shard's sha256 names what it is of."""
    shards = [
        Shard(
            index=index,
            file=one.file,
            record=one.start,
            documents=one.stop - one.start,
            text_bytes=0,
            sha256=digest([files[one.file].sha256, one.start, one.stop]),
        )
        for index, one in enumerate(slices)
    ]
    corpus = CorpusInfo(
        source=config.source or config.paths[0],
        hash=digest([one.sha256 for one in files]),
        documents=sum(one.documents for one in shards),
        text_bytes=sum(one.bytes for one in files),
    )
    named = [(one.name, one.bytes) for one in files]
    return Plan(corpus=corpus, files=named, shard_bytes=config.part_bytes, shards=shards)


def _work(run: _Run, progress: Progress) -> CaptureManifest:
    """Write what is missing, then the manifest."""
    clean_up(run.config.out)
    done = committed(run.config.out)
    total = sum(one.stop - one.start for one in run.slices)
    ready = sum(one.stop - one.start for index, one in enumerate(run.slices) if index in done)
    progress.start("import", total, "rows of the source", ready)
    for index, wanted in enumerate(run.slices):
        if index not in done:
            done[index] = _part(run, index, wanted)
            progress.advance(wanted.stop - wanted.start, tokens=done[index].tokens)
    progress.finish()
    return _finish(run, done)


def _part(run: _Run, index: int, wanted: Slice) -> Part:
    """Read, write, verify and commit one part."""
    codec = open_codec(run.codec)
    samples, counts, left_out = list[Sample](), Counter(dict.fromkeys(_DROPPED, 0)), list[LeftOut]()
    for one in run.reader.read(wanted):
        made = one if isinstance(one, LeftOut) else _sample(run, one, codec, counts)
        if isinstance(made, LeftOut):
            left_out.append(made)
        else:
            samples.append(made)
    counts.update(documents=len(samples) + len(left_out), documents_skipped=len(left_out), snapped=0)
    if left_out:
        keep_skips(run.folder, index, [vars(one) for one in left_out])
    schema = codec.schema(version=run.version)
    check = CaptureCheck(run.spelling.table.size, run.codec, version=run.version, imported=True)
    return publish_part(run.config.out, index, partial(_write, samples, schema, run.codes, dict(counts)), check)


def _write(
    samples: Sequence[Sample], schema: Any, codes: Codes | None, counts: dict[str, int], url: str
) -> dict[str, int]:
    batches = (
        capture_batch(samples[start : start + ROW_GROUP], schema, codes) for start in range(0, len(samples), ROW_GROUP)
    )
    write_parquet(url, schema, batches, group_rows(len(samples)))
    return counts


def _sample(run: _Run, one: ImportedSample, codec: Codec, counts: Counter[str]) -> Sample | LeftOut:
    """A row of the capture."""
    spans, messages = None, None
    if one.chat is not None:
        text, ends = one.chat.text, one.chat.ends
        counts.update(taught_counts(one.chat))
        spans = span_columns(one.chat.spans)
        messages = None if one.conversation is None else to_json(one.conversation)
    else:
        spelt = run.spelling.text(one.ids)
        if spelt is None:
            return LeftOut(one.name, "a text that is not UTF-8", "its tokens spell bytes that are no text")
        text, ends = spelt
    found = clean(one, run.spelling.valid)
    kept, labels = packed(found, run.config.codec, codec.info.step, rest_known=run.begun.info.whole_rest)
    counts.update(found.counts)
    return Sample(
        sample_id=f"{one.name}#0",
        text=text,
        teacher_ids=one.ids,
        teacher_end=ends,
        packed=kept,
        realised_logprob=labels,
        space_logprob=None,
        first_row=one.first_row,
        complete=one.complete,
        snapped=False,
        spans=spans,
        messages=messages,
    )


def taught_counts(chat: ChatTokens) -> Counter[str]:
    """Answers and tokens that are taught, for a commit record; as of a capture of conversations."""
    counts = Counter(turns=len(chat.message_ends))
    for span in chat.spans:
        if span.learn:
            counts[f"taught_{span.kind}"] += span.token_end - span.token_start
    return counts


def _finish(run: _Run, parts: dict[int, Part]) -> CaptureManifest:
    """Write the manifest and seal it."""
    config, begun, folder = run.config, run.begun, run.folder
    totals: Counter[str] = Counter()
    for part in parts.values():
        totals.update({name: part.counts.get(name, 0) for name in _DROPPED})
    rows = sum(part.rows for part in parts.values())
    info = begun.info.model_copy(
        update={"counts": dict(totals), "labels_unknown": min(1.0, totals["labels_unknown"] / max(1, rows))}
    )
    source = digest([begun.info.format, begun.info.config, [one.sha256 for one in begun.info.files]])
    manifest = CaptureManifest(
        **provenance(),
        schema_version=IMPORTED_CAPTURE,
        files=run.files,
        parts=[parts[index] for index in sorted(parts)],
        teacher=_teacher(config, run.spelling.table.size),
        tokenizer=run.spelling.table.info,
        bos=begun.bos,
        max_tokens=config.max_tokens,
        codec=run.codec,
        chat=begun.chat,
        corpus=run.plan.corpus,
        plan_hash=run.plan.hash,
        run_hash=digest([run.plan.hash, source, identity(config), run.spelling.table.info.hash]),
        licenses=config.licenses,
        imported=info,
    )
    if not _is_current(folder, manifest):
        folder.remove(SUMS_FILE)
        join_skips(folder, [index for index, part in sorted(parts.items()) if part.counts.get("documents_skipped")])
        folder.replace(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    seal(config.out)
    return read_manifest(config.out, CaptureManifest)


def _teacher(config: ImportConfig, size: int) -> TeacherInfo:
    return TeacherInfo(
        model=config.teacher or _UNKNOWN,
        backend="imported",
        vocab_rows=size,
        context=0,
        dtype=_UNKNOWN,
        head_dtype=_UNKNOWN,
        device=_UNKNOWN,
        capture_path="imported",
        engine_version=_UNKNOWN,
    )


def _is_current(folder: Folder, manifest: CaptureManifest) -> bool:
    if not folder.exists(MANIFEST):
        return False
    there, said_by = read_manifest(folder.root, CaptureManifest), set(provenance())
    return there.model_dump(exclude=said_by) == manifest.model_dump(exclude=said_by)
