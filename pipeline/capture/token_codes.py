"""Which tokens the corpus uses most, from a look at a few of its shards: what the codes of a capture follow from."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.capture.conversations import Chat
from xtoken.pipeline.capture.plan import Plan, SliceReader
from xtoken.pipeline.capture.rendered_chat import Look
from xtoken.pipeline.corpus import Document
from xtoken.pipeline.store.codes import Codes, codes_by_use
from xtoken.pipeline.tokens import TextTokenizer
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import XtokenError

_SHARDS = 16
_SHARD_BYTES = 1 << 18
_BATCH = 64


def corpus_codes(config: CorpusConfig, plan: Plan, tokenizer: TextTokenizer, chat: Chat | None = None) -> Codes:
    """int32 [U], a code for each teacher id; the same for the same plan and tokenizer.

    Texts that the tokenizer refuses count for nothing here; the run itself says what is wrong with them.

    Args:
        config: the corpus.
        plan: of it.
        tokenizer: the teacher's.
        chat: what renders conversations; None of plain text.

    Raises:
        StopRun: the corpus is not the planned one any more, or ``chat`` refuses a conversation.
    """
    shards = _some_shards(config, plan)
    if chat is not None:
        sequences = (tokens for shard in shards for tokens in chat.sequences(_beginning(shard)))
    else:
        sequences = (_tokens(texts, tokenizer) for texts in _texts(shards))
    return codes_by_use(sequences, tokenizer.table.size)


def _beginning(documents: Iterable[Document]) -> Iterator[Document]:
    """The first documents of a shard, of some bytes together."""
    size = 0
    for document in documents:
        if size >= _SHARD_BYTES:
            return
        yield document
        size += document.text_bytes


def look_at_some(config: CorpusConfig, plan: Plan, look: Look) -> None:
    """Look at the documents of a few shards of a plan that was made without this look.

    Raises:
        StopRun: the corpus is not the planned one any more.
        XtokenError: they look rendered.
    """
    deque(look.over(chain.from_iterable(_some_shards(config, plan))), maxlen=0)


def _some_shards(config: CorpusConfig, plan: Plan) -> Iterator[list[Document]]:
    """The documents of evenly spaced shards."""
    reader = SliceReader(config, plan)
    stride = -(-len(plan.shards) // _SHARDS) if plan.shards else 1
    yield from map(reader.read, plan.shards[::stride])


def _texts(shards: Iterable[list[Document]]) -> Iterator[list[str]]:
    """Batches of documents from the beginnings of shards."""
    for documents in shards:
        size, batch = 0, list[str]()
        for document in documents:
            if size >= _SHARD_BYTES:
                break
            # of a long document its beginning: cut at a character, wherever that is in a word
            batch.append(document.text.encode()[: _SHARD_BYTES - size].decode(errors="ignore"))
            size += len(batch[-1].encode())
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def _tokens(texts: list[str], tokenizer: TextTokenizer) -> NDArray[np.int32]:
    try:
        encoded = tokenizer.encode_batch(texts, [True] * len(texts))
    except XtokenError:
        return np.zeros(0, np.int32)
    return np.concatenate([np.zeros(0, np.int32), *(one.ids for one in encoded)])
