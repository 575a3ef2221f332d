"""inspect tells what a folder is, in JSON that a person can read."""

import json

import pytest

from xtoken.pipeline.store.inspect import inspect
from xtoken.schemas.errors import VerificationError, XtokenError


def test_a_capture(kept_capture):
    found = inspect(str(kept_capture))
    json.dumps(found)
    assert found["kind"] == "capture"
    assert found["counts"]["documents"] == 3
    assert 0 < found["counts"]["chunks_1_1"] < found["counts"]["chunks"]
    columns = found["bytes_per_token"]
    assert columns["all"] == round(found["file_bytes"] / found["tokens"], 3)
    assert columns["topk_codes"] < sum(size for name, size in columns.items() if name != "all") < columns["all"]
    first = found["samples_shown"][0]
    assert first["sample_id"] == "a.txt:0#0"
    assert "".join(first["first_tokens"]).startswith("The quick brown fox")
    assert 1 <= len(first["row"]["teacher"]) <= 5
    text, logprob = first["row"]["teacher"][0]
    assert isinstance(text, str)
    assert logprob <= 0
    assert found["provenance"]["teacher"]["backend"] == "fake"


def test_folders_without_a_manifest(tmp_path, capture, smollm2_dir):
    (capture / "manifest.json").unlink()
    assert inspect(str(capture))["kind"].startswith("unfinished capture")
    assert inspect(str(capture))["committed_parts"] == len(list((capture / "commits").iterdir()))
    assert inspect(str(smollm2_dir))["kind"] == "Hugging Face model"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert inspect(str(tmp_path)) == {
        "kind": "training run",
        "path": str(tmp_path),
        "records": 2,
        "last": {"step": 2},
    }


def test_what_is_not_ours(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(XtokenError, match="is not a capture"):
            inspect(str(path))


def test_a_missing_part_is_named(capture):
    (capture / "data" / "part-00000.parquet").unlink()
    with pytest.raises(VerificationError, match="part-00000"):
        inspect(str(capture))


def test_a_line_of_metrics_that_is_no_json_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nstep}\n')
    with pytest.raises(XtokenError, match=r"metrics\.jsonl: its last whole line is not JSON; remove that line"):
        inspect(str(tmp_path))
