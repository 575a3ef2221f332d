"""What a table says of the teacher besides its distributions: likelihoods, factors, spaces, entropy. Rows by hand."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from xtoken.pipeline.align.chunks import Chunks, Joined
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.prefix import longest_tokens
from xtoken.pipeline.align.rows import Recipe, RowBatch
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.project import build_w
from xtoken.pipeline.tokens import Encoded, TokenTable
from xtoken.schemas.manifest import CodecInfo

STEP = 1 / 32
TABLE = TokenTable.build(
    [b"a", b"b", b"ab", b" "], [None] * 4, [False] * 4, np.zeros((0, 2), np.int32), name="t", kind="byte-level"
)
# Two samples: "abab" behind BOS, "aba" without. Every row keeps tokens 0 and 1; gaps are in steps of 1/32 nat.
ROW_GAPS = [(10, 40), (22, 0), (5, 100), (16, 16), (30, 7), (12, 50)]
RESTS = [40, 65535, 64, 30, 22, 90]
TAU_ODDS = [30, -32768, 0, -12, 15, -80]
REALISED = [-0.3, -1.7, -0.2, -4.0, -0.9, -2.5]
SPACES = [-3.0, -0.5, -2.0, -0.1]


def batch_of(**changed: Any) -> pa.RecordBatch:
    columns: dict[str, Any] = {
        "sample_id": ["x", "y"],
        "text": ["abab", "aba"],
        "teacher_ids": [[0, 1, 0, 1], [0, 1, 0]],
        "teacher_end": [[1, 2, 3, 4], [1, 2, 3]],
        "kept": [[2] * 4, [2] * 2],
        "topk_ids": [[0, 1] * 4, [0, 1] * 2],
        "topk_gap": [[gap for pair in ROW_GAPS[:4] for gap in pair], [gap for pair in ROW_GAPS[4:] for gap in pair]],
        "rest_gap": [RESTS[:4], RESTS[4:]],
        # two temperatures, of which the second is asked for
        "tau_rest_odds": [
            [v for odds in TAU_ODDS[:4] for v in (7, odds)],
            [v for odds in TAU_ODDS[4:] for v in (7, odds)],
        ],
        "realised_logprob": pa.array([REALISED[:4], REALISED[4:]], pa.list_(pa.float32())),
        "space_logprob": pa.array([SPACES, None], pa.list_(pa.float32())),
        "first_row": [0, 1],
    }
    found = {name: pa.array(value, KINDS.get(name)) for name, value in (columns | changed).items()}
    return pa.RecordBatch.from_pydict(found)


KINDS = {name: pa.list_(pa.int32()) for name in ("teacher_ids", "teacher_end", "topk_ids")}
KINDS |= {name: pa.list_(pa.uint16()) for name in ("topk_gap", "rest_gap")}
KINDS["tau_rest_odds"] = pa.list_(pa.int16())
KINDS["kept"] = pa.list_(pa.uint8())


def joined(at: int, teacher_end: list[int]) -> Joined:
    """Chunks that end at these teacher tokens; the student has one token for each."""
    ends = np.array(teacher_end, np.int32)
    chunks = Chunks(np.arange(1, len(ends) + 1, dtype=np.int32), ends, np.zeros(len(ends), np.bool_))
    return Joined(at, Encoded("", np.zeros(len(ends), np.int32), ends, snapped=False), chunks)


# x: "a", "bab"; y: "a" (no row), "ba"
SAMPLES = [joined(0, [1, 4]), joined(1, [1, 3])]


def built(merge: str, tau: float, **changed: Any) -> tuple[pa.RecordBatch, dict[str, int]]:
    codec = CodecInfo(k=2, min_p=0.0, step=STEP, temperatures=[1.0, 0.5, 2.0])
    maps = Maps.of(build_w(TABLE, TABLE), "prefix", TABLE)
    targets, counts = target_batch(batch_of(**changed), SAMPLES, maps, Recipe(["uld", "alm"], merge, tau, codec))
    return targets, dict(counts)


def row(number: int) -> list[float]:
    """Probabilities at temperature 1, REST last, as decoded and made to sum to 1."""
    first, second = ROW_GAPS[number]
    rest = 0.0 if RESTS[number] == 65535 else math.exp(-RESTS[number] * STEP)
    p = [math.exp(-first * STEP), math.exp(-(first + second) * STEP), rest]
    return [value / sum(p) for value in p]


def realised_at(number: int, tau: float) -> float:
    """The realised token's log-probability: its power, scaled as the kept entries are."""
    if tau == 1:
        return REALISED[number]
    odds = TAU_ODDS[number]
    rest = 0.0 if odds == -32768 else 1 / (1 + math.exp(-odds * STEP))
    powers = sum(value ** (1 / tau) for value in row(number)[:2])
    return min(0.0, math.log(math.exp(REALISED[number]) ** (1 / tau) * (1 - rest) / powers))


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize(("merge", "rest_of"), [("first", [[], [2, 3], None, [5]]), ("last", [[], [1, 2], None, [4]])])
def test_factor_is_the_chain_rule(merge: str, rest_of: list[list[int] | None], tau: float) -> None:
    """The realised tokens that the chunk's own row does not predict: after the first, or before the last."""
    targets, _ = built(merge, tau)
    found = targets["factor_logprob"].flatten().to_pylist()
    expected = [math.nan if some is None else sum(realised_at(number, tau) for number in some) for some in rest_of]
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("merge", ["first", "last"])
def test_the_row_is_the_first_or_the_last(merge: str) -> None:
    targets, counts = built(merge, 1.0)
    rows = [0, {"first": 1, "last": 3}[merge], None, {"first": 4, "last": 5}[merge]]
    expected = [math.log(p) for number in rows if number is not None for p in sorted(row(number)[:2], reverse=True)]
    assert targets["uld_logprob"].flatten().to_pylist() == pytest.approx(expected, abs=1e-6)
    assert targets["uld_count"].to_pylist() == [[2, 2], [0, 2]]
    assert counts["chunks_with_row"] == 3


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_texts_own_likelihood_is_at_temperature_1(tau: float) -> None:
    found = built("first", tau)[0]["teacher_logprob"].flatten().to_pylist()
    assert found == pytest.approx([-0.3, -1.7 - 0.2 - 4.0, math.nan, -0.9 - 2.5], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(("merge", "tau"), [("first", 1.0), ("last", 2.0)])
def test_confidence_is_that_of_first_rows_at_temperature_1(merge: str, tau: float) -> None:
    targets, _ = built(merge, tau)
    entropies = [-sum(p * math.log(p) for p in row(number) if p) for number in range(6)]
    tops = [max(row(number)[:2]) for number in range(6)]
    expected = [(entropies[0] + entropies[1]) / 2, entropies[4]]
    assert targets["teacher_entropy"].to_pylist() == pytest.approx(expected, rel=1e-6)
    assert targets["teacher_top1"].to_pylist() == pytest.approx([(tops[0] + tops[1]) / 2, tops[4]], rel=1e-6)


def test_a_sample_without_rows_has_no_confidence() -> None:
    batch = batch_of().slice(1, 1)
    maps = Maps.of(build_w(TABLE, TABLE), "prefix", TABLE)
    recipe = Recipe(["uld"], "first", 1.0, CodecInfo(k=2, min_p=0.0, step=STEP))
    targets, counts = target_batch(batch, [joined(0, [1])], maps, recipe)
    assert math.isnan(targets["teacher_entropy"][0].as_py())
    assert math.isnan(targets["teacher_top1"][0].as_py())
    assert counts["chunks_with_row"] == 0


def test_no_samples_are_no_rows() -> None:
    maps = Maps.of(build_w(TABLE, TABLE), "prefix", TABLE, TABLE, phi_B=longest_tokens(TABLE, TABLE))
    losses = ["p-kl", "h-kl", "gold", "alm", "byte-prefix", "sparse-kl"]
    for merge, some in (("first", losses), ("mean", ["p-kl", "h-kl"])):
        recipe = Recipe(some, merge, 1.0, CodecInfo(k=2, min_p=0.0, step=STEP))
        targets, counts = target_batch(batch_of(), [], maps, recipe)
        assert targets.num_rows == 0
        assert counts["chunks"] == 0


def test_space_is_that_of_the_row_after_the_chunk() -> None:
    """The row that predicts the next token; none after the last, none where the engine gave no full rows."""
    targets, counts = built("first", 1.0)
    found = targets["alm_space_logprob"].flatten().to_pylist()
    assert found == pytest.approx([-0.5, math.nan, math.nan, math.nan], nan_ok=True)
    assert counts["space_chunks"] == 1
    both = pa.array([SPACES, SPACES[:2]], pa.list_(pa.float32()))
    targets, counts = built("first", 1.0, space_logprob=both)
    # y's token 0 has no row, so the row after its first chunk is its row 0
    assert targets["alm_space_logprob"].flatten().to_pylist() == pytest.approx(
        [-0.5, math.nan, -3.0, math.nan], nan_ok=True
    )
    assert counts["space_chunks"] == 2


def test_rows_at_a_temperature_sum_to_one_with_their_rest() -> None:
    """Entries keep the ratios of their powers; no REST and nearly all of it included."""
    codec = CodecInfo(k=2, min_p=0.0, step=STEP, temperatures=[1.0, 0.5, 2.0])
    rows = RowBatch.of(batch_of(), Recipe(["uld"], "first", 2.0, codec)).rows
    for number in range(6):
        p = np.exp(rows.logprob[2 * number : 2 * number + 2])
        assert p.sum() + np.exp(rows.rest[number]) == pytest.approx(1, abs=1e-12)
        assert p[0] / p[1] == pytest.approx(math.sqrt(row(number)[0] / row(number)[1]))
    assert rows.rest[2] == pytest.approx(-math.log(2)), "odds of 0: half is kept"
