"""The Parquet tables, column by column. These names are the public format.

Shape letters: N samples, T teacher tokens, R teacher rows (``xtoken.schemas.spans``), S student tokens, C chunks,
G spans, K kept entries summed over a sample's rows or chunks. Logarithms are natural.
"""

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from xtoken.schemas.losses import BOOLS, FLOATS, INTS, lean_fields, loss_columns
from xtoken.schemas.losses import target_field as _column

# A release writes the first and reads all from the second on: a capture must stay readable.
SCHEMA_VERSIONS = {"capture": 7, "projection": 1, "targets": 8}
OLDEST_READ = {"capture": 1, "projection": 1, "targets": 2}
# Targets hold entries in steps and tokens by code since this version; readers see them as older ones hold them.
LEAN_TARGETS = 6
# A capture's parts are written as now since this version: later ones added to the manifest only.
PARTS_SINCE = 2
# Versions of captures of conversations, and of their targets; those of plain text have lower ones. They add columns.
CHAT_CAPTURE = 6
CHAT_TARGETS = 7
# Versions of captures that were imported, of text or of conversations, and of their targets. Their parts have the
# columns of the versions before; labels and the tail mass may be unknown.
IMPORTED_CAPTURE = 7
IMPORTED_TARGETS = 8


def _field(name: str, kind: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"doc": doc})


def _list(kind: pa.DataType) -> pa.ListType:
    return pa.list_(pa.field("element", kind, nullable=False))


_HEAD = [
    _field("sample_id", pa.string(), "document id, '#', window number: stable over runs"),
    _field("text", pa.string(), "the bytes both tokenizers see; null with --no-text", nullable=True),
    _field("teacher_ids", _list(pa.int32()), "[T] tokens; no BOS; eos last if complete"),
    _field("teacher_end", _list(pa.int32()), "[T] cumulative byte ends in text"),
]
_TAIL = [
    # float32 rounded to 16 significant bits: exact enough by far, and its empty byte costs nothing
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
# Of captures of conversations.
MESSAGES = _field(
    "messages", pa.string(), "the conversation as JSON, with its tools; null with --no-text", nullable=True
)
_SPANS = [
    _field(
        "span_kind",
        _list(pa.string()),
        "[G] template, system, user, result, assistant, thinking, marker, call, stop; in order, all tokens and bytes",
    ),
    _field("span_byte_end", _list(pa.int32()), "[G] cumulative byte ends in text; those of a template add none"),
    _field("span_token_end", _list(pa.int32()), "[G] index after the span's last teacher token"),
    _field("span_message", _list(pa.int32()), "[G] index in messages; -1: of the template"),
    _field("span_part", _list(pa.int32()), "[G] index of the tool call; of a marker 0 opens, 1 closes; else 0"),
    _field("span_learn", _list(pa.bool_()), "[G] its tokens are taught: they alone have rows"),
    MESSAGES,
]
SPAN_COLUMNS = tuple(field.name for field in _SPANS if field is not MESSAGES)
# What a subset may leave out: columns, and the codec's own ("rows") all together. Readers see null, or rows without
# entries.
OPTIONAL = ("text", "rows", "space_logprob")
# Ends of the names of columns that hold teacher tokens by code, and of what readers see.
_CODES, _IDS = "_codes", "_ids"


def holds_codes(name: str) -> bool:
    """Whether a column holds teacher tokens by their code in vocab.parquet."""
    return name.endswith(_CODES)


def read_as(name: str) -> str:
    """What readers call a column of a capture: ``topk_ids`` (the teacher's) what is stored as ``topk_codes``."""
    return name.removesuffix(_CODES) + _IDS if holds_codes(name) else name


def stored_as(name: str) -> str:
    """What a column that readers know is called on disk; all ids but those of the text stand by code."""
    return name.removesuffix(_IDS) + _CODES if name.endswith(_IDS) and name != "teacher_ids" else name


def capture(
    rows: Iterable[pa.Field] = (),
    last: Iterable[pa.Field] = (),
    left_out: Iterable[str] = (),
    *,
    version: int = PARTS_SINCE,
) -> pa.Schema:
    """Schema of a capture; what a codec stores says ``xtoken.pipeline.store.codecs.base.Codec.schema``.

    Args:
        rows, last: columns of the codec, and those that stand at the end.
        left_out: columns that a subset dropped.
        version: schema version of the manifest; version 1 held ids where codes stand now, ``CHAT_CAPTURE`` adds spans.
    """
    fields = [*_HEAD, *rows, *_TAIL, *(_SPANS if version >= CHAT_CAPTURE else []), *last]
    dropped = set(left_out)
    named = [field.with_name(read_as(field.name)) if version == 1 else field for field in fields]
    return pa.schema([field for field in named if field.name not in dropped])


# What every capture has, whatever its codec.
CAPTURE = capture()


VOCAB = pa.schema(
    [
        _field("token_id", pa.int32(), "0 to V-1, every id once"),
        _field("bytes", pa.binary(), "the token's bytes; empty for specials and holes"),
        _field("role", pa.string(), "bos eos eot pad unk special hole; null = text", nullable=True),
        _field("byte_fallback", pa.bool_(), "the token is a <0xHH> byte token"),
    ]
)

# A capture's own: tokens that its corpus uses much have small codes, which compress better than ids.
CAPTURE_VOCAB = VOCAB.append(
    _field("code", pa.int32(), "what stands for the token in topk_codes and draw_codes: 0 to V-1, every code once")
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
        _field("kind", pa.string(), "exact | pieces | role | reverse | random"),
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
    _column("sample_id", pa.string(), "sample", "as in the capture"),
    _column("teacher_entropy", pa.float32(), "sample", "nats: mean over chunk rows, REST as one cell; NaN = no row"),
    _column("teacher_top1", pa.float32(), "sample", "mean over chunk rows of the largest probability; NaN = no row"),
    _column("student_ids", INTS, "token", "[S] tokens; no BOS; eos last if complete"),
    _column("student_end", INTS, "token", "[S] cumulative byte ends"),
    _column("chunk_student_end", INTS, "chunk", "[C] index after the chunk's last student token"),
    _column("chunk_teacher_end", INTS, "chunk", "[C] index after the chunk's last teacher token"),
    _column("teacher_logprob", FLOATS, "chunk", "[C] nats: sum over the chunk's realised tokens; NaN = no row"),
]


# Of targets of conversations.
_LEARN = _column("learn", BOOLS, "token", "[S] the token is taught: CE counts it")


# Which tokens the codes of targets stand for; two vocabularies side by side.
CODES = pa.schema(
    [
        _field("code", pa.int32(), "0 to the size of the larger vocabulary, each once, ascending"),
        _field("teacher_id", pa.int32(), "the teacher's token; null behind its last", nullable=True),
        _field("student_id", pa.int32(), "the student's token; null behind its last", nullable=True),
    ]
)


def _base(chat: bool) -> list[pa.Field]:
    return [*_TARGET_BASE, _LEARN] if chat else _TARGET_BASE


def targets(losses: Iterable[str], version: int = LEAN_TARGETS - 1, *, chat: bool = False) -> pa.Schema:
    """Schema of a target table that serves these losses (names of ``LOSSES``).

    Args:
        losses: that it serves.
        version: schema version of the manifest; left out: the table as readers see it, whatever lies on disk.
        chat: of conversations; follows from a version of the manifest.
    """
    losses = list(losses)
    lean = lean_fields(losses) if version >= LEAN_TARGETS else {}
    base = _base(chat or version >= CHAT_TARGETS)
    return pa.schema([*base, *(lean.get(one.name, one.field) for one in loss_columns(losses))])


class TargetColumn(NamedTuple):
    """A target column and its axis: ``sample`` one value; ``token`` a list with one element per student token,
    ``chunk`` one per chunk; the name of a count column: as many elements as its counts sum to."""

    name: str
    axis: str


def target_columns(
    losses: Iterable[str], version: int = LEAN_TARGETS - 1, *, base: bool = True, chat: bool = False
) -> list[TargetColumn]:
    """The columns of ``targets`` with their axes, in order; ``base=False`` leaves out what all tables have."""
    chat = chat or version >= CHAT_TARGETS
    fields = list(targets(losses, version, chat=chat))[0 if base else len(_base(chat)) :]
    return [TargetColumn(field.name, field.metadata[b"axis"].decode()) for field in fields]
