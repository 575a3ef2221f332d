"""Batches of a capture of conversations, as a worker would have written them, with made-up distributions."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from xtoken.pipeline.align.parts import with_teacher_eos
from xtoken.pipeline.chats import ChatModel, ChatTokens, Conversation, span_columns, to_json
from xtoken.pipeline.chats.slots import Kind
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codes import restore_ids
from xtoken.pipeline.store.writer import Sample, capture_batch
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.manifest import CodecInfo
from xtoken.schemas.tables import CHAT_CAPTURE

CODEC = CodecInfo(k=8, min_p=0.0001, step=1 / 32)
LEARN: tuple[Kind, ...] = ("assistant", "thinking", "call", "stop")


def rows_of(tokens: ChatTokens, size: int, ends: Collection[int] = (), seed: int = 0) -> TeacherRows:
    """A distribution for every taught token: the token itself, those of ``ends``, and others; a tail is left."""
    rng = np.random.default_rng(seed)
    taught = tokens.ids[tokens.learn].tolist()
    ids, logprob, label = [], [], []
    for token in taught:
        others = [token, *ends, *rng.choice(size, 16, replace=False).tolist()]
        kept = list(dict.fromkeys(others))[:8]
        p = 0.9 * rng.dirichlet(np.ones(8))
        order = np.argsort(-p, kind="stable")
        ids.append([kept[at] for at in order])
        logprob.append(np.log(p[order]))
        label.append(np.log(p[0]))
    wide = np.array(ids, np.int32).reshape(-1, 8), np.array(logprob, np.float32).reshape(-1, 8)
    return TeacherRows(*wide, np.array(label, np.float32), np.ones(len(taught), np.int32))


def chat_batch(
    model: ChatModel,
    conversations: Mapping[str, Conversation],
    *,
    learn: Collection[Kind] = LEARN,
    ends: Collection[int] = (),
    rows: Sequence[TeacherRows] | None = None,
) -> pa.RecordBatch:
    """As ``CaptureParts.read`` gives it.

    Args:
        model: the teacher.
        conversations: by sample id.
        learn: kinds of spans that are taught.
        ends: tokens that every distribution holds.
        rows: each sample's distributions; made up when left out.
    """
    codec, size = open_codec(CODEC), model.tokenizer.table.size
    samples = []
    for at, (name, conversation) in enumerate(conversations.items()):
        tokens = model.encode(conversation, learn)
        found = rows_of(tokens, size, ends, at) if rows is None else rows[at]
        samples.append(
            Sample(
                name,
                tokens.text,
                tokens.ids,
                tokens.ends,
                codec.encode(found, size),
                found.target_logprob,
                None,
                1,
                True,
                tokens.snapped,
                span_columns(tokens.spans),
                to_json(conversation),
            )
        )
    batch = capture_batch(samples, codec.schema(version=CHAT_CAPTURE))
    return with_teacher_eos(restore_ids(batch, np.arange(size, dtype=np.int32)), model.tokenizer.table.info.eos_id)
