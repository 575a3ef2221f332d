"""Documents of every format: text, ids, order, positions, limits."""

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from xtoken.pipeline.corpus import Corpus, Document
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import XtokenError

TEXTS = ["One.", "Zwei größere\r\nZeilen.", "e\u0301 三", "four\x00"]
NFC = ["One.", "Zwei größere\r\nZeilen.", "\u00e9 三", "four\x00"]


def corpus(path: object, **options: Any) -> Corpus:
    return Corpus(CorpusConfig(corpus=str(path), **options))


def read(path: object, **options: Any) -> list[Document]:
    return list(corpus(path, **options).documents())


def jsonl(texts: list[str] = TEXTS) -> bytes:
    return b"".join(json.dumps({"id": f"d{i}", "n": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def write_parquet(path: Path, kind: pa.DataType | None = None) -> None:
    text = pa.array(TEXTS, kind or pa.string())
    table = pa.table({"other": [1] * 4, "text": text, "id": ["d0", "d1", "d2", "d3"], "n": [0, 1, 2, 3]})
    pq.write_table(table, path, row_group_size=2)


def write_format(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        write_parquet(path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(TEXTS[:2])) + gzip.compress(b"".join(jsonl().splitlines(True)[2:])))
    elif name.endswith(".zst"):
        lines = jsonl().splitlines(True)
        skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"xyz"  # as pzstd writes before every frame
        frames = (zstandard.compress(part) for part in (b"".join(lines[:2]), b"".join(lines[2:])))
        path.write_bytes(b"".join(skippable + frame for frame in frames))
    elif name.endswith(".arrow"):
        table = pa.table({"text": TEXTS, "id": ["d0", "d1", "d2", "d3"], "n": [0, 1, 2, 3]})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=3)
    else:
        path.write_bytes(b"\xef\xbb\xbf" + jsonl())
    return path


TABULAR = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow")


@pytest.mark.parametrize("name", TABULAR)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = write_format(tmp_path, name)
    assert read(path) == [Document(f"{name}:{i}", text, 0, i) for i, text in enumerate(NFC)]
    assert [d.id for d in read(path, id_field="id")] == ["d0", "d1", "d2", "d3"]
    assert [d.id for d in read(path, id_field="n")] == ["0", "1", "2", "3"]
    assert [d.text for d in read(path, text_field="id")] == ["d0", "d1", "d2", "d3"]


@pytest.mark.parametrize("name", TABULAR)
@pytest.mark.parametrize("start", range(5))
def test_reading_from_a_position(tmp_path: Path, name: str, start: int) -> None:
    path = write_format(tmp_path, name)
    assert list(corpus(path).documents(record=start)) == read(path)[start:]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_parquet_string_types(tmp_path: Path, kind: pa.DataType) -> None:
    write_parquet(tmp_path / "a.parquet", kind)
    assert [d.text for d in read(tmp_path / "a.parquet")] == NFC


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read(tmp_path / "a.txt") == [Document("a.txt:0", "one\r\ntwo", 0, 0)]
    assert list(corpus(tmp_path / "a.txt").documents(record=1)) == []


def mixed_folder(root: Path) -> None:
    for name in ("b/deep", ".git", "_tmp"):
        (root / name).mkdir(parents=True)
    (root / "b" / "deep" / "x.md").write_text("# X")
    (root / "b" / "y.TXT").write_text("Y")
    (root / "a.jsonl").write_bytes(jsonl())
    (root / ".git" / "HEAD.txt").write_text("no")
    (root / "_tmp" / "z.txt").write_text("no")
    (root / "_SUCCESS").write_text("")


FOLDER_IDS = ["a.jsonl:0", "a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b/deep/x.md:0", "b/y.TXT:0"]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    mixed_folder(tmp_path)
    found = corpus(tmp_path)
    documents = list(found.documents())
    assert [d.id for d in documents] == FOLDER_IDS
    assert [(file.name, file.size) for file in found.files][1:] == [("b/deep/x.md", 3), ("b/y.TXT", 1)]
    assert [d.id for d in read(f"{tmp_path}/")] == FOLDER_IDS
    for document in documents:
        again = list(corpus(tmp_path).documents(document.file, document.record))
        assert again == documents[documents.index(document) :]


def test_ids_do_not_depend_on_where_the_corpus_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed_folder(tmp_path / "here")
    mixed_folder(tmp_path / "there" / "deeper")
    monkeypatch.chdir(tmp_path / "there")
    assert read(tmp_path / "here") == read("deeper") == read("./deeper/")


def test_limit_counts_good_documents_over_files(tmp_path: Path) -> None:
    mixed_folder(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + jsonl())
    documents = read(tmp_path, limit=5, on_bad="skip")
    assert [d.id for d in documents] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b/deep/x.md:0"]


def test_a_url(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus-test/a.jsonl", jsonl())
    fs.pipe("/corpus-test/sub/b.txt", b"B")
    assert [d.id for d in read("memory://corpus-test")] == [*FOLDER_IDS[:4], "sub/b.txt:0"]
    assert [d.id for d in read("memory://corpus-test/sub/b.txt")] == ["b.txt:0"]
    assert [file.path for file in corpus("memory://corpus-test").files][1] == "memory:///corpus-test/sub/b.txt"
    with pytest.raises(XtokenError, match="cannot be opened"):
        corpus("nonsense://x")


def test_saved_hugging_face_datasets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_dict({"text": TEXTS, "id": ["d0", "d1", "d2", "d3"]})
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    documents = read(tmp_path / "one")
    assert [d.text for d in documents] == NFC
    assert documents[2].id == "data-00001-of-00002.arrow:0"
    DatasetDict({"train": dataset, "test": dataset.select([3, 1])}).save_to_disk(tmp_path / "two")
    assert [d.text for d in read(tmp_path / "two")] == NFC
    assert corpus(tmp_path / "two").listing.left_out == {"split test": 1}
    assert [d.text for d in read(tmp_path / "two" / "test")] == [NFC[3], NFC[1]]
    found = [(d.id, d.text) for d in read(tmp_path / "two", split=["all"])]
    assert [text for _, text in found] == [*NFC, NFC[3], NFC[1]]
    assert found[4][0] == "test/data-00000-of-00001.arrow:0"
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(XtokenError, match="save_to_disk"):
        corpus(tmp_path / "one")
