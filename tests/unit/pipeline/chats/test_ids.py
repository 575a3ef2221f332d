"""Rows of token ids: what is read of them, the spans that they become, and what a student reads."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from talks import TALKS

from xtoken.pipeline.chats import (
    ChatModel,
    ChatTokens,
    Refused,
    TokenRow,
    end_of,
    form_of,
    open_ids_model,
    pair,
    read_ids,
    read_row,
    retold,
    tokens_of,
)
from xtoken.schemas.errors import XtokenError

from .conftest import Model, each
from .test_pairs import chunks

METASPACE = "\u2581"
PAIRS = [("smollm2", "qwen3"), ("qwen3", "smollm2"), ("qwen3", "phi3-medium"), ("chatglm3", "smollm2")]
NAMES = ["plain", "system", "blanks", "empty", "hostile"]


def row_of(tokens: ChatTokens) -> TokenRow:
    return read_ids({"input_ids": tokens.ids.tolist(), "assistant_masks": tokens.learn.astype(int).tolist()})


def rendered(model: ChatModel, name: str) -> ChatTokens:
    """A conversation in the model's own template; skips where that refuses it."""
    try:
        return model.encode(read_row({"messages": TALKS[name]}, "messages"))
    except Refused as refused:
        pytest.skip(f"{name}: {refused}")


def taught(tokens: ChatTokens) -> list[tuple[bytes, list[int]]]:
    """Bytes and token ids of each run of taught spans that follow each other; of a literal metaspace the ids of such a
    vocabulary say that it is a space."""
    data, runs = tokens.text.encode(), []
    for learn, group in groupby(tokens.spans, lambda span: span.learn):
        spans = list(group)
        if learn:
            ids = tokens.ids[spans[0].token_start : spans[-1].token_end].tolist()
            runs.append((data[spans[0].byte_start : spans[-1].byte_end].replace(METASPACE.encode(), b" "), ids))
    return runs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", each())
def test_rows_are_those_of_the_same_conversation_as_messages(model: Model, family: str, name: str) -> None:
    teacher = model(family)
    wanted = rendered(teacher, name)
    found = tokens_of(teacher, row_of(wanted))
    assert found.ids.tolist() == wanted.ids.tolist()
    assert found.learn.tolist() == wanted.learn.tolist()
    assert taught(found) == taught(wanted)
    # spans are all tokens and all bytes, and control tokens have none
    assert [span.token_end for span in found.spans][-1] == len(found)
    assert [span.byte_end for span in found.spans][-1] == len(found.text.encode())
    assert np.array_equal(found.ends, np.maximum.accumulate(found.ends))
    assert {span.kind for span in found.spans if span.learn} <= {"text", "stop"}
    for span in found.spans:
        assert (span.message < 0) == (span.kind == "template")
        assert span.token_end > span.token_start
        if span.kind == "text":
            assert found.ends[span.token_end - 1] == span.byte_end
            assert not {*found.ids[span.token_start : span.token_end].tolist()} & teacher.marks
        else:
            assert span.byte_start == span.byte_end
    keys = [span.key for span in found.spans if span.kind != "template"]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", ["plain", "system", "hostile"])
@pytest.mark.parametrize(("family", "other"), PAIRS)
def test_chunks_of_taught_spans_are_those_of_messages(model: Model, family: str, other: str, name: str) -> None:
    teacher, student = model(family), model(other)
    if name == "hostile" and teacher.tokenizer.table.info.kind == "metaspace":
        pytest.skip("a literal metaspace in it is a space in the teacher's ids")
    messages = rendered(teacher, name)
    mine = rendered(student, name)
    ids = tokens_of(teacher, row_of(messages))
    theirs = retold(student, ids, teacher.tokenizer.table.info.hash)
    assert (theirs.ids[0] == student.tokenizer.table.info.bos_id) == student.tokenizer.table.info.adds_bos
    assert not theirs.learn[0]
    assert theirs.text == ids.text
    # a student that puts a blank behind its own template's marks has other tokens there
    same = student.tokenizer.table.info.kind == "byte-level"
    found = [
        [
            (t0, t1, two.ids[s0:s1].tolist() if same else s1 - s0, data)
            for t0, t1, s0, s1, data in chunks(one, two, both)
        ]
        for one, two, both in ((one, two, pair(one, two)) for one, two in ((messages, mine), (ids, theirs)))
    ]
    assert found[0] == found[1]


def test_a_student_of_the_same_tokenizer_reads_the_ids_themselves(model: Model) -> None:
    teacher = model("qwen3")
    ids = tokens_of(teacher, row_of(rendered(teacher, "plain")))
    assert retold(teacher, ids, teacher.tokenizer.table.info.hash) is ids
    # told by its bytes it would miss the marks
    apart = retold(teacher, ids, "another")
    assert [span.kind for span in apart.spans if span.learn] == ["text", "stop", "text", "stop"]
    assert len(apart) == sum(token not in teacher.marks for token in ids.ids.tolist()) + 2
    assert pair(ids, apart).lost == ()


def test_a_row_by_hand(model: Model) -> None:
    """SmolLM2: <|im_start|> is 1, <|im_end|>, its EOS, is 2."""
    teacher = model("smollm2")
    (hi,) = teacher.tokenizer.encode("Hi", "text").ids.tolist()
    row = read_ids({"input_ids": [1, hi, 2, 1, hi, hi, 2, hi], "labels": [1, -100, -100, 1, -100, hi, 2, -100]})
    assert row == TokenRow((1, hi, 2, 1, hi, hi, 2, hi), (False, False, False, True, False, True, True, False))
    assert TokenRow.from_json(row.to_json()) == row
    tokens = tokens_of(teacher, row)
    assert tokens.text == "HiHiHiHi"
    shown = [(span.kind, span.message, span.token_end, span.byte_end, span.learn) for span in tokens.spans]
    assert shown == [
        ("template", -1, 1, 0, False),
        ("text", 0, 2, 2, False),
        ("template", -1, 4, 2, False),  # a stop that is not taught, and a mark that ends nothing, although it is
        ("text", 1, 5, 4, False),
        ("text", 2, 6, 6, True),
        ("stop", 2, 7, 6, True),
        ("text", 3, 8, 8, False),
    ]
    student = model("qwen3")
    told = retold(student, tokens, teacher.tokenizer.table.info.hash)
    (own,) = student.tokenizer.encode("Hi", "text").ids.tolist()
    assert told.ids.tolist() == [own, own, own, end_of(student), own]
    assert told.learn.tolist() == [False, False, True, True, False]
    assert told.ends.tolist() == [2, 4, 6, 6, 8]


def test_only_the_blank_that_a_tokenizer_adds_has_no_bytes(model: Model) -> None:
    teacher = model("phi3-medium")  # puts one in front of a text
    by_bytes = teacher.tokenizer.table.by_bytes()
    blank, hi = by_bytes[b" "], by_bytes[b" Hi"]
    bos = teacher.tokenizer.table.info.bos_id
    assert bos is not None
    tokens = tokens_of(teacher, TokenRow((bos, blank, hi, hi), (False, False, True, True)))
    assert tokens.text == " Hi Hi"
    shown = [(span.kind, span.message, span.token_end, span.byte_end, span.learn) for span in tokens.spans]
    assert shown == [("template", -1, 1, 0, False), ("template", -1, 2, 0, False), ("text", 1, 4, 6, True)]
    assert tokens_of(teacher, TokenRow((bos, hi, hi), (False, True, True))).text == "Hi Hi"


def test_something_stands_before_what_is_taught_first(model: Model) -> None:
    teacher, student = model("smollm2"), model("qwen3")
    (hi,) = teacher.tokenizer.encode("Hi", "text").ids.tolist()
    tokens = tokens_of(teacher, read_ids({"input_ids": [1, hi, 2], "labels": [1, hi, 2]}))
    told = retold(student, tokens, teacher.tokenizer.table.info.hash)
    info = student.tokenizer.table.info
    assert not info.adds_bos
    assert (told.ids[0], told.ids[-1]) == (info.eos_id, student.stop_token)
    assert told.learn.tolist() == [False, True, True]


def test_a_student_of_bytes_needs_no_template(model: Model) -> None:
    teacher, student = model("smollm2"), open_ids_model("bytes")
    assert end_of(student) == student.tokenizer.table.info.eos_id
    ids = tokens_of(teacher, row_of(rendered(teacher, "plain")))
    told = retold(student, ids, teacher.tokenizer.table.info.hash)
    assert bytes(token for token in told.ids.tolist() if token < 256).decode() == ids.text


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({}, "bad field", "input_ids holds None"),
        ({"input_ids": "a", "labels": [1]}, "bad field", "must be a list"),
        ({"input_ids": [1, 2.5], "labels": [1, 2]}, "bad field", "holds 2.5"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "bad field", "one sample, no batch"),
        ({"input_ids": [1, -2], "labels": [1, -2]}, "bad field", "an id is 0 to 2147483647"),
        ({"input_ids": [1, 1 << 40], "labels": [1, 1 << 40]}, "bad field", "an id is 0 to 2147483647"),
        ({"input_ids": [1, float("nan")], "labels": [1, 2]}, "bad field", "holds nan"),
        ({"input_ids": [1, 1e300], "labels": [1, 2]}, "bad field", "an id is 0 to 2147483647"),
        ({"input_ids": [1, None], "labels": [1, 2]}, "bad field", "input_ids holds None, but it must hold whole"),
        ({"input_ids": [1, 2], "labels": [-100, None]}, "bad field", "labels holds None"),
        ({"input_ids": ["1", "2"], "labels": [1, 2]}, "bad field", "holds '1'"),
        ({"input_ids": {"a": 1}, "labels": [1]}, "bad field", "must be a list"),
        ({"input_ids": [1, 2], "loss_mask": "01"}, "bad field", "loss_mask holds '01'"),
        ({"input_ids": [1, 2], "labels": [0, 2]}, "labels of other tokens", "label 0 is 0"),
        (
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [[1, 0, 0], [1, 1, 0], [1, 1, 1]]},
            "bad field",
            "attention_mask holds .* one sample, no batch",
        ),
        (
            {"input_ids": [1, 2, 1, 2], "labels": [-100, 2, -100, 2], "attention_mask": [1, 1, 2, 2]},
            "bad field",
            "a token is seen or not",
        ),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [0, 0]},
            "nothing is taught",
            "none of 0 tokens",
        ),
        (
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1]},
            "another length",
            "attention_mask has 2",
        ),
        (
            {"input_ids": [1, 2]},
            "neither labels nor a mask",
            "none of labels, loss_mask, assistant_masks, completion_mask",
        ),
        ({"input_ids": [1, 2], "labels": [1]}, "another length", "labels has 1 entries, input_ids 2"),
        ({"input_ids": [1, 2], "loss_mask": [1, 1, 1]}, "another length", "loss_mask has 3"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "bad field", "0 and 1"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels of other tokens", "label 0 is 2"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "nothing is taught", "none of 2 tokens"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "nothing is taught", "none of 2 tokens"),
        ({"input_ids": [], "labels": []}, "nothing is taught", "none of 0 tokens"),
        (
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "assistant_masks": [0, 0, 1]},
            "masks that disagree",
            "assistant_masks and labels say different things of token 1",
        ),
        (
            {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "attention_mask": [1, 0, 1]},
            "attention_mask with a gap",
            "others",
        ),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        read_ids(row)
    assert caught.value.reason == reason


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)
FIELDS = ("input_ids", "labels", "loss_mask", "assistant_masks", "attention_mask", "seq_lengths", "position_ids")


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING | st.lists(st.integers(-1, 3), min_size=2, max_size=4)))
def test_any_record_is_read_or_refused(row: dict[str, Any]) -> None:
    try:
        found = read_ids(row)
    except Refused:
        return
    assert len(found.ids) == len(found.learn)
    assert any(found.learn)
    assert not found.learn[0]
    assert TokenRow.from_json(found.to_json()) == found


def test_padding_that_is_an_eos_is_cut_or_not_taught(model: Model) -> None:
    """With attention_mask it is gone; without one its labels say that it is not taught."""
    (hi,) = model("smollm2").tokenizer.encode("Hi", "text").ids.tolist()
    ids, labels = [1, hi, 2, 2, 2], [-100, hi, 2, -100, -100]
    masked = tokens_of(
        model("smollm2"), read_ids({"input_ids": ids, "labels": labels, "attention_mask": [1, 1, 1, 0, 0]})
    )
    bare = tokens_of(model("smollm2"), read_ids({"input_ids": ids, "labels": labels}))
    assert masked.ids.tolist() == ids[:3]
    assert bare.ids.tolist() == ids
    assert taught(masked) == taught(bare) == [(b"Hi", [hi, 2])]
    left = {"input_ids": [2, 2, *ids[:3]], "labels": [-100, -100, *labels[:3]], "attention_mask": [0, 0, 1, 1, 1]}
    assert read_ids(left) == read_ids({"input_ids": ids[:3], "labels": labels[:3]})


def test_a_mark_in_the_middle_of_a_text_has_no_bytes(model: Model) -> None:
    """Another tool read a user's '<|im_end|>' as the token, and the ids are what the teacher sees."""
    teacher = model("smollm2")
    (hi,) = teacher.tokenizer.encode("Hi", "text").ids.tolist()
    tokens = tokens_of(teacher, read_ids({"input_ids": [1, hi, 2, hi, 2], "labels": [-100, -100, -100, hi, 2]}))
    assert tokens.text == "HiHi"
    assert [span.kind for span in tokens.spans] == ["template", "text", "template", "text", "stop"]


def test_several_sequences_in_a_row_are_refused() -> None:
    """As trainers pack them; places of padding do not count, nor those of one sequence."""
    row: dict[str, Any] = {"input_ids": [1, 5, 1, 6], "completion_mask": [0, 1, 0, 1]}
    for more in ({"seq_lengths": [2, 2]}, {"position_ids": [0, 1, 0, 1]}):
        with pytest.raises(Refused, match=r"by its (seq_lengths|position_ids) it holds several sequences"):
            read_ids({**row, **more})
    for more in ({"seq_lengths": [4]}, {"position_ids": [0, 1, 2, 3]}, {"position_ids": [[0, 1, 2, 3]]}):
        assert read_ids({**row, **more}).learn == (False, True, False, True)
    padded = {"attention_mask": [0, 0, 1, 1], "position_ids": [0, 0, 0, 1]}
    assert read_ids({**row, **padded}) == TokenRow((1, 6), (False, True))


def test_masks_that_agree_and_padding_on_both_sides() -> None:
    row = {
        "input_ids": [0, 0, 5, 6, 7, 0],
        "labels": [-100, -100, -100, 6, 7, -100],
        "loss_mask": [0, 0, 0, 1, 1.0, False],
        "attention_mask": [0, 0, 1, 1, 1, 0],
    }
    assert read_ids(row) == TokenRow((5, 6, 7), (False, True, True))
    assert form_of(row) == "ids"
    assert form_of([*row, "messages"]) == "messages"
    with pytest.raises(XtokenError, match="no form 'ids'"):
        read_row(row, "ids")


@pytest.mark.parametrize(
    ("ids", "learn", "reason"),
    [
        ([1, 49152, 2], "011", "an id that is no token"),
        ([1, "é0", "a"], "011", "a text that is not UTF-8"),  # the first byte of a character alone
        ([1, "é0", "é1"], "001", "a text that is not UTF-8"),  # what is taught begins within one
        ([1, 1, 1], "011", "nothing is taught"),
    ],
)
def test_rows_that_the_teacher_cannot_have_are_named(model: Model, ids: list[Any], learn: str, reason: str) -> None:
    teacher = model("smollm2")
    by_bytes = teacher.tokenizer.table.by_bytes()
    known = {"é0": by_bytes[b"\xc3"], "é1": by_bytes[b"\xa9"], "a": by_bytes[b"a"]}
    row = TokenRow(tuple(known.get(one, one) for one in ids), tuple(one == "1" for one in learn))
    with pytest.raises(Refused) as caught:
        tokens_of(teacher, row)
    assert caught.value.reason == reason


def test_a_model_without_a_template_ends_with_its_eos(model: Model, tmp_path: Path, tokenizer_file: Any) -> None:
    source = tokenizer_file("smollm2").parent
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    base = open_ids_model(str(tmp_path))
    assert base.template.sources == {}
    assert base.stop_token is None
    assert end_of(base) == base.tokenizer.table.info.eos_id == 2
    ids = tokens_of(base, row_of(rendered(model("smollm2"), "plain")))
    assert [span.kind for span in ids.spans].count("stop") == 2


@given(st.data())
def test_whatever_is_taught_both_sides_have_its_bytes_once(model: Model, data: st.DataObject) -> None:
    teacher = model("smollm2")
    text = data.draw(st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0"), min_size=1, max_size=30))
    parts = [teacher.tokenizer.encode(one, "text").ids.tolist() for one in text.splitlines(keepends=True)]
    ids = [1, *(token for part in parts for token in [*part, data.draw(st.sampled_from([0, 1, 2]))])]
    learn = [False, *data.draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))]
    try:
        found, reason = tokens_of(teacher, TokenRow(tuple(ids), tuple(learn))), None
    except Refused as refused:
        found, reason = None, refused.reason
    assert reason in (None, "a text that is not UTF-8", "nothing is taught")
    if found is None:
        return
    assert found.ids.tolist() == ids
    assert found.text == text
    for token, learned, asked in zip(ids, found.learn.tolist(), learn, strict=True):
        # of what is asked for, marks that end nothing are not taught
        assert learned == (asked and (token not in teacher.marks or token in teacher.stops))
    student = model("qwen3")
    told = retold(student, found, teacher.tokenizer.table.info.hash)
    assert not told.learn[0]
    matched = pair(found, told)
    assert matched.lost == ()
    spelt = b"".join(piece for *_, piece in chunks(found, told, matched))
    axis = found.text.encode()
    assert spelt == b"".join(axis[span.byte_start : span.byte_end] for span in found.spans if span.learn)
