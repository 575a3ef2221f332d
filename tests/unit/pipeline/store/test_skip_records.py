"""Counting skip records of an untrusted folder."""

import json
from pathlib import Path

import pytest

from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.skip_records import BAD_FILE, count_reasons, write_records
from xtoken.schemas.errors import VerificationError


def test_reasons_are_counted_over_blocks_of_any_size(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_records(folder, BAD_FILE, ({"reason": "ab"[n % 3 == 0], "detail": "x" * 200} for n in range(30_000)))
    assert (tmp_path / BAD_FILE).stat().st_size > 6e6
    assert count_reasons(folder, BAD_FILE) == {"a": 20_000, "b": 10_000}
    assert count_reasons(folder, "none.jsonl") == {}


def test_a_line_without_an_end_is_refused(tmp_path: Path) -> None:
    """It could be longer than memory."""
    (tmp_path / BAD_FILE).write_text(json.dumps({"reason": "a" * (8 << 20)}))
    with pytest.raises(VerificationError, match=r"bad\.jsonl, line 1: expected a JSON object"):
        count_reasons(Folder(str(tmp_path)), BAD_FILE)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text('{"reason": "secret"}\n')
    (tmp_path / BAD_FILE).symlink_to("other")
    with pytest.raises(VerificationError, match="is a symbolic link"):
        count_reasons(Folder(str(tmp_path)), BAD_FILE)
