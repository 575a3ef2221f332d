"""The coverage table, its advice, and the projection folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.project import build_w, coverage, project, read_projection
from pipeline.project.coverage import CATEGORIES, advice, category
from pipeline.project.projection import DROPPED, TO_REST
from pipeline.tokens import load_tokenizer
from schemas.config import ProjectConfig
from schemas.errors import VerificationError, XtokenError
from schemas.manifest import MANIFEST, ProjectionManifest, read_manifest
from schemas.progress import Silent


@pytest.mark.parametrize(
    ("text", "role", "expected"),
    [
        (b"7", None, "numerals_1"),
        (b"42", None, "numerals_2"),
        (b"007", None, "numerals_3"),
        (b"1234", None, "other_text"),
        ("٣".encode(), None, "other_text"),
        (b"\n  \t", None, "whitespace"),
        (b" :=", None, "operators"),
        (b"()", None, "operators"),
        (b" can't", None, "latin"),
        ("Größe".encode(), None, "latin"),
        ("мир".encode(), None, "other_scripts"),
        ("東京".encode(), None, "other_scripts"),
        ("🙂".encode(), None, "other_text"),
        (b"\xe6\x9d", None, "partial_utf8"),
        (b"", "eos", "specials"),
        (b"", "hole", None),
    ],
)
def test_categories(text: bytes, role: str | None, expected: str | None) -> None:
    assert category(text, role) == expected


def test_llama3_onto_qwen3(tokenizer_file: Callable[[str], Path]) -> None:
    student, teacher = (load_tokenizer(str(tokenizer_file(name))).table for name in ("llama3", "qwen3"))
    table = coverage(build_w(student, teacher), student, teacher)
    assert table["rows"]["exact"]["share"] == pytest.approx(0.854, abs=5e-4)
    assert table["empty_text_rows"] == 0
    numerals = [table["categories"][name] for name in ("numerals_2", "numerals_3")]
    assert [(row["student"], row["student_exact"]) for row in numerals] == [(100, 0), (1000, 0)]
    assert table["advice"]["loss"] == "p-kl"
    assert 1.1 < table["mean_nonzeros"] < 1.4


def test_smollm2_onto_gemma3(smollm2_dir: Path, gemma3_dir: Path) -> None:
    student, teacher = load_tokenizer(str(smollm2_dir)).table, load_tokenizer(str(gemma3_dir)).table
    table = coverage(build_w(student, teacher), student, teacher)
    assert table["rows"]["exact"]["count"] == 46_145
    assert table["rows"]["pieces"]["count"] == 2_990
    assert sum(row["student"] for row in table["categories"].values()) == student.size
    assert sum(row["teacher"] for row in table["categories"].values()) == teacher.size
    columns = {name: row["count"] for name, row in table["columns"].items()}
    assert sum(columns.values()) == teacher.size
    assert columns["moved"] + columns["lost"] == pytest.approx(215_700, abs=50)


def test_same_tokenizer_is_exact_and_gets_h_kl(tokenizer_file: Callable[[str], Path]) -> None:
    table = load_tokenizer(str(tokenizer_file("llama3"))).table
    found = coverage(build_w(table, table), table, table)
    assert found["rows"]["pieces"]["count"] == found["empty_text_rows"] == 0
    assert found["advice"]["loss"] == "h-kl"


def test_advice_names_the_category() -> None:
    full = {"student": 10, "student_exact": 10, "teacher": 10, "teacher_exact": 10}
    table = {name: dict(full) for name in CATEGORIES}
    assert advice(table)["loss"] == "h-kl"
    table["numerals_3"]["teacher_exact"] = 4
    assert advice(table)["loss"] == "p-kl"
    assert "4 of 10 numerals_3 tokens of the teacher" in advice(table)["reason"]


def test_folder_round_trip(tokenizer_file: Callable[[str], Path], tmp_path: Path) -> None:
    config = ProjectConfig(student="bytes", teacher=str(tokenizer_file("llama2")), out=str(tmp_path / "w"))
    manifest = project(config, Silent())
    built = build_w(load_tokenizer("bytes").table, load_tokenizer(config.teacher).table)
    found = read_projection(config.out)
    assert found.hash == built.hash
    assert read_manifest(config.out, ProjectionManifest) == manifest
    assert manifest.coverage["rows"]["exact"]["count"] == 256
    before = {path.name: path.read_bytes() for path in (tmp_path / "w").glob("*.parquet")}
    project(config, Silent())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "w").glob("*.parquet")}


def test_routes(tokenizer_file: Callable[[str], Path]) -> None:
    projection = build_w(load_tokenizer("bytes").table, load_tokenizer(str(tokenizer_file("llama3"))).table)
    prefix, rest, none = (projection.routes(name) for name in ("prefix", "rest", "none"))
    assert (prefix[projection.unreached] == projection.moved_to).all()
    assert (rest[projection.unreached] == TO_REST).all()
    assert (none[projection.unreached] == DROPPED).all()
    reached = np.unique(projection.teacher_id)
    assert all((route[reached] == reached).all() for route in (prefix, rest, none))


def test_another_pair_in_the_folder_is_refused(tokenizer_file: Callable[[str], Path], tmp_path: Path) -> None:
    out = str(tmp_path / "w")
    project(ProjectConfig(student="bytes", teacher=str(tokenizer_file("llama2")), out=out), Silent())
    with pytest.raises(XtokenError, match="another teacher tokenizer"):
        project(ProjectConfig(student="bytes", teacher="bytes", out=out), Silent())


def test_a_changed_table_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "w"
    project(ProjectConfig(student="bytes", teacher="bytes", out=str(out)), Silent())
    data = bytearray((out / "w.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "w.parquet").write_bytes(data)
    with pytest.raises(VerificationError, match="sha256"):
        read_projection(str(out))
    (out / "w.parquet").unlink()
    with pytest.raises(VerificationError, match="missing"):
        read_projection(str(out))


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "w"
    manifest = project(ProjectConfig(student="bytes", teacher="bytes", out=str(out)), Silent())
    smaller = manifest.teacher.model_copy(update={"size": 200})
    (out / MANIFEST).write_text(manifest.model_copy(update={"teacher": smaller}).model_dump_json(), encoding="utf-8")
    with pytest.raises(VerificationError, match="teacher_id outside its vocabulary"):
        read_projection(str(out))
