"""Files that are damaged, or other than their names say: the real cause is named, and skipping counts the file."""

import gzip
import io
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.local import LocalFileSystem

from xtoken.pipeline.corpus import Corpus
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import Unreachable, XtokenError

TEXTS = [f"document {number}, {'words ' * 9}" for number in range(9)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
PACKED = gzip.compress(LINES.encode())
FRAME = zstandard.compress(LINES.encode())
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"


def _arrow(*, as_file: bool, compression: str | None = None) -> bytes:
    table, sink = pa.table({"text": TEXTS}), io.BytesIO()
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=4)
    return sink.getvalue()


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), sink)
    return sink.getvalue()


def _zstandard(window_log: int) -> bytes:
    """A frame of unknown length, which declares this window."""
    how = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=how).compressobj()
    return packer.compress(LINES.encode()) + packer.flush()


def _too_long_a_window() -> bytes:
    data = bytearray(_zstandard(31))
    data[5] = 22 << 3  # the byte that says the window: 2**32
    return bytes(data)


def _with_a_dictionary() -> bytes:
    samples = [f"sample {number} of a dictionary".encode() * 5 for number in range(1000)]
    return zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(1024, samples)).compress(LINES.encode())


def corpus(path: Path | str, on_bad: str) -> Corpus:
    return Corpus(CorpusConfig(corpus=str(path), on_bad=on_bad))  # type: ignore[arg-type]


def texts(path: Path) -> list[str]:
    return [document.text for document in corpus(path, "stop").documents()]


WHOLE = {
    "long-window.jsonl.zst": lambda: _zstandard(31),
    "skippable-frames.jsonl.zst": lambda: b"\x5f\x2a\x4d\x18\x02\x00\x00\x00ab" + FRAME,
    "zeros-behind.jsonl.gz": lambda: PACKED + bytes(512),
    "two-members.jsonl.gz": lambda: gzip.compress(LINES[:100].encode()) + gzip.compress(LINES[100:].encode()),
    "stream.arrow": lambda: _arrow(as_file=False),
    "file.arrow": lambda: _arrow(as_file=True),
    "feather-v2.arrow": lambda: _arrow(as_file=True, compression="lz4"),
    "marked.jsonl": lambda: b"\xef\xbb\xbf" + LINES.encode(),
    "a.parquet": _parquet,
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(WHOLE[name]())
    assert texts(tmp_path / name) == TEXTS
    later = [document.text for document in corpus(tmp_path / name, "stop").documents(record=5)]
    assert later == TEXTS[5:]


def test_a_text_may_begin_with_letters_that_are_a_mark_elsewhere(tmp_path: Path) -> None:
    for name, text in (("a.txt", "PAR1 was a file"), ("b.md", "BZh is how they begin"), ("c.txt", "")):
        (tmp_path / name).write_text(text)
    assert [document.text for document in corpus(tmp_path, "skip").documents()] == [
        "PAR1 was a file",
        "BZh is how they begin",
    ]


DAMAGED = [
    ("a.jsonl.gz", lambda: PACKED + b"junk", "behind the end of its stream"),
    ("a.jsonl.gz", lambda: PACKED + b"j", "behind the end of its stream"),
    ("a.jsonl.gz", lambda: PACKED[:-4], "ended before the end-of-stream marker"),
    ("a.jsonl.gz", lambda: PACKED[:-8] + b"\x00" + PACKED[-7:], "CRC check failed"),
    ("a.jsonl.gz", LINES.encode, r"it is not gzip: it begins with .* end its name in \.jsonl,"),
    ("a.jsonl.gz", lambda: b"", "it is empty"),
    ("a.jsonl.gz", lambda: FRAME, r"it is Zstandard, not what .* end its name in \.jsonl\.zst"),
    ("a.jsonl.zst", lambda: FRAME + b"junk", "no Zstandard lie behind the end of a frame"),
    ("a.jsonl.zst", lambda: FRAME[:-3], "ends inside a frame"),
    ("a.jsonl.zst", _too_long_a_window, "its window is longer than 2 GiB.* --long=27"),
    ("a.jsonl.zst", _with_a_dictionary, "packed with a dictionary; unpack it"),
    ("a.jsonl.zst", LINES.encode, r"it is not Zstandard: it begins with .* end its name in \.jsonl,"),
    ("a.jsonl.zst", lambda: b"", "it is empty"),
    ("a.jsonl.gz", lambda: gzip.compress(LINES[:20].encode("utf-16")), "line 1: invalid UTF-8: it begins as UTF-16"),
    ("a.jsonl", lambda: PACKED, r"it is gzip, not what a name in \.jsonl says; .* end its name in \.jsonl\.gz"),
    ("a.jsonl", _parquet, r"it is Parquet, .* end its name in \.parquet"),
    ("a.jsonl", lambda: LINES.encode("utf-16"), "invalid UTF-8: it is UTF-16, .* iconv -f UTF-16 -t UTF-8"),
    ("a.jsonl", lambda: LINES.encode("utf-16-be"), "it is UTF-16"),
    ("a.jsonl", lambda: LINES.encode("utf-16-le"), "it is UTF-16"),
    ("a.jsonl", lambda: LINES.encode("utf-32"), "it is UTF-32"),
    ("a.jsonl", lambda: POINTER, "it is a pointer of Git LFS, .*git lfs pull"),
    ("a.txt", lambda: POINTER, "it is a pointer of Git LFS, .*git lfs pull"),
    ("a.txt", lambda: "seventeen boats".encode("utf-16-le"), "it is UTF-16"),
    ("a.md", lambda: PACKED, "it is gzip"),
    ("a.parquet", lambda: _parquet()[:-9], "its end is missing; fetch or write the file again"),
    ("a.parquet", lambda: _parquet()[:6], "smaller than the minimum file footer"),
    ("a.parquet", lambda: POINTER, "it is a pointer of Git LFS"),
    ("a.parquet", LINES.encode, "it is not Parquet: it begins with"),
    ("a.parquet", lambda: _arrow(as_file=True), r"it is Arrow's file format, .* end its name in \.arrow"),
    ("a.arrow", lambda: _arrow(as_file=True)[:-9], "its end is missing; fetch or write the file again"),
    ("a.arrow", lambda: _arrow(as_file=False)[:-90], "Expected to (be able to )?read"),
    ("a.arrow", lambda: b"FEA1" + bytes(60), r"it is Feather V1, .* pandas\.read_feather"),
    ("a.arrow", LINES.encode, "it is not an Arrow stream or Arrow's file format: it begins with"),
]


@pytest.mark.parametrize(("name", "make", "cause"), DAMAGED)
@pytest.mark.parametrize("where", ["disk", "store"])
def test_the_cause_is_named_and_skipping_counts_the_file(
    tmp_path: Path, name: str, make: object, cause: str, where: str
) -> None:
    folder = str(tmp_path) if where == "disk" else f"memory://{tmp_path.name}"
    fs = fsspec.filesystem("file" if where == "disk" else "memory")
    fs.pipe({f"{folder}/{name}": make(), f"{folder}/b.txt": b"after"})  # type: ignore[operator]
    with pytest.raises(XtokenError, match=cause) as error:
        list(corpus(folder, "stop").documents())
    assert str(error.value).startswith(name)
    assert "credentials" not in str(error.value)
    skipping = corpus(folder, "skip")
    assert [document.text for document in skipping.documents()][-1] == "after"
    assert list(skipping.bad.values()) == [1]


def test_documents_before_junk_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(PACKED + b"junk")
    assert [document.text for document in corpus(tmp_path, "skip").documents()] == TEXTS


@pytest.mark.parametrize(
    ("error", "kind"),
    [(PermissionError(13, "Permission denied"), XtokenError), (TimeoutError(110, "slow"), Unreachable)],
)
def test_a_disk_that_fails_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[XtokenError]
) -> None:
    (tmp_path / "a.txt").write_text("x")
    found = corpus(tmp_path, "skip")

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(LocalFileSystem, "_open", refuse)
    with pytest.raises(XtokenError, match=r"cannot be read.*check its rights") as caught:
        list(found.documents())
    assert type(caught.value) is kind
    assert "credentials" not in str(caught.value)
