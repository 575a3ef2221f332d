"""What is this path? Kind, counts, bytes per token by column, provenance and three samples."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.base import Codec
from xtoken.pipeline.store.figures import chat_summary, worst_figures
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import committed, data_name
from xtoken.pipeline.store.reader import iter_capture, iter_parquet, load_vocab, local_part
from xtoken.pipeline.store.skip_records import BAD_FILE, SKIPPED_FILE, count_reasons
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.parquet_headers import read_chunks
from xtoken.schemas.io.parquet_limits import reading
from xtoken.schemas.io.remote import in_parallel, read_tail
from xtoken.schemas.manifest import (
    MANIFEST,
    AnyManifest,
    CaptureManifest,
    Part,
    TargetManifest,
    content_hash,
    read_any_manifest,
)
from xtoken.schemas.spans import tokens_with_row
from xtoken.schemas.tables import read_as, targets

_SAMPLES = 3
_FIRST_TOKENS = 16
_TOP = 5
_TOTALS = ("samples", "tokens", "rows", "entries", "text_bytes", "file_bytes")

# Folders without a manifest, told by what lies in them, first match.
_OTHERS = (
    ("import.json", "unfinished import; the 'xtoken import' command that began it resumes"),
    ("plan.json", "unfinished capture; the precompute command that began it resumes"),
    ("metrics.jsonl", "training run"),
    ("run.json", "unfinished run; the command that began it resumes"),
    ("commits", "unfinished run; the command that began it resumes"),
    ("model.safetensors", "Hugging Face model"),
    ("model.safetensors.index.json", "Hugging Face model"),
    ("tokenizer.json", "Hugging Face tokenizer"),
)


def inspect(root: str) -> dict[str, Any]:
    """Describe an artifact of any kind; everything in the result is JSON.

    Raises:
        XtokenError: nothing is there, or nothing that this program knows.
    """
    folder = Folder(root)
    names = set(folder.names())
    if MANIFEST in names:
        return _artifact(root, read_any_manifest(root))
    for name, kind in _OTHERS:
        if name in names:
            return {"kind": kind, "path": root, **_unfinished(root, names)}
    raise XtokenError(
        f"{root} is not a capture, projection, targets, training run or model; "
        f"it holds {', '.join(sorted(names)[:5]) or 'nothing'}"
    )


def _unfinished(root: str, names: set[str]) -> dict[str, Any]:
    if "commits" in names:
        return {"committed_parts": len(committed(root))}
    if "metrics.jsonl" in names:
        lines = Folder(root).read("metrics.jsonl").splitlines()
        # the last line of a run that is under way, or was killed, may be torn
        whole = [line for line in lines if line.endswith(b"}")]
        try:
            return {"records": len(whole), "last": json.loads(whole[-1]) if whole else None}
        except ValueError as error:
            raise XtokenError(
                f"{root}/metrics.jsonl: its last whole line is not JSON; remove that line and run the same command "
                "again"
            ) from error
    return {}


def _artifact(root: str, manifest: AnyManifest) -> dict[str, Any]:
    described = manifest.model_dump(mode="json", exclude={"parts", "audits"})
    result: dict[str, Any] = {"kind": described.pop("kind"), "path": root}
    if not isinstance(manifest, CaptureManifest | TargetManifest):
        return {**result, **described.pop("coverage"), "provenance": described}
    result.update(parts=len(manifest.parts), content_hash=content_hash(manifest))
    result.update({name: sum(getattr(part, name) for part in manifest.parts) for name in _TOTALS})
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        counts.update(part.counts)
    result["counts"] = dict(sorted(counts.items()))
    result["bytes_per_token"] = bytes_per_token(root, manifest)
    result["provenance"] = described
    if chat := chat_summary(manifest):
        result["chat"] = chat
    if isinstance(manifest, CaptureManifest):
        worst = worst_figures(manifest.audits)
        result["audits"] = {"count": len(manifest.audits)} | (
            {"worst_realised_difference": worst["realised_max"]} if worst else {}
        )
        result |= _reasons(root, "bad_documents", BAD_FILE) | _reasons(root, "skipped_conversations", SKIPPED_FILE)
        result["samples_shown"] = _capture_samples(root, manifest)
    else:
        result |= _reasons(root, "skipped_samples", SKIPPED_FILE)
        result["samples_shown"] = _target_samples(root, manifest)
    return result


def _reasons(root: str, title: str, name: str) -> dict[str, Any]:
    """How many records of what is not there have each reason; nothing where there are none."""
    reasons = count_reasons(Folder(root), name)
    return {title: reasons} if reasons else {}


def bytes_per_token(root: str, manifest: CaptureManifest | TargetManifest) -> dict[str, float]:
    """Compressed bytes of each column per token, and ``all`` files as they lie there."""
    folder = Folder(root)
    total: Counter[str] = Counter()
    urls = [folder.url(data_name(part.index)) for part in manifest.parts]
    for found in in_parallel(_column_bytes, urls, root):
        total.update(found)
    tokens = max(1, sum(part.tokens for part in manifest.parts))
    total["all"] = sum(part.file_bytes for part in manifest.parts)
    return {name: round(size / tokens, 3) for name, size in total.items()}


def _column_bytes(url: str) -> Counter[str]:
    with reading(url, "'xtoken verify' lists what is damaged"):
        return column_bytes(read_tail(url), url)


def column_bytes(file: BinaryIO, name: str) -> Counter[str]:
    """Compressed bytes of each column of a Parquet file, or of the end of one with its footer."""
    found: Counter[str] = Counter()
    for chunks in read_chunks(file, name):
        for chunk in chunks:
            found[chunk.column] += chunk.size
    return found


def _capture_samples(root: str, manifest: CaptureManifest) -> list[dict[str, Any]]:
    table = load_vocab(root)
    rows = (batch.slice(index, 1) for batch in iter_capture(root) for index in range(batch.num_rows))
    first = list(islice(rows, _SAMPLES))
    for row in first:
        # what a subset dropped is made up by the reader
        gone = {*manifest.left_out, *map(read_as, manifest.left_out)}
        CaptureCheck.of(manifest).batch(row.drop_columns([name for name in row.schema.names if name in gone]))
    return [_capture_sample(row, table, open_codec(manifest.codec)) for row in first]


def _capture_sample(batch: pa.RecordBatch, table: TokenTable, codec: Codec) -> dict[str, Any]:
    """The sample's first tokens, and the teacher's best entries where it was to guess one in the middle.

    ``batch`` holds the one sample.
    """
    row, rows = batch.to_pylist()[0], codec.decode(batch)
    ids = row["teacher_ids"]
    shown: dict[str, Any] = {
        "sample_id": row["sample_id"],
        "tokens": len(ids),
        "first_tokens": [_readable(table, token) for token in ids[:_FIRST_TOKENS]],
    }
    if not len(rows.tail_logprob):
        return shown
    if "span_kind" in row:
        shown["spans"] = [
            kind + (", taught" if learn else "")
            for kind, learn in zip(row["span_kind"], row["span_learn"], strict=True)
            if kind != "template"
        ][:_FIRST_TOKENS]
    middle = len(rows.tail_logprob) // 2
    start, stop = (int(offset) for offset in rows.offsets[middle : middle + 2])
    best = range(start, min(stop, start + _TOP))
    position = int(np.flatnonzero(tokens_with_row(batch))[middle])
    shown["row"] = {
        "position": position,
        "before": "".join(_readable(table, token) for token in ids[max(0, position - 8) : position]),
        "in_text": _readable(table, ids[position]),
        "teacher": [[_readable(table, int(rows.ids[at])), round(float(rows.logprob[at]), 3)] for at in best],
        **codec.described(row, rows, middle),
    }
    return shown


def _target_samples(root: str, manifest: TargetManifest) -> list[dict[str, Any]]:
    """Targets: id and sizes of the first samples."""
    folder, schema = Folder(root), targets(manifest.losses, manifest.parts_version)
    more = () if manifest.chat is None else ("learn", "teacher_logprob")
    rows = (
        row
        for part in manifest.parts
        for batch in _batches(folder, part, schema, ["sample_id", "student_ids", "chunk_student_end", *more])
        for row in batch.to_pylist()
    )
    return [
        {
            "sample_id": row["sample_id"],
            "student_tokens": len(row["student_ids"]),
            # of conversations gaps are no chunks
            "chunks": sum(not math.isnan(value) for value in row["teacher_logprob"])
            if more
            else len(row["chunk_student_end"]),
            **({"taught_tokens": sum(row["learn"])} if more else {}),
        }
        for row in islice(rows, _SAMPLES)
    ]


def _batches(folder: Folder, part: Part, schema: pa.Schema, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with local_part(folder, part.index, part) as path:
        yield from iter_parquet(path, columns, schema=schema)


def _readable(table: TokenTable, token: int) -> str:
    """A token for people: its text, or its role, or its bytes where they are not whole characters."""
    if table.role[token] is not None:
        return f"<{table.role[token]}>"
    piece = table.token(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
