"""Targets on disk and as readers see them: nothing is lost on the way but what rounding takes."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from xtoken.schemas.errors import VerificationError
from xtoken.schemas.losses import LOSSES, gap_columns
from xtoken.schemas.tables import LEAN_TARGETS, target_columns, targets
from xtoken.schemas.target_form import TargetForm, TokenCodes, needs_codes

U, V, STEP = 40, 30, 1 / 32
rng = np.random.default_rng(1)
CODES = TokenCodes(rng.permutation(U).astype(np.int32), rng.permutation(V).astype(np.int32))
NEW = LEAN_TARGETS


def sample(name: str) -> dict[str, Any]:
    """A sample of 5 tokens and 3 chunks with entries that fall."""
    row: dict[str, Any] = {"sample_id": name}
    lengths = {"token": 5, "chunk": 3}
    counted = {axis for _, axis in target_columns(LOSSES)}
    for column, axis in target_columns(LOSSES)[1:]:
        if axis == "sample":
            row[column] = 0.5
        elif column in counted:
            row[column] = [2, 0, 3, 1, 2][: lengths[axis]]
            lengths[column] = sum(row[column])
        elif column.endswith("logprob"):
            row[column] = np.sort(-rng.uniform(0.1, 9, lengths[axis])).astype(np.float32)[::-1]
        else:
            row[column] = rng.integers(0, V, lengths[axis]).tolist()
    for gaps in gap_columns(LOSSES):
        stops = np.cumsum(row[gaps.count])
        parts = [np.log(rng.dirichlet(np.ones(size + 1))) for size in row[gaps.count]]
        parts = [np.append(np.sort(part[:-1])[::-1], part[-1]) for part in parts]
        row[gaps.logprob] = np.concatenate([part[:-1] for part in parts]).astype(np.float32)
        assert len(row[gaps.logprob]) == stops[-1]
        if gaps.tail:
            row[gaps.tail] = np.array([part[-1] for part in parts], np.float32)
    return row


@pytest.fixture
def batch() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([sample("a"), sample("b"), sample("c")], targets(LOSSES))


def test_older_versions_are_as_they_are_read(batch: pa.RecordBatch) -> None:
    form = TargetForm(list(LOSSES), LEAN_TARGETS - 1)
    assert form.schema.equals(targets(LOSSES), check_metadata=True)
    assert form.stored_batch(batch).equals(batch)
    assert form.read_batch(batch).equals(batch)
    assert form.otherwise == []
    assert not needs_codes(LOSSES, LEAN_TARGETS - 1)


def test_all_that_is_not_rounded_comes_back(batch: pa.RecordBatch) -> None:
    form = TargetForm(list(LOSSES), NEW, STEP, CODES)
    stored = form.stored_batch(batch)
    assert stored.schema.equals(targets(LOSSES, NEW), check_metadata=True)
    found = form.read_batch(stored)
    assert found.schema.equals(targets(LOSSES), check_metadata=True)
    rounded = {name for gaps in gap_columns(LOSSES) for name in (gaps.logprob, gaps.tail) if name}
    assert rounded == {
        *("pkl_logprob", "pkl_rest_logprob", "skl_logprob", "skl_rest_logprob", "mined_logprob", "mined_rest_logprob"),
        *("prefix_logprob", "prefix_rest_logprob", "strict_logprob"),
    }
    for name in batch.schema.names:
        if name not in rounded:
            assert found[name].equals(batch[name]), name
            continue
        assert found[name].offsets.equals(batch[name].offsets)
        ours, theirs = (one[name].flatten().to_numpy() for one in (found, batch))
        np.testing.assert_allclose(ours[np.isfinite(ours)], theirs[np.isfinite(ours)], atol=STEP + 1e-5, rtol=0)


def test_a_slice_is_stored_and_read_as_a_whole_batch_is(batch: pa.RecordBatch) -> None:
    form = TargetForm(list(LOSSES), NEW, STEP, CODES)
    stored = form.stored_batch(batch)
    assert form.stored_batch(batch.slice(1, 1)).to_pylist() == stored.slice(1, 1).to_pylist()
    assert form.read_batch(stored.slice(1)).to_pylist() == form.read_batch(stored).slice(1).to_pylist()


def test_what_was_read_is_stored_as_it_was(batch: pa.RecordBatch) -> None:
    """Rounding once is rounding for good, up to a first entry that lies half-way."""
    form = TargetForm(list(LOSSES), NEW, STEP, CODES)
    once = form.read_batch(form.stored_batch(batch))
    twice = form.read_batch(form.stored_batch(once))
    for name in once.schema.names:
        if "logprob" in name:
            ours, theirs = (one[name].flatten().to_numpy() for one in (once, twice))
            atol = STEP if name == "strict_logprob" else 1e-5
            np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["pkl_logprob", "pkl_rest_logprob", "strict_logprob", "hkl_common_ids", "pkl_ids"])
def test_a_column_is_read_alone_from_those_it_needs(batch: pa.RecordBatch, name: str) -> None:
    form = TargetForm(list(LOSSES), NEW, STEP, CODES)
    stored = form.stored_batch(batch)
    lists = {
        column: (stored[column].offsets.to_numpy(), stored[column].flatten().to_numpy())
        for column in form.stored([name])
    }
    assert len(lists) == {"pkl_logprob": 3, "pkl_rest_logprob": 3, "strict_logprob": 2}.get(name, 1)
    (found,) = form.read(lists, [name]).values()
    np.testing.assert_array_equal(found[1], form.read_batch(stored)[name].flatten().to_numpy())


def test_counts_that_do_not_sum_to_the_entries_are_refused(batch: pa.RecordBatch) -> None:
    form = TargetForm(["p-kl"], NEW, STEP, CODES)
    stored = form.stored_batch(batch.select(targets(["p-kl"]).names))
    at = stored.schema.get_field_index("pkl_count")
    for counts in ([2, 0, 2], [2, -1, 4], [2, 0]):
        broken = pa.array([counts] * 3, stored.schema.field(at).type)
        with pytest.raises(VerificationError, match="pkl_count does not sum to the entries of pkl_gap"):
            form.read_batch(stored.set_column(at, stored.schema.field(at), broken))


@pytest.mark.parametrize("code", [-1, U, 2**31 - 1])
def test_a_code_outside_the_vocabulary_is_refused(batch: pa.RecordBatch, code: int) -> None:
    form = TargetForm(["p-kl"], NEW, STEP, CODES)
    stored = form.stored_batch(batch.select(targets(["p-kl"]).names))
    at = stored.schema.get_field_index("pkl_codes")
    broken = pa.array([[code] * 5] * 3, stored.schema.field(at).type)
    with pytest.raises(VerificationError, match=f"pkl_codes has a code outside 0 to {U - 1}"):
        form.read_batch(stored.set_column(at, stored.schema.field(at), broken))


def test_entries_that_rise_are_a_defect_named_with_their_sample(batch: pa.RecordBatch) -> None:
    form = TargetForm(["p-kl"], NEW, STEP, CODES)
    plain = batch.select(targets(["p-kl"]).names)
    at = plain.schema.get_field_index("pkl_logprob")
    values = [values if row != 1 else values[::-1] for row, values in enumerate(plain["pkl_logprob"].to_pylist())]
    with pytest.raises(VerificationError, match="sample 'b': entries of pkl_logprob do not fall"):
        form.stored_batch(plain.set_column(at, plain.schema.field(at), pa.array(values, plain.schema.field(at).type)))


def test_codes_come_back_from_their_table() -> None:
    found = TokenCodes.of(CODES.table(), U, V)
    np.testing.assert_array_equal(found.teacher, CODES.teacher)
    np.testing.assert_array_equal(found.student, CODES.student)
    assert CODES.table()["student_id"].null_count == U - V


def test_other_tables_are_no_codes() -> None:
    table = CODES.table()
    ids = table["teacher_id"].to_pylist()
    hole = [*table["student_id"].to_pylist()[1:], None]
    for broken, why in (
        (table.drop_columns(["code"]), "has columns"),
        (table.slice(1), "does not hold each token once"),
        (table.set_column(1, table.schema.field(1), pa.array([ids[1], *ids[1:]], pa.int32())), "each token once"),
        (table.set_column(2, table.schema.field(2), pa.array([None, *hole[:-1]], pa.int32())), "each token once"),
    ):
        with pytest.raises(VerificationError, match=why):
            TokenCodes.of(broken, U, V)


@pytest.mark.parametrize(
    ("losses", "wanted"), [(["alm"], False), (["uld", "ce"], False), (["gold"], True), (["p-kl", "alm"], True)]
)
def test_only_tables_of_tokens_have_codes(losses: list[str], wanted: bool) -> None:
    assert needs_codes(losses, NEW) == wanted
