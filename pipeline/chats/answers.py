"""An answer that a model wrote, as spans of the tokens it wrote: kept as they are, never tokenized again.

The model's markers split it: reasoning stands between its marks, a tool call between ``<tool_call>`` and its end, and a
stop ends it. Any other control token in an answer refuses it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.chats.conversation import Call, Conversation, Message, compact, parsed_json, thinking_in
from xtoken.pipeline.chats.encode import ChatModel, ChatTokens, Span
from xtoken.pipeline.chats.refused import Refused, shown
from xtoken.pipeline.chats.slots import Kind

_OPEN, _CLOSE = "<think>", "</think>"
_CALL, _CALLED = "<tool_call>", "</tool_call>"
_FIX = "leave it out, or let another sample be drawn with --seed"
_WIDEST = 4  # bytes of a character


@dataclass(frozen=True)
class _Piece:
    """Tokens ``start`` to ``end`` of an answer; a template's have no bytes."""

    kind: Kind
    part: int
    start: int
    end: int
    data: bytes = b""


def with_answer(
    model: ChatModel,
    conversation: Conversation,
    prompt: ChatTokens,
    answer: NDArray[np.int32],
    learn: Collection[Kind],
) -> tuple[Conversation, ChatTokens]:
    """The conversation with the model's answer, and the tokens of both.

    Args:
        model: that wrote it.
        conversation: what was asked.
        prompt: of ``ChatModel.encode_prompt``.
        answer: int32, what was written; without a stop it was cut.
        learn: kinds of spans that are taught; ``thinking`` brings its markers.

    Raises:
        Refused: nothing is in it, or something that no message can hold.
    """
    stopped = bool(len(answer)) and int(answer[-1]) in model.stops
    ids = answer if stopped else _whole_characters(model, answer)
    body = ids[:-1] if stopped else ids
    pieces = _pieces(model, body.tolist(), opened=model.template.opens_thinking)
    if stopped:
        pieces.append(_Piece("stop", 0, len(body), len(ids)))
    at = len(conversation.messages)
    message = _message(pieces)
    kinds: set[Kind] = {*learn} | ({"marker"} if "thinking" in learn else set())
    tokens = _joined(model, prompt, ids, pieces, at, kinds)
    if not tokens.learn.any():
        raise Refused("nothing is taught", "the answer is empty", _FIX)
    asked = replace(
        conversation, messages=tuple(replace(one, train=False) if one.taught else one for one in conversation.messages)
    )
    return replace(asked, messages=(*asked.messages, message)), tokens


def _whole_characters(model: ChatModel, ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """An answer that was cut, without the tokens of a character that it only begins."""
    table = model.tokenizer.table
    for count in range(len(ids), max(0, len(ids) - _WIDEST), -1):
        data = b"".join(table.token(token) for token in ids[max(0, count - _WIDEST) : count].tolist())
        tail = data[-_WIDEST:]
        lead = next((at for at in range(len(tail) - 1, -1, -1) if tail[at] & 0xC0 != 0x80), None)
        if lead is None or len(tail) - lead >= _size(tail[lead]):
            return ids[:count]
    return ids


def _size(lead: int) -> int:
    """Bytes of the character that a byte begins."""
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _pieces(model: ChatModel, ids: Sequence[int], *, opened: bool) -> list[_Piece]:
    added, names = model.tokenizer.added, [model.tokenizer.added.get(token) for token in ids]
    pieces: list[_Piece] = []
    start = 0
    first = next((at for at, token in enumerate(ids) if names[at] is not None or not _blank(model, token)), len(ids))
    if opened or (first < len(ids) and names[first] == _OPEN):
        start = _reasoning(model, ids, names, 0 if opened else first, pieces, opened=opened)
    while start < len(ids):
        stop = next((at for at in range(start, len(ids)) if names[at] is not None), len(ids))
        if stop > start:
            pieces.append(_content(model, ids, "assistant", start, stop))
        if stop < len(ids):
            if names[stop] != _CALL or _CALLED not in names[stop:]:
                raise Refused("control token in an answer", f"the teacher wrote {added[ids[stop]]!r} in it", _FIX)
            end = names.index(_CALLED, stop) + 1
            text = b"".join(
                (names[at] or "").encode() or model.tokenizer.table.token(ids[at]) for at in range(stop, end)
            )
            pieces.append(_Piece("call", sum(one.kind == "call" for one in pieces), stop, end, _utf8(text)))
            stop = end
        start = stop
    return pieces


def _reasoning(
    model: ChatModel, ids: Sequence[int], names: Sequence[str | None], at: int, pieces: list[_Piece], *, opened: bool
) -> int:
    """Add the marks and what stands between them; returns where the answer begins."""
    begin = at
    if not opened:
        begin = _behind_blanks(model, ids, names, at + 1)
        pieces.append(_Piece("marker", 0, 0, begin))
    close = next((place for place in range(begin, len(ids)) if names[place] is not None), len(ids))
    if close < len(ids) and names[close] != _CLOSE:
        raise Refused("control token in an answer", f"the teacher wrote {names[close]!r} in its reasoning", _FIX)
    last = close
    while last > begin and close < len(ids) and _blank(model, ids[last - 1]):
        last -= 1
    if last > begin:
        pieces.append(_content(model, ids, "thinking", begin, last))
    if close == len(ids):  # cut before it answered
        return len(ids)
    end = _behind_blanks(model, ids, names, close + 1)
    pieces.append(_Piece("marker", 1, last, end))
    return end


def _behind_blanks(model: ChatModel, ids: Sequence[int], names: Sequence[str | None], at: int) -> int:
    while at < len(ids) and names[at] is None and _blank(model, ids[at]):
        at += 1
    return at


def _blank(model: ChatModel, token: int) -> bool:
    data = model.tokenizer.table.token(token)
    return bool(data) and not data.strip()


def _content(model: ChatModel, ids: Sequence[int], kind: Kind, start: int, end: int) -> _Piece:
    return _Piece(kind, 0, start, end, _utf8(b"".join(map(model.tokenizer.table.token, ids[start:end]))))


def _utf8(data: bytes) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise Refused("an answer that is not UTF-8", f"at byte {error.start} of {shown(data)}", _FIX) from error
    return data


def _message(pieces: list[_Piece]) -> Message:
    """The answer as a message; blanks around calls become template, which has no bytes."""
    calls = [at for at, one in enumerate(pieces) if one.kind == "call"]
    for at, piece in enumerate(pieces):
        if piece.kind == "assistant" and calls and at > calls[0]:
            if piece.data.strip():
                raise Refused("text behind a tool call", shown(piece.data.decode()), _FIX)
            pieces[at] = replace(piece, kind="template", data=b"")
    content = b"".join(one.data for one in pieces if one.kind == "assistant").decode()
    reasoning = next((one.data.decode() for one in pieces if one.kind == "thinking"), None)
    message = Message("assistant", content, reasoning, tuple(_call(pieces[at].data.decode()) for at in calls))
    if thinking_in(replace(message, reasoning=None)):
        raise Refused("reasoning twice", f"the answer holds {_OPEN} as text: {shown(content)}", _FIX)
    return message


def _call(text: str) -> Call:
    value = parsed_json(text.removeprefix(_CALL).removesuffix(_CALLED).strip())
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(name, str) or not name:
        raise Refused("a tool call that is none", f"{shown(text)} has no JSON object with a name and arguments", _FIX)
    arguments = value.get("arguments", value.get("parameters", {}))
    return Call(name, arguments if isinstance(arguments, str) else compact(arguments))


def _joined(
    model: ChatModel,
    prompt: ChatTokens,
    ids: NDArray[np.int32],
    pieces: Sequence[_Piece],
    at: int,
    kinds: Collection[Kind],
) -> ChatTokens:
    assert [one.start for one in pieces] == [0, *(one.end for one in pieces)][: len(pieces)], "pieces leave no gap"
    first, size = len(prompt.ids), len(prompt.text.encode())
    spans, ends, learned = list(prompt.spans), prompt.ends.tolist(), prompt.learn.tolist()
    added, table = model.tokenizer.added, model.tokenizer.table
    for piece in pieces:
        tokens = ids[piece.start : piece.end].tolist()
        widths = [len(added[token].encode() if token in added else table.token(token)) for token in tokens]
        running = np.cumsum(widths if piece.data else [0] * len(tokens))
        ends += (size + running).tolist()
        learn = piece.kind in kinds and piece.kind != "template"
        learned += [learn] * len(tokens)
        message = -1 if piece.kind == "template" else at
        stop = size + len(piece.data)
        spans.append(Span(piece.kind, message, piece.part, size, stop, first + piece.start, first + piece.end, learn))
        size = stop
    assert all(one.token_end == other.token_start for one, other in pairwise(spans)), "spans leave no gap"
    return ChatTokens(
        prompt.text + b"".join(one.data for one in pieces).decode(),
        np.concatenate([prompt.ids, ids]).astype(np.int32),
        np.array(ends, np.int32),
        np.array(learned, np.bool_),
        tuple(spans),
        prompt.absent,
        prompt.trimmed,
        prompt.snapped,
        differs=False,
    )
