"""A student without weights: the same places for parameters and buffers, on the meta device."""

from pathlib import Path

import pytest
import torch

from xtoken.schemas.configs.train import StudentGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.student import outline as module
from xtoken.trainer.student.adapters import add_adapters
from xtoken.trainer.student.expansion import FILE, is_expanded
from xtoken.trainer.student.model import load_student
from xtoken.trainer.student.outline import META, outline, refuse_unlike, slots

BYTES = TokenizerInfo(name="toy", hash="a" * 64, kind="bytes", size=24, adds_bos=True, bos_id=0, eos_id=1)


def asked(folder: str) -> StudentGroup:
    return StudentGroup(student=folder, tokenizer="bytes")


@pytest.mark.parametrize("lora", [False, True])
def test_it_has_the_places_of_the_model(student_dir: str, lora: bool) -> None:
    whole, empty = load_student(student_dir, torch.device("cpu"), False), outline(asked(student_dir), BYTES, 0)
    assert empty is not None
    if lora:
        whole, empty = (add_adapters(model, 4, embeddings=True) for model in (whole, empty))
    assert {one.device for one in (*empty.parameters(), *empty.buffers())} == {META}
    assert slots(empty) == slots(whole)
    assert lora == any("lora_" in one.name and one.trained for one in slots(empty))
    refuse_unlike(empty, slots(whole), student_dir)


def test_a_tied_head_is_told_from_one_of_its_own(student_dir: str) -> None:
    model = load_student(student_dir, torch.device("cpu"), False)
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = slots(model)
    (head,) = [one for one in tied if one.name == "lm_head.weight"]
    assert head.same_as == "model.embed_tokens.weight"
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(32, 16))
    with pytest.raises(XtokenError, match=r"\(lm_head.weight of shape \[32, 16\] is in one of them\).*--parallel ddp"):
        refuse_unlike(model, tied, student_dir)


def test_what_cannot_be_outlined_is_loaded_whole(
    student_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No config, more than a config, or a tensor that nobody would send."""
    assert outline(asked(str(tmp_path)), BYTES, 0) is None
    (tmp_path / FILE).write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "xtoken_expanded_bytes"}')
    assert is_expanded(str(tmp_path))
    assert outline(asked(str(tmp_path)), BYTES, 0) is None
    real = module._built

    def with_a_table(*given: object) -> object:
        model = real(*given)
        model.table = torch.ones(2)
        return model

    monkeypatch.setattr(module, "_built", with_a_table)
    assert outline(asked(student_dir), BYTES, 0) is None
