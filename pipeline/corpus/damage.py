"""What a file's first bytes say it is, and what a reader's error says is wrong with it."""

import gzip
from typing import IO

from xtoken.pipeline.corpus.readers import BOM, FileProblem, Problem

_HEAD = 128
_FETCH = "fetch or write the file again"
_POINTER = "a pointer of Git LFS"
# What a file begins with, in the order of the looking: a mark of UTF-32 begins like one of UTF-16.
_MARKS = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "Zstandard"),
    (b"PAR1", "Parquet"),
    (b"PARE", "encrypted Parquet"),
    (b"ARROW1", "Arrow's file format"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"FEA1", "Feather V1"),
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"PK\x03\x04", "a zip archive"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"version https://git-lfs.github.com/spec/", _POINTER),
)
# What a suffix promises; every other suffix promises text, which has no mark.
_PROMISED: dict[str, tuple[str | None, ...]] = {
    ".jsonl.gz": ("gzip",),
    ".jsonl.zst": ("Zstandard",),
    ".parquet": ("Parquet",),
    ".arrow": ("an Arrow stream", "Arrow's file format"),
}
_WAY_OUT = {
    "gzip": "if it holds JSON lines, end its name in .jsonl.gz",
    "Zstandard": "if it holds JSON lines, end its name in .jsonl.zst",
    "Parquet": "end its name in .parquet",
    "an Arrow stream": "end its name in .arrow",
    "Arrow's file format": "end its name in .arrow",
    "encrypted Parquet": "decrypt it",
    "Feather V1": "write it as Parquet: pandas.read_feather(FILE).to_parquet(OTHER)",
    "UTF-16": "re-encode it: iconv -f UTF-16 -t UTF-8",
    "UTF-32": "re-encode it: iconv -f UTF-32 -t UTF-8",
    _POINTER: "fetch what it points to: 'git lfs pull' in the clone",
}
_MAX_SCHEMA = 1 << 24  # bytes; as a length that a file begins with, no letters are below it


def check_head(file: IO[bytes], suffix: str) -> None:
    """Look at the first bytes of a file that is open at its beginning, and go back there.

    Raises:
        FileProblem: they are not of what the file's suffix promises.
    """
    head = file.read(_HEAD)
    file.seek(0)
    kind = _kind(head, suffix)
    if kind not in _PROMISED.get(suffix, (None,)):
        raise FileProblem(_misnamed(head, kind, suffix))


def _kind(head: bytes, suffix: str) -> str | None:
    """What a file of this name that begins so is; None where nothing says it, as in text."""
    for mark, kind in _MARKS:
        # a text may begin with these letters
        if head.startswith(mark) and not (mark.isalnum() and suffix in (".txt", ".md")):
            return kind
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
        return "Zstandard"  # a frame that is to be skipped
    if suffix == ".arrow" and 0 < int.from_bytes(head[:4], "little") < _MAX_SCHEMA:
        return "an Arrow stream"  # from before version 0.15
    if suffix not in _PROMISED and len(head) >= 8 and any(head[::2]) != any(head[1::2]):
        return "UTF-16"  # letters of ASCII, without a mark
    return None


def _misnamed(head: bytes, kind: str | None, suffix: str) -> Problem:
    if not head:
        return Problem("unreadable file", "it is empty", _FETCH)
    if kind is None:
        promised = " or ".join(str(name) for name in _PROMISED[suffix])
        text = head.removeprefix(BOM).lstrip().startswith(b"{")
        fix = "if it holds plain JSON lines, end its name in .jsonl" if text else _FETCH
        return Problem("unreadable file", f"it is not {promised}: it begins with {head[:16]!r}", fix)
    reason = "invalid UTF-8" if kind in ("UTF-16", "UTF-32") else "unreadable file"
    return Problem(reason, f"it is {kind}, not what a name in {suffix} says", _WAY_OUT.get(kind, "unpack it"))


def problem_of(error: Exception, last: int | None) -> Problem:
    """What a reader's error says is wrong with a file whose beginning is right.

    Args:
        error: what the reader raised.
        last: the last record that it gave, if any.
    """
    said = f"{type(error).__name__}: {error}"
    where = f"after record {last}" if last is not None else "from the start"
    detail, fix = f"unreadable {where} ({said})", _FETCH
    if isinstance(error, gzip.BadGzipFile) and "Not a gzipped file" in str(error):
        detail = f"{detail}: bytes that are no gzip lie behind the end of its stream"
        fix = "pack it again: zcat FILE | gzip > OTHER"
    elif "too much memory" in str(error) or "not enough memory" in str(error):
        detail = f"{detail}: its window is longer than 2 GiB, or than the memory that is free"
        fix = "pack it again with a shorter window, such as 'zstd --long=27'"
    elif "Unknown frame descriptor" in str(error):
        detail = f"{detail}: bytes that are no Zstandard lie behind the end of a frame"
    elif "Dictionary mismatch" in str(error):
        detail, fix = f"{detail}: it is packed with a dictionary", "unpack it: zstd -d -D DICTIONARY"
    elif "Parquet magic bytes not found" in str(error) or "Not an Arrow file" in str(error):
        detail = f"{detail}: its end is missing"
    return Problem("unreadable file", detail, fix)
