"""Bad documents: each is named with its place under stop, and counted under skip."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from xtoken.pipeline.corpus import Corpus
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import Unreachable, XtokenError

GOOD = b'{"text": "good", "id": 1}\n'
LINES = [
    (b'{"text": "caf\xe9"}\n', "invalid UTF-8", "byte 0xe9 at offset 13"),
    (b'{"text": \n', "invalid JSON", "one JSON object per line"),
    (b"[" * 100_000 + b"\n", "invalid JSON", "one JSON object per line"),
    (b'["text"]\n', "invalid JSON", "JSON array"),
    (b'{"body": "x"}\n', "missing field", "has no field 'text'; it has 'body'"),
    (b'{"text": null}\n', "field is not text", "holds null"),
    (b'{"text": 3}\n', "field is not text", "holds number"),
    (b'{"text": ""}\n', "empty document", "whitespace"),
    (b'{"text": " \\n\\t"}\n', "empty document", "whitespace"),
    (b'{"text": "a\\ud800b"}\n', "lone surrogate", "mend the text"),
]


def corpus(path: object, on_bad: str, **options: Any) -> Corpus:
    return Corpus(CorpusConfig(corpus=str(path), on_bad=on_bad, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("line", "reason", "detail"), LINES)
def test_bad_lines(tmp_path: Path, line: bytes, reason: str, detail: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + GOOD)
    with pytest.raises(XtokenError) as error:
        list(corpus(path, "stop").documents())
    assert str(error.value).startswith(f"a.jsonl, line 3: {reason}: ")
    assert detail in str(error.value)
    assert "--on-bad skip" in str(error.value)
    skipping = corpus(path, "skip")
    documents = list(skipping.documents())
    assert skipping.bad == {reason: 1}
    kept = [(d.id, d.text) for d in documents]
    mended = [("a.jsonl:2", "a\ufffdb")] if reason == "lone surrogate" else []
    assert kept == [("a.jsonl:0", "good"), *mended, ("a.jsonl:3", "good")]


def test_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert [d.text for d in corpus(tmp_path / "a.jsonl", "stop").documents()] == ["😀"]


@pytest.mark.parametrize("value", ["null", "true", "1.5", '""', "[1]", '"\\ud800"'])
def test_bad_ids(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b'{"text": "x", "id": ' + value.encode() + b"}\n")
    with pytest.raises(XtokenError, match=r"a\.jsonl, line 2: bad id"):
        list(corpus(path, "stop", id_field="id").documents())
    skipping = corpus(path, "skip", id_field="id")
    assert [d.id for d in skipping.documents()] == ["1"]
    assert skipping.bad == {"bad id": 1}


def test_duplicate_ids_stop_even_under_skip(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "other", "id": "1"}\n')
    with pytest.raises(XtokenError, match=r"b\.jsonl, line 1: id '1' was seen before"):
        list(corpus(tmp_path, "skip", id_field="id").documents())
    assert len(list(corpus(tmp_path, "stop").documents())) == 2


def test_bad_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    (tmp_path / "b.md").write_bytes(b"")
    with pytest.raises(XtokenError, match=r"^a\.txt: invalid UTF-8: byte 0xff at offset 3"):
        list(corpus(tmp_path, "stop").documents())
    skipping = corpus(tmp_path, "skip")
    assert list(skipping.documents()) == []
    assert skipping.bad == {"invalid UTF-8": 1, "empty document": 1}


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    invalid = pa.array([b"good", None, b"\xff\xfe", b"also"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid, "n": [1, 2, 3, 4]}), path)
    with pytest.raises(XtokenError, match=r"a\.parquet, record 1: field is not text"):
        list(corpus(path, "stop").documents())
    skipping = corpus(path, "skip")
    assert [d.text for d in skipping.documents()] == ["good", "also"]
    assert skipping.bad == {"field is not text": 1, "invalid UTF-8": 1}


@pytest.mark.parametrize(
    ("field", "reason"),
    [("body", "missing field: has no field 'body'; it has 'text', 'n'"), ("n", "field is not text")],
)
def test_columns_that_are_not_there_or_no_text(tmp_path: Path, field: str, reason: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "n": [1, 2]}), path)
    with pytest.raises(XtokenError, match=rf"a\.parquet: {reason}"):
        list(corpus(path, "stop", text_field=field).documents())
    skipping = corpus(path, "skip", text_field=field)
    assert list(skipping.documents()) == []
    assert skipping.bad == {reason.split(":")[0]: 1}


def damaged(folder: Path, name: str) -> None:
    lines = b"".join(json.dumps({"text": f"document {i}" * 9}).encode() + b"\n" for i in range(9999))
    if name.endswith(".gz"):
        data = gzip.compress(lines)[:-2000]
    elif name.endswith(".zst"):
        data = zstandard.compress(lines)
        data = data[:9000] + bytes(64) + data[9064:]
    else:
        pq.write_table(pa.table({"text": ["x"] * 1000}), folder / name)
        data = (folder / name).read_bytes()[:-9]
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_files_end_early(tmp_path: Path, name: str) -> None:
    damaged(tmp_path, name)
    (tmp_path / "b.txt").write_text("after")
    with pytest.raises(XtokenError, match=rf"^{name}: unreadable file: unreadable (after record|from the start)"):
        list(corpus(tmp_path, "stop").documents())
    skipping = corpus(tmp_path, "skip")
    assert [d.text for d in skipping.documents()][-1] == "after"
    assert skipping.bad == {"unreadable file": 1}


@pytest.mark.parametrize("missing", [1, 5, 200, 4000])
def test_truncated_zstandard_is_noticed(tmp_path: Path, missing: int) -> None:
    lines = [json.dumps({"text": f"document {i}" * 9}).encode() + b"\n" for i in range(9999)]
    whole = zstandard.compress(b"".join(lines[:10])) + zstandard.compress(b"".join(lines[10:]))
    (tmp_path / "a.jsonl.zst").write_bytes(whole[:-missing])
    with pytest.raises(XtokenError, match=r"^a\.jsonl\.zst: unreadable file: .* ends inside a frame"):
        list(corpus(tmp_path, "stop").documents())
    skipping = corpus(tmp_path, "skip")
    assert 10 <= len(list(skipping.documents())) < 9999
    assert skipping.bad == {"unreadable file": 1}


def test_unknown_suffixes(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text\nx")
    with pytest.raises(XtokenError, match=r"suffix that no reader knows; known are \.jsonl"):
        corpus(tmp_path / "table.csv", "skip")
    with pytest.raises(XtokenError, match="holds no file that can be read"):
        corpus(tmp_path, "skip")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(XtokenError, match=r"table\.csv: unknown suffix"):
        list(corpus(tmp_path, "stop").documents())
    skipping = corpus(tmp_path, "skip")
    assert [d.text for d in skipping.documents()] == ["x"]
    assert skipping.bad == {"unknown suffix": 1}


def test_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"nowhere does not exist"):
        corpus(tmp_path / "nowhere", "skip")
    with pytest.raises(XtokenError, match="holds no file"):
        corpus(tmp_path, "skip")


def test_a_file_that_vanishes_stops_even_under_skip(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("y")
    found = corpus(tmp_path, "skip")
    (tmp_path / "b.txt").unlink()
    with pytest.raises(XtokenError, match=r"b\.txt was listed, but is gone"):
        list(found.documents())


def test_a_server_out_of_reach_is_no_missing_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> bool:
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "isfile", unreachable)
    with pytest.raises(Unreachable, match="memory://corpus: TimeoutError: no answer; check the URL, and credentials"):
        corpus("memory://corpus", "skip")
