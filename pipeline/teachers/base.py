"""What a teacher engine gives: distributions (rows) as top-k log-probabilities, or sampled tokens, in numpy only.

Shapes: T tokens of one sequence, R = T - 1 rows, K entries per row, n temperatures other than 1.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TeacherInfo, TokenizerInfo


class EngineLost(XtokenError):
    """The engine ended while it was used: its machine or memory is to blame, or what it was given."""


@dataclass(frozen=True)
class Draws:
    """Tokens sampled from whole rows; here K is the number of different ids sampled, all rows together.

    Attributes:
        drawn: int32 [R], different ids sampled in each row.
        ids: int32 [K], rows in order, most often sampled first, then ascending.
        count: int32 [K], how often each was sampled; a row's sum to the number asked for.
        entropy: float32 [R], nats, of the whole distribution sampled from.
    """

    drawn: NDArray[np.int32]
    ids: NDArray[np.int32]
    count: NDArray[np.int32]
    entropy: NDArray[np.float32]


@dataclass(frozen=True)
class TeacherRows:
    """Rows of one sequence; row ``r`` is the distribution that predicts token ``r + 1``.

    Attributes:
        ids: int32 [R, K], most probable first, ties by lower id.
        logprob: float32 [R, K], nats, of the whole output head (no renormalisation, temperature 1).
        target_logprob: float32 [R], nats, of the label (the token in the text).
        target_rank: int32 [R], 1 = the most probable token.
        lse: float32 [R], log-sum-exp of the raw logits, or None where the engine does not tell.
        space_logprob: float32 [R], log P(next token starts with a space), or None without full rows.
        tau_lognorm: float32 [R, n], log sum_v p(v)^(1/tau) over the whole output head at each of
            ``CodecGroup.temperatures``, so that log p_tau(v) = log p(v) / tau minus it; None if none were asked.
        draws: tokens sampled from the tokenizer's ids; None if none were asked.
    """

    ids: NDArray[np.int32]
    logprob: NDArray[np.float32]
    target_logprob: NDArray[np.float32]
    target_rank: NDArray[np.int32]
    lse: NDArray[np.float32] | None = None
    space_logprob: NDArray[np.float32] | None = None
    tau_lognorm: NDArray[np.float32] | None = None
    draws: Draws | None = None


def chosen_rows(rows: TeacherRows, chosen_P: NDArray[np.int64]) -> TeacherRows:
    """Rows of some positions, which rise [P]."""

    def taken(values: NDArray[Any] | None) -> Any:
        return None if values is None else values[chosen_P]

    draws = rows.draws
    if draws is not None:
        kept_R = np.zeros(len(draws.drawn), np.bool_)
        kept_R[chosen_P] = True
        kept_K = np.repeat(kept_R, draws.drawn)
        draws = Draws(draws.drawn[chosen_P], draws.ids[kept_K], draws.count[kept_K], draws.entropy[chosen_P])
    return TeacherRows(
        ids=taken(rows.ids),
        logprob=taken(rows.logprob),
        target_logprob=taken(rows.target_logprob),
        target_rank=taken(rows.target_rank),
        lse=taken(rows.lse),
        space_logprob=taken(rows.space_logprob),
        tau_lognorm=taken(rows.tau_lognorm),
        draws=draws,
    )


Batch = Sequence[tuple[Hashable, NDArray[np.int32]]]
"""Sequences of token ids, each under a key of the caller's."""


@dataclass(frozen=True)
class Question:
    """A prompt to be answered.

    Attributes:
        ids: int32 [T], the whole prompt.
        tokens: most of the answer.
        temperature: 0 takes the most probable token each time.
        top_p: mass of the most probable tokens that are drawn from.
        seed: what is drawn follows from it.
        stops: ids that end an answer.
    """

    ids: NDArray[np.int32]
    tokens: int
    temperature: float
    top_p: float
    seed: int
    stops: tuple[int, ...]


class Teacher(Protocol):
    """An engine with one model loaded.

    Attributes:
        info: what it is.
        settings: what it was started with that can change rows or speed; the same on every worker of a run.
    """

    info: TeacherInfo
    settings: dict[str, str | int | float | bool]

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        """Score token-id sequences (BOS included where wanted), each of at least 2 tokens.

        Returns one ``TeacherRows`` per sequence, in order; a sequence of T tokens has T - 1 rows.
        """
        ...

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        """Score batches as they come; yields (key, rows) in any order, all of them before it ends.

        ``None`` among the batches says that nothing is ready just now: the engine goes on with what it has and asks
        again. The caller gives it only while something is unanswered.
        """
        ...

    def generate(self, questions: Sequence[Question]) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Answer prompts; yields the number of a question and its answer, int32, in any order.

        An answer ends with a stop, or has as many tokens as were asked for.
        """
        ...

    def second_path(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows] | None:
        """What ``rows`` gives, taken out of the same engine another way; None where there is no other way."""
        ...


def stream_batches(teacher: Teacher, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
    """``Teacher.stream`` by one call of ``rows`` for each batch: which sequences meet decides how floats add up."""
    for batch in batches:
        assert batch is not None, "nothing is ready and nothing is unanswered"
        keys, sequences = [key for key, _ in batch], [ids for _, ids in batch]
        yield from zip(keys, teacher.rows(sequences), strict=True)


def entries_asked(codec: CodecGroup, width: int) -> int:
    """K of the engine, whose output head is so wide: what the codec asks for (of ``topk`` that is ``--k``)."""
    asked = codec.settings.entries
    return width if asked is None else asked


def refuse_k(codec: CodecGroup, most: int, of: str) -> None:
    """Refuse ``--k`` where a row has fewer entries.

    Args:
        codec: what is to be kept.
        most: entries of a row.
        of: their name, such as ``the vocabulary's 10 tokens``.

    Raises:
        XtokenError: k is larger.
    """
    if entries_asked(codec, most) > most:
        raise XtokenError(f"--k {codec.k} is more than {of}; use --k {most} or less")


def shows_bos(config: TeacherGroup, tokenizer: TokenizerInfo) -> bool:
    """Whether samples reach the teacher with BOS in front."""
    added = tokenizer.adds_bos and tokenizer.bos_id is not None
    return config.bos == "always" or (config.bos == "auto" and added)


def check_prompt(ids: NDArray[np.int32], info: TeacherInfo) -> None:
    """Refuse a sequence that the model has no rows for.

    Raises:
        XtokenError: a token id beyond the output head.
    """
    assert len(ids) >= 2, "a row needs a token before it"
    if int(ids.max()) >= info.vocab_rows or int(ids.min()) < 0:
        raise XtokenError(
            f"token id {int(ids.max())} is beyond the {info.vocab_rows} rows of {info.model}: "
            "its tokenizer belongs to another model; use the tokenizer that came with it"
        )
