"""What must hold in every batch of targets before it is written. A breach is a defect of ours, never the user's.

Shapes: N samples, C chunks and K entries of all samples of a batch together.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.align.chunks import Joined
from pipeline.align.targets import Maps
from pipeline.store.columns import flat, list_lengths

_SLACK = 1e-5  # float32 log-probabilities of one row, up to 255 entries
_SUM_SLACK = 2e-3  # what a capture's realised log-probabilities may be above 0

_STUDENT_IDS = ("student_ids", "hkl_common_ids", "gold_ids", "prefix_ids", "skl_ids")
_WHOLE = ("pkl_count", "prefix_count", "skl_count")
_PARTIAL = (
    (("hkl_common_count", "hkl_common_logprob"), ("hkl_other_count", "hkl_other_logprob")),
    (("gold_count", "gold_logprob"), ("gold_other_count", "gold_other_logprob")),
    (("uld_count", "uld_logprob"),),
    (("child_count", "child_logprob"),),
)
_DRAWN = tuple(((name, name.replace("count", "logprob")),) for name in _WHOLE)
_LOGPROBS = ("factor_logprob", "alm_space_logprob")


def check_samples(batch: pa.RecordBatch, samples: Sequence[Joined]) -> None:
    """Chunks tile the sample from its first token, and both sides of each cover the same bytes."""
    ends, stops = flat(batch, "teacher_end"), np.cumsum(list_lengths(batch, "teacher_end"))
    for sample in samples:
        start = stops[sample.at - 1] if sample.at else 0
        theirs = _bytes_at(ends[start : stops[sample.at]], sample.chunks.teacher_end)
        mine = _bytes_at(sample.encoded.ends, sample.chunks.student_end)
        assert (mine == theirs).all(), f"chunks of sample {sample.at} cover other bytes on the two sides"
        assert (np.diff(mine, prepend=np.int32(0)) >= 0).all(), f"chunks of sample {sample.at} do not tile it"


def _bytes_at(end: NDArray[np.int32], cut_C: NDArray[np.int32]) -> NDArray[np.int32]:
    """Byte at which each chunk ends."""
    assert not len(cut_C) or int(cut_C[-1]) <= len(end), "a chunk ends after its sample"
    byte: NDArray[np.int32] = np.concatenate([np.zeros(1, np.int32), end])[cut_C]
    return byte


def check_targets(batch: pa.RecordBatch, maps: Maps, tau: float, *, drawn: bool = False) -> None:
    """Ids lie in their vocabularies, and every target's probabilities and REST sum to 1 (or at most 1) within 1e-5.

    Of ``drawn`` rows all sum to at most 1: what no cell holds is left out.
    """
    parts = (*_PARTIAL, *_DRAWN) if drawn else _PARTIAL
    present = set(batch.schema.names)
    for name in present.intersection(_STUDENT_IDS):
        _check_ids(batch, name, maps.student_size)
    if "pkl_ids" in present:
        _check_ids(batch, "pkl_ids", maps.teacher_size)
    for prefix in present.intersection(() if drawn else _WHOLE):
        _check_whole(batch, prefix.removesuffix("_count"), tau)
    for part in parts:
        if part[0][0] in present:
            mass = np.sum([_mass(batch, count, logprob) for count, logprob in part], axis=0)
            assert (mass < 1 + _SLACK).all(), f"{part[0][1]} sums to more than 1"
    for name in present.intersection(_LOGPROBS):
        value_C = flat(batch, name)
        assert (np.isnan(value_C) | (value_C <= _SUM_SLACK)).all(), f"{name} is no log-probability"
    if "child_low" in present:
        low_K, high_K = flat(batch, "child_low"), flat(batch, "child_high")
        in_order = (low_K >= 0) & (low_K < high_K) & (high_K <= maps.student_text)
        assert in_order.all(), f"a child range is empty or outside 0 to {maps.student_text}"
    _check_confidence(batch)


def _check_whole(batch: pa.RecordBatch, prefix: str, tau: float) -> None:
    """Entries and REST sum to 1; where REST is unknown, the entries alone."""
    rest_C = flat(batch, f"{prefix}_rest_logprob").astype(np.float64)
    unknown_C = np.isnan(rest_C)
    assert tau != 1 or not unknown_C.any(), f"{prefix}_rest_logprob is NaN at temperature 1"
    mass_C = _mass(batch, f"{prefix}_count", f"{prefix}_logprob") + np.where(unknown_C, 0.0, np.exp(rest_C))
    assert (np.abs(mass_C - 1) < _SLACK).all(), f"{prefix}_logprob and REST do not sum to 1"


def _check_confidence(batch: pa.RecordBatch) -> None:
    entropy_N, top_N = (batch[name].to_numpy() for name in ("teacher_entropy", "teacher_top1"))
    assert (np.isnan(entropy_N) == np.isnan(top_N)).all(), "entropy and top1 are of other samples"
    assert (np.isnan(entropy_N) | (entropy_N >= -_SLACK)).all(), "a negative entropy"
    assert (np.isnan(top_N) | ((top_N > 0) & (top_N < 1 + _SLACK))).all(), "top1 is no probability"


def _check_ids(batch: pa.RecordBatch, name: str, size: int) -> None:
    ids = flat(batch, name)
    assert not len(ids) or (ids.min() >= 0 and ids.max() < size), f"{name} outside 0 to {size - 1}"


def _mass(batch: pa.RecordBatch, count: str, logprob: str) -> NDArray[np.float64]:
    """Probability per chunk or token, [C]."""
    count_C = flat(batch, count)
    assert (count_C >= 0).all(), f"{count} is negative"
    chunk_K = np.repeat(np.arange(len(count_C)), count_C)
    p_K = np.exp(flat(batch, logprob).astype(np.float64))
    mass: NDArray[np.float64] = np.bincount(chunk_K, weights=p_K, minlength=len(count_C)).astype(np.float64)
    return mass
