"""The coverage table, its advice, and the projection folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtoken.pipeline.project import Audit, build_w, coverage, project, read_projection
from xtoken.pipeline.project.coverage import advice
from xtoken.pipeline.project.mass import Mass
from xtoken.pipeline.project.projection import DROPPED, TO_REST
from xtoken.pipeline.tokens import TokenTable, load_tokenizer
from xtoken.schemas.categories import CATEGORIES, category
from xtoken.schemas.configs.artifacts import ProjectConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import MANIFEST, ProjectionManifest, read_manifest
from xtoken.schemas.ui.progress import Silent


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


def _audited(student: TokenTable, teacher: TokenTable) -> dict[str, Any]:
    return coverage(Audit.of(build_w(student, teacher), student, teacher))


def test_llama3_onto_qwen3(table: Callable[[str], TokenTable]) -> None:
    found = _audited(table("llama3"), table("qwen3"))
    assert found["rows"]["exact"]["share"] == pytest.approx(0.854, abs=5e-4)
    assert found["empty_text_rows"] == 0
    numerals = [found["categories"][name] for name in ("numerals_2", "numerals_3")]
    assert [(row["student"], row["exact"]) for row in numerals] == [(100, 0), (1000, 0)]
    assert found["advice"]["loss"] == "p-kl"
    assert 1.1 < found["mean_nonzeros"] < 1.4


@pytest.mark.thorough
def test_smollm2_onto_gemma3(table: Callable[[str], TokenTable]) -> None:
    student, teacher = table("smollm2"), table("gemma3")
    found = _audited(student, teacher)
    assert found["rows"]["exact"]["count"] == 46_145
    assert found["rows"]["pieces"]["count"] == 2_990
    assert sum(row["student"] for row in found["categories"].values()) == student.size
    assert sum(row["teacher"] for row in found["categories"].values()) == teacher.size
    columns = {name: row["count"] for name, row in found["columns"].items()}
    assert sum(columns.values()) == teacher.size
    assert columns["moved"] + columns["lost"] == pytest.approx(215_700, abs=50)


def test_same_tokenizer_is_exact_and_gets_h_kl(table: Callable[[str], TokenTable]) -> None:
    found = _audited(table("llama3"), table("llama3"))
    assert found["rows"]["pieces"]["count"] == found["empty_text_rows"] == 0
    assert found["advice"]["loss"] == "h-kl"


DIGITS = [str(n).encode() for n in range(10)]


def test_advice_names_the_category(toy: Callable[..., TokenTable]) -> None:
    digits = toy(DIGITS)
    audit = Audit.of(build_w(digits, digits), digits, digits)
    full = {"student": 10, "exact": 10, "teacher": 10, "matched": 10}
    table = {name: dict(full) for name in CATEGORIES}
    assert advice(audit, table)["loss"] == "h-kl"
    table["numerals_3"]["matched"] = 4
    assert advice(audit, table)["loss"] == "p-kl"
    assert "4 of 10 3-digit numerals of the teacher" in advice(audit, table)["reason"]


def test_mass_weighs_the_audit(toy: Callable[..., TokenTable]) -> None:
    student, teacher = toy(DIGITS), toy([*DIGITS, b"17", b"18", b"x"])  # ids 10 and 11 move to "1", 12 is lost
    share_U = np.zeros(teacher.size)
    share_U[[1, 10, 11, 12]] = 0.4, 0.2, 0.1, 0.05
    audit = Audit.of(build_w(student, teacher), student, teacher, Mass(share_U, not_kept=0.25, rows=8))
    table = coverage(audit)
    shares = {name: row["mass"] for name, row in table["columns"].items()}
    assert shares == pytest.approx({"exact": 0.4, "pieces": 0.0, "moved": 0.3, "lost": 0.05, "not_kept": 0.25})
    assert table["moved_into"] == {"numerals_1": {"tokens": 2, "mass": pytest.approx(0.3)}}
    two = table["mass_by_category"]["numerals_2"]
    assert two == pytest.approx({"mass": 0.3, "matched": 0.0, "in_pieces": 0.0, "moved": 0.3, "lost": 0.0})
    assert sum(row["mass"] for row in table["mass_by_category"].values()) == pytest.approx(0.75)
    assert table["advice"]["loss"] == "p-kl"
    assert "70.00% of its mass to numerals and operators, 30.00% to those" in table["advice"]["reason"]


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


def test_routes(table: Callable[[str], TokenTable]) -> None:
    projection = build_w(table("bytes"), table("llama2"))
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


@pytest.mark.parametrize("name", ["a.jsonl", "config.json", "run.json"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(XtokenError, match=rf"holds {name} and no manifest.json.*another --out"):
        project(ProjectConfig(student="bytes", teacher="bytes", out=str(tmp_path)), Silent())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_killed_run_left_is_taken_up(tmp_path: Path) -> None:
    for name in ("w.parquet", "w.parquet.0123456789ab.tmp"):
        (tmp_path / name).touch()
    project(ProjectConfig(student="bytes", teacher="bytes", out=str(tmp_path)), Silent())
    read_projection(str(tmp_path))


def test_another_rule_in_the_folder_is_refused(tmp_path: Path) -> None:
    same = {"student": "bytes", "teacher": "bytes", "out": str(tmp_path / "w")}
    assert project(ProjectConfig(**same), Silent()).options == {"rule": "pieces"}
    with pytest.raises(XtokenError, match=r"built with rule pieces, not random.*another --out"):
        project(ProjectConfig(**same, rule="random"), Silent())
    other = same | {"out": str(tmp_path / "random")}
    manifest = project(ProjectConfig(**other, rule="random", seed=3), Silent())
    assert manifest.options == {"rule": "random", "seed": 3}
    assert read_projection(other["out"]).hash != read_projection(same["out"]).hash
    with pytest.raises(XtokenError, match="built with seed 3, not 4"):
        project(ProjectConfig(**other, rule="random", seed=4), Silent())


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
