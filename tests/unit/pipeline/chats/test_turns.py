"""Samples of a conversation, and what is left of one that is too long."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtoken.pipeline.chats import Conversation, Message, Refused, fit, kept_messages, samples_of

TALK = Conversation(
    (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d", train=False),
        Message("user", "e"),
        Message("assistant", "f"),
        Message("user", "g"),
    )
)


def test_all_answers_of_one_rendering() -> None:
    (sample,) = samples_of(TALK, "all")
    assert (sample.conversation, sample.suffix) == (TALK.cut(6), "")
    assert sample.conversation.taught == (1, 5)


def test_the_last_answer() -> None:
    (sample,) = samples_of(TALK, "last")
    assert sample.conversation.taught == (5,)
    assert len(sample.conversation.messages) == 6


def test_each_answer_with_what_came_before() -> None:
    samples = samples_of(TALK, "each")
    assert [(len(one.conversation.messages), one.conversation.taught, one.suffix) for one in samples] == [
        (2, (1,), "#1"),
        (6, (5,), "#5"),
    ]


@pytest.mark.parametrize("turns", ["all", "last", "each"])
def test_a_conversation_without_answers_gives_no_sample(turns: str) -> None:
    with pytest.raises(Refused, match="nothing is taught"):
        samples_of(TALK.cut(1), turns)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50))), st.integers(1, 100))
def test_as_many_messages_stay_as_fit(steps: list[tuple[int, int]], limit: int) -> None:
    ends, messages, tokens = [], 0, 0
    for more, longer in steps:
        messages, tokens = messages + more, tokens + longer
        ends.append((messages, tokens))
    kept = kept_messages(ends, limit)
    assert kept == max((count for count, size in ends if size <= limit), default=None)


@dataclass
class Counted:
    """Ten tokens a message, and ten that a template adds to the last."""

    conversation: Conversation

    def __len__(self) -> int:
        return 10 * len(self.conversation.messages) + 10

    @property
    def message_ends(self) -> list[tuple[int, int]]:
        return [(at + 1, 10 * (at + 1)) for at in self.conversation.taught]


def test_what_is_too_long_is_cut_behind_an_answer_and_counted_again() -> None:
    conversation, encoded = fit(TALK.cut(6), Counted, 70, "cut")
    assert (conversation, len(encoded)) == (TALK.cut(6), 70)
    conversation, encoded = fit(TALK.cut(6), Counted, 69, "cut")
    assert (conversation, len(encoded)) == (TALK.cut(2), 30)
    with pytest.raises(Refused, match="it has 70 tokens, --max-tokens is 29, and not one answer would be left"):
        fit(TALK.cut(6), Counted, 29, "cut")
    with pytest.raises(Refused, match="it has 70 tokens, --max-tokens is 69, and --long skip leaves"):
        fit(TALK.cut(6), Counted, 69, "skip")
