"""Whose run a folder of targets is."""

import json
from pathlib import Path

import pytest

from xtoken.pipeline.align.run_identity import RUN_FILE, claim
from xtoken.schemas.errors import VerificationError, XtokenError

NOW = {"student": "s", "for": ["p-kl"]}


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    root = tmp_path / "t"
    now = NOW | {"stops": [151645, 2, None]}
    claim(str(root), now)
    claim(str(root), now)
    assert json.loads((root / RUN_FILE).read_text()) == now
    with pytest.raises(XtokenError, match=r"belongs to another align run \(for: p-kl there, uld now\)"):
        claim(str(root), now | {"for": ["uld"]})
    with pytest.raises(
        XtokenError, match=r"\(the student's stop token: 151645 there, none now; the teacher's stop token: 2 "
    ):
        claim(str(root), NOW | {"stops": None})
    with pytest.raises(
        XtokenError, match=r"\(the teacher's stop token: 2 there, 7 now; the teacher's eos: none there, 0 now\)"
    ):
        claim(str(root), NOW | {"stops": [151645, 7, 0]})


@pytest.mark.parametrize("text", ["", "{", "[]", '""', "null", "{}", "[" * 100_000])
def test_a_damaged_record_names_the_least_costly_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(VerificationError, match=r"align\.json is damaged.*; remove it and run the same command again"):
        claim(str(tmp_path), NOW)
    (tmp_path / "data").mkdir()
    with pytest.raises(VerificationError, match=r"align\.json is damaged.*; put a copy of it there"):
        claim(str(tmp_path), NOW)
