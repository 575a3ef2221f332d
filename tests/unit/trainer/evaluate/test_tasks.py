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
