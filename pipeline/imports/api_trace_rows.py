"""Rows of an API trace as servers write them, in one form: chats of OpenAI and vLLM, scored prompts of vLLM and SGLang.

Nothing here knows a tokenizer: a token is its bytes, or its id where the server tells it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtoken.pipeline.imports.api_trace_line import MOST_ENTRIES, MOST_ID, MOST_TOKENS, Line

Key = bytes | int
_PLACEHOLDER = re.compile(r"token_id:(\d{1,10})")
_SURE = math.log(0.5)  # above it a token is the most probable one


@dataclass(frozen=True)
class TraceRow:
    """The teacher's distribution for one token, and the token.

    Attributes:
        token: that stands in the text: its id, or its bytes; no bytes where it is a part of a character that the
            server shows at a later token.
        logprob: of it, nats; NaN where the server does not know it.
        rank: of it, 1 = the most probable; 0 = unknown.
        entries: most probable first: tokens that have an id or bytes, and a log-probability; equal tokens are added.
            None of them is the token itself where it only stands in the list for being what was sampled.
        whole: its entries are tokens. False: the text before it, or with it, ends within a character, and the server's
            bytes are of characters.
    """

    token: Key
    logprob: float
    rank: int
    entries: tuple[tuple[Key, float], ...]
    whole: bool = True


def chat_rows(content: Any, line: Line, what: str) -> list[TraceRow]:
    """Rows of ``logprobs.content`` of OpenAI's API; entry i predicts token i.

    Args:
        content: the list.
        line: where it stands.
        what: what it is called.

    Raises:
        XtokenError: it is no such list.
    """
    rows: list[TraceRow] = []
    after_part = False
    for at, value in enumerate(line.array(content, what, MOST_TOKENS)):
        row = _chat_row(line.record(value, f"{what}[{at}]"), line, f"{what}[{at}]")
        is_part = row.token == b""
        rows.append(TraceRow(row.token, row.logprob, row.rank, row.entries, whole=not (is_part or after_part)))
        after_part = is_part
    return rows


def _chat_row(value: Mapping[str, Any], line: Line, what: str) -> TraceRow:
    token, logprob = _listed(value, line, what)
    top = value.get("top_logprobs") or []
    found = [
        _listed(line.record(one, f"{what}.top_logprobs[{at}]"), line, f"{what}.top_logprobs[{at}]")
        for at, one in enumerate(line.array(top, f"{what}.top_logprobs", MOST_ENTRIES))
    ]
    known = [one for one in found if not math.isnan(one[1])]
    if _displaced(token, logprob, known):
        return TraceRow(token, logprob, 0, _added(known[1:]))
    return TraceRow(token, logprob, _rank(token, logprob, known), _added(known))


def _listed(value: Mapping[str, Any], line: Line, what: str) -> tuple[Key, float]:
    """One {token, logprob, bytes}. ``token`` is for people, but for vLLM's placeholder of an id."""
    logprob = line.logprob(value.get("logprob"), f"{what}.logprob")
    shown = line.text(value.get("token"), f"{what}.token")
    if shown is not None and (match := _PLACEHOLDER.fullmatch(shown)):
        return line.token_id(match[1], f"{what}.token"), logprob
    return line.token_bytes(value.get("bytes"), f"{what}.bytes"), logprob


def _displaced(token: Key, logprob: float, known: Sequence[tuple[Key, float]]) -> bool:
    """Whether the list begins with the sampled token (vLLM), less probable than all others: rank K, or outside the
    top K in the place of rank K."""
    return len(known) > 1 and known[0] == (token, logprob) and all(logprob < other for _, other in known[1:])


def _rank(token: Key, logprob: float, known: Sequence[tuple[Key, float]]) -> int:
    if (token, logprob) not in known or (len(known) == 1 and logprob < _SURE):
        return 0
    return 1 + sum(other > logprob for _, other in known)


def _added(found: Sequence[tuple[Key, float]]) -> tuple[tuple[Key, float], ...]:
    """Most probable first, equal tokens added, those without bytes left to REST."""
    sums: dict[Key, float] = {}
    for token, logprob in found:
        if token != b"":
            sums[token] = _logaddexp(sums[token], logprob) if token in sums else logprob
    return tuple(sorted(sums.items(), key=lambda one: -one[1]))


def _logaddexp(one: float, two: float) -> float:
    high, low = max(one, two), min(one, two)
    return high + math.log1p(math.exp(low - high))


def prompt_rows(found: Any, ids: Sequence[int] | None, line: Line, what: str) -> tuple[list[int], list[TraceRow]]:
    """Tokens but the first, and a row for each, of ``prompt_logprobs`` of vLLM: entry i predicts token i.

    Args:
        found: [null, {id: {logprob, rank}}, ..].
        ids: of the whole prompt; None: those that stand first in their entries, which is how vLLM writes them.
        line: where it stands.
        what: what it is called.

    Raises:
        XtokenError: it is no such list, or an entry lacks the prompt's token.
    """
    entries = line.array(found, what, MOST_TOKENS)
    if not entries or entries[0] is not None:
        line.bad(f"{what}[0]", entries[:1], "nothing predicts the first token: it must be null")
    if ids is not None and len(ids) != len(entries):
        line.bad(f"the length of {what}", len(entries), f"the prompt has {len(ids):,} tokens")
    tokens, rows = list[int](), list[TraceRow]()
    for at, value in enumerate(entries[1:], start=1):
        entry = line.record(value, f"{what}[{at}]")
        if not entry or len(entry) > MOST_ENTRIES:
            line.bad(f"the length of {what}[{at}]", len(entry), f"an entry holds 1 to {MOST_ENTRIES:,} tokens")
        token = line.token_id(next(iter(entry)), f"a key of {what}[{at}]") if ids is None else ids[at]
        tokens.append(token)
        rows.append(_prompt_row(entry, token, line, f"{what}[{at}]"))
    return tokens, rows


def _prompt_row(entry: Mapping[str, Any], token: int, line: Line, what: str) -> TraceRow:
    found: dict[int, tuple[float, int]] = {}
    for key, value in entry.items():
        one = line.record(value, f"{what}[{key[:20]}]")
        rank = line.count(one.get("rank"), f"{what}[{key[:20]}].rank", MOST_ID)
        found[line.token_id(key, f"a key of {what}")] = (
            line.logprob(one.get("logprob"), f"{what}[{key[:20]}].logprob"),
            rank,
        )
    if token not in found:
        line.bad(what, list(found)[:8], f"it must hold the prompt's own token {token}")
    logprob, rank = found[token]
    outside = rank > len(found)  # others have ranks 1 to K
    others = [(one, value) for one, (value, _) in found.items() if not math.isnan(value)]
    return TraceRow(token, logprob, rank, _added([one for one in others if not (outside and one[0] == token)]))


def sglang_rows(meta: Mapping[str, Any], line: Line) -> tuple[list[int], list[TraceRow]]:
    """All tokens, and a row for each but the first, of ``meta_info`` of SGLang: [logprob, id, text] each.

    Raises:
        XtokenError: it lacks the lists, or they do not fit.
    """
    name = "meta_info.input_token_logprobs"
    tokens = [
        _triple(one, line, f"{name}[{at}]") for at, one in enumerate(line.array(meta.get(name[10:]), name, MOST_TOKENS))
    ]
    top_name = "meta_info.input_top_logprobs"
    tops = line.array(meta.get(top_name[10:]), top_name, MOST_TOKENS)
    if len(tops) != len(tokens) or not tokens:
        line.bad(f"the length of {top_name}", len(tops), f"{name} has {len(tokens)}")
    rows = []
    for at, ((token, logprob), top) in enumerate(zip(tokens[1:], tops[1:], strict=True), start=1):
        values = line.array(top, f"{top_name}[{at}]", MOST_ENTRIES)
        found = [_triple(one, line, f"{top_name}[{at}]") for one in values]
        known: list[tuple[Key, float]] = [one for one in found if not math.isnan(one[1])]
        rows.append(TraceRow(token, logprob, _rank(token, logprob, known), _added(known)))
    return [token for token, _ in tokens], rows


def _triple(value: Any, line: Line, what: str) -> tuple[int, float]:
    found = line.array(value, what, 3)
    if len(found) < 2:
        line.bad(what, value, "it must be [logprob, id, text]")
    logprob = math.nan if found[0] is None else line.logprob(found[0], f"{what}[0]")
    return line.token_id(found[1], f"{what}[1]"), logprob
