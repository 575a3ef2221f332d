"""A vLLM reply's ``prompt_logprobs`` as arrays: tensors that were kept, or the public flat form.

Shapes: R rows of one prompt, K entries asked for; column 0 of K + 1 is the label, then come ranks 1 to K.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Entries = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]
"""Token ids [R, K + 1], log-probabilities [R, K + 1], ranks of the labels [R]."""


class TensorRows:
    """A prompt's rows as the engine sent them: (token ids, log-probabilities, ranks) of each chunk, in order."""

    def __init__(self) -> None:
        self._chunks: list[tuple[Any, Any, Any]] = []

    def append(self, tensors: Any) -> None:
        """Keep one chunk: token ids [n, K + 1], log-probabilities [n, K + 1], ranks [n], more is ignored."""
        token, logprob, rank, *_ = tensors
        self._chunks.append((token, logprob, rank))

    def entries(self) -> Entries:
        """The chunks as arrays, one after the other."""
        token, logprob, rank = ([np.asarray(part) for part in parts] for parts in zip(*self._chunks, strict=True))
        return _joined(token, np.int32), _joined(logprob, np.float32), _joined(rank, np.int32)


def _joined(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.ascontiguousarray(whole, dtype=dtype)


def flat_entries(flat: Any, rows: int, k: int) -> Entries | None:
    """Entries of vLLM's public flat form; None where they are not rows of the label and ranks 1 to k."""
    width = k + 1
    expected = [0, *range(0, width * rows, width)]
    if flat is None or list(flat.start_indices) != expected or len(flat.token_ids) != width * rows:
        return None
    rank = np.array(flat.ranks, np.int32).reshape(rows, width)
    if not (rank[:, 1:] == np.arange(1, width)).all():
        return None
    shape = (rows, width)
    token, logprob = np.array(flat.token_ids, np.int32), np.array(flat.logprobs, np.float32)
    return token.reshape(shape), logprob.reshape(shape), rank[:, 0].copy()


def read_entries(kept: Any, rows: int, k: int) -> Entries | None:
    """Entries of a reply's ``prompt_logprobs``, from either path; None where they are not ``rows`` rows of k + 1."""
    if not isinstance(kept, TensorRows):
        return flat_entries(kept, rows, k) if hasattr(kept, "start_indices") else None
    token, logprob, rank = kept.entries()
    fits = token.shape == logprob.shape == (rows, k + 1) and rank.shape == (rows,)
    return (token, logprob, rank) if fits else None
