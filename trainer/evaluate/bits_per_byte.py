"""Bits per byte: what a model needs to write a text, comparable between tokenizers.

Shapes: N held-out samples, B samples of a micro-batch, P its predicting positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Progress
from xtoken.trainer.data.micro_batch import Micro, split_micros
from xtoken.trainer.data.samples import Sample, context_token
from xtoken.trainer.evaluate.samples import EvalSample
from xtoken.trainer.evaluate.together import together
from xtoken.trainer.objective import Student
from xtoken.trainer.ranks import ALONE, Ranks

_MICRO_TOKENS = 2048  # padded inputs per forward pass
_LOGITS = 1 << 28  # of one forward pass, of a model that makes them whole: 1 GiB in float32


def micro_tokens(student: Student) -> int:
    """Padded inputs per forward pass; a longer sample is a pass of its own."""
    return _MICRO_TOKENS if student.head.fusable else max(1, min(_MICRO_TOKENS, _LOGITS // student.vocabulary))


def bits_per_byte(
    student: Student,
    tokenizer: TokenizerInfo,
    samples: Sequence[EvalSample],
    progress: Progress,
    rows: list[dict[str, Any]] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Bits the student needs per byte of text, over the tokens it predicts.

    End-of-text tokens count with their bits and no bytes. Without a context token a sample's first token is not
    predicted, and its bytes do not count.

    Args:
        rows: gets ``id``, ``source``, ``bits`` and ``bytes`` of every sample with a predicted token, in order.
        ranks: share the samples out; all must call this, and all return the same.

    Returns:
        ``bits_per_byte`` and ``bytes``; where samples name their source, the same for each under ``by_source``.

    Raises:
        XtokenError: no token is predicted.
    """
    context = context_token(tokenizer)
    prefix = np.array([] if context is None else [context], np.int32)
    sequences = [Sample(str(i), np.concatenate([prefix, s.ids]), (), ()) for i, s in enumerate(samples)]
    bytes_N = np.array([s.text_bytes - (s.first_token_bytes if context is None else 0) for s in samples])
    micros = split_micros(sequences, micro_tokens(student), ())
    if not micros or bytes_N.sum() <= 0:
        raise XtokenError("the held-out text holds no token that the model predicts; give a longer one")
    bits_N = _bits(student, micros, len(samples), progress, ranks)
    if rows is not None:
        predicted = np.flatnonzero([sequence.inputs > 0 for sequence in sequences]).tolist()
        rows += [
            {"id": samples[i].id, "source": samples[i].source, "bits": float(bits_N[i]), "bytes": int(bytes_N[i])}
            for i in predicted
        ]
    return _figure(bits_N, bytes_N) | _by_source(samples, bits_N, bytes_N)


def _bits(
    student: Student, micros: Sequence[Micro], samples: int, progress: Progress, ranks: Ranks
) -> NDArray[np.float64]:
    """[N] bits over each sample's predicted tokens; ``sample_ids`` of the micro-batches count them."""
    bits_N, mine = np.zeros(samples), micros[ranks.rank :: ranks.size]
    progress.start("bits per byte", sum(len(micro.label_P) for micro in mine), "tokens")
    with torch.no_grad():
        for micro in together(student, mine, ranks):
            bits_N[[int(name) for name in micro.sample_ids]] = _nats(student, micro) / math.log(2)
            progress.advance(len(micro.label_P))
    progress.finish()
    return np.array(ranks.sum(bits_N.tolist()))


def _nats(student: Student, micro: Micro) -> NDArray[np.float64]:
    """[B] sums of -log p(label)."""
    sample_P, logp_P = torch.from_numpy(micro.sample_P), torch.zeros(len(micro.label_P), dtype=torch.float64)
    for block in student.blocks(micro):
        label_P = torch.from_numpy(micro.label_P[block.low : block.high]).to(block.rows.device)
        logp_P[block.low : block.high] = block.logp().gather(1, label_P[:, None])[:, 0].cpu().double()
    nats_B = torch.zeros(len(micro.sample_ids), dtype=torch.float64).index_add_(0, sample_P, -logp_P)
    of_samples: NDArray[np.float64] = nats_B.numpy()
    return of_samples


def _figure(bits_N: NDArray[np.float64], bytes_N: NDArray[np.int64]) -> dict[str, Any]:
    return {"bits_per_byte": float(bits_N.sum() / bytes_N.sum()), "bytes": int(bytes_N.sum())}


def _by_source(
    samples: Sequence[EvalSample], bits_N: NDArray[np.float64], bytes_N: NDArray[np.int64]
) -> dict[str, Any]:
    """Figures of each source that has bytes, by name; nothing where no sample names one."""
    source_N = np.array([sample.source for sample in samples], dtype=object)
    sources = {str(name): source_N == name for name in sorted(set(source_N.tolist()))}
    if set(sources) == {""}:
        return {}
    return {"by_source": {name: _figure(bits_N[of], bytes_N[of]) for name, of in sources.items() if bytes_N[of].sum()}}
