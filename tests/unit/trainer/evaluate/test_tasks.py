"""What --tasks refuses before lm-eval does any work."""

import sys
from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.evaluate import evaluate


def test_lm_eval_is_not_installed(student_dir: str, student_info: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xtoken.trainer.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    config = EvalConfig(model=student_dir, tasks=["arc_easy"], device="cpu")
    with pytest.raises(XtokenError, match=r"pip install 'xtoken\[tasks\]'"):
        evaluate(config, student_info, [], Silent())


def test_a_task_path_is_a_folder(student_dir: str, student_info: Any, tmp_path: Path) -> None:
    config = EvalConfig(model=student_dir, tasks=["mine"], task_path=str(tmp_path / "none"), device="cpu")
    with pytest.raises(XtokenError, match="is not a folder"):
        evaluate(config, student_info, [], Silent())


def test_an_empty_text_is_named_beside_tasks(student_dir: str, student_info: Any) -> None:
    config = EvalConfig(model=student_dir, text="empty.jsonl", tasks=["arc_easy"], device="cpu")
    with pytest.raises(XtokenError, match=r"empty\.jsonl holds no tokens"):
        evaluate(config, student_info, [], Silent())


def test_a_tokenizer_without_a_chat_template(smollm2_dir: Path, student_info: Any, tmp_path: Path) -> None:
    """Before any task is loaded."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'xtoken[tasks]'")
    (tmp_path / "tokenizer.json").write_bytes((smollm2_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    config = EvalConfig(model=str(tmp_path), tasks=["none"], apply_chat_template=True, device="cpu")
    with pytest.raises(XtokenError, match=r"has no chat template; put one beside it as chat_template\.jinja"):
        evaluate(config, student_info, [], Silent())


def test_the_chat_template_is_of_tasks() -> None:
    with pytest.raises(ValueError, match="--apply-chat-template goes with --tasks; name the tasks"):
        EvalConfig(model="m", text="t", apply_chat_template=True)
