"""What is kept of rows: any entries in, distributions out; and files that ask for too much."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.pipeline.imports.sets import SIZE, config_of, write_set
from xtoken.pipeline.imports.parquet_rows import ParquetRows, list_files
from xtoken.pipeline.imports.rows import clean, packed
from xtoken.pipeline.imports.run import import_dataset
from xtoken.pipeline.imports.samples import ImportedSample
from xtoken.pipeline.store.codecs.topk import NO_TAIL, TAIL_UNKNOWN, decode
from xtoken.schemas.codecs import TopK
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.ui.progress import Silent

STEP = 1 / 32
VALID = np.arange(50) % 7 != 3  # holes among 50 ids

Entry = st.tuples(
    st.one_of(st.integers(-3, 60), st.integers(-(2**31), 2**31 - 1)),
    st.one_of(st.floats(-30, 0), st.sampled_from([-np.inf, np.nan, np.inf, -9999.0, 0.0, 1e-7])),
)


def sample(rows: list[list[tuple[int, float]]], ids: list[int]) -> ImportedSample:
    flat = [entry for row in rows for entry in row]
    return ImportedSample(
        name="x",
        ids=np.array(ids, np.int32),
        first_row=1,
        offsets=np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int64),
        entry_ids=np.array([token for token, _ in flat], np.int32),
        entry_logprob=np.array([value for _, value in flat], np.float64),
        label_logprob=np.full(len(rows), np.nan),
        complete=False,
    )


@given(st.lists(st.lists(Entry, max_size=12), min_size=1, max_size=6), st.integers(1, 8), st.booleans(), st.data())
def test_any_entries_become_distributions(
    rows: list[list[tuple[int, float]]], k: int, known: bool, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, 49), min_size=len(rows) + 1, max_size=len(rows) + 1))
    found = clean(sample(rows, ids), VALID)
    kept, labels = packed(found, TopK(k=k, min_p=0.0), STEP, rest_known=known)
    back = decode(kept.kept, kept.topk_ids, kept.topk_gap, kept.rest_gap, STEP)
    for row, given_row in enumerate(rows):
        here = slice(int(back.offsets[row]), int(back.offsets[row + 1]))
        best: dict[int, float] = {}
        for token, value in given_row:
            if np.isfinite(value) and value > -1000 and 0 <= token < len(VALID) and VALID[token]:
                best[token] = max(best.get(token, -np.inf), value)
        order = sorted(best, key=lambda token: (-best[token], token))[:k]
        assert back.ids[here].tolist() == order
        assert (np.diff(back.logprob[here]) <= 0).all()
        mass = np.exp([best[token] for token in order]).sum()
        total = np.exp(back.logprob[here]).sum()
        if not order:
            assert kept.rest_gap[row] == 0, "all of it is tail"
        elif known:
            assert total + np.exp(back.tail_logprob[row]) == pytest.approx(1, abs=0.02)
            if abs(mass - 1) > 1e-9:
                assert (kept.rest_gap[row] == NO_TAIL) == (mass > 1)
        else:
            assert kept.rest_gap[row] == TAIL_UNKNOWN
            assert total == pytest.approx(1, abs=0.02)
        label = best.get(ids[row + 1])
        assert np.isnan(labels[row]) == (label is None or not known)
        assert not labels[row] > 0
    assert found.counts["labels_unknown"] == int(np.isnan(labels).sum())


def test_a_label_that_the_source_knows_stays() -> None:
    one = sample([[(1, -0.5), (2, -1.5)], [(1, -0.5)]], [1, 40, 1])
    said = ImportedSample(**{**vars(one), "label_logprob": np.array([-7.0, np.nan]), "label_rank": np.array([40, 0])})
    found = clean(said, VALID)
    assert found.label_logprob.tolist() == [-7.0, -0.5]
    assert found.label_rank.tolist() == [40, 1]


def test_a_sum_above_one_is_made_one_and_counted() -> None:
    found = clean(sample([[(1, np.log(0.7)), (2, np.log(0.31))]], [0, 2]), VALID)
    kept, labels = packed(found, TopK(k=8, min_p=0.0), STEP, rest_known=True)
    assert kept.rest_gap.tolist() == [NO_TAIL]
    assert labels[0] == pytest.approx(np.log(0.31 / 1.01), abs=1e-6)
    assert found.counts["rows_above_one"] == 1


@pytest.mark.thorough
def test_a_row_that_unpacks_to_gigabytes_is_refused_before_it_is(tmp_path: Path) -> None:
    """A few kilobytes that say a hundred million zeros."""
    folder = write_set(tmp_path / "set", count=1)
    zeros = pa.array(np.zeros(140_000_000, np.uint8))
    inner = pa.ListArray.from_arrays(pa.array([0, len(zeros)], pa.int32()), zeros)
    bomb = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), inner)
    table = pq.read_table(folder / "rows.parquet")
    at = table.schema.get_field_index("compressed_logprobs")
    pq.write_table(table.set_column(at, "compressed_logprobs", bomb), folder / "rows.parquet")
    assert (folder / "rows.parquet").stat().st_size < 1 << 20
    with pytest.raises(VerificationError, match=r"to 140000000 values; it was damaged or made to harm"):
        import_dataset(config_of(folder, tmp_path / "out"), Silent())


def test_files_are_named_once(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "a", count=1), write_set(tmp_path / "b", count=1)
    with pytest.raises(XtokenError, match=r"two files are named 'rows.parquet'"):
        list_files([str(one), str(two)], (".parquet",))
    found = list_files([str(tmp_path)], (".parquet",))
    assert [file.name for file in found] == ["a/rows.parquet", "b/rows.parquet"]
    with pytest.raises(XtokenError, match=r"holds no file that ends in .jsonl"):
        list_files([str(tmp_path)], (".jsonl",))
    with pytest.raises(XtokenError, match=r"does not exist"):
        list_files([str(tmp_path / "nowhere")], (".parquet",))


def test_slices_are_read_from_anywhere(tmp_path: Path) -> None:
    """Forward, again from the front, and over the borders of row groups; each row once."""
    folder = write_set(tmp_path / "set", count=7, group=3)
    files = list_files([str(folder)], (".parquet",))
    rows = ParquetRows(files, ("input_ids",), ("input_ids",))
    whole = pq.read_table(folder / "rows.parquet")["input_ids"].to_pylist()
    slices = rows.slices(1)
    assert [(one.start, one.stop) for one in slices] == [(at, at + 1) for at in range(7)]
    for order in (range(7), (5, 2, 6, 0, 1)):
        for at in order:
            ((first, batch),) = list(rows.read(slices[at]))
            assert first == at
            assert batch["input_ids"].to_pylist() == [whole[at]]
    (all_of_it,) = rows.slices(1 << 30)
    found = [row for _, batch in rows.read(all_of_it) for row in batch["input_ids"].to_pylist()]
    assert found == whole
    assert SIZE == 400
