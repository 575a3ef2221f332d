"""How far a moved model is from what it was: KL of P(next byte or END), exact for any tokenizer.

No loss is its own judge here: models of other tokenizers are compared by what follows the same bytes.

Shapes: D documents, P positions of each, 257 bytes and END.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SKIPPED, LAST = 50, 100  # bytes: positions from the one to the other, in each document
EACH = 2  # documents of a kind
DOCUMENTS = ("docs", "code", "tables", "speeches", "c")
FLOOR = 1e-12  # of a probability


def measured(model: Path, tokenizer: str, judge: Path) -> dict[str, NDArray[np.float64]]:
    """P(next symbol) [P, 257] behind the bytes of each document.

    Args:
        model: folder of a model.
        tokenizer: folder, or "bytes".
        judge: JSON lines of documents.
    """
    from xtoken.pipeline.tokens import load_tokenizer
    from xtoken.pipeline.tokens.canonical import Canonical
    from xtoken.trainer.data.samples import context_token
    from xtoken.trainer.ensemble.covers import Covers, SortedTokens
    from xtoken.trainer.ensemble.next_token import NextToken
    from xtoken.trainer.student.model import head_width, load_student, pick_device

    spoken = load_tokenizer(tokenizer)
    spelling, loaded = Canonical(spoken), load_student(str(model), pick_device("cpu"), False).eval()
    context = context_token(spoken.table.info)
    assert context is not None, f"{tokenizer} has no token to put in front of a text"
    size = min(spoken.table.size, head_width(loaded))
    ends = [token for token, role in enumerate(spoken.table.role[:size]) if role in ("eos", "eot")]
    tokens, score = SortedTokens(spelling.token_bytes, size), NextToken(loaded, context, size)
    found = {}
    for name, data in _beginnings(judge):
        covers, rows = Covers(spelling, tokens, score, ends, lead=spelling.lead_of(data)), []
        for at, byte in enumerate(data):
            if at >= SKIPPED:
                rows.append(covers.next().p)
            covers.take(byte)
        found[name] = np.stack(rows)
    return found


def divergence(
    original: dict[str, NDArray[np.float64]], moved: dict[str, NDArray[np.float64]]
) -> dict[str, list[float]]:
    """Nats of KL(original || moved) over the positions of each document, and how many they are."""
    result = {}
    for name, p_P257 in original.items():
        q_P257 = np.maximum(moved[name], FLOOR)
        nats = np.where(p_P257 > 0, p_P257 * (np.log(np.maximum(p_P257, FLOOR)) - np.log(q_P257)), 0).sum()
        result[name] = [float(nats), len(p_P257)]
    return result


def _beginnings(judge: Path) -> Iterator[tuple[str, bytes]]:
    """The first bytes of some documents of each kind; of those of one byte per character."""
    taken: dict[str, int] = dict.fromkeys(DOCUMENTS, 0)
    rows: list[dict[str, Any]] = [json.loads(line) for line in judge.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        kind, text = row["id"].split("/")[0], row["text"][:LAST]
        if taken[kind] < EACH and len(text) == LAST and text.isascii():
            taken[kind] += 1
            yield row["id"], text.encode()
