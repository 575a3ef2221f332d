"""Row groups checked and cut as a whole: the same as row by row, and what is wrong is named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.rows import NORMALISED_WITHIN
from xtoken.trainer.data.samples import Sample, read_sample, read_samples
from xtoken.trainer.data.targets import RowGroup, Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss, LossSetup

TEACHING = [name for name in LOSSES if name != "ce"]


def opened(targets: Targets, name: str, **options: Any) -> Loss:
    size = targets.manifest.student.size
    setup = LossSetup(
        targets.w,
        targets.vocab,
        size,
        targets.manifest.teacher_tokenizer.size,
        torch.device("cpu"),
        LossOptions(**options),
    )
    return open_loss(name, setup)


def columns_of(sample: Sample) -> dict[str, Any]:
    (targets,) = sample.targets
    assert targets is not None
    spans = {name: getattr(targets, name) for name in ("first_C", "length_C", "next_C")}
    return {"sequence": sample.sequence, **spans, **targets.columns}


@pytest.mark.parametrize("context", [0, None])
@pytest.mark.parametrize("max_tokens", [4, 5, 64])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in TEACHING), ("alm", {"debias": ["merge"]})])
def test_a_row_group_is_its_rows(
    make_targets: Callable[..., str], name: str, options: dict[str, Any], max_tokens: int, context: int | None
) -> None:
    targets = Targets(make_targets([[7, 1], [12, 3], [2, 9]], losses=tuple(LOSSES)))
    loss = opened(targets, name, **options)
    layout = Layout(context, max_tokens, 24, (loss,))
    compared = 0
    for ref in targets.groups:
        group = targets.read(ref, layout.columns(0))
        together = read_samples([[(group, row)] for row in range(ref.rows)], layout)
        for row, sample in enumerate(together):
            alone = read_sample([(group, row)], layout)
            assert (sample.sample_id, sample.weights, sample.cut) == (alone.sample_id, alone.weights, alone.cut)
            for column, expected in columns_of(alone).items():
                np.testing.assert_array_equal(columns_of(sample)[column], expected, err_msg=column)
            compared += len(columns_of(alone)["first_C"])
    assert compared > 0


LAYOUT_TOKENS = 64


def group_of(make_targets: Callable[..., str], name: str = "p-kl") -> tuple[RowGroup, Layout]:
    targets = Targets(make_targets([[7, 8]], losses=(name,)))
    layout = Layout(0, LAYOUT_TOKENS, 24, (opened(targets, name),))
    return targets.read(targets.groups[0], layout.columns(0)), layout


def changed(group: RowGroup, name: str, change: Callable[[Any, Any], Any]) -> RowGroup:
    """``change(values of the second row, all values)`` in a copy of column ``name``."""
    offsets, values = group.lists[name]
    values = values.copy()
    change(values[offsets[1] : offsets[2]], values)
    return RowGroup(group.ref, group.sample_ids, {**group.lists, name: (offsets, values)})


def put(at: int, value: float) -> Callable[[Any, Any], None]:
    return lambda row, _: row.__setitem__(at, value)


WRONG = {
    "an id beyond the vocabulary": ("student_ids", put(2, 24)),
    "an id below 0": ("student_ids", put(0, -1)),
    "a chunk that ends before it starts": ("chunk_student_end", put(2, 0)),
    "a chunk that ends behind its sample": ("chunk_student_end", put(-1, 9)),
    "a first chunk that ends before its sample": ("chunk_student_end", put(0, -1)),
    "a count below 0": ("pkl_count", put(1, -6)),
    "a count too many": ("pkl_count", put(1, 7)),
    "entries that are no number": ("pkl_logprob", put(0, np.nan)),
    "entries beyond every number": ("pkl_logprob", put(0, 1e30)),
    "more than there is": ("pkl_logprob", put(0, 0.5)),
    "less than there is": ("pkl_rest_logprob", put(0, -np.inf)),
    "a REST beyond every number": ("pkl_rest_logprob", put(0, np.inf)),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_sample_at_fault_is_named(make_targets: Callable[..., str], what: str) -> None:
    group, layout = group_of(make_targets)
    assert len(read_samples([[(group, 0)], [(group, 1)]], layout)) == 2
    wrong = changed(group, *WRONG[what])
    message = r"sample 'doc0#1' in part 0 of the targets contradicts itself; run 'xtoken verify'"
    with pytest.raises(VerificationError, match=message):
        read_samples([[(wrong, 0)], [(wrong, 1)]], layout)
    assert read_sample([(wrong, 0)], layout).sample_id == "doc0#0", "alone, the other is right"


def test_counts_that_cancel_are_refused(make_targets: Callable[..., str]) -> None:
    """One below 0 and one above it leave the sums of their rows as they were."""
    group, layout = group_of(make_targets)
    wrong = changed(group, "pkl_count", lambda row, _: (row.__setitem__(0, -6), row.__setitem__(1, 18)))
    with pytest.raises(VerificationError, match="'doc0#1'"):
        read_samples([[(wrong, 1)]], layout)


@pytest.mark.parametrize("name", ["pkl_count", "pkl_ids", "pkl_logprob", "pkl_rest_logprob"])
def test_a_value_moved_to_the_next_row_is_refused(make_targets: Callable[..., str], name: str) -> None:
    """The column is as long as before, its rows are not."""
    group, layout = group_of(make_targets)
    offsets, values = group.lists[name]
    moved = RowGroup(group.ref, group.sample_ids, {**group.lists, name: (offsets + np.int32([0, 1, 0]), values)})
    with pytest.raises(VerificationError, match="'doc0#0'"):
        read_samples([[(moved, 0)]], layout)


@pytest.mark.parametrize(("off", "refused"), [(0.5, False), (2.0, True)])
def test_how_far_sums_may_be_off(make_targets: Callable[..., str], off: float, refused: bool) -> None:
    group, layout = group_of(make_targets)
    shift = np.log1p(off * NORMALISED_WITHIN)
    longer = changed(group, "pkl_logprob", lambda row, _: row.__iadd__(np.float32(shift)))
    longer = changed(longer, "pkl_rest_logprob", lambda row, _: row.__iadd__(np.float32(shift)))
    if refused:
        with pytest.raises(VerificationError, match="contradicts itself"):
            read_samples([[(longer, 1)]], layout)
    else:
        assert len(read_samples([[(longer, 1)]], layout)) == 1


def test_entries_of_an_empty_chunk_in_the_middle_are_left_out(make_targets: Callable[..., str]) -> None:
    """A chunk without student tokens is not valid, so its entries go, and those around it stay."""
    group, layout = group_of(make_targets)
    emptied = changed(group, "chunk_student_end", lambda row, _: row.__setitem__(2, row[1]))
    sample = columns_of(read_samples([[(emptied, 0)], [(emptied, 1)]], layout)[1])
    counts = group.values("pkl_count", 1)
    assert counts[2] > 0
    starts = np.cumsum(counts) - counts
    ids = group.values("pkl_ids", 1)
    expected = np.concatenate([ids[: starts[2]], ids[starts[3] :]])
    np.testing.assert_array_equal(sample["pkl_ids"], expected)
    np.testing.assert_array_equal(sample["pkl_count"], [counts[0], counts[1], *counts[3:-1]])


def test_nothing_is_copied_where_all_chunks_are_valid(make_targets: Callable[..., str]) -> None:
    group, layout = group_of(make_targets)
    for sample in read_samples([[(group, 0)], [(group, 1)]], layout):
        assert np.shares_memory(columns_of(sample)["pkl_ids"], group.lists["pkl_ids"][1])
