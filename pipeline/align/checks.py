"""What must hold in every batch of targets before it is written. A breach is a defect of ours, never the user's.

Shapes: C chunks and K entries of all samples of a batch together.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.align.targets import Joined
from pipeline.store.checks import flat, list_lengths

_SLACK = 1e-5  # float32 log-probabilities of one row, up to 255 entries


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


def check_targets(batch: pa.RecordBatch, student_size: int, teacher_size: int) -> None:
    """Ids lie in their vocabularies, and every target's probabilities and REST sum to 1 within 1e-5."""
    _check_ids(batch, "student_ids", student_size)
    if "pkl_ids" in batch.schema.names:
        _check_ids(batch, "pkl_ids", teacher_size)
        mass_C = _mass(batch, "pkl_count", "pkl_logprob") + np.exp(flat(batch, "pkl_rest_logprob").astype(np.float64))
        assert (np.abs(mass_C - 1) < _SLACK).all(), "a P-KL target and REST do not sum to 1"
    if "hkl_common_ids" in batch.schema.names:
        _check_ids(batch, "hkl_common_ids", student_size)
        mass_C = _mass(batch, "hkl_common_count", "hkl_common_logprob")
        mass_C += _mass(batch, "hkl_other_count", "hkl_other_logprob")
        assert (mass_C < 1 + _SLACK).all(), "an H-KL target sums to more than 1"


def _check_ids(batch: pa.RecordBatch, name: str, size: int) -> None:
    ids = flat(batch, name)
    assert not len(ids) or (ids.min() >= 0 and ids.max() < size), f"{name} outside 0 to {size - 1}"


def _mass(batch: pa.RecordBatch, count: str, logprob: str) -> NDArray[np.float64]:
    """Probability per chunk, [C]."""
    count_C = flat(batch, count)
    chunk_K = np.repeat(np.arange(len(count_C)), count_C)
    p_K = np.exp(flat(batch, logprob).astype(np.float64))
    mass: NDArray[np.float64] = np.bincount(chunk_K, weights=p_K, minlength=len(count_C)).astype(np.float64)
    return mass
