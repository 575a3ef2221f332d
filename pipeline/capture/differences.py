"""How far stored rows are from the same rows scored another way. Absolute differences, in nats.

Shapes: R rows of all samples, one after the other.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.manifest import CodecInfo


def differences(stored: pa.RecordBatch, codec: CodecInfo, others: Sequence[TeacherRows]) -> dict[str, float]:
    """The figures of ``xtoken.schemas.manifest.AuditRecord``.

    Args:
        stored: samples as readers see them (``topk_ids``, not codes); every one has rows.
        codec: of the capture.
        others: the rows of each sample by the other way, as many as the sample has.
    """
    realised_R = np.concatenate([rows.target_logprob for rows in others]).astype(np.float64)
    gap_R = np.abs(flat(stored, "realised_logprob").astype(np.float64) - realised_R)
    figures = {
        "realised_mean": float(gap_R.mean()),
        "realised_p99": float(np.quantile(gap_R, 0.99, method="higher")),
        "realised_max": float(gap_R.max()),
    }
    return figures | open_codec(codec).differences(stored, others)
