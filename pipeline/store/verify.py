"""Is an artifact what its manifest says? Reads every byte, trusts no name written in a file."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.store.checks import CaptureCheck, read_checked
from xtoken.pipeline.store.columns import any_per_sample, flat, list_lengths, refuse, sums_per_sample
from xtoken.pipeline.store.figures import audit_rows, chat_summary, worst_figures
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import Check, Figures, committed, data_name
from xtoken.pipeline.store.reader import check_side_file, ids_of_codes, load_vocab, target_form
from xtoken.pipeline.store.seal import manifest_problems, seal_problems, side_files
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.cache import fresh
from xtoken.schemas.manifest import AnyManifest, CaptureManifest, Part, TargetManifest, read_any_manifest
from xtoken.schemas.tables import TargetColumn, target_columns
from xtoken.schemas.target_form import TargetForm

_SHOWN = 20
_NO_AUDITS = (
    "none: no worker compared its rows with another way of scoring them; capture with --audit hf, or with --audit path "
    "and an engine that has two ways out (vllm), into another --out"
)
_TOTALS = ("samples", "tokens", "rows", "entries", "text_bytes", "file_bytes")


def verify(root: str, progress: Callable[[int], None] | None = None, *, audit: bool = False) -> dict[str, Any]:
    """Check a capture, targets or a projection to the last byte.

    Args:
        root: folder or URL.
        progress: called with the bytes of each part when it is done.
        audit: of a capture, also what its workers' audits found: the worst figures, and a row for each.

    Returns:
        What was checked: kind, parts, side files and totals.

    Raises:
        VerificationError: something differs; the message lists up to 20 problems, each with its part and sample.
        XtokenError: no manifest, or one of an unknown version; or a server cannot be asked, which proves no damage;
            or audits were asked of something else than a capture.
    """
    folder = Folder(root)
    problems = list(manifest_problems(folder))
    try:
        manifest = read_any_manifest(root)
    except XtokenError as error:
        if problems:
            raise _damaged(root, [*problems, str(error)]) from error
        raise
    shown = _audits(root, manifest) if audit else {}
    problems += [*_side_problems(folder, manifest), *_record_problems(root, manifest), *seal_problems(folder, manifest)]
    check = _part_check(root, manifest)
    for part in manifest.parts:
        problems += _part_problems(folder, part, check)
        if progress is not None:
            progress(part.file_bytes)
    if problems:
        raise _damaged(root, problems)
    totals = {name: sum(getattr(part, name) for part in manifest.parts) for name in _TOTALS}
    # Shards that failed are not damage: the manifest names them.
    aside = {"set_aside": sorted(manifest.set_aside)} if isinstance(manifest, CaptureManifest) else {}
    if isinstance(manifest, TargetManifest) and manifest.set_aside:
        aside = {"set_aside": sorted(manifest.set_aside)}
    chat = chat_summary(manifest)
    found = {"kind": manifest.kind, "parts": len(manifest.parts), "files": sorted(manifest.files), **totals, **aside}
    return found | ({"chat": chat} if chat else {}) | shown


def _audits(root: str, manifest: AnyManifest) -> dict[str, Any]:
    """What a capture's manifest says of its workers' audits."""
    if not isinstance(manifest, CaptureManifest):
        raise XtokenError(f"{root} holds {manifest.kind}, and only a capture has audits; leave --audit out")
    if not manifest.audits:
        return {"audits": _NO_AUDITS}
    return {"worst_of_audits": worst_figures(manifest.audits), "audits": audit_rows(manifest.audits)}


def _damaged(root: str, problems: Sequence[str]) -> VerificationError:
    listed = "\n".join(f"  {problem}" for problem in problems[:_SHOWN])
    return VerificationError(f"{root} is damaged, {len(problems)} problems:\n{listed}\nfetch or build it again")


def _side_problems(folder: Folder, manifest: AnyManifest) -> Iterator[str]:
    expected = side_files(manifest)
    for name in sorted(set(manifest.files) - set(expected)):
        yield f"manifest.json: {name!r} is not a file of a {manifest.kind} artifact"
    whole = True
    for name in expected:
        try:
            _no_link(folder, name)
            check_side_file(folder, name, manifest.files)
        except VerificationError as error:
            whole = False
            yield str(error)
    try:
        if whole and manifest.kind == "capture":
            load_vocab(folder.root)
            ids_of_codes(folder.root)
        elif whole and isinstance(manifest, TargetManifest):
            target_form(folder.root, manifest)
    except VerificationError as error:
        yield str(error)


def _record_problems(root: str, manifest: AnyManifest) -> Iterator[str]:
    indices = [part.index for part in manifest.parts]
    if indices != sorted(set(indices)):
        yield "manifest.json: parts are not listed once each in order"
    try:
        records = committed(root)
    except VerificationError as error:
        yield str(error)
        return
    if manifest.kind == "projection":
        return
    listed = {part.index: part for part in manifest.parts}
    for index in sorted(set(listed) | set(records)):
        if records.get(index) != listed.get(index):
            yield f"part {index}: commit record and manifest differ"


def _part_check(root: str, manifest: AnyManifest) -> Check:
    if isinstance(manifest, CaptureManifest):
        return CaptureCheck.of(manifest)
    if not isinstance(manifest, TargetManifest):
        return TargetCheck(TargetForm((), 0))
    try:
        return TargetCheck(target_form(root, manifest))
    except VerificationError:  # said of the side tables; columns and lengths are still looked at
        return TargetCheck(TargetForm(manifest.losses, manifest.parts_version, manifest.step or 0.0), read=False)


def _part_problems(folder: Folder, part: Part, check: Check) -> Iterator[str]:
    name = data_name(part.index)
    try:
        _no_link(folder, name)
        # a remote part is fetched once, and never taken from the cache
        with fresh(folder.url(name)) as copy:
            if (copy.sha256, copy.size) != (part.sha256, part.file_bytes):
                recorded = f"{part.file_bytes} bytes with {part.sha256[:12]}"
                yield f"part {part.index}: {copy.size} bytes with sha256 {copy.sha256[:12]}, recorded {recorded}"
            figures = check(copy.path)
    except FileNotFoundError:
        yield f"part {part.index}: {name} is missing"
    except VerificationError as error:
        yield f"part {part.index}: {error}"
    else:
        yield from _figure_problems(part, figures)


def _figure_problems(part: Part, figures: Figures) -> Iterator[str]:
    for name, found in vars(figures).items():
        if found != getattr(part, name):
            yield f"part {part.index}: {found} {name}, recorded {getattr(part, name)}"


def _no_link(folder: Folder, name: str) -> None:
    if folder.is_link(name):
        raise VerificationError(f"{name} is a symbolic link; an artifact holds plain files only")


class TargetCheck:
    """Reads a target part back and counts it; call with its path or URL.

    Args:
        form: how the part holds its columns.
        read: give the columns their readers' form too, which refuses what has none.
    """

    def __init__(self, form: TargetForm, *, read: bool = True) -> None:
        self._form, self._read = form, read
        self._columns = target_columns(form.losses, form.version)

    def __call__(self, url: str) -> Figures:
        """Check schema and list lengths.

        ``tokens`` are student tokens, ``rows`` and ``entries`` chunks (of conversations those with a target),
        ``text_bytes`` the last student ends.

        Raises:
            VerificationError: another schema, or lists of a sample that do not fit each other.
        """
        samples = tokens = chunks = text_bytes = 0
        for batch in read_checked(url, self._form.schema):
            _check_lengths(batch, self._columns)
            if self._form.chat:
                _check_chat(batch)
            if self._read:
                self._form.read_batch(batch)
            samples += batch.num_rows
            tokens += int(list_lengths(batch, "student_ids").sum())
            chunks += _chunks(batch, chat=self._form.chat)
            text_bytes += sum(row[-1].as_py() if len(row) else 0 for row in batch["student_end"])
        return Figures(samples, tokens, chunks, chunks, text_bytes)


def _chunks(batch: pa.RecordBatch, *, chat: bool) -> int:
    """Chunks, without the gaps of conversations."""
    if chat:
        return int((~np.isnan(flat(batch, "teacher_logprob"))).sum())
    return int(list_lengths(batch, "chunk_student_end").sum())


def _check_chat(batch: pa.RecordBatch) -> None:
    """Chunks cover all tokens of a conversation, and those with a target hold taught tokens only."""
    tokens_N, chunks_N = list_lengths(batch, "student_ids"), list_lengths(batch, "chunk_student_end")
    end_C = flat(batch, "chunk_student_end").astype(np.int64)
    stops_N = np.cumsum(chunks_N)
    last_N = np.zeros_like(tokens_N)
    last_N[chunks_N > 0] = end_C[stops_N[chunks_N > 0] - 1]
    size_C = np.diff(end_C, prepend=0)
    size_C[(stops_N - chunks_N)[chunks_N > 0]] = end_C[(stops_N - chunks_N)[chunks_N > 0]]
    refuse(batch, any_per_sample(size_C < 0, chunks_N), "chunk_student_end decreases")
    refuse(batch, last_N != tokens_N, "chunks do not cover all tokens")
    has_target_S = np.repeat(~np.isnan(flat(batch, "teacher_logprob")), size_C)
    untaught = has_target_S & ~flat(batch, "learn")
    refuse(batch, any_per_sample(untaught, tokens_N), "a chunk with a target has a token that is not taught")


# The columns whose lengths say how many tokens and chunks a sample has.
_LENGTHS = {"token": "student_ids", "chunk": "chunk_student_end"}


def _check_lengths(batch: pa.RecordBatch, columns: Sequence[TargetColumn]) -> None:
    """Columns of one axis have one length per sample, and counts sum to the lengths of what they count."""
    for name, axis in columns:
        if axis == "sample":
            continue
        length_N = list_lengths(batch, _LENGTHS[axis]) if axis in _LENGTHS else _sums(batch, axis)
        bad_N = list_lengths(batch, name) != length_N
        if bad_N.any():
            at = int(bad_N.argmax())
            rule = f"{_LENGTHS[axis]} has {length_N[at]}" if axis in _LENGTHS else f"{axis} says {length_N[at]}"
            raise VerificationError(
                f"sample {batch['sample_id'][at].as_py()!r}: {name} has {len(batch[name][at])} entries, {rule}"
            )


def _sums(batch: pa.RecordBatch, name: str) -> NDArray[np.int64]:
    """[N] sum of each sample's counts."""
    counts = flat(batch, name)
    if len(counts) and counts.min() < 0:
        raise VerificationError(f"batch of sample {batch['sample_id'][0].as_py()!r}: {name} has a negative count")
    return sums_per_sample(batch, name)
