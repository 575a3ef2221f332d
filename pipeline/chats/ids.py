"""Rows that hold a teacher's token ids: taken as they are, and told to a student by the bytes of their text.

A row says with each token whether it is taught. Control tokens are template, which has no bytes; one that is taught and
ends an answer is a stop. All else is text, a span for each run that is taught or is not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

import numpy as np

from xtoken.pipeline.chats.conversation import compact, parsed_json
from xtoken.pipeline.chats.encode import ChatModel, ChatTokens, Span, Writer, learned
from xtoken.pipeline.chats.refused import Refused, shown
from xtoken.pipeline.chats.slots import Kind
from xtoken.pipeline.chats.spans import TextSpan
from xtoken.pipeline.chats.template import load_template
from xtoken.pipeline.tokens import load_chat_tokenizer
from xtoken.pipeline.tokens.chat import Place
from xtoken.pipeline.tokens.failures import CannotTokenize

IDS_LEARNED = ("text", "stop")  # kinds of spans that such rows teach
_MASKS = ("loss_mask", "assistant_masks", "completion_mask")
_NOT_TAUGHT = -100  # in labels, as in PyTorch's cross-entropy
_BYTES = 4  # that an id counts for
_WIDEST = 1 << 31
_ANY_DAY = datetime(1970, 1, 1)  # nothing is rendered


@dataclass(frozen=True)
class TokenRow:
    """A row of token ids.

    Attributes:
        ids: of the teacher's tokenizer.
        learn: whether each is taught; never the first, which nothing predicts.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]

    @property
    def text_bytes(self) -> int:
        """What it counts for where a corpus is measured in bytes: those of its ids."""
        return _BYTES * len(self.ids)

    def to_json(self) -> str:
        """The row as one text."""
        return compact({"ids": self.ids, "learn": "".join("01"[one] for one in self.learn)})

    @classmethod
    def from_json(cls, text: str) -> "TokenRow":
        """Inverse of ``to_json``."""
        value = parsed_json(text)
        return cls(tuple(value["ids"]), tuple(one == "1" for one in value["learn"]))


def read_ids(row: Mapping[str, Any]) -> TokenRow:
    """Read a row: ``input_ids``, and ``labels`` (-100: not taught), or a mask of 0 and 1.

    What ``attention_mask`` says is padding is cut off.

    Raises:
        Refused: the row is none of this form, its masks do not agree, or nothing of it is taught.
    """
    ids = _ints(row, "input_ids")
    if not all(0 <= one < _WIDEST for one in ids):
        raise _bad("input_ids", next(one for one in ids if not 0 <= one < _WIDEST), f"an id is 0 to {_WIDEST - 1}")
    masks = {name: _mask(row, name, len(ids)) for name in _MASKS if row.get(name) is not None}
    if row.get("labels") is not None:
        masks["labels"] = _labels(_ints(row, "labels", len(ids)), ids)
    if not masks:
        raise Refused(
            "neither labels nor a mask",
            f"it has none of labels, {', '.join(_MASKS)}; it has {', '.join(list(row)[:8]) or 'nothing'}",
            "give one of them; labels that are input_ids teach everything",
        )
    (name, learn), *others = masks.items()
    for other, said in others:
        if said != learn:
            at = next(at for at, (one, two) in enumerate(zip(learn, said, strict=True)) if one != two)
            raise Refused(
                "masks that disagree", f"{name} and {other} say different things of token {at}", "give one of them"
            )
    kept = _unpadded(row, len(ids))
    _refuse_packed(row, kept)
    taught = [False, *learn[kept][1:]][: len(ids[kept])]  # nothing predicts the first
    if not any(taught):
        raise Refused("nothing is taught", f"{name} teaches none of {len(taught)} tokens", "remove the record")
    return TokenRow(tuple(ids[kept]), tuple(taught))


def _refuse_packed(row: Mapping[str, Any], kept: slice) -> None:
    """Refuse several sequences in one row, which would see each other."""
    lengths, places = row.get("seq_lengths"), row.get("position_ids")
    starts = sum(one == 0 for one in places[kept]) if isinstance(places, list) else 0
    if starts > 1 or (isinstance(lengths, list) and len(lengths) > 1):
        name = "position_ids" if starts > 1 else "seq_lengths"
        raise Refused("a packed row", f"by its {name} it holds several sequences", "give one sequence per record")


def _ints(row: Mapping[str, Any], name: str, count: int | None = None) -> list[int]:
    value = row.get(name)
    found = parsed_json(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise _bad(name, value, "it must be a list of whole numbers")
    numbers = [
        int(one) if isinstance(one, bool) or (isinstance(one, float) and one.is_integer()) else one for one in found
    ]
    if wrong := [one for one in numbers if not isinstance(one, int)]:
        rule = (
            "it must hold numbers of one sample, no batch"
            if isinstance(wrong[0], list)
            else "it must hold whole numbers"
        )
        raise _bad(name, wrong[0], rule)
    if count is not None and len(numbers) != count:
        raise Refused(
            "another length", f"{name} has {len(numbers)} entries, input_ids {count}", "give one entry for each token"
        )
    return numbers


def _mask(row: Mapping[str, Any], name: str, count: int, means: str = "taught") -> list[bool]:
    values = _ints(row, name, count)
    if wrong := [one for one in values if one not in (0, 1)]:
        raise _bad(name, wrong[0], f"it must hold 0 and 1: a token is {means} or not")
    return [one == 1 for one in values]


def _labels(labels: Sequence[int], ids: Sequence[int]) -> list[bool]:
    for at, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (_NOT_TAUGHT, token):
            raise Refused(
                "labels of other tokens",
                f"label {at} is {label}, where input_ids has {token}",
                "a label is the token itself, or -100; leave the shift by one to the trainer",
            )
    return [label != _NOT_TAUGHT for label in labels]


def _unpadded(row: Mapping[str, Any], count: int) -> slice:
    """The tokens between the padding of both sides."""
    if row.get("attention_mask") is None:
        return slice(0, count)
    seen = [at for at, one in enumerate(_mask(row, "attention_mask", count, "seen")) if one]
    first, stop = (seen[0], seen[-1] + 1) if seen else (0, 0)
    if len(seen) != stop - first:
        raise Refused("attention_mask with a gap", "it hides tokens between others", "give one sequence per record")
    return slice(first, stop)


def _bad(name: str, value: object, rule: str) -> Refused:
    return Refused("bad field", f"{name} holds {shown(value)}, but {rule}", "mend the record")


def open_ids_model(source: str, *, revision: str | None = None) -> ChatModel:
    """The tokenizer of a model that reads token ids, and its chat template if it has one, which nothing is rendered
    with: it says which tokens are its marks, and which ends an answer.

    Raises:
        XtokenError: its tokenizer cannot be loaded.
    """
    template = load_template(source, revision=revision, date=_ANY_DAY, optional=True)
    return ChatModel(template, load_chat_tokenizer(source, revision=revision))


def end_of(model: ChatModel) -> int | None:
    """The token that ends an answer: that of the chat template if it has one, else EOS; None where there is neither."""
    return model.tokenizer.table.info.eos_id if model.stop_token is None else model.stop_token


def tokens_of(model: ChatModel, row: TokenRow) -> ChatTokens:
    """A row as a sample of the model whose tokens it holds.

    Raises:
        Refused: an id is none of its tokens, a run of text is not UTF-8, or nothing but control tokens is taught.
    """
    _refuse_foreign(model, row.ids)
    spans: list[Span] = []
    before: Kind | None = None
    ends, texts, size, at, message = list[int](), list[str](), 0, 0, -1
    for kind, learn, ids in _runs(model, row):
        blank = kind == "text" != before and _puts_a_blank(model, "start" if before is None else "marker")
        widths = [len(model.tokenizer.table.token(token)) if kind == "text" else 0 for token in ids]
        data = b"".join(map(model.tokenizer.table.token, ids)) if kind == "text" else b""
        if blank and data[:1] == b" ":
            data, widths[0] = data[1:], widths[0] - 1
        message += kind == "text" or (kind == "stop" and before != "text")
        texts.append(_utf8(data, at))
        ends += (size + np.cumsum(widths)).tolist()
        stop = size + len(data)
        # a blank that the tokenizer puts in front of a text is a token by itself: it is of the template
        lead = int(blank and widths[0] == 0)
        if lead:
            spans.append(Span("template", -1, 0, size, size, at, at + 1, learn=False))
        if len(ids) > lead:
            number = -1 if kind == "template" else message
            spans.append(Span(kind, number, 0, size, stop, at + lead, at + len(ids), learn))
        size, at, before = stop, at + len(ids), kind
    learn_T = learned(spans)
    if not learn_T.any():
        raise Refused("nothing is taught", "what is taught are control tokens that end no answer", "remove the record")
    ids_T, end_T = np.array(row.ids, np.int32), np.array(ends, np.int32)
    return ChatTokens("".join(texts), ids_T, end_T, learn_T, tuple(spans), (), (), snapped=False, differs=False)


def _refuse_foreign(model: ChatModel, ids: Sequence[int]) -> None:
    table = model.tokenizer.table
    for at, token in enumerate(ids):
        if token >= table.size or table.role[token] == "hole":
            raise Refused(
                "an id that is no token",
                f"id {token} at {at} is none of the {table.size} tokens of {table.info.name}",
                "tokenize the corpus with the teacher's tokenizer",
            )


def _runs(model: ChatModel, row: TokenRow) -> Iterator[tuple[Kind, bool, list[int]]]:
    """Tokens of one kind that are taught, or are not; each stop by itself."""
    role = model.tokenizer.table.role

    def kind_of(at: int) -> tuple[Kind, bool, int]:
        token, learn = row.ids[at], row.learn[at]
        if role[token] is None and token not in model.marks:
            return "text", learn, -1
        return ("stop", True, at) if learn and token in model.stops else ("template", False, -1)

    for (kind, learn, _), places in groupby(range(len(row.ids)), kind_of):
        yield kind, learn, [row.ids[at] for at in places]


def _puts_a_blank(model: ChatModel, place: Place) -> bool:
    """Whether the tokenizer puts a blank in front of a text that stands there."""
    return model.tokenizer.table.token(int(model.tokenizer.encode("a", place).ids[0]))[:1] == b" "


def _utf8(data: bytes, at: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Refused(
            "a text that is not UTF-8",
            f"the run of text from token {at} has a character that is not whole, {shown(data[error.start :])}",
            "cut rows, and switch what is taught, between characters",
        ) from error


def retold(model: ChatModel, stored: ChatTokens, teacher_hash: str) -> ChatTokens:
    """A sample of token ids as a student reads it: its tokens of each text, apart; its own end where a stop is.

    Args:
        model: the student's, of ``open_ids_model``.
        stored: of ``tokens_of``, or as it lies in a capture.
        teacher_hash: of the teacher's tokenizer; a student of the same one reads the ids themselves.

    Raises:
        Refused: the student's tokenizer cannot represent a text, or has no tokens for what is taught.
    """
    info, end = model.tokenizer.table.info, end_of(model)
    if info.hash == teacher_hash:
        return stored
    writer = Writer(model, {(span.kind, span.message) for span in stored.spans if span.learn})
    kept = [span for span in stored.spans if span.kind != "template" and (span.kind != "stop" or end is not None)]
    first = info.bos_id if info.adds_bos else None
    if first is None and kept and kept[0].learn:
        first = info.eos_id  # something must stand before what is taught
    if first is not None:
        writer.write_ids("template", -1, [first])
    data = stored.text.encode()
    try:
        for span in kept:
            if span.kind == "stop" and end is not None:
                writer.write_ids("stop", span.message, [end])
            else:
                text = data[span.byte_start : span.byte_end].decode()
                writer.write(TextSpan(span.kind, span.message, span.part, text, plain=True), None)
    except CannotTokenize as error:
        raise Refused("a text has no tokens", str(error), "leave it out") from error
    tokens = writer.tokens((), (), None)
    if not tokens.learn.any() or tokens.learn[0]:
        raise Refused("nothing is taught", "the student has no token before, or for, what is taught", "leave it out")
    return tokens
