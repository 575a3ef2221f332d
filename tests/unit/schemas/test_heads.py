"""What a config.json says of a model's head, wherever it lies, and which tokens a head may lack."""

import json
from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.heads import needed_rows, refuse_narrow_head, stated_dtype, stated_rows

ROLES = ["bos", "eos", None, None, "special", "hole", None, "pad", "unk", "special"]
PIECES = [b"", b"", b"a", b"b", b"", b"", b"<think>", b"", b"", b""]


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"vocab_size": 300}, 300),
        ({"text_config": {"vocab_size": 500}}, 500),
        ({"vocab_size": 300, "text_config": {"vocab_size": 500}}, 500),
        ({"vocab_size": 300, "text_config": {}}, 300),
        ({"llm_config": {"vocab_size": 7}, "vision_config": {"vocab_size": 9}}, 7),
        ({"vocab_size": "many"}, None),
        ({}, None),
        ([], None),
    ],
)
def test_rows_of_a_folder_and_of_files_in_it(tmp_path: Path, fields: Any, rows: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer.json").touch()
    for source in (tmp_path, tmp_path / "config.json", tmp_path / "tokenizer.json"):
        assert stated_rows(str(source)) == rows


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"text_config": {"torch_dtype": "bfloat16"}, "vision_config": {"dtype": "float16"}}, "bfloat16"),
        ({"dtype": None, "text_config": None}, None),
        ({}, None),
        ([], None),
    ],
)
def test_dtype_of_a_folder_and_of_a_file(tmp_path: Path, fields: Any, dtype: str | None) -> None:
    for name in ("config.json", "other.json"):
        (tmp_path / name).write_text(json.dumps(fields))
    for source in (tmp_path, tmp_path / "config.json", tmp_path / "other.json"):
        assert stated_dtype(str(source)) == dtype
    assert stated_dtype("nobody/no-such-model") is None


def test_nothing_is_known_where_there_is_no_config(tmp_path: Path) -> None:
    assert stated_rows(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{")
    assert stated_rows(str(tmp_path)) is None
    for source in ("bytes", "nobody/no-such-model", "a//b", "s3://team/model", ""):
        assert stated_rows(source) is None


def test_rows_of_a_hub_id_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, repo = "c" * 40, tmp_path / "models--acme--m"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text('{"vocab_size": 77}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert stated_rows("acme/m") == stated_rows("acme/m", commit) == 77
    assert stated_rows("acme/m", "v2") is None


def test_only_tokens_of_text_must_be_predicted() -> None:
    assert needed_rows(ROLES) == 7
    assert needed_rows(["special", "hole"]) == 0
    for rows in (None, 7, 400):
        refuse_narrow_head("acme/m", rows, ROLES, PIECES)
    with pytest.raises(XtokenError) as error:
        refuse_narrow_head("acme/m", 3, ROLES, PIECES)
    assert str(error.value).startswith(
        "acme/m predicts 3 tokens, but its tokenizer's ids go up to 6: 2 tokens of text lie beyond "
        "(the first is 'b', 3)"
    )
    with pytest.raises(XtokenError, match=r"the first is 'eos', 1"):
        refuse_narrow_head("acme/m", 1, ROLES, PIECES)
