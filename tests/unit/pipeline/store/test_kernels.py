"""The compiled passes over stored rows, against numpy and by rule."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.topk import NO_TAIL, decode
from xtoken.pipeline.store.kernels import LEVELS, RULES, level_table, levels, row_faults, whole_rows

STEP = 1 / 32
SIZE = 500


def rows_of(seed: int, rows: int = 200) -> tuple[NDArray[Any], ...]:
    """Rows that sum to about 1, some of one entry, some without REST: kept, ids, gaps, REST gaps."""
    rng = np.random.default_rng(seed)
    kept = rng.integers(1, 40, rows).astype(np.uint8)
    ids = np.concatenate([rng.permutation(SIZE)[:width] for width in kept]).astype(np.int32)
    gaps, rests = [], []
    for row, width in enumerate(kept):
        part = rng.dirichlet(np.full(int(width) + 1, 0.3))
        part = np.append(np.sort(part[:-1])[::-1] + 1e-9, part[-1])
        if row % 5 == 0:
            part[-1] = 0
        part /= part.sum()
        level = np.floor(np.log(part[:-1]) / -STEP + 0.5).astype(np.int64)
        gaps.append(np.diff(level, prepend=0).astype(np.uint16))
        rests.append(NO_TAIL if part[-1] == 0 else round(-math.log(part[-1]) / STEP))
    return kept, ids, np.concatenate(gaps), np.array(rests, np.uint16)


def test_levels_are_the_gaps_added_up() -> None:
    kept, _, gap, _ = rows_of(1)
    expected = np.concatenate([np.cumsum(part, dtype=np.int64) for part in np.split(gap, np.cumsum(kept)[:-1])])
    assert levels(kept, gap).tolist() == expected.tolist()


@pytest.mark.parametrize("far", [False, True])
def test_whole_rows_sum_to_one(far: bool) -> None:
    kept, ids, gap, rest = rows_of(2)
    if far:  # beyond the table of levels
        gap = gap.copy()
        gap[np.cumsum(kept)[kept > 1] - 1] = LEVELS + 100
    plain = decode(kept, ids, gap, rest, STEP)
    offsets, logprob, p, rest_R, entropy, top1 = whole_rows(kept, gap, rest, STEP, level_table(STEP))
    assert offsets.tolist() == plain.offsets.tolist()
    for row in range(len(kept)):
        span = slice(offsets[row], offsets[row + 1])
        scale = math.log(np.exp(plain.logprob[span]).sum() + math.exp(plain.tail_logprob[row]))
        assert logprob[span] == pytest.approx(plain.logprob[span] - scale, abs=1e-12)
        assert p[span] == pytest.approx(np.exp(logprob[span]), abs=1e-14)
        assert rest_R[row] == pytest.approx(plain.tail_logprob[row] - scale, abs=1e-12)
        assert p[span].sum() + math.exp(rest_R[row]) == pytest.approx(1, abs=1e-12)
        cells = np.append(p[span], math.exp(rest_R[row]))
        cells = cells[cells > 0]
        assert entropy[row] == pytest.approx(-(cells * np.log(cells)).sum(), abs=1e-9)
        assert top1[row] == p[span].max()


def test_good_rows_have_no_fault() -> None:
    assert not row_faults(*rows_of(3), SIZE, STEP, 2e-3, level_table(STEP)).any()


@pytest.mark.parametrize("fault", [1, 2, 3])
def test_each_fault_is_found_in_its_row(fault: int) -> None:
    kept, ids, gap, rest = rows_of(4)
    first, last = int(kept[:7].sum()), int(kept[:8].sum()) - 1
    assert first < last
    if fault == 3:
        gap[first] += 40
    else:
        ids[last] = SIZE if fault == 1 else ids[first]
    found = row_faults(kept, ids, gap, rest, SIZE, STEP, 2e-3, level_table(STEP))
    assert np.flatnonzero(found).tolist() == [7]
    assert RULES[found[7]] == RULES[fault]


def test_an_id_below_zero_is_outside() -> None:
    kept, ids, gap, rest = rows_of(5)
    ids[0] = -1
    assert RULES[row_faults(kept, ids, gap, rest, SIZE, STEP, 2e-3, level_table(STEP))[0]].startswith("topk_ids")
