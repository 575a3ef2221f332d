"""Targets of conversations: taught tokens alone are predicted, and nothing reaches over a gap."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import Micro, split_micros
from xtoken.trainer.data.samples import Sample, read_sample, read_samples
from xtoken.trainer.data.sources import Sources, refuse_unlike
from xtoken.trainer.data.targets import GroupRef, RowGroup, Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss, LossSetup, View
from xtoken.trainer.ragged import Columns

TEACHING = [name for name in LOSSES if name != "ce"]
STEP = 1 / 64
CASES = [*((name, {}) for name in TEACHING), ("alm", {"debias": ["merge", "outcome"], "alm_threshold": 0.3})]


class Reads(Loss):
    """Reads every column of a loss, and takes every chunk."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns  # type: ignore[misc]

    def valid(self, start_C: Any, arrays: Any) -> Any:  # noqa: ARG002
        return np.ones(len(start_C), np.bool_)

    def terms(self, view: View) -> Any:
        raise NotImplementedError


def opened(targets: Targets, name: str, **options: Any) -> Loss:
    sizes = targets.manifest.student.size, targets.manifest.teacher_tokenizer.size
    return open_loss(name, LossSetup(targets.w, targets.vocab, *sizes, torch.device("cpu"), LossOptions(**options)))


def group_of(ids: list[int], learn: list[bool], ends: list[int], logprob: list[float], **more: list[Any]) -> RowGroup:
    """One sample by hand."""
    values = {
        "student_ids": np.array(ids, np.int32),
        "learn": np.array(learn, np.bool_),
        "chunk_student_end": np.array(ends, np.int32),
        "teacher_logprob": np.array(logprob, np.float32),
        **{name: np.array(value) for name, value in more.items()},
    }
    lists = {name: (np.array([0, len(array)], np.int32), array) for name, array in values.items()}
    return RowGroup(GroupRef(0, 0, 1), ["chat"], lists)


NAN = float("nan")
# a question of two tokens; an answer of four in two chunks and its stop; a question without student tokens; an answer
# of one, one that the teacher's text has not, and the template's last
BY_HAND: dict[str, Any] = {
    "ids": [2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "learn": [False, False, True, True, True, True, True, True, True, False],
    "ends": [2, 3, 6, 7, 7, 8, 10],
    "logprob": [NAN, -1.0, -2.0, -3.0, NAN, -4.0, NAN],
}


def layout(loss: Loss, max_tokens: int = 64) -> Layout:
    return Layout(None, max_tokens, 24, (loss,), chat=True)


def read(group: RowGroup, shape: Layout) -> Sample:
    return read_sample([(group, 0)], shape)


def test_positions_count_taught_tokens() -> None:
    sample = read(group_of(**BY_HAND), layout(Reads(Columns(chunk=("teacher_logprob",)))))
    (targets,) = sample.targets
    assert targets is not None
    assert sample.sequence.tolist() == BY_HAND["ids"], "nothing is put before a conversation"
    assert sample.predicts.tolist() == [False, *[True] * 7, False]
    assert targets.first_C.tolist() == [0, 1, 4, 5]
    assert targets.length_C.tolist() == [1, 3, 1, 1]
    assert targets.next_C.tolist() == [1, 4, 5, 6], "a gap of no student tokens has none that follows"
    assert targets.columns["teacher_logprob"].tolist() == [-1, -2, -3, -4]


def test_the_next_token_is_none_where_it_is_not_taught() -> None:
    learn = [False, True, True, False, True, True]
    group = group_of([2, 3, 4, 5, 6, 7], learn, [1, 2, 3, 4, 5, 6], [NAN, -1.0, -2.0, NAN, -3.0, -4.0])
    (targets,) = read(group, layout(Reads(Columns(chunk=("teacher_logprob",))))).targets
    assert targets is not None
    assert targets.first_C.tolist() == [0, 1, 2, 3]
    assert targets.next_C.tolist() == [1, -1, 3, -1]


def test_token_columns_are_those_of_taught_tokens() -> None:
    counts = [1, 2, 1, 0, 3, 1, 0, 1, 1, 2]
    group = group_of(
        **BY_HAND, prefix_count=counts, prefix_ids=list(range(12)), child_count=counts, child_low=list(range(12))
    )
    spec = Columns(
        (), ("prefix_count", "child_count"), {"prefix_count": ("prefix_ids",), "child_count": ("child_low",)}
    )
    for max_tokens, upto in ((64, 9), (6, 6)):
        (targets,) = read(group, layout(Reads(spec), max_tokens)).targets
        assert targets is not None
        assert targets.columns["prefix_count"].tolist() == counts[2:upto]
        assert targets.columns["prefix_ids"].tolist() == list(range(3, 3 + sum(counts[2:upto])))
        assert targets.columns["child_low"].tolist() == targets.columns["prefix_ids"].tolist()
        assert targets.entry_starts["prefix_count"][-1] == sum(counts[2:upto])


def test_a_micro_batch_holds_taught_positions_and_all_inputs() -> None:
    shape = layout(Reads(Columns(chunk=("teacher_logprob",))))
    samples = [read(group_of(**BY_HAND), shape) for _ in range(2)]
    (micro,) = split_micros(samples, 64, shape.losses, 64)
    assert micro.input_BL.tolist() == [[*BY_HAND["ids"][:-1], *BY_HAND["ids"][:-1]]]
    assert micro.place_P.tolist() == [*range(1, 8), *range(10, 17)]
    assert micro.label_P.tolist() == 2 * BY_HAND["ids"][2:9]
    assert micro.sample_P.tolist() == [0] * 7 + [1] * 7
    assert micro.targets[0].first_C.tolist() == [0, 1, 4, 5, 7, 8, 11, 12]
    assert micro.targets[0].next_C.tolist() == [1, 4, 5, 6, 8, 11, 12, 13]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_gap_is_no_chunk_of_any_loss(
    make_targets: Callable[..., str], chat_info: ChatInfo, name: str, options: dict[str, Any]
) -> None:
    """Even where its columns say otherwise, and mined, which takes every chunk of text."""
    targets = Targets(make_targets([[40, 50]], losses=tuple(LOSSES), step=STEP, chat=chat_info))
    shape = layout(opened(targets, name, **options))
    group = targets.read(targets.groups[0], shape.columns(0))
    gap_C = np.isnan(group.lists["teacher_logprob"][1])
    ends_C = group.lists["chunk_student_end"][1]
    assert gap_C.sum() > 6
    assert (np.diff(ends_C, prepend=0)[gap_C] == 0).any(), "some have no student tokens"
    for row, sample in enumerate(read_samples([[(group, row)] for row in range(2)], shape)):
        (found,) = sample.targets
        assert found is not None
        token_P = np.flatnonzero(sample.predicts) + 1  # of the sample
        in_gap = np.zeros(len(sample.sequence), np.bool_)
        ends = group.values("chunk_student_end", row)
        for low, high, gap in zip([0, *ends[:-1]], ends, np.isnan(group.values("teacher_logprob", row)), strict=True):
            in_gap[low:high] = gap
        assert len(found.first_C) > 3
        for first, length in zip(found.first_C, found.length_C, strict=True):
            tokens = token_P[first : first + length]
            assert (np.diff(tokens) == 1).all(), "no chunk reaches over what is not taught"
            assert not in_gap[tokens].any()


def test_chunks_are_not_joined_over_a_gap(make_targets: Callable[..., str], chat_info: ChatInfo) -> None:
    """A threshold that no chunk reaches: only gaps and ends close a group."""
    targets = Targets(make_targets([[9]], losses=("alm",), step=STEP, chat=chat_info))
    loss = opened(targets, "alm", debias=["merge"], alm_threshold=0.999)
    group = group_of(**BY_HAND, alm_space_logprob=[-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7])
    (found,) = read(group, layout(loss)).targets
    assert found is not None
    assert found.first_C.tolist() == [0, 5]
    assert found.length_C.tolist() == [5, 1]
    assert found.columns["teacher_logprob"].tolist() == [-6, -4]
    np.testing.assert_allclose(found.columns["alm_space_logprob"], [-0.4, -0.6])


@pytest.mark.parametrize("max_tokens", [8, 64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_where_all_is_taught_it_is_plain_text(
    make_targets: Callable[..., str], name: str, options: dict[str, Any], max_tokens: int
) -> None:
    """Samples and micro-batches, bit for bit."""
    targets = Targets(make_targets([[7, 12], [12, 3], [2, 9]], losses=tuple(LOSSES)))
    loss = opened(targets, name, **options)
    plain, chat = Layout(None, max_tokens, 24, (loss,)), layout(loss, max_tokens)
    wanted, found = list[Sample](), list[Sample]()
    for ref in targets.groups:
        group = targets.read(ref, (*plain.columns(0), "teacher_logprob"))
        offsets, logprob = group.lists["teacher_logprob"]
        group = replace(group, lists={**group.lists, "teacher_logprob": (offsets, np.nan_to_num(logprob, nan=-1.0))})
        token_R, ids = group.lists["student_ids"]
        taught = replace(group, lists={**group.lists, "learn": (token_R, np.ones(len(ids), np.bool_))})
        wanted += read_samples([[(group, row)] for row in range(ref.rows)], plain)
        found += read_samples([[(taught, row)] for row in range(ref.rows)], chat)
    for one, other in zip(wanted, found, strict=True):
        assert other.predicts.all()
        assert (one.positions, one.inputs, one.cut) == (other.positions, other.inputs, other.cut)
    for packed in (None, max_tokens):
        for one, other in zip(*(split_micros(each, 20, (loss,), packed) for each in (wanted, found)), strict=True):
            same(one, other)


def same(one: Micro, other: Micro) -> None:
    for name in ("input_BL", "position_BL", "place_P", "label_P", "sample_P"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for ours, theirs in zip(one.targets, other.targets, strict=True):
        for name in ("first_C", "length_C", "next_C", "sample_C"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
        for name, array in ours.columns.items():
            assert array.tobytes() == theirs.columns[name].tobytes(), name


WRONG = {
    "what is taught of a token too few": ("learn", BY_HAND["learn"][:-1]),
    "a row too many": ("teacher_logprob", [*BY_HAND["logprob"], -1.0]),
    "a chunk of which something is not taught": ("learn", [False, False, True, True, False, *[True] * 5]),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_contradicts_itself_is_named(what: str) -> None:
    name, value = WRONG[what]
    group = group_of(**BY_HAND)
    wrong = {**group.lists, name: (np.array([0, len(value)], np.int32), np.array(value))}
    with pytest.raises(VerificationError, match="sample 'chat' in part 0 of the targets contradicts itself"):
        read(replace(group, lists=wrong), layout(Reads(Columns())))


def test_conversations_without_a_taught_token_are_left_out_and_counted(
    make_targets: Callable[..., str], chat_info: ChatInfo
) -> None:
    """The first taught token is the second or third."""
    root = make_targets([[40, 30, 1, 50]], step=STEP, chat=chat_info)
    shape = layout(Reads(Columns.of("p-kl")))
    with Loader(Sources([Targets(root)]), shape, step_tokens=1000, micro_tokens=64, seed=0) as loader:
        step = loader.step()
    assert sorted(step.sample_ids) == ["doc0#0", "doc0#1", "doc0#3"]
    assert (step.untaught, step.tokens, step.inputs) == (1, 120, 117)
    assert step.predicted == sum(len(micro.label_P) for micro in step.micros) < 100


def test_where_nothing_at_all_is_taught_the_way_out_is_named(
    make_targets: Callable[..., str], chat_info: ChatInfo
) -> None:
    shape = layout(Reads(Columns.of("p-kl")), 9)
    sources = Sources([Targets(make_targets([[1, 1]], step=STEP, chat=chat_info))])
    message = "hold no token that the student can predict; none is taught among their first 9: raise --max-tokens"
    with (
        Loader(sources, shape, step_tokens=8, micro_tokens=8, seed=0) as loader,
        pytest.raises(XtokenError, match=message),
    ):
        loader.step()


def test_several_folders_are_joined(make_targets: Callable[..., str], chat_info: ChatInfo) -> None:
    one = make_targets([[20, 30], [25]], losses=("p-kl",), step=STEP, chat=chat_info)
    two = make_targets([[20, 30], [25, 31]], losses=("p-kl",), step=STEP, chat=chat_info, name="two")
    folders = [Targets(one), Targets(two)]
    refuse_unlike(folders)
    sources = Sources(folders)
    assert (sources.samples, sources.shared) == (4, 3)


def test_a_sample_of_which_other_tokens_are_taught_is_another(
    make_targets: Callable[..., str], chat_info: ChatInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (
        Targets(make_targets([[20, 30]], losses=("p-kl",), step=STEP, chat=chat_info, name=name)) for name in ("a", "b")
    )
    whole = two.read

    def less(ref: GroupRef, columns: tuple[str, ...]) -> RowGroup:
        group = whole(ref, columns)
        offsets, learn = group.lists["learn"]
        learn = learn.copy()
        learn[np.flatnonzero(learn)[-1]] = False
        return replace(group, lists={**group.lists, "learn": (offsets, learn)})

    monkeypatch.setattr(two, "read", less)
    sources = Sources([one, two])
    assert (sources.samples, sources.shared) == (3, 1)


UNLIKE = {
    "chat template": {"template": "0" * 64},
    "date": {"date": "2027-01-02T00:00:00"},
    "arguments": {"arguments": {"enable_thinking": False}},
    "list of kinds": {"learn": ["assistant"]},
    "stop token": {"stop_token": None},
}


@pytest.mark.parametrize("what", UNLIKE)
def test_conversations_that_were_written_otherwise_are_refused(
    make_targets: Callable[..., str], chat_info: ChatInfo, what: str
) -> None:
    one = Targets(make_targets([[20]], step=STEP, chat=chat_info))
    other = Targets(make_targets([[20]], step=STEP, chat=chat_info.model_copy(update=UNLIKE[what]), name="b"))
    with pytest.raises(XtokenError, match=f"were written with another {what}.*align both with the same template"):
        refuse_unlike([one, other])


def test_text_and_conversations_are_not_one_run(make_targets: Callable[..., str], chat_info: ChatInfo) -> None:
    chats = Targets(make_targets([[20]], step=STEP, chat=chat_info))
    texts = Targets(make_targets([[20]], name="texts"))
    for folders in ([chats, texts], [texts, chats]):
        with pytest.raises(XtokenError, match=r"/targets holds conversations and .*/texts plain text"):
            refuse_unlike(folders)


@pytest.mark.parametrize("stop", [9, None])
def test_what_ends_an_answer_is_a_pair_of_equal_bytes(
    make_targets: Callable[..., str], chat_info: ChatInfo, pair: Any, monkeypatch: pytest.MonkeyPatch, stop: int | None
) -> None:
    """GOLD's M: W has the two tokens by role, whatever the families call them; other roles stay out."""
    table = pair.table()
    students = table["student_id"].to_numpy()
    assert pair.arrays.exact[np.isin(students, [9, 10])].all()
    kinds = np.where(np.isin(students, [9, 10]), "role", table["kind"].to_numpy(zero_copy_only=False))
    changed = table.set_column(table.schema.get_field_index("kind"), table.schema.field("kind"), pa.array(kinds))
    chat = chat_info.model_copy(update={"stop_token": stop})
    targets = Targets(make_targets([[20]], losses=("gold",), step=STEP, chat=chat))
    monkeypatch.setattr(targets, "_side_table", lambda _: changed)
    out = {9, 10} - {stop}
    np.testing.assert_array_equal(targets.w.exact, pair.arrays.exact & ~np.isin(students, list(out)))
