"""The rows of an answer: for people and scripts, or as a file."""

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

from xtoken.pipeline.query.folders import quoted
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.atomic import whole_file
from xtoken.schemas.io.remote import protocol

MOST = 10_000  # rows that are held for --json; a terminal shows fewer
_BATCH = 2048
_FORMATS = {
    ".parquet": "FORMAT parquet, COMPRESSION zstd",
    ".csv": "FORMAT csv, HEADER",
    ".json": "FORMAT json, ARRAY",
    ".jsonl": "FORMAT json",
}


def refuse_other_suffix(out: str | None) -> None:
    """Raise XtokenError unless a file of this name can be written."""
    if out is None:
        return
    if protocol(out):
        raise XtokenError(f"--out {out}: name a local file")
    if Path(out).suffix not in _FORMATS:
        raise XtokenError(f"--out {out}: the suffix says the format; choose from {', '.join(_FORMATS)}")
    if not Path(out).parent.is_dir():
        raise XtokenError(f"--out {out}: the folder {Path(out).parent} does not exist; make it, or choose another")


def shown_rows(answer: Any) -> dict[str, Any]:
    """How many rows a relation has, and the first ``MOST`` of them as dictionaries that are JSON."""
    total = 0
    rows: list[dict[str, Any]] = []
    for batch in answer.to_arrow_reader(_BATCH):
        total += batch.num_rows
        if len(rows) < MOST:
            rows += batch.slice(0, MOST - len(rows)).to_pylist(maps_as_pydicts="lossy")
    figures: dict[str, Any] = {"total": total, "rows": [_plain(row) for row in rows]}
    if total > MOST:
        figures["left_out"] = f"{total - MOST:,} rows, which --out FILE.parquet holds"
    return figures


def write_rows(session: Any, answer: Any, out: str) -> dict[str, Any]:
    """Write the rows of a relation to a file, which appears whole in the place of what was there."""
    path = Path(out)
    answer.create_view("the_answer")
    try:
        with whole_file(path, shared=True) as part:
            total = session.execute(f"COPY the_answer TO {quoted(str(part))} ({_FORMATS[path.suffix]})").fetchone()[0]
    except OSError as error:
        raise XtokenError(f"--out {out} cannot be written ({error.strerror}); choose another place") from error
    return {"total": total, "file_bytes": path.stat().st_size, "out": out}


def _plain(value: Any) -> Any:
    """A value as JSON has it: bytes as text (what is not UTF-8 like \\xe6), no NaN and no infinity."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Decimal):  # sums of integers are, too
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
