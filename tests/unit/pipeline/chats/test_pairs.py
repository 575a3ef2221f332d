"""What two models make of one conversation: every ordered pair of families, and small cases worked out by hand."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, permutations

import numpy as np
import pytest
from talks import TALKS

from xtoken.pipeline.chats import (
    ChatModel,
    ChatTokens,
    Conversation,
    Message,
    Pairing,
    Refused,
    Span,
    from_json,
    on_axis,
    pair,
    read_row,
    to_json,
)
from xtoken.pipeline.chats.pairing import Spanned

from .conftest import ALL, QUICK, Model, each
from .test_spans import LEARN, small


class Stored:
    """A sample as a capture keeps it."""

    def __init__(self, text: str, *spans: Span) -> None:
        self.text, self.spans = text, spans


def borders(tokens: ChatTokens, span: Span, start: int) -> dict[int, int]:
    """Where tokens of a span begin and end, in bytes from ``start``: the index of the token behind each."""
    found = {span.byte_start - start: span.token_start}
    for at in range(span.token_start, span.token_end):
        found[int(tokens.ends[at]) - start] = at + 1
    return found


def content(tokens: ChatTokens, span: Span) -> str:
    return tokens.text.encode()[span.byte_start : span.byte_end].decode()


def parts(text: str) -> set[str]:
    """It, with fewer blanks before and behind."""
    before, behind = len(text) - len(text.lstrip()), len(text) - len(text.rstrip())
    return {text[start : len(text) - end] for start in range(before + 1) for end in range(behind + 1)}


def chunks(teacher: ChatTokens, student: ChatTokens, pairing: Pairing) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Chunks as they are defined, by two pointers: token ranges of both sides, and the bytes that both spell."""
    data = teacher.text.encode()
    for match in pairing.matches:
        t, s = match.teacher, match.student
        if not match.taught:
            continue
        if t.byte_start == t.byte_end:
            if t.token_end > t.token_start and s.token_end > s.token_start:
                yield t.token_start, t.token_end, s.token_start, s.token_end, b""
            continue
        theirs, mine = content(teacher, t), content(student, s)
        same = max((text for text in parts(theirs) if text in mine and text.strip() == theirs.strip()), key=len)
        starts = [one.byte_start + len(text[: text.index(same)].encode()) for one, text in ((t, theirs), (s, mine))]
        t_at, s_at = borders(teacher, t, starts[0]), borders(student, s, starts[1])
        shared = [byte for byte in sorted(t_at.keys() & s_at.keys()) if 0 <= byte <= len(same.encode())]
        for start, end in pairwise(shared):
            yield t_at[start], t_at[end], s_at[start], s_at[end], data[starts[0] + start : starts[0] + end]


def check_pair(teacher: ChatModel, student: ChatModel, conversation: Conversation) -> Counter[str]:
    """What holds of a pair; counts of taught bytes, and of what was lost by its reason."""
    theirs = teacher.encode(conversation, LEARN)
    mine = student.encode(from_json(to_json(conversation)), LEARN)
    pairing = pair(theirs, mine)
    taught = Counter[str]()
    covered = np.zeros(len(theirs.text.encode()), int)
    for t_start, t_end, s_start, s_end, data in chunks(theirs, mine, pairing):
        assert theirs.learn[t_start:t_end].all()
        assert mine.learn[s_start:s_end].all()
        if data:
            end = int(theirs.ends[t_end - 1])
            covered[end - len(data) : end] += 1
            assert mine.text.encode()[int(mine.ends[s_end - 1]) - len(data) : int(mine.ends[s_end - 1])] == data
        taught["chunks"] += 1
    lost = dict(pairing.lost)
    matched = {match.teacher.key: match for match in pairing.matches}
    for span in theirs.spans:
        # every byte of a taught span lies in one chunk, unless the span is lost, and then in none
        count = int(span.learn and span.key not in lost)
        inside = covered[span.byte_start : span.byte_end]
        if count and matched[span.key].trimmed:
            # but for blanks at its ends that the other trims, and the letters of a token that has both
            first, last = (inside.argmax(), len(inside) - inside[::-1].argmax()) if inside.any() else (0, 0)
            assert (inside[first:last] == 1).all()
            assert inside.sum() == last - first
        else:
            assert (inside == count).all()
        taught[span.kind] += int(inside.sum())
        assert not (span.learn and span.key in lost and span.key in matched and lost[span.key] != "not taught")
    axis = on_axis(pairing, mine.ends)
    assert (np.diff(axis, prepend=0) >= 0).all()
    assert axis.max(initial=0) <= len(covered)
    for match in pairing.matches:
        if match.student.token_end > match.student.token_start:
            assert axis[match.student.token_end - 1] == match.teacher_start + match.size
    alone = {span.key for span in mine.spans if span.learn} - {m.student.key for m in pairing.matches if m.taught}
    assert set(pairing.alone) == alone
    taught.update(f"lost {kind}: {reason}" for (kind, _, _), reason in pairing.lost)
    return taught


def talk(kind: str) -> Conversation:
    return read_row({"messages": TALKS[kind]}, "messages")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(*two, marks=[] if {*two} <= {*QUICK} else [pytest.mark.thorough], id="-".join(two))
        for two in permutations(ALL, 2)
    ],
)
def test_every_pair(model: Model, first: str, second: str) -> None:
    """All that is taught and both sides can write is in chunks; stop meets stop."""
    teacher, student = model(first), model(second)
    for kind, messages in TALKS.items():
        try:
            found = check_pair(teacher, student, talk(kind))
        except Refused:  # of those that test_what_a_family_leaves_out names
            continue
        answers = [message["content"] or "" for message in messages if message["role"] == "assistant"]
        size = len("".join(answers).encode())
        stops = [key for key in found if key.startswith("lost stop")]
        if kind in ("plain", "system", "hostile"):
            assert found["assistant"] == size
            lost = ["lost stop: absent"] if second == "chatglm3" and first != "chatglm3" else []
            assert stops == lost
        if kind == "blanks":
            assert found["lost assistant: other bytes"] == 0


def test_calls_of_one_family_reach_another_only_in_the_same_words(model: Model) -> None:
    qwen, small_one = model("qwen3"), model("smollm2")
    assert check_pair(qwen, qwen, talk("calls"))["call"] > 100
    found = check_pair(qwen, small_one, talk("calls"))
    assert (found["call"], found["lost call: absent"], found["lost stop: not taught"]) == (0, 2, 1)


def test_what_both_have_of_a_trimmed_answer_is_taught(model: Model) -> None:
    """Qwen3 takes line ends off the start of an answer, Llama-3 all blanks off both ends, SmolLM2 nothing."""
    answer = "\n\n  Hello, wörld \n\u3000"
    talk = read_row(
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}, "messages"
    )
    found = {
        (one, two): check_pair(model(one), model(two), talk)["assistant"]
        for one, two in permutations(("qwen3", "smollm2", "llama3"), 2)
    }
    # a blank of " \n\n " and " Hello" are tokens that are cut where a side trims
    most, rest = len(" Hello, wörld \n\u3000".encode()), len(", wörld".encode())
    assert found == {two: rest if "llama3" in two else most for two in permutations(("qwen3", "smollm2", "llama3"), 2)}


SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.content }}]{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'system' %}({{ m.content }}){% endif %}{% endfor %}"
)
IN_ORDER = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_a_message_that_a_template_moves_displaces_no_answer() -> None:
    first, last = small(IN_ORDER).encode(talk("system")), small(SYSTEM_LAST).encode(talk("system"))
    pairing = pair(first, last)
    assert [match.teacher.kind for match in pairing.matches] == ["user", "assistant"]
    assert pairing.lost == ()
    axis = on_axis(pairing, last.ends)
    #                    [  Hi there                ]   [  Hello.                 ]   (Be short.)
    assert axis.tolist() == [0, *range(10, 18), 17, 17, *range(18, 24), 23, 23, *[23] * 9, 23]


def test_answers_in_another_order_are_lost() -> None:
    backwards = small("{% for m in messages[::-1] %}[{{ m.content }}]{% endfor %}")
    found = pair(small(IN_ORDER).encode(talk("plain")), backwards.encode(talk("plain")))
    assert found.lost == ((("assistant", 3, 0), "out of order"),)
    assert found.alone == (("assistant", 3, 0),)


def test_spans_without_bytes_are_matched_by_what_they_are() -> None:
    """Two empty answers and their stops, all at byte 1 of the axis."""
    kinds = [("user", 0), ("assistant", 1), ("stop", 1), ("assistant", 2), ("stop", 2)]
    sizes = [1, 0, 1, 0, 1]
    spans, at = [], 0
    for (kind, message), size in zip(kinds, sizes, strict=True):
        spans.append(Span(kind, message, 0, min(at, 1), 1, at, at + size, kind != "user"))  # type: ignore[arg-type]
        at += size
    teacher: Spanned = Stored("a", *spans)
    student: Spanned = Stored("a", *spans[:3])
    pairing = pair(teacher, student)
    assert [match.teacher.key for match in pairing.matches] == [span.key for span in spans[:3]]
    assert pairing.lost == ((("assistant", 2, 0), "absent"), (("stop", 2, 0), "absent"))


def test_a_plain_document_is_one_text_and_one_stop() -> None:
    document = Span("text", -1, 0, 0, 2, 0, 2, True), Span("stop", -1, 0, 2, 2, 2, 3, True)
    pairing = pair(Stored("ab", *document), Stored("ab", *document))
    assert [match.teacher.kind for match in pairing.matches] == ["text", "stop"]
    assert on_axis(pairing, np.array([1, 2, 2], np.int32)).tolist() == [1, 2, 2]


@pytest.mark.parametrize("name", each(QUICK))
def test_a_model_matches_itself(model: Model, name: str) -> None:
    for kind in TALKS:
        try:
            tokens = model(name).encode(talk(kind), LEARN)
        except Refused:
            continue
        pairing = pair(tokens, tokens)
        assert pairing.lost == ()
        assert pairing.alone == ()
        assert on_axis(pairing, tokens.ends).tolist() == tokens.ends.tolist()


def test_a_question_alone_has_nothing_to_pair() -> None:
    with pytest.raises(Refused, match="nothing is taught"):
        small(IN_ORDER).encode(Conversation((Message("user", "a"),)))
