"""The Parquet tables, column by column. These names are the public format.

Shape letters: N samples, T teacher tokens, R teacher rows (T - first_row), S student tokens,
C chunks, K kept entries summed over a sample's rows or chunks. Logarithms are natural.
"""

from collections.abc import Iterable

import pyarrow as pa

SCHEMA_VERSION = 1


def _field(name: str, kind: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


def _list(kind: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("element", kind, nullable=False))


CAPTURE = pa.schema(
    [
        _field("sample_id", pa.string(), "document id, '#', window number: stable over runs"),
        _field("text", pa.string(), "the bytes both tokenizers see; null with --no-text", nullable=True),
        _field("teacher_ids", _list(pa.int32()), "[T] tokens; no BOS; eos last if complete"),
        _field("teacher_end", _list(pa.int32()), "[T] cumulative byte ends in text"),
        _field("kept", _list(pa.uint8()), "[R] entries kept in the row, 1 to k"),
        _field("topk_ids", _list(pa.int32()), "[K] kept teacher ids, rows in order, rank order within"),
        _field("topk_gap", _list(pa.uint16()), "[K] steps: rank 0 -logprob, later ranks distance to the rank before"),
        _field("rest_gap", _list(pa.uint16()), "[R] steps: -log of the mass not kept; 65535 = none"),
        _field("realised_logprob", _list(pa.float32()), "[R] nats: log-probability of the token in the text"),
        _field(
            "space_logprob",
            _list(pa.float32()),
            "[R] nats: log P(token starts with a space); null where the engine gave no full rows",
            nullable=True,
        ),
        _field("first_row", pa.int32(), "0: the teacher saw BOS first; 1: token 0 has no row"),
        _field("complete", pa.bool_(), "the sample ends where its document ends"),
        _field("snapped", pa.bool_(), "some ends were moved up to a safe byte"),
    ]
)

VOCAB = pa.schema(
    [
        _field("token_id", pa.int32(), "0 to V-1, every id once"),
        _field("bytes", pa.binary(), "the token's bytes; empty for specials and holes"),
        _field("role", pa.string(), "bos eos eot pad unk special hole; null = text", nullable=True),
        _field("byte_fallback", pa.bool_(), "the token is a <0xHH> byte token"),
    ]
)

MERGES = pa.schema(
    [
        _field("left", pa.int32(), "token id; merges stand in rank order"),
        _field("right", pa.int32(), "token id"),
    ]
)

W = pa.schema(
    [
        _field("student_id", pa.int32(), "row; ascending"),
        _field("teacher_id", pa.int32(), "column"),
        _field("weight", pa.float32(), "rows sum to 1 or are absent"),
        _field("kind", pa.string(), "exact | pieces | role"),
        _field("common", pa.bool_(), "the pair is in H-KL's common set C"),
    ]
)

UNREACHED = pa.schema(
    [
        _field("teacher_id", pa.int32(), "a teacher token that no row of W reaches"),
        _field("moved_to", pa.int32(), "the reached teacher token its mass moves to; null = REST", nullable=True),
    ]
)

_TARGET_BASE = [
    _field("sample_id", pa.string(), "as in the capture"),
    _field("student_ids", _list(pa.int32()), "[S] tokens; no BOS; eos last if complete"),
    _field("student_end", _list(pa.int32()), "[S] cumulative byte ends"),
    _field("chunk_student_end", _list(pa.int32()), "[C] index after the chunk's last student token"),
    _field("chunk_teacher_end", _list(pa.int32()), "[C] index after the chunk's last teacher token"),
    _field("teacher_logprob", _list(pa.float32()), "[C] nats: sum over the chunk's realised tokens; NaN = no row"),
]

# A chunk whose first teacher token has no row has count 0 and takes no part in the loss.
_TARGET_LOSS = {
    "ce": [],
    "p-kl": [
        _field("pkl_count", _list(pa.int32()), "[C] entries of the chunk"),
        _field("pkl_ids", _list(pa.int32()), "[K] teacher ids, most probable first, all reached by W"),
        _field("pkl_logprob", _list(pa.float32()), "[K] nats, after unreached mass moved; exp sums to 1 with REST"),
        _field("pkl_rest_logprob", _list(pa.float32()), "[C] nats: log of REST; -inf = none"),
    ],
    "h-kl": [
        _field("hkl_common_count", _list(pa.int32()), "[C] entries in the common set"),
        _field("hkl_common_ids", _list(pa.int32()), "[K] student ids of pairs in C, most probable first"),
        _field("hkl_common_logprob", _list(pa.float32()), "[K] nats: teacher log-probability of the pair"),
        _field("hkl_other_count", _list(pa.int32()), "[C] kept entries outside C"),
        _field("hkl_other_logprob", _list(pa.float32()), "[K] nats: teacher log-probabilities outside C, descending"),
    ],
}

LOSSES = tuple(_TARGET_LOSS)


def targets(losses: Iterable[str]) -> pa.Schema:
    """Schema of a target table that serves these losses (names of ``LOSSES``)."""
    wanted = set(losses)
    extra = [field for loss in LOSSES if loss in wanted for field in _TARGET_LOSS[loss]]
    return pa.schema([*_TARGET_BASE, *extra])
