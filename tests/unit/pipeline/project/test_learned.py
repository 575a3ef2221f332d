"""Trained weights become a projection that align and inspect read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.project import Projection, build_w, moved_rows, read_projection, write_learned
from xtoken.pipeline.project.files import write_table, write_tables
from xtoken.pipeline.project.learned import STUDENT_VOCAB_FILE, named, reweighted
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import MANIFEST, ProjectionManifest, TargetManifest, TeacherInfo, provenance, read_manifest

DIGITS = [str(n).encode() for n in range(10)]
TEACHER = TeacherInfo(
    model="m",
    backend="fake",
    vocab_rows=12,
    context=64,
    dtype="float32",
    head_dtype="float32",
    device="cpu",
    capture_path="rows",
    engine_version="1",
)


@pytest.fixture
def student(toy: Callable[..., TokenTable]) -> TokenTable:
    return toy([*DIGITS, b"42", b"17", b"317"], name="student", specials=["eos"])


@pytest.fixture
def base(toy: Callable[..., TokenTable], student: TokenTable) -> Projection:
    return build_w(student, toy([*DIGITS, b"99"], name="teacher", specials=["eos"]))


@pytest.fixture
def source(student: TokenTable, base: Projection, tmp_path: Path) -> str:
    """The side tables and manifest of a target folder."""
    root = str(tmp_path / "targets")
    files = write_tables(root, base)
    files[STUDENT_VOCAB_FILE] = write_table(root, STUDENT_VOCAB_FILE, student.to_tables()[0])
    manifest = TargetManifest(
        **provenance(),
        capture_hash="c",
        teacher=TEACHER,
        teacher_tokenizer=base.teacher,
        student=base.student,
        w_hash=base.hash,
        losses=["p-kl"],
        unreached="prefix",
        run_hash="r",
        files=files,
    )
    (tmp_path / "targets" / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")
    return root


def trained(base: Projection) -> NDArray[np.float32]:
    """42: 4 and 2 change places; 317: a little; all else stays."""
    weights = base.weight.copy()
    rows = {s: np.flatnonzero(base.student_id == s) for s in (10, 12)}
    weights[rows[10]] = [0.3, 0.7]
    weights[rows[12]] = [0.8, 0.15, 0.05]
    return weights


def test_the_folder_is_a_projection_with_the_new_weights(source: str, base: Projection, tmp_path: Path) -> None:
    out = str(tmp_path / "learned")
    manifest = write_learned(source, trained(base), out, "run-1")
    assert manifest == read_manifest(out, ProjectionManifest)
    assert manifest.options == {"rule": "learned", "trained_on": "run-1", "from_w": base.hash}
    found = read_projection(out)
    assert found.hash != base.hash
    assert (found.student, found.teacher) == (base.student, base.teacher)
    row = {s: np.flatnonzero(found.student_id == s) for s in (10, 11, 12)}
    assert found.teacher_id[row[10]].tolist() == [2, 4], "the largest weight stands first"
    assert found.weight[row[10]] == pytest.approx([0.7, 0.3])
    assert found.weight[row[12]] == pytest.approx([0.8, 0.15, 0.05])
    assert (found.weight[row[11]] == base.weight[base.student_id == 11]).all()
    assert found.unreached.tolist() == base.unreached.tolist() == [10]
    # 2 and 3 have exact twins, whose weight 1 wins, before and after.
    assert found.common_student().tolist() == base.common_student().tolist()
    verify(out)


def test_the_common_set_follows_the_weights(toy: Callable[..., TokenTable]) -> None:
    before = build_w(toy([b"ab"]), toy([b"a", b"b"]))
    assert before.common_student().tolist() == [0, -1]
    fallback = np.zeros(1, np.bool_)
    assert reweighted(before, np.array([0.2, 0.8], np.float32), fallback).common_student().tolist() == [-1, 0]
    assert reweighted(before, np.array([0.5, 0.5], np.float32), fallback).common_student().tolist() == [-1, -1]


def test_rows_that_moved_most(source: str, base: Projection, tmp_path: Path) -> None:
    out = str(tmp_path / "learned")
    write_learned(source, trained(base), out, "run-1")
    first, second = moved_rows(base, read_projection(out), 50)
    assert first == {
        "student_id": 10,
        "distance": pytest.approx(0.9090909 - 0.3, abs=1e-5),
        "teacher_id": [4, 2],
        "before": pytest.approx([0.909091, 0.090909], abs=1e-6),
        "after": pytest.approx([0.3, 0.7], abs=1e-6),
    }
    assert second["student_id"] == 12
    assert second["distance"] == pytest.approx(0.900901 - 0.8, abs=1e-5)
    assert len(moved_rows(base, read_projection(out), 1)) == 1
    assert moved_rows(base, base, 50) == []


def test_inspect_shows_them(source: str, base: Projection, tmp_path: Path) -> None:
    out = str(tmp_path / "learned")
    write_learned(source, trained(base), out, "run-1")
    found = inspect(out)
    assert (found["rows_with_a_choice"], found["rows_moved"]) == (3, 2)
    assert found["moved"][0]["student"] == "'42'"
    shown = found["moved"][0]["before_and_after"]
    assert {name: [round(w, 3) for w in pair] for name, pair in shown.items()} == {
        "4 '4'": [0.909, 0.3],
        "2 '2'": [0.091, 0.7],
    }


def test_a_teacher_token_without_a_twin_is_shown_by_its_id(toy: Callable[..., TokenTable]) -> None:
    student, teacher = toy([b"ab"]), toy([b"a", b"b"])
    before = build_w(student, teacher)
    after = reweighted(before, np.array([0.2, 0.8], np.float32), np.zeros(1, np.bool_))
    (row,) = named(moved_rows(before, after, 5), before, student.to_tables()[0])
    assert row["student"] == "'ab'"
    assert list(row["before_and_after"]) == ["0", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-1], "entries, but .* weights were given"),
        (lambda w: w * np.float32(0.9), "sums to 0.9"),
        (lambda w: np.where(np.arange(len(w)) == 3, np.nan, w), "finite"),
        (lambda w: -w, "at least 0"),
    ],
)
def test_weights_that_are_no_w_are_refused(
    source: str,
    base: Projection,
    tmp_path: Path,
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    message: str,
) -> None:
    out = tmp_path / "learned"
    with pytest.raises(XtokenError, match=message):
        write_learned(source, change(base.weight), str(out), "run-1")
    assert not out.exists()


def test_another_w_in_the_folder_is_refused_but_its_own_is_replaced(
    source: str, base: Projection, tmp_path: Path
) -> None:
    out = str(tmp_path / "learned")
    write_learned(source, trained(base), out, "run-1")
    write_learned(source, base.weight, out, "run-1")
    assert read_projection(out).hash == base.hash
    (tmp_path / "targets" / "w.parquet").write_bytes(b"other")
    with pytest.raises(VerificationError, match="sha256"):
        write_learned(source, base.weight, out, "run-1")


def test_rows_of_other_entries_cannot_be_compared(toy: Callable[..., TokenTable]) -> None:
    student, teacher = toy([b"ab", b"a"]), toy([b"a", b"b"])
    with pytest.raises(XtokenError, match="different places"):
        moved_rows(build_w(student, teacher), build_w(student, teacher, "first-piece"), 5)
