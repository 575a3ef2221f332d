"""Records that keep different runs out of one folder: the teacher, and what its engine was started with."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from xtoken.pipeline.capture import run_identity
from xtoken.pipeline.capture.run_identity import (
    RUN_FILE,
    TEACHER_FILE,
    as_begun,
    check_settings,
    read_engine_settings,
    read_teacher,
    run_settings,
    settle_settings,
    settle_teacher,
    settle_weights,
)
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig, TeacherGroup
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import TeacherInfo, digest

INFO = TeacherInfo(
    model="m",
    backend="fake",
    vocab_rows=7,
    context=100,
    dtype="float32",
    head_dtype="float32",
    device="cpu",
    capture_path="fake",
    engine_version="1",
)
SETTINGS = {"batch_tokens": 64, "eager": True, "memory": 0.5, "attention": "sdpa"}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def test_settings_stand_beside_the_teacher(folder: Folder) -> None:
    settle_teacher(folder, INFO, SETTINGS)
    assert read_teacher(folder) == INFO
    assert read_engine_settings(folder) == SETTINGS
    assert [type(value) for value in read_engine_settings(folder).values()] == [int, bool, float, str]


@pytest.mark.parametrize("name", ["batch_tokens", "max_num_batched_tokens"])
def test_a_run_keeps_the_batches_that_it_began_with(folder: Folder, tmp_path: Path, name: str) -> None:
    """Of hf under its own name, of vLLM under vLLM's; a number that is given stands."""
    given: dict[str, Any] = {"corpus": str(tmp_path / "c.txt"), "teacher": "t", "out": folder.root}
    left_out, asked = PrecomputeConfig.from_flat(**given), PrecomputeConfig.from_flat(**given, batch_tokens=8)
    assert as_begun(left_out, folder) == left_out
    assert [left_out.teacher.batch_on(device) for device in ("cpu", "cuda", "NVIDIA H100")] == [2048, 16_384, 16_384]
    settle_teacher(folder, INFO, {name: 640})
    begun = as_begun(left_out, folder)
    assert begun.teacher.batch_on("cpu") == begun.teacher.batch_on("cuda") == 640
    assert begun == left_out.changed(batch_tokens=640)
    assert as_begun(asked, folder) == asked
    assert asked.teacher.batch_on("cuda") == 8


def test_an_engine_that_tells_no_batches_changes_nothing(folder: Folder, tmp_path: Path) -> None:
    left_out = PrecomputeConfig.from_flat(corpus=str(tmp_path / "c.txt"), teacher="t", out=folder.root)
    settle_teacher(folder, INFO)
    assert as_begun(left_out, folder) == left_out


def test_the_first_engine_s_settings_stand_and_another_teacher_is_refused(folder: Folder) -> None:
    settle_teacher(folder, INFO, SETTINGS)
    settle_teacher(folder, INFO, {**SETTINGS, "batch_tokens": 8})
    settle_teacher(folder, INFO)
    settle_teacher(folder, INFO.model_copy(update={"capture_path": "another way to the same rows"}), SETTINGS)
    assert read_engine_settings(folder) == SETTINGS
    assert read_teacher(folder) == INFO
    assert settle_teacher(folder, INFO.model_copy(update={"device": "NVIDIA H100"}), SETTINGS) == INFO
    assert settle_teacher(folder, INFO.model_copy(update={"tensor_parallel": 4}), SETTINGS) == INFO
    for name, other in (("dtype", "bfloat16"), ("head_dtype", "bfloat16"), ("quantization", "fp8")):
        with pytest.raises(XtokenError, match=f"{name}: .* there, '{other}' now"):
            settle_teacher(folder, INFO.model_copy(update={name: other}), SETTINGS)


def test_a_record_of_an_older_release_is_read_and_agrees(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / TEACHER_FILE).write_text(INFO.model_dump_json())
    assert (read_teacher(folder), read_engine_settings(folder)) == (INFO, {})
    settle_teacher(folder, INFO, SETTINGS)
    assert read_engine_settings(folder) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 1}', '{"engine_settings": {"a": [1]}}', " " * (5 << 20)])
def test_a_damaged_record_is_refused(folder: Folder, tmp_path: Path, text: str) -> None:
    (tmp_path / TEACHER_FILE).write_text(text)
    for read in (read_teacher, read_engine_settings):
        with pytest.raises(VerificationError, match=r"teacher.json (is damaged|has more than)"):
            read(folder)


DAMAGED = ["", "{", "[]", '""', "null", "{}", "[" * 100_000]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_settings_name_the_least_costly_way_out(folder: Folder, tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_FILE).write_text(text)
    for settle in (settle_settings, check_settings):
        with pytest.raises(VerificationError, match=r"run\.json is damaged.*; remove it and run the same"):
            settle(folder, {"k": 8})
    (tmp_path / "commits").mkdir()
    for settle in (settle_settings, check_settings):
        with pytest.raises(VerificationError, match=r"run\.json is damaged.*; put a copy of it there"):
            settle(folder, {"k": 8})


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_teacher_is_made_again(folder: Folder, tmp_path: Path, text: str) -> None:
    (tmp_path / TEACHER_FILE).write_text(text)
    with pytest.raises(VerificationError, match=r"teacher\.json is damaged.*; remove it and run the same"):
        settle_teacher(folder, INFO)
    with pytest.raises(VerificationError, match=r"teacher\.json is damaged"):
        read_teacher(folder)
    (tmp_path / TEACHER_FILE).unlink()
    with pytest.raises(VerificationError, match=r"teacher\.json is missing; put a copy of it there, or remove it"):
        read_teacher(folder)
    assert settle_teacher(folder, INFO) == INFO


def test_settings_that_no_record_holds_are_a_defect(folder: Folder) -> None:
    with pytest.raises(ValueError, match="validation error"):
        settle_teacher(folder, INFO, {"options": {"a": 1}})


def test_a_run_says_how_its_parts_are_written_not_its_manifest(tmp_path: Path) -> None:
    """So that what an older release began can be finished by a newer one."""
    config = PrecomputeConfig.from_flat(corpus="c", teacher="bytes", out=str(tmp_path), backend="fake")
    found = run_settings(config, load_tokenizer("bytes").table, None)
    assert found["schema_version"] == 2
    json.dumps(found)


def weights_of(folder: Path, **names: bytes) -> TeacherGroup:
    """A teacher's folder with such weight files."""
    folder.mkdir()
    for name, data in names.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    return TeacherGroup(teacher=str(folder), backend="hf")


def test_weights_are_hashed_once_per_run(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = weights_of(tmp_path / "teacher", one=b"1", two=b"2")
    found = settle_weights(folder, teacher)
    by_hand = [[f"{name}.safetensors", sha256(data).hexdigest()] for name, data in (("one", b"1"), ("two", b"2"))]
    assert found == digest(by_hand), "as every release has computed it"
    monkeypatch.setattr(run_identity, "content_hash", None)
    assert settle_weights(folder, teacher) == found
    monkeypatch.undo()
    Path(teacher.teacher, "two.safetensors").write_bytes(b"3")
    changed = settle_weights(folder, teacher)
    assert changed not in (None, found), "it is known again when somebody wrote to them"
    folder.replace("weights.json", b'{"files": 3')
    assert settle_weights(folder, teacher) == changed, "a damaged record is made again"


def test_who_has_no_weights_hashes_none(folder: Folder, tmp_path: Path) -> None:
    teacher = weights_of(tmp_path / "teacher", one=b"1")
    assert settle_weights(folder, teacher.model_copy(update={"backend": "fake"})) is None
    assert settle_weights(folder, teacher.model_copy(update={"teacher": "org/model"})) is None
    assert folder.names() == ["teacher"]
