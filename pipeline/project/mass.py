"""How much of a teacher's probability lies on each of its tokens, summed over the rows of a capture.

Shapes: U teacher vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.manifest import CaptureManifest, read_manifest


@dataclass(frozen=True)
class Mass:
    """A teacher's rows added up.

    Attributes:
        share_U: float64, share of all probability that lies on each token as an entry.
        not_kept: share that lies in the tail; together they sum to 1.
        rows: how many rows were read.
    """

    share_U: NDArray[np.float64]
    not_kept: float
    rows: int


def teacher_mass(capture: str, limit: int) -> Mass | None:
    """The mass of the first ``limit`` rows of a capture, one batch of samples in memory at a time; None without rows.

    Raises:
        XtokenError: the folder holds no finished capture.
        VerificationError: a part is missing or torn.
    """
    manifest = read_manifest(capture, CaptureManifest)
    mass_U, rest, rows = np.zeros(manifest.tokenizer.size), 0.0, 0
    codec = open_codec(manifest.codec)
    for batch in iter_capture(capture, codec.columns):
        if rows >= limit:
            break
        decoded = codec.decode(batch)
        taken = min(limit - rows, len(decoded.tail_logprob))
        stop = int(decoded.offsets[taken])
        mass_U += np.bincount(decoded.ids[:stop], np.exp(decoded.logprob[:stop]), len(mass_U))
        rest += float(np.exp(decoded.tail_logprob[:taken]).sum())
        rows += taken
    if not mass_U.any():  # no rows, or a subset left them out
        return None
    # the codec's rounding leaves a row's sum a little off 1
    total = float(mass_U.sum()) + rest
    return Mass(mass_U / total, rest / total, rows)
