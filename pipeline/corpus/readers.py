"""One small reader per file format, found by suffix.

A reader turns an open binary file into numbered rows and judges nothing but its own format: what
cannot be read is a row with a problem, what the whole file cannot give is a ``FileProblem``.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

from xtoken.pipeline.chats import Form, Refused, read_ids, read_row, to_json
from xtoken.pipeline.corpus.chat import CHAT_WAY_OUT, chat_columns, is_conversation

BOM = b"\xef\xbb\xbf"
# Packed bytes at a time: small, since their contents are held at once.
_ZST_READ = 1 << 14
# The longest window that the zstd command packs with (--long=31). It takes as much memory as a frame really fills.
_ZST_WINDOW = 1 << 31


@dataclass(frozen=True)
class Fields:
    """What of a record is read.

    Attributes:
        text: name of the text field.
        id: name of the id field; None = ids are made of file and record.
        form: of conversations, which are then read instead of the text field.
    """

    text: str
    id: str | None
    form: Form | None = None

    @property
    def wanted(self) -> list[str]:
        """Fields that every record has; what a conversation needs says its form."""
        return [name for name in (self.text if self.form is None else None, self.id) if name is not None]


@dataclass(frozen=True)
class Problem:
    """Why a row or file is bad: ``reason`` is counted, ``detail`` shown, ``fix`` the way out."""

    reason: str
    detail: str
    fix: str


class FileProblem(Exception):
    """The rest of a file is unusable."""

    def __init__(self, problem: Problem) -> None:
        """Carry ``problem``."""
        super().__init__(problem.detail)
        self.problem = problem


@dataclass(frozen=True)
class Row:
    """Record ``number`` (from 0) of a file: its text and id as found, or a problem.

    The text of a conversation is its JSON (``chats.to_json``), and ``text_bytes`` those of its contents; of token ids
    see ``chats.TokenRow``.
    """

    number: int
    text: str = ""
    id: str | None = None
    problem: Problem | None = None
    text_bytes: int | None = None


Reader = Callable[[IO[bytes], Fields, int], Iterator[Row]]


def read_text(file: IO[bytes], fields: Fields, start: int) -> Iterator[Row]:  # noqa: ARG001
    """Plain text or Markdown: the file is one document, record 0, with no fields."""
    if start > 0:
        return
    try:
        yield Row(0, file.read().removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        yield Row(0, problem=_invalid_utf8(error))


def _invalid_utf8(error: UnicodeDecodeError) -> Problem:
    byte = error.object[error.start : error.start + 1].hex()
    if error.object.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Problem("invalid UTF-8", "it begins as UTF-16 does", "re-encode it: iconv -f UTF-16 -t UTF-8")
    return Problem("invalid UTF-8", f"byte 0x{byte} at offset {error.start} is not UTF-8", "re-encode the file")


def read_jsonl(file: Iterable[bytes], fields: Fields, start: int) -> Iterator[Row]:
    """One JSON object per line; blank lines are no documents but keep their number."""
    for number, line in enumerate(file):
        if number < start:
            continue
        data = line.removeprefix(BOM) if number == 0 else line
        if data.strip():
            yield _json_row(number, data, fields)


def _json_row(number: int, data: bytes, fields: Fields) -> Row:
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        return Row(number, problem=_invalid_utf8(error))
    except (ValueError, RecursionError) as error:
        return Row(number, problem=Problem("invalid JSON", f"not JSON: {error}", "write one JSON object per line"))
    if not isinstance(value, dict):
        detail = f"holds a JSON {_type_name(value)}, not an object"
        return Row(number, problem=Problem("invalid JSON", detail, "write one JSON object per line"))
    for name in fields.wanted:
        if name not in value:
            return Row(number, problem=missing_field(name, list(value), fields))
    found = value if fields.form is not None else value[fields.text]
    return make_row(number, found, None if fields.id is None else value[fields.id], fields)


def read_jsonl_gz(file: IO[bytes], fields: Fields, start: int) -> Iterator[Row]:
    """``read_jsonl`` of a gzip stream."""
    with gzip.open(file, "rb") as stream:
        yield from read_jsonl(stream, fields, start)


def first_names(file: IO[bytes], suffix: str) -> list[str]:
    """Names of the fields of the first record of JSON lines; none where it is no object."""
    lines: Iterable[bytes] = file
    if suffix.endswith(".gz"):
        lines = gzip.GzipFile(fileobj=file)
    elif suffix.endswith(".zst"):
        lines = _lines(_unpacked(file))
    first = next((line for line in lines if line.removeprefix(BOM).strip()), b"null")
    value = json.loads(first.removeprefix(BOM))
    return list(value) if isinstance(value, dict) else []


def read_jsonl_zst(file: IO[bytes], fields: Fields, start: int) -> Iterator[Row]:
    """``read_jsonl`` of a Zstandard stream of one or more frames.

    Raises:
        EOFError: the stream ends inside a frame (zstandard's own reader would just stop there).
    """
    yield from read_jsonl(_lines(_unpacked(file)), fields, start)


def _unpacked(file: IO[bytes]) -> Iterator[bytes]:
    import zstandard

    frame = None
    while data := file.read(_ZST_READ):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_ZST_WINDOW).decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the Zstandard stream ends inside a frame")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends, the last perhaps without one."""
    begun: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        begun.append(first)
        for line in others:
            yield b"".join(begun) + b"\n"
            begun = [line]
    if last := b"".join(begun):
        yield last


def missing_field(name: str, available: list[str], fields: Fields) -> Problem:
    """A record, or a whole table, without a field that was asked for."""
    shown = ", ".join(repr(field) for field in available[:8]) or "none"
    detail, chat = f"has no field {name!r}; it has {shown}", chat_columns(available)
    if name == fields.text and fields.form is None and chat:
        return Problem("chat data", f"{detail}: a conversation, by the name {' and '.join(chat)}", CHAT_WAY_OUT)
    asked = "--text-field" if fields.form is None else f"another --form than {fields.form}"
    return Problem("missing field", detail, f"choose {asked} or --id-field")


def no_text(name: str, kind: str, *, chat: bool) -> Problem:
    """A text field that holds something else: values of ``kind``, or conversations."""
    if chat:
        return Problem("chat data", f"field {name!r} holds a conversation ({kind}), not text", CHAT_WAY_OUT)
    fix = "choose a field that holds text with --text-field"
    return Problem("field is not text", f"field {name!r} holds {kind}, not text", fix)


def make_row(number: int, found: Any, document_id: Any, fields: Fields) -> Row:
    """A row of a text, or a record that is a conversation, and an id as found, checked for their types."""
    row = _chat_row(number, found, fields.form) if fields.form is not None else _text_row(number, found, fields)
    if fields.id is None or row.problem is not None:
        return row
    if isinstance(document_id, bool) or not isinstance(document_id, str | int) or document_id == "":
        detail = f"id field {fields.id!r} holds {document_id!r}, not a text or a whole number"
        return Row(number, problem=Problem("bad id", detail, "choose another --id-field, or none"))
    return replace(row, id=str(document_id))


def _text_row(number: int, text: Any, fields: Fields) -> Row:
    if isinstance(text, str):
        return Row(number, text)
    return Row(number, problem=no_text(fields.text, _type_name(text), chat=is_conversation(text)))


def _chat_row(number: int, record: Mapping[str, Any], form: Form) -> Row:
    try:
        if form == "ids":
            row = read_ids(record)
            return Row(number, row.to_json(), text_bytes=row.text_bytes)
        conversation = read_row(record, form)
    except Refused as refused:
        return Row(number, problem=Problem(refused.reason, refused.detail, refused.fix))
    return Row(number, to_json(conversation), text_bytes=conversation.text_bytes)


def _type_name(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object", str: "string"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
