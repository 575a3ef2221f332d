"""The folders that several captures of one align get, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from xtoken.pipeline.align.multi_capture import each_below
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import XtokenError


def config(tmp_path: Path, *captures: str, **more: Any) -> AlignConfig:
    return AlignConfig(captures=list(captures), student="bytes", out=str(tmp_path / "t"), **more)


def test_folders_are_named_like_their_captures(tmp_path: Path) -> None:
    found = each_below(config(tmp_path, "s3://bucket/gemma.capture", "captures/My smol/"))
    assert [(one.captures, one.out) for one in found] == [
        (["s3://bucket/gemma.capture"], f"{tmp_path}/t/gemma.capture"),
        (["captures/My smol/"], f"{tmp_path}/t/My-smol"),
    ]
    with pytest.raises(XtokenError, match="a/capture and b/Capture would both go to the folder Capture of "):
        each_below(config(tmp_path, "a/capture", "b/Capture"))
    with pytest.raises(XtokenError, match="--w w is of one teacher, and 2 captures are named; leave --w out"):
        each_below(config(tmp_path, "a", "b", w="w"))
    with pytest.raises(XtokenError, match="63 captures are more than the 62"):
        each_below(config(tmp_path, *map(str, range(63))))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "align.json").write_text("{}")
    with pytest.raises(XtokenError, match="holds the targets of one capture"):
        each_below(config(tmp_path, "a", "b"))
