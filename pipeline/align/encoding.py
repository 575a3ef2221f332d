"""The student's tokens of samples, or why there are none."""

from typing import NamedTuple

import pyarrow as pa

from xtoken.pipeline.tokens import Encoded, TextTokenizer
from xtoken.pipeline.tokens.failures import CannotTokenize
from xtoken.schemas.errors import XtokenError


class Refusal(NamedTuple):
    """Why a sample has no targets: the rule that it breaks, in the same words for all such, and this one's case."""

    reason: str
    detail: str


_OTHER_TEXT = Refusal("the tokens stand for another text", "the tokenizer rewrote it and keeps no byte ends of it")


def encode(tokenizer: TextTokenizer, batch: pa.RecordBatch) -> list[Encoded | None]:
    """The student's tokens of each sample, in the bytes of the stored text; None where that cannot be.

    A sample closes with eos when its document does, as ``complete`` of the capture says.
    """
    texts, completes = batch["text"].to_pylist(), batch["complete"].to_pylist()
    try:
        encoded: list[Encoded | None] = list(tokenizer.encode_batch(texts, completes, keep_text=True))
    except XtokenError:
        encoded = [encode_one(tokenizer, *one)[0] for one in zip(texts, completes, strict=True)]
    return [one if one is not None and one.text == text else None for one, text in zip(encoded, texts, strict=True)]


def encode_one(tokenizer: TextTokenizer, text: str, complete: bool) -> tuple[Encoded | None, Refusal | None]:
    """The tokens of one sample, or why it has none: exactly one of the two."""
    try:
        encoded = tokenizer.encode(text, complete=complete, keep_text=True)
    except CannotTokenize as error:
        return None, Refusal(error.rule, str(error))
    except XtokenError as error:
        return None, Refusal("the tokenizer fails on the text", str(error))
    return (encoded, None) if encoded.text == text else (None, _OTHER_TEXT)
