"""Captures and targets from strangers: each case once did harm, or would; every reader refuses it in words.

``tests/fuzz/store.py`` makes thousands more; a fixed few hundred of them run here in a process of their own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz import bombs as fuzz_bombs
from fuzz import store as fuzz_store
from fuzz import thrift as fuzz_thrift
from fuzz.mutations import seal, seal_sums, write

from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_capture, read_table
from xtoken.pipeline.store.seal import seal as seal_artifact
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.share import PullConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io import parquet_limits as limits
from xtoken.schemas.io.parquet_limits import check_file, reading
from xtoken.schemas.manifest import CaptureManifest, Part, read_any_manifest, read_manifest
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.targets import Targets

GOLDEN = fuzz_store.GOLDEN
CASES = range(120)
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "v1-tau", tmp_path / "dataset"))


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "v2-targets", tmp_path / "dataset"))


@pytest.mark.thorough
def test_a_fixed_few_hundred_of_the_fuzzer() -> None:
    records = fuzz_store.run_all(fuzz_store.SEED, list(CASES), workers=1)
    assert len(records) == len(CASES)
    assert len({record["class"] for record in records}) == len(fuzz_store.MUTATIONS)
    outcomes = [outcome for record in records for outcome in record["outcomes"].values()]
    assert outcomes.count("refused") > len(CASES), "the mutations do not reach anything"
    assert outcomes.count("ok") > len(CASES) // 2
    assert fuzz_store.findings(records) == []


def test_the_fuzzer_tells_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(_root: str, out: str) -> None:
        (Path(out).parent / "stray").touch()
        raise IndexError("x")

    readers = {kind: {"broken": fail} for kind in fuzz_store.CONSUMERS}
    monkeypatch.setattr(fuzz_store, "CONSUMERS", readers)
    record = fuzz_store.run_case(0, tmp_path)
    found = {reader: what for _, _, reader, what in fuzz_store.findings([record])}
    assert found["broken"].startswith("IndexError at test_hostile.py")
    assert "stray" in found["files"]


def edit(root: Path, change: Change) -> str:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return str(root)


NUMBERS: dict[str, Change] = {
    "negative samples": lambda m: m["parts"][0].update(samples=-1),
    "tokens without end": lambda m: m["parts"][0].update(tokens=10**18),
    "a part of no name": lambda m: m["parts"][0].update(index=10**9),
    "a vocabulary that would fill memory": lambda m: m["tokenizer"].update(size=2**31 - 1),
    "no size": lambda m: m["tokenizer"].update(size=-1),
    "an eos that is no token": lambda m: m["tokenizer"].update(eos_id=400),
    "a negative bos": lambda m: m["tokenizer"].update(bos_id=-1),
    "a head of negative width": lambda m: m["teacher"].update(vocab_rows=-5),
    "temperatures without end": lambda m: m["codec"].update(temperatures=[1.0, *(tau / 7 for tau in range(8, 900))]),
    "a temperature that is not a number": lambda m: m["codec"].update(temperatures=[1.0, float("nan")]),
    "a name of a megabyte": lambda m: m["teacher"].update(model="x" * (1 << 20) + "x"),
    "half a character": lambda m: m["tokenizer"].update(name="\ud800"),
    "an infinite step": lambda m: m["codec"].update(step=float("inf")),
}


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_a_manifest_are_bounded(capture: Path, change: Change) -> None:
    root = edit(capture, change)
    for read in (read_any_manifest, verify, inspect):
        with pytest.raises(XtokenError) as caught:
            read(root)
        assert len(str(caught.value)) < 5000


TEXTS = {
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a number of 5000 digits": b'{"schema_version": ' + b"9" * 5000 + b"}",
    "NaN": b'{"kind": "capture", "schema_version": 1, "x": NaN}',
    "a key twice": b'{"kind": "capture", "schema_version": 1, "kind": "targets"}',
    "no UTF-8": b'{"kind": "\xff"}',
    "half a character": b'{"kind": "capture", "schema_version": 1, "xtoken_version": "\\ud800"}',
    "nothing": b"",
    "a list": b"[]",
    "a kind of a megabyte": b'{"kind": "' + b"x" * (1 << 20) + b'"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_no_manifest_is_refused_in_few_words(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(XtokenError, match=r"manifest\.json") as caught:
        read_any_manifest(str(tmp_path))
    assert len(str(caught.value)) < 1000


def test_an_enormous_manifest_is_not_read_to_its_end(capture: Path) -> None:
    with open(capture / "manifest.json", "ab") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(XtokenError, match="more than the 67108864 bytes that are read"):
        read_any_manifest(str(capture))


@pytest.mark.parametrize(
    "name", ["manifest.json", "vocab.parquet", "data/part-00000.parquet", "commits/part-00000.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_could_be_read_for_ever_is_not_opened(capture: Path, name: str, kind: str) -> None:
    path = capture / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(XtokenError):
        verify(str(capture))
    with pytest.raises(XtokenError):
        inspect(str(capture))


def swollen(path: Path, size: int, *, true_footer: bool) -> bytes:
    """A capture part of one sample that claims to have ``size`` tokens; some 10 kB."""
    table = pq.read_table(path).slice(0, 1)
    at = table.column_names.index("teacher_ids")
    field = table.schema.field(at)
    two = pa.array([[0, 0]], pa.list_(pa.int32())).cast(field.type)
    write(path, table.set_column(at, field, two), use_dictionary=["teacher_ids.list.element"], compression="none")
    return fuzz_bombs._swollen(path.read_bytes(), at, size, true_footer=true_footer)


@pytest.mark.parametrize("true_footer", [True, False])
def test_two_thousand_million_zeros_in_ten_kilobytes(capture: Path, true_footer: bool) -> None:
    # pyarrow alone takes 16 GiB for this file, whatever its footer says: it believes the page
    path = capture / "data" / "part-00000.parquet"
    path.write_bytes(swollen(path, 2**31 - 1, true_footer=true_footer))
    seal(capture, lambda _root, _manifest: None)
    seal_sums(capture)
    rule = "decoded bytes in row group 0, more than the 1073741824" if true_footer else "the footer says 2"
    for read in (verify, lambda root: list(iter_capture(root)), inspect):
        with pytest.raises(VerificationError, match=rule):
            read(str(capture))
    manifest = read_manifest(str(capture), CaptureManifest)
    with pytest.raises(VerificationError, match=rule):
        CaptureCheck.of(manifest).file(str(path))


def test_lists_within_the_bound_are_read_whatever_their_encoding(capture: Path) -> None:
    path = capture / "data" / "part-00000.parquet"
    path.write_bytes(swollen(path, 10**5, true_footer=True))
    assert len(read_table(str(path))["teacher_ids"][0]) == 10**5


def test_a_long_string_named_by_every_row_is_read_in_short_batches(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows, size = 3000, 1 << 20  # 3 GiB decoded, 1 kB of file
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * size]))
    pq.write_table(
        pa.table({"text": long}), path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False
    )
    with open(path, "rb") as file:
        parquet = check_file(file, "x")
        assert limits.check_group(limits.group_chunks(parquet, file, "x")[0], file, 0, "x") < 256
    before = pa.total_allocated_bytes()
    with pytest.raises(VerificationError, match=r"decoded bytes in row group 0, more than the 1073741824"):
        read_table(str(path))
    assert pa.total_allocated_bytes() - before < 1 << 20


FOOTERS: dict[str, Callable[[fuzz_thrift.Fields], None]] = {
    "70,000 row groups": lambda f: fuzz_thrift.put(f, 4, (12, [[[1, 9, (12, [])], [2, 6, 0], [3, 6, 0]]] * 70_000)),
    "more rows than row groups hold": lambda f: fuzz_thrift.put(f, 3, 10**9),
    "negative rows": lambda f: fuzz_thrift.put(fuzz_thrift.get(f, 4)[1][0], 3, -1),
    "pages outside the file": lambda f: fuzz_thrift.put(fuzz_thrift.chunks(f)[3], 9, 10**12),
    "pages before the file": lambda f: fuzz_thrift.put(fuzz_thrift.chunks(f)[3], 9, -100),
    "a chunk longer than the file": lambda f: fuzz_thrift.put(fuzz_thrift.chunks(f)[3], 7, 10**12),
    "a chunk that ends in a page": lambda f: fuzz_thrift.put(fuzz_thrift.chunks(f)[3], 7, 30),
    "a schema 1000 levels deep": lambda f: _deepen(f, 1000),
}


def _deepen(footer: fuzz_thrift.Fields, depth: int) -> None:
    kind, schema = fuzz_thrift.get(footer, 2)
    fuzz_thrift.put(footer, 2, (kind, [schema[0], *[[[3, 5, 0], [4, 8, b"g"], [5, 5, 1]]] * depth, *schema[1:]]))


@pytest.mark.parametrize("change", FOOTERS.values(), ids=FOOTERS)
def test_footers_are_not_believed(capture: Path, change: Callable[[fuzz_thrift.Fields], None]) -> None:
    path = capture / "data" / "part-00000.parquet"
    data = path.read_bytes()
    footer = fuzz_thrift.footer(data)
    assert fuzz_thrift.with_footer(data, footer) == data
    change(footer)
    path.write_bytes(fuzz_thrift.with_footer(data, footer))
    with pytest.raises(VerificationError), open(path, "rb") as file, reading("x", "fetch it again"):
        check_file(file, "x")
    with pytest.raises(VerificationError):
        list(iter_capture(str(capture)))


def test_ends_that_overflow_are_not_taken_for_growing_ones(capture: Path) -> None:
    path = capture / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["teacher_end"][3:5] = [2**31 - 1, -(2**31)]  # their int32 difference is 1
    write(path, pa.Table.from_pylist(rows, table.schema))
    with pytest.raises(VerificationError, match="teacher_end decreases"):
        CaptureCheck.of(read_manifest(str(capture), CaptureManifest))(str(path))


def resealed(root: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> str:
    write(root / name, change(pq.read_table(root / name)))
    seal(root, lambda _root, _manifest: None)
    return str(root)


def test_a_projection_with_foreign_ids_never_reaches_a_loss(targets: Path) -> None:
    def foreign(table: pa.Table) -> pa.Table:
        ids = pa.array([10**6] * len(table), pa.int32())
        at = table.column_names.index("teacher_id")
        return table.set_column(at, table.schema.field(at), ids)

    with pytest.raises(VerificationError, match="teacher_id outside 0 to 399"):
        _ = Targets(resealed(targets, "w.parquet", foreign)).w


def test_target_columns_of_another_type_are_refused(targets: Path) -> None:
    def as_floats(table: pa.Table) -> pa.Table:
        at = table.column_names.index("chunk_student_end")
        return table.set_column(at, "chunk_student_end", table.column(at).cast(pa.list_(pa.float32())))

    opened = Targets(resealed(targets, "data/part-00000.parquet", as_floats))
    with pytest.raises(VerificationError, match="holds chunk_student_end as"):
        opened.read(opened.groups[0], ("chunk_student_end",))


def test_markup_in_names_is_shown_as_it_is(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from xtoken.schemas.ui.tables import figure_tables

    root = edit(capture, lambda m: m["teacher"].update(model="[/bold]'; DROP TABLE x; --"))
    Console().print(*figure_tables(inspect(root)), sep="\n")
    assert "DROP TABLE" in capsys.readouterr().out


def test_bounds_of_parts_leave_room_for_real_ones() -> None:
    huge = 2**53
    part = Part(
        index=10**9 - 1, samples=huge, tokens=huge, rows=huge, entries=huge, text_bytes=huge, file_bytes=huge,
        sha256="0" * 64,
    )  # fmt: skip
    assert Part.model_validate_json(part.model_dump_json()) == part


def with_table(root: Path, name: str, table: pa.Table) -> Path:
    """Put a table in the place of a side table, and make manifest and SHA256SUMS vouch for it."""
    pq.write_table(table, root / name)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "SHA256SUMS").unlink(missing_ok=True)
    seal_artifact(str(root))
    return root


@pytest.mark.parametrize("twice", [False, True])
def test_a_vocabulary_without_codes_or_with_two_of_them(tmp_path: Path, twice: bool) -> None:
    root = Path(shutil.copytree(GOLDEN / "v2-topk", tmp_path / "dataset"))
    vocab = pq.read_table(root / "vocab.parquet")
    with_table(
        root, "vocab.parquet", vocab.append_column("code", vocab["code"]) if twice else vocab.drop_columns("code")
    )
    for reader in (verify, inspect, lambda where: list(iter_capture(where))):
        with pytest.raises(VerificationError):
            reader(str(root))


def test_records_that_are_links_to_themselves(capture: Path) -> None:
    record = capture / "commits" / "part-00001.json"
    record.unlink()
    record.symlink_to(record)
    for reader in (verify, inspect, lambda where: list(iter_capture(where))):
        with pytest.raises(VerificationError, match=r"part-00001\.json"):
            reader(str(capture))


def test_targets_whose_lists_are_null_are_not_described(targets: Path) -> None:
    path = targets / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("student_ids")
    nulls = pa.nulls(table.num_rows, table.schema.field(at).type)
    pq.write_table(table.set_column(at, table.schema.field(at).with_nullable(True), nulls), path)
    with pytest.raises(VerificationError, match="not those of the format"):
        inspect(str(targets))


def test_a_manifest_too_deep_for_the_second_reader_is_pulled_or_refused(capture: Path, tmp_path: Path) -> None:
    manifest = json.loads((capture / "manifest.json").read_text())
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    manifest["corpus"]["options"] = {"x": deep}
    (capture / "manifest.json").write_text(json.dumps(manifest))
    try:
        pull(PullConfig(source=str(capture), destination=str(tmp_path / "out")), Silent())
    except XtokenError:
        assert not (tmp_path / "out" / "manifest.json").exists()
    else:
        verify(str(tmp_path / "out"))
