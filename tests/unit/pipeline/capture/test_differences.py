"""The figures of an audit against plain loops over whole distributions."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from xtoken.pipeline.capture.differences import differences
from xtoken.pipeline.store.codecs.topk import encode
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.manifest import CodecInfo

SIZE, K = 23, 6
STEP = 1 / 32


def rows_of(random: np.random.Generator, count: int, k: int = K) -> tuple[TeacherRows, np.ndarray]:
    """Rows of k entries, and the whole distributions [R, U] they are of."""
    p_RU = random.dirichlet(np.full(SIZE, 0.4), count) * (1 - SIZE * 1e-6) + 1e-6
    order_RU = np.argsort(-p_RU, axis=1, kind="stable")
    ids_RK = order_RU[:, :k].astype(np.int32)
    logprob_RK = np.log(np.take_along_axis(p_RU, ids_RK, axis=1)).astype(np.float32)
    target_R = np.log(p_RU[np.arange(count), random.integers(SIZE, size=count)]).astype(np.float32)
    return TeacherRows(ids_RK, logprob_RK, target_R, np.ones(count, np.int32)), p_RU


def stored_batch(rows: TeacherRows, codec: CodecInfo, realised: np.ndarray) -> pa.RecordBatch:
    """One sample as readers see it."""
    packed = encode(rows, k=codec.k, min_p=codec.min_p, vocab_size=SIZE)
    columns: dict[str, Any] = {
        "kept": packed.kept,
        "topk_ids": packed.topk_ids,
        "topk_gap": packed.topk_gap,
        "rest_gap": packed.rest_gap,
        "realised_logprob": realised,
    }
    return pa.RecordBatch.from_pydict({name: pa.array([value]) for name, value in columns.items()})


def by_loops(rows: TeacherRows, codec: CodecInfo, other: TeacherRows, realised: np.ndarray) -> dict[str, float]:
    """The same figures, entry by entry, from the integers that are stored."""
    packed = encode(rows, k=codec.k, min_p=codec.min_p, vocab_size=SIZE)
    gaps, kls, shared, top, at = [], [], 0, 0, 0
    for r, kept in enumerate(packed.kept.tolist()):
        ids = packed.topk_ids[at : at + kept].tolist()
        stored = dict(zip(ids, (-STEP * np.cumsum(packed.topk_gap[at : at + kept].astype(int))).tolist(), strict=True))
        at += kept
        rest = 0.0 if packed.rest_gap[r] == 65535 else math.exp(-STEP * int(packed.rest_gap[r]))
        total = sum(math.exp(value) for value in stored.values()) + rest
        given = dict(zip(other.ids[r].tolist(), other.logprob[r].tolist(), strict=True))
        both = [token for token in stored if token in given]
        gaps += [abs(stored[token] - given[token]) for token in both]
        shared, top = shared + len(both), top + (ids[0] == other.ids[r, 0])
        left = max(1 - sum(math.exp(value) for value in given.values()), 0) / max(len(stored) - len(both), 1)
        unseen = min(left, *(math.exp(value) for value in given.values()))
        p = [math.exp(given[token]) if token in given else unseen for token in stored]
        q = [math.exp(value) / total for value in stored.values()]
        p, q = [*p, 1 - sum(p)], [*q, max(rest / total, 1e-6)]
        kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-6))
    off = np.sort(np.abs(realised.astype(float) - other.target_logprob.astype(float)))
    return {
        "realised_mean": float(off.mean()),
        "realised_p99": float(off[math.ceil(0.99 * (len(off) - 1))]),
        "realised_max": float(off[-1]),
        "entries_mean": float(np.mean(gaps)),
        "entries_max": max(gaps),
        "same_top1": top / len(kls),
        "ids_in_common": shared / len(packed.topk_ids),
        "kl_mean": float(np.mean(kls)),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_figures_of_two_models(seed: int, min_p: float) -> None:
    random = np.random.default_rng(seed)
    codec = CodecInfo(k=K, min_p=min_p)
    rows, _ = rows_of(random, 150)
    other, _ = rows_of(random, 150)
    mixed = TeacherRows(
        *(np.where(np.arange(150)[(slice(None),) + (None,) * (mine.ndim - 1)] % 3 == 0, theirs, mine)
          for mine, theirs in zip((rows.ids, rows.logprob, rows.target_logprob, rows.target_rank),
                                  (other.ids, other.logprob, other.target_logprob, other.target_rank), strict=True))
    )  # fmt: skip
    realised = rows.target_logprob
    halves = [cut_rows(mixed, 0, 70), cut_rows(mixed, 70, 150)]
    found = differences(stored_batch(rows, codec, realised), codec, halves)
    assert found == pytest.approx(by_loops(rows, codec, mixed, realised), rel=1e-5, abs=1e-6)
    assert 0.6 < found["same_top1"] < 0.9


def cut_rows(rows: TeacherRows, start: int, stop: int) -> TeacherRows:
    part = slice(start, stop)
    return TeacherRows(rows.ids[part], rows.logprob[part], rows.target_logprob[part], rows.target_rank[part])


def test_what_the_other_way_does_not_give_counts_as_little() -> None:
    """Given whole rows, KL is that of the cells; given a few entries, those it lacks weigh no more than its last."""
    random = np.random.default_rng(0)
    codec = CodecInfo(k=K, min_p=0.0)
    rows, q_RU = rows_of(random, 200)
    whole, p_RU = rows_of(random, 200, SIZE)
    batch = stored_batch(rows, codec, rows.target_logprob)
    cells = np.take_along_axis(p_RU, rows.ids, axis=1), np.take_along_axis(q_RU, rows.ids, axis=1)
    p_RC, q_RC = (np.concatenate([kept, 1 - kept.sum(axis=1, keepdims=True)], axis=1) for kept in cells)
    exact = float((p_RC * np.log(p_RC / q_RC)).sum(axis=1).mean())
    assert exact < float((p_RU * np.log(p_RU / q_RU)).sum(axis=1).mean())
    given = differences(batch, codec, [whole])
    assert given["kl_mean"] == pytest.approx(exact, rel=0.01)
    assert given["ids_in_common"] == 1.0
    few = TeacherRows(whole.ids[:, :K], whole.logprob[:, :K], whole.target_logprob, whole.target_rank)
    assert 0.3 < differences(batch, codec, [few])["kl_mean"] < exact


def test_a_row_without_rest_meets_one_with() -> None:
    """What is stored leaves nothing, the other way something: a large number, no infinite one."""
    one = TeacherRows(
        np.array([[3, 4]], np.int32),
        np.array([[0.0, -40.0]], np.float32),
        np.zeros(1, np.float32),
        np.ones(1, np.int32),
    )
    other = TeacherRows(
        np.array([[3, 5]], np.int32),
        np.log([[0.9, 0.1]]).astype(np.float32),
        np.zeros(1, np.float32),
        np.ones(1, np.int32),
    )
    codec = CodecInfo(k=1, min_p=0.5)
    found = differences(stored_batch(one, codec, one.target_logprob), codec, [other])
    assert found["kl_mean"] == pytest.approx(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 1e-6), rel=1e-5)
    assert (found["same_top1"], found["ids_in_common"]) == (1.0, 1.0)
