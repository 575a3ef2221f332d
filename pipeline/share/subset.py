"""True subsets: some parts, some samples, some columns, under a manifest that says so.

Parts keep their numbers. A part of which samples or columns are left out is written anew, read back and counted like
a captured one; a part without a sample left is dropped. Shards quarantined at capture stay named if their number was
asked for.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.pipeline.store.checks import CaptureCheck, read_checked
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.left_out import optional_columns
from xtoken.pipeline.store.writer import group_rows, write_parquet
from xtoken.schemas.configs.share import PullConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import AnyManifest, CaptureManifest, Origin, Part, content_hash, provenance

_MEMORY = "512MB"
_INDEX = "_xtoken_row"
# Counts that need the teacher's or a student's tokenizer do not survive a choice of samples.
_COUNTED = ("documents", "snapped", "turns", "conversations_cut")
_OF_KIND = "taught_"


def is_subset(config: PullConfig) -> bool:
    """Whether anything is to be left out."""
    return bool(config.parts or config.where or config.columns)


def refuse_subset(config: PullConfig, manifest: AnyManifest) -> None:
    """Raise XtokenError for a choice that this kind of artifact does not have."""
    if manifest.kind == "capture" or not is_subset(config):
        return
    if manifest.kind == "projection":
        raise XtokenError(f"{config.source} is a projection, which has no parts; leave --parts, --where, --columns out")
    if config.where or config.columns:
        flag = "--where" if config.where else "--columns"
        raise XtokenError(
            f"{flag} chooses from a capture, and {config.source} holds targets; subset the capture with it, then run "
            "'xtoken align' on that (--parts works on targets)"
        )


def chosen_parts(ranges: str | None, parts: Sequence[Part], set_aside: Sequence[int] = ()) -> list[Part]:
    """The parts of ranges such as 0-9,12; numbers quarantined at capture may be among them.

    Raises:
        XtokenError: a number that is no part, or a range that runs backwards.
    """
    if ranges is None:
        return list(parts)
    known = {part.index for part in parts}.union(set_aside)
    wanted: set[int] = set()
    for item in ranges.split(","):
        low, _, high = item.partition("-")
        first, last = int(low), int(high or low)
        if first > last:
            raise XtokenError(f"--parts {item} runs backwards; write {last}-{first}")
        inside = {index for index in known if first <= index <= last}
        if len(inside) < last - first + 1:
            missing = next(index for index in range(first, last + 1) if index not in inside)
            raise XtokenError(
                f"--parts {item} names part {missing}, which is not there: the parts are {number_ranges(known)}"
            )
        wanted |= inside
    found = [part for part in parts if part.index in wanted]
    if not found:
        raise XtokenError(f"--parts {ranges} names only shards that the capture quarantined; choose other parts")
    return found


def number_ranges(numbers: set[int]) -> str:
    """Numbers as 0-9,12; shortened after a few ranges."""
    order = np.array(sorted(numbers), np.int64)
    runs = np.split(order, np.flatnonzero(np.diff(order) != 1) + 1)
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs[:8] if len(run)]
    return ",".join(shown) + (", ..." if len(runs) > 8 else "")


def left_out_columns(config: PullConfig, manifest: CaptureManifest) -> list[str]:
    """Names of the columns that the subset has not, in the order of the table.

    Raises:
        XtokenError: a wanted group of columns is not in the source either.
    """
    whole = CaptureCheck.of(manifest.model_copy(update={"left_out": []})).schema
    gone, groups = set(manifest.left_out), optional_columns(open_codec(manifest.codec))
    keep = set(groups) if not config.columns else set(config.columns) - {"none"}
    for group in config.columns:
        if group in groups and gone.intersection(groups[group]):
            raise XtokenError(f"--columns {group}: {config.source} is a subset that left it out; ask a fuller copy")
    for group in set(groups) - keep:
        gone.update(groups[group])
    return [name for name in whole.names if name in gone]


def subset_manifest(config: PullConfig, manifest: CaptureManifest) -> CaptureManifest:
    """The manifest of a capture's subset, without parts: those follow from the files."""
    asked = chosen_numbers(config.parts, manifest)
    origin = Origin(
        content_hash=content_hash(manifest),
        first_part=min(part.index for part in chosen_parts(config.parts, manifest.parts, list(manifest.set_aside))),
        parts=config.parts,
        where=config.where,
        columns=config.columns or None,
    )
    changes: dict[str, Any] = {
        **provenance(),
        "parts": [],
        "left_out": left_out_columns(config, manifest),
        "set_aside": {index: error for index, error in manifest.set_aside.items() if index in asked},
        "derived_from": [origin],
    }
    return manifest.model_copy(update=changes)


def chosen_numbers(ranges: str | None, manifest: CaptureManifest) -> set[int]:
    """Quarantined shards that a choice of parts includes."""
    if ranges is None:
        return set(manifest.set_aside)
    spans = [(int(low), int(high or low)) for low, _, high in (item.partition("-") for item in ranges.split(","))]
    return {index for index in manifest.set_aside if any(low <= index <= high for low, high in spans)}


class Where:
    """A condition of SQL on samples, evaluated in memory with no access to anything else.

    Args:
        expression: what may stand after WHERE in DuckDB.
        schema: columns of the capture.

    Raises:
        XtokenError: it is no condition on these columns.
    """

    def __init__(self, expression: str, schema: pa.Schema) -> None:
        self.expression = expression
        self._names = schema.names
        self._session = _session()
        self.keep(pa.RecordBatch.from_pylist([], schema))

    def keep(self, batch: pa.RecordBatch) -> NDArray[np.bool_]:
        """[N] whether the condition holds for each sample; null counts as no.

        Batches of one part go through one object in order: random() then follows from them.
        """
        import duckdb

        table = pa.Table.from_batches([batch]).append_column(_INDEX, pa.array(np.arange(batch.num_rows)))
        try:
            # parsed alone: nothing but one expression can stand here
            condition = duckdb.SQLExpression(self.expression)
            self._session.register("samples", table)
            rows = self._session.view("samples").filter(condition).project(_INDEX).fetchnumpy()[_INDEX]
        except duckdb.Error as error:
            raise self._error(str(error).splitlines()[0]) from error
        finally:
            self._session.unregister("samples")
        keep_N = np.zeros(batch.num_rows, np.bool_)
        keep_N[rows] = True
        return keep_N

    def _error(self, reason: str) -> XtokenError:
        return XtokenError(
            f"--where {self.expression!r} cannot be evaluated ({reason}); it is a condition in DuckDB's SQL on the "
            f"columns {', '.join(self._names)}"
        )


def _session() -> Any:
    """A DuckDB in memory that reads and writes no files, finds no Python variables, and cannot be reconfigured."""
    import duckdb

    session = duckdb.connect(config={"threads": 1, "memory_limit": _MEMORY, "temp_directory": ""})
    session.execute("SELECT setseed(0.5)").fetchall()
    for setting in (
        "python_enable_replacements = false",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        session.execute(f"SET {setting}")
    return session


@dataclass(frozen=True)
class CaptureRewrite:
    """Writes the file of one part anew with some samples and columns; see ``PartJob.rewrite``.

    Attributes:
        manifest: of the source.
        left_out: columns that the result has not.
    """

    manifest: CaptureManifest
    left_out: tuple[str, ...]
    where: str | None

    def __call__(self, source: str, part: Part, out: str) -> Part | None:
        """Write ``out`` from the local file ``source``; None when no sample is left.

        Raises:
            VerificationError: the source is not part of this capture.
            XtokenError: the condition fails on a sample.
        """
        check = CaptureCheck.of(self.manifest.model_copy(update={"left_out": list(self.left_out)}))
        counts: Counter[str] = Counter()
        write_parquet(out, check.schema, self._batches(source, check.schema, counts), group_rows(part.samples))
        figures = check(out)
        if figures.samples == 0:
            return None
        sha256, size = Folder(os.path.dirname(out)).sha256(os.path.basename(out))
        counted = [name for name in part.counts if name in _COUNTED or name.startswith(_OF_KIND)]
        known = part.counts if self.where is None else {name: counts[name] for name in counted}
        same = {"index": part.index, "device": part.device, "capture_path": part.capture_path}
        return Part(**same, **asdict(figures), file_bytes=size, sha256=sha256, counts=known)

    def _batches(self, source: str, schema: pa.Schema, counts: Counter[str]) -> Iterator[pa.RecordBatch]:
        check = CaptureCheck.of(self.manifest)
        stored = check.schema
        where = None if self.where is None else Where(self.where, stored)
        last = None
        for batch in read_checked(source, stored):
            kept = batch if where is None else batch.filter(pa.array(where.keep(batch)))
            counts["snapped"] += int(pc.sum(kept["snapped"]).as_py() or 0)
            for sample_id in kept["sample_id"].to_pylist():
                document = sample_id.rpartition("#")[0]
                counts["documents"] += document != last
                last = document
            if self.manifest.chat is not None and where is not None:
                check.batch(batch)  # counting trusts the spans
                counts.update(_chat_counts(kept))
            if kept.num_rows:
                yield kept.select(schema.names).cast(schema)


def _chat_counts(batch: pa.RecordBatch) -> Counter[str]:
    """What a capture counts of the spans of its conversations."""
    counts = Counter(conversations_cut=batch.num_rows - int(pc.sum(batch["complete"]).as_py() or 0))
    columns = (batch[name].to_pylist() for name in ("span_kind", "span_token_end", "span_message", "span_learn"))
    for kinds, ends, messages, learn in zip(*columns, strict=True):
        taught = [at for at, one in enumerate(learn) if one]
        counts["turns"] += len({messages[at] for at in taught})
        for at in taught:
            counts[f"{_OF_KIND}{kinds[at]}"] += ends[at] - (ends[at - 1] if at else 0)
    return counts


def capture_rewrite(config: PullConfig, manifest: CaptureManifest) -> CaptureRewrite | None:
    """How parts are written anew; None when they stay as they are.

    Raises:
        XtokenError: the condition is not one.
    """
    left_out = left_out_columns(config, manifest)
    if config.where is None and left_out == manifest.left_out:
        return None
    if config.where is not None:
        Where(config.where, CaptureCheck.of(manifest).schema)
    return CaptureRewrite(manifest, tuple(left_out), config.where)
