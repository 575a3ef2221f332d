"""Captures as arrays: every version, codec and kind that was ever written."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken import VerificationError, XtokenError, open_capture
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.spans import row_of_token

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "captures"
CAPTURES = sorted(
    path.name for path in GOLDEN.iterdir() if (path / "manifest.json").exists() and "targets" not in path.name
)


def test_there_are_captures_to_read() -> None:
    assert len(CAPTURES) > 5


@pytest.mark.parametrize("name", CAPTURES)
def test_a_sample_is_what_its_own_row_of_the_table_says(name: str) -> None:
    root = str(GOLDEN / name)
    capture, codec = open_capture(root), open_codec(read_manifest(root, CaptureManifest).codec)
    alone = [batch.slice(at, 1) for batch in iter_capture(root) for at in range(batch.num_rows)]
    samples = list(capture)
    assert len(samples) == len(capture) == len(alone) > 0
    for sample, row in zip(samples, alone, strict=True):
        values = {key: column[0] for key, column in row.to_pydict().items()}
        assert (sample.sample_id, sample.text) == (values["sample_id"], values["text"])
        assert sample.token_ids.tolist() == values["teacher_ids"]
        assert sample.token_end.tolist() == values["teacher_end"]
        assert sample.row_of_token.tolist() == row_of_token(row).tolist()
        np.testing.assert_array_equal(sample.label_logprob, np.array(values["realised_logprob"], np.float32))
        if values["space_logprob"] is None:
            assert sample.space_logprob is None
        else:
            np.testing.assert_array_equal(sample.space_logprob, np.array(values["space_logprob"], np.float32))
        assert len(sample.offsets) == len(sample.label_logprob) + 1 == len(sample.tail_logprob) + 1
        if "rows" not in name and not any("topk" in one or "draw" in one for one in capture.manifest["left_out"]):
            rows = codec.decode(row)
            np.testing.assert_array_equal(sample.offsets, rows.offsets)
            np.testing.assert_array_equal(sample.entry_ids, rows.ids)
            np.testing.assert_array_equal(sample.entry_logprob, rows.logprob)
            np.testing.assert_array_equal(sample.tail_logprob, rows.tail_logprob)
            ids, logprob, tail = sample.row(len(sample.offsets) - 2)
            np.testing.assert_array_equal(ids, rows.ids[rows.offsets[-2] :])
            assert (logprob[0], tail) == (rows.logprob[rows.offsets[-2]], rows.tail_logprob[-1])
        assert bool(sample.spans) == ("span_kind" in values)
        if sample.spans:
            assert [span.kind for span in sample.spans] == values["span_kind"]
            assert sample.spans[-1].token_end == len(sample.token_ids)
            taught = sum(span.token_end - span.token_start for span in sample.spans if span.learn)
            assert 0 < taught - len(sample.label_logprob) + 1 <= 1 + (sample.row_of_token[0] < 0)


def test_parts_and_frames() -> None:
    root = str(GOLDEN / "v4-topk")
    capture = open_capture(root + "/")
    ids = [sample.sample_id for sample in capture]
    assert [one.sample_id for number in capture.parts for one in capture.part(number)] == ids
    frame = capture.to_pandas(["sample_id", "topk_ids"])
    assert frame["sample_id"].tolist() == ids
    assert len(frame["topk_ids"][0]) == len(capture.part(capture.parts[0])[0].entry_ids)
    assert capture.manifest["kind"] == "capture"
    with pytest.raises(XtokenError, match="no column 'topk'; it has sample_id, text"):
        capture.to_pandas(["topk"])
    with pytest.raises(XtokenError, match="no part 99; its parts are"):
        capture.part(99)


def test_what_is_no_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match="not a finished artifact"):
        open_capture(str(tmp_path))


def test_rows_that_break_a_rule_are_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "v4-topk", tmp_path / "capture")
    part = next((tmp_path / "capture" / "data").glob("*.parquet"))
    table = pq.read_table(part)
    ends = [[one + 1 for one in row] for row in table["teacher_end"].to_pylist()]
    at = table.schema.get_field_index("teacher_end")
    field = table.schema.field(at)
    pq.write_table(table.set_column(at, field, pa.array(ends, field.type)), part)
    with pytest.raises(VerificationError, match="teacher_end"):
        list(open_capture(str(tmp_path / "capture")))
