"""A reply's entries checked and put in our order, by a loop that numba compiles. Nothing here needs vLLM.

Shapes: R rows, K entries asked for, U width of the output head; column 0 of K + 1 is the label.
"""

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.vllm_replies import Entries
from xtoken.schemas.compiled import compiled

_SLACK = 1e-4  # nats: what float32 may leave above zero or out of order

RULES = (
    "",
    "column 0 is not the label",
    "ids lie outside the vocabulary",
    "an id comes twice in a row",
    "log-probabilities are NaN, or above 0",
    "log-probabilities do not descend",
    "top-k mass is above 1",
    "a rank lies outside the vocabulary",
    "the label has two log-probabilities",
)
"""What ``arrange`` returns the index of."""


@compiled
def _insert(
    ids_K: NDArray[np.int32], sorted_K: NDArray[np.float32], count: int, token: np.int32, logprob: np.float32
) -> None:
    """Put one entry among the first ``count``, which are in order: falling, ties by lower id."""
    at = count
    while at > 0 and (sorted_K[at - 1] < logprob or (sorted_K[at - 1] == logprob and ids_K[at - 1] > token)):
        sorted_K[at], ids_K[at] = sorted_K[at - 1], ids_K[at - 1]
        at -= 1
    sorted_K[at], ids_K[at] = logprob, token


@compiled
def arrange(
    target_R: NDArray[np.int32],
    token_RK1: NDArray[np.int32],
    logprob_RK1: NDArray[np.float32],
    rank_R: NDArray[np.int32],
    seen_U: NDArray[np.int32],
    ids_RK: NDArray[np.int32],
    sorted_RK: NDArray[np.float32],
    target_logprob_R: NDArray[np.float32],
    target_rank_R: NDArray[np.int32],
) -> int:
    """Check entries and fill the last four arrays.

    Entries are put in the order of their log-probabilities, ties by lower id, and rounding above 0 is cut. The rank of
    a label among them is its place then; else it is the engine's, which counts every entry as probable.

    Args:
        target_R: the labels.
        token_RK1: ids, the label first, then ranks 1 to K.
        logprob_RK1: nats.
        rank_R: rank of the label, from 1.
        seen_U: work space, all -1.

    Returns:
        0, or the index in ``RULES`` of the first rule broken.
    """
    rows, width = token_RK1.shape
    for row in range(rows):
        if token_RK1[row, 0] != target_R[row]:
            return 1
        if not (np.isfinite(logprob_RK1[row, 0]) and logprob_RK1[row, 0] <= _SLACK):
            return 4
        if rank_R[row] < 1 or rank_R[row] > len(seen_U):
            return 7
        mass, before, place = 0.0, np.inf, 0
        for column in range(1, width):
            token, logprob = token_RK1[row, column], logprob_RK1[row, column]
            if token < 0 or token >= len(seen_U):
                return 2
            if seen_U[token] == row:
                return 3
            seen_U[token] = row
            if not (np.isfinite(logprob) and logprob <= _SLACK):
                return 4
            if logprob > before + _SLACK:
                return 5
            before = logprob
            mass += np.exp(np.float64(logprob))
            _insert(ids_RK[row], sorted_RK[row], column - 1, token, logprob)
        if mass > 1 + _SLACK:
            return 6
        for column in range(width - 1):
            if ids_RK[row, column] == token_RK1[row, 0]:
                place = column + 1
                if abs(sorted_RK[row, column] - logprob_RK1[row, 0]) > _SLACK:
                    return 8
            sorted_RK[row, column] = min(sorted_RK[row, column], np.float32(0.0))
        target_logprob_R[row] = min(logprob_RK1[row, 0], np.float32(0.0))
        target_rank_R[row] = place if place > 0 else rank_R[row]
    return 0


def rows_from(ids: NDArray[np.int32], entries: Entries, vocab_rows: int) -> tuple[TeacherRows, int]:
    """Rows of the prompt ``ids`` and 0, or the index in ``RULES`` of what its entries break; see ``arrange``."""
    token, logprob, rank = entries
    shape = (len(token), token.shape[1] - 1)
    rows = TeacherRows(
        ids=np.empty(shape, np.int32),
        logprob=np.empty(shape, np.float32),
        target_logprob=np.empty(len(token), np.float32),
        target_rank=np.empty(len(token), np.int32),
    )
    seen = np.full(vocab_rows, -1, np.int32)
    out = rows.ids, rows.logprob, rows.target_logprob, rows.target_rank
    return rows, arrange(np.ascontiguousarray(ids[1:], np.int32), token, logprob, rank, seen, *out)
