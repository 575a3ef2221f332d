"""Import: others' files are tested, cut into parts, and written as a capture; the same command goes on after a kill.

What a part holds follows from its slice of the source and the settings alone. The tests and the plan are made once and
recorded, so a run that goes on does not look again.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from xtoken.pipeline.capture.plan import PLAN_FILE, Plan, Shard
from xtoken.pipeline.capture.precompute import check_vocab, write_vocab
from xtoken.pipeline.capture.run_identity import RUN_FILE, another_run, create_or_compare
from xtoken.pipeline.executors.local import refuse_unshared
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.findings import Begun, figures, info_of, open_source, tested
from xtoken.pipeline.imports.parts import DROPPED, Settled, write_part
from xtoken.pipeline.imports.samples import Reader, Slice
from xtoken.pipeline.store.codes import codes_by_use, read_codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import clean as clean_up
from xtoken.pipeline.store.publish import committed
from xtoken.pipeline.store.reader import MERGES_FILE, VOCAB_FILE, read_table
from xtoken.pipeline.store.seal import SUMS_FILE, seal
from xtoken.pipeline.store.skip_records import join_skips
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.identity import identity
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.imported import ImportedFile
from xtoken.schemas.io.overlap import refuse_inside
from xtoken.schemas.manifest import (
    MANIFEST,
    CaptureManifest,
    CorpusInfo,
    Part,
    TeacherInfo,
    digest,
    provenance,
    read_manifest,
)
from xtoken.schemas.tables import IMPORTED_CAPTURE
from xtoken.schemas.ui.progress import Progress

IMPORT_FILE = "import.json"
_UNKNOWN = "unknown"


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
        reader, form = open_source(config, spelling)
        reader, found = tested(config, spelling, reader, reader.slices())
        return figures(config, info_of(reader, found, []), form)
    refuse_unshared(config.out)
    folder = Folder(config.out)
    settings = {**identity(config), "tokenizer_hash": spelling.table.info.hash}
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
    return {**figures(config, manifest.imported, run.begun.form), **totals, "out": config.out}


def _refuse_foreign(folder: Folder) -> None:
    foreign = [name for name in folder.names() if not name.endswith(".tmp")]
    if foreign and not folder.exists(RUN_FILE):  # in this order: another import may be writing the record
        raise XtokenError(f"{folder.root} holds {foreign[0]!r} but no import; use another --out")


def _forget(folder: Folder, *, made: bool) -> None:
    """Undo what a run wrote whose rows were refused: corrected settings may use the folder."""
    for name in (IMPORT_FILE, PLAN_FILE, VOCAB_FILE, MERGES_FILE, RUN_FILE):
        folder.remove(name)
    if made:
        folder.remove_empty()


def _settle(config: ImportConfig, folder: Folder, spelling: Spelling, progress: Progress) -> Settled:
    """Tests and plan: made by the first start, read by the later ones."""
    begun = _read_begun(folder)
    goes_on = begun is not None
    if begun is None:
        reader, form = open_source(config, spelling)
        slices = reader.slices()
        reader, found = tested(config, spelling, reader, slices)
        files = _hashed(reader.source.files, progress)
        info = info_of(reader, found, files).model_copy(update={"source": config.source, "revision": config.revision})
        begun = Begun(info=info, form=form, bos=found.first_rows == found.samples, chat=reader.source.chat)
        codes = codes_by_use((ids[ids < spelling.table.size] for ids in found.tokens), spelling.table.size)
        if not folder.exists(VOCAB_FILE):
            write_vocab(folder, spelling.table, codes)
        folder.replace(PLAN_FILE, _plan(config, slices, files).model_dump_json(indent=1).encode() + b"\n")
        folder.replace(IMPORT_FILE, begun.model_dump_json(indent=1).encode() + b"\n")
    else:
        reader, _ = open_source(config, spelling, begun.form)
        if begun.info.moved:
            reader = reader.moved(begun.info.moved) or reader
        if reader.source.config != begun.info.config:
            raise another_run(folder, [f"{config.compression or 'the settings beside the data'} says other things now"])
        slices = reader.slices()
    plan = _plan(config, slices, begun.info.files)
    sizes = [(name.rsplit("/", 1)[-1], size) for name, size in plan.files]
    if sizes != [(one.name.rsplit("/", 1)[-1], _size(path)) for one, path in _with_paths(begun, reader)]:
        raise XtokenError(f"files of {', '.join(config.paths)} changed since {config.out} was begun; restore them")
    if goes_on:
        _refuse_changed(config, begun, reader, slices, progress)
    tables = check_vocab(folder, spelling.table)
    codes_there = read_codes(read_table(folder.url(VOCAB_FILE)))
    return Settled(config, folder, spelling, reader, slices, begun, plan, tables, codes_there)


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


def _refuse_changed(config: ImportConfig, begun: Begun, reader: Reader, slices: Sequence[Slice], ui: Progress) -> None:
    """Raise XtokenError where a file that must still be read is not what it was when the run was begun."""
    done = committed(config.out)
    wanted = sorted({one.file for index, one in enumerate(slices) if index not in done})
    paths = [reader.source.files[number] for number in wanted]
    for number, now in zip(wanted, _hashed(paths, ui), strict=True):
        if now.sha256 != begun.info.files[number].sha256:
            raise XtokenError(
                f"{reader.source.files[number]} changed since {config.out} was begun; restore it, or use another --out"
            )


def _hashed(paths: Sequence[str], progress: Progress) -> list[ImportedFile]:
    """sha256 of files of the source."""
    progress.start("hash the source", sum(map(_size, paths)), "bytes")
    found = []
    for path in paths:
        root, _, name = path.rpartition("/")
        sha256, size = Folder(root or ("/" if path.startswith("/") else ".")).sha256(name)
        found.append(ImportedFile(name=name, bytes=size, sha256=sha256))
        progress.advance(size)
    progress.finish()
    return found


def _plan(config: ImportConfig, slices: Sequence[Slice], files: Sequence[ImportedFile]) -> Plan:
    """The slices as a plan of shards, which status and card read; a shard's sha256 names what it is of, and its bytes
    are its rows' share of the file."""
    rows = Counter[int]()
    for one in slices:
        rows[one.file] += one.stop - one.start
    shards = [
        Shard(
            index=index,
            file=one.file,
            record=one.start,
            documents=one.stop - one.start,
            text_bytes=files[one.file].bytes * (one.stop - one.start) // rows[one.file],
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


def _work(run: Settled, progress: Progress) -> CaptureManifest:
    """Write what is missing, then the manifest."""
    clean_up(run.config.out)
    done = committed(run.config.out)
    total = sum(one.stop - one.start for one in run.slices)
    ready = sum(one.stop - one.start for index, one in enumerate(run.slices) if index in done)
    progress.start("import", total, "rows of the source", ready)
    for index, wanted in enumerate(run.slices):
        if index not in done:
            done[index] = write_part(run, index, wanted)
            progress.advance(wanted.stop - wanted.start, tokens=done[index].tokens)
    progress.finish()
    return _finish(run, done)


def _finish(run: Settled, parts: dict[int, Part]) -> CaptureManifest:
    """Write the manifest and seal it."""
    config, begun, folder = run.config, run.begun, run.folder
    totals: Counter[str] = Counter()
    for part in parts.values():
        totals.update({name: part.counts.get(name, 0) for name in DROPPED})
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
