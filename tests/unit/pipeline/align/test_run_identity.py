"""Whose run a folder of targets is."""

import json
from pathlib import Path

import pytest

from xtoken.pipeline.align.run_identity import RUN_FILE, claim
from xtoken.schemas.errors import VerificationError, XtokenError

NOW = {"student": "s", "for": ["p-kl"]}


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    root = tmp_path / "t"
    claim(str(root), NOW)
    claim(str(root), NOW)
    assert json.loads((root / RUN_FILE).read_text()) == NOW
    with pytest.raises(XtokenError, match=r"belongs to another align run \(for: p-kl there, uld now\)"):
        claim(str(root), NOW | {"for": ["uld"]})


@pytest.mark.parametrize("text", ["", "{", "[]", '""', "null", "{}", "[" * 100_000])
def test_a_damaged_record_names_the_least_costly_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(VerificationError, match=r"align\.json is damaged.*; remove it and run the same command again"):
        claim(str(tmp_path), NOW)
    (tmp_path / "data").mkdir()
    with pytest.raises(VerificationError, match=r"align\.json is damaged.*; put a copy of it there"):
        claim(str(tmp_path), NOW)
