"""Bits per byte: what a model needs to write a text, comparable between tokenizers.

Shapes: N held-out samples, B samples of a micro-batch, P its predicting positions, I inputs of a sample, K kinds of
spans (plain text is one).
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
_GPU_MICRO_TOKENS = 16_384  # a GPU waits for the host in smaller ones; without gradients there is room
_LOGITS = 1 << 28  # of one forward pass, of a model that makes them whole: 1 GiB in float32


def micro_tokens(student: Student) -> int:
    """Padded inputs per forward pass; a longer sample is a pass of its own."""
    most = _GPU_MICRO_TOKENS if student.device.type == "cuda" else _MICRO_TOKENS
    return most if student.head.fusable else max(1, min(most, _LOGITS // student.vocabulary))


def bits_per_byte(
    student: Student,
    tokenizer: TokenizerInfo,
    samples: Sequence[EvalSample],
    progress: Progress,
    rows: list[dict[str, Any]] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Bits the student needs per byte of text, over the tokens it predicts; of conversations, those that are taught.

    End-of-text tokens, and those that end an answer, count with their bits and no bytes, as they do in the teacher's
    figure (``teacher_bits_per_byte``) and in a step's: what is said and where it ends. Without a context token a
    sample's first token is not predicted, and its bytes do not count.

    Args:
        rows: gets ``id``, ``source``, ``bits`` and ``bytes`` of every sample with a predicted token, in order.
        ranks: share the samples out; all must call this, and all return the same.

    Returns:
        ``bits_per_byte`` and ``bytes``; where samples name their source, the same for each under ``by_source``; of
        conversations for each kind of span under ``by_kind``, of those without bytes ``bits_per_token`` and
        ``tokens``.

    Raises:
        XtokenError: no token is predicted.
    """
    context = context_token(tokenizer)
    kinds = sorted({span.kind for sample in samples for span in sample.taught or ()}) or [""]
    sequences = [_sequence(str(i), sample, context) for i, sample in enumerate(samples)]
    bytes_N = np.array([s.text_bytes - (s.first_token_bytes if context is None else 0) for s in samples])
    micros = split_micros(sequences, micro_tokens(student), ())
    if not micros or bytes_N.sum() <= 0:
        raise XtokenError("the held-out text holds no token that the model predicts; give a longer one")
    bits_NK = _bits(student, micros, [_kinds(sample, kinds) for sample in samples], len(kinds), progress, ranks)
    bits_N = bits_NK.sum(1)
    if rows is not None:
        predicted = np.flatnonzero([sequence.positions > 0 for sequence in sequences]).tolist()
        rows += [
            {"id": samples[i].id, "source": samples[i].source, "bits": float(bits_N[i]), "bytes": int(bytes_N[i])}
            for i in predicted
        ]
    return _figure(bits_N, bytes_N) | _by_source(samples, bits_N, bytes_N) | _by_kind(samples, kinds, bits_NK.sum(0))


def _sequence(name: str, sample: EvalSample, context: int | None) -> Sample:
    """What the model reads; of a conversation, whose template wrote its beginning, nothing is put before it."""
    if sample.taught is None:
        prefix = np.array([] if context is None else [context], np.int32)
        return Sample(name, np.concatenate([prefix, sample.ids]), (), ())
    taught = np.zeros(len(sample.ids), np.bool_)
    for span in sample.taught:
        taught[span.start : span.stop] = True
    return Sample(name, sample.ids, (), (), taught=taught[1:])


def _kinds(sample: EvalSample, kinds: Sequence[str]) -> NDArray[np.int64]:
    """The kind of each predicted token; of plain text, which has one kind, nothing."""
    spans = [(kinds.index(span.kind), span.stop - max(1, span.start)) for span in sample.taught or ()]
    return np.repeat(np.array([kind for kind, _ in spans], np.int64), [max(0, tokens) for _, tokens in spans])


def _bits(
    student: Student,
    micros: Sequence[Micro],
    kinds: Sequence[NDArray[np.int64]],
    count: int,
    progress: Progress,
    ranks: Ranks,
) -> NDArray[np.float64]:
    """[N, K] bits over each sample's predicted tokens; ``sample_ids`` of the micro-batches count them."""
    bits_NK, mine = np.zeros((len(kinds), count)), micros[ranks.rank :: ranks.size]
    progress.start("bits per byte", sum(len(micro.label_P) for micro in mine), "tokens")
    with torch.no_grad():
        for micro in together(student, mine, ranks):
            numbers = [int(name) for name in micro.sample_ids]
            kind_P = np.concatenate([kinds[number] for number in numbers])
            cell_P = micro.sample_P * count + (kind_P if len(kind_P) else 0)
            bits_NK[numbers] = _nats(student, micro, cell_P, len(numbers) * count).reshape(-1, count) / math.log(2)
            progress.advance(len(micro.label_P))
    progress.finish()
    return np.array(ranks.sum(bits_NK.ravel().tolist())).reshape(bits_NK.shape)


def _nats(student: Student, micro: Micro, cell_P: NDArray[np.int64], cells: int) -> NDArray[np.float64]:
    """Sums of -log p(label) over the positions of each of so many cells."""
    logp_P = torch.zeros(len(micro.label_P), dtype=torch.float64, device=student.device)
    for block in student.blocks(micro):
        piece = block.piece
        logp_P[piece.low : piece.high] = block.logp().gather(1, piece.label_P[:, None])[:, 0].double()
    # on the CPU, where the order of the sums is the same every time; one copy for all blocks
    nats = torch.zeros(cells, dtype=torch.float64).index_add_(0, torch.from_numpy(cell_P), -logp_P.cpu())
    of_cells: NDArray[np.float64] = nats.numpy()
    return of_cells


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


def _by_kind(samples: Sequence[EvalSample], kinds: Sequence[str], bits_K: NDArray[np.float64]) -> dict[str, Any]:
    """Figures of each kind of span; nothing of plain text."""
    spans = [span for sample in samples for span in sample.taught or ()]
    found: dict[str, dict[str, Any]] = {}
    for kind, bits in zip(kinds, bits_K.tolist(), strict=True):
        size = sum(span.size for span in spans if span.kind == kind)
        tokens = sum(span.stop - span.start for span in spans if span.kind == kind)
        if size:
            found[kind] = {"bits_per_byte": bits / size, "bytes": size}
        elif tokens:
            found[kind] = {"bits_per_token": bits / tokens, "tokens": tokens}
    return {"by_kind": found} if found else {}
