"""Files of the program's own artifacts, over which no single output file is written."""

import re
from pathlib import Path

from xtoken.schemas.errors import XtokenError

# A folder that holds one of these is an artifact, or becomes one.
_MARKS = ("manifest.json", "run.json", "align.json", "share.json", "SHA256SUMS")
_NAMES = {
    *(*_MARKS, "README.md", "plan.json", "teacher.json", "weights.json", "join.json", "skipped.jsonl", "bad.jsonl"),
    "coverage.html",
    *("vocab.parquet", "merges.parquet", "student_vocab.parquet", "w.parquet", "unreached.parquet", "codes.parquet"),
    *("metrics.jsonl", "summary.json", "held-out.jsonl", "completions.jsonl", "diagnosis.json"),
}
_NUMBERED = re.compile(r"(?:part-\d+\.(?:parquet|json)|status(?:-\d+-of-\d+)?\.json)")
_LOG = re.compile(r"log(?:-\d+-of-\d+)?\.jsonl")
_MODELS = ("model", "checkpoints", "adapter")
_OUTPUTS = (".html", ".csv", ".json", ".jsonl", ".parquet")
_DEEP = 3  # run/checkpoints/step/FILE


def refuse_own_file(path: str, *, log: bool) -> None:
    """Refuse to write an output over a file of an artifact; a new page, table or log beside them is fine.

    Args:
        path: local path of one file.
        log: whether it is a log, which goes on a run's own.

    Raises:
        XtokenError: it has the name of such a file, or is there and no verb writes such outputs.
    """
    file = Path(path).resolve()
    for root in file.parents[:_DEEP]:
        if any((root / mark).is_file() for mark in _MARKS) and _is_own(file, root, log=log):
            raise XtokenError(
                f"{path} is a file of the artifact in {root}, which no output replaces; choose another name"
            )


def _is_own(file: Path, root: Path, *, log: bool) -> bool:
    folder = file.relative_to(root).parts[0]
    if file.name in _NAMES or _NUMBERED.fullmatch(file.name) or (_LOG.fullmatch(file.name) and not log):
        return True
    return file.exists() and (file.suffix not in _OUTPUTS or folder in _MODELS)


def refuse_no_page(path: str) -> None:
    """Refuse to write a page over a file that is not a page.

    Raises:
        XtokenError: something else is there.
    """
    with Path(path).open("rb") as file:
        begin = file.read(100).lstrip().lower()
    if begin and not begin.startswith((b"<!doctype html", b"<html")):
        raise XtokenError(f"{path} is there and is not a page, and would be lost; choose another name")
