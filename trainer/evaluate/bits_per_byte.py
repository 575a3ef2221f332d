"""Bits per byte: what a model needs to write a text, comparable between tokenizers."""

import math
from collections.abc import Sequence

import numpy as np

from schemas.errors import XtokenError
from schemas.manifest import TokenizerInfo
from schemas.progress import Progress
from trainer.data.micro import split_micros
from trainer.data.samples import Sample, context_token
from trainer.evaluate.samples import EvalSample
from trainer.step import Student, measure

MICRO_TOKENS = 2048  # padded tokens per forward pass


def bits_per_byte(
    student: Student, tokenizer: TokenizerInfo, samples: Sequence[EvalSample], progress: Progress
) -> dict[str, float]:
    """Bits the student needs per byte of text, over the tokens it predicts.

    End-of-text tokens count with their bits and no bytes. Without a context token a sample's first token is not
    predicted, and its bytes do not count.

    Raises:
        XtokenError: no token is predicted.
    """
    context = context_token(tokenizer)
    prefix = np.array([] if context is None else [context], np.int32)
    total_bytes = sum(s.text_bytes - (s.first_token_bytes if context is None else 0) for s in samples)
    sequences = [Sample(str(i), np.concatenate([prefix, s.ids]), (), ()) for i, s in enumerate(samples)]
    micros = split_micros(sequences, MICRO_TOKENS, ())
    if not micros or total_bytes <= 0:
        raise XtokenError("the held-out text holds no token that the model predicts; give a longer one")
    nats = 0.0
    progress.start("bits per byte", sum(len(micro.label_P) for micro in micros), "tokens")
    for micro in micros:
        nats += float(measure(student, micro, ())[0])
        progress.advance(len(micro.label_P))
    progress.finish()
    return {"bits_per_byte": nats / math.log(2) / total_bytes, "bytes": float(total_bytes)}
