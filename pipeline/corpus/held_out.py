"""Held-out conversations: a file of JSON lines, of which each is a row of chat data."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from xtoken.pipeline.chats import Conversation, Form, Refused, form_of, read_row
from xtoken.pipeline.corpus.corpus import source_of
from xtoken.pipeline.corpus.readers import BOM
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import open_url


class Talk(NamedTuple):
    """A conversation, by the id and the source of its row."""

    id: str
    source: str
    conversation: Conversation


def held_out_talks(config: CorpusConfig) -> list[Talk] | None:
    """Conversations of a file; None where it holds text, or is of another kind, so that it is read as text.

    Raises:
        XtokenError: a row is no conversation, or has another's id.
    """
    if not config.corpus.endswith(".jsonl"):
        return None
    talks: dict[str, Talk] = {}
    form: Form | None = None
    for number, value in _rows(config.corpus):
        if not talks:
            form = form_of(list(value)) if isinstance(value, dict) and config.text_field not in value else None
        if form is None:
            return None
        where = f"{config.corpus.rpartition('/')[2]}, line {number + 1}"
        name = _name(config, number, value, where)
        if name in talks:
            raise XtokenError(
                f"{where}: id {name!r} was seen before, but ids must be unique; choose another --id-field"
            )
        try:
            talks[name] = Talk(name, source_of(name), read_row(value, form))
        except Refused as refused:
            raise XtokenError(f"{where}: {refused}") from refused
        if len(talks) == config.limit:
            break
    return list(talks.values()) if form is not None else None


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    """Line numbers from 0, and what the lines hold; None where one is no JSON. Nothing where there is no file."""
    try:
        with open_url(path) as file:
            for number, line in enumerate(file):
                data = line.removeprefix(BOM) if number == 0 else line
                if data.strip():
                    yield number, _parsed(data)
    except FileNotFoundError:
        return


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        return None


def _name(config: CorpusConfig, number: int, value: Any, where: str) -> str:
    if not isinstance(value, dict):
        raise XtokenError(f"{where}: it is no JSON, or not an object; write one JSON object per line")
    if config.id_field is None:
        return f"{config.corpus.rpartition('/')[2]}:{number}"
    if config.id_field not in value:
        raise XtokenError(f"{where}: it has no field {config.id_field!r}; choose another --id-field")
    return str(value[config.id_field])
