"""Chunk boundaries against TRL's byte alignment (tests/golden/trl_align_byte_offsets.json).

Where no token has zero width the two agree on every group that ends at a common byte. They differ, on purpose, in what
lies behind the last of them (TRL joins it to one more group, of different bytes; here it is dropped) and in zero-width
tokens (TRL gives one to the group after it, or to one of its own where both sides have one; here it belongs to the
chunk that ends at its byte). The bytes at which both cut are the same even then.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.align.chunks import cut
from xtoken.pipeline.align.kernels import boundaries

PAIRS = json.loads((Path(__file__).parents[3] / "golden" / "trl_align_byte_offsets.json").read_text())["pairs"]
ENDS = [
    [np.array([end for _, end in p[f"{side}_byte_offsets"]], np.int32) for side in ("student", "teacher")]
    for p in PAIRS
]
# TRL is also given ends that go back to 0 inside the answer; here ends never decrease (``cut`` asserts it).
MONOTONE = [i for i, sides in enumerate(ENDS) if all((np.diff(side) >= 0).all() for side in sides)]
STRICT = [i for i in MONOTONE if all((np.diff(side, prepend=0) > 0).all() for side in ENDS[i])]


def group_ends(pair: Any, side: str) -> NDArray[np.int64]:
    return np.cumsum([len(group) for group in pair[f"{side}_groups"]]).astype(np.int64)


def test_which_pairs_are_compared() -> None:
    assert list(range(len(PAIRS) - 1)) == MONOTONE
    with pytest.raises(AssertionError, match="must not decrease"):
        cut(*ENDS[-1], student_eos=False, teacher_eos=False)
    assert [i for i, pair in enumerate(PAIRS) if pair["checked_by_boundary_sets"]] == STRICT


@pytest.mark.parametrize("index", STRICT)
def test_groups_of_the_same_bytes_are_the_chunks(index: int) -> None:
    pair, (student, teacher) = PAIRS[index], ENDS[index]
    s_end, t_end = group_ends(pair, "student"), group_ends(pair, "teacher")
    groups = zip(s_end, t_end, pair["student_groups"], pair["teacher_groups"], strict=True)
    same = [bool(ours and theirs) and student[s - 1] == teacher[t - 1] for s, t, ours, theirs in groups]
    assert all(same[:-1]), "only the last group may hold different bytes"
    chunks = cut(student, teacher, student_eos=False, teacher_eos=False)
    assert chunks.student_end.tolist() == s_end[same].tolist()
    assert chunks.teacher_end.tolist() == t_end[same].tolist()


@pytest.mark.parametrize("index", [i for i in MONOTONE if i not in STRICT])
def test_zero_width_tokens_do_not_move_the_bytes(index: int) -> None:
    pair, (student, teacher) = PAIRS[index], ENDS[index]
    s_end, t_end = boundaries(student, teacher)
    ends = zip(group_ends(pair, "student"), group_ends(pair, "teacher"), strict=True)
    theirs = {int(student[s - 1]) for s, t in ends if s and t and student[s - 1] == teacher[t - 1]} - {0}
    assert student[s_end - 1].tolist() == teacher[t_end - 1].tolist() == sorted(theirs)
