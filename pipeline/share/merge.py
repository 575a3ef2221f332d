"""merge: captures of one plan become one again, captures of different documents become one.

Of one plan (equal run): the union of the parts, by number. Of different documents: everything that decides what a row
says must be equal and no sample may be in two of them; parts are numbered anew in the order of the sources, with the
shards that were quarantined. Parts of captures whose vocabulary has other codes are written anew, the others copied.

Not compared, since they move no row by more than rounding: device, versions of the engine, how many devices, and the
model's name where both know the hashes of its configuration and weights; the result names them all. A joined capture of
different documents has no plan.json: its samples cannot be cut from a corpus again. Licences that differ are joined
with AND, as both apply; where a source has none, the result has none. Audits are all kept, and of the engines' settings
those that all have alike.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from xtoken.pipeline.share.destination import reachable
from xtoken.pipeline.share.push_pull import check_manifest, copied_files
from xtoken.pipeline.share.shipment import PartJob, Rewrite, Shipment, SideFile
from xtoken.pipeline.share.transfer import transfer
from xtoken.pipeline.store.checks import CaptureCheck, read_checked
from xtoken.pipeline.store.codes import Codes, inverse, read_codes, recode
from xtoken.pipeline.store.files import Folder, disk_full_named
from xtoken.pipeline.store.left_out import without_rows
from xtoken.pipeline.store.reader import MERGES_FILE, VOCAB_FILE, iter_capture, read_side_table
from xtoken.pipeline.store.seal import PLAN_FILE
from xtoken.pipeline.store.skip_records import BAD_FILE, SKIPPED_FILE, read_records, record_line
from xtoken.pipeline.store.writer import group_rows, write_parquet
from xtoken.schemas.chat import CaptureChat
from xtoken.schemas.configs.share import MergeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.imported import ImportedInfo, joined_imports
from xtoken.schemas.manifest import (
    MOST_AUDITS,
    AuditRecord,
    CaptureManifest,
    CorpusInfo,
    Origin,
    Part,
    TeacherInfo,
    content_hash,
    digest,
    provenance,
    read_manifest,
)
from xtoken.schemas.tables import PARTS_SINCE
from xtoken.schemas.ui.progress import Progress

_MEMORY = "512MB"
# Fields of a teacher that decide its rows; model and revision only where the hashes are not known.
_TEACHER = (
    "backend",
    "config_hash",
    "weights_hash",
    "vocab_rows",
    "dtype",
    "head_dtype",
    "quantization",
    "capture_path",
)
_NAMES = ("model", "revision")


@dataclass(frozen=True)
class _Source:
    """One capture to join.

    Attributes:
        numbers: its parts and quarantined shards -> their numbers in the result.
    """

    root: str
    manifest: CaptureManifest
    numbers: dict[int, int]

    @property
    def folder(self) -> Folder:
        return Folder(self.root)


def merge(config: MergeConfig, bars: Progress) -> dict[str, Any]:
    """Join captures; the same command resumes.

    Returns:
        As ``xtoken.pipeline.share.push_pull.pull``.

    Raises:
        XtokenError: they do not belong together (the message names the field and both values), share a sample, or the
            destination holds something else.
        VerificationError: a file is not what its record says.
    """
    captures = [(root, _read(root)) for root in config.sources]
    _refuse_different(captures)
    if len({manifest.run_hash for _, manifest in captures}) == 1:
        sources = [_Source(root, manifest, {n: n for n in _numbers(manifest)}) for root, manifest in captures]
        shipment = _union(sources)
    else:
        sources = _renumbered(captures)
        _refuse_shared_samples(sources, bars)
        shipment = _joined(sources)
    return transfer(shipment, config.destination, config.workers, bars)


def _read(root: str) -> CaptureManifest:
    with reachable(root):
        check_manifest(Folder(root))
        return read_manifest(root, CaptureManifest)


def _numbers(manifest: CaptureManifest) -> list[int]:
    return sorted({*(part.index for part in manifest.parts), *manifest.set_aside})


def _renumbered(captures: Sequence[tuple[str, CaptureManifest]]) -> list[_Source]:
    sources, start = [], 0
    for root, manifest in captures:
        old = _numbers(manifest)
        sources.append(_Source(root, manifest, dict(zip(old, range(start, start + len(old)), strict=True))))
        start += len(old)
    return sources


def _refuse_different(captures: Sequence[tuple[str, CaptureManifest]]) -> None:
    """Raise XtokenError where two captures' rows do not mean the same."""
    first_root, first = captures[0]
    for root, manifest in captures[1:]:
        for name, here, there in _compared(first, manifest):
            if here != there:
                raise XtokenError(
                    f"{first_root} and {root} cannot be one capture: {name} is {here!r} and {there!r}; merge joins "
                    "captures of one teacher, taken with the same settings"
                )
    texts = {root: _has_text(root, manifest) for root, manifest in captures}
    for root, has in texts.items():
        if has != texts[first_root]:
            with_text, without = (first_root, root) if texts[first_root] else (root, first_root)
            raise XtokenError(
                f"{with_text} holds the text of its samples and {without} does not; fetch the former without: xtoken "
                "share pull --columns rows,space_logprob, or capture both alike"
            )


def _compared(one: CaptureManifest, other: CaptureManifest) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of everything that must be equal."""
    hashes = {one.teacher.config_hash, one.teacher.weights_hash, other.teacher.config_hash, other.teacher.weights_hash}
    for name in _TEACHER + (_NAMES if None in hashes else ()):
        yield f"teacher.{name}", getattr(one.teacher, name), getattr(other.teacher, name)
    yield "tokenizer.hash", one.tokenizer.hash, other.tokenizer.hash
    for name in type(one.codec).model_fields:
        yield f"codec.{name}", getattr(one.codec, name), getattr(other.codec, name)
    for name in ("bos", "max_tokens", "left_out", "space"):
        yield name, getattr(one, name), getattr(other, name)
    yield from _compared_chats(one.chat, other.chat)
    yield from _compared_imports(one.imported, other.imported)
    yield "schema_version", min(one.schema_version, PARTS_SINCE), min(other.schema_version, PARTS_SINCE)


def _compared_chats(one: CaptureChat | None, other: CaptureChat | None) -> Iterator[tuple[str, Any, Any]]:
    """The same of how conversations were read; text and conversations do not go together."""
    if one is None or other is None:
        yield "chat.form", one.form if one else "text", other.form if other else "text"
        return
    for name in CaptureChat.model_fields:
        if name != "form":  # other corpora may have other columns
            yield f"chat.{name}", getattr(one, name), getattr(other, name)


def _compared_imports(one: ImportedInfo | None, other: ImportedInfo | None) -> Iterator[tuple[str, Any, Any]]:
    """The same of what is known of imported rows; those of a teacher that ran do not go with them."""
    if one is None or other is None:
        yield "imported.format", one.format if one else "none", other.format if other else "none"
        return
    for name in ("format", "rest", "config", "moved"):
        yield f"imported.{name}", getattr(one, name), getattr(other, name)


def _has_text(root: str, manifest: CaptureManifest) -> bool:
    """Whether samples carry their text (all of a capture do, or none)."""
    parts = [part.index for part in manifest.parts[:1]]
    with reachable(root):
        for batch in islice(iter_capture(root, ["text"], parts), 1):
            return bool(batch["text"].null_count < batch.num_rows)
    return False


def _refuse_shared_samples(sources: Sequence[_Source], bars: Progress) -> None:
    """Raise XtokenError naming a sample that two captures hold; memory is bounded, ids go to a file.

    Raises:
        DiskFull: no room for the ids.
    """
    import duckdb

    bars.start("compare samples", sum(part.samples for s in sources for part in s.manifest.parts), "samples")
    with tempfile.TemporaryDirectory(prefix="xtoken-merge-") as folder, disk_full_named(folder):
        limits: dict[str, Any] = {"memory_limit": _MEMORY, "temp_directory": folder, "threads": 1}
        with duckdb.connect(os.path.join(folder, "ids.duckdb"), config=limits) as session:
            session.execute("CREATE TABLE ids (sample_id VARCHAR, source INTEGER)")
            for number, source in enumerate(sources):
                _insert_ids(session, source, number, bars.advance)
            clash = session.execute(
                "SELECT sample_id, min(source), max(source) FROM ids GROUP BY sample_id "
                "HAVING min(source) <> max(source) ORDER BY sample_id LIMIT 1"
            ).fetchone()
    bars.finish()
    if clash is not None:
        name, one, other = clash
        raise XtokenError(
            f"{sources[one].root} and {sources[other].root} both hold sample {name!r}; merge joins captures of "
            "different documents: capture with --id-field where documents of two corpora have the same names, or leave "
            "the common ones out with --where"
        )


def _insert_ids(session: Any, source: _Source, number: int, advance: Callable[[int], None]) -> None:
    indices = [part.index for part in source.manifest.parts]
    with reachable(source.root):
        for batch in iter_capture(source.root, ["sample_id"], indices):
            session.register("batch", pa.table({"sample_id": batch["sample_id"]}))
            session.execute(f"INSERT INTO ids SELECT sample_id, {number} FROM batch")
            session.unregister("batch")
            advance(batch.num_rows)


def _union(sources: Sequence[_Source]) -> Shipment:
    """Captures of one plan: a part that several hold must be the same everywhere."""
    held: dict[int, tuple[str, Part]] = {}
    jobs = []
    for source in sources:
        rewrite = _recoding(source, sources[0])
        for part in source.manifest.parts:
            root, known = held.setdefault(part.index, (source.root, part))
            if known != part:
                raise XtokenError(
                    f"part {part.index} of {root} has sha256 {known.sha256[:12]}, that of {source.root} has "
                    f"{part.sha256[:12]}: they hold other samples of one plan; merge whole parts only"
                )
            if known is part:
                jobs.append(PartJob(source.folder, part, part.index, rewrite))
    aside = {n: error for source in sources for n, error in source.manifest.set_aside.items() if n not in held}
    manifest = sources[0].manifest.model_copy(
        update={
            **provenance(),
            "parts": [],
            "set_aside": dict(sorted(aside.items())),
            "derived_from": [_origin(source) for source in sources],
            **_said_of_all(sources),
        }
    )
    return _shipment(sources, sorted(jobs, key=lambda job: job.index), manifest, _plan(sources))


def _plan(sources: Sequence[_Source]) -> list[SideFile]:
    """plan.json, unless a source is without: it then lacks samples that the plan has; and what the plan left out."""
    if not all(copied_files(source.folder, [PLAN_FILE]) for source in sources):
        return []
    return copied_files(sources[0].folder, [PLAN_FILE, BAD_FILE])


def _joined(sources: Sequence[_Source]) -> Shipment:
    """Captures of different documents."""
    jobs = []
    for source in sources:
        rewrite = _recoding(source, sources[0])
        jobs += [PartJob(source.folder, part, source.numbers[part.index], rewrite) for part in source.manifest.parts]
    manifests = [source.manifest for source in sources]
    aside = {source.numbers[n]: error for source in sources for n, error in source.manifest.set_aside.items()}
    manifest = manifests[0].model_copy(
        update={
            **provenance(),
            "parts": [],
            "teacher": _teacher([manifest.teacher for manifest in manifests]),
            "corpus": _corpus([manifest.corpus for manifest in manifests]),
            "chat": _chat([manifest.chat for manifest in manifests]),
            "imported": joined_imports([manifest.imported for manifest in manifests if manifest.imported]),
            "plan_hash": digest([manifest.plan_hash for manifest in manifests]),
            "run_hash": digest([manifest.run_hash for manifest in manifests]),
            "set_aside": aside,
            "derived_from": [_origin(source) for source in sources],
            **_said_of_all(sources),
        }
    )
    return _shipment(sources, jobs, manifest, [])


def _shipment(
    sources: Sequence[_Source], jobs: list[PartJob], manifest: CaptureManifest, plan: list[SideFile]
) -> Shipment:
    claim = {"kind": "capture", "merged": [content_hash(source.manifest) for source in sources]}
    first = sources[0]
    tables = [SideFile(name, first.folder, first.manifest.files.get(name)) for name in (VOCAB_FILE, MERGES_FILE)]
    return Shipment("merge", claim, jobs, [*tables, *plan, *_skipped(sources)], manifest)


def _skipped(sources: Sequence[_Source]) -> list[SideFile]:
    """Conversations that the sources skipped, by the numbers that their parts have in the result."""
    found: dict[str, int] = {}
    for source in sources:
        with reachable(source.root):
            for record in read_records(source.folder, SKIPPED_FILE):
                part = source.numbers.get(record.get("part", 0), 0)
                found.setdefault(record_line(record | {"part": part}), part)
    lines = "".join(sorted(found, key=found.__getitem__))
    return [SideFile(SKIPPED_FILE, data=lines.encode())] if lines else []


def _origin(source: _Source) -> Origin:
    return Origin(content_hash=content_hash(source.manifest), first_part=min(source.numbers.values(), default=0))


def _said_of_all(sources: Sequence[_Source]) -> dict[str, Any]:
    """Fields of the manifest that follow from all sources alike, whether of one plan or not."""
    manifests = [source.manifest for source in sources]
    first = manifests[0].engine_settings
    audits = list(dict.fromkeys(audit.model_dump_json() for manifest in manifests for audit in manifest.audits))
    return {
        "schema_version": max(manifest.schema_version for manifest in manifests),
        "licenses": _licenses(sources),
        "engine_settings": {
            name: value
            for name, value in first.items()
            if all(one.engine_settings.get(name) == value for one in manifests)
        },
        # subsets of one capture have the same
        "audits": [AuditRecord.model_validate_json(audit) for audit in audits[:MOST_AUDITS]],
    }


def _licenses(sources: Sequence[_Source]) -> dict[str, str]:
    """Both licences of all; none where a source has none."""
    licenses = [source.manifest.licenses for source in sources]
    named = [name for name in licenses[0] if all(name in one for one in licenses)]
    return {name: _all_of([one[name] for one in licenses]) for name in named}


def _all_of(licenses: Sequence[str]) -> str:
    different = list(dict.fromkeys(licenses))
    if len(different) == 1:
        return different[0]
    return " AND ".join(f"({one})" if " OR " in one else one for one in different)


def _teacher(teachers: Sequence[TeacherInfo]) -> TeacherInfo:
    """One teacher, by all the names it goes under."""
    named = ("model", "revision", "device", "engine_version")
    changes: dict[str, Any] = {"context": min(one.context for one in teachers)}
    for name in named:
        values = dict.fromkeys(getattr(one, name) for one in teachers)
        changes[name] = " + ".join(values) if None not in values else getattr(teachers[0], name)
    return teachers[0].model_copy(update=changes)


def _corpus(infos: Sequence[CorpusInfo]) -> CorpusInfo:
    bad: dict[str, int] = {}
    for one in infos:
        for reason, count in one.bad.items():
            bad[reason] = bad.get(reason, 0) + count
    return CorpusInfo(
        source=" + ".join(one.source for one in infos),
        hash=digest([one.hash for one in infos]),
        documents=sum(one.documents for one in infos),
        text_bytes=sum(one.text_bytes for one in infos),
        bad=bad,
        options=infos[0].options if all(one.options == infos[0].options for one in infos) else {},
    )


def _chat(chats: Sequence[CaptureChat | None]) -> CaptureChat | None:
    """How conversations were read, by all forms that they had."""
    known = [chat for chat in chats if chat is not None]
    forms = dict.fromkeys(chat.form for chat in known)
    return known[0].model_copy(update={"form": " + ".join(forms)}) if known else None


def _recoding(source: _Source, first: _Source) -> Rewrite | None:
    """How parts come into the codes of the first capture's vocabulary; None where they are in them."""
    same = source.manifest.files.get(VOCAB_FILE) == first.manifest.files.get(VOCAB_FILE)
    if same or without_rows(source.manifest.left_out):
        return None
    mine, theirs = (_codes(one) for one in (source, first))
    if mine is None or theirs is None:
        return None  # ids, as in version 1
    return _Recode(source.manifest, theirs[inverse(mine)])


def _codes(source: _Source) -> Codes | None:
    with reachable(source.root):
        return read_codes(read_side_table(source.folder, VOCAB_FILE, source.manifest.files))


@dataclass(frozen=True)
class _Recode:
    """Writes a part in other codes; see ``PartJob.rewrite``.

    Attributes:
        code_of_code: int32 [U].
    """

    manifest: CaptureManifest
    code_of_code: Codes

    def __call__(self, source: str, part: Part, out: str) -> Part:
        """Write ``out`` from the local file ``source``."""
        check = CaptureCheck.of(self.manifest)
        batches = (recode(batch, self.code_of_code) for batch in read_checked(source, check.schema))
        write_parquet(out, check.schema, batches, group_rows(part.samples))
        figures = check(out)
        sha256, size = Folder(os.path.dirname(out)).sha256(os.path.basename(out))
        return Part(**{**part.model_dump(), **asdict(figures), "file_bytes": size, "sha256": sha256})
